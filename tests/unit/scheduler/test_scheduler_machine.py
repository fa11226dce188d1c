"""The scheduler as a state machine: every rule of its policy, held after each of any sequence of events.

The model is a fixed function of the tokens before it, so each request's answer alone is known, and so is whether a
request that was preempted, chunked or batched got the same one. A dictionary stands for the KV cache, so that keys
written over, not computed again or shared between different prefixes are found out. Steps are computed when they are
launched, in their order as on a device, and recorded then or after the next one is launched. In some runs they take
time, so that budgets, forecasts and targets mean something. In some tokens are drafted, and none launched ahead.
"""

import dataclasses
import math
import random
from collections.abc import Iterator, Mapping
from typing import Any

from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fake_engine import FORGETFUL, adapter_token_ids, computed_tokens, drawn_tokens, next_token, run
from headrace.kernels.step_times import StepTimes
from headrace.scheduler.block_pool import BlockPool
from headrace.scheduler.config import SchedulingPolicy
from headrace.scheduler.messages import FinishReason, GenerationRequest, RowResult, SamplingParams, SequenceOutput, Tier
from headrace.scheduler.scheduler import ScheduledRow, Scheduler, SchedulerOutput
from headrace.scheduler.sequence import Sequence, SequenceStatus
from headrace.scheduler.step_time import StepShape

LETTERS = st.just(frozenset[int]()) | st.frozensets(st.integers(ord("a"), ord("z")), max_size=3)
WEIGHTS = {"a": 1.0, "b": 1.0, "c": 2.5}
TIERS = list(Tier)
# Here streams are ahead of their readers with three tokens, for answers are short.


def alone(request: GenerationRequest) -> tuple[list[int], FinishReason]:
    """What the request gets if nothing disturbs it."""
    sampling, tokens = request.sampling, list[int]()
    while len(tokens) < sampling.max_tokens:
        tokens.append(next_token([*adapter_token_ids(request.adapter), *request.prompt_token_ids, *tokens]))
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
    # When it got its last token, or was last made to wait for its reader.
    last_token_s: float | None = None
    # Its tokens up to here have been paid for, or were found.
    num_paid: int = 0

    @property
    def is_over(self) -> bool:
        return bool(self.ends)

    @property
    def place(self) -> tuple[float, int]:
        """Among those of its tenant."""
        request = self.request
        return min(request.deadline_s, request.first_token_deadline_s), request.request_id


class WatchedScheduler(Scheduler):
    """Tells what a step decides on its way."""

    victims: list[int]  # in the order in which they would be preempted
    is_short_of_blocks: bool
    endangered: Sequence | None  # a premium prompt for which some may be preempted
    has_claim: bool  # whether it has its room now
    looked_at: list[tuple[Sequence, bool]]  # for admission, and whether it fits
    prefill_budget: int
    served: Mapping[Any, float]  # each account's counter before the step's rows are made

    def _make_room(self) -> bool:
        candidates = [s for s in self._running.values() if s.num_preemptions < 2]
        candidates.sort(
            key=lambda s: (
                TIERS.index(s.request.tier),
                (len(s.block_ids) - s.num_shared_blocks) / (1 + s.num_computed_tokens),
                s.request.request_id,
            ),
            reverse=True,
        )
        self.victims = [s.request.request_id for s in candidates]
        num_missing = sum(
            s.num_schedulable_tokens > 0 and s.num_scheduled_tokens == len(s.block_ids) * self._block_size
            for s in self._running.values()
        )
        self.is_short_of_blocks = num_missing > self._pool.num_free
        self.endangered = self._endangered
        has_preempted = super()._make_room()
        head = self.endangered
        self.has_claim = head is not None and head.status is SequenceStatus.WAITING
        self.has_claim = self.has_claim and head is not None and super()._fits(head, self._find_cached(head))
        self.looked_at = []
        self.served = self.counters()
        return has_preempted

    def _prefill_budget(self, prompt_context: int) -> int:
        self.prefill_budget = super()._prefill_budget(prompt_context)
        return self.prefill_budget

    def _fits(self, sequence: Sequence, cached: list[int]) -> bool:
        fits = super()._fits(sequence, cached)
        self.looked_at.append((sequence, fits))
        return fits

    def counters(self) -> dict[Any, float]:
        counters: dict[Any, float] = {tier: tier.served for tier in self._queue._tiers.values()}
        for tier in self._queue._tiers.values():
            counters |= {tenant: tenant.served for tenant in tier.tenants.values()}
        return counters


