"""The ops over random batches: any grouping of heads, any mixture of rows, any edge of a block.

Tolerances are relative to outputs of order one: float32 sums differ in order only, bfloat16 keeps 8 bits.
"""

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings, strategies as st

from headrace.kernels import reference, torch_ops
from headrace.kernels.ops import AttentionMetadata, LayerCache, Ops

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}


class Batch:
    """Rows of (query tokens, context) over scattered blocks; every slot beyond a context holds `filler`."""

    def __init__(
        self,
        rows: list[tuple[int, int]],
        *,
        block_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int = 16,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        filler: float = 1e4,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        num_blocks = sum(math.ceil(context / block_size) for _, context in rows) + 3
        free = torch.randperm(num_blocks, generator=generator).tolist()
        starts, tables = [0], []
        for num_query, context in rows:
            starts.append(starts[-1] + num_query)
            tables.append([free.pop() for _ in range(math.ceil(context / block_size))])
        self.block_size, self.scale = block_size, head_dim**-0.5
        self.metadata = AttentionMetadata(starts, [context for _, context in rows], tables)
        shape = (num_blocks, block_size, num_kv_heads, head_dim)
        self.keys, self.values = torch.full(shape, filler, dtype=dtype), torch.full(shape, filler, dtype=dtype)
        for cache in (self.keys, self.values):
            slots = list(self.slots())
            noise = torch.randn(len(slots), num_kv_heads, head_dim, generator=generator)
            cache.flatten(0, 1)[slots] = noise.to(dtype)
        self.q = torch.randn(starts[-1], num_heads, head_dim, generator=generator).to(dtype)

    def slots(self, sequence: int | None = None) -> Iterator[int]:
        """Where the tokens of one sequence, or of all, lie in the cache."""
        tables = self.metadata.block_tables
        for b in range(len(tables)) if sequence is None else [sequence]:
            for position in range(self.metadata.context_lens[b]):
                yield tables[b][position // self.block_size] * self.block_size + position % self.block_size

    def attend(self, ops: Ops, window: int | None = None, softcap: float | None = None) -> torch.Tensor:
        plan = ops.plan_attention(self.metadata, self.block_size, self.q.device)
        return ops.paged_attention(self.q, LayerCache(self.keys, self.values), plan, self.scale, window, softcap)


def by_definition(batch: Batch, window: int | None = None, softcap: float | None = None) -> torch.Tensor:
    """softmax(q k / sqrt(D)) v over the last `window` tokens in float64, one query head and token at a time."""
    out = torch.empty_like(batch.q, dtype=torch.float64)
    q, keys, values = batch.q.double(), batch.keys.flatten(0, 1).double(), batch.values.flatten(0, 1).double()
    heads_per_kv = q.shape[1] // keys.shape[1]
    for b, context in enumerate(batch.metadata.context_lens):
        slots = list(batch.slots(b))
        start, end = batch.metadata.query_starts[b], batch.metadata.query_starts[b + 1]
        for token in range(start, end):
            visible = slots[: context - (end - 1 - token)]
            visible = visible if window is None else visible[-window:]
            for head in range(q.shape[1]):
                own_keys, own_values = keys[visible, head // heads_per_kv], values[visible, head // heads_per_kv]
                scores = own_keys @ q[token, head] * batch.scale
                if softcap is not None:
                    scores = (scores / softcap).tanh() * softcap
                out[token, head] = scores.softmax(0) @ own_values
    return out


ROWS = st.tuples(st.sampled_from([1, 1, 1, 2, 5, 17]), st.integers(0, 40)).map(lambda row: (row[0], sum(row)))


@settings(max_examples=80, derandomize=True, deadline=None)
@given(
    rows=st.lists(ROWS, min_size=1, max_size=6),
    block_size=st.sampled_from([1, 3, 8, 16]),
    num_kv_heads=st.sampled_from([1, 2, 3]),
    heads_per_kv=st.integers(1, 4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    window=st.none() | st.integers(1, 60),
    softcap=st.none() | st.floats(0.5, 20.0),
    seed=st.integers(0, 1000),
)
def test_every_path_agrees_with_the_definition(
    rows: list[tuple[int, int]],
    block_size: int,
    num_kv_heads: int,
    heads_per_kv: int,
    dtype: torch.dtype,
    window: int | None,
    softcap: float | None,
    seed: int,
) -> None:
    batch = Batch(
        rows,
        block_size=block_size,
        num_heads=num_kv_heads * heads_per_kv,
        num_kv_heads=num_kv_heads,
        dtype=dtype,
        seed=seed,
    )
    expected = by_definition(batch, window, softcap)
    for ops in (torch_ops, reference):
        attended = batch.attend(ops, window, softcap)
        assert attended.dtype == dtype
        torch.testing.assert_close(attended.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("num_query", [1, 4])
@pytest.mark.parametrize("block_size", [4, 16])
@pytest.mark.parametrize("num_blocks", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("excess", [-1, 0, 1])
def test_contexts_at_the_edge_of_a_block(excess: int, num_blocks: int, block_size: int, num_query: int) -> None:
    context = num_blocks * block_size + excess
    num_query = min(num_query, context)
    # A short and a long neighbour of the same shape stretch the padding.
    rows = [(num_query, context), (num_query, num_query), (num_query, 2 * context)]
    batch = Batch(rows, block_size=block_size, num_heads=4, num_kv_heads=2)
    torch.testing.assert_close(batch.attend(torch_ops).double(), by_definition(batch), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_whatever_its_neighbours_hold(dtype: torch.dtype) -> None:
    rows = [(1, 40), (9, 9), (1, 45), (17, 50), (1, 48), (1, 33)]
    for target in range(len(rows)):
        batch = Batch(rows, block_size=8, num_heads=6, num_kv_heads=3, dtype=dtype)
        before = batch.attend(torch_ops)
        span = slice(batch.metadata.query_starts[target], batch.metadata.query_starts[target + 1])
        own = list(batch.slots(target))
        for cache in (batch.keys, batch.values):
            kept = cache.flatten(0, 1)[own]
            cache.fill_(-3e3)
            cache.flatten(0, 1)[own] = kept
        kept = batch.q[span]
        batch.q = torch.full_like(batch.q, 77.0)
        batch.q[span] = kept
        after = batch.attend(torch_ops)
        assert torch.equal(before[span], after[span])
        assert not torch.equal(before, after)


@pytest.mark.parametrize("window", [1, 7, 8, 9, 15, 16, 17, 39, 40, 41])
def test_windows_at_the_edge_of_a_block_and_of_a_context(window: int) -> None:
    rows = [(1, 40), (9, 9), (1, 41), (17, 50), (1, 48), (1, 8), (40, 40)]
    batch = Batch(rows, block_size=8, num_heads=4, num_kv_heads=2)
    expected = by_definition(batch, window)
    torch.testing.assert_close(batch.attend(torch_ops, window).double(), expected, rtol=2e-5, atol=2e-5)


def test_layers_with_and_without_a_window_share_a_steps_plan() -> None:
    batch = Batch([(1, 40), (9, 20)], block_size=8, num_heads=4, num_kv_heads=2)
    plan = torch_ops.plan_attention(batch.metadata, 8, batch.q.device)
    for window in (5, None, 11, 5, 100, None):
        attended = torch_ops.paged_attention(batch.q, LayerCache(batch.keys, batch.values), plan, batch.scale, window)
        torch.testing.assert_close(attended.double(), by_definition(batch, window), rtol=2e-5, atol=2e-5)


def test_blocks_that_no_window_reaches_are_not_gathered() -> None:
    batch = Batch([(1, 1000), (1, 900), (20, 800)], block_size=16, num_heads=1, num_kv_heads=1)
    groups = torch_ops.plan_attention(batch.metadata, 16, batch.q.device).groups(64)
    # 64 tokens lie in at most 5 blocks, those of 20 query tokens in at most 7.
    assert sorted(len(group.block_index) // group.mask.shape[0] for group in groups) in ([5, 6], [5, 7])


def test_many_rows_with_long_contexts_are_gathered_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [(1, context) for context in range(17, 33)]
    batch = Batch(rows, block_size=4, num_heads=2, num_kv_heads=1)
    expected = by_definition(batch)
    for limit in (1, 33, 100):
        monkeypatch.setattr(torch_ops, "_MAX_GATHERED_TOKENS", limit)
        torch.testing.assert_close(batch.attend(torch_ops).double(), expected, rtol=2e-5, atol=2e-5)


def test_little_is_gathered_at_once_and_little_of_that_is_padding() -> None:
    rows = [(1, 1 + 997 * i % 3000) for i in range(400)] + [(20, 500)]
    batch = Batch(rows, block_size=16, num_heads=1, num_kv_heads=1)
    groups = torch_ops.plan_attention(batch.metadata, 16, batch.q.device).groups(None)
    row_of_token = {start: i for i, start in enumerate(batch.metadata.query_starts)}
    seen: list[int] = []
    for group in groups:
        num_seqs, width = group.mask.shape[0], group.mask.shape[-1]
        members = [row_of_token[token] for token in group.token_index.view(num_seqs, -1)[:, 0].tolist()]
        assert num_seqs == 1 or num_seqs * width <= 16384 + 16 * num_seqs
        for member in members:
            assert width < 2 * rows[member][1] + 32, "less than half is padding"
        seen += members
    assert sorted(seen) == list(range(len(rows)))
    assert len(groups) < 100


@settings(max_examples=40, derandomize=True, deadline=None)
@given(
    num_tokens=st.integers(1, 9),
    size=st.sampled_from([2, 16, 66]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
    spread=st.sampled_from([1e-3, 1.0, 30.0]),
)
def test_the_other_ops_agree_with_their_specification(
    num_tokens: int, size: int, dtype: torch.dtype, seed: int, spread: float
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * spread).to(dtype)

    def agree(actual: torch.Tensor, expected: torch.Tensor) -> None:
        assert actual.dtype == expected.dtype == dtype
        scale = TOLERANCE[dtype]
        torch.testing.assert_close(actual.float(), expected.float(), rtol=scale, atol=scale * max(spread, spread**2))

    x, weight = randn(num_tokens, size), randn(size)
    agree(torch_ops.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6))
    agree(torch_ops.silu_mul(x), reference.silu_mul(x))
    heads, angles = randn(num_tokens, 3, size), torch.randn(num_tokens, size // 2, generator=generator) * 100
    rotated = torch_ops.rope(heads, angles.cos(), angles.sin())
    agree(rotated, reference.rope(heads, angles.cos(), angles.sin()))
    # A rotation keeps lengths.
    torch.testing.assert_close(
        rotated.double().norm(dim=-1), heads.double().norm(dim=-1), rtol=TOLERANCE[dtype], atol=1e-6
    )
