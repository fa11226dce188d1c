"""Paged attention on the GPU in Triton: the packed batch's query tokens over the paged cache, causal.

Sequences with one query token go through split-K decoding (Flash-Decoding; Dao et al., 2023), all others through tiles
of queries (FlashAttention-2; Dao, 2023; tiles of several sequences in one grid as in vLLM's unified attention), both
over PagedAttention's block tables (Kwon et al., SOSP 2023). Deviations: the query heads of a key/value head are rows of
one tile, so that keys and values are read once for all of them; the last split to finish merges all, in their order, so
that equal inputs give equal bits. A launch depends on host integers of the plan only, everything else is read on the
device: a step captured in a CUDA graph serves any batch that fits.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from headrace.kernels.ops import AttentionMetadata
from headrace.kernels.triton_launch import counters, launch_options, num_sms

_LOG2_E = 1.4426950408889634
# Of products of float32, the only ones that it concerns.
_PRECISION = tl.constexpr("tf32x3")
_IS_INTERPRETED = triton.knobs.runtime.interpret


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Where the packed batch's sequences lie, on the device.

    query_starts int32 [B + 1]; context_lens int32 [B], the query tokens included; block_tables int32 [tables, blocks];
    table_rows int32 [B], which of the tables is a sequence's. `max_num_tokens` bounds query_starts[B]. Without
    `has_prefill` no sequence has more than one query token. A sequence that only pads the batch has no query tokens.
    """

    query_starts: torch.Tensor
    context_lens: torch.Tensor
    block_tables: torch.Tensor
    table_rows: torch.Tensor
    max_num_tokens: int
    has_prefill: bool


def plan_attention(metadata: AttentionMetadata, block_size: int, device: torch.device) -> AttentionPlan:
    del block_size
    starts = metadata.query_starts
    num_seqs = len(metadata.context_lens)
    return AttentionPlan(
        torch.tensor(starts, dtype=torch.int32, device=device),
        torch.tensor(metadata.context_lens, dtype=torch.int32, device=device),
        metadata.padded_tables(device),
        torch.arange(num_seqs, dtype=torch.int32, device=device),
        starts[-1],
        any(starts[b + 1] - starts[b] > 1 for b in range(num_seqs)),
    )


