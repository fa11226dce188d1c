"""Who runs in the next step. The policy's letters, each in one place:

A  prompts get what fits beside the decoding sequences within their inter-token target   _prefill_budget, step_time
B  who is next: weighted fair queueing over tiers and tenants                            fair_queue
D  admitted only if the cache holds everybody's projected peak                           _fits, kv_forecast
E  preemption by recompute, twice at most, of the lowest tier first                      _make_room
F  deadlines                                                                             deadlines
G  cancellation: a set, emptied once per step                                            _drop_cancelled

(C, admission by prediction, is the event loop's: see server/admission.py.)

A pure object: no clock, randomness, thread or tensor inside; the same calls give the same answers. Owned by the engine
thread. There is no prefill phase and no decode phase: computed tokens catch up with a sequence's tokens (vLLM v1's
idea), and each step first gives each decoding sequence its token and then fills the budget with prompts. A step can be
scheduled while the one before it is in flight, but no more than one; they are recorded in their order.

Papers: Orca (OSDI 2022) for iteration-level batching, PagedAttention (SOSP 2023) for preemption by recompute,
Sarathi-Serve (OSDI 2024) for chunked prefill beside decode; for the letters see their modules.
"""

from collections import OrderedDict
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from headrace.kernels.step_times import StepTimes
from headrace.scheduler.block_pool import BlockPool
from headrace.scheduler.config import SchedulingPolicy
from headrace.scheduler.deadlines import DeadlineHeap
from headrace.scheduler.fair_queue import FairQueue, TenantAccount
from headrace.scheduler.grammar import Move, advance
from headrace.scheduler.kv_forecast import OutputLengths, projected_peak
from headrace.scheduler.messages import (
    FinishReason,
    GenerationRequest,
    LoadSnapshot,
    RowResult,
    SequenceOutput,
    SequenceState,
    Tier,
)
from headrace.scheduler.prompt_lookup import PromptLookup, num_worthwhile
from headrace.scheduler.sequence import Sequence, SequenceStatus
from headrace.scheduler.step_time import USED_SHARE, StepShape, StepTimeModel

_NONE_SCORED = range(0)
# The bucket of prompts that end within two steps.
_SHORT = False
# A: with nobody decoding, a step of prompts is as long as one who cancels or arrives may have to wait.
_UNWATCHED_STEP_S = 0.25
# Where decoding leaves no room for prompts, they get so many tokens in every fourth step.
_STARVED_CHUNK = 32
_STARVED_STEPS = 4
# Of a budget, for prompts that end within two; and so many longer ones at a time.
_SHORT_SHARE = 0.3
_MAX_LONG = 2
# D: what the forecast may fill, and what of it only premium may.
_USED_BLOCKS = 0.98
_PREMIUM_RESERVE = 0.1
# E: one preempted so often is admitted again with all the blocks that it can come to need.
_MAX_PREEMPTIONS = 2
# G: cancelled ones that wait hold nothing, so that no step need be longer for them.
_MAX_DROPPED_WAITING = 256
# A step with drafts has no more tokens: kernels compute so many as they compute one, and what is drawn is the same.
MAX_TOKENS_WITH_DRAFTS = 16
# An idle engine's pace changes slowly.
_STEPS_PER_PACE = 16
# How fast averages follow.
_FOLLOWING = 0.05
_IDLE = StepShape(0, 0, 0)
# A named tuple's own constructor is a Python function, which is felt at hundreds of rows.
_new = tuple.__new__
_RANK = {tier: rank for rank, tier in enumerate(Tier)}


