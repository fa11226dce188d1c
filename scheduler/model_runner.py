"""Turning the scheduler's rows into one packed batch, running the decoder, and sampling.

Owned by the engine thread. It reads sequences and never changes them: the scheduler records what was computed.
"""

import itertools
import math
from dataclasses import replace

import numpy as np
import torch

from headrace.kernels.decoder import Decoder, KVCache, PackedBatch
from headrace.kernels.hf_decoder import HuggingFaceDecoder
from headrace.kernels.ops import AttentionMetadata, Ops
from headrace.kernels.sampling import Penalties, SamplingBatch, log_probabilities, sample
from headrace.scheduler.errors import ModelSourceError
from headrace.scheduler.messages import GenerationRequest, RowResult, SamplingParams, TokenLogprobs
from headrace.scheduler.scheduler import ScheduledRow, SchedulerOutput
from headrace.scheduler.sequence import Sequence


class ModelRunner:
    """Computes steps with a decoder and the KV cache it fills."""

    def __init__(
        self,
        decoder: Decoder | HuggingFaceDecoder,
        cache: KVCache,
        ops: Ops,
        block_size: int,
        max_context_tokens: int,
        max_num_batched_tokens: int,
        description: str,
    ) -> None:
        self._decoder = decoder
        self._cache = cache
        self._ops = ops
        self._block_size = block_size
        self._max_num_batched_tokens = max_num_batched_tokens
        self.max_context_tokens = max_context_tokens
        self.vocab_size = decoder.shape.vocab_size
        self.description = description

    def run(self, output: SchedulerOutput) -> list[RowResult]:
        """Compute the rows of a step."""
        sampled = [row.sequence for row in output.rows if row.is_sampled]
        logits = self._decoder.forward(self._pack(output.rows), self._cache)
        prompts = iter(_prompt_logprobs(logits[len(sampled) :], output.rows))
        drawn = iter(_draw(logits[: len(sampled)], sampled))
        results = []
        for row in output.rows:
            result = next(drawn) if row.is_sampled else RowResult()
            if row.scored_positions:
                scored = tuple(itertools.islice(prompts, len(row.scored_positions)))
                result = replace(result, prompt_logprobs=scored)
            results.append(result)
        return results

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

    def _pack(self, rows: list[ScheduledRow]) -> PackedBatch:
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        sampled_rows: list[int] = []
        scored_rows: list[int] = []
        new_blocks: list[int] = []
        query_starts = [0]
        context_lens: list[int] = []
        block_size = self._block_size
        for row in rows:
            sequence = row.sequence
            start = sequence.num_computed_tokens
            end = start + row.num_tokens
            token_ids += sequence.token_ids[start:end]
            positions += range(start, end)
            blocks = sequence.block_ids
            slots += [blocks[i // block_size] * block_size + i % block_size for i in range(start, end)]
            new_blocks += [blocks[i // block_size] for i in range(start, end) if i % block_size == 0]
            # A token's log probability comes from the row of the one before it.
            scored_rows += [query_starts[-1] + i - 1 - start for i in row.scored_positions]
            query_starts.append(len(token_ids))
            context_lens.append(end)
            if row.is_sampled:
                sampled_rows.append(len(token_ids) - 1)
        metadata = AttentionMetadata(query_starts, context_lens, [row.sequence.block_ids for row in rows])
        device = self._decoder.device

        def tensor(values: list[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        self._cache.clear(tensor(new_blocks))
        return PackedBatch(
            token_ids=tensor(token_ids),
            positions=tensor(positions),
            slot_mapping=tensor(slots),
            logit_rows=tensor(sampled_rows + scored_rows),
            attention_plan=self._ops.plan_attention(metadata, block_size, device),
        )


def _draw(logits: torch.Tensor, sequences: list[Sequence]) -> list[RowResult]:
    """The next token of each sequence, and its log probability where asked. logits float32 [R, V], written to."""
    observed = [i for i, sequence in enumerate(sequences) if sequence.request.sampling.num_logprobs is not None]
    unmodified = logits[observed] if observed else None
    token_ids = sample(logits, _sampling_batch(sequences))
    logprobs: dict[int, TokenLogprobs] = {}
    if unmodified is not None:
        num_top = [sequences[i].request.sampling.num_logprobs or 0 for i in observed]
        found = _token_logprobs(unmodified, [token_ids[i] for i in observed], num_top)
        logprobs = dict(zip(observed, found, strict=True))
    return [RowResult(token_id, logprobs.get(i)) for i, token_id in enumerate(token_ids)]


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


def _sampling_batch(sequences: list[Sequence]) -> SamplingBatch:
    params = [sequence.request.sampling for sequence in sequences]
    masked = [
        (row, sequence.stop_token_ids)
        for row, sequence in enumerate(sequences)
        if sequence.num_output_tokens < params[row].min_tokens
    ]
    return SamplingBatch(
        temperature=np.array([p.temperature for p in params], dtype=np.float32),
        top_k=np.array([p.top_k for p in params], dtype=np.int64),
        top_p=np.array([p.top_p for p in params], dtype=np.float32),
        min_p=np.array([p.min_p for p in params], dtype=np.float32),
        seed=np.array([p.seed for p in params], dtype=np.uint64),
        choice=np.array([p.choice for p in params], dtype=np.int64),
        position=np.array([len(sequence.token_ids) for sequence in sequences], dtype=np.int64),
        penalties=[
            Penalties(
                row,
                np.array(sequence.token_ids, dtype=np.int64),
                sequence.num_prompt_tokens,
                p.repetition_penalty,
                p.presence_penalty,
                p.frequency_penalty,
            )
            for row, (p, sequence) in enumerate(zip(params, sequences, strict=True))
            if p.repetition_penalty != 1 or p.presence_penalty or p.frequency_penalty
        ],
        biased=[(row, *sequences[row].biases) for row, p in enumerate(params) if p.logit_bias],
        masked=masked,
    )
