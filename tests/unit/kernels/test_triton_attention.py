"""Attention in Triton agrees with the reference; on a CPU its kernels are interpreted, on a GPU compiled."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from attention_cases import MIXES, TOLERANCE, AttentionCase
from headrace.kernels import triton_attention, triton_launch
from headrace.kernels.triton_attention import AttentionPlan, _Tiling

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Case(AttentionCase):
    def plan(self) -> AttentionPlan:
        return triton_attention.plan_attention(self.metadata, self.block_size, DEVICE)

    def actual(
        self,
        window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
        plan: AttentionPlan | None = None,
        **overrides: Any,
    ) -> torch.Tensor:
        keys, values, *scales = (part.to(DEVICE) for part in self.cache if part is not None)
        out = triton_attention._attend(
            self.q.to(DEVICE),
            keys,
            values,
            plan or self.plan(),
            self.scale,
            window,
            softcap,
            None if sinks is None else sinks.to(DEVICE),
            (scales[0], scales[1]) if scales else None,
            **overrides,
        )
        assert out.is_contiguous()
        return out[: self.metadata.query_starts[-1]].cpu()

    def check(self, num_splits: int | None = None, decode_tiling: _Tiling | None = None, **options: Any) -> None:
        actual = self.actual(num_splits=num_splits, decode_tiling=decode_tiling, **options)
        expected = self.expected(**options)
        assert actual.dtype == self.q.dtype
        tolerance = TOLERANCE[actual.dtype]
        torch.testing.assert_close(actual.float(), expected.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("dtype", "block_size"), [(torch.float32, 1), (torch.float32, 16), (torch.bfloat16, 16), (torch.float16, 4)]
)
@pytest.mark.parametrize("mix", MIXES)
def test_it_agrees_with_the_reference(mix: str, block_size: int, dtype: torch.dtype) -> None:
    Case(MIXES[mix], block_size=block_size, dtype=dtype).check()


@pytest.mark.parametrize("heads", [(3, 3), (4, 1), (8, 1), (20, 1)])
def test_any_grouping_of_heads(heads: tuple[int, int]) -> None:
    Case([(1, 40), (9, 9), (17, 50)], heads=heads).check()


@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
def test_any_head_size(head_dim: int) -> None:
    Case([(1, 70), (9, 9), (17, 50)], head_dim=head_dim, dtype=torch.bfloat16, heads=(4, 2)).check()


@pytest.mark.parametrize(("window", "num_splits"), [(1, 1), (8, 1), (8, 3), (64, 3), (1000, 3)])
def test_a_window(window: int, num_splits: int) -> None:
    Case(MIXES["all of it"]).check(window=window, num_splits=num_splits)


@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize("num_splits", [None, 3])
def test_softcap_and_sinks(num_splits: int | None, window: int | None) -> None:
    case = Case([(1, 40), (9, 30), (1, 148)])
    sinks = torch.linspace(-3, 5, 6)
    case.check(sinks=sinks, num_splits=num_splits, window=window)
    case.check(sinks=sinks.bfloat16(), softcap=1.5, num_splits=num_splits, window=window)
    case.q *= 100
    case.check(softcap=30.0, num_splits=num_splits, window=window)


@pytest.mark.parametrize("cache_dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_caches_of_eight_bits(dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    Case([(1, 90), (9, 40)], dtype=dtype, cache_dtype=cache_dtype).check(window=60, num_splits=2)


@pytest.mark.parametrize("num_splits", [1, 2, 5, 40])
def test_splits_change_nothing_but_the_order_of_sums(num_splits: int) -> None:
    case = Case(MIXES["decode"])
    case.check(num_splits=num_splits)


def test_splits_merge_to_the_same_bits_whichever_ends_last() -> None:
    """More splits than are read at a time, their counters shared by all calls."""
    case = Case([(1, 590), (1, 3), (1, 100), (9, 20), (1, 17)])
    options: dict[str, Any] = {"num_splits": 40, "decode_tiling": _Tiling(16, 16, 4, 2)}
    case.check(**options)
    first = case.actual(**options)
    for _ in range(20 if DEVICE.type == "cuda" else 1):
        assert torch.equal(case.actual(**options), first)
    assert not triton_launch.counters(DEVICE).any()


def test_what_lies_beyond_a_context_never_reaches_a_row() -> None:
    clean, infinite = (Case(MIXES["all of it"], filler=filler) for filler in (0.0, float("inf")))
    assert torch.equal(clean.actual(), infinite.actual())


@pytest.mark.parametrize("num_splits", [1, 3])
def test_what_a_neighbour_contains_never_changes_a_row(num_splits: int) -> None:
    case = Case(MIXES["all of it"])
    before = case.actual(num_splits=num_splits)
    for block in case.metadata.block_tables[4]:
        case.cache.keys[block], case.cache.values[block] = 1e4, float("nan")
    rows = slice(case.metadata.query_starts[4], case.metadata.query_starts[5])
    case.q[rows] = 77.0
    after = case.actual(num_splits=num_splits)
    is_other = torch.ones(len(before), dtype=torch.bool)
    is_other[rows] = False
    assert torch.equal(before[is_other], after[is_other])
    assert after[rows].isnan().all()


def test_tables_may_lie_in_any_order_and_bounds_may_be_wide() -> None:
    """As they do where a captured step is replayed: rows of a table of all sequences, a batch padded to its bound."""
    case = Case(MIXES["all of it"])
    plan = case.plan()
    order = torch.tensor([3, 1, 6, 0, 5, 2, 4])
    tables = torch.full((9, plan.block_tables.shape[1] + 4), 10**6, dtype=torch.int32)
    tables[order, :-4] = plan.block_tables.cpu()
    wide = AttentionPlan(
        plan.query_starts,
        plan.context_lens,
        tables.to(DEVICE),
        order.to(torch.int32).to(DEVICE),
        plan.max_num_tokens + 90,
        True,
    )
    assert torch.equal(case.actual(num_splits=2), case.actual(num_splits=2, plan=wide))


@pytest.mark.parametrize(
    ("num_programs", "max_context_len", "num_splits"),
    [(8, 4096, 49), (8, 512, 8), (64, 4096, 6), (256, 4096, 1), (2048, 4096, 1), (8, 1, 1)],
)
def test_splits_fill_the_gpu_and_no_more(num_programs: int, max_context_len: int, num_splits: int) -> None:
    assert triton_attention._choose_num_splits(num_programs, max_context_len, 64, 132) == num_splits


# Compiles as a launch would and launches nothing: the tensors lie on the CPU. Prints spilled and shared bytes.
# "early" has it compile what a device with programmatic dependent launch may be given.
COMPILE = """
import re, subprocess, sys, tempfile, types
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver
from headrace.kernels import triton_attention, triton_launch
from headrace.kernels.ops import AttentionMetadata

