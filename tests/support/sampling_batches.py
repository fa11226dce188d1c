"""Rows of sampling settings and of logits, for the tests of the samplers."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from headrace.kernels.sampling import SamplingBatch

# (temperature, top_k, top_p, min_p)
Setting = tuple[float, int, float, float]


def make_batch(
    rows: Sequence[Setting], seeds: Sequence[int], positions: Sequence[int], choices: Sequence[int], **lists: Any
) -> SamplingBatch:
    temperature, top_k, top_p, min_p = zip(*rows, strict=True)
    return SamplingBatch(
        np.array(temperature, np.float32),
        np.array(top_k, np.int64),
        np.array(top_p, np.float32),
        np.array(min_p, np.float32),
        np.array(seeds, np.uint64),
        np.array(choices, np.int64),
        np.array(positions, np.int64),
        **lists,
    )


def random_logits(num_rows: int, vocab_size: int, seed: int, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * spread