@dataclass(frozen=True, slots=True)
class _Tiling:
    """A kernel's tile, `block_m` query rows by `block_n` tokens, and how many warps and load stages it has."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def _decode_tiling(group_size: int, head_dim: int, cache_bytes: int) -> _Tiling:
    """Choose tiles whose keys take 8 KiB: three or four programs fit an SM then, each with the next tiles in flight."""
    block_m, block_d = max(16, triton.next_power_of_2(group_size)), triton.next_power_of_2(head_dim)
    block_n = 8192 // (block_d * cache_bytes)
    block_n = max(16, min(block_n, 2 * block_d, 2048 // block_m))
    return _Tiling(block_m, block_n, 4, 4 if cache_bytes == 1 else 3)


def _prefill_tiling(group_size: int, head_dim: int, element_bytes: int) -> _Tiling:
    """Choose tiles of 128 rows, whose products fill the tensor cores; float32 is for small models and tests."""
    block_m = triton.next_power_of_2(group_size)
    if element_bytes == 4:
        return _Tiling(max(64, block_m), 32 if head_dim <= 128 else 16, 8, 2)
    return _Tiling(max(128, block_m), 64, 8, 3 if head_dim <= 128 else 2)


def _operand_type(dtype: torch.dtype, cache_dtype: torch.dtype) -> tl.dtype:
    """What queries, keys and values are converted to before they are multiplied."""
    if cache_dtype == torch.float8_e4m3fn and dtype != torch.float32:
        return tl.float16  # to which there is an instruction
    # Triton's interpreter has no products of bfloat16.
    if _IS_INTERPRETED and dtype == torch.bfloat16:
        return tl.float32
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


def _choose_num_splits(num_programs: int, max_num_tokens: int, block_n: int, num_sms: int) -> int:
    """Split contexts until each SM has the three programs that fit it.

    A third of them in flight saturates the memory, so that an uneven last wave costs little; a split costs the merge.
    """
    return max(1, min(3 * num_sms // num_programs, -(-max_num_tokens // block_n)))


def _num_partials(num_elements: int, num_warps: int) -> int:
    """How many splits' outputs are read at a time: 64 numbers a thread, as many as the registers hold easily."""
    return max(1, min(32, 64 * 32 * num_warps // num_elements))


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    plan: AttentionPlan,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """As `Ops` says: q [T, H, D], its tokens any stride apart, caches [N, S, G, D] -> [T, H, D].

    Caches in q's dtype, in float8_e4m3fn, or in int8 with `scales` float32 [N, S, G] of keys and values. Rows behind
    the last query token are left as they are. Splits count their arrivals in memory that all calls on the device share:
    one stream, and a first call before any is captured in a CUDA graph.
    """
    return _attend(q, k_cache, v_cache, plan, scale, window, softcap, sinks, scales)


def _attend(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    plan: AttentionPlan,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    scales: tuple[torch.Tensor, torch.Tensor] | None,
    num_splits: int | None = None,
    decode_tiling: _Tiling | None = None,
    prefill_tiling: _Tiling | None = None,
) -> torch.Tensor:
    """`paged_attention` with everything that is chosen by shape open to override, for tests and measurements."""
    num_tokens, num_heads, head_dim = q.shape
    block_size, num_kv_heads = k_cache.shape[1:3]
    group_size = num_heads // num_kv_heads
    num_seqs = len(plan.context_lens)
    assert scale > 0
    assert q.stride()[1:] == (head_dim, 1)
    assert block_size.bit_count() == 1
    assert k_cache[0].is_contiguous()
    assert k_cache.stride() == v_cache.stride()
    assert scales is None or all(each.is_contiguous() for each in scales)
    out = torch.empty((num_tokens, num_heads, head_dim), dtype=q.dtype, device=q.device)
    if not num_tokens:
        return out
    key_scales, value_scales = (None, None) if scales is None else scales
    is_paired = k_cache.element_size() == 1
    values = v_cache.view(torch.int16) if is_paired else v_cache
    arguments: tuple[Any, ...] = (
        *(key_scales, value_scales, sinks, out),
        *(plan.query_starts, plan.context_lens, plan.block_tables, plan.table_rows),
        *(q.stride(0), k_cache.stride(0), plan.block_tables.stride(0), scale * _LOG2_E, softcap or 0.0),
    )
    shape: dict[str, Any] = {
        "H": num_heads,
        "G": num_kv_heads,
        "D": head_dim,
        "LOG_S": block_size.bit_length() - 1,
        "BLOCK_D": max(32 if is_paired else 16, triton.next_power_of_2(head_dim)),
        "WINDOW": window,
        "HAS_SOFTCAP": softcap is not None,
        "OPERAND": _operand_type(q.dtype, k_cache.dtype),
        "GROUP": triton.next_power_of_2(group_size),
        **launch_options(q.device),
    }

    tiling = decode_tiling or _decode_tiling(group_size, head_dim, k_cache.element_size())
    if num_splits is None:
        longest = plan.block_tables.shape[1] * block_size
        longest = longest if window is None else min(longest, window)
        num_splits = _choose_num_splits(num_seqs * num_kv_heads, longest, tiling.block_n, num_sms(q.device))
    partial = lse = arrivals = None
    if num_splits > 1:
        arrivals = counters(q.device)
        assert num_seqs * num_kv_heads <= len(arrivals), "more sequences' heads than counters"
        partial = torch.empty((num_seqs, num_heads, num_splits, head_dim), dtype=torch.float32, device=q.device)
        lse = torch.empty((num_seqs, num_heads, num_splits), dtype=torch.float32, device=q.device)
    _decode[(num_kv_heads, num_splits, num_seqs)](
        *(q, k_cache, values, *arguments),
        partial,
        lse,
        arrivals,
        num_splits,
        **shape,
        BLOCK_M=tiling.block_m,
        BLOCK_N=tiling.block_n,
        NUM_PARTIALS=_num_partials(shape["GROUP"] * shape["BLOCK_D"], tiling.num_warps),
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
    )

    if plan.has_prefill:
        tiling = prefill_tiling or _prefill_tiling(group_size, head_dim, q.element_size())
        block_q = tiling.block_m // shape["GROUP"]
        _prefill[(num_kv_heads, plan.max_num_tokens // block_q + num_seqs)](
            *(q, k_cache, v_cache, *arguments),
            num_seqs,
            **shape,
            BLOCK_M=tiling.block_m,
            BLOCK_N=tiling.block_n,
            num_warps=tiling.num_warps,
            num_stages=tiling.num_stages,
        )
    return out


@triton.jit
def _bound(scores, scale, softcap):  # type: ignore[no-untyped-def]
    """softcap * tanh(scores / softcap) of the scaled scores, in units of log 2 as `scale` is, so that exp2 serves."""
    # tanh(x) = 1 - 2 / (exp(2 x) + 1), right at both infinities.
    return (1.0 - 2.0 / (tl.exp2(scores * (scale * 2.0 / softcap)) + 1.0)) * (softcap * 1.4426950408889634)


@triton.jit(do_not_specialize=["num_splits"])
def _decode(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    v_ptr,
    k_scales_ptr,
    v_scales_ptr,
    sinks_ptr,
    out_ptr,
    query_starts_ptr,
    context_lens_ptr,
    block_tables_ptr,
    table_rows_ptr,
    q_stride,
    block_stride,
    table_stride,
    scale,
    softcap,
    partial_ptr,
    lse_ptr,
    counters_ptr,
    num_splits,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    LOG_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    OPERAND: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_PDL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_PARTIALS: tl.constexpr,
):
    """One split of the context of one sequence's only query token, for the query heads of one key/value head.

    Values of 8 bits come in pairs, as int16 [N, S, G, D / 2]: a warp's shared-memory reads that transpose are of 16
    bits, and bytes would be read one by one.
    """
    IS_PAIRED: tl.constexpr = k_ptr.dtype.element_ty.primitive_bitwidth == 8
    PER_VALUE: tl.constexpr = 2 if IS_PAIRED else 1
    if HAS_PDL:
        # Every program waits, also one with nothing to do: the next kernel takes this one's end for that of all before.
        tl.extra.cuda.gdc_wait()
    # Neighbouring programs read the neighbouring heads of the same tokens.
    group = tl.program_id(0)
    split = tl.program_id(1)
    seq = tl.program_id(2)
    row = tl.load(query_starts_ptr + seq)
    num_query = tl.load(query_starts_ptr + seq + 1) - row
    context_len = tl.load(context_lens_ptr + seq)
    table_ptr = block_tables_ptr + tl.load(table_rows_ptr + seq).to(tl.int64) * table_stride
    first = 0
    if WINDOW is not None:
        first = tl.maximum(context_len - WINDOW, 0)
    split_len = tl.cdiv(tl.cdiv(context_len - first, num_splits), BLOCK_N) * BLOCK_N
    begin = first + split * split_len
    end = tl.minimum(begin + split_len, context_len)
    # One condition, so that all that it depends on is loaded at once.
    if (num_query != 1) | (begin >= end):
        return

    members = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    heads = group * (H // G) + members
    mask = (members < H // G)[:, None] & (dims < D)[None, :]
    place = heads[:, None] * D + dims[None, :]
    q = tl.load(q_ptr + row.to(tl.int64) * q_stride + place, mask=mask, other=0.0).to(OPERAND)
    # Finite, so that there is a difference to it.
    highest = tl.full((BLOCK_M,), -1.0e30, tl.float32)
    # Summed over the tokens of a tile in the end only: they are spread over the warps.
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D // PER_VALUE), tl.float32)
    acc_high = acc
    value_dims = tl.arange(0, BLOCK_D // PER_VALUE)
    # Scaled after the maximum: the product is then fused into the difference to it.
    factor = 1.0 if HAS_SOFTCAP else scale
    tokens = begin + tl.arange(0, BLOCK_N)
    blocks = tl.load(table_ptr + (tokens >> LOG_S), mask=tokens < end, other=0)
    for start in tl.range(begin, end, BLOCK_N):
        tokens = start + tl.arange(0, BLOCK_N)
        is_read = tokens < end
        slots = tokens & ((1 << LOG_S) - 1)
        offsets = blocks.to(tl.int64) * block_stride + slots * (G * D) + group * D
        k_places = k_ptr + offsets[:, None] + dims[None, :]
        v_places = v_ptr + (offsets >> (PER_VALUE - 1))[:, None] + value_dims[None, :]
        # What lies beyond the context may be another's, even infinite: it must not be multiplied by a weight of 0.
        if BLOCK_D == D:
            k = tl.load(k_places, mask=is_read[:, None], other=0.0)
            v = tl.load(v_places, mask=is_read[:, None], other=0.0)
        else:
            k = tl.load(k_places, mask=is_read[:, None] & (dims < D)[None, :], other=0.0)
            v = tl.load(v_places, mask=is_read[:, None] & (value_dims < D // PER_VALUE)[None, :], other=0.0)
        scores = tl.dot(q, k.to(OPERAND).T, input_precision=_PRECISION)
        if k_scales_ptr is not None:
            scale_offsets = ((blocks.to(tl.int64) << LOG_S) + slots) * G + group
            scores *= tl.load(k_scales_ptr + scale_offsets, mask=is_read, other=0.0)[None, :]
        if HAS_SOFTCAP:
            scores = _bound(scores, scale, softcap)
        scores = tl.where(is_read[None, :], scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1) * factor)
        weights = tl.exp2(scores * factor - new_highest[:, None])
        decay = tl.exp2(highest - new_highest)[:, None]
        highest = new_highest
        total = total * decay + weights
        if v_scales_ptr is not None:
            weights *= tl.load(v_scales_ptr + scale_offsets, mask=is_read, other=0.0)[None, :]
        if IS_PAIRED:
            low = v.to(tl.int8).to(k.dtype, bitcast=True).to(OPERAND)
            high = (v >> 8).to(tl.int8).to(k.dtype, bitcast=True).to(OPERAND)
            acc = tl.dot(weights.to(OPERAND), low, acc * decay, input_precision=_PRECISION)
            acc_high = tl.dot(weights.to(OPERAND), high, acc_high * decay, input_precision=_PRECISION)
        else:
            acc = tl.dot(weights.to(OPERAND), v.to(OPERAND), acc * decay, input_precision=_PRECISION)
        # Read an iteration ahead: keys and values can then be loaded as many iterations ahead as there are stages.
        blocks = tl.load(table_ptr + ((tokens + BLOCK_N) >> LOG_S), mask=tokens + BLOCK_N < end, other=0)

    if HAS_PDL:
        tl.extra.cuda.gdc_launch_dependents()
    out = tl.interleave(acc, acc_high) if IS_PAIRED else acc
    total = tl.sum(total, 1)
    if partial_ptr is None:
        if sinks_ptr is not None:
            sinks = tl.load(sinks_ptr + heads, mask=members < H // G, other=0.0).to(tl.float32)
            total += tl.exp2(sinks * 1.4426950408889634 - highest)
        out = out / total[:, None]
        tl.store(out_ptr + row.to(tl.int64) * (H * D) + place, out.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        parts = (seq * H + heads).to(tl.int64) * num_splits + split
        tl.store(partial_ptr + parts[:, None] * D + dims[None, :], out / total[:, None], mask=mask)
        tl.store(lse_ptr + parts, highest + tl.log2(total), mask=members < H // G)
        # The whole program has stored before one thread says so.
        tl.debug_barrier()
        counter = counters_ptr + seq * G + group
        num_used = tl.cdiv(context_len - first, split_len)
        if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == num_used - 1:
            tl.store(counter, 0)
            _merge(
                partial_ptr,
                lse_ptr,
                sinks_ptr,
                out_ptr,
                row,
                seq,
                group,
                num_splits,
                num_used,
                H,
                G,
                D,
                BLOCK_D,
                GROUP,
                NUM_PARTIALS,
            )


@triton.jit
def _merge(  # type: ignore[no-untyped-def]
    partial_ptr,
    lse_ptr,
    sinks_ptr,
    out_ptr,
    row,
    seq,
    group,
    num_splits,
    num_used,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    NUM_PARTIALS: tl.constexpr,
):
    """Join the splits of a key/value head's query heads by their sums of exponentials, NUM_PARTIALS at a time."""
    members = tl.arange(0, GROUP)
    dims = tl.arange(0, BLOCK_D)
    heads = group * (H // G) + members
    mask = (members < H // G)[:, None] & (dims < D)[None, :]
    slots = (seq * H + heads).to(tl.int64) * num_splits
    acc = tl.zeros((GROUP, BLOCK_D), tl.float32)
    total = tl.zeros((GROUP,), tl.float32)
    highest = tl.full((GROUP,), -1.0e30, tl.float32)
    for start in tl.range(0, num_used, NUM_PARTIALS):
        splits = start + tl.arange(0, NUM_PARTIALS)
        is_used = splits < num_used
        parts = slots[:, None] + splits[None, :]
        # Around the L1 cache, which others' stores do not reach.
        is_read = (members < H // G)[:, None] & is_used[None, :]
        lse = tl.load(lse_ptr + parts, mask=is_read, other=float("-inf"), cache_modifier=".cg")
        place = partial_ptr + parts[:, :, None] * D + dims[None, None, :]
        partial = tl.load(place, mask=mask[:, None, :] & is_used[None, :, None], other=0.0, cache_modifier=".cg")
        new_highest = tl.maximum(highest, tl.max(lse, 1))
        weights = tl.exp2(lse - new_highest[:, None])
        decay = tl.exp2(highest - new_highest)
        total = total * decay + tl.sum(weights, 1)
        acc = acc * decay[:, None] + tl.sum(weights[:, :, None] * partial, 1)
        highest = new_highest
    if sinks_ptr is not None:
        sinks = tl.load(sinks_ptr + heads, mask=members < H // G, other=float("-inf")).to(tl.float32)
        total += tl.exp2(sinks * 1.4426950408889634 - highest)
    # A row of padding has no splits.
    out = (acc / tl.maximum(total, 1.0e-30)[:, None]).to(out_ptr.dtype.element_ty)
    place = out_ptr + row.to(tl.int64) * (H * D) + heads[:, None] * D + dims[None, :]
    tl.store(place, out, mask=mask)


@triton.jit
def _attend_tiles(  # type: ignore[no-untyped-def]
    acc,
    total,
    highest,
    q,
    k_ptr,
    v_ptr,
    k_scales_ptr,
    v_scales_ptr,
    table_ptr,
    block_stride,
    group,
    begin,
    end,
    positions,
    scale,
    softcap,
    G: tl.constexpr,
    D: tl.constexpr,
    LOG_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    IS_MASKED: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """Add tokens begin : end to the softmax of each query row, kept as its sum and maximum (online softmax).

    Nothing is read beyond `end` if IS_MASKED, else it is whole tiles from `begin`, seen by every row.
    """
    dims = tl.arange(0, BLOCK_D)
    factor = 1.0 if HAS_SOFTCAP else scale
    tokens = begin + tl.arange(0, BLOCK_N)
    blocks = tl.load(table_ptr + (tokens >> LOG_S), mask=tokens < end, other=0)
    for start in tl.range(begin, end, BLOCK_N):
        tokens = start + tl.arange(0, BLOCK_N)
        is_read = tokens < end
        slots = tokens & ((1 << LOG_S) - 1)
        offsets = blocks.to(tl.int64) * block_stride + slots * (G * D) + group * D
        offsets = offsets[:, None] + dims[None, :]
        if IS_MASKED and BLOCK_D != D:
            mask = is_read[:, None] & (dims < D)[None, :]
            k = tl.load(k_ptr + offsets, mask=mask, other=0.0)
            v = tl.load(v_ptr + offsets, mask=mask, other=0.0)
        elif IS_MASKED:
            k = tl.load(k_ptr + offsets, mask=is_read[:, None], other=0.0)
            v = tl.load(v_ptr + offsets, mask=is_read[:, None], other=0.0)
        elif BLOCK_D != D:
            k = tl.load(k_ptr + offsets, mask=(dims < D)[None, :], other=0.0)
            v = tl.load(v_ptr + offsets, mask=(dims < D)[None, :], other=0.0)
        else:
            k = tl.load(k_ptr + offsets)
            v = tl.load(v_ptr + offsets)
        scores = tl.dot(q, k.to(OPERAND).T, input_precision=_PRECISION)
        if k_scales_ptr is not None:
            scale_offsets = ((blocks.to(tl.int64) << LOG_S) + slots) * G + group
            if IS_MASKED:
                k_scales = tl.load(k_scales_ptr + scale_offsets, mask=is_read, other=0.0)
                v_scales = tl.load(v_scales_ptr + scale_offsets, mask=is_read, other=0.0)
            else:
                k_scales = tl.load(k_scales_ptr + scale_offsets)
                v_scales = tl.load(v_scales_ptr + scale_offsets)
            scores *= k_scales[None, :]
        if HAS_SOFTCAP:
            scores = _bound(scores, scale, softcap)
        if IS_MASKED:
            is_seen = tokens[None, :] <= positions[:, None]
            if WINDOW is not None:
                is_seen &= tokens[None, :] > positions[:, None] - WINDOW
            scores = tl.where(is_seen, scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1) * factor)
        weights = tl.exp2(scores * factor - new_highest[:, None])
        decay = tl.exp2(highest - new_highest)
        total = total * decay + tl.sum(weights, 1)
        highest = new_highest
        if v_scales_ptr is not None:
            weights *= v_scales[None, :]
        acc = tl.dot(weights.to(OPERAND), v.to(OPERAND), acc * decay[:, None], input_precision=_PRECISION)
        # An iteration ahead, as in `_decode`.
        blocks = tl.load(table_ptr + ((tokens + BLOCK_N) >> LOG_S), mask=tokens + BLOCK_N < end, other=0)
    return acc, total, highest


@triton.jit(do_not_specialize=["num_seqs"])
def _prefill(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    v_ptr,
    k_scales_ptr,
    v_scales_ptr,
    sinks_ptr,
    out_ptr,
    query_starts_ptr,
    context_lens_ptr,
    block_tables_ptr,
    table_rows_ptr,
    q_stride,
    block_stride,
    table_stride,
    scale,
    softcap,
    num_seqs,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    LOG_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    OPERAND: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_PDL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A tile of one sequence's query tokens with the query heads of one key/value head, GROUP rows to a token."""
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    if HAS_PDL:
        # As in `_decode`.
        tl.extra.cuda.gdc_wait()
    group = tl.program_id(0)
    # The last tiles of a prompt see the most: they start first, so that the short ones fill the end.
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    # Sequence b has the tiles from query_starts[b] // BLOCK_Q + b on: enough for it whatever its neighbours, and a
    # number that the device finds by itself.
    seq = -1
    for start in range(0, num_seqs, 256):
        seqs = start + tl.arange(0, 256)
        starts = tl.load(query_starts_ptr + seqs, mask=seqs < num_seqs, other=0)
        seq += tl.sum(((starts // BLOCK_Q + seqs <= tile) & (seqs < num_seqs)).to(tl.int32), 0)
    query_start = tl.load(query_starts_ptr + seq)
    num_query = tl.load(query_starts_ptr + seq + 1) - query_start
    tile_start = (tile - (query_start // BLOCK_Q + seq)) * BLOCK_Q
    if (num_query <= 1) | (tile_start >= num_query):
        return
    context_len = tl.load(context_lens_ptr + seq)
    table_ptr = block_tables_ptr + tl.load(table_rows_ptr + seq).to(tl.int64) * table_stride

    rows = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    queries = tile_start + rows // GROUP
    members = rows % GROUP
    heads = group * (H // G) + members
    is_row = (queries < num_query) & (members < H // G)
    mask = is_row[:, None] & (dims < D)[None, :]
    tokens = (query_start + queries).to(tl.int64)
    place = heads[:, None] * D + dims[None, :]
    q = tl.load(q_ptr + tokens[:, None] * q_stride + place, mask=mask, other=0.0).to(OPERAND)

    first_position = context_len - num_query + tile_start
    positions = first_position + rows // GROUP
    end = tl.minimum(first_position + BLOCK_Q, context_len)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    # Finite, so that a row that has seen nothing yet has a difference to it.
    highest = tl.full((BLOCK_M,), -1.0e30, tl.float32)
    if WINDOW is None:
        begin = (first_position + 1) // BLOCK_N * BLOCK_N
        acc, total, highest = _attend_tiles(
            acc,
            total,
            highest,
            q,
            k_ptr,
            v_ptr,
            k_scales_ptr,
            v_scales_ptr,
            table_ptr,
            block_stride,
            group,
            0,
            begin,
            positions,
            scale,
            softcap,
            G,
            D,
            LOG_S,
            BLOCK_D,
            BLOCK_N,
            WINDOW,
            HAS_SOFTCAP,
            False,
            OPERAND,
        )
    else:
        begin = tl.maximum(first_position + 1 - WINDOW, 0) // BLOCK_N * BLOCK_N
    acc, total, highest = _attend_tiles(
        acc,
        total,
        highest,
        q,
        k_ptr,
        v_ptr,
        k_scales_ptr,
        v_scales_ptr,
        table_ptr,
        block_stride,
        group,
        begin,
        end,
        positions,
        scale,
        softcap,
        G,
        D,
        LOG_S,
        BLOCK_D,
        BLOCK_N,
        WINDOW,
        HAS_SOFTCAP,
        True,
        OPERAND,
    )
    if HAS_PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if sinks_ptr is not None:
        sinks = tl.load(sinks_ptr + heads, mask=members < H // G, other=0.0).to(tl.float32)
        total += tl.exp2(sinks * 1.4426950408889634 - highest)
    # A row of padding may have seen nothing.
    out = (acc / tl.maximum(total, 1.0e-30)[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + tokens[:, None] * (H * D) + place, out, mask=mask)
