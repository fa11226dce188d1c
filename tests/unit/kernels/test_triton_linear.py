"""Products in Triton agree with float32 torch; on a CPU their kernels are interpreted, on a GPU compiled."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

import gguf
from gguf.quants import dequantize, quantize

from headrace.kernels import reference
from headrace.kernels.quantised import QuantisedWeight
from headrace.kernels.triton_linear import (
    Fp8Weight,
    GroupedWeight,
    Tiles,
    Weight,
    choose_tiles,
    dequantise,
    linear,
    num_tiles,
    pack_gguf,
    pack_groups,
    quantise_fp8,
    quantise_rows,
    rms_norm,
    sum_squares,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Relative to outputs of order one: float32 sums differ in order only, 16-bit types keep 8 or 11 bits.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
DTYPES = list(TOLERANCE)
NUM_ROWS = (1, 3, 16, 17, 64)
GGUF_TYPES = ("Q4_0", "Q4_1", "Q8_0")


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.float(), expected.float(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def expected_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    is_gated: bool = False,
) -> torch.Tensor:
    x = x.float() if norm_weight is None else reference.rms_norm(x.float(), norm_weight, eps)
    product = F.linear(x, weight.float(), None if bias is None else bias.float())
    if is_gated:
        product = reference.silu_mul(product)
    return product if residual is None else product + residual.float()


def gguf_weight(num_out: int, num_in: int, type_name: str) -> tuple[GroupedWeight, torch.Tensor]:
    """A random weight, packed, and what it stands for."""
    values = (randn(num_out, num_in, seed=1) / num_in**0.5).cpu().numpy()
    kind = gguf.GGMLQuantizationType[type_name]
    rows = quantize(values, kind)
    exact = torch.from_numpy(dequantize(rows, kind)).to(DEVICE)
    return pack_gguf(QuantisedWeight(type_name, rows), DEVICE), exact


def gptq_weight(num_out: int, num_in: int, group_size: int) -> tuple[GroupedWeight, torch.Tensor]:
    """Signed integers of 4 bits as GPTQ and AWQ keep them, in longer groups, packed, and what they stand for."""
    generator = torch.Generator().manual_seed(1)
    num_groups = -(-num_in // group_size)
    integers = torch.randint(16, (num_out, num_in), dtype=torch.uint8, generator=generator)
    scales = (torch.rand(num_out, num_groups, generator=generator) / (4 * num_in**0.5)).half()
    exact = (integers.float() - 8) * scales.float().repeat_interleave(group_size, 1)[:, :num_in]
    return pack_groups(integers, scales, group_size, zero_point=8, device=DEVICE), exact.to(DEVICE)


def weight_of(kind: str, num_out: int, num_in: int, dtype: torch.dtype) -> tuple[Weight, torch.Tensor]:
    if kind in GGUF_TYPES:
        return gguf_weight(num_out, num_in, kind)
    if kind == "gptq":
        return gptq_weight(num_out, num_in, 128)
    weight = (randn(num_out, num_in, seed=1) / num_in**0.5).to(dtype)
    if kind == "fp8":
        quantised = quantise_fp8(weight)
        return quantised, quantised.values.float() * quantised.scales[:, None]
    return weight, weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", NUM_ROWS)
def test_a_product(num_rows: int, dtype: torch.dtype) -> None:
    weight, x = weight_of("plain", 48, 320, dtype)[0], randn(num_rows, 320, seed=2, dtype=dtype)
    assert isinstance(weight, torch.Tensor)
    assert_close(linear(x, weight), expected_product(x, weight), dtype)


@pytest.mark.parametrize("kind", ["plain", "fp8", *GGUF_TYPES, "gptq"])
@pytest.mark.parametrize("num_rows", [3, 17])
@pytest.mark.parametrize("option", ["bias", "residual", "gated", "all"])
def test_a_product_of_every_kind_of_weight_with_every_option(option: str, num_rows: int, kind: str) -> None:
    dtype = torch.float32 if num_rows == 3 else torch.bfloat16
    is_gated = option in ("gated", "all")
    num_in, num_out = 160, 24
    weight, exact = weight_of(kind, num_out * (1 + is_gated), num_in, dtype)
    x = randn(num_rows, num_in, seed=2, dtype=dtype)
    options: dict[str, Any] = {"is_gated": is_gated}
    if option in ("bias", "all"):
        options["bias"] = randn(num_out * (1 + is_gated), seed=3, dtype=dtype)
    if option in ("residual", "all"):
        options["residual"] = randn(num_rows, num_out, seed=4, dtype=dtype)
    assert_close(linear(x, weight, **options), expected_product(x, exact, **options), dtype)


@pytest.mark.parametrize("kind", ["plain", "fp8", "Q4_1"])
@pytest.mark.parametrize("num_in", [32, 96, 544])
@pytest.mark.parametrize("num_out", [8, 37])
def test_sizes_that_fit_no_tile(num_out: int, num_in: int, kind: str) -> None:
    weight, exact = weight_of(kind, num_out, num_in, torch.float32)
    x = randn(5, num_in, seed=2)
    assert_close(linear(x, weight), expected_product(x, exact), torch.float32)
    squares = torch.empty(-(-num_out // 16), 5, device=DEVICE)
    product = linear(x, weight, out_squares=squares, tiles=Tiles(16, 64, 4, 3))
    assert_close(product, expected_product(x, exact), torch.float32)
    assert_close(squares.sum(0), (product**2).sum(1), torch.float32)


def test_inputs_of_an_odd_number() -> None:
    weight, x = randn(9, 77, seed=1) / 9, randn(5, 77, seed=2)
    assert_close(linear(x, weight), expected_product(x, weight), torch.float32)
    packed, exact = gptq_weight(9, 77, 32)
    assert_close(linear(x, packed), expected_product(x, exact), torch.float32)


@pytest.mark.parametrize("kind", ["plain", "fp8", "Q4_0", "Q8_0"])
@pytest.mark.parametrize("num_in", [512, 480])
@pytest.mark.parametrize("split_k", [2, 8])
def test_splits_are_added_and_leave_their_counters_at_zero(split_k: int, num_in: int, kind: str) -> None:
    weight, exact = weight_of(kind, 40, num_in, torch.float32)
    x, residual, bias = randn(5, num_in, seed=2), randn(5, 40, seed=3), randn(40, seed=4)
    tiles = Tiles(16, 64, 4, 3, split_k)
    expected = expected_product(x, exact, bias, residual)
    squares = torch.empty(3, 5, device=DEVICE)
    for _ in range(2):
        product = linear(x, weight, bias=bias, residual=residual, out_squares=squares, tiles=tiles)
        assert_close(product, expected, torch.float32)
        assert_close(squares.sum(0), (expected**2).sum(1), torch.float32)
    gated = expected_product(x, exact, bias, is_gated=True)
    assert_close(linear(x, weight, bias=bias, is_gated=True, tiles=tiles), gated, torch.float32)


@pytest.mark.parametrize("kind", ["plain", "fp8", "Q4_0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [1, 5, 17, 64])
def test_the_norm_of_a_product_s_output_is_a_factor_of_the_next_one(
    num_rows: int, dtype: torch.dtype, kind: str
) -> None:
    first, exact_first = weight_of(kind, 96, 64, dtype)
    second, exact = weight_of(kind, 80, 96, dtype)
    x, residual = randn(num_rows, 64, seed=2, dtype=dtype), 3 * randn(num_rows, 96, seed=3, dtype=dtype)
    squares = torch.full((num_tiles(num_rows, first), num_rows), float("nan"), device=DEVICE)
    middle = linear(x, first, residual=residual, out_squares=squares)
    assert_close(middle, expected_product(x, exact_first, residual=residual), dtype)
    assert_close(squares.sum(0), (middle.float() ** 2).sum(1), torch.float32)
    assert_close(sum_squares(middle)[0], (middle.float() ** 2).sum(1), torch.float32)
    bias = randn(80, seed=4, dtype=dtype)
    for is_gated in (False, True):
        options: dict[str, Any] = {"bias": bias, "eps": 1e-5, "is_gated": is_gated}
        expected = expected_product(middle, exact, norm_weight=torch.ones(96, device=DEVICE), **options)
        for parts in (squares, sum_squares(middle)):
            assert_close(linear(middle, second, row_squares=parts, **options), expected, dtype)


def test_a_split_product_takes_its_norm_s_factor_once() -> None:
    weight, x = randn(40, 512, seed=1) / 512**0.5, randn(5, 512, seed=2)
    expected = expected_product(x, weight, norm_weight=torch.ones(512, device=DEVICE), eps=1e-5)
    product = linear(x, weight, row_squares=sum_squares(x), eps=1e-5, tiles=Tiles(16, 64, 4, 3, 4))
    assert_close(product, expected, torch.float32)


@pytest.mark.parametrize("kind", ["plain", "fp8"])
@pytest.mark.parametrize("num_rows", [1, 17])
@pytest.mark.parametrize("num_in", [320, 512])
def test_tiles_loaded_by_the_tensor_memory_accelerator(num_in: int, num_rows: int, kind: str) -> None:
    weight, exact = weight_of(kind, 80, num_in, torch.bfloat16)
    x = randn(num_rows, num_in, seed=2, dtype=torch.bfloat16)
    for split_k in (1, 2):
        tiles = Tiles(32, 128, 4, 3, split_k, is_tma=True)
        assert_close(linear(x, weight, tiles=tiles), expected_product(x, exact), torch.bfloat16)
        gated = expected_product(x, exact, is_gated=True)
        assert_close(linear(x, weight, is_gated=True, tiles=tiles), gated, torch.bfloat16)


def test_strided_rows() -> None:
    weight, wide = randn(48, 64, seed=1) / 8, randn(4, 200, seed=2)
    x, residual = wide[:, 64:128], wide[:, 128:176]
    assert_close(linear(x, weight, residual=residual), expected_product(x, weight, residual=residual), torch.float32)


# NumPy, which interprets, warns of what the neighbours have on purpose.
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning")
@pytest.mark.parametrize("kind", ["plain", "fp8", "Q4_1"])
def test_a_row_depends_on_its_inputs_only_and_equal_inputs_give_equal_bits(kind: str) -> None:
    weight, _ = weight_of(kind, 40, 512, torch.bfloat16)
    x, residual = randn(9, 512, seed=2, dtype=torch.bfloat16), randn(9, 40, seed=3, dtype=torch.bfloat16)
    for tiles in (Tiles(16, 64, 4, 3, 4), Tiles(32, 128, 4, 3)):
        options: dict[str, Any] = {"residual": residual, "eps": 1e-5, "tiles": tiles}
        before = linear(x, weight, row_squares=sum_squares(x), **options)
        assert torch.equal(before, linear(x, weight, row_squares=sum_squares(x), **options))
        changed = x.clone()
        changed[[0, 1, 8]] = torch.tensor([[float("nan")], [float("inf")], [1e4]], device=DEVICE, dtype=x.dtype)
        after = linear(changed, weight, row_squares=sum_squares(changed), **options)
        assert torch.equal(before[2:8], after[2:8])
        options["residual"] = residual[3:4]
        alone = linear(x[3:4], weight, row_squares=sum_squares(x[3:4]), **options)
        assert torch.equal(before[3:4], alone)


def test_no_rows_make_no_product() -> None:
    assert linear(randn(0, 64, seed=1), randn(48, 64, seed=2)).shape == (0, 48)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 96), (7, 40), (3, 5, 16), (2, 2048)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = randn(*shape, seed=1, dtype=dtype) * 3, randn(shape[-1], seed=2, dtype=dtype)
    assert_close(rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5), dtype)


@pytest.mark.parametrize("kind", ["fp8", *GGUF_TYPES, "gptq"])
def test_a_dequantised_weight_is_what_the_quantised_one_stands_for(kind: str) -> None:
    weight, exact = weight_of(kind, 70, 352, torch.float32)
    assert weight.shape == exact.shape
    # The interpreter cuts off what the GPU rounds.
    torch.testing.assert_close(dequantise(weight).float(), exact, rtol=2**-7, atol=0)
    torch.testing.assert_close(dequantise(weight, torch.float32), exact, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("width", [48, 4096])
def test_activations_are_rounded_to_fp8_as_weights_are(width: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 2 * width).bfloat16()[:, :width]
    x[1] = 0
    rows, expected = quantise_rows(x), quantise_fp8(x)
    torch.testing.assert_close(rows.scales, expected.scales, rtol=1e-6, atol=0)
    # Triton's interpreter forgets the carry where a mantissa is rounded up to the next power of two.
    has_no_carry = expected.values.view(torch.uint8) & 7 != 0
    assert torch.equal(rows.values[has_no_carry].float(), expected.values[has_no_carry].float())


def test_fp8_keeps_three_bits_behind_the_point_and_the_range_of_each_row() -> None:
    weight = randn(16, 64, seed=1) * torch.logspace(-3, 3, 16, device=DEVICE)[:, None]
    weight[3] = 0
    quantised = quantise_fp8(weight)
    error = (quantised.values.float() * quantised.scales[:, None] - weight).abs()
    largest = weight.abs().amax(1, keepdim=True)
    assert (error <= weight.abs() / 16 + largest * 2**-16).all()
    assert isinstance(quantised, Fp8Weight)


# The products of Llama 3.1 8B's layers.
LLAMA = {"qkv": (6144, 4096), "out": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}


@pytest.mark.parametrize("num_rows", [1, 32, 64])
@pytest.mark.parametrize("name", LLAMA)
def test_most_sms_have_a_program(name: str, num_rows: int) -> None:
    is_gated = name == "gate_up"
    weight = torch.empty(LLAMA[name], dtype=torch.bfloat16, device="meta")
    tiles = choose_tiles(num_rows, weight, is_gated, 132)
    num_programs = weight.shape[0] // (1 + is_gated) // tiles.block_n * tiles.split_k
    assert num_programs >= 0.7 * 132


COMPILE = """
import re, subprocess, sys, tempfile, types
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

