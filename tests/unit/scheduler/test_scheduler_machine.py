"""The scheduler as a state machine: every rule of its policy, held after each of any sequence of events.

The model is a fixed function of the tokens before it, so each request's answer alone is known, and so is whether a
request that was preempted, chunked or batched got the same one. A dictionary stands for the KV cache, so that keys
written over, not computed again or shared between different prefixes are found out. Steps are computed when they are
launched, in their order as on a device, and recorded then or after the next one is launched.
"""

import dataclasses
import math
import random
from collections.abc import Iterator
from typing import Any

from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fake_engine import computed_tokens, drawn_tokens, make_scheduler, next_token, run
from headrace.scheduler.messages import FinishReason, GenerationRequest, RowResult, SamplingParams, SequenceOutput
from headrace.scheduler.scheduler import ScheduledRow, Scheduler, SchedulerOutput
from headrace.scheduler.sequence import Sequence, SequenceStatus

# What a slot of the cache stands for: a salt, and a token after all those before it.
Entry = tuple[bytes, tuple[int, ...]]

LETTERS = st.just(frozenset[int]()) | st.frozensets(st.integers(ord("a"), ord("z")), max_size=20)


def alone(request: GenerationRequest) -> tuple[list[int], FinishReason]:
    """What the request gets if nothing disturbs it."""
    sampling, tokens = request.sampling, list[int]()
    while len(tokens) < sampling.max_tokens:
        tokens.append(next_token([*request.prompt_token_ids, *tokens]))
        if tokens[-1] in sampling.stop_token_ids and len(tokens) > sampling.min_tokens:
            return tokens, FinishReason.STOP
    return tokens, FinishReason.LENGTH


@dataclasses.dataclass
class Record:
    """What was asked and what was answered."""

    request: GenerationRequest
    tokens: list[int] = dataclasses.field(default_factory=list)
    scheduled_s: list[float] = dataclasses.field(default_factory=list)
    ends: list[FinishReason] = dataclasses.field(default_factory=list)
    is_cancelled: bool = False

    @property
    def is_over(self) -> bool:
        return bool(self.ends)


