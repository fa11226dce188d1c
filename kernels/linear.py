"""A matrix product with a fixed weight, laid out once for the device that runs it.

On a CPU the weight is reordered into oneDNN's blocked layout (1.6 times the speed of a plain product at 1 to 8 rows).
The ops for it are private to torch, so they are probed once here, the only place that names them; without them the
plain product serves.
"""

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from headrace.kernels.quantised import QuantisedWeight


def is_reordered(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether weights of this dtype are reordered on this device."""
    return device.type == "cpu" and _can_reorder(dtype)


def pack_linear(
    weights: Sequence[torch.Tensor | QuantisedWeight], bias: torch.Tensor | None, norm_weight: torch.Tensor | None
) -> "PackedLinear":
    """A product with these weights, [out, in] each, as one; norms of its input are applied before it."""
    del norm_weight
    return PackedLinear(as_one(weights), bias)


def as_one(weights: Sequence[torch.Tensor | QuantisedWeight]) -> torch.Tensor:
    """The rows of several weights, none of them quantised; of a single one without a copy."""
    tensors = [weight for weight in weights if isinstance(weight, torch.Tensor)]
    assert len(tensors) == len(weights), "a quantised weight"
    return torch.cat(tensors) if len(tensors) > 1 else tensors[0]


class PackedLinear:
    """x [T, in] -> x @ weight.T + bias [T, out]. The weight, [out, in], is not kept where it was reordered."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._bias = bias
        self._is_reordered = is_reordered(weight.device, weight.dtype)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight) if self._is_reordered else weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._is_reordered:
            return torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")  # type: ignore[no-any-return]
        return F.linear(x, self._weight, self._bias)


@functools.cache
def _can_reorder(dtype: torch.dtype) -> bool:
    """Whether this torch build has oneDNN's prepacked product for `dtype`, found by computing one."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 32, generator=generator).to(dtype)
    x = torch.randn(3, 32, generator=generator).to(dtype)
    try:
        reordered = torch.ops.mkldnn._reorder_linear_weight(weight)
        out = torch.ops.mkldnn._linear_pointwise(x, reordered, None, "none", [], "")
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    return torch.allclose(out.float(), F.linear(x.float(), weight.float()), rtol=0.02, atol=0.1)
