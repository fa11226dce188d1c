"""Turning the scheduler's rows into one packed batch, running it, and sampling.

Owned by the engine thread. It reads sequences and never changes them: the scheduler records what was computed.
A draft is verified without rejection sampling: what is drawn at a place follows from its logits and its row's seed and
position alone (see kernels/sampling.py). So a token is drawn at each of the draft's places as if those before it were
true, and counts if they were. Answers are, token for token, those without drafts; and each token of a draft comes true
with the model's own probability of it, which is the most that is possible (Leviathan et al., ICML 2023).
"""

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from headrace.kernels.backend import Backend, PendingRead, StepBatch
from headrace.kernels.sampling import LogProbabilities, Penalties, SamplingBatch, log_probabilities, upload
from headrace.kernels.step_times import StepTimes
from headrace.scheduler.errors import DeviceLostError, ModelSourceError
from headrace.scheduler.grammar import wait, wait_for_any
from headrace.scheduler.messages import GenerationRequest, RowResult, SamplingParams, TokenLogprobs
from headrace.scheduler.prompt_lookup import verified
from headrace.scheduler.scheduler import MAX_TOKENS_WITH_DRAFTS, ScheduledRow, SchedulerOutput
from headrace.scheduler.sequence import Sequence
from headrace.scheduler.step_time import StepShape
from headrace.scheduler.step_tracer import StepTracer

# A row's sampling settings side by side, as they are kept with its sequence.
_SAMPLING = np.dtype(
    [
        *((name, np.float32) for name in ("temperature", "top_p", "min_p")),
        *((name, np.int64) for name in ("top_k", "choice", "min_tokens", "num_prompt_tokens")),
        ("seed", np.uint64),
        *((name, np.bool_) for name in ("has_penalties", "has_bias", "has_logprobs", "has_grammar")),
    ]
)
_NO_NUMBERS = RowResult(is_nan=True)
_LATE = RowResult(is_late=True)
_MASK_PATIENCE_S = 0.001
_MASKS_PATIENCE_S = 0.02
_ADAPTER_TRIAL_TOKENS = 16
# Has what it is given called, from any thread, when a backend is lost.
Watch = Callable[[Callable[[], None]], None]


