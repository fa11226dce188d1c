"""Attention by flashinfer agrees with the reference, through a wrapper that does what its documentation says."""

import itertools
import sys
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import fake_flashinfer
from attention_cases import MIXES, TOLERANCE, AttentionCase
from headrace.kernels import flashinfer_ops
from headrace.kernels.decoder import ModelShape
from headrace.kernels.flashinfer_ops import FlashinferPlan, KernelsMissingError

CPU = torch.device("cpu")
ROWS = torch.arange(2, dtype=torch.int32)
SINKS = torch.linspace(-3, 5, 6)


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", fake_flashinfer)


def attend(case: AttentionCase, **options: Any) -> torch.Tensor:
    plan = flashinfer_ops.plan_attention(case.metadata, case.block_size, CPU)
    q = case.q[: case.metadata.query_starts[-1]]
    return flashinfer_ops.paged_attention(q, case.cache, plan, case.scale, **options)


def check(case: AttentionCase, **options: Any) -> None:
    found, expected = attend(case, **options), case.expected(**options)
    assert found.dtype == case.q.dtype
    tolerance = TOLERANCE[found.dtype]
    torch.testing.assert_close(found.float(), expected.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("block_size", [1, 16])
@pytest.mark.parametrize("mix", MIXES)
def test_it_agrees_with_the_reference(mix: str, block_size: int) -> None:
    check(AttentionCase(MIXES[mix], block_size=block_size))


@pytest.mark.parametrize("options", [{"window": 1}, {"window": 24}, {"softcap": 1.5}, {"sinks": SINKS}])
def test_windows_softcaps_and_sinks(options: dict[str, Any]) -> None:
    check(AttentionCase(MIXES["all of it"]), **options)
    check(AttentionCase(MIXES["chunks"], dtype=torch.bfloat16), **{"window": 60, **options})


def test_a_cache_of_eight_bits_and_heads_of_one_kind_each() -> None:
    check(AttentionCase([(1, 90), (9, 40)], dtype=torch.bfloat16, cache_dtype=torch.float8_e4m3fn))
    check(AttentionCase([(1, 90), (9, 40)], heads=(3, 3)))


def test_layers_of_a_kind_share_a_plan_and_every_step_has_its_own() -> None:
    case, wrappers = AttentionCase(MIXES["chunks"]), []

    def make(*args: Any, **settings: Any) -> fake_flashinfer.BatchPrefillWithPagedKVCacheWrapper:
        wrappers.append(fake_flashinfer.BatchPrefillWithPagedKVCacheWrapper(*args, **settings))
        return wrappers[-1]

    plan = FlashinferPlan(make, block_size=16, max_num_seqs=4, max_num_blocks=64, device=CPU)
    tables = torch.tensor([table + [0] * (11 - len(table)) for table in case.metadata.block_tables]).int()
    lens = [starts[1] - starts[0] for starts in itertools.pairwise(case.metadata.query_starts)]
    q = case.q[: case.metadata.query_starts[-1]]
    for _ in range(2):
        plan.begin(lens, case.metadata.context_lens, 3)
        plan.take_blocks(tables, torch.arange(3).int())
        for window in (None, 20, None, 20):
            found = flashinfer_ops.paged_attention(q, case.cache, plan, case.scale, window)
            torch.testing.assert_close(found, case.expected(window=window), rtol=2e-5, atol=2e-5)
    assert [wrapper.num_plans for wrapper in wrappers] == [2, 2]


def test_a_size_that_needs_more_memory_gets_it_and_the_others_keep_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flashinfer_ops, "_WORKSPACE_BYTES", 64)
    make = fake_flashinfer.BatchPrefillWithPagedKVCacheWrapper
    plan = FlashinferPlan(make, block_size=16, max_num_seqs=2, max_num_blocks=8, device=CPU)
    for num_tokens in (3, 9, 3, 9):
        case = AttentionCase([(num_tokens, 20), (1, 7)])
        long, short = case.metadata.block_tables
        plan.begin([num_tokens, 1], [20, 7], 2, num_tokens)
        plan.take_blocks(torch.tensor([long, [*short, 0]]).int(), ROWS)
        found = flashinfer_ops.paged_attention(case.q[: num_tokens + 1], case.cache, plan, case.scale)
        torch.testing.assert_close(found, case.expected(), rtol=2e-5, atol=2e-5)


def test_kernels_that_cannot_be_made_are_an_error_that_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def plan(self: Any, **lengths: Any) -> None:
        raise RuntimeError("Could not find nvcc")

    monkeypatch.setattr(fake_flashinfer.BatchPrefillWithPagedKVCacheWrapper, "plan", plan)
    with pytest.raises(KernelsMissingError, match="cannot make its kernels: Could not find nvcc"):
        attend(AttentionCase(MIXES["decode"]))


@pytest.mark.parametrize(
    ("head_dim", "dtype", "cache_dtype", "reason"),
    [
        (128, torch.bfloat16, torch.bfloat16, None),
        (64, torch.float16, torch.float16, None),
        (128, torch.bfloat16, torch.float8_e4m3fn, None),
        (64, torch.bfloat16, torch.float8_e4m3fn, "64 numbers and a cache in fp8 are not tested; 128, 256 are"),
        (80, torch.bfloat16, torch.bfloat16, "80 numbers are not tested; 64, 128, 256 are"),
        (128, torch.bfloat16, torch.int8, "no int8 cache with a scale per token"),
        (128, torch.float32, torch.float32, "computes in 16 bits, not in float32"),
    ],
)
def test_what_it_cannot_do_is_known_before_it_is_asked(
    head_dim: int, dtype: torch.dtype, cache_dtype: torch.dtype, reason: str | None
) -> None:
    found = flashinfer_ops.why_not(ModelShape(9, 9, ((2, 128), (2, head_dim))), dtype, cache_dtype)
    assert found is None if reason is None else found is not None and reason in found
