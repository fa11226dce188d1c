"""Turning the scheduler's rows into one packed batch, running it, and sampling.

Owned by the engine thread. It reads sequences and never changes them: the scheduler records what was computed.
"""

import itertools
import math

import numpy as np
import torch

from headrace.kernels.backend import Backend, StepBatch
from headrace.kernels.sampling import Penalties, SamplingBatch, log_probabilities
from headrace.kernels.step_times import StepTimes
from headrace.scheduler.errors import ModelSourceError
from headrace.scheduler.messages import GenerationRequest, RowResult, SamplingParams, TokenLogprobs
from headrace.scheduler.scheduler import ScheduledRow, SchedulerOutput
from headrace.scheduler.sequence import Sequence

# A row's sampling settings side by side, as they are kept with its sequence.
_SAMPLING = np.dtype(
    [
        *((name, np.float32) for name in ("temperature", "top_p", "min_p")),
        *((name, np.int64) for name in ("top_k", "choice", "min_tokens", "num_prompt_tokens")),
        ("seed", np.uint64),
        *((name, np.bool_) for name in ("has_penalties", "has_bias", "has_logprobs")),
    ]
)


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
    ) -> None:
        self.backend = backend
        self._block_size = block_size
        self._max_num_batched_tokens = max_num_batched_tokens
        self.max_context_tokens = max_context_tokens
        self.vocab_size = vocab_size
        self.description = description

    @property
    def times(self) -> StepTimes | None:
        """The last step's, None where the backend cannot tell."""
        return self.backend.times

    def run(self, output: SchedulerOutput) -> list[RowResult]:
        """Compute the rows of a step."""
        batch = _pack(output.rows)
        sampled = [row.sequence for row in output.rows if row.is_sampled]
        sampling = _sampling_records(sampled)
        if _is_plainly_greedy(sampling) and len(batch.logit_rows) == len(sampled):
            token_ids = iter(self.backend.argmax(batch))
            return [RowResult(next(token_ids)) if row.is_sampled else RowResult() for row in output.rows]
        logits = self.backend.forward(batch)
        prompts = iter(_prompt_logprobs(logits[len(sampled) :], output.rows))
        drawn = iter(self._draw(logits[: len(sampled)], sampled, sampling))
        results = []
        for row in output.rows:
            result = next(drawn) if row.is_sampled else RowResult()
            if row.scored_positions:
                scored = tuple(itertools.islice(prompts, len(row.scored_positions)))
                result = result._replace(prompt_logprobs=scored)
            results.append(result)
        return results

    def use_idle_time(self) -> bool:
        return self.backend.use_idle_time()

    def warm_up(self) -> None:
        """Run a full prompt chunk, then a decode step, so that the first request pays for no first use.

        Raises: ModelSourceError where what comes out is not a number.
        """
        num_tokens = min(self._max_num_batched_tokens, self.max_context_tokens - 1)
        sampling = SamplingParams(temperature=1.0, top_p=0.9, num_logprobs=0)
        request = GenerationRequest(-1, (0,) * num_tokens, sampling, 0.0)
        sequence = Sequence(request)
        # The blocks are nobody's yet, and what is written there is overwritten before it can be seen.
        sequence.block_ids = list(range(-(-(num_tokens + 1) // self._block_size)))
        [result] = self.run(SchedulerOutput([ScheduledRow(sequence, num_tokens)], []))
        if result.logprobs is None or math.isnan(result.logprobs.logprob or 0.0):
            raise ModelSourceError("the model computes no numbers: its weights are damaged, or exceed this dtype")
        sequence.num_computed_tokens = num_tokens
        sequence.token_ids.append(0)
        self.run(SchedulerOutput([ScheduledRow(sequence, 1)], []))

    def _draw(self, logits: torch.Tensor, sequences: list[Sequence], sampling: np.ndarray) -> list[RowResult]:
        """The next token of each sequence, and its log probability where asked. logits float32 [R, V], written to."""
        observed = np.flatnonzero(sampling["has_logprobs"]).tolist()
        unmodified = logits[observed] if observed else None
        token_ids = self.backend.sample(logits, _sampling_batch(sequences, sampling))
        logprobs: dict[int, TokenLogprobs] = {}
        if unmodified is not None:
            num_top = [sequences[i].request.sampling.num_logprobs or 0 for i in observed]
            found = _token_logprobs(unmodified, [token_ids[i] for i in observed], num_top)
            logprobs = dict(zip(observed, found, strict=True))
        return [RowResult(token_id, logprobs.get(i)) for i, token_id in enumerate(token_ids)]


def _pack(rows: list[ScheduledRow]) -> StepBatch:
    token_ids: list[int] = []
    query_lens: list[int] = []
    context_lens: list[int] = []
    sampled_rows: list[int] = []
    scored_rows: list[int] = []
    for row in rows:
        sequence = row.sequence
        start = sequence.num_computed_tokens
        end = start + row.num_tokens
        # A token's log probability comes from the row of the one before it.
        scored_rows += [len(token_ids) + i - 1 - start for i in row.scored_positions]
        token_ids += sequence.token_ids[start:end]
        query_lens.append(row.num_tokens)
        context_lens.append(end)
        if row.is_sampled:
            sampled_rows.append(len(token_ids) - 1)
    block_tables = [row.sequence.block_ids for row in rows]
    return StepBatch(token_ids, query_lens, context_lens, block_tables, sampled_rows + scored_rows)


def _prompt_logprobs(logits: torch.Tensor, rows: list[ScheduledRow]) -> list[TokenLogprobs]:
    """The log probabilities of the rows' scored tokens, in order. logits float32 [scored, V]."""
    if not len(logits):
        return []
    scored = [(row.sequence, i) for row in rows for i in row.scored_positions]
    num_top = [sequence.request.sampling.num_prompt_logprobs or 0 for sequence, _ in scored]
    return _token_logprobs(logits, [sequence.token_ids[i] for sequence, i in scored], num_top)


def _token_logprobs(logits: torch.Tensor, token_ids: list[int], num_top: list[int]) -> list[TokenLogprobs]:
    found = log_probabilities(logits, token_ids, num_top)
    return [TokenLogprobs(id, own, tuple(top)) for id, (own, top) in zip(token_ids, found, strict=True)]


def _sampling_records(sequences: list[Sequence]) -> np.ndarray:
    """_SAMPLING [R]: made once per sequence, and put together here without looking into them."""
    records = b"".join([sequence.sampling_record or _make_record(sequence) for sequence in sequences])
    return np.frombuffer(records, _SAMPLING)


def _make_record(sequence: Sequence) -> bytes:
    params = sequence.request.sampling
    record = np.zeros(1, _SAMPLING)
    for name in ("temperature", "top_p", "min_p", "top_k", "choice", "min_tokens", "seed"):
        record[name] = getattr(params, name)
    record["num_prompt_tokens"] = sequence.num_prompt_tokens
    record["has_penalties"] = params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty
    record["has_bias"] = bool(params.logit_bias)
    record["has_logprobs"] = params.num_logprobs is not None
    sequence.sampling_record = record.tobytes()
    return sequence.sampling_record


def _is_plainly_greedy(sampling: np.ndarray) -> bool:
    """Whether each row's token is the argmax of the logits as they are, and nobody asks for more."""
    needs_logits = sampling["has_penalties"] | sampling["has_bias"] | sampling["has_logprobs"]
    return not (needs_logits | (sampling["temperature"] > 0) | (sampling["min_tokens"] > 0)).any()


def _sampling_batch(sequences: list[Sequence], sampling: np.ndarray) -> SamplingBatch:
    position = np.array([len(sequence.token_ids) for sequence in sequences], dtype=np.int64)
    is_early = position - sampling["num_prompt_tokens"] < sampling["min_tokens"]
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
