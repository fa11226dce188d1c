"""Low-rank adapters: what each adds to the products of the rows that have it.

An adapter leaves a weight W as it is and adds B A to it, of a rank far below its sizes: the rows' x A^T B^T is added to
x W^T. Every adapter of a step is computed for all rows, at a few percent of the step's work, and given to its own: what
a row gets does not depend on which adapters its neighbours have. (The C++ kernel goes by single rows.)
Paper: LoRA (Hu et al., 2021).
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from headrace.kernels.sampling import upload


class LowRank(NamedTuple):
    """What is added to one weight [out, in]: down [rank, in] and up [out, rank], which any scale is part of."""

    down: torch.Tensor
    up: torch.Tensor

    @property
    def rank(self) -> int:
        return self.down.shape[0]


# By the names of Hugging Face's modules: weights that are missing stay as they are.
Adapter = Mapping[str, LowRank]


class AdapterRows(NamedTuple):
    """The rows of a packed batch that have an adapter, counted from 0 on: int64 [n]."""

    adapter: int
    rows: torch.Tensor


def rows_by_adapter(
    adapters: Sequence[int], query_lens: Sequence[int], device: torch.device
) -> tuple[AdapterRows, ...]:
    """Of sequences with so many rows each, numbered as in a StepBatch; none where no sequence has one."""
    if not any(adapters):
        return ()
    of_rows = np.repeat(np.array(adapters), query_lens)
    found = sorted({*adapters} - {0})
    return tuple(AdapterRows(number - 1, upload(np.flatnonzero(of_rows == number), device)) for number in found)


def merge(parts: Sequence[LowRank | None], num_outputs: Sequence[int]) -> LowRank | None:
    """One for weights of so many outputs that are multiplied as one; None where none of them has one."""
    present = [part for part in parts if part is not None]
    if not present:
        return None
    down = torch.cat([part.down for part in present])
    up = down.new_zeros(sum(num_outputs), len(down))
    row = column = 0
    for part, size in zip(parts, num_outputs, strict=True):
        if part is not None:
            up[row : row + size, column : column + part.rank] = part.up
            column += part.rank
        row += size
    return LowRank(down, up)


def add_low_rank(
    y: torch.Tensor, x: torch.Tensor, low_ranks: Sequence[LowRank | None], adapter_rows: Sequence[AdapterRows]
) -> None:
    """Add to y [T, out], a product of x [T, in], in place. `low_ranks` has each adapter's for the product's weight."""
    for adapter, rows in adapter_rows:
        if (low_rank := low_ranks[adapter]) is not None:
            added = (x @ low_rank.down.T) @ low_rank.up.T
            y.index_add_(0, rows, added[rows])
