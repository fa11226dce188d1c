"""The scheduler, driven through random lives of many requests by a model that is a fixed function."""

import random

import pytest
from hypothesis import given, settings, strategies as st

from fake_engine import make_scheduler, next_token, run
from headrace.scheduler.messages import FinishReason, GenerationRequest, SamplingParams, SequenceOutput
from headrace.scheduler.scheduler import Scheduler, SchedulerOutput

BLOCK_SIZE = 4


def request(id: int, num_prompt: int, max_tokens: int, **fields: object) -> GenerationRequest:
    sampling = SamplingParams(max_tokens=max_tokens, **fields)  # type: ignore[arg-type]
    return GenerationRequest(id, tuple((id * 7 + i) % 200 for i in range(num_prompt)), sampling, arrival_s=0.0)


def alone(request: GenerationRequest) -> list[int]:
    token_ids = list(request.prompt_token_ids)
    for _ in range(request.sampling.max_tokens):
        token_ids.append(next_token(token_ids))
    return token_ids[len(request.prompt_token_ids) :]


class Life:
    """A scheduler and all it has said of each request."""

    def __init__(self, scheduler: Scheduler, budget: int, max_num_seqs: int) -> None:
        self.scheduler = scheduler
        self.budget = budget
        self.max_num_seqs = max_num_seqs
        self.requests: dict[int, GenerationRequest] = {}
        self.tokens: dict[int, list[int]] = {}
        self.ends: dict[int, list[FinishReason]] = {}
        self.first_scheduled: list[int] = []
        self.now = 0.0

    def add(self, request: GenerationRequest) -> None:
        self.requests[request.request_id] = request
        self.tokens[request.request_id], self.ends[request.request_id] = [], []
        self.scheduler.add(request)

    def step(self) -> SchedulerOutput:
        self.now += 1
        num_preemptions = self.scheduler.load().num_preemptions
        decoding = {
            id for id, s in self.scheduler._running.items() if s.num_uncomputed_tokens == 1 and s.num_output_tokens
        }
        running_before = list(self.scheduler._running)
        output = self.scheduler.schedule(self.now)
        self.record(output.dropped)
        rows = {row.sequence.request.request_id: row.num_tokens for row in output.rows}
        assert sum(rows.values()) <= self.budget
        assert len(self.scheduler._running) <= self.max_num_seqs
        still_running = decoding & set(self.scheduler._running)
        if self.scheduler.load().num_preemptions > num_preemptions:
            assert set(rows) <= set(running_before), "a step that preempted admits nobody"
        else:
            assert still_running <= set(rows), "every running sequence gets its token"
        if running_before and (oldest := running_before[0]) in self.scheduler._running:
            assert oldest in rows, "the oldest always advances"
        assert list(self.scheduler._waiting) == sorted(self.scheduler._waiting), "preempted ones keep their place"
        self.record(self.scheduler.update(output, run(output)))
        self.scheduler.check_books()
        return output

    def record(self, outputs: list[SequenceOutput]) -> None:
        for output in outputs:
            if output.scheduled_s is not None:
                self.first_scheduled.append(output.request_id)
            self.tokens[output.request_id] += output.token_ids
            if output.finish_reason is not None:
                self.ends[output.request_id].append(output.finish_reason)

    def finish(self) -> None:
        for _ in range(20_000):
            if not self.scheduler.has_work:
                break
            self.step()
        load = self.scheduler.load()
        assert (load.num_running, load.num_waiting) == (0, 0)
        assert load.num_free_blocks == load.num_total_blocks
        for id, ends in self.ends.items():
            assert len(ends) == 1, f"request {id} ended {ends}"
            expected = alone(self.requests[id])
            if ends == [FinishReason.LENGTH]:
                assert self.tokens[id] == expected
            else:
                assert self.tokens[id] == expected[: len(self.tokens[id])]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32),
    num_blocks=st.integers(12, 40),
    budget=st.integers(1, 30),
    max_num_seqs=st.integers(1, 12),
)
def test_whatever_happens_books_add_up_and_tokens_are_those_of_each_request_alone(
    seed: int, num_blocks: int, budget: int, max_num_seqs: int
) -> None:
    max_num_seqs = min(max_num_seqs, budget)
    random_ = random.Random(seed)
    scheduler = make_scheduler(num_blocks, BLOCK_SIZE, budget, max_num_seqs)
    life = Life(scheduler, budget, max_num_seqs)
    capacity = num_blocks * BLOCK_SIZE
    for id in range(random_.randint(1, 25)):
        num_prompt = random_.randint(1, min(40, capacity - 1))
        max_tokens = random_.randint(1, min(30, capacity - num_prompt))
        made = request(id, num_prompt, max_tokens)
        if random_.random() < 0.1:
            made = GenerationRequest(id, made.prompt_token_ids, made.sampling, 0.0, life.now + random_.randint(1, 20))
        life.add(made)
        for _ in range(random_.randint(0, 6)):
            event = random_.random()
            if event < 0.1:
                victim = random_.choice(list(life.requests))
                is_alive = not life.ends[victim]
                scheduler.cancel(victim)
                life.step()
                assert not is_alive or life.ends[victim], "a cancelled request is over after the next schedule()"
            elif event < 0.13 and scheduler._running:
                sequence = random_.choice(list(scheduler._running.values()))
                life.record(scheduler.fail([sequence], "told to"))
            else:
                life.step()
    life.finish()
    cancelled_before_start = {id for id in life.requests if id not in life.first_scheduled}
    order = [id for id in life.requests if id not in cancelled_before_start]
    assert life.first_scheduled == order, "first come, first served"


