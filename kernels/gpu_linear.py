"""Matrix products with a fixed weight on an NVIDIA GPU: ours for few rows, cuBLAS's for many.

Few rows are bound by reading the weights, which is where fusing and weights of fewer bits pay; many by arithmetic. The
weight of a norm before a product is multiplied into the product's own, so that all that is left of the norm is a factor
per row: an activation is rounded once less, a weight once more.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from headrace.kernels.linear import as_one
from headrace.kernels.ops import Hidden
from headrace.kernels.quantised import QuantisedWeight
from headrace.kernels.triton_activations import silu_mul
from headrace.kernels.triton_linear import (
    MAX_ROWS,
    Fp8Weight,
    Weight,
    dequantise,
    linear,
    num_tiles,
    pack_gguf,
    quantise_fp8,
    quantise_rows,
    rms_norm,
    sum_squares,
)


def gpu_linear(
    weights: Sequence[torch.Tensor | QuantisedWeight],
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    *,
    is_fp8: bool = False,
    dtype: torch.dtype,
    device: torch.device,
) -> "GpuLinear":
    """A product with these weights, [out, in] each, as one. Those of a GGUF stay quantised, the others become so."""
    if len({weight.type_name if isinstance(weight, QuantisedWeight) else "" for weight in weights}) > 1:
        weights = [dense(weight, dtype, device) for weight in weights]
    quantised = [weight for weight in weights if isinstance(weight, QuantisedWeight)]
    if quantised:
        rows = np.concatenate([weight.rows for weight in quantised])
        packed = pack_gguf(QuantisedWeight(quantised[0].type_name, rows), device)
        return GpuLinear(packed, bias, norm_weight)
    weight = as_one(weights)
    folded = weight if norm_weight is None else weight * norm_weight
    return GpuLinear(quantise_fp8(folded) if is_fp8 else folded, bias)


def dense(weight: torch.Tensor | QuantisedWeight, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The weight as numbers."""
    return weight if isinstance(weight, torch.Tensor) else dequantise(pack_gguf(weight, device), dtype)


class GpuLinear:
    """x [T, in] -> x @ weight.T + bias [T, out]; also of a norm, through the gate, or added to the residual stream.

    `norm_weight` is that of the norm if it is not in the weight.
    """

    def __init__(
        self, weight: Weight, bias: torch.Tensor | None = None, norm_weight: torch.Tensor | None = None
    ) -> None:
        self._weight = weight
        self._bias = bias
        self._norm_weight = norm_weight

    @property
    def num_bytes(self) -> int:
        """What a product reads of weights."""
        parts = [self._weight] if isinstance(self._weight, torch.Tensor) else [self._weight.values, self._weight.scales]
        return sum(part.numel() * part.element_size() for part in parts)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self._weight, bias=self._bias) if len(x) <= MAX_ROWS else self._wide(x)

    def of_norm(self, hidden: Hidden, eps: float, *, is_gated: bool = False) -> torch.Tensor:
        is_wide = len(hidden.values) > MAX_ROWS
        if not is_wide and self._norm_weight is None:
            squares = sum_squares(hidden.values) if hidden.squares is None else hidden.squares
            return linear(hidden.values, self._weight, bias=self._bias, row_squares=squares, eps=eps, is_gated=is_gated)
        x = rms_norm(hidden.values, self._norm_weight, eps)
        if not is_wide:
            return linear(x, self._weight, bias=self._bias, is_gated=is_gated)
        return silu_mul(self._wide(x)) if is_gated else self._wide(x)

    def added_to(self, x: torch.Tensor, hidden: Hidden) -> Hidden:
        if len(x) <= MAX_ROWS:
            size = (num_tiles(len(x), self._weight), len(x))
            squares = torch.empty(size, dtype=torch.float32, device=x.device)
            values = linear(x, self._weight, bias=self._bias, residual=hidden.values, out_squares=squares)
            return Hidden(values, squares)
        if self._bias is None and isinstance(self._weight, torch.Tensor):
            return Hidden(torch.addmm(hidden.values, x, self._weight.T))
        return Hidden(hidden.values + self._wide(x))

    def _wide(self, x: torch.Tensor) -> torch.Tensor:
        can_scale = x.is_cuda and all(size % 16 == 0 for size in self._weight.shape)
        if isinstance(self._weight, Fp8Weight) and can_scale:
            # The rows are rounded to 8 bits as well, each with a scale of its own (dynamic quantisation).
            rows = quantise_rows(x)
            out = torch._scaled_mm(
                rows.values,
                self._weight.values.T,
                scale_a=rows.scales[:, None],
                scale_b=self._weight.scales[None, :],
                out_dtype=x.dtype,
            )
            return out if self._bias is None else out + self._bias
        return F.linear(x, dequantise(self._weight, x.dtype), self._bias)
