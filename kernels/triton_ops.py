"""The ops as Triton kernels for NVIDIA GPUs; `TRITON_INTERPRET=1` runs them on a CPU, for tests.

Every launch depends on sizes known ahead only, so that a step can be captured in a CUDA graph. Products of few rows are
ours (`triton_linear`), with norm, gate and residual inside; wide ones are cuBLAS's.
"""

import torch
import triton
import triton.language as tl

from headrace.kernels.gpu_linear import GpuLinear
from headrace.kernels.ops import HeadNorms, Hidden, LayerCache, Linear
from headrace.kernels.triton_activations import silu_mul
from headrace.kernels.triton_attention import AttentionPlan, paged_attention as attend, plan_attention
from headrace.kernels.triton_launch import launch_options
from headrace.kernels.triton_linear import FP8_MAX, rms_norm

__all__ = [
    "linear_add",
    "norm_gate_up",
    "norm_linear",
    "paged_attention",
    "plan_attention",
    "rms_norm",
    "rope_and_write_kv",
    "silu_mul",
    "write_kv",
]

# Heads that one program rotates or stores.
_NUM_HEADS = 4
# Adding and taking it away rounds a float32 to the nearest integer, halves to the even one.
_ROUNDING = tl.constexpr(12582912.0)


def write_kv(k: torch.Tensor, v: torch.Tensor, cache: LayerCache, slot_mapping: torch.Tensor) -> None:
    num_tokens, num_kv_heads, head_dim = k.shape
    assert k.stride(2) == v.stride(2) == 1, "heads whose numbers are not side by side"
    _write_kv[(num_tokens, triton.cdiv(num_kv_heads, _NUM_HEADS))](
        k,
        v,
        *cache,
        slot_mapping,
        *k.stride()[:2],
        *v.stride()[:2],
        G=num_kv_heads,
        D=head_dim,
        HALF=triton.next_power_of_2(triton.cdiv(head_dim, 2)),
        NUM_HEADS=_NUM_HEADS,
        num_warps=2,
    )