class SchedulerMachine(RuleBasedStateMachine):
    """Ids rise with arrival, so an order of arrival is an order of ids."""

    @initialize(
        data=st.data(),
        num_blocks=st.integers(2, 16) | st.integers(17, 50),
        block_size=st.integers(1, 5),
        budget=st.integers(1, 16) | st.integers(8, 40),
        max_num_seqs=st.integers(1, 8),
        has_prefix_cache=st.booleans(),
        num_short_answers=st.sampled_from((0, 40, 400)),
        itl_target_s=st.sampled_from((math.inf, 0.02, 0.2, 1.0)),
        num_speculative_tokens=st.sampled_from((0, 2, 8)),
    )
    def start(
        self,
        data: st.DataObject,
        num_blocks: int,
        block_size: int,
        budget: int,
        max_num_seqs: int,
        has_prefix_cache: bool,
        num_short_answers: int,
        itl_target_s: float,
        num_speculative_tokens: int,
    ) -> None:
        self.block_size = block_size
        self.capacity = num_blocks * block_size
        self.budget = budget
        self.max_num_seqs = min(max_num_seqs, budget)
        targets_s = {Tier.PREMIUM: itl_target_s, Tier.STANDARD: 2 * itl_target_s, Tier.BATCH: 8 * itl_target_s}
        self.policy = SchedulingPolicy(
            itl_targets_s=targets_s, num_speculative_tokens=num_speculative_tokens, speculation_max_seqs=3
        )
        self.scheduler = WatchedScheduler(
            BlockPool(num_blocks),
            block_size=block_size,
            max_num_batched_tokens=budget,
            max_num_seqs=self.max_num_seqs,
            has_prefix_cache=has_prefix_cache,
            policy=self.policy,
        )
        for _ in range(num_short_answers):
            self.scheduler._lengths.observe(1)
        # Seconds per step, prompt token, decoding sequence and token of context; None where nobody measures.
        self.costs_s: tuple[float, ...] | None = None
        if data.draw(st.booleans(), "is_timed"):
            scale = data.draw(st.sampled_from((0.001, 0.01, 0.1)), "scale")
            self.costs_s = tuple(scale * data.draw(st.sampled_from((0, 0.1, 1, 5)), name) for name in "abgh")
            self.spikes = random.Random(data.draw(st.integers(0, 99), "spikes"))
            if data.draw(st.booleans(), "is_calibrated"):
                for i in range(40):
                    shape = StepShape(i % 7 * 3, i % 3, i % 5 * 4, 5.0 * (i % 2))
                    self.scheduler.observe(shape, self.seconds(shape))
        self.records: dict[int, Record] = {}
        self.sequences: dict[int, Sequence] = {}
        self.has_computed_prompt: set[int] = set()
        # What each slot of the cache holds: a hash of the salt, the adapter and every token up to its own.
        self.slots: dict[int, int] = {}
        # Launched and not recorded, the older first; what the last launched one drew for each request.
        self.in_flight: list[tuple[SchedulerOutput, list[RowResult], StepTimes | None]] = []
        self.drawn: dict[int, int] = {}
        self.admitted_s: dict[int, float] = {}
        self.num_steps = 0
        self.num_starved = 0
        self.now = 0.0
        self.ended_s = 0.0  # when the last launched step will have ended
        self.add(data, 4)

    def seconds(self, shape: StepShape) -> float:
        assert self.costs_s is not None
        a, b, g, h = self.costs_s
        num_decoded = shape.num_decoding + shape.num_drafted
        seconds = a + b * shape.num_prompt_tokens + g * num_decoded + h * shape.decode_context
        return seconds * (1 + 0.05 * self.spikes.random()) * (9 if self.spikes.random() < 0.02 else 1)

    @property
    def alive(self) -> list[int]:
        return [id for id, record in self.records.items() if not record.is_over]

    @property
    def running(self) -> dict[int, Sequence]:
        return {id: s for id, s in self.sequences.items() if s.status is SequenceStatus.RUNNING}

    @rule(data=st.data(), num_requests=st.integers(1, 4))
    def add(self, data: st.DataObject, num_requests: int) -> None:
        for _ in range(num_requests):
            # Short and long prompts; of the answers half would fill the pool to its last slot.
            share = data.draw(st.sampled_from((0.0, 0.1, 0.1, 0.2, 0.5, 1.0)), "share")
            num_prompt = data.draw(st.integers(1, max(3, int(share * self.capacity))), "num_prompt")
            num_prompt = min(num_prompt, self.capacity - 1)
            longest = min(self.capacity - num_prompt, 60)
            max_tokens = data.draw(st.sampled_from((longest, longest // 2, min(longest, 4))), "most")
            max_tokens = data.draw(st.just(max_tokens) | st.integers(0, max_tokens), "max_tokens")
            sampling = SamplingParams(
                max_tokens=max_tokens,
                min_tokens=data.draw(st.integers(0, max_tokens), "min_tokens"),
                stop_token_ids=data.draw(LETTERS, "stop_token_ids"),
                presence_penalty=data.draw(st.sampled_from((0.0, 0.0, 1.0)), "presence_penalty"),
            )
            id = len(self.records)
            # Few prompts, so that some are the beginnings of others, or of others' answers.
            base = data.draw(st.sampled_from((0, 1, FORGETFUL)), "prompt")
            prompt = (base, *((base + i) % 5 for i in range(1, num_prompt)))
            is_next_turn = data.draw(st.booleans(), "is_next_turn")
            if self.records and is_next_turn:
                earlier = self.records[data.draw(st.sampled_from(sorted(self.records)), "earlier")]
                prompt = (*earlier.request.prompt_token_ids, *earlier.tokens, *prompt)[:num_prompt]
            tenant = data.draw(st.sampled_from(sorted(WEIGHTS)), "tenant")
            request = GenerationRequest(
                id,
                prompt,
                sampling,
                self.now,
                **self.times(data),
                tier=data.draw(st.sampled_from(TIERS), "tier"),
                tenant=tenant,
                weight=WEIGHTS[tenant],
                leader_id=data.draw(st.none() | st.integers(0, id - 1) if id else st.none(), "leader_id"),
                cache_salt=data.draw(st.sampled_from((b"", b"other")), "salt"),
                output_token_ids=(),
                adapter=data.draw(st.sampled_from((None, None, "one")), "adapter"),
            )
            self.records[id] = Record(request)
            self.scheduler.add(request)
            self.sequences[id] = self.scheduler._sequences[id]

    def times(self, data: st.DataObject) -> dict[str, Any]:
        """Most requests have all the time in the world, some all kinds of deadlines."""
        kind = data.draw(st.sampled_from(("none", "none", "total", "all")), "deadlines")
        after_s = dict.fromkeys(("deadline_s", "queue_deadline_s", "first_token_deadline_s"), math.inf)
        stall_timeout_s = math.inf
        if kind != "none":
            after_s["deadline_s"] = data.draw(st.integers(0, 12), "deadline_s")
        if kind == "all":
            after_s["queue_deadline_s"] = data.draw(st.integers(0, 6), "queue_deadline_s")
            if self.costs_s is not None:  # else nobody knows when a token came
                after_s["first_token_deadline_s"] = data.draw(st.integers(0, 9), "first_token_deadline_s")
                stall_timeout_s = data.draw(st.integers(1, 5), "stall_timeout_s")
        target_s = self.now + data.draw(st.sampled_from((0.0, 1.0, 5.0, math.inf)), "target_s")
        deadlines_s = {name: self.now + seconds for name, seconds in after_s.items()}
        return deadlines_s | {"stall_timeout_s": stall_timeout_s, "target_s": target_s}

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        """Of any request, unknown and finished ones included, and perhaps for the second time."""
        id = data.draw(st.integers(0, len(self.records)), "id")
        if id in self.records:
            self.records[id].is_cancelled |= not self.records[id].is_over
            self.scheduler.cancel(id)
        else:
            self.scheduler.cancel(-1, -2)

    @rule(num_steps=st.integers(1, 6) | st.just(20), num_ahead=st.integers(0, 1))
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
            times = None
            if self.costs_s is not None:
                began_s = max(self.now, self.ended_s)
                self.ended_s = began_s + self.seconds(output.shape)
                times = StepTimes(began_s, self.ended_s, None)
            self.in_flight.append((output, self.compute(output), times))
        else:
            self.record_all()

    def record_all(self, num_ahead: int = 0) -> None:
        """Record the oldest steps in flight, all but so many."""
        if self.policy.num_speculative_tokens:
            num_ahead = 0
        while len(self.in_flight) > num_ahead:
            output, results, times = self.in_flight.pop(0)
            if times is not None:
                self.now = max(self.now, times.ended_s)
            counters = self.scheduler.counters()
            outputs = self.scheduler.update(output, results, times)
            self.check_accepted(output, outputs, counters)
            self.record(outputs)
            for o in outputs:
                if o.token_ids and times is not None:
                    self.records[o.request_id].last_token_s = times.ended_s
            for row in output.rows:
                if row.sequence.num_computed_tokens >= row.sequence.num_prompt_tokens:
                    self.has_computed_prompt.add(row.sequence.request.request_id)
            self.check_books()

    def check_accepted(
        self, output: SchedulerOutput, outputs: list[SequenceOutput], expected: dict[Any, float]
    ) -> None:
        """Of a draft what came true is kept and paid for, and the rest is as if it had not been."""
        token_cost, context_cost = self.scheduler._step_time.decode_cost()
        drafts = {_id(row): row for row in output.rows if row.draft}
        for o in outputs:
            row, num_more = drafts.get(o.request_id), max(0, len(o.token_ids) - 1)
            if row is None:
                assert num_more == 0
                continue
            assert o.token_ids[:-1] == row.draft[:num_more]
            record, account = self.records[o.request_id], row.sequence.account
            record.num_paid += num_more
            cost = num_more * (token_cost + context_cost * row.start)
            assert account is not None
            expected[account] += cost / WEIGHTS[record.request.tenant]
            expected[account.tier] += cost / self.policy.tier_weights[record.request.tier]
        for row in drafts.values():
            assert row.sequence.num_scheduled_tokens == row.sequence.num_computed_tokens
        if drafts:
            counters = self.scheduler.counters()
            assert all(math.isclose(counters[account], served) for account, served in expected.items())

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
        scheduler = self.scheduler
        if scheduler.may_preempt:
            self.record_all()
        before = self.running
        schedulable = {id: s.num_schedulable_tokens for id, s in before.items()}
        for id, sequence in before.items():
            self.check_schedulable(sequence, schedulable[id])
        tables = {id: (s.block_ids, list(s.block_ids)) for id, s in before.items()}
        paid = {id: self.records[id].num_paid for id in before}
        num_preemptions = scheduler.load().num_preemptions
        starts = {id: s.num_scheduled_tokens for id, s in before.items() if schedulable[id] > 1}
        output = scheduler.schedule(self.now)
        self.check_dropped(output)
        rows = {row.sequence.request.request_id: row for row in output.rows}
        assert len(rows) == len(output.rows), "one row per sequence"
        running = self.running
        admitted = [id for id in rows if id not in before]
        preempted = [id for id in before if not self.records[id].is_over and id not in running]

        assert sum(row.num_tokens for row in output.rows) <= self.budget
        assert len(running) <= self.max_num_seqs
        for id, row in rows.items():
            assert id in running
            self.check_row(row)
            if id in schedulable:
                assert row.num_tokens <= schedulable[id] + len(row.draft)
        for id in running:
            assert id in before or id in rows, "admitted for nothing"
            if schedulable.get(id) == 1:
                assert id in rows, "a running sequence that can decode gets its token"
            if id in tables:
                assert running[id].block_ids is tables[id][0], "another list for the same blocks"
                assert running[id].block_ids[: len(tables[id][1])] == tables[id][1], "a list that is not appended to"
        assert not (admitted and preempted), "a step that preempts admits nobody"
        for id in admitted:
            self.check_leader(running[id])
        self.check_preempted(preempted)
        assert scheduler.load().num_preemptions == num_preemptions + len(preempted)
        self.admitted_s.update(dict.fromkeys(set(admitted) - set(self.admitted_s), self.now))
        self.check_budget(output, max((start for id, start in starts.items() if id in running), default=0))
        self.check_order(admitted, schedulable)
        self.check_service(output, admitted, paid)
        self.check_nobody_waits_for_nothing(output, schedulable, is_preempting=bool(preempted))
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
            is_recorded = leader_id in self.has_computed_prompt
            assert is_recorded or sequence.num_prompt_tokens <= self.block_size, "its leader's prompt is not recorded"

    def check_row(self, row: ScheduledRow) -> None:
        sequence, end = row.sequence, row.start + row.num_tokens
        assert row.num_tokens >= 1
        assert row.start + row.num_tokens == sequence.num_scheduled_tokens
        assert len(sequence.block_ids) >= -(-end // self.block_size), "no block for a token"
        assert row.is_sampled == (end >= len(sequence.token_ids) and sequence.request.sampling.max_tokens > 0)
        num_unknown = len(self.in_flight) + len(row.draft)
        assert end <= len(sequence.token_ids) + num_unknown, "more than one token is unknown"
        if row.draft:
            assert len(row.draft) <= self.policy.num_speculative_tokens
            assert len(self.running) <= 3, "drafted in a wide batch"
            assert len(self.running) == len(self.alive) or not self.scheduler._queue, "drafted while somebody waits"
            assert not sequence.request.sampling.has_penalties
            assert not set(row.draft) & sequence.end_token_ids
            assert end < sequence.num_total_tokens, "nothing is wanted behind the last token"
        if sequence.num_preemptions == 2:
            num_blocks = -(-sequence.num_total_tokens // self.block_size)
            assert len(sequence.block_ids) == num_blocks, "preempted twice, and not all its blocks"

    def check_preempted(self, preempted: list[int]) -> None:
        scheduler = self.scheduler
        assert sorted(preempted) == sorted(scheduler.victims[: len(preempted)]), "another one's turn"
        assert not preempted or not self.in_flight, "preempted before all its tokens are known"
        if not scheduler.is_short_of_blocks:
            assert not preempted or scheduler.endangered is not None, "preempted for nothing"
            assert all(self.records[id].request.tier is not Tier.PREMIUM for id in preempted)
        else:
            assert preempted
        for id in preempted:
            assert self.sequences[id].num_preemptions <= 2
            assert self.sequences[id].block_ids == []

    def check_dropped(self, output: SchedulerOutput) -> None:
        expected = {}
        for id in self.alive:
            if self.records[id].is_cancelled:
                expected[id] = FinishReason.CANCELLED
            elif self.deadline_s(id) <= self.now:
                expected[id] = FinishReason.DEADLINE
        dropped = {o.request_id: o.finish_reason for o in output.dropped}
        assert len(dropped) == len(output.dropped)
        token_s = self.scheduler._step_time.prompt_token_s()
        for id, reason in dropped.items():
            record = self.records[id]
            if id not in expected:
                assert reason is FinishReason.DEADLINE
                assert not record.tokens
                assert self.now + token_s * len(record.request.prompt_token_ids) > record.place[0], "it had the time"
        assert {id: reason for id, reason in dropped.items() if id in expected} == expected
        self.record(output.dropped)
        for id in dropped:
            assert self.sequences[id].block_ids == [], "a dropped request holds blocks"
            assert self.sequences[id].status is SequenceStatus.FINISHED

    def deadline_s(self, id: int) -> float:
        record = self.records[id]
        request = record.request
        if record.last_token_s is not None:
            return min(request.deadline_s, record.last_token_s + request.stall_timeout_s)
        at_s = min(request.deadline_s, request.first_token_deadline_s)
        return at_s if id in self.admitted_s else min(at_s, request.queue_deadline_s)

    def check_budget(self, output: SchedulerOutput, prompt_context: int) -> None:
        """Prompts get no more than fits within the tightest target beside those that decode."""
        shape, model = output.shape, self.scheduler._step_time
        decoding, prompts = output.rows[: shape.num_decoding], output.rows[shape.num_decoding :]
        num_prompt_tokens = sum(row.num_tokens for row in prompts)
        assert all(row.num_tokens == 1 + len(row.draft) for row in decoding)
        num_drafted = sum(len(row.draft) for row in decoding)
        assert shape.num_drafted == num_drafted
        assert not num_drafted or not prompts, "drafted in place of a prompt"
        assert shape.num_prompt_tokens == num_prompt_tokens
        assert shape.decode_context == sum(row.start for row in decoding)
        if num_prompt_tokens:
            context = sum(row.start + i + 0.5 for row in prompts for i in range(row.num_tokens)) / num_prompt_tokens
            assert math.isclose(shape.prompt_context, context)
        assert num_prompt_tokens <= self.scheduler.prefill_budget
        if model.num_observed == 0 or not output.rows:
            return
        admitted = {row.sequence.request.request_id for row in prompts if self.admitted_s.get(_id(row)) == self.now}
        tiers = {s.request.tier for id, s in self.running.items() if id not in admitted}
        target_s = min((self.policy.itl_targets_s[tier] for tier in tiers), default=math.inf)
        if not decoding:
            target_s = 0.25
        budget = model.prefill_budget(target_s, StepShape(0, len(decoding), shape.decode_context), prompt_context)
        if num_prompt_tokens > max(0, budget):
            assert num_prompt_tokens <= 32, "more than fits"

    def check_order(self, admitted: list[int], schedulable: Mapping[int, int]) -> None:
        """Inside a tenant by deadline and age, but that only two long prompts are computed at a time; and only premium
        overtakes one that does not fit."""
        waiting = [id for id in self.alive if self.sequences[id].status is SequenceStatus.WAITING]
        waiting = [id for id in waiting if self.sequences[id].account is not None]
        for i, id in enumerate(admitted):
            request = self.records[id].request
            for other in [*waiting, *admitted[i + 1 :]]:
                that = self.records[other].request
                if (that.tier, that.tenant) == (request.tier, request.tenant):
                    is_passed = self.sequences[other].is_long and other in waiting
                    assert self.records[id].place < self.records[other].place or is_passed
        long = {id for id, num in schedulable.items() if num > max(1, 2 * self.scheduler.prefill_budget)}
        num_long = len(long & set(self.running))
        for id in admitted:
            assert num_long < 2 or not self.sequences[id].is_long, "a third long prompt"
            num_long += self.sequences[id].num_uncomputed_tokens > 2 * self.scheduler.prefill_budget
        if self.scheduler.has_claim and self.scheduler.looked_at:
            assert self.scheduler.looked_at[0][0].request.tier is Tier.PREMIUM, "its room is given to another"
        has_refused = False
        for sequence, fits in self.scheduler.looked_at:
            # Where a premium stream's target is out of reach, it keeps nobody out any more.
            assert not (has_refused and fits) or sequence.request.tier is Tier.PREMIUM or self.costs_s is not None
            has_refused |= not fits

    def check_service(self, output: SchedulerOutput, admitted: list[int], paid: Mapping[int, int]) -> None:
        """Each token is paid for once, by its tenant and its tier; what the cache held costs nothing."""
        token_cost, context_cost = self.scheduler._step_time.decode_cost()
        expected = dict(self.scheduler.served)
        for i, row in enumerate(output.rows):
            record = self.records[_id(row)]
            if _id(row) in admitted:
                record.num_paid = max(record.num_paid, row.start)
            num_new = row.start + row.num_tokens - len(row.draft) - max(record.num_paid, row.start)
            if num_new > 0:
                record.num_paid += num_new
                cost = token_cost + context_cost * row.start if i < output.shape.num_decoding else num_new
                account = row.sequence.account
                assert account is not None
                assert account.tier is self.scheduler._queue._tiers[record.request.tier]
                expected[account] = expected.get(account, 0) + cost / WEIGHTS[record.request.tenant]
                expected[account.tier] += cost / self.policy.tier_weights[record.request.tier]
        for id in paid:
            assert self.records[id].num_paid >= paid[id]
        if not output.dropped:  # else a follower can have come, and lifted a counter
            counters = self.scheduler.counters()
            assert all(math.isclose(counters[account], served) for account, served in expected.items())

    def check_nobody_waits_for_nothing(
        self, output: SchedulerOutput, schedulable: Mapping[int, int], *, is_preempting: bool
    ) -> None:
        """Where somebody waits, the budget, the batch or the blocks are used up."""
        scheduler, running = self.scheduler, self.running
        if is_preempting or not self.alive:
            return
        if not self.in_flight:
            assert output.rows, "nothing is computed"
        num_prompt_tokens = output.shape.num_prompt_tokens
        for id in running:
            if schedulable.get(id, 0) > 1 and id not in {_id(row) for row in output.rows}:
                assert num_prompt_tokens >= int(0.7 * scheduler.prefill_budget), "budget is left"
        if len(scheduler._queue) == 0:
            return
        assert (
            num_prompt_tokens == scheduler.prefill_budget
            or (scheduler.looked_at and not scheduler.looked_at[-1][1])
            or scheduler._queue.pick(bucket=False) is None
        )
        assert running, "idle, and somebody waits"

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
        own = [set(s.block_ids[s.num_shared_blocks :]) for s in running.values()]
        assert sum(map(len, own)) == len(set().union(*own)), "a block that two have taken for their own"
        for tier in Tier:
            num_running = sum(s.request.tier is tier for s in running.values())
            assert self.scheduler._num_running[tier] == num_running

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

    def entries(self, row: ScheduledRow) -> Iterator[tuple[int, int, int]]:
        """(Position, slot, what belongs there) of a row's tokens and all before them."""
        sequence = row.sequence
        entry = hash((sequence.request.cache_salt, sequence.request.adapter))
        for i, token_id in enumerate(computed_tokens(row, self.drawn)):
            slot = sequence.block_ids[i // self.block_size] * self.block_size + i % self.block_size
            entry = hash((entry, token_id))
            yield i, slot, entry

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
        assert not self.scheduler._followers
        assert not any(self.scheduler._num_running.values())
        for record in self.records.values():
            tokens, reason = alone(record.request)
            assert len(record.ends) == 1
            if record.ends[0] in (FinishReason.STOP, FinishReason.LENGTH):
                assert (record.tokens, record.ends[0]) == (tokens, reason)
            else:
                assert record.tokens == tokens[: len(record.tokens)]
                assert len(record.tokens) < len(tokens) or not tokens


def _id(row: ScheduledRow) -> int:
    return row.sequence.request.request_id


TestSchedulerMachine: Any = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(
    max_examples=120,
    stateful_step_count=40,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