hopper = GPUTarget("cuda", 90, 32)
driver.set_active(types.SimpleNamespace(
    get_current_target=lambda: hopper, get_current_device=lambda: 0, get_current_stream=lambda device: 0
))
run = JITFunction.run

def compile_only(kernel, *arguments, warmup, **options):
    compiled = run(kernel, *arguments, warmup=True, **options)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(compiled.asm["ptx"])
        file.flush()
        ptxas = [triton.knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", "-o", "/dev/null", file.name]
        report = subprocess.run(ptxas, check=True, capture_output=True, text=True).stderr
    spilled = re.search("([0-9]+) bytes spill stores", report)[1]
    num_waits = compiled.asm["ptx"].count("griddepcontrol.wait")
    num_triggers = compiled.asm["ptx"].count("griddepcontrol.launch_dependents")
    print(kernel.__name__, spilled, compiled.metadata.shared, compiled.metadata.launch_pdl, num_waits, num_triggers)

JITFunction.run = compile_only
triton_launch._can_launch_early = lambda device: len(sys.argv) > 2
metadata = AttentionMetadata([0, 1, 9], [4000, 4000], [[0] * 250] * 2)
plan = triton_attention.plan_attention(metadata, 16, torch.device("cpu"))
q = torch.zeros(9, 48, 128, dtype=torch.bfloat16)[:, :32]
cache = torch.zeros(2, 16, 8, 128, dtype=getattr(torch, sys.argv[1]))
scales = (torch.zeros(2, 16, 8), torch.zeros(2, 16, 8)) if cache.dtype == torch.int8 else None
triton_attention.paged_attention(q, cache, cache, plan, 0.1, scales=scales)
"""


@pytest.mark.parametrize(("cache_dtype", "is_early"), [("bfloat16", True), ("int8", False)])
def test_the_kernels_compile_for_hopper_and_spill_no_register(cache_dtype: str, is_early: bool) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, cache_dtype, *(["early"] if is_early else [])]
    report = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    kernels = {name: figures for name, *figures in map(str.split, report.splitlines())}
    assert {name: spilled for name, (spilled, *_) in kernels.items()} == {"_decode": "0", "_prefill": "0"}
    # Three programs of decoding fit an SM: what the number of splits counts on.
    assert 3 * (int(kernels["_decode"][1]) + 1024) <= 228 * 1024
    for _, _, *launch in kernels.values():
        assert launch == (["True", "1", "1"] if is_early else ["False", "0", "0"])