@triton.jit
def _write_kv(  # type: ignore[no-untyped-def]
    k,
    v,
    keys,
    values,
    key_scales,
    value_scales,
    slot_mapping,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    G: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    NUM_HEADS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    head = tl.program_id(1) * NUM_HEADS + tl.arange(0, NUM_HEADS)
    dim = tl.arange(0, HALF)
    has_head = (head < G) & (slot >= 0)
    k_place = k + token * k_token_stride + head[:, None] * k_head_stride + dim[None, :]
    v_place = v + token * v_token_stride + head[:, None] * v_head_stride + dim[None, :]
    first = has_head[:, None] & (dim[None, :] < D)
    second = has_head[:, None] & (HALF + dim[None, :] < D)
    k_first, k_second = tl.load(k_place, mask=first, other=0.0), tl.load(k_place + HALF, mask=second, other=0.0)
    _store_heads(k_first, k_second, keys, key_scales, slot, head, has_head, G, D, HALF, HALF)
    v_first, v_second = tl.load(v_place, mask=first, other=0.0), tl.load(v_place + HALF, mask=second, other=0.0)
    _store_heads(v_first, v_second, values, value_scales, slot, head, has_head, G, D, HALF, HALF)


@triton.jit
def _store_heads(  # type: ignore[no-untyped-def]
    first,
    second,
    cache,
    scales,
    slot,
    head,
    has_head,
    G: tl.constexpr,
    D: tl.constexpr,
    SECOND: tl.constexpr,
    HALF: tl.constexpr,
):
    """Store heads, [heads, HALF] from dimension 0 and from dimension SECOND on, rounded to the cache's dtype."""
    dim = tl.arange(0, HALF)
    place = cache + (slot * G + head)[:, None] * D + dim[None, :]
    in_first = has_head[:, None] & (dim < SECOND)[None, :] & (dim < D)[None, :]
    in_second = has_head[:, None] & (SECOND + dim < D)[None, :]
    if scales is not None:
        first, second = first.to(tl.float32), second.to(tl.float32)
        largest = tl.maximum(tl.max(tl.abs(first), axis=1), tl.max(tl.abs(second), axis=1))
        # NaN where one of the numbers is NaN or infinite, which neither `max` nor integers tell.
        scale = largest / 127.0 + tl.sum(first * 0.0 + second * 0.0, axis=1)
        tl.store(scales + slot * G + head, scale, mask=has_head)
        divisor = tl.where(scale > 0, scale, 1.0)[:, None]
        first = (first / divisor + _ROUNDING) - _ROUNDING
        second = (second / divisor + _ROUNDING) - _ROUNDING
    elif cache.dtype.element_ty == tl.float8e4nv:
        first = tl.clamp(first.to(tl.float32), -FP8_MAX, FP8_MAX, propagate_nan=tl.PropagateNan.ALL)
        second = tl.clamp(second.to(tl.float32), -FP8_MAX, FP8_MAX, propagate_nan=tl.PropagateNan.ALL)
    tl.store(place, first.to(cache.dtype.element_ty), mask=in_first)
    tl.store(place + SECOND, second.to(cache.dtype.element_ty), mask=in_second)


def rope_and_write_kv(
    qkv: torch.Tensor,
    head_norms: HeadNorms | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cache: LayerCache,
    slot_mapping: torch.Tensor,
) -> torch.Tensor:
    """As `Ops` says; the query heads are a view of `qkv`."""
    num_tokens, num_heads, head_dim = qkv.shape
    num_kv_heads = cache.keys.shape[2]
    num_q = num_heads - 2 * num_kv_heads
    _rope_and_write_kv[(num_tokens, triton.cdiv(num_heads, _NUM_HEADS))](
        qkv,
        None if head_norms is None else head_norms.query,
        None if head_norms is None else head_norms.key,
        cos,
        sin,
        *cache,
        slot_mapping,
        0.0 if head_norms is None else head_norms.eps,
        H=num_q,
        G=num_kv_heads,
        D=head_dim,
        HALF=triton.next_power_of_2(head_dim // 2),
        NUM_HEADS=_NUM_HEADS,
        num_warps=2,
        **launch_options(qkv.device),
    )
    return qkv[:, :num_q]


@triton.jit
def _rope_and_write_kv(  # type: ignore[no-untyped-def]
    qkv,
    q_norm,
    k_norm,
    cos,
    sin,
    keys,
    values,
    key_scales,
    value_scales,
    slot_mapping,
    eps,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HAS_PDL: tl.constexpr,
):
    if HAS_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * NUM_HEADS + tl.arange(0, NUM_HEADS)
    dim = tl.arange(0, HALF)
    in_half = dim < D // 2
    mask = (head < H + 2 * G)[:, None] & in_half[None, :]
    place = qkv + (token * (H + 2 * G) + head)[:, None] * D + dim[None, :]
    first = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(place + D // 2, mask=mask, other=0.0).to(tl.float32)
    is_query = head < H
    is_value = head >= H + G
    angle_cos = tl.load(cos + token * (D // 2) + dim, mask=in_half, other=0.0)[None, :]
    angle_sin = tl.load(sin + token * (D // 2) + dim, mask=in_half, other=0.0)[None, :]
    normed_first, normed_second = first, second
    if q_norm is not None:
        factor = tl.rsqrt((tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)) / D + eps)[:, None]
        q_first = tl.load(q_norm + dim, mask=in_half, other=0.0).to(tl.float32)[None, :]
        q_second = tl.load(q_norm + D // 2 + dim, mask=in_half, other=0.0).to(tl.float32)[None, :]
        k_first = tl.load(k_norm + dim, mask=in_half, other=0.0).to(tl.float32)[None, :]
        k_second = tl.load(k_norm + D // 2 + dim, mask=in_half, other=0.0).to(tl.float32)[None, :]
        # Rounded as if it were an op of its own.
        dtype = qkv.dtype.element_ty
        normed_first = (first * factor * tl.where(is_query[:, None], q_first, k_first)).to(dtype).to(tl.float32)
        normed_second = (second * factor * tl.where(is_query[:, None], q_second, k_second)).to(dtype).to(tl.float32)
    rotated_first = normed_first * angle_cos - normed_second * angle_sin
    rotated_second = normed_second * angle_cos + normed_first * angle_sin
    first = tl.where(is_value[:, None], first, rotated_first).to(qkv.dtype.element_ty)
    second = tl.where(is_value[:, None], second, rotated_second).to(qkv.dtype.element_ty)
    tl.store(place, first, mask=mask & is_query[:, None])
    tl.store(place + D // 2, second, mask=mask & is_query[:, None])
    slot = tl.load(slot_mapping + token)
    is_key = (head >= H) & (head < H + G) & (slot >= 0)
    _store_heads(first, second, keys, key_scales, slot, head - H, is_key, G, D, D // 2, HALF)
    is_stored_value = is_value & (head < H + 2 * G) & (slot >= 0)
    _store_heads(first, second, values, value_scales, slot, head - H - G, is_stored_value, G, D, D // 2, HALF)


def paged_attention(
    q: torch.Tensor,
    cache: LayerCache,
    plan: AttentionPlan,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    if q.stride()[1:] != (q.shape[2], 1):
        q = q.contiguous()
    scales = None
    if cache.key_scales is not None and cache.value_scales is not None:
        scales = cache.key_scales, cache.value_scales
    return attend(q, cache.keys, cache.values, plan, scale, window, softcap, sinks, scales)


def norm_linear(hidden: Hidden, norm_weight: torch.Tensor, eps: float, linear: Linear) -> torch.Tensor:
    del norm_weight  # the linear has it
    return _own(linear).of_norm(hidden, eps)


def norm_gate_up(hidden: Hidden, norm_weight: torch.Tensor, eps: float, linear: Linear) -> torch.Tensor:
    del norm_weight
    return _own(linear).of_norm(hidden, eps, is_gated=True)


def linear_add(x: torch.Tensor, linear: Linear, hidden: Hidden) -> Hidden:
    return _own(linear).added_to(x, hidden)


def _own(linear: Linear) -> GpuLinear:
    assert isinstance(linear, GpuLinear), "a product of another device"
    return linear