hopper = GPUTarget("cuda", 90, 32)
driver.set_active(types.SimpleNamespace(
    get_current_target=lambda: hopper, get_current_device=lambda: 0, get_current_stream=lambda device: 0))
run = JITFunction.run

def compile_only(function, *args, warmup, **options):
    kernel = run(function, *args, warmup=True, **options)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(kernel.asm["ptx"])
        file.flush()
        command = [triton.knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", file.name, "-o", "/dev/null"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, spilled = (int(re.search(p, report)[1]) for p in (r"Used (\\d+) reg", r"(\\d+) bytes spill stores"))
    print(function.__name__, "registers", registers, "spilled", spilled, "shared", kernel.metadata.shared)
    # A few bytes are not worth a warp less.
    assert spilled <= 16, "spills"
    assert kernel.metadata.shared <= 227 * 1024, "shared memory"

JITFunction.run = compile_only
from headrace.kernels import triton_launch, triton_linear
from headrace.kernels.triton_linear import Fp8Weight, GroupedWeight, Tiles, linear, num_tiles, rms_norm, sum_squares

def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")

def weight(kind, n, k):
    if kind == "fp8":
        return Fp8Weight(empty(n, k, dtype=torch.float8_e4m3fn), empty(n, dtype=torch.float32))
    pairs = empty(k // 32, n, 2, dtype=torch.float16)
    if kind == "Q8_0":
        return GroupedWeight(empty(k // 32, n, 32, dtype=torch.int8), pairs, k, 32, 0, False)
    if kind != "plain":
        is_signed = kind == "Q4_0"
        return GroupedWeight(empty(k // 64, n, 32, dtype=torch.uint8), pairs, k, 32, 8 * is_signed, not is_signed)
    return empty(n, k)

for case in sys.argv[1:]:
    kind, name, m, launch = case.split(":")
    triton_launch._can_launch_early = lambda device: launch == "early"
    n, k = {"out": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}[name]
    x, w = empty(int(m), k), weight(kind, n, k)
    print(case)
    if name == "gate_up":
        linear(x, w, row_squares=sum_squares(x), eps=1e-5, is_gated=True)
    else:
        squares = empty(num_tiles(int(m), w), int(m), dtype=torch.float32)
        linear(rms_norm(x, empty(k), 1e-5), w, residual=empty(int(m), n), out_squares=squares)
triton_linear._is_aligned = lambda rows: True
linear(empty(1, 4096), empty(28672, 4096), is_gated=True, tiles=Tiles(64, 64, 4, 4, is_tma=True))
"""
CASES = (
    *("plain:out:1:alone", "plain:gate_up:1:early", "plain:gate_up:64:early", "plain:down:64:early"),
    *("fp8:gate_up:1:early", "fp8:down:64:alone", "Q4_1:out:1:early", "Q4_0:gate_up:64:early", "Q8_0:gate_up:1:alone"),
)


@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler is for Linux")
def test_what_runs_on_hopper_compiles_without_spills(tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, *CASES], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
