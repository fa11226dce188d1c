"""The ops that serve agree with the reference that specifies them."""

import math

import pytest
import torch
import torch.nn.functional as F

from headrace.kernels import linear, reference, torch_ops
from headrace.kernels.linear import PackedLinear
from headrace.kernels.ops import AttentionMetadata, LayerCache

# Relative to outputs of order one: float32 sums differ in order only, bfloat16 keeps 8 bits.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
DTYPES = list(TOLERANCE)


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == expected.dtype == dtype
    torch.testing.assert_close(actual.float(), expected.float(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(dtype: torch.dtype) -> None:
    x, weight = randn(7, 48, seed=1, dtype=dtype) * 3, randn(48, seed=2, dtype=dtype)
    assert_close(torch_ops.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5), dtype)
    heads = x.view(7, 3, 16)
    weight = weight[:16]
    assert_close(torch_ops.rms_norm(heads, weight, 1e-5), reference.rms_norm(heads, weight, 1e-5), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul(dtype: torch.dtype) -> None:
    x = randn(5, 64, seed=1, dtype=dtype)
    assert_close(torch_ops.silu_mul(x), reference.silu_mul(x), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rope(dtype: torch.dtype) -> None:
    x = randn(6, 5, 16, seed=1, dtype=dtype)
    angles = randn(6, 8, seed=2) * 10
    assert_close(torch_ops.rope(x, angles.cos(), angles.sin()), reference.rope(x, angles.cos(), angles.sin()), dtype)


def test_write_kv_puts_each_token_into_its_slot_and_touches_no_other() -> None:
    slots = torch.tensor([13, 2, 31, 7])
    caches = [torch.full((8, 4, 2, 16), -1.0) for _ in range(4)]
    k, v = randn(4, 2, 16, seed=1), randn(4, 2, 16, seed=2)
    torch_ops.write_kv(k, v, LayerCache(*caches[:2]), slots)
    reference.write_kv(k, v, LayerCache(*caches[2:]), slots)
    assert torch.equal(caches[0], caches[2])
    assert torch.equal(caches[1], caches[3])
    assert (caches[0] == -1).sum() == 28 * 2 * 16


def make_batch(
    rows: list[tuple[int, int]], block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, seed: int
) -> tuple[AttentionMetadata, torch.Tensor, torch.Tensor]:
    """Metadata for rows of (query tokens, context) with scattered blocks, and caches filled with noise."""
    generator = torch.Generator().manual_seed(seed)
    num_blocks = sum(math.ceil(context / block_size) for _, context in rows) + 5
    free = torch.randperm(num_blocks, generator=generator).tolist()
    starts, tables = [0], []
    for num_query, context in rows:
        starts.append(starts[-1] + num_query)
        tables.append([free.pop() for _ in range(math.ceil(context / block_size))])
    shape = (num_blocks, block_size, num_kv_heads, head_dim)
    caches = [torch.randn(shape, generator=generator).to(dtype) for _ in range(2)]
    return AttentionMetadata(starts, [context for _, context in rows], tables), caches[0], caches[1]


MIXES = {
    "one token": [(1, 1)],
    "decode": [(1, 5), (1, 16), (1, 17), (1, 100), (1, 33), (1, 32), (1, 31)],
    "prompts": [(7, 7), (16, 16), (33, 33)],
    "chunks": [(5, 21), (16, 64), (1, 64), (3, 65)],
    "all of it": [(1, 40), (9, 9), (1, 1), (17, 50), (1, 48), (1, 47)],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(9, 3), (4, 4), (8, 1)])
@pytest.mark.parametrize("block_size", [1, 16])
@pytest.mark.parametrize("mix", MIXES)
def test_paged_attention(mix: str, block_size: int, heads: tuple[int, int], dtype: torch.dtype) -> None:
    num_heads, num_kv_heads = heads
    metadata, k_cache, v_cache = make_batch(MIXES[mix], block_size, num_kv_heads, 32, dtype, seed=3)
    q = randn(metadata.query_starts[-1], num_heads, 32, seed=4, dtype=dtype)
    outputs = []
    for ops in (torch_ops, reference):
        plan = ops.plan_attention(metadata, block_size, q.device)
        outputs.append(ops.paged_attention(q, LayerCache(k_cache, v_cache), plan, 32**-0.5))
    assert_close(outputs[0], outputs[1], dtype)


def test_what_a_neighbour_contains_never_changes_a_row() -> None:
    rows = MIXES["all of it"]
    metadata, k_cache, v_cache = make_batch(rows, 16, 3, 32, torch.float32, seed=5)
    q = randn(metadata.query_starts[-1], 9, 32, seed=6)
    plan = torch_ops.plan_attention(metadata, 16, q.device)
    before = torch_ops.paged_attention(q, LayerCache(k_cache, v_cache), plan, 0.2)
    for block in metadata.block_tables[0]:
        k_cache[block], v_cache[block] = 1e4, -1e4
    q[0] = 77.0
    after = torch_ops.paged_attention(q, LayerCache(k_cache, v_cache), plan, 0.2)
    assert torch.equal(before[1:], after[1:])
    assert not torch.equal(before[0], after[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 8, 40])
def test_packed_linear_is_a_matrix_product(dtype: torch.dtype, num_tokens: int) -> None:
    weight, x = randn(96, 64, seed=1, dtype=dtype) / 8, randn(num_tokens, 64, seed=2, dtype=dtype)
    assert_close(PackedLinear(weight)(x), F.linear(x.float(), weight.float()).to(dtype), dtype)
    bias = randn(96, seed=3, dtype=dtype)
    expected = F.linear(x.float(), weight.float(), bias.float()).to(dtype)
    assert_close(PackedLinear(weight, bias)(x), expected, dtype)


def test_packed_linear_falls_back_where_the_private_ops_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_can_reorder", lambda dtype: False)
    weight, x = randn(96, 64, seed=1), randn(3, 64, seed=2)
    assert torch.equal(PackedLinear(weight)(x), F.linear(x, weight))
    bias = randn(96, seed=3)
    assert torch.equal(PackedLinear(weight, bias)(x), F.linear(x, weight, bias))
