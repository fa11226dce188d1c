"""Picking the next token of every row of a batch, with a seed per row, and the log probabilities around it.

Order: repetition, frequency and presence penalty, logit bias, masks (all of which count for greedy rows too), then
temperature, top-k, top-p, min-p (on the probabilities after temperature, relative to the largest). A row's randomness
is one uniform number made from its seed, choice and position alone (SplitMix64, Steele et al., OOPSLA 2014), used to
invert the cumulative distribution, so neither its neighbours nor the batch's order can change what it draws.
Papers: repetition penalty, CTRL (Keskar et al., 2019); top-p, Holtzman et al., 2020; min-p, Nguyen et al., 2024.
Frequency and presence penalty as OpenAI's API reference defines them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

# How many of the likeliest tokens are looked at first; rows whose top-p mass reaches further look at eight times more.
_NUM_CANDIDATES = 256
# The most likely tokens that `log_probabilities` looks for.
MAX_TOP_LOGPROBS = 20


@dataclass(frozen=True, slots=True)
class Penalties:
    """The penalties of one row: `repetition` on all its `token_ids` (int64 [n]), the others on those from
    `num_prompt_tokens` on."""

    row: int
    token_ids: np.ndarray
    num_prompt_tokens: int
    repetition: float
    presence: float
    frequency: float


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """The settings of R rows, each an array [R]: temperature, top_p, min_p float32; top_k int64; seed uint64, choice
    int64 and position int64 (the index of the token to be drawn). `biased` lists (row, token ids int64 [n], what is
    added to their logits float32 [n]), `masked` (row, token ids that must not be drawn); no row has an id twice.
    `allowed` lists (row, the tokens that alone may be drawn as bits, uint32 [ceil(V / 32)]: i % 32 of word i // 32).
    `argmax_only` tells (bool [R], None where none is) which rows get the likeliest token and nothing else is asked of:
    the backend that made their logits knows it, and may have left these out.
    """

    temperature: np.ndarray
    top_k: np.ndarray
    top_p: np.ndarray
    min_p: np.ndarray
    seed: np.ndarray
    choice: np.ndarray
    position: np.ndarray
    penalties: list[Penalties] = field(default_factory=list)
    biased: list[tuple[int, np.ndarray, np.ndarray]] = field(default_factory=list)
    masked: list[tuple[int, np.ndarray]] = field(default_factory=list)
    allowed: list[tuple[int, np.ndarray]] = field(default_factory=list)
    argmax_only: np.ndarray | None = None


class LogProbabilities(NamedTuple):
    """Of R rows the log probability of its token, float32 [R], and the K likeliest tokens, best first: their log
    probabilities, float32 [R, K], and ids, int64 [R, K]. NaN where a logit of the row is NaN or +inf."""

    own: torch.Tensor
    top: torch.Tensor
    top_ids: torch.Tensor

    def as_lists(self, num_top: list[int]) -> list[tuple[float, list[tuple[int, float]]]]:
        """Per row its token's log probability and the `num_top` likeliest tokens as (token id, log probability)."""
        top = zip(self.top.tolist(), self.top_ids.tolist(), num_top, strict=True)
        pairs = [list(zip(ids[:num], logprobs[:num], strict=True)) for logprobs, ids, num in top]
        return list(zip(self.own.tolist(), pairs, strict=True))


@torch.inference_mode()
def sample(logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """Draw one token id per row of logits, float32 [R, V], which are written to where a setting changes them: int64
    [R]. As with `argmax` it is -1 where the logits, as they come, are no numbers."""
    is_nan = argmax(logits) < 0  # before a mask can hide it
    modify_logits(logits, batch)
    token_ids = logits.argmax(dim=-1)
    random_rows = np.flatnonzero(batch.temperature > 0)
    if len(random_rows):
        index = upload(random_rows, logits.device)

        def pick(values: np.ndarray) -> torch.Tensor:
            return upload(values[random_rows], logits.device)

        token_ids[index] = _draw(
            logits[index],
            pick(batch.temperature),
            pick(batch.top_k),
            pick(batch.top_p),
            pick(batch.min_p),
            pick(uniforms(batch.seed, batch.choice, batch.position)),
        )
    return token_ids.masked_fill_(is_nan, -1)


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """The likeliest token of each row of logits [R, V], the lowest of equal ones, -1 where one is NaN or +inf: int64
    [R]."""
    largest, token_ids = logits.max(dim=-1)
    return token_ids.masked_fill_(~(largest < float("inf")), -1)


def modify_logits(logits: torch.Tensor, batch: SamplingBatch) -> None:
    """Apply penalties, biases and masks to logits, float32 [R, V], in place."""
    for penalties in batch.penalties:
        _penalise(logits[penalties.row], penalties)
    if batch.biased:
        rows, token_lists, biases = zip(*batch.biased, strict=True)
        logits[_places(logits, rows, token_lists)] += upload(np.concatenate(biases), logits.device)
    if batch.masked:
        rows, token_lists = zip(*batch.masked, strict=True)
        logits[_places(logits, rows, token_lists)] = float("-inf")
    if batch.allowed:
        row_list, masks = zip(*batch.allowed, strict=True)
        index = upload(np.array(row_list, np.int64), logits.device)
        words = upload(np.stack(masks).view(np.int32), logits.device)
        logits[index] = logits[index].masked_fill_(~_bits(words, logits.shape[-1]), float("-inf"))


def uniforms(seed: np.ndarray, choice: np.ndarray, position: np.ndarray) -> np.ndarray:
    """One number in [0, 1) per row from its seed, choice and position: float64 [R]."""
    mixed = _splitmix64(seed.astype(np.uint64)) ^ choice.astype(np.uint64)
    mixed = _splitmix64(_splitmix64(mixed) ^ position.astype(np.uint64))
    return np.asarray((mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53)


@torch.inference_mode()
def log_probabilities(logits: torch.Tensor, token_ids: torch.Tensor) -> LogProbabilities:
    """Of each row of logits, float32 [R, V]: its token's, int64 [R], and the MAX_TOP_LOGPROBS likeliest ones'; all on
    the logits' device."""
    total = logits.logsumexp(dim=-1, keepdim=True)
    own = (logits.gather(1, token_ids[:, None]) - total).flatten()
    # The same number for all rows: `topk` orders ties differently for another one.
    values, top_ids = logits.topk(min(MAX_TOP_LOGPROBS, logits.shape[-1]), dim=-1)
    top = values - total
    return LogProbabilities(own + 0 * top[:, 0], top, top_ids)  # finite minus +inf is -inf, which is a number


def upload(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """The values on the device, where their copy may still be on its way; on a CPU, the same memory."""
    tensor = torch.from_numpy(values)
    # From memory that is not pinned a copy may wait for all that the device has still to do.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _places(
    logits: torch.Tensor, rows: Sequence[int], token_ids: Sequence[np.ndarray]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The index of so many tokens in each of these rows."""
    row_of_each = np.repeat(np.array(rows, dtype=np.int64), [len(ids) for ids in token_ids])
    pair = upload(np.stack((row_of_each, np.concatenate(token_ids))), logits.device)
    return pair[0], pair[1]


def _bits(words: torch.Tensor, num_bits: int) -> torch.Tensor:
    """Each row's bits, the lowest first: int32 [R, W] -> bool [R, num_bits]."""
    shifts = torch.arange(32, dtype=torch.int32, device=words.device)
    return ((words[:, :, None] >> shifts) & 1).bool().flatten(1)[:, :num_bits]


def _penalise(logits: torch.Tensor, penalties: Penalties) -> None:
    """Change one row, [V], in place."""
    # Writing the same value twice is harmless, so a token that occurs often needs no care but where occurrences count.
    token_ids = upload(penalties.token_ids, logits.device)
    output_ids = token_ids[penalties.num_prompt_tokens :]
    if penalties.repetition != 1:
        score = logits[token_ids]
        logits[token_ids] = torch.where(score < 0, score * penalties.repetition, score / penalties.repetition)
    if penalties.presence:
        logits[output_ids] = logits[output_ids] - penalties.presence
    if penalties.frequency:
        logits.index_add_(0, output_ids, torch.full_like(output_ids, -penalties.frequency, dtype=logits.dtype))


def _splitmix64(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(x ^ (x >> np.uint64(31)))


def _draw(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    uniform: torch.Tensor,
) -> torch.Tensor:
    probs = torch.softmax(logits / temperature[:, None], dim=-1)
    vocab_size = probs.shape[-1]
    is_filtered = (top_k > 0) | (top_p < 1) | (min_p > 0)
    token_ids = torch.empty(len(probs), dtype=torch.int64, device=probs.device)
    plain = (~is_filtered).nonzero().flatten()
    if len(plain):
        token_ids[plain] = _invert(probs[plain], uniform[plain])
    remaining = is_filtered.nonzero().flatten()
    num_candidates = min(vocab_size, _NUM_CANDIDATES)
    while len(remaining):
        # How many candidates a row looks at must be its own doing: `topk` orders ties differently for another number.
        tried = remaining[(top_k[remaining] <= num_candidates) | (num_candidates == vocab_size)]
        top, index = probs[tried].topk(num_candidates, dim=-1)
        is_kept, is_enough = _keep(top, top_k[tried], top_p[tried], min_p[tried])
        done = is_enough if num_candidates < vocab_size else torch.ones_like(is_enough)
        drawn = _invert(torch.where(is_kept, top, 0.0)[done], uniform[tried[done]])
        token_ids[tried[done]] = index[done].gather(1, drawn[:, None]).flatten()
        remaining = remaining[~torch.isin(remaining, tried[done])]
        num_candidates = min(vocab_size, 8 * num_candidates)
    return token_ids


def _keep(
    top: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which candidates (probabilities, descending, [R, C]) a row's filters keep, and whether none beyond them counts.

    As each filter works on what the one before left, top-p's mass is a share of the top-k's.
    """
    num_candidates = top.shape[-1]
    rank = torch.arange(num_candidates, device=top.device)
    has_top_k = top_k > 0
    in_top_k = ~has_top_k[:, None] | (rank < top_k[:, None])
    mass = torch.where(in_top_k, top, 0.0)
    total = torch.where(has_top_k, mass.double().sum(-1), 1.0)
    before = mass.double().cumsum(-1) - mass
    in_top_p = (before < top_p[:, None] * total[:, None]) | (rank == 0)
    in_min_p = top >= min_p[:, None] * top[:, :1]
    is_kept = in_top_k & in_top_p & in_min_p
    # Candidates are descending, so a filter that cut one inside the list has cut all beyond it.
    return is_kept, ~is_kept[:, -1]


def _invert(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The first index whose cumulative weight exceeds uniform * total: weights [R, C] -> int64 [R]."""
    cumulative = weights.double().cumsum(-1)
    target = uniform[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).clamp_(max=weights.shape[-1] - 1).flatten()
