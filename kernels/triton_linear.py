"""Matrix products of the few rows of a decode step, bound by reading the weights once, with norm, gate and sum inside.

The weights are the tall side of each tensor-core product, the rows its 16 to 64 columns; a program keeps tens of
kilobytes of weights in flight. Where there are too few tiles for the GPU, programs share a tile's inputs (split-K) and
the last to arrive adds their parts in order: equal inputs give equal bits. With programmatic dependent launch a kernel
asks for its first weights while the one before still runs. Papers: GPTQ (Frantar et al., 2022) and ggml's types as
`quantised` has them, repacked; FP8 formats (Micikevicius et al., 2022); RMSNorm's factor is applied after the product.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from headrace.kernels.quantised import GROUP_BYTES, GROUP_SIZE, QuantisedWeight
from headrace.kernels.triton_launch import counters, launch_dependents_at, launch_options, num_sms, prefetch

MAX_ROWS = 64
# Inputs of a packed block: with 4 bits the low halves of its 32 bytes are the first 32, the high halves the others.
_PACKED_BLOCK = 64
_HALF_BLOCK = 32
_IS_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
FP8_MAX = tl.constexpr(448.0)
_LINE_BYTES = tl.constexpr(128)


@dataclass(frozen=True, slots=True)
class Fp8Weight:
    """A weight [N, K] of 8-bit floats: `values` float8_e4m3fn [N, K], times its row's of `scales` float32 [N]."""

    values: torch.Tensor
    scales: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        return self.values.shape


@dataclass(frozen=True, slots=True)
class GroupedWeight:
    """A weight [N, K] of integers: (value - zero_point) * scale + minimum, both of the value's group.

    `values` uint8 [ceil(K / 64), N, 32] of 4 bits, inputs 0 to 31 of a block in the low halves; or int8
    [2 * ceil(K / 64), N, 32]. `scales` float16 [groups, N, 2] has scale and minimum side by side, for whole blocks.
    """

    values: torch.Tensor
    scales: torch.Tensor
    num_in: int
    group_size: int
    zero_point: int
    has_minimums: bool

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.values.shape[1], self.num_in))


Weight = torch.Tensor | Fp8Weight | GroupedWeight


@dataclass(frozen=True, slots=True)
class Tiles:
    """How a product is cut up: a program has `block_n` outputs, of gate and up each, and walks over its inputs by
    `block_k`; `split_k` programs share a tile. `is_tma` has the tensor memory accelerator load."""

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    split_k: int = 1
    is_tma: bool = False


