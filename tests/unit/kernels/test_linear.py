"""The packed product is the plain product, and the plain product where torch has no packed one."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from headrace.kernels import linear
from headrace.kernels.linear import PackedLinear

# Sums of 64 products of order one: float32 differs in the order of summing, bfloat16 keeps 8 bits of the result.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


@pytest.fixture(autouse=True)
def probed_anew() -> Iterator[None]:
    linear._can_reorder.cache_clear()
    yield
    linear._can_reorder.cache_clear()


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_out", [1, 48, 130])
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 16, 33])
def test_it_is_a_matrix_product_at_every_width(num_tokens: int, num_out: int, dtype: torch.dtype) -> None:
    weight, x = randn(num_out, 64, seed=1, dtype=dtype), randn(num_tokens, 64, seed=2, dtype=dtype)
    expected = x.double() @ weight.double().T
    product = PackedLinear(weight)(x)
    assert product.dtype == dtype
    torch.testing.assert_close(product.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rows_product_has_the_same_bits_whatever_the_other_rows_hold(dtype: torch.dtype) -> None:
    packed = PackedLinear(randn(96, 64, seed=1, dtype=dtype))
    x = randn(17, 64, seed=2, dtype=dtype)
    other = x.clone()
    other[:5], other[6:] = 1e3, float("nan")
    assert torch.equal(packed(x)[5], packed(other)[5])


def _raise(*_: Any) -> torch.Tensor:
    raise RuntimeError("could not create a primitive")


MKLDNN_BUILDS: dict[str, Callable[[], Any]] = {
    "without the ops": SimpleNamespace,
    "whose ops refuse": lambda: SimpleNamespace(_reorder_linear_weight=_raise, _linear_pointwise=_raise),
    "whose product is wrong": lambda: SimpleNamespace(
        _reorder_linear_weight=lambda weight: weight, _linear_pointwise=lambda x, weight, *_: 2 * F.linear(x, weight)
    ),
}


@pytest.mark.parametrize("build", MKLDNN_BUILDS)
def test_a_torch_build_gets_the_plain_product(build: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops, "mkldnn", MKLDNN_BUILDS[build]())
    weight, x = randn(96, 64, seed=1), randn(3, 64, seed=2)
    assert torch.equal(PackedLinear(weight)(x), F.linear(x, weight))