class ScheduledRow(NamedTuple):
    """`num_tokens` tokens of `sequence` to compute in this step, from index `start` on.

    The last of them can be pending: it is what the step before samples for the sequence. `is_sampled` where the row
    reaches the sequence's last token and the next one is wanted. `scored_positions` are the prompt's tokens whose log
    probabilities the row makes; none twice, if it computes some once more. The last tokens are the `draft`, where there
    is one: they are not the sequence's yet, and what would follow each of them is wanted too.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    is_sampled: bool
    scored_positions: range
    draft: tuple[int, ...] = ()

    @staticmethod
    def next_of(sequence: Sequence, num_tokens: int, draft: tuple[int, ...] = ()) -> "ScheduledRow":
        """The row of the next tokens of a sequence, which are scheduled with it, those of a draft among them."""
        start = sequence.num_scheduled_tokens
        end = sequence.num_scheduled_tokens = start + num_tokens
        is_sampled = end >= len(sequence.token_ids) and sequence.num_total_tokens > sequence.num_prompt_tokens
        scored_positions = _NONE_SCORED
        if sequence.is_scored:
            first = max(start, sequence.num_prompt_logprobs) + 1
            scored_positions = range(first, min(end + 1, sequence.num_prompt_tokens))
        return _new(ScheduledRow, (sequence, start, num_tokens, is_sampled, scored_positions, draft))


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """The rows of one step and its shape, and what was dropped before it: cancelled ones and missed deadlines."""

    rows: list[ScheduledRow]
    dropped: list[SequenceOutput]
    shape: StepShape


class Scheduler:
    """Owns the waiting and the running sequences and the block pool."""

    def __init__(
        self,
        block_pool: BlockPool,
        *,
        block_size: int,
        max_num_batched_tokens: int,
        max_num_seqs: int,
        has_prefix_cache: bool = True,
        policy: SchedulingPolicy | None = None,
    ) -> None:
        assert max_num_batched_tokens >= max_num_seqs, "every running sequence must get its token in every step"
        self.policy = policy or SchedulingPolicy()
        self.other_share = 0.0  # A: what of the time steps leave to one-shot models
        self._pool = block_pool
        self._block_size = block_size
        self._max_num_batched_tokens = max_num_batched_tokens
        # A full batch would leave prompts none of the budget.
        num_kept = _STARVED_CHUNK if max_num_batched_tokens >= 8 * _STARVED_CHUNK else 0
        self.max_num_seqs = min(max_num_seqs, max_num_batched_tokens - num_kept)
        self._has_prefix_cache = has_prefix_cache
        self._sequences: dict[int, Sequence] = {}
        self._queue: FairQueue[Sequence] = FairQueue(self.policy.tier_weights)
        self._followers: dict[int, list[Sequence]] = {}  # by the leader whose prompt they wait for
        self._running: OrderedDict[int, Sequence] = OrderedDict()  # in the order in which they began
        self._cancelled: set[int] = set()
        self._deadlines = DeadlineHeap(self._sequences)
        self._step_time = StepTimeModel()
        self._lengths = OutputLengths()
        self._endangered: Sequence | None = None  # E: a premium head that found no room and will miss its target
        self._has_premium = False
        self._idle_tokens_per_s = 0.0
        self._num_starved_steps = 0
        self._num_prompt_tokens_left = 0  # of running sequences, when the last step was made
        self._budget = max_num_batched_tokens  # the last step's
        self._decoding = _IDLE  # likewise
        self._mean_prompt_tokens = 128.0
        self._num_running = dict.fromkeys(Tier, 0)
        self._num_received = 0
        self._num_prefix_queries = 0
        self._num_prefix_hits = 0
        self._num_drafted_tokens = 0
        self._num_accepted_tokens = 0
        self._num_preemptions = 0
        self._num_steps = 0

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    @property
    def has_prompts(self) -> bool:
        """Whether anybody waits for a first token."""
        return len(self._queue) > 0 or self._num_prompt_tokens_left > 0

    @property
    def may_preempt(self) -> bool:
        """Whether the next `schedule()` could take a running sequence's blocks. Then no step may be in flight: a
        sequence is preempted when all its tokens are known."""
        if self._endangered is not None:
            return True
        num_free = self._pool.num_free
        if len(self._running) <= num_free:  # a prompt has all its blocks, and a token needs one at most
            return False
        return num_free < sum(map(self._num_missing_blocks, self._running.values()))

    def add(self, request: GenerationRequest) -> None:
        """Queue a request."""
        sequence = Sequence(request)
        sequence.is_long = len(sequence.token_ids) > 2 * max(self._budget, _STARVED_CHUNK)
        self._num_received += 1
        self._has_premium |= request.tier is Tier.PREMIUM
        self._sequences[request.request_id] = sequence
        self._deadlines.watch(sequence)
        if request.leader_id is not None and self._waits_for_leader(sequence, request.leader_id):
            self._followers.setdefault(request.leader_id, []).append(sequence)
        else:
            self._queue.push(sequence)

    def cancel(self, *request_ids: int) -> None:
        """Mark requests. The next `schedule()` frees their blocks; unknown and finished ids are ignored."""
        self._cancelled.update(request_ids)

    def observe(self, shape: StepShape, seconds: float) -> None:
        """Learn how long a step took; at the start, of steps that were computed for nobody."""
        self._step_time.observe(shape, seconds)
        if self._step_time.num_observed <= _STEPS_PER_PACE or self._step_time.num_observed % _STEPS_PER_PACE == 0:
            self._idle_tokens_per_s = self._pace(_IDLE)[0]

    def schedule(self, now: float) -> SchedulerOutput:
        """Choose the rows of the next step and give each the blocks it needs.

        One step may be in flight, unless `may_preempt`. What is freed here that it still writes to can be given away at
        once: what the next holder writes comes after it.
        """
        dropped = self._drop_cancelled() + self._drop_expired(now)
        has_preempted = self._make_room()
        rows, prompts = self._decode()
        budget = self._prefill_budget(max((sequence.num_scheduled_tokens for sequence in prompts), default=0))
        num_left, num_long = self._continue_prompts(prompts, budget, rows)
        # A step that preempted admits nobody: a victim that shares a prefix could fit again at once, only to go again.
        while num_left > 0 and not has_preempted:
            sequence = self._admit_next(now, takes_long=num_long < _MAX_LONG, dropped=dropped)
            if sequence is None:
                break
            num_long += sequence.num_schedulable_tokens > 2 * budget
            num_left -= self._prefill(sequence, num_left, rows)
            prompts.append(sequence)
        self._num_prompt_tokens_left = sum(len(s.token_ids) - s.num_scheduled_tokens for s in prompts)
        self._num_steps += bool(rows)
        return SchedulerOutput(rows, dropped, self._shape(rows))

    def update(
        self,
        output: SchedulerOutput,
        results: Seq[RowResult],
        times: StepTimes | None = None,
        *,
        is_observed: bool = True,
    ) -> list[SequenceOutput]:
        """Record what a step computed, and when: `results[i]` is row i's. Steps come here in the order they were
        scheduled in. Of one that is not `is_observed` nothing is learned about how long steps take.

        What was computed for a sequence that has ended since is nobody's.
        """
        if times is not None and is_observed:
            self.observe(output.shape, times.ended_s - times.began_s)
        outputs = []
        moves: list[Move] = []
        num_tokens = 0
        for row, result in zip(output.rows, results, strict=True):
            sequence = row.sequence
            if sequence.status is SequenceStatus.FINISHED:
                continue
            token_id, logprobs, prompt_logprobs, is_nan, is_late, more_token_ids = result
            if is_nan:
                outputs.append(self._fail(sequence, "the model computed no numbers for this request"))
                continue
            num_computed = row.num_tokens
            if is_late:
                assert sequence.grammar is not None
                if sequence.grammar.error is not None:
                    outputs.append(self._fail(sequence, sequence.grammar.error)._replace(is_refused=True))
                    continue
                num_computed -= 1
                sequence.num_scheduled_tokens -= 1
            accepted: tuple[int, ...] = ()
            if row.draft:
                accepted = self._accept(row, more_token_ids)
                num_computed -= len(row.draft) - len(accepted)
                num_tokens += len(accepted)
                token_id = (token_id, *more_token_ids)[-1]
            # Here and below, what seldom holds is asked in place: a call per row is felt at hundreds of them.
            is_first_run = sequence.num_computed_tokens == sequence.num_cached_tokens and sequence.is_fresh
            sequence.num_computed_tokens += num_computed
            if sequence.num_computed_tokens % self._block_size < num_computed or self._followers:
                self._note_computed(sequence, num_computed)
            finish_reason = None
            if token_id is not None:
                num_tokens += 1
                sequence.token_ids.append(token_id)
                if token_id in sequence.end_token_ids or len(sequence.token_ids) >= sequence.num_total_tokens:
                    finish_reason = self._finish_reason(sequence, token_id)
                if sequence.grammar is not None and finish_reason is None:
                    moves.append((sequence.grammar, (token_id,)))
                if times is not None:
                    is_first = sequence.last_token_s is None
                    sequence.last_token_s = times.ended_s
                    if is_first:
                        self._deadlines.watch(sequence)  # F: from now on it can stall
            elif sequence.num_uncomputed_tokens == 0:
                finish_reason = FinishReason.LENGTH  # nothing was to be sampled
            if is_first_run or token_id is not None or prompt_logprobs or finish_reason is not None:
                sequence.num_prompt_logprobs += len(prompt_logprobs)
                fields = (
                    sequence.request_id,
                    () if token_id is None else (*accepted, token_id),
                    finish_reason,
                    sequence.scheduled_s if is_first_run else None,
                    sequence.num_cached_tokens if is_first_run else 0,
                    () if logprobs is None else (logprobs,),
                    prompt_logprobs,
                    None,
                    False,
                )
                outputs.append(_new(SequenceOutput, fields))
            if finish_reason is not None:
                self._remove(sequence)
        advance(moves)
        self._lengths.count_tokens(num_tokens)
        return outputs

    def fail(self, sequences: list[Sequence], error: str) -> list[SequenceOutput]:
        """End those of these sequences that have not ended."""
        return [self._fail(s, error) for s in sequences if s.status is not SequenceStatus.FINISHED]

    def fail_all(self, error: str) -> list[SequenceOutput]:
        """End everything, waiting or running."""
        return self.fail(list(self._sequences.values()), error)

    def load(self, busy_s: float = 0.0) -> LoadSnapshot:
        num_running = len(self._running)
        prefill_tokens_per_s, step_s = self._pace(self._decoding if num_running else _IDLE)
        mean_blocks = (self._mean_prompt_tokens + self._lengths.mean) / self._block_size
        return LoadSnapshot(
            num_waiting=len(self._sequences) - num_running,
            num_running=num_running,
            num_received=self._num_received,
            num_free_blocks=self._pool.num_free,
            num_cached_blocks=self._pool.num_cached,
            num_total_blocks=self._pool.num_total,
            num_prefix_queries=self._num_prefix_queries,
            num_prefix_hits=self._num_prefix_hits,
            num_drafted_tokens=self._num_drafted_tokens,
            num_accepted_tokens=self._num_accepted_tokens,
            num_preemptions=self._num_preemptions,
            num_steps=self._num_steps,
            busy_s=busy_s,
            num_prefill_tokens=self._num_prompt_tokens_left if num_running else 0,
            num_startable=min(self.max_num_seqs - num_running, self._pool.num_free / mean_blocks),
            num_preemptable=num_running - self._num_running[Tier.PREMIUM],
            prefill_tokens_per_s=prefill_tokens_per_s,
            idle_tokens_per_s=self._idle_tokens_per_s,
            completions_per_s=self._completions_per_s() if num_running else 0.0,
            step_s=step_s,
        )

    def describe(self) -> dict[int, SequenceState]:
        """How every sequence stands, by its request's id."""
        following = {s.request_id for group in self._followers.values() for s in group}
        return {
            id: SequenceState(
                id in self._running,
                id in following,
                len(s.token_ids),
                s.num_computed_tokens,
                len(s.block_ids),
                s.num_shared_blocks if s.block_ids else 0,
                s.num_preemptions,
            )
            for id, s in self._sequences.items()
        }

    def check_books(self) -> None:
        """Assert that the pool's books are those of the running sequences and that nothing waiting holds a block."""
        self._pool.check_books([block_id for sequence in self._running.values() for block_id in sequence.block_ids])
        waiting = [sequence for id, sequence in self._sequences.items() if id not in self._running]
        assert not any(sequence.block_ids for sequence in waiting), "a waiting sequence holds blocks"
        followers = [s for group in self._followers.values() for s in group if s.status is SequenceStatus.WAITING]
        assert len(self._queue) + len(followers) == len(waiting), "a sequence is in no list"

    # A

    def _prefill_budget(self, prompt_context: int) -> int:
        """The prompt tokens of this step, behind so many of theirs, so that decoding sequences get their next token in
        time."""
        most = self._max_num_batched_tokens - self._decoding.num_decoding - self._decoding.num_drafted
        self._budget = int(min(most, self._fitting_tokens(self._decoding, prompt_context)))
        if self._budget >= min(_STARVED_CHUNK, most):
            self._num_starved_steps = 0
            return self._budget
        self._num_starved_steps += 1
        is_due = self._num_starved_steps % _STARVED_STEPS == 0 or self._budget + self._decoding.num_decoding == 0
        return min(_STARVED_CHUNK, most) if is_due else self._budget

    def _fitting_tokens(self, decoding: StepShape, prompt_context: int = 0) -> float:
        if self._step_time.num_observed == 0:
            return float("inf")
        target_s = self._itl_target_s() if decoding.num_decoding else _UNWATCHED_STEP_S
        return self._step_time.prefill_budget((1 - self.other_share) * target_s, decoding, prompt_context)

    def _itl_target_s(self) -> float:
        """The tightest of all running sequences."""
        targets_s = self.policy.itl_targets_s
        return min(targets_s[tier] for tier, num in self._num_running.items() if num)

    def _pace(self, decoding: StepShape) -> tuple[float, float]:
        """(Prompt tokens per second, seconds per step) as long as prompts wait beside these."""
        most = max(1, self._max_num_batched_tokens - decoding.num_decoding)
        num_tokens = max(min(_STARVED_CHUNK, most) / _STARVED_STEPS, min(most, self._fitting_tokens(decoding)))
        step_s = self._step_time.predict_s(decoding._replace(num_prompt_tokens=num_tokens)) / (1 - self.other_share)
        return (num_tokens / step_s if step_s > 0 else 0.0), step_s

    def _completions_per_s(self) -> float:
        """How fast sequences end in steps of which each one's end lets in another prompt."""
        num_ending = self._decoding.num_decoding / self._lengths.mean
        num_tokens = min(num_ending * self._mean_prompt_tokens, self._budget)
        step_s = self._step_time.predict_s(self._decoding._replace(num_prompt_tokens=num_tokens))
        return (1 - self.other_share) * num_ending / step_s if step_s > 0 else 0.0

    def _shape(self, rows: list[ScheduledRow]) -> StepShape:
        prompts = rows[self._decoding.num_decoding :]
        num_tokens = sum(row.num_tokens for row in prompts)
        if num_tokens == 0:
            return self._decoding
        context = sum(row.num_tokens * (row.start + row.num_tokens / 2) for row in prompts) / num_tokens
        return self._decoding._replace(num_prompt_tokens=num_tokens, prompt_context=context)

    # The step's rows

    def _decode(self) -> tuple[list[ScheduledRow], list[Sequence]]:
        """The rows of all sequences that need one token, with a block for it, and those that need more."""
        rows: list[ScheduledRow] = []
        prompts: list[Sequence] = []
        context = 0
        token_cost, context_cost = self._step_time.decode_cost()
        costs: dict[TenantAccount[Sequence], float] = {}
        drafts = self._drafts() if self._may_draft() else {}
        for sequence in self._running.values():
            num_tokens = len(sequence.token_ids) - sequence.num_scheduled_tokens
            if num_tokens > 1:
                prompts.append(sequence)
            elif num_tokens or sequence.num_schedulable_tokens:  # the latter asks for a pending one
                if sequence.num_scheduled_tokens >= len(sequence.block_ids) * self._block_size:
                    sequence.block_ids += self._pool.allocate(1)  # to the same list
                if drafts and (draft := drafts.get(sequence.request_id)):
                    row = ScheduledRow.next_of(sequence, 1 + len(draft), draft)
                else:
                    row = ScheduledRow.next_of(sequence, 1)
                rows.append(row)
                context += row.start
                if row.start >= sequence.num_charged_tokens:
                    sequence.num_charged_tokens = row.start + 1
                    account = sequence.account
                    assert account is not None
                    costs[account] = costs.get(account, 0.0) + token_cost + context_cost * row.start
        for account, cost in costs.items():
            account.charge(cost)
        self._decoding = StepShape(0, len(rows), context, 0.0, sum(map(len, drafts.values())))
        return rows, prompts

    # Speculation

    def _may_draft(self) -> bool:
        """Whether a step has room for tokens ahead of their turn: few run, and nobody waits for a first token."""
        policy = self.policy
        is_narrow = 0 < len(self._running) <= policy.speculation_max_seqs
        return is_narrow and policy.num_speculative_tokens > 0 and not self.has_prompts

    def _drafts(self) -> dict[int, tuple[int, ...]]:
        """What is tried of each decoding sequence behind its next token, with blocks for it: as much as makes the step
        yield more tokens per second than without. Where blocks are scarce there is none, so that nobody goes for one.
        """
        decoding = [s for s in self._running.values() if s.num_scheduled_tokens == len(s.token_ids) - 1]
        num_left = min(self._max_num_batched_tokens, MAX_TOKENS_WITH_DRAFTS) - len(self._running)
        step_s = self._step_time.predict_s(StepShape(0, len(decoding), sum(len(s.token_ids) for s in decoding)))
        token_s = self._step_time.drafted_token_s()
        room_s = USED_SHARE * self._itl_target_s() - step_s
        if token_s > 0:
            num_left = int(min(num_left, max(0.0, room_s / token_s)))
        num_expected = float(len(decoding))
        drafts: dict[int, tuple[int, ...]] = {}
        for sequence in decoding:
            if not sequence.is_draftable:
                continue
            lookup = sequence.lookup = sequence.lookup or PromptLookup()
            match = lookup.find(sequence.token_ids)
            # Its last token is never computed.
            num_wanted = sequence.num_total_tokens - len(sequence.token_ids) - 1
            most = min(self.policy.num_speculative_tokens, num_left, num_wanted)
            if match is None or most <= 0:
                continue
            num_tokens = num_worthwhile(most, match.chance, num_expected, step_s, token_s)
            draft = _up_to_an_end(lookup.draft(match, sequence.token_ids, num_tokens), sequence.end_token_ids)
            num_missing = -(-(len(sequence.token_ids) + len(draft)) // self._block_size) - len(sequence.block_ids)
            if not draft or num_missing > self._pool.num_free - 2 * len(self._running):
                continue
            if num_missing > 0:
                sequence.block_ids += self._pool.allocate(num_missing)
            drafts[sequence.request_id] = draft
            num_left -= len(draft)
            step_s += len(draft) * token_s
            num_expected += sum(match.chance**i for i in range(1, len(draft) + 1))
        self._num_drafted_tokens += sum(map(len, drafts.values()))
        return drafts

    def _accept(self, row: ScheduledRow, more_token_ids: tuple[int, ...]) -> tuple[int, ...]:
        """Append what came true of a row's draft; the rest is as if it had not been scheduled. Returns those tokens,
        for which its tenant pays now."""
        sequence, accepted = row.sequence, row.draft[: len(more_token_ids)]
        assert sequence.lookup is not None
        assert sequence.account is not None
        sequence.lookup.learn(len(row.draft), len(accepted))
        sequence.num_scheduled_tokens -= len(row.draft) - len(accepted)
        sequence.token_ids.extend(accepted)
        token_cost, context_cost = self._step_time.decode_cost()
        sequence.num_charged_tokens = max(sequence.num_charged_tokens, row.start + 1 + len(accepted))
        sequence.account.charge(len(accepted) * (token_cost + context_cost * row.start))
        self._num_accepted_tokens += len(accepted)
        return accepted

    def _continue_prompts(self, prompts: list[Sequence], budget: int, rows: list[ScheduledRow]) -> tuple[int, int]:
        """Add the next chunks of prompts under way, short ones first; returns what is left and how many are long."""
        short = [sequence for sequence in prompts if sequence.num_schedulable_tokens <= 2 * budget]
        long = [sequence for sequence in prompts if sequence.num_schedulable_tokens > 2 * budget]
        num_left = budget
        for sequence in short:
            num_left -= self._prefill(sequence, num_left, rows)
        num_kept = 0
        if self._queue.buckets.get(_SHORT) and len(self._running) < self.max_num_seqs:
            num_kept = max(0, int(_SHORT_SHARE * budget) - (budget - num_left))
        for sequence in long:
            num_left -= self._prefill(sequence, num_left - num_kept, rows)
        return num_left, len(long)

    def _prefill(self, sequence: Sequence, most: int, rows: list[ScheduledRow]) -> int:
        """Add a prompt's next chunk of at most so many tokens; returns how many. Its tenant pays for those that have
        not been computed for it before."""
        num_tokens = min(sequence.num_schedulable_tokens, most)
        if num_tokens <= 0:
            return 0
        row = ScheduledRow.next_of(sequence, num_tokens)
        rows.append(row)
        num_new = row.start + num_tokens - max(row.start, sequence.num_charged_tokens)
        if num_new > 0:
            sequence.num_charged_tokens = row.start + num_tokens
            assert sequence.account is not None
            sequence.account.charge(num_new)
        return num_tokens

    # B, D: who is admitted

    def _admit_next(self, now: float, *, takes_long: bool, dropped: list[SequenceOutput]) -> Sequence | None:
        """Start the next in the queue if there is room for it. Nobody overtakes one that finds none, but premium, for
        which some is kept, and that for no more service than its prompt is."""
        only: Tier | None = None
        claimant, self._endangered = self._endangered, None  # there is room for it, which a victim may be picked for
        while (head := claimant or self._pick(takes_long=takes_long, only=only)) is not None:
            claimant = None
            if self._running and len(dropped) >= 2 * _MAX_DROPPED_WAITING:
                return None
            if head.request_id in self._cancelled:
                self._cancelled.discard(head.request_id)
                dropped.append(self._drop(head, FinishReason.CANCELLED))
                continue
            cached = self._find_cached(head)
            first_token_s = now + self._prefill_s(head, cached)  # if it began now
            if head.num_output_tokens == 0 and first_token_s > head.first_token_due_s:  # F
                dropped.append(self._drop(head, FinishReason.DEADLINE))
            elif self._fits(head, cached):
                self._start(head, cached, now)
                return head
            elif head.request.tier is Tier.PREMIUM:
                is_late = first_token_s + self._step_time.predict_s(self._decoding) > head.request.target_s
                if is_late and self._could_fit(head, cached):
                    self._endangered = head
                return None
            elif self._queue.lead(Tier.PREMIUM, head) > len(head.token_ids):
                return None  # B: premium has passed it often enough
            else:
                only = Tier.PREMIUM
        return None

    def _pick(self, *, takes_long: bool, only: Tier | None) -> Sequence | None:
        return self._queue.pick(only=only) if takes_long else self._queue.pick(bucket=_SHORT, only=only)

    def _fits(self, sequence: Sequence, cached: list[int]) -> bool:
        """D: whether there are a place in the batch, blocks for its tokens, and room for what all will come to hold."""
        if not self._running:
            return True
        if len(self._running) >= self.max_num_seqs:
            return False
        if not self._keeps_pace(sequence):
            return False
        num_reserved = 0
        if self._has_premium and sequence.request.tier is not Tier.PREMIUM:
            num_reserved = int(_PREMIUM_RESERVE * self._pool.num_total)
        num_blocks = self._num_blocks(sequence) - len(cached)
        if num_blocks > self._pool.num_free - self._pool.num_free_among(cached) - num_reserved:
            return False
        return self._projected_peak(sequence, cached) <= _USED_BLOCKS * self._pool.num_total - num_reserved

    def _keeps_pace(self, sequence: Sequence) -> bool:
        """A: whether all would get their tokens in time with this one beside them. Where not even a lone stream does,
        its target keeps nobody out."""
        target_s = USED_SHARE * min(self._itl_target_s(), self.policy.itl_targets_s[sequence.request.tier])
        context = sum(len(s.token_ids) for s in self._running.values()) + len(sequence.token_ids)
        if self._step_time.predict_s(StepShape(0, len(self._running) + 1, context)) <= target_s:
            return True
        return self._step_time.predict_s(StepShape(0, 1, len(sequence.token_ids))) > target_s

    def _projected_peak(self, sequence: Sequence, cached: list[int]) -> float:
        """The most blocks that will be held at once, if a sequence is admitted that shares these."""
        everyone = [*self._running.values(), sequence]
        shared = np.array([*(s.num_shared_blocks for s in self._running.values()), len(cached)], np.float64)
        held = np.array([*(len(s.block_ids) for s in self._running.values()), self._num_blocks(sequence)]) - shared
        num_output = np.array([s.num_output_tokens for s in everyone])
        remaining = self._lengths.expected_remaining(num_output) / self._block_size
        most = np.array([s.num_total_tokens for s in everyone]) / self._block_size
        most -= held + shared
        num_shared = self._pool.num_total - self._pool.num_free - float(held[:-1].sum())
        num_shared += self._pool.num_free_among(cached)
        return num_shared + projected_peak(held, np.clip(remaining, 0, np.maximum(most, 0)))

    def _num_blocks(self, sequence: Sequence) -> int:
        """How many blocks a sequence takes when it is admitted: its tokens', or, preempted often, all it may need."""
        is_pinned = sequence.num_preemptions >= _MAX_PREEMPTIONS
        num_tokens = sequence.num_total_tokens if is_pinned else len(sequence.token_ids)
        return -(-num_tokens // self._block_size)

    def _start(self, sequence: Sequence, cached: list[int], now: float) -> None:
        self._queue.remove(sequence)
        self._pool.share(cached)
        sequence.block_ids = cached + self._pool.allocate(self._num_blocks(sequence) - len(cached))
        sequence.num_shared_blocks = len(cached)
        sequence.num_scheduled_tokens = sequence.num_computed_tokens = len(cached) * self._block_size
        sequence.num_charged_tokens = max(sequence.num_charged_tokens, sequence.num_computed_tokens)
        sequence.status = SequenceStatus.RUNNING
        if sequence.last_token_s is not None:
            sequence.last_token_s = now  # F: that it waited was our doing
            self._deadlines.watch(sequence)
        if sequence.scheduled_s is None:
            sequence.scheduled_s = now
            sequence.num_cached_tokens = sequence.num_computed_tokens
            self._mean_prompt_tokens += _FOLLOWING * (sequence.num_prompt_tokens - self._mean_prompt_tokens)
            if self._uses_prefix_cache(sequence):
                self._num_prefix_queries += sequence.num_prompt_tokens
                self._num_prefix_hits += sequence.num_cached_tokens
        self._running[sequence.request_id] = sequence
        self._num_running[sequence.request.tier] += 1

    def _prefill_s(self, sequence: Sequence, cached: list[int]) -> float:
        """How long its prompt takes at least, 0 where nothing is known."""
        num_tokens = len(sequence.token_ids) - len(cached) * self._block_size
        return self._step_time.prompt_token_s() * num_tokens

    # Followers and prefixes

    def _waits_for_leader(self, sequence: Sequence, leader_id: int) -> bool:
        """Whether a prompt that this sequence can find, or whose log probabilities it shares, is still computed."""
        leader = self._sequences.get(leader_id)
        if leader is None or leader.num_computed_tokens >= leader.num_prompt_tokens:
            return False
        is_findable = self._has_prefix_cache and sequence.num_prompt_tokens > self._block_size
        return is_findable or leader.is_scored

    def _release_followers(self, leader: Sequence) -> None:
        for sequence in self._followers.pop(leader.request_id, ()):
            if sequence.status is SequenceStatus.WAITING:
                self._queue.push(sequence)

    def _uses_prefix_cache(self, sequence: Sequence) -> bool:
        """A prompt whose own log probabilities are still wanted has to be computed."""
        is_missing = sequence.is_scored and sequence.num_prompt_logprobs < sequence.num_prompt_tokens - 1
        return self._has_prefix_cache and not is_missing

    def _find_cached(self, sequence: Sequence) -> list[int]:
        """The blocks of the longest cached prefix that leaves a token to compute, whose logits are needed."""
        block_ids: list[int] = []
        if self._uses_prefix_cache(sequence):
            for index in range((len(sequence.token_ids) - 1) // self._block_size):
                block_id = self._pool.find(sequence.block_hash(index, self._block_size))
                if block_id is None:
                    break
                block_ids.append(block_id)
        return block_ids

    def _note_computed(self, sequence: Sequence, num_tokens: int) -> None:
        """Let others find the blocks that its last so many tokens have filled, and followers the prompt."""
        if self._has_prefix_cache:
            first = (sequence.num_computed_tokens - num_tokens) // self._block_size
            for index in range(first, sequence.num_computed_tokens // self._block_size):
                self._pool.register(sequence.block_ids[index], sequence.block_hash(index, self._block_size))
        if self._followers and sequence.num_computed_tokens >= sequence.num_prompt_tokens:
            self._release_followers(sequence)

    # E

    def _make_room(self) -> bool:
        """Preempt until each decoding sequence finds a block for its token, and an endangered premium one its place.
        Returns whether anybody was.

        A sequence that has been preempted twice is admitted with all its blocks, and needs none any more. So there is
        always somebody to preempt, none of them for the third time, and whoever runs gets to its end.
        """
        num_preemptions = self._num_preemptions
        if len(self._running) > self._pool.num_free:
            num_missing = sum(map(self._num_missing_blocks, self._running.values()))
            while num_missing > self._pool.num_free:
                victim = self._victim(list(self._running.values()))
                assert victim is not None, "one that has all its blocks misses some"
                num_missing -= self._num_missing_blocks(victim)
                self._preempt(victim)
        head = self._endangered
        if head is not None and (head.status is SequenceStatus.FINISHED or head.request_id in self._cancelled):
            head = self._endangered = None
        if head is not None:
            while not self._fits(head, self._find_cached(head)):
                victim = self._victim(self._lower_tiers())
                if victim is None:
                    self._endangered = None
                    break
                self._preempt(victim)
        return self._num_preemptions > num_preemptions

    def _lower_tiers(self) -> list[Sequence]:
        """Those that give way to premium."""
        return [
            sequence
            for sequence in self._running.values()
            if sequence.request.tier is not Tier.PREMIUM and sequence.num_preemptions < _MAX_PREEMPTIONS
        ]

    def _could_fit(self, sequence: Sequence, cached: list[int]) -> bool:
        """Whether there were a place and blocks for a sequence, if all lower tiers gave way."""
        lower = self._lower_tiers()
        num_freed = sum(s.num_own_blocks for s in lower)
        num_blocks = self._num_blocks(sequence) - len(cached) + self._pool.num_free_among(cached)
        has_place = len(self._running) - len(lower) < self.max_num_seqs
        return bool(lower) and has_place and num_blocks <= self._pool.num_free + num_freed

    def _victim(self, candidates: list[Sequence]) -> Sequence | None:
        """The one of the lowest tier, of these the one that frees most blocks for what it takes to compute again, of
        these the newest; None where all have been preempted often enough."""
        return max(
            (sequence for sequence in candidates if sequence.num_preemptions < _MAX_PREEMPTIONS),
            key=lambda s: (
                _RANK[s.request.tier],
                s.num_own_blocks / (1 + s.num_computed_tokens),
                s.request_id,
            ),
            default=None,
        )

    def _num_missing_blocks(self, sequence: Sequence) -> int:
        """How many blocks a sequence needs for its next token: one or none. A prompt has all of its own."""
        is_full = sequence.num_scheduled_tokens >= len(sequence.block_ids) * self._block_size
        return is_full and sequence.num_schedulable_tokens > 0

    def _preempt(self, sequence: Sequence) -> None:
        """Take a sequence's blocks; it keeps its tokens, its place and its charge, and computes them again later."""
        assert sequence.num_scheduled_tokens == sequence.num_computed_tokens, "preempted in flight"
        self._free_blocks(sequence)
        sequence.num_scheduled_tokens = sequence.num_computed_tokens = 0
        sequence.num_preemptions += 1
        self._num_preemptions += 1
        self._stop_running(sequence)
        sequence.status = SequenceStatus.WAITING
        self._queue.push(sequence)

    # F, G, and the other ends

    def _finish_reason(self, sequence: Sequence, token_id: int) -> FinishReason | None:
        # In a grammar one is drawn early only where it has no other.
        is_due = sequence.grammar is not None or sequence.num_output_tokens > sequence.request.sampling.min_tokens
        if is_due and token_id in sequence.end_token_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(sequence.token_ids) >= sequence.num_total_tokens else None

    def _drop_cancelled(self) -> list[SequenceOutput]:
        """End all cancelled sequences that run, and some of those that wait; picking skips the others."""
        if not self._cancelled:
            return []
        running = sorted(self._cancelled & self._running.keys())
        self._cancelled.difference_update(running)
        dropped = [self._drop(self._running[request_id], FinishReason.CANCELLED) for request_id in running]
        most = _MAX_DROPPED_WAITING if self._running else len(self._cancelled)
        for _ in range(min(most, len(self._cancelled))):
            if (sequence := self._sequences.get(self._cancelled.pop())) is not None:
                dropped.append(self._drop(sequence, FinishReason.CANCELLED))
        return dropped

    def _drop_expired(self, now: float) -> list[SequenceOutput]:
        return [self._drop(sequence, FinishReason.DEADLINE) for sequence in self._deadlines.pop_expired(now)]

    def _drop(self, sequence: Sequence, reason: FinishReason) -> SequenceOutput:
        self._remove(sequence)
        return SequenceOutput(sequence.request_id, finish_reason=reason)

    def _fail(self, sequence: Sequence, error: str) -> SequenceOutput:
        """End a sequence. What its blocks hold, those that it found included, may be what was wrong with it: nobody
        finds them any more."""
        self._pool.forget(sequence.block_ids)
        self._remove(sequence)
        return SequenceOutput(
            sequence.request_id,
            finish_reason=FinishReason.ERROR,
            scheduled_s=sequence.scheduled_s if sequence.is_fresh else None,
            num_cached_tokens=sequence.num_cached_tokens if sequence.is_fresh else 0,
            error=error,
        )

    def _remove(self, sequence: Sequence) -> None:
        """Take a sequence off every list and free its blocks."""
        self._free_blocks(sequence)
        if sequence.status is SequenceStatus.RUNNING:
            self._stop_running(sequence)
        elif sequence.account is not None:  # else it follows a leader
            self._queue.remove(sequence)
        sequence.status = SequenceStatus.FINISHED
        del self._sequences[sequence.request_id]
        if sequence.num_output_tokens:
            self._lengths.observe(sequence.num_output_tokens)
        self._release_followers(sequence)

    def _stop_running(self, sequence: Sequence) -> None:
        del self._running[sequence.request_id]
        self._num_running[sequence.request.tier] -= 1

    def _free_blocks(self, sequence: Sequence) -> None:
        """A step in flight may still write to these. It never writes to one that others find, and the steps of whoever
        is given one come after it."""
        self._pool.free(sequence.block_ids)
        sequence.block_ids = []  # another list: a step in flight has the old one


def _up_to_an_end(draft: tuple[int, ...], end_token_ids: frozenset[int]) -> tuple[int, ...]:
    """A draft as far as the sequence could go on behind it."""
    for i, token_id in enumerate(draft):
        if token_id in end_token_ids:
            return draft[:i]
    return draft