class ModelRunner:
    """Computes steps with a backend."""

    def __init__(
        self,
        backend: Backend,
        *,
        vocab_size: int,
        block_size: int,
        max_context_tokens: int,
        max_num_batched_tokens: int,
        description: str,
        adapters: tuple[str, ...] = (),
        gpu_uuid: str | None = None,
        watch: Watch | None = None,
    ) -> None:
        """`adapters` are the names of the backend's, in their order. `watch` is for backends that can be lost while
        they compute nothing."""
        self.backend = backend
        self._block_size = block_size
        self._max_num_batched_tokens = max_num_batched_tokens
        self.max_context_tokens = max_context_tokens
        self.vocab_size = vocab_size
        self.description = description
        self.gpu_uuid = gpu_uuid
        self._watch = watch
        self._adapters: dict[str | None, int] = {None: 0} | {name: i for i, name in enumerate(adapters, start=1)}
        self.tracer = StepTracer(backend.profile)
        self._drawn_rows: dict[int, int] = {}  # of each request in the last launched step, if tokens can be pending

    @property
    def is_asynchronous(self) -> bool:
        return self.backend.is_asynchronous

    def launch(self, output: SchedulerOutput) -> "_LaunchedStep":
        """Begin to compute the rows of a step; with a backend that is not asynchronous, compute them."""
        rows = output.rows
        sampled = _sampled(rows)
        with self.tracer.range("pack"):
            batch = self._pack(rows)
            sampling = _sampling_records(sampled)
        is_plain = _are_plainly_greedy(sampling)
        if is_plain.all() and len(batch.logit_rows) == len(sampled):
            with self.tracer.range("forward"):
                step = _LaunchedStep(rows, self.backend.read([self.backend.argmax(batch)]))
        else:
            step = self._sample(batch, rows, sampled, sampling, is_plain)
        if step.times is not None:
            self.tracer.note_phases(step.times.began_s)
        if self.is_asynchronous:
            self._drawn_rows = {row.sequence.request.request_id: i for i, row in enumerate(sampled)}
        return step

    def run(self, output: SchedulerOutput) -> list[RowResult]:
        """Compute the rows of a step."""
        return self.launch(output).wait()

    def use_idle_time(self) -> bool:
        return self.backend.use_idle_time()

    def watch(self, on_loss: Callable[[], None]) -> None:
        """Have `on_loss` called, from any thread, when the backend is lost: `recover` then says so."""
        if self._watch is not None:
            self._watch(on_loss)

    def recover(self) -> None:
        """Make ready for the next step after one that raised. Raises: DeviceLostError."""
        try:
            self.backend.recover()
        except RuntimeError as error:
            raise DeviceLostError(f"the device is lost: {str(error).partition(chr(10))[0]}") from error

    def warm_up(self) -> list[tuple[StepShape, float]]:
        """Run a full prompt chunk, then a decode step, so that the first request pays for no first use; then some more,
        whose shapes and seconds are returned. Each adapter gets a small chunk.

        Raises: ModelSourceError where what comes out is not a number.
        """
        most = min(self._max_num_batched_tokens, self.max_context_tokens - 1)
        for adapter in self._adapters:
            num_tokens = most if adapter is None else min(_ADAPTER_TRIAL_TOKENS, most)
            [result] = self.run(self._trial([num_tokens], adapter=adapter))
            if result.is_nan:
                what = "model" if adapter is None else f"adapter {adapter}"
                raise ModelSourceError(f"the {what} computes no numbers: its weights are damaged, or exceed this dtype")
        self.run(self._trial([1], start=most))
        measured = []
        chunk, rows, far = [max(1, most // 4)], [1] * min(8, most), self.max_context_tokens // 8
        for query_lens, start in (([most], 0), ([1], most), (chunk, 0), (rows, 0), (chunk, far), (rows, far)):
            trial = self._trial(query_lens, start)
            began_s = time.monotonic()
            self.run(trial)
            measured.append((trial.shape, time.monotonic() - began_s))
        return measured

    def _trial(self, query_lens: list[int], start: int = 0, adapter: str | None = None) -> SchedulerOutput:
        """A step of tokens that nobody asked for, from `start` on. Its blocks are nobody's yet, they may be shared, and
        what is written there is overwritten before it can be seen."""
        rows = []
        for i, num_tokens in enumerate(query_lens):
            sampling = SamplingParams(temperature=1.0, top_p=0.9, num_logprobs=0)
            request = GenerationRequest(-1 - i, (0,) * (start + num_tokens), sampling, 0.0, adapter=adapter)
            sequence = Sequence(request)
            sequence.block_ids = list(range(-(-(start + num_tokens) // self._block_size)))
            sequence.num_scheduled_tokens = start
            rows.append(ScheduledRow.next_of(sequence, num_tokens))
        if query_lens == [1] * len(query_lens):
            return SchedulerOutput(rows, [], StepShape(0, len(rows), start * len(rows)))
        return SchedulerOutput(rows, [], StepShape(query_lens[0], 0, 0, start + query_lens[0] / 2))

    def _sample(
        self,
        batch: StepBatch,
        rows: list[ScheduledRow],
        sampled: list[ScheduledRow],
        sampling: np.ndarray,
        is_plain: np.ndarray,
    ) -> "_LaunchedStep":
        argmax_only = is_plain if is_plain.any() else None
        if argmax_only is not None:
            others = np.zeros(len(batch.logit_rows) - len(sampled), np.bool_)
            batch = replace(batch, argmax_only=np.concatenate([argmax_only, others]))
        with self.tracer.range("forward"):
            logits = self.backend.forward(batch)
        observed = np.flatnonzero(sampling["has_logprobs"])
        index = upload(observed, logits.device) if len(observed) else None
        unmodified = None if index is None else logits[index]  # a copy: sampling writes to its logits
        late = _late_rows(sampled, sampling)
        with self.tracer.range("sample"):
            settings = _sampling_batch(sampled, sampling, late, argmax_only)
            drawn = self.backend.sample(logits[: len(sampled)], settings)
        tensors = [drawn]
        if index is not None and unmodified is not None:
            tensors += log_probabilities(unmodified, drawn[index].clamp(min=0))
        scored = [(row.sequence, i) for row in rows for i in row.scored_positions]
        if scored:
            token_ids = np.array([sequence.token_ids[i] for sequence, i in scored], np.int64)
            tensors += log_probabilities(logits[len(sampled) :], upload(token_ids, logits.device))
        return _LaunchedStep(rows, self.backend.read(tensors), observed.tolist(), late)

    def _pack(self, rows: list[ScheduledRow]) -> StepBatch:
        is_asynchronous = self.is_asynchronous
        token_ids: list[int] = []
        query_lens: list[int] = []
        context_lens: list[int] = []
        sampled_rows: list[int] = []
        scored_rows: list[int] = []
        for sequence, start, num_tokens, is_sampled, scored_positions, draft in rows:
            end = start + num_tokens
            if scored_positions:
                # A token's log probability comes from the row of the one before it.
                scored_rows += [len(token_ids) + i - 1 - start for i in scored_positions]
            token_ids += sequence.token_ids[start:end]
            if draft:
                sampled_rows += range(len(token_ids) - 1, len(token_ids) + len(draft) - 1)
                token_ids += draft
            elif is_asynchronous and end > len(sequence.token_ids):
                token_ids.append(-1 - self._drawn_rows[sequence.request.request_id])
            query_lens.append(num_tokens)
            context_lens.append(end)
            if is_sampled:
                sampled_rows.append(len(token_ids) - 1)
        block_tables = [row.sequence.block_ids for row in rows]
        adapters = [self._adapters[row.sequence.request.adapter] for row in rows] if len(self._adapters) > 1 else []
        return StepBatch(token_ids, query_lens, context_lens, block_tables, sampled_rows + scored_rows, adapters)


@dataclass(frozen=True, slots=True)
class _LaunchedStep:
    """The rows of a step and the read of what it computes: the drawn tokens, then the log probabilities of the
    `observed` ones among them, then those of the scored positions, the latter two where there are any. What is drawn
    for the `late` ones is nobody's."""

    rows: list[ScheduledRow]
    read: PendingRead
    observed: list[int] = field(default_factory=list)
    late: frozenset[int] = frozenset()

    @property
    def times(self) -> StepTimes | None:
        return self.read.times

    def wait(self) -> list[RowResult]:
        drawn, *found = self.read.wait()
        token_ids = drawn.tolist()
        if not found:
            results = [RowResult(token_id) if token_id >= 0 else _NO_NUMBERS for token_id in token_ids]
            return self._by_row(self._without_late(results))
        logprobs: dict[int, TokenLogprobs] = {}
        if self.observed:
            sampled = _sampled(self.rows)
            num_top = [sampled[i].sequence.request.sampling.num_logprobs or 0 for i in self.observed]
            observed_ids = [token_ids[i] for i in self.observed]
            made = _token_logprobs(LogProbabilities(*found[:3]), observed_ids, num_top)
            logprobs = dict(zip(self.observed, made, strict=True))
        scored = iter(self._prompt_logprobs(found[3:] if self.observed else found))
        results = [
            RowResult(token_id, logprobs.get(i)) if token_id >= 0 else _NO_NUMBERS
            for i, token_id in enumerate(token_ids)
        ]
        rows_drawn = self._by_row(self._without_late(results))
        results = []
        for row, result in zip(self.rows, rows_drawn, strict=True):
            if row.scored_positions:
                prompt_logprobs = tuple(itertools.islice(scored, len(row.scored_positions)))
                is_nan = result.is_nan or any(math.isnan(each.logprob or 0.0) for each in prompt_logprobs)
                result = _NO_NUMBERS if is_nan else result._replace(prompt_logprobs=prompt_logprobs)
            results.append(result)
        return results

    def _by_row(self, drawn: list[RowResult]) -> list[RowResult]:
        """Of each row, what its place, or its draft's several, came to."""
        following = iter(drawn)
        results = []
        for row in self.rows:
            result = next(following) if row.is_sampled else RowResult()
            if row.draft:
                places = [result.token_id, *(next(following).token_id for _ in row.draft)]
                result = result._replace(more_token_ids=verified(row.draft, places)[1:])
            results.append(result)
        return results

    def _without_late(self, drawn: list[RowResult]) -> list[RowResult]:
        return [_LATE if i in self.late and not each.is_nan else each for i, each in enumerate(drawn)]

    def _prompt_logprobs(self, found: list[torch.Tensor]) -> list[TokenLogprobs]:
        """Those of all rows' scored tokens, in order."""
        if not found:
            return []
        scored = [(row.sequence, i) for row in self.rows for i in row.scored_positions]
        num_top = [sequence.request.sampling.num_prompt_logprobs or 0 for sequence, _ in scored]
        return _token_logprobs(LogProbabilities(*found), [sequence.token_ids[i] for sequence, i in scored], num_top)


def _token_logprobs(found: LogProbabilities, token_ids: list[int], num_top: list[int]) -> list[TokenLogprobs]:
    rows = zip(token_ids, found.as_lists(num_top), strict=True)
    return [TokenLogprobs(token_id, own, tuple(top)) for token_id, (own, top) in rows]


def _sampled(rows: list[ScheduledRow]) -> list[ScheduledRow]:
    """The row of each place where a token is drawn: one, but for rows with drafts."""
    if _have_drafts(rows):
        return [row for row in rows if row.is_sampled for _ in range(1 + len(row.draft))]
    return [row for row in rows if row.is_sampled]


def _have_drafts(rows: list[ScheduledRow]) -> bool:
    return len(rows) <= MAX_TOKENS_WITH_DRAFTS and any(row.draft for row in rows)


def _sampling_records(sampled: list[ScheduledRow]) -> np.ndarray:
    """_SAMPLING [R]: made once per sequence, and put together here without looking into them."""
    records = b"".join([row.sequence.sampling_record or _make_record(row.sequence) for row in sampled])
    return np.frombuffer(records, _SAMPLING)


def _make_record(sequence: Sequence) -> bytes:
    params = sequence.request.sampling
    record = np.zeros(1, _SAMPLING)
    for name in ("temperature", "top_p", "min_p", "top_k", "choice", "min_tokens", "seed"):
        record[name] = getattr(params, name)
    record["num_prompt_tokens"] = sequence.num_prompt_tokens
    record["has_penalties"] = params.has_penalties
    record["has_bias"] = bool(params.logit_bias)
    record["has_logprobs"] = params.num_logprobs is not None
    record["has_grammar"] = sequence.grammar is not None
    sequence.sampling_record = record.tobytes()
    return sequence.sampling_record


def _are_plainly_greedy(sampling: np.ndarray) -> np.ndarray:
    """Of which rows the token is the argmax of the logits as they are, and nobody asks for more: bool [R]."""
    needs_logits = sampling["has_penalties"] | sampling["has_bias"] | sampling["has_logprobs"] | sampling["has_grammar"]
    return np.asarray(~(needs_logits | (sampling["temperature"] > 0) | (sampling["min_tokens"] > 0)))


def _late_rows(sampled: list[ScheduledRow], sampling: np.ndarray) -> frozenset[int]:
    """The rows of which it is not known in time what their grammars allow. Others wait for that no longer than they do
    not feel, those that have grammars themselves a little longer, and a device that is still at it not at all."""
    if not sampling["has_grammar"].any():
        return frozenset()
    states = {i: state for i, row in enumerate(sampled) if (state := row.sequence.grammar) is not None}
    patience_s = _MASK_PATIENCE_S
    if len(states) == len(sampled):
        wait_for_any(states.values())
        patience_s = _MASKS_PATIENCE_S
    wait(states.values(), patience_s)
    return frozenset(i for i, state in states.items() if not state.is_ready or state.error is not None)


def _sampling_batch(
    sampled: list[ScheduledRow], sampling: np.ndarray, late: frozenset[int], argmax_only: np.ndarray | None
) -> SamplingBatch:
    sequences = [row.sequence for row in sampled]
    position = np.array([row.start + row.num_tokens for row in sampled], dtype=np.int64)
    if _have_drafts(sampled):
        for i in range(len(sampled) - 1, 0, -1):
            if sampled[i - 1] is sampled[i]:  # an earlier place of the same draft
                position[i - 1] = position[i] - 1
    is_early = position - sampling["num_prompt_tokens"] < sampling["min_tokens"]
    allowed = []
    if sampling["has_grammar"].any():
        for row, sequence in enumerate(sequences):
            if (state := sequence.grammar) is not None and row not in late:
                allowed.append((row, state.mask))
                if is_early[row] and state.must_end(sequence.stop_token_ids):
                    is_early[row] = False
    return SamplingBatch(
        temperature=sampling["temperature"],
        top_k=sampling["top_k"],
        top_p=sampling["top_p"],
        min_p=sampling["min_p"],
        seed=sampling["seed"],
        choice=sampling["choice"],
        position=position,
        penalties=[_penalties(row, sequences[row]) for row in np.flatnonzero(sampling["has_penalties"]).tolist()],
        biased=[(row, *sequences[row].biases) for row in np.flatnonzero(sampling["has_bias"]).tolist()],
        masked=[(row, sequences[row].stop_token_ids) for row in np.flatnonzero(is_early).tolist()],
        allowed=allowed,
        argmax_only=argmax_only,
    )


def _penalties(row: int, sequence: Sequence) -> Penalties:
    params = sequence.request.sampling
    return Penalties(
        row,
        np.array(sequence.token_ids, dtype=np.int64),
        sequence.num_prompt_tokens,
        params.repetition_penalty,
        params.presence_penalty,
        params.frequency_penalty,
    )