def test_a_pool_that_holds_one_request_at_its_longest_serves_many_without_livelock() -> None:
    scheduler = make_scheduler(num_blocks=10, block_size=4, max_num_batched_tokens=8, max_num_seqs=8)
    life = Life(scheduler, 8, 8)
    for id in range(8):
        life.add(request(id, 10, 30))
    life.finish()
    assert scheduler.load().num_preemptions > 0


def test_blocks_of_a_cancelled_sequence_are_free_when_the_next_schedule_returns() -> None:
    scheduler = make_scheduler(num_blocks=32, block_size=4, max_num_batched_tokens=16, max_num_seqs=4)
    life = Life(scheduler, 16, 4)
    life.add(request(0, 60, 8))
    life.add(request(1, 8, 8))
    life.step()
    assert scheduler.load().num_free_blocks == 32 - 15
    scheduler.cancel(0)
    assert scheduler.load().num_free_blocks == 32 - 15
    scheduler.schedule(2.0)
    assert scheduler.load().num_free_blocks == 32 - 2, "only the second one's blocks are held"


def test_an_expired_request_is_dropped_waiting_or_running() -> None:
    scheduler = make_scheduler(max_num_seqs=1, max_num_batched_tokens=64)
    life = Life(scheduler, 64, 1)
    for id in range(2):
        made = request(id, 4, 50)
        life.add(GenerationRequest(id, made.prompt_token_ids, made.sampling, 0.0, deadline_s=3.0))
    for _ in range(3):
        life.step()
    assert life.ends == {0: [FinishReason.DEADLINE], 1: [FinishReason.DEADLINE]}
    assert not scheduler.has_work


def test_a_stop_token_ends_a_sequence_only_from_min_tokens_on() -> None:
    made = request(0, 5, 40)
    tokens = alone(made)
    stop = tokens[3]
    first_at = tokens.index(stop)
    for min_tokens in (0, first_at, first_at + 1):
        life = Life(make_scheduler(), 64, 32)
        sampling = SamplingParams(max_tokens=40, min_tokens=min_tokens, stop_token_ids=frozenset({stop}))
        life.add(GenerationRequest(0, made.prompt_token_ids, sampling, 0.0))
        while not life.ends[0]:
            life.step()
        expected = next(i for i in range(40) if tokens[i] == stop and i >= min_tokens)
        assert life.tokens[0] == tokens[: expected + 1]
        assert life.ends[0] == [FinishReason.STOP]


def test_cancelling_what_is_unknown_or_over_does_nothing() -> None:
    scheduler = make_scheduler()
    life = Life(scheduler, 64, 32)
    life.add(request(0, 4, 1))
    life.step()
    scheduler.cancel(0)
    scheduler.cancel(99)
    assert scheduler.schedule(9.0).dropped == []


def test_deadlines_of_requests_that_are_over_are_not_kept() -> None:
    scheduler = make_scheduler()
    life = Life(scheduler, 64, 32)
    for id in range(1000):
        made = request(id, 4, 1)
        life.add(GenerationRequest(id, made.prompt_token_ids, made.sampling, 0.0, deadline_s=1e9))
        life.step()
        scheduler.cancel(id)
    assert len(scheduler._deadlines) < 100
    assert scheduler._cancelled == []


def test_a_budget_below_the_batch_limit_is_a_bug() -> None:
    with pytest.raises(AssertionError):
        make_scheduler(max_num_batched_tokens=3, max_num_seqs=4)
