"""Who runs in the next step: first come, first served, under a token budget and a batch limit.

A pure object: no clock, randomness, thread or tensor inside; the same calls give the same answers. Owned by the engine
thread. Every step first gives each running sequence what it needs (one token to decode, or the next chunk of its
prompt), then admits waiting ones while budget, batch limit and blocks last. A sequence that is admitted shares the
blocks of its longest prefix that some sequence has computed before it. A step can be scheduled while the one before it
is in flight, but no more than one; they are recorded in their order.

Papers: Orca (OSDI 2022) for iteration-level batching, PagedAttention (SOSP 2023) for preemption by recompute,
Sarathi-Serve (OSDI 2024) for chunked prefill beside decode. Deviation: the budget is fixed, not chosen online.
"""

import heapq
from collections import OrderedDict
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import NamedTuple

from headrace.scheduler.block_pool import BlockPool
from headrace.scheduler.messages import FinishReason, GenerationRequest, LoadSnapshot, RowResult, SequenceOutput
from headrace.scheduler.sequence import Sequence, SequenceStatus

# How many deadlines of finished requests are kept before the heap is rebuilt, beside as many as there are sequences.
_MIN_DEADLINES = 64
_NONE_SCORED = range(0)


class ScheduledRow(NamedTuple):
    """`num_tokens` tokens of `sequence` to compute in this step, from index `start` on.

    The last of them can be pending: it is what the step before samples for the sequence. `is_sampled` where the row
    reaches the sequence's last token and the next one is wanted. `scored_positions` are the prompt's tokens whose log
    probabilities the row makes; none twice, if it computes some once more.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    is_sampled: bool
    scored_positions: range

    @staticmethod
    def next_of(sequence: Sequence, num_tokens: int) -> "ScheduledRow":
        """The row of the next tokens of a sequence, which are scheduled with it."""
        start = sequence.num_scheduled_tokens
        end = sequence.num_scheduled_tokens = start + num_tokens
        is_sampled = end >= len(sequence.token_ids) and sequence.request.sampling.max_tokens > 0
        scored_positions = _NONE_SCORED
        if sequence.request.sampling.num_prompt_logprobs is not None:
            first = max(start, sequence.num_prompt_logprobs) + 1
            scored_positions = range(first, min(end + 1, sequence.num_prompt_tokens))
        return ScheduledRow(sequence, start, num_tokens, is_sampled, scored_positions)


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """The rows of one step, and what was dropped before it: cancelled sequences and missed deadlines."""

    rows: list[ScheduledRow]
    dropped: list[SequenceOutput]


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
    ) -> None:
        assert max_num_batched_tokens >= max_num_seqs, "every running sequence must get its token in every step"
        self._pool = block_pool
        self._block_size = block_size
        self._max_num_batched_tokens = max_num_batched_tokens
        self.max_num_seqs = max_num_seqs
        self._has_prefix_cache = has_prefix_cache
        self._sequences: dict[int, Sequence] = {}
        self._waiting: OrderedDict[int, Sequence] = OrderedDict()
        self._running: OrderedDict[int, Sequence] = OrderedDict()
        self._cancelled: list[int] = []
        self._deadlines: list[tuple[float, int]] = []
        self._num_received = 0
        self._num_prefix_queries = 0
        self._num_prefix_hits = 0
        self._num_preemptions = 0
        self._num_steps = 0

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    @property
    def may_preempt(self) -> bool:
        """Whether the next `schedule()` could run out of blocks. Then no step may be in flight: a sequence is preempted
        when all its tokens are known."""
        num_free = self._pool.num_free
        if len(self._running) <= num_free:  # a prompt has all its blocks, and a token needs one at most
            return False
        return num_free < sum(self._num_missing_blocks(s, s.num_schedulable_tokens) for s in self._running.values())

    def add(self, request: GenerationRequest) -> None:
        """Queue a request behind those already waiting."""
        sequence = Sequence(request)
        self._num_received += 1
        self._sequences[request.request_id] = sequence
        self._waiting[request.request_id] = sequence
        if request.deadline_s != float("inf"):
            heapq.heappush(self._deadlines, (request.deadline_s, request.request_id))
            if len(self._deadlines) > 2 * len(self._sequences) + _MIN_DEADLINES:
                # Most of the heap belongs to requests that are over.
                self._deadlines = [entry for entry in self._deadlines if entry[1] in self._sequences]
                heapq.heapify(self._deadlines)

    def cancel(self, request_id: int) -> None:
        """Mark a request. The next `schedule()` frees its blocks; an unknown or finished id is ignored."""
        if request_id in self._sequences:
            self._cancelled.append(request_id)

    def schedule(self, now: float) -> SchedulerOutput:
        """Choose the rows of the next step and give each the blocks it needs.

        One step may be in flight, unless `may_preempt`. What is freed here that it still writes to can be given away at
        once: what the next holder writes comes after it.
        """
        dropped = self._drop_cancelled() + self._drop_expired(now)
        rows: list[ScheduledRow] = []
        budget = self._max_num_batched_tokens
        num_preemptions = self._num_preemptions

        for sequence in list(self._running.values()):
            if budget == 0:
                break
            num_tokens = min(sequence.num_schedulable_tokens, budget)
            is_running = sequence.status is SequenceStatus.RUNNING  # not preempted just now
            if num_tokens and is_running and self._make_room(sequence, num_tokens):
                rows.append(ScheduledRow.next_of(sequence, num_tokens))
                budget -= num_tokens

        # A step that preempted admits nobody: a victim that shares a prefix could fit again at once, only to go again.
        has_room = self._num_preemptions == num_preemptions
        while has_room and budget > 0 and (head := self._admit_next(now)):
            num_tokens = min(head.num_schedulable_tokens, budget)
            rows.append(ScheduledRow.next_of(head, num_tokens))
            budget -= num_tokens

        self._num_steps += bool(rows)
        return SchedulerOutput(rows, dropped)

    def update(self, output: SchedulerOutput, results: Seq[RowResult]) -> list[SequenceOutput]:
        """Record what a step computed: `results[i]` is row i's. Steps come here in the order they were scheduled in.

        What was computed for a sequence that has ended since is nobody's.
        """
        outputs = []
        for row, result in zip(output.rows, results, strict=True):
            sequence = row.sequence
            if sequence.status is SequenceStatus.FINISHED:
                continue
            is_first_run = sequence.is_fresh
            self._advance(sequence, row.num_tokens)
            sequence.num_prompt_logprobs += len(result.prompt_logprobs)
            finish_reason = None
            if result.token_id is not None:
                sequence.token_ids.append(result.token_id)
                finish_reason = self._finish_reason(sequence, result.token_id)
            elif sequence.num_uncomputed_tokens == 0:
                finish_reason = FinishReason.LENGTH  # nothing was to be sampled
            if is_first_run or result.token_id is not None or result.prompt_logprobs or finish_reason is not None:
                outputs.append(
                    SequenceOutput(
                        sequence.request.request_id,
                        () if result.token_id is None else (result.token_id,),
                        finish_reason,
                        sequence.scheduled_s if is_first_run else None,
                        sequence.num_cached_tokens if is_first_run else 0,
                        () if result.logprobs is None else (result.logprobs,),
                        result.prompt_logprobs,
                    )
                )
            if finish_reason is not None:
                self._remove(sequence)
        return outputs

    def fail(self, sequences: list[Sequence], error: str) -> list[SequenceOutput]:
        """End those of these sequences that have not ended; what a step that raised left in their blocks cannot be
        trusted."""
        sequences = [sequence for sequence in sequences if sequence.status is not SequenceStatus.FINISHED]
        for sequence in sequences:
            self._remove(sequence)
        return [
            SequenceOutput(
                sequence.request.request_id,
                finish_reason=FinishReason.ERROR,
                scheduled_s=sequence.scheduled_s if sequence.is_fresh else None,
                num_cached_tokens=sequence.num_cached_tokens if sequence.is_fresh else 0,
                error=error,
            )
            for sequence in sequences
        ]

    def fail_all(self, error: str) -> list[SequenceOutput]:
        """End everything, waiting or running."""
        return self.fail(list(self._sequences.values()), error)

    def load(self, busy_s: float = 0.0) -> LoadSnapshot:
        return LoadSnapshot(
            num_waiting=len(self._waiting),
            num_running=len(self._running),
            num_received=self._num_received,
            num_free_blocks=self._pool.num_free,
            num_cached_blocks=self._pool.num_cached,
            num_total_blocks=self._pool.num_total,
            num_prefix_queries=self._num_prefix_queries,
            num_prefix_hits=self._num_prefix_hits,
            num_preemptions=self._num_preemptions,
            num_steps=self._num_steps,
            busy_s=busy_s,
        )

    def check_books(self) -> None:
        """Assert that the pool's books are those of the running sequences and that nothing waiting holds a block."""
        self._pool.check_books([block_id for sequence in self._running.values() for block_id in sequence.block_ids])
        assert not any(sequence.block_ids for sequence in self._waiting.values()), "a waiting sequence holds blocks"
        assert len(self._waiting) + len(self._running) == len(self._sequences), "a sequence is in no list"

    def _admit_next(self, now: float) -> Sequence | None:
        """Start the head of the queue if its whole prompt finds blocks; behind it nobody overtakes."""
        if not self._waiting or len(self._running) >= self.max_num_seqs:
            return None
        sequence = next(iter(self._waiting.values()))
        if self._waits_for_leader(sequence):
            return None
        cached = self._find_cached(sequence)
        num_blocks = -(-len(sequence.token_ids) // self._block_size) - len(cached)
        if num_blocks > self._pool.num_free - self._pool.num_free_among(cached):
            return None
        self._pool.share(cached)
        sequence.block_ids = cached + self._pool.allocate(num_blocks)
        sequence.num_scheduled_tokens = sequence.num_computed_tokens = len(cached) * self._block_size
        sequence.status = SequenceStatus.RUNNING
        if sequence.scheduled_s is None:
            sequence.scheduled_s = now
            sequence.num_cached_tokens = sequence.num_computed_tokens
            if self._uses_prefix_cache(sequence):
                self._num_prefix_queries += sequence.num_prompt_tokens
                self._num_prefix_hits += sequence.num_cached_tokens
        del self._waiting[sequence.request.request_id]
        self._running[sequence.request.request_id] = sequence
        return sequence

    def _waits_for_leader(self, sequence: Sequence) -> bool:
        """Whether a prompt that this sequence can find, or whose log probabilities it shares, is still computed."""
        leader = None if sequence.request.leader_id is None else self._sequences.get(sequence.request.leader_id)
        if leader is None or leader.num_computed_tokens >= leader.num_prompt_tokens:
            return False
        is_findable = self._has_prefix_cache and sequence.num_prompt_tokens > self._block_size
        return is_findable or leader.request.sampling.num_prompt_logprobs is not None

    def _uses_prefix_cache(self, sequence: Sequence) -> bool:
        """A prompt whose own log probabilities are still wanted has to be computed."""
        is_scored = sequence.request.sampling.num_prompt_logprobs is not None
        is_missing = is_scored and sequence.num_prompt_logprobs < sequence.num_prompt_tokens - 1
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

    def _advance(self, sequence: Sequence, num_tokens: int) -> None:
        """Count tokens as computed, and let others find the blocks they have filled."""
        first = sequence.num_computed_tokens // self._block_size
        sequence.num_computed_tokens += num_tokens
        if self._has_prefix_cache:
            for index in range(first, sequence.num_computed_tokens // self._block_size):
                self._pool.register(sequence.block_ids[index], sequence.block_hash(index, self._block_size))

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give a running sequence blocks for its next tokens, preempting the newest if none are left.

        Returns False if `sequence` was itself the newest. The oldest always advances, since one request alone fits
        the pool, so there is no livelock.
        """
        num_blocks = self._num_missing_blocks(sequence, num_tokens)
        while num_blocks > self._pool.num_free:
            victim = next(reversed(self._running.values()))
            self._preempt(victim)
            if victim is sequence:
                return False
        if num_blocks:
            sequence.block_ids += self._pool.allocate(num_blocks)  # to the same list
        return True

    def _num_missing_blocks(self, sequence: Sequence, num_tokens: int) -> int:
        num_blocks = -(-(sequence.num_scheduled_tokens + num_tokens) // self._block_size)
        return max(0, num_blocks - len(sequence.block_ids))

    def _preempt(self, sequence: Sequence) -> None:
        """Take a sequence's blocks; it keeps its tokens and its place, and computes them again later."""
        assert sequence.num_scheduled_tokens == sequence.num_computed_tokens, "preempted in flight"
        self._free_blocks(sequence)
        sequence.num_scheduled_tokens = sequence.num_computed_tokens = 0
        sequence.num_preemptions += 1
        self._num_preemptions += 1
        sequence.status = SequenceStatus.WAITING
        del self._running[sequence.request.request_id]
        self._waiting[sequence.request.request_id] = sequence
        self._waiting.move_to_end(sequence.request.request_id, last=False)

    def _finish_reason(self, sequence: Sequence, token_id: int) -> FinishReason | None:
        sampling = sequence.request.sampling
        if token_id in sampling.stop_token_ids and sequence.num_output_tokens > sampling.min_tokens:
            return FinishReason.STOP
        if sequence.num_output_tokens >= sampling.max_tokens:
            return FinishReason.LENGTH
        return None

    def _drop_cancelled(self) -> list[SequenceOutput]:
        dropped = [self._drop(request_id, FinishReason.CANCELLED) for request_id in self._cancelled]
        self._cancelled.clear()
        return [output for output in dropped if output]

    def _drop_expired(self, now: float) -> list[SequenceOutput]:
        dropped = []
        while self._deadlines and self._deadlines[0][0] <= now:
            _, request_id = heapq.heappop(self._deadlines)
            dropped.append(self._drop(request_id, FinishReason.DEADLINE))
        return [output for output in dropped if output]

    def _drop(self, request_id: int, reason: FinishReason) -> SequenceOutput | None:
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return None
        self._remove(sequence)
        return SequenceOutput(request_id, finish_reason=reason)

    def _remove(self, sequence: Sequence) -> None:
        """Take a sequence off every list and free its blocks."""
        request_id = sequence.request.request_id
        self._free_blocks(sequence)
        sequence.status = SequenceStatus.FINISHED
        del self._sequences[request_id]
        self._waiting.pop(request_id, None)
        self._running.pop(request_id, None)

    def _free_blocks(self, sequence: Sequence) -> None:
        """A step in flight may still write to these. It never writes to one that others find, and the steps of whoever
        is given one come after it."""
        self._pool.free(sequence.block_ids)
        sequence.block_ids = []  # another list: a step in flight has the old one
