"""Picking the next token of every row of a batch: greedy, temperature, top-k, top-p, min-p, with a seed per row.

Order: temperature, top-k, top-p, min-p (on the probabilities after temperature, relative to the largest). A row's
randomness is one uniform number made from its seed and position alone (SplitMix64, Steele et al., OOPSLA 2014), used
to invert the cumulative distribution, so neither its neighbours nor the batch's order can change what it draws.
Papers: top-p, Holtzman et al., 2020; min-p, Nguyen et al., 2024.
"""

from dataclasses import dataclass

import numpy as np
import torch

# How many of the likeliest tokens are looked at first; rows whose top-p mass reaches further look at eight times more.
_NUM_CANDIDATES = 256


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """The settings of R rows, each an array [R]: temperature, top_p, min_p float32; top_k int64; seed uint64,
    position int64 (the index of the token to be drawn). `masked` lists (row, token id) pairs that must not be drawn.
    """

    temperature: np.ndarray
    top_k: np.ndarray
    top_p: np.ndarray
    min_p: np.ndarray
    seed: np.ndarray
    position: np.ndarray
    masked: list[tuple[int, int]]


@torch.inference_mode()
def sample(logits: torch.Tensor, batch: SamplingBatch) -> list[int]:
    """Draw one token id per row of logits, float32 [R, V], which are written to where tokens are masked."""
    if batch.masked:
        rows, tokens = zip(*batch.masked, strict=True)
        logits[list(rows), list(tokens)] = float("-inf")
    token_ids = logits.argmax(dim=-1)
    random_rows = np.flatnonzero(batch.temperature > 0)
    if len(random_rows):
        index = torch.from_numpy(random_rows).to(logits.device)

        def pick(values: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(values[random_rows]).to(logits.device)

        token_ids[index] = _draw(
            logits[index],
            pick(batch.temperature),
            pick(batch.top_k),
            pick(batch.top_p),
            pick(batch.min_p),
            pick(uniforms(batch.seed, batch.position)),
        )
    return token_ids.tolist()


def uniforms(seed: np.ndarray, position: np.ndarray) -> np.ndarray:
    """One number in [0, 1) per row from its seed and position: float64 [R]."""
    mixed = _splitmix64(_splitmix64(seed.astype(np.uint64)) ^ position.astype(np.uint64))
    return np.asarray((mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53)


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
