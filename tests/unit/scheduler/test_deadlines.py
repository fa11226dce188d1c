"""The heap of deadlines against a look at everybody."""

import random
from typing import Any

import pytest

from headrace.scheduler.deadlines import DeadlineHeap
from headrace.scheduler.messages import GenerationRequest, SamplingParams
from headrace.scheduler.sequence import Sequence, SequenceStatus

NEVER = float("inf")


def sequence(id: int, **fields: Any) -> Sequence:
    return Sequence(GenerationRequest(id, (1,), SamplingParams(), 0.0, **fields))


def due_s(sequence: Sequence) -> float:
    """When it is out of time, by the words of the request's docstring."""
    request = sequence.request
    at_s = [request.deadline_s]
    if sequence.scheduled_s is None:
        at_s.append(request.queue_deadline_s)
    if sequence.last_token_s is None:
        at_s.append(request.first_token_deadline_s)
    else:
        at_s.append(sequence.last_token_s + request.stall_timeout_s)
    return min(at_s)


@pytest.mark.parametrize("seed", range(8))
def test_they_run_out_of_time_when_a_look_at_everybody_says_so(seed: int) -> None:
    """In random lives of four kinds of deadlines: begun, given tokens, ended early, or not."""
    rng = random.Random(seed)
    alive: dict[int, Sequence] = {}
    heap = DeadlineHeap(alive)
    now, num_expired = 0.0, 0
    for id in range(3000):
        now += rng.random()
        kinds = ("deadline_s", "queue_deadline_s", "first_token_deadline_s")
        deadlines_s = {kind: now + rng.choice([NEVER, 10, 40]) * rng.random() for kind in kinds}
        stall_timeout_s = rng.choice([NEVER, 3.0, 8.0])
        alive[id] = made = sequence(id, **deadlines_s, stall_timeout_s=stall_timeout_s)
        heap.watch(made)
        for other in rng.sample(list(alive.values()), min(6, len(alive))):
            if other.scheduled_s is None:
                other.scheduled_s, other.status = now, SequenceStatus.RUNNING
            elif rng.random() < 0.1:
                del alive[other.request.request_id]
            else:
                is_first = other.last_token_s is None
                other.last_token_s = now
                if is_first:
                    heap.watch(other)
        expected = {id for id, item in alive.items() if due_s(item) <= now}
        expired = []
        for item in heap.pop_expired(now):
            expired.append(item.request.request_id)
            del alive[expired[-1]]
        assert sorted(expired) == sorted(expected), "each once"
        num_expired += len(expired)
        assert len(heap._heap) <= 4 * len(alive) + 64 + 4
    assert num_expired > 500


def test_a_deadline_is_over_at_its_very_moment_and_not_before() -> None:
    alive = {0: sequence(0, deadline_s=5.0)}
    heap = DeadlineHeap(alive)
    heap.watch(alive[0])
    assert list(heap.pop_expired(4.999)) == []
    assert list(heap.pop_expired(5.0)) == [alive[0]]


def test_requests_without_deadlines_leave_no_trace_and_those_that_are_over_not_for_long() -> None:
    alive: dict[int, Sequence] = {}
    heap = DeadlineHeap(alive)
    for id in range(10_000):
        alive[id] = sequence(id, deadline_s=1e9 if id % 2 else NEVER)
        heap.watch(alive[id])
        del alive[id]
        assert len(heap._heap) <= 4 + 64
    alive[0] = sequence(0)
    fresh = DeadlineHeap(alive)
    fresh.watch(alive[0])
    assert fresh._heap == []


def test_one_that_got_more_time_is_looked_at_once_and_moved() -> None:
    alive = {0: sequence(0, queue_deadline_s=1.0, first_token_deadline_s=4.0, stall_timeout_s=2.0)}
    heap = DeadlineHeap(alive)
    heap.watch(alive[0])
    alive[0].scheduled_s, alive[0].status = 0.5, SequenceStatus.RUNNING
    assert list(heap.pop_expired(1.0)) == []
    assert [at_s for at_s, _ in heap._heap] == [4.0]
    alive[0].last_token_s = 1.5
    heap.watch(alive[0])
    for now in (3.0, 4.0, 5.0):
        alive[0].last_token_s = now
        assert list(heap.pop_expired(now + 1.9)) == []
        assert len(heap._heap) <= 2
    alive[0].status = SequenceStatus.WAITING
    assert list(heap.pop_expired(7.0)) == [], "one that was preempted does not stall"
    alive[0].status = SequenceStatus.RUNNING
    heap.watch(alive[0])
    assert next(heap.pop_expired(7.0)) is alive[0]