def choose_tiles(num_rows: int, weight: Weight, is_gated: bool, num_sms: int) -> Tiles:
    """Choose tiles as they were fastest on an H100, and as many as have something for most SMs."""
    num_out, num_in = weight.shape[0] // (1 + is_gated), weight.shape[1]
    element_size = weight.element_size() if isinstance(weight, torch.Tensor) else 1
    block_m = _block_m(num_rows)
    num_warps, num_stages, least_programs, is_tma = 4, 4, 0.8 * num_sms, False
    if element_size == 1:
        # Bytes go to registers fast with the synchronous products only, of less than 64 outputs or two warps; a warp
        # has 16 outputs, and the more there are, the more of them unpack.
        block_n, block_k = 32, 128
        num_warps = 4 if block_m == 64 else 2
        least_programs = 2 * num_sms
        if isinstance(weight, Fp8Weight):
            num_stages = 5
    elif element_size == 4:
        block_n, block_k, num_stages = 32, 32, 2
    else:
        block_n, block_k, least_programs = 64, 128, 0.7 * num_sms
        if is_gated:
            num_stages, is_tma = 3, True
        elif block_m == 64 and num_out >= 128 * num_sms:
            # Each tile reads all of x.
            block_n, block_k = 128, 64
        elif block_m == 16 and num_in < 8192:
            block_n, block_k, num_warps, num_stages = 16, 256, 2, 5
    while is_gated and block_n > 32 and triton.cdiv(num_out, block_n) < 0.8 * num_sms:
        block_n //= 2
    # A split costs a pass over float32 parts.
    split_k = 1
    while triton.cdiv(num_out, block_n) * split_k < least_programs and num_in >= 2048 * split_k and split_k < 8:
        split_k *= 2
    if element_size == 2 and block_m >= 32 and not is_gated:
        num_programs = triton.cdiv(num_out, block_n) * split_k
        if num_programs <= num_sms and split_k == 1:
            num_stages = 5
        elif num_programs > num_sms and block_m == 64:
            # Two to an SM.
            num_stages = min(num_stages, 256 // block_k + 1)
    return Tiles(block_n, block_k, num_warps, num_stages, split_k, is_tma)


def _block_m(num_rows: int) -> int:
    return max(16, int(triton.next_power_of_2(num_rows)))


def num_tiles(num_rows: int, weight: Weight) -> int:
    """Say how many rows the `out_squares` of `linear` have, where no gate is in it."""
    device = weight.device if isinstance(weight, torch.Tensor) else weight.values.device
    tiles = choose_tiles(num_rows, weight, False, num_sms(device))
    return int(triton.cdiv(weight.shape[0], tiles.block_n))


def linear(
    x: torch.Tensor,
    weight: Weight,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    eps: float = 0.0,
    row_squares: torch.Tensor | None = None,
    out_squares: torch.Tensor | None = None,
    is_gated: bool = False,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """Multiply at most 64 rows: x [M, K], weight [N, K] -> [M, N] in x's dtype, sums in float32.

    With `row_squares` float32 [P, M], parts of the sums of the squares of x's rows, the product is of x's RMSNorm, the
    norm's weight being in `weight` already. `bias` [N] and `residual` [M, N] are added. A gated weight is [2 F, K], the
    gate first -> silu(gate) * up [M, F]. `out_squares` float32 [num_tiles, M] gets such parts of the output's rows, as
    stored. Splits count their arrivals in memory that all calls on the device share: one stream, and a first call
    before any is captured in a CUDA graph.
    """
    num_rows, num_in = x.shape
    assert num_rows <= MAX_ROWS, "rows for a wide product"
    assert num_in == weight.shape[1], "x and weight differ in their inputs"
    num_out = weight.shape[0] // (1 + is_gated)
    tiles = tiles or choose_tiles(num_rows, weight, is_gated, num_sms(x.device))
    out = x.new_empty(num_rows, num_out)
    if num_rows == 0:
        return out
    assert x.stride(1) == 1, "rows whose numbers are not side by side"
    if residual is not None:
        assert residual.shape == out.shape
        assert residual.stride(1) == 1, "rows whose numbers are not side by side"
    block_m = _block_m(num_rows)
    tiles_of_out = triton.cdiv(num_out, tiles.block_n)
    squares_block = 0
    if row_squares is not None:
        assert row_squares.shape[1] == num_rows
        assert row_squares.is_contiguous()
        squares_block = triton.next_power_of_2(len(row_squares))
    if out_squares is not None:
        assert out_squares.shape == (tiles_of_out, num_rows)
        assert out_squares.is_contiguous()
    partials = arrivals = None
    if tiles.split_k > 1:
        arrivals = counters(x.device)
        assert tiles_of_out <= len(arrivals), "more tiles than counters"
        shape = (tiles_of_out, tiles.split_k, 1 + is_gated, tiles.block_n, block_m)
        partials = torch.empty(shape, dtype=torch.float32, device=x.device)
    places: dict[str, Any] = {
        "row_squares": row_squares,
        "bias": bias,
        "residual": residual,
        "out": out,
        "out_squares": out_squares,
        "partials": partials,
        "counters": arrivals,
        "num_rows": num_rows,
        "num_out": num_out,
        "num_in": num_in,
        "num_squares": 0 if row_squares is None else len(row_squares),
        "x_stride": x.stride(0),
        "residual_stride": 0 if residual is None else residual.stride(0),
        "out_stride": out.stride(0),
        "eps": eps,
    }
    shape_options: dict[str, Any] = {
        "BLOCK_M": block_m,
        "BLOCK_N": tiles.block_n,
        "SPLIT_K": tiles.split_k,
        "NUM_STAGES": tiles.num_stages,
        "IS_GATED": is_gated,
        "SQUARES_BLOCK": squares_block,
        # While the weights arrive, if there are registers to keep them.
        "ARE_SQUARES_EARLY": (squares_block + tiles.block_n * (1 + is_gated)) * block_m <= 96 * 32 * tiles.num_warps,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
        **launch_options(x.device),
    }
    grid = (tiles_of_out, tiles.split_k)
    if isinstance(weight, GroupedWeight):
        is_packed = weight.values.dtype == torch.uint8
        num_blocks = triton.cdiv(num_in, _PACKED_BLOCK)
        unroll = max(1, tiles.block_k // _PACKED_BLOCK)
        _grouped_product[grid](
            x,
            weight.values,
            weight.scales.view(torch.int32),
            **places,
            GROUP_SIZE=weight.group_size,
            ZERO_POINT=weight.zero_point,
            HAS_MINIMUMS=weight.has_minimums,
            IS_PACKED=is_packed,
            UNROLL=unroll,
            NUM_STEPS=triton.cdiv(num_blocks, unroll * tiles.split_k),
            IS_EVEN=num_in % (_PACKED_BLOCK * unroll * tiles.split_k) == 0,
            LOW_SOURCE=_dequantise_source(0, weight),
            HIGH_SOURCE=_dequantise_source(1, weight),
            **shape_options,
        )
        return out
    values = weight.values if isinstance(weight, Fp8Weight) else weight
    assert values.stride(1) == 1, "rows whose numbers are not side by side"
    weight_box = x_box = None
    if tiles.is_tma and _is_aligned(values) and _is_aligned(x):
        weight_box = TensorDescriptor.from_tensor(values, [tiles.block_n, tiles.block_k])
        x_box = TensorDescriptor.from_tensor(x, [block_m, tiles.block_k])
    can_widen = isinstance(weight, Fp8Weight) and x.dtype == torch.bfloat16 and not _IS_INTERPRETED.value
    _product[grid](
        x,
        values,
        weight.scales if isinstance(weight, Fp8Weight) else None,
        x_box,
        weight_box,
        **places,
        weight_stride=values.stride(0),
        BLOCK_K=tiles.block_k,
        NUM_STEPS=triton.cdiv(num_in, tiles.block_k * tiles.split_k),
        IS_EVEN=num_in % (tiles.block_k * tiles.split_k) == 0,
        FP8_SOURCE=_WIDEN if can_widen else None,
        NUM_LINES=_power_below(tiles.num_stages * tiles.block_k * values.element_size() // _LINE_BYTES.value),
        **shape_options,
    )
    return out


def _power_below(num: int) -> int:
    return 1 << (num.bit_length() - 1)


def _is_aligned(rows: torch.Tensor) -> bool:
    """Say whether all rows start at multiples of 16 bytes."""
    return rows.stride(0) * rows.element_size() % 16 == 0 and rows.data_ptr() % 16 == 0


@triton.jit(do_not_specialize=["num_rows", "num_squares"])
def _product(  # type: ignore[no-untyped-def]
    x,
    weight,
    scales,
    x_box,
    weight_box,
    row_squares,
    bias,
    residual,
    out,
    out_squares,
    partials,
    counters,
    num_rows,
    num_out,
    num_in,
    num_squares,
    x_stride,
    weight_stride,
    residual_stride,
    out_stride,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    IS_GATED: tl.constexpr,
    SQUARES_BLOCK: tl.constexpr,
    ARE_SQUARES_EARLY: tl.constexpr,
    NUM_STEPS: tl.constexpr,
    IS_EVEN: tl.constexpr,
    FP8_SOURCE: tl.constexpr,
    NUM_LINES: tl.constexpr,
    HAS_PDL: tl.constexpr,
):
    tile = tl.program_id(0)
    start = tl.program_id(1) * (NUM_STEPS * BLOCK_K)
    end = tl.minimum(start + NUM_STEPS * BLOCK_K, num_in)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    # Rows beyond the last are read as the last one, and not stored.
    rows = weight + tl.minimum(n, num_out - 1).to(tl.int64) * weight_stride + start
    up_rows = rows + num_out.to(tl.int64) * weight_stride
    if scales is not None:
        scale = tl.load(scales + n, mask=n < num_out, other=0.0)
        if IS_GATED:
            up_scale = tl.load(scales + num_out + n, mask=n < num_out, other=0.0)
    if HAS_PDL:
        # As many weights as the loop will have in flight.
        LINE: tl.constexpr = _LINE_BYTES * 8 // weight.dtype.element_ty.primitive_bitwidth
        lines = tl.minimum(tl.arange(0, NUM_LINES) * LINE, num_in - 1 - start)
        prefetch(rows[:, None] + lines[None, :])
        if IS_GATED:
            prefetch(up_rows[:, None] + lines[None, :])
        tl.extra.cuda.gdc_wait()

    if SQUARES_BLOCK > 0 and ARE_SQUARES_EARLY:
        squares = _load_squares(row_squares, num_rows, num_squares, BLOCK_M, SQUARES_BLOCK)
    weights = rows[:, None] + k[None, :]
    up_weights = up_rows[:, None] + k[None, :]
    columns = x + start + m[None, :] * x_stride + k[:, None]
    has_row = m[None, :] < num_rows
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    up_total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in tl.range(0, NUM_STEPS, num_stages=NUM_STAGES):
        at = start + step * BLOCK_K
        if weight_box is not None:
            # What is beyond an edge is read as zero.
            values = weight_box.load([tile * BLOCK_N, at])
            if IS_GATED:
                up_values = weight_box.load([num_out + tile * BLOCK_N, at])
            inputs = x_box.load([0, at]).T
        elif IS_EVEN:
            values = tl.load(weights)
            if IS_GATED:
                up_values = tl.load(up_weights)
            inputs = tl.load(columns, mask=has_row, other=0.0)
        else:
            has_input = at + k < end
            values = tl.load(weights, mask=has_input[None, :], other=0.0)
            if IS_GATED:
                up_values = tl.load(up_weights, mask=has_input[None, :], other=0.0)
            inputs = tl.load(columns, mask=has_row & has_input[:, None], other=0.0)
        total = _dot(_widen(values, x.dtype.element_ty, FP8_SOURCE), inputs, total)
        if IS_GATED:
            up_total = _dot(_widen(up_values, x.dtype.element_ty, FP8_SOURCE), inputs, up_total)
        weights += BLOCK_K
        up_weights += BLOCK_K
        columns += BLOCK_K
        if HAS_PDL:
            # From here on there are no more weights to ask for.
            launch_dependents_at(step, tl.maximum(NUM_STEPS - NUM_STAGES, 0))

    if SQUARES_BLOCK > 0:
        if not ARE_SQUARES_EARLY:
            squares = _load_squares(row_squares, num_rows, num_squares, BLOCK_M, SQUARES_BLOCK)
        factor = tl.rsqrt(tl.sum(squares, axis=0) / num_in + eps)[None, :]
        total *= factor
        up_total *= factor
    if scales is not None:
        total *= scale[:, None]
        if IS_GATED:
            up_total *= up_scale[:, None]
    _finish(
        total,
        up_total,
        bias,
        residual,
        out,
        out_squares,
        partials,
        counters,
        num_rows,
        num_out,
        residual_stride,
        out_stride,
        BLOCK_M,
        BLOCK_N,
        SPLIT_K,
        IS_GATED,
    )


# Four 8-bit floats to four bfloat16: sign, exponent and mantissa at their places are 2**-120 of the number, subnormal
# or not. The GPU's own conversions go through float16, one number at a time.
_WIDEN = """{
    .reg .b32 low, high, rest, rest_2, power, zero;
    prmt.b32 low, $2, 0, 0x1404;
    prmt.b32 high, $2, 0, 0x3424;
    shr.u32 rest, low, 4;
    shr.u32 rest_2, high, 4;
    and.b32 rest, rest, 0x07F007F0;
    and.b32 rest_2, rest_2, 0x07F007F0;
    and.b32 low, low, 0x80008000;
    and.b32 high, high, 0x80008000;
    or.b32 low, low, rest;
    or.b32 high, high, rest_2;
    mov.b32 power, 0x7B807B80;
    mov.b32 zero, 0x80008000;
    fma.rn.bf16x2 $0, low, power, zero;
    fma.rn.bf16x2 $1, high, power, zero;
}"""


@triton.jit
def _widen(values, DTYPE: tl.constexpr, FP8_SOURCE: tl.constexpr):  # type: ignore[no-untyped-def]
    if FP8_SOURCE is None:
        wide = values.to(DTYPE)
    else:
        wide = tl.inline_asm_elementwise(FP8_SOURCE, "=r,=r,r", [values], dtype=tl.bfloat16, is_pure=True, pack=4)
    return wide


@triton.jit
def _dot(a, b, total):  # type: ignore[no-untyped-def]
    if _IS_INTERPRETED:
        # numpy has no bfloat16.
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def _load_squares(row_squares, num_rows, num_squares, BLOCK_M: tl.constexpr, SQUARES_BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    part = tl.arange(0, SQUARES_BLOCK)
    m = tl.arange(0, BLOCK_M)
    is_used = (part < num_squares)[:, None] & (m < num_rows)[None, :]
    return tl.load(row_squares + part[:, None] * num_rows + m[None, :], mask=is_used, other=0.0)


@triton.jit
def _finish(  # type: ignore[no-untyped-def]
    total,
    up_total,
    bias,
    residual,
    out,
    out_squares,
    partials,
    counters,
    num_rows,
    num_out,
    residual_stride,
    out_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT_K: tl.constexpr,
    IS_GATED: tl.constexpr,
):
    """Store a tile's sums, or if they are one split's, keep them for the tile's last program to add."""
    tile = tl.program_id(0)
    if SPLIT_K > 1:
        SIZE: tl.constexpr = BLOCK_N * BLOCK_M
        PART: tl.constexpr = SIZE * 2 if IS_GATED else SIZE
        cell = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        parts = partials + tile.to(tl.int64) * (SPLIT_K * PART) + cell
        tl.store(parts + tl.program_id(1) * PART, total)
        if IS_GATED:
            tl.store(parts + tl.program_id(1) * PART + SIZE, up_total)
        # The whole program has stored before one thread says so.
        tl.debug_barrier()
        if tl.atomic_add(counters + tile, 1, sem="acq_rel", scope="gpu") == SPLIT_K - 1:
            total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            up_total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for split in tl.static_range(SPLIT_K):
                # Around the L1 cache, which others' stores do not reach.
                total += tl.load(parts + split * PART, cache_modifier=".cg")
                if IS_GATED:
                    up_total += tl.load(parts + split * PART + SIZE, cache_modifier=".cg")
            tl.store(counters + tile, 0)
            _store(
                total,
                up_total,
                bias,
                residual,
                out,
                out_squares,
                num_rows,
                num_out,
                residual_stride,
                out_stride,
                BLOCK_M,
                BLOCK_N,
                IS_GATED,
            )
    else:
        _store(
            total,
            up_total,
            bias,
            residual,
            out,
            out_squares,
            num_rows,
            num_out,
            residual_stride,
            out_stride,
            BLOCK_M,
            BLOCK_N,
            IS_GATED,
        )


@triton.jit
def _store(  # type: ignore[no-untyped-def]
    total,
    up_total,
    bias,
    residual,
    out,
    out_squares,
    num_rows,
    num_out,
    residual_stride,
    out_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_GATED: tl.constexpr,
):
    tile = tl.program_id(0)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    is_used = (n < num_out)[:, None] & (m < num_rows)[None, :]
    if bias is not None:
        total += tl.load(bias + n, mask=n < num_out, other=0.0).to(tl.float32)[:, None]
        if IS_GATED:
            up_total += tl.load(bias + num_out + n, mask=n < num_out, other=0.0).to(tl.float32)[:, None]
    if IS_GATED:
        total = total * tl.sigmoid(total) * up_total
    if residual is not None:
        places = residual + m[None, :] * residual_stride + n[:, None]
        total += tl.load(places, mask=is_used, other=0.0).to(tl.float32)
    rounded = total.to(out.dtype.element_ty)
    tl.store(out + m[None, :] * out_stride + n[:, None], rounded, mask=is_used)
    if out_squares is not None:
        stored = tl.where(is_used, rounded.to(tl.float32), 0.0)
        tl.store(out_squares + tile * num_rows + m, tl.sum(stored * stored, axis=0), mask=m < num_rows)


# Four bytes' halves to four bfloat16: 0x43 and a half make 128 plus the half, from which 128 and the zero point go.
_UNPACK_HALVES = """
    shr.u32 bits, $2, %d;
    and.b32 bits, bits, 0x0F0F0F0F;
    mov.b32 offset, %s;
    mov.b32 offset_2, offset;"""
# Of a whole byte the seven low bits make 128 plus them, from which 128 go, or 256 if the eighth is set: minus 128 is
# 0xC300, minus 256 is 0xC380.
_UNPACK_BYTES = """
    and.b32 bits, $2, 0x80808080;
    prmt.b32 offset, bits, 0xC3C3C3C3, 0x4140;
    prmt.b32 offset_2, bits, 0xC3C3C3C3, 0x4342;
    and.b32 bits, $2, 0x7F7F7F7F;"""
_DEQUANTISE = """{
    .reg .b32 bits, low, high, one, offset, offset_2, minimum, minimum_2;%s
    prmt.b32 low, bits, 0x43434343, 0x4140;
    prmt.b32 high, bits, 0x43434343, 0x4342;
    mov.b32 one, 0x3F803F80;
    fma.rn.bf16x2 low, low, one, offset;
    fma.rn.bf16x2 high, high, one, offset_2;
    mov.b32 minimum, %s;
    mov.b32 minimum_2, %s;
    fma.rn.bf16x2 low, low, $3, minimum;
    fma.rn.bf16x2 high, high, $4, minimum_2;
    mov.b32 $0, low;
    mov.b32 $1, high;
}"""
# Minus 128, and minus the zero point too, twice in a register.
_OFFSETS = {0: "0xC300C300", 8: "0xC308C308"}
_NO_MINIMUM = "0x80008000"


def _dequantise_source(half: int, weight: GroupedWeight) -> str | None:
    """Write the assembly that makes bfloat16 of four bytes, their high halves if they are packed and `half` is 1; none
    where kernels are interpreted."""
    if _IS_INTERPRETED.value:
        return None
    is_packed = weight.values.dtype == torch.uint8
    unpack = _UNPACK_HALVES % (4 * half, _OFFSETS[weight.zero_point]) if is_packed else _UNPACK_BYTES
    minimums = ("$5", "$6") if weight.has_minimums else (_NO_MINIMUM, _NO_MINIMUM)
    return _DEQUANTISE % (unpack, *minimums)


@triton.jit
def _integers(stored, HALF: tl.constexpr, ZERO_POINT: tl.constexpr, IS_PACKED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Give bytes, or one half of each, less the zero point, as float32."""
    if IS_PACKED:
        half = stored >> 4 if HALF == 1 else stored & 15
        integers = half.to(tl.float32) - ZERO_POINT
    else:
        integers = stored.to(tl.float32)
    return integers


@triton.jit
def _scale_and_minimum(pair):  # type: ignore[no-untyped-def]
    """Split int32 pairs of float16, the scale in the low half."""
    scale = (pair & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    minimum = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return scale, minimum


@triton.jit(do_not_specialize=["num_rows", "num_squares"])
def _grouped_product(  # type: ignore[no-untyped-def]
    x,
    values,
    scales,
    row_squares,
    bias,
    residual,
    out,
    out_squares,
    partials,
    counters,
    num_rows,
    num_out,
    num_in,
    num_squares,
    x_stride,
    residual_stride,
    out_stride,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    IS_GATED: tl.constexpr,
    SQUARES_BLOCK: tl.constexpr,
    ARE_SQUARES_EARLY: tl.constexpr,
    HAS_PDL: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    ZERO_POINT: tl.constexpr,
    HAS_MINIMUMS: tl.constexpr,
    IS_PACKED: tl.constexpr,
    UNROLL: tl.constexpr,
    NUM_STEPS: tl.constexpr,
    IS_EVEN: tl.constexpr,
    LOW_SOURCE: tl.constexpr,
    HIGH_SOURCE: tl.constexpr,
):
    tile = tl.program_id(0)
    first = tl.program_id(1) * (NUM_STEPS * UNROLL)
    last = tl.minimum(first + NUM_STEPS * UNROLL, tl.cdiv(num_in, 64))
    n_total = num_out * (2 if IS_GATED else 1)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    k = tl.arange(0, 32)
    # Of 64 inputs of 4 bits, or 32 of 8.
    slab_size = n_total.to(tl.int64) * 32
    row = tl.minimum(n, num_out - 1)
    if HAS_PDL:
        tl.extra.cuda.gdc_wait()

    if SQUARES_BLOCK > 0 and ARE_SQUARES_EARLY:
        squares = _load_squares(row_squares, num_rows, num_squares, BLOCK_M, SQUARES_BLOCK)
    columns = x + m[None, :] * x_stride + k[:, None]
    has_row = (m < num_rows)[None, :] & (k < 32)[:, None]
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    up_total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in tl.range(0, NUM_STEPS, num_stages=NUM_STAGES):
        for i in tl.static_range(UNROLL):
            block = first + step * UNROLL + i
            for half in tl.static_range(2):
                at = block * 64 + half * 32
                if IS_EVEN:
                    inputs = tl.load(columns + at, mask=has_row, other=0.0)
                else:
                    has_input = (at + k < num_in)[:, None] & (block < last)
                    inputs = tl.load(columns + at, mask=has_row & has_input, other=0.0)
                weights = _load_group(
                    values,
                    scales,
                    row,
                    n_total,
                    slab_size,
                    block,
                    last,
                    half,
                    GROUP_SIZE,
                    ZERO_POINT,
                    HAS_MINIMUMS,
                    IS_PACKED,
                    IS_EVEN,
                    LOW_SOURCE,
                    HIGH_SOURCE,
                    x.dtype.element_ty,
                )
                total = _dot(weights, inputs, total)
                if IS_GATED:
                    weights = _load_group(
                        values,
                        scales,
                        num_out + row,
                        n_total,
                        slab_size,
                        block,
                        last,
                        half,
                        GROUP_SIZE,
                        ZERO_POINT,
                        HAS_MINIMUMS,
                        IS_PACKED,
                        IS_EVEN,
                        LOW_SOURCE,
                        HIGH_SOURCE,
                        x.dtype.element_ty,
                    )
                    up_total = _dot(weights, inputs, up_total)

    if HAS_PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if SQUARES_BLOCK > 0:
        if not ARE_SQUARES_EARLY:
            squares = _load_squares(row_squares, num_rows, num_squares, BLOCK_M, SQUARES_BLOCK)
        factor = tl.rsqrt(tl.sum(squares, axis=0) / num_in + eps)[None, :]
        total *= factor
        up_total *= factor
    _finish(
        total,
        up_total,
        bias,
        residual,
        out,
        out_squares,
        partials,
        counters,
        num_rows,
        num_out,
        residual_stride,
        out_stride,
        BLOCK_M,
        BLOCK_N,
        SPLIT_K,
        IS_GATED,
    )


@triton.jit
def _load_group(  # type: ignore[no-untyped-def]
    values,
    scales,
    row,
    n_total,
    slab_size,
    block,
    last,
    HALF: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    ZERO_POINT: tl.constexpr,
    HAS_MINIMUMS: tl.constexpr,
    IS_PACKED: tl.constexpr,
    IS_EVEN: tl.constexpr,
    LOW_SOURCE: tl.constexpr,
    HIGH_SOURCE: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Give half a block of weights as DTYPE; for bfloat16 scale and minimum are rounded to it first."""
    slab = block if IS_PACKED else block * 2 + HALF
    group = (block * 64 + HALF * 32) // GROUP_SIZE
    places = values + slab * slab_size + row[:, None] * 32 + tl.arange(0, 32)[None, :]
    pairs = scales + group.to(tl.int64) * n_total + row
    if IS_EVEN:
        stored = tl.load(places)
        pair = tl.load(pairs)
    else:
        is_inside = block < last
        stored = tl.load(places, mask=is_inside & (row >= 0)[:, None], other=0)
        pair = tl.load(pairs, mask=is_inside & (row >= 0), other=0)
    scale, minimum = _scale_and_minimum(pair)
    SOURCE: tl.constexpr = HIGH_SOURCE if HALF == 1 else LOW_SOURCE
    if SOURCE is None or tl.bfloat16 != DTYPE:
        weights = _integers(stored, HALF, ZERO_POINT, IS_PACKED) * scale[:, None]
        if HAS_MINIMUMS:
            weights += minimum[:, None]
        weights = weights.to(DTYPE)
    elif HAS_MINIMUMS:
        with_minimum = (stored, scale.to(tl.bfloat16)[:, None], minimum.to(tl.bfloat16)[:, None])
        weights = tl.inline_asm_elementwise(
            SOURCE, "=r,=r,r,r,r,r,r", with_minimum, dtype=tl.bfloat16, is_pure=True, pack=4
        )
    else:
        with_scale = (stored, scale.to(tl.bfloat16)[:, None])
        weights = tl.inline_asm_elementwise(SOURCE, "=r,=r,r,r,r", with_scale, dtype=tl.bfloat16, is_pure=True, pack=4)
    return weights


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """Root-mean-square norm over the last axis. x [..., E], weight [E], ones where it is None -> like x."""
    width = x.shape[-1]
    rows = x.reshape(-1, width)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch_row_kernel(_rms_norm, rows, weight, out, len(rows), width, rows.stride(0), eps)
    return out


def sum_squares(x: torch.Tensor) -> torch.Tensor:
    """Sum the squares of rows. x [M, K] -> float32 [1, M], as `linear` takes them."""
    num_rows, width = x.shape
    assert x.stride(1) == 1, "rows whose numbers are not side by side"
    out = torch.empty(1, num_rows, dtype=torch.float32, device=x.device)
    _launch_row_kernel(_sum_squares, x, out, num_rows, width, x.stride(0))
    return out


def _launch_row_kernel(kernel: Any, rows: torch.Tensor, *args: Any) -> None:
    block = triton.next_power_of_2(rows.shape[-1])
    block_rows = max(1, 1024 // block)
    if len(rows) == 0:
        return
    kernel[(triton.cdiv(len(rows), block_rows),)](
        rows,
        *args,
        BLOCK_ROWS=block_rows,
        BLOCK=block,
        num_warps=4 if block <= 2048 else 8,
        **launch_options(rows.device),
    )


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm(  # type: ignore[no-untyped-def]
    x,
    weight,
    out,
    num_rows,
    width,
    x_stride,
    eps,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_PDL: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS).to(tl.int64)
    column = tl.arange(0, BLOCK)
    is_used = (row < num_rows)[:, None] & (column < width)[None, :]
    factor = tl.full((BLOCK,), 1.0, tl.float32)
    if weight is not None:
        factor = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    if HAS_PDL:
        tl.extra.cuda.gdc_wait()
    values = tl.load(x + row[:, None] * x_stride + column[None, :], mask=is_used, other=0.0).to(tl.float32)
    if HAS_PDL:
        tl.extra.cuda.gdc_launch_dependents()
    mean = tl.sum(values * values, axis=1) / width
    values = values * tl.rsqrt(mean + eps)[:, None] * factor[None, :]
    tl.store(out + row[:, None] * width + column[None, :], values.to(out.dtype.element_ty), mask=is_used)


@triton.jit(do_not_specialize=["num_rows"])
def _sum_squares(  # type: ignore[no-untyped-def]
    x, out, num_rows, width, x_stride, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr, HAS_PDL: tl.constexpr
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS).to(tl.int64)
    column = tl.arange(0, BLOCK)
    is_used = (row < num_rows)[:, None] & (column < width)[None, :]
    if HAS_PDL:
        tl.extra.cuda.gdc_wait()
    values = tl.load(x + row[:, None] * x_stride + column[None, :], mask=is_used, other=0.0).to(tl.float32)
    if HAS_PDL:
        tl.extra.cuda.gdc_launch_dependents()
    tl.store(out + row, tl.sum(values * values, axis=1), mask=row < num_rows)


def quantise_rows(x: torch.Tensor) -> Fp8Weight:
    """As `quantise_fp8`, of activations [M, K] and in one launch."""
    num_rows, width = x.shape
    assert x.stride(1) == 1, "rows whose numbers are not side by side"
    values = torch.empty(num_rows, width, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    _launch_row_kernel(_quantise_rows, x, values, scales, num_rows, width, x.stride(0))
    return Fp8Weight(values, scales)


@triton.jit(do_not_specialize=["num_rows"])
def _quantise_rows(  # type: ignore[no-untyped-def]
    x, values, scales, num_rows, width, x_stride, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr, HAS_PDL: tl.constexpr
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS).to(tl.int64)
    column = tl.arange(0, BLOCK)
    is_used = (row < num_rows)[:, None] & (column < width)[None, :]
    if HAS_PDL:
        tl.extra.cuda.gdc_wait()
    wide = tl.load(x + row[:, None] * x_stride + column[None, :], mask=is_used, other=0.0).to(tl.float32)
    if HAS_PDL:
        tl.extra.cuda.gdc_launch_dependents()
    scale = tl.maximum(tl.max(tl.abs(wide), axis=1), 1e-12) / FP8_MAX
    rounded = tl.clamp(tl.div_rn(wide, scale[:, None]), -FP8_MAX, FP8_MAX, propagate_nan=tl.PropagateNan.ALL)
    tl.store(values + row[:, None] * width + column[None, :], rounded.to(values.dtype.element_ty), mask=is_used)
    tl.store(scales + row, scale, mask=row < num_rows)


def quantise_fp8(weight: torch.Tensor) -> Fp8Weight:
    """Round a weight [N, K] to 8-bit floats, each row scaled to their range."""
    largest = torch.finfo(torch.float8_e4m3fn).max
    scales = weight.abs().amax(dim=1).float().clamp(min=1e-12) / largest
    values = (weight.float() / scales[:, None]).clamp(-largest, largest).to(torch.float8_e4m3fn)
    return Fp8Weight(values, scales)


def pack_gguf(weight: QuantisedWeight, device: torch.device | None = None) -> GroupedWeight:
    """Repack a GGUF's weight for `linear`."""
    num_out, num_in = weight.shape
    num_groups = num_in // GROUP_SIZE
    groups = np.ascontiguousarray(weight.rows).reshape(num_out, num_groups, GROUP_BYTES[weight.type_name])
    scales = torch.from_numpy(groups[..., :2].copy().view(np.float16)[..., 0])
    if weight.type_name == "Q8_0":
        integers = torch.from_numpy(groups[..., 2:].copy().view(np.int8)).reshape(num_out, num_in)
        return pack_groups(integers, scales, GROUP_SIZE, device=device)
    minimums, zero_point = None, 8
    if weight.type_name == "Q4_1":
        minimums, zero_point = torch.from_numpy(groups[..., 2:4].copy().view(np.float16)[..., 0]), 0
    halves = torch.from_numpy(groups[..., -GROUP_SIZE // 2 :].copy())
    integers = torch.cat((halves & 15, halves >> 4), dim=-1).reshape(num_out, num_in)
    return pack_groups(integers, scales, GROUP_SIZE, minimums=minimums, zero_point=zero_point, device=device)


def pack_groups(
    integers: torch.Tensor,
    scales: torch.Tensor,
    group_size: int,
    *,
    minimums: torch.Tensor | None = None,
    zero_point: int = 0,
    device: torch.device | None = None,
) -> GroupedWeight:
    """Pack integers [N, K], uint8 of 4 bits or int8, whose groups of consecutive inputs have scales and minimums
    [N, groups] of their own. `group_size` is a multiple of 32, `zero_point` 0 or 8."""
    assert group_size % _HALF_BLOCK == 0, "a group that shares a half block"
    assert zero_point in _OFFSETS, "a zero point that is not unpacked"
    assert zero_point == 0 or integers.dtype == torch.uint8, "a zero point of signed integers"
    num_out, num_in = integers.shape
    num_blocks = -(-num_in // _PACKED_BLOCK)
    num_groups = -(-num_blocks * _PACKED_BLOCK // group_size)
    halves = integers.new_zeros(num_out, num_blocks * _PACKED_BLOCK)
    halves[:, :num_in] = integers
    halves = halves.view(num_out, 2 * num_blocks, _HALF_BLOCK)
    if integers.dtype == torch.uint8:
        halves = halves[:, ::2] | halves[:, 1::2] << 4
    pairs = torch.zeros(num_groups, num_out, 2, dtype=torch.float16)
    pairs[: scales.shape[1], :, 0] = scales.T
    if minimums is not None:
        pairs[: scales.shape[1], :, 1] = minimums.T
    values = halves.transpose(0, 1).contiguous()
    return GroupedWeight(values.to(device), pairs.to(device), num_in, group_size, zero_point, minimums is not None)


def dequantise(weight: Weight, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Give a weight as numbers [N, K] (a plain one as it is), for a product of many rows."""
    if isinstance(weight, torch.Tensor):
        return weight
    num_out, num_in = weight.shape
    if isinstance(weight, Fp8Weight):
        out = torch.empty(num_out, num_in, dtype=dtype, device=weight.values.device)
        _dequantise_fp8[(num_out, triton.cdiv(num_in, 2048))](
            weight.values, weight.scales, out, num_in, weight.values.stride(0), BLOCK=2048, num_warps=4
        )
        return out
    out = torch.empty(num_out, num_in, dtype=dtype, device=weight.values.device)
    _dequantise_groups[(triton.cdiv(num_in, _PACKED_BLOCK), triton.cdiv(num_out, 64))](
        weight.values,
        weight.scales,
        out,
        num_out,
        num_in,
        GROUP_SIZE=weight.group_size,
        ZERO_POINT=weight.zero_point,
        IS_PACKED=weight.values.dtype == torch.uint8,
        BLOCK_N=64,
        num_warps=4,
    )
    return out


@triton.jit
def _dequantise_fp8(values, scales, out, num_in, stride, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    wide = tl.load(values + row * stride + column, mask=column < num_in, other=0.0).to(tl.float32)
    scaled = wide * tl.load(scales + row)
    tl.store(out + row * num_in + column, scaled.to(out.dtype.element_ty), mask=column < num_in)


@triton.jit
def _dequantise_groups(  # type: ignore[no-untyped-def]
    values,
    scales,
    out,
    num_out,
    num_in,
    GROUP_SIZE: tl.constexpr,
    ZERO_POINT: tl.constexpr,
    IS_PACKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, 32)
    has_row = n < num_out
    for half in tl.static_range(2):
        at = block * 64 + half * 32
        slab = block if IS_PACKED else block * 2 + half
        places = values + (slab * num_out + n)[:, None] * 32 + k[None, :]
        stored = tl.load(places, mask=has_row[:, None] & (k < 32)[None, :], other=0)
        integers = _integers(stored, half, ZERO_POINT, IS_PACKED)
        pairs = scales + (at // GROUP_SIZE * num_out + n) * 2
        scale = tl.load(pairs, mask=has_row, other=0.0).to(tl.float32)
        minimum = tl.load(pairs + 1, mask=has_row, other=0.0).to(tl.float32)
        wide = integers * scale[:, None] + minimum[:, None]
        cells = out + n.to(tl.int64)[:, None] * num_in + at + k[None, :]
        tl.store(cells, wide.to(out.dtype.element_ty), mask=has_row[:, None] & (at + k < num_in)[None, :])