class SchedulerMachine(RuleBasedStateMachine):
    """Ids rise with arrival, so an order of arrival is an order of ids."""

    @initialize(
        data=st.data(),
        num_blocks=st.integers(2, 16),
        block_size=st.integers(1, 5),
        budget=st.integers(1, 16),
        max_num_seqs=st.integers(1, 5),
        has_prefix_cache=st.booleans(),
    )
    def start(
        self,
        data: st.DataObject,
        num_blocks: int,
        block_size: int,
        budget: int,
        max_num_seqs: int,
        has_prefix_cache: bool,
    ) -> None:
        self.block_size = block_size
        self.capacity = num_blocks * block_size
        self.budget = budget
        self.max_num_seqs = min(max_num_seqs, budget)
        self.scheduler: Scheduler = make_scheduler(num_blocks, block_size, budget, self.max_num_seqs, has_prefix_cache)
        self.records: dict[int, Record] = {}
        self.sequences: dict[int, Sequence] = {}
        # What each slot of the cache holds: the salt and every token up to its own.
        self.slots: dict[int, Entry] = {}
        # Launched and not recorded, the older first; what the last launched one drew for each request.
        self.in_flight: list[tuple[SchedulerOutput, list[RowResult]]] = []
        self.drawn: dict[int, int] = {}
        self.admitted_s: dict[int, float] = {}
        self.num_steps = 0
        self.now = 0.0
        self.add(data, 4, None)

    @property
    def alive(self) -> list[int]:
        return [id for id, record in self.records.items() if not record.is_over]

    @property
    def running(self) -> dict[int, Sequence]:
        return {id: s for id, s in self.sequences.items() if s.status is SequenceStatus.RUNNING}

    @rule(data=st.data(), num_requests=st.integers(1, 4), lifetime_s=st.none() | st.integers(0, 12))
    def add(self, data: st.DataObject, num_requests: int, lifetime_s: int | None) -> None:
        for _ in range(num_requests):
            # Short and long prompts; of the answers half would fill the pool to its last slot.
            num_prompt = data.draw(st.integers(1, 3) | st.integers(1, self.capacity), "num_prompt")
            num_prompt = min(num_prompt, self.capacity - 1)
            longest = self.capacity - num_prompt
            max_tokens = data.draw(st.just(longest) | st.integers(0, longest), "max_tokens")
            sampling = SamplingParams(
                max_tokens=max_tokens,
                min_tokens=data.draw(st.integers(0, max_tokens), "min_tokens"),
                stop_token_ids=data.draw(LETTERS, "stop_token_ids"),
                presence_penalty=data.draw(st.sampled_from((0.0, 0.0, 1.0)), "presence_penalty"),
            )
            id = len(self.records)
            deadline_s = math.inf if lifetime_s is None else self.now + lifetime_s
            # Few prompts, so that some are the beginnings of others, or of others' answers.
            base = data.draw(st.integers(0, 2), "prompt")
            prompt = tuple((base + i) % 5 for i in range(num_prompt))
            is_next_turn = data.draw(st.booleans(), "is_next_turn")
            if self.records and is_next_turn:
                earlier = self.records[data.draw(st.sampled_from(sorted(self.records)), "earlier")]
                prompt = (*earlier.request.prompt_token_ids, *earlier.tokens, *prompt)[:num_prompt]
            salt = data.draw(st.sampled_from((b"", b"other")), "salt")
            leader_id = data.draw(st.none() | st.integers(0, id - 1) if id else st.none(), "leader_id")
            self.records[id] = Record(GenerationRequest(id, prompt, sampling, self.now, deadline_s, leader_id, salt))
            self.scheduler.add(self.records[id].request)

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        """Of any request, unknown and finished ones included, and perhaps for the second time."""
        id = data.draw(st.integers(0, len(self.records)), "id")
        self.scheduler.cancel(id)
        if id in self.records:
            self.records[id].is_cancelled |= not self.records[id].is_over

    @rule(num_steps=st.integers(1, 6), num_ahead=st.integers(0, 1))
    def step(self, num_steps: int, num_ahead: int) -> None:
        """Perhaps launch each step before what the one before it drew is known."""
        for _ in range(num_steps):
            self.record_all(num_ahead)
            self.launch()
            self.record_all(num_ahead)

    @rule(data=st.data(), num_ahead=st.integers(0, 1))
    def step_while_a_cancel_arrives(self, data: st.DataObject, num_ahead: int) -> None:
        self.launch()
        self.cancel(data)
        self.record_all(num_ahead)

    @rule()
    def step_that_cannot_be_launched(self) -> None:
        output = self.schedule()
        self.record_all()
        self.fail(output)

    @precondition(lambda self: self.in_flight)
    @rule(is_followed=st.booleans())
    def step_that_raises_when_it_is_waited_for(self, is_followed: bool) -> None:
        self.launch()
        self.record_all(num_ahead=2 if is_followed else 1)
        if self.in_flight:  # not so if there was nothing to launch
            self.fail(self.in_flight.pop(0)[0])
            self.record_all(num_ahead=1)

    def launch(self) -> None:
        output = self.schedule()
        if output.rows:
            self.in_flight.append((output, self.compute(output)))
        else:
            self.record_all()

    def record_all(self, num_ahead: int = 0) -> None:
        """Record the oldest steps in flight, all but so many."""
        while len(self.in_flight) > num_ahead:
            self.record(self.scheduler.update(*self.in_flight.pop(0)))
            self.check_books()

    def fail(self, output: SchedulerOutput) -> None:
        alive = [row.sequence.request.request_id for row in output.rows]
        alive = [id for id in alive if not self.records[id].is_over]
        outputs = self.scheduler.fail([row.sequence for row in output.rows], "told to")
        assert [(o.request_id, o.finish_reason, o.error) for o in outputs] == [
            (id, FinishReason.ERROR, "told to") for id in alive
        ]
        self.record(outputs)
        assert all(self.records[o.request_id].scheduled_s for o in outputs), "it ran, and was not told so"

    @rule(seconds=st.integers(1, 6))
    def wait(self, seconds: int) -> None:
        self.now += seconds

    @precondition(lambda self: len(self.records) > 20)
    @rule()
    def end_everything(self) -> None:
        """What is in flight may still be recorded, of nobody."""
        alive = self.alive
        outputs = self.scheduler.fail_all("over")
        assert sorted(o.request_id for o in outputs) == alive
        self.record(outputs)

    def schedule(self) -> SchedulerOutput:
        """Schedule a step and hold what came out against the policy."""
        if self.scheduler.may_preempt:
            self.record_all()
        before = self.running
        schedulable = {id: s.num_schedulable_tokens for id, s in before.items()}
        for id, sequence in before.items():
            self.check_schedulable(sequence, schedulable[id])
        tables = {id: (s.block_ids, list(s.block_ids)) for id, s in before.items()}
        waiting = [id for id in self.alive if id not in before]
        num_preemptions = self.scheduler.load().num_preemptions
        output = self.scheduler.schedule(self.now)
        self.check_dropped(output)
        rows = {row.sequence.request.request_id: row for row in output.rows}
        assert len(rows) == len(output.rows), "one row per sequence"
        for id, row in rows.items():
            self.sequences.setdefault(id, row.sequence)
        running = self.running
        admitted = [id for id in rows if id not in before]
        preempted = [id for id in before if not self.records[id].is_over and id not in running]

        assert sum(row.num_tokens for row in output.rows) <= self.budget
        assert len(running) <= self.max_num_seqs
        for id, row in rows.items():
            assert id in running
            self.check_row(row)
            if id in schedulable:
                assert row.num_tokens <= schedulable[id]
        for id in running:
            if schedulable.get(id) == 1:
                assert id in rows, "a running sequence that can decode gets its token"
            if id in tables:
                assert running[id].block_ids is tables[id][0], "another list for the same blocks"
                assert running[id].block_ids[: len(tables[id][1])] == tables[id][1], "a list that is not appended to"
        if alive := self.alive:
            assert alive[0] in rows or schedulable[alive[0]] == 0, "the oldest always advances"
            assert admitted == [id for id in waiting if id in admitted], "admitted in order of arrival"
        assert not (admitted and preempted), "a step that preempts admits nobody"
        for id in admitted:
            self.check_leader(running[id])
        assert all(victim > id for victim in preempted for id in running), "the newest are preempted"
        assert not preempted or not self.in_flight, "preempted before all its tokens are known"
        assert self.scheduler.load().num_preemptions == num_preemptions + len(preempted)
        self.admitted_s.update(dict.fromkeys(set(admitted) - set(self.admitted_s), self.now))
        self.check_no_overtaking()
        self.check_nobody_waits_for_nothing(output, bool(preempted))
        self.num_steps += bool(output.rows)
        self.check_books()
        return output

    def check_schedulable(self, sequence: Sequence, num_tokens: int) -> None:
        """Every token is computed once, but none behind which no other is wanted, nor unknown ones that are needed."""
        sampling = sequence.request.sampling
        num_known = len(sequence.token_ids)
        num_wanted = sequence.num_prompt_tokens + sampling.max_tokens - 1 if sampling.max_tokens else num_known
        num_computable = num_known + (bool(self.in_flight) and not sampling.has_penalties)
        if not self.in_flight:
            assert num_tokens == sequence.num_uncomputed_tokens >= 1
        elif sequence.num_scheduled_tokens < num_known:
            assert num_tokens == num_known - sequence.num_scheduled_tokens
        else:
            assert num_tokens == max(0, min(num_wanted, num_computable) - sequence.num_scheduled_tokens)

    def check_leader(self, sequence: Sequence) -> None:
        leader_id = sequence.request.leader_id
        if leader_id in self.alive and self.scheduler._has_prefix_cache:
            leader = self.sequences[leader_id]
            is_recorded = leader.num_computed_tokens >= leader.num_prompt_tokens
            assert is_recorded or sequence.num_prompt_tokens <= self.block_size, "its leader's prompt is not recorded"

    def check_row(self, row: ScheduledRow) -> None:
        sequence, end = row.sequence, row.start + row.num_tokens
        assert row.num_tokens >= 1
        assert row.start + row.num_tokens == sequence.num_scheduled_tokens
        assert len(sequence.block_ids) >= -(-end // self.block_size), "no block for a token"
        assert row.is_sampled == (end >= len(sequence.token_ids) and sequence.request.sampling.max_tokens > 0)
        assert end <= len(sequence.token_ids) + len(self.in_flight), "more than one token is unknown"

    def check_dropped(self, output: SchedulerOutput) -> None:
        expected = {}
        for id in self.alive:
            if self.records[id].is_cancelled:
                expected[id] = FinishReason.CANCELLED
            elif self.records[id].request.deadline_s <= self.now:
                expected[id] = FinishReason.DEADLINE
        assert {o.request_id: o.finish_reason for o in output.dropped} == expected
        self.record(output.dropped)
        for id in expected:
            assert id not in self.sequences or self.sequences[id].block_ids == [], "a dropped request holds blocks"

    def check_no_overtaking(self) -> None:
        running = self.running
        waiting = [id for id in self.alive if id not in running]
        assert not running or not waiting or max(running) < min(waiting)

    def check_nobody_waits_for_nothing(self, output: SchedulerOutput, has_preempted: bool) -> None:
        """Where somebody waits, the budget, the batch or the blocks are used up."""
        running = self.running
        waiting = [id for id in self.alive if id not in running]
        if not waiting or has_preempted:
            return
        leader_id = self.records[waiting[0]].request.leader_id
        if leader_id in running and running[leader_id].num_computed_tokens < running[leader_id].num_prompt_tokens:
            return
        head = self.sequences.get(waiting[0])
        num_tokens = len(head.token_ids if head else self.records[waiting[0]].request.prompt_token_ids)
        assert (
            sum(row.num_tokens for row in output.rows) == self.budget
            or len(running) == self.max_num_seqs
            or -(-num_tokens // self.block_size) > self.scheduler.load().num_free_blocks
        )

    @invariant()
    def check_books(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.check_books()
        load, running = self.scheduler.load(), self.running
        assert load.num_running == len(running)
        assert load.num_waiting == len(self.alive) - len(running)
        assert load.num_received == len(self.records)
        assert load.num_steps == self.num_steps
        held = {block_id for s in running.values() for block_id in s.block_ids}
        assert load.num_free_blocks == load.num_total_blocks - len(held)
        assert load.num_cached_blocks <= load.num_free_blocks
        assert load.num_prefix_hits <= load.num_prefix_queries

    def compute(self, output: SchedulerOutput) -> list[RowResult]:
        """Write the rows' keys to the cache, and look whether each finds all those before its own."""
        for row in output.rows:
            for position, slot, entry in self.entries(row):
                if position >= row.start:
                    self.slots[slot] = entry
        for row in output.rows:
            for _, slot, entry in self.entries(row):
                assert self.slots[slot] == entry, "a token's keys are not where the next one looks for them"
        results = run(output, self.drawn)
        self.drawn = drawn_tokens(output, results)
        return results

    def entries(self, row: ScheduledRow) -> Iterator[tuple[int, int, Entry]]:
        """(Position, slot, what belongs there) of a row's tokens and all before them."""
        sequence, token_ids = row.sequence, computed_tokens(row, self.drawn)
        for i in range(len(token_ids)):
            slot = sequence.block_ids[i // self.block_size] * self.block_size + i % self.block_size
            yield i, slot, (sequence.request.cache_salt, tuple(token_ids[: i + 1]))

    def record(self, outputs: list[SequenceOutput]) -> None:
        for output in outputs:
            record = self.records[output.request_id]
            assert not record.is_over, "an output after the end"
            record.tokens += output.token_ids
            if output.scheduled_s is not None:
                assert output.scheduled_s == self.admitted_s[output.request_id]
                record.scheduled_s.append(output.scheduled_s)
            if output.finish_reason is not None:
                record.ends.append(output.finish_reason)
            assert bool(record.tokens) <= len(record.scheduled_s) <= 1, "told once, and before the first token"

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for _ in range(10_000):
            if not self.scheduler.has_work:
                break
            self.now += 1
            self.step(1, num_ahead=1)
        self.record_all()
        assert not self.scheduler.has_work, "livelock"
        assert self.scheduler.load().num_free_blocks == self.scheduler.load().num_total_blocks
        for record in self.records.values():
            tokens, reason = alone(record.request)
            assert len(record.ends) == 1
            if record.ends[0] in (FinishReason.STOP, FinishReason.LENGTH):
                assert (record.tokens, record.ends[0]) == (tokens, reason)
            else:
                assert record.tokens == tokens[: len(record.tokens)]
                assert len(record.tokens) < len(tokens) or not tokens


TestSchedulerMachine: Any = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(
    max_examples=120,
    stateful_step_count=40,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


def test_deadlines_are_kept_however_many_requests_came_and_went() -> None:
    rng = random.Random(1)
    scheduler = make_scheduler(num_blocks=8, block_size=4, max_num_batched_tokens=4, max_num_seqs=4)
    due: list[tuple[float, int]] = []
    for now in range(2000):
        deadline_s = now + rng.choice([3, 30, 400]) * rng.random()
        scheduler.add(GenerationRequest(now, (1, 2), SamplingParams(max_tokens=30), float(now), deadline_s))
        due.append((deadline_s, now))
        if rng.random() < 0.9:
            scheduler.cancel(now)
            due.remove((deadline_s, now))
        output = scheduler.schedule(now)
        expired = {o.request_id for o in output.dropped if o.finish_reason is FinishReason.DEADLINE}
        assert expired == {id for at_s, id in due if at_s <= now}
        due = [entry for entry in due if entry[0] > now]
        over = {o.request_id for o in scheduler.update(output, run(output)) if o.finish_reason is not None}
        due = [entry for entry in due if entry[1] not in over]
    scheduler.check_books()
