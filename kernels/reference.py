"""The specification of every op in `ops.Ops`: plain torch in float32, one sequence at a time, no tricks.

Tests compare every other implementation with this one. It knows nothing of speed.
"""

import torch

from headrace.kernels.ops import AttentionMetadata, HeadNorms, Hidden, LayerCache, Linear


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x32 = x.float()
    variance = x32.pow(2).mean(-1, keepdim=True)
    return (x32 * torch.rsqrt(variance + eps) * weight.float()).to(x.dtype)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (gate / (1 + torch.exp(-gate)) * up).to(gate_up.dtype)


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def norm_linear(hidden: Hidden, norm_weight: torch.Tensor, eps: float, linear: Linear) -> torch.Tensor:
    return linear(rms_norm(hidden.values, norm_weight, eps))


def norm_gate_up(hidden: Hidden, norm_weight: torch.Tensor, eps: float, linear: Linear) -> torch.Tensor:
    return silu_mul(norm_linear(hidden, norm_weight, eps, linear))


def linear_add(x: torch.Tensor, linear: Linear, hidden: Hidden) -> Hidden:
    return Hidden(hidden.values + linear(x))


def write_kv(k: torch.Tensor, v: torch.Tensor, cache: LayerCache, slot_mapping: torch.Tensor) -> None:
    block_size = cache.keys.shape[1]
    for token, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            place = divmod(slot, block_size)
            _store(k[token], cache.keys, cache.key_scales, place)
            _store(v[token], cache.values, cache.value_scales, place)


def _store(heads: torch.Tensor, cache: torch.Tensor, scales: torch.Tensor | None, place: tuple[int, int]) -> None:
    """Store heads [G, D], rounded to the cache's dtype."""
    if cache.dtype is torch.float8_e4m3fn:
        largest = torch.finfo(cache.dtype).max
        cache[place] = heads.float().clamp(-largest, largest).to(cache.dtype)
    elif scales is not None:
        scale = heads.float().abs().amax(-1) / 127
        scales[place] = scale
        cache[place] = torch.where(scale[:, None] > 0, heads.float() / scale[:, None], 0).round().to(cache.dtype)
    else:
        cache[place] = heads


def _load(cache: torch.Tensor, scales: torch.Tensor | None, block_ids: list[int]) -> torch.Tensor:
    """The values of blocks in float32: [blocks * S, G, D]."""
    values = cache[block_ids].float()
    if scales is not None:
        values = values * scales[block_ids][..., None]
    return values.flatten(0, 1)


def rope_and_write_kv(
    qkv: torch.Tensor,
    head_norms: HeadNorms | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cache: LayerCache,
    slot_mapping: torch.Tensor,
) -> torch.Tensor:
    num_kv_heads = cache.keys.shape[2]
    q, k, v = qkv.split((qkv.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads), dim=1)
    if head_norms is not None:
        q = rms_norm(q, head_norms.query, head_norms.eps)
        k = rms_norm(k, head_norms.key, head_norms.eps)
    write_kv(rope(k, cos, sin), v, cache, slot_mapping)
    return rope(q, cos, sin)


def plan_attention(metadata: AttentionMetadata, block_size: int, device: torch.device) -> AttentionMetadata:
    del block_size, device
    return metadata


def paged_attention(
    q: torch.Tensor,
    cache: LayerCache,
    plan: AttentionMetadata,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    num_groups = q.shape[1] // cache.keys.shape[2]
    out = torch.empty_like(q)
    for b, (context_len, blocks) in enumerate(zip(plan.context_lens, plan.block_tables, strict=True)):
        start, end = plan.query_starts[b], plan.query_starts[b + 1]
        keys, values = (
            _load(*stored, blocks)[:context_len].repeat_interleave(num_groups, dim=1)
            for stored in ((cache.keys, cache.key_scales), (cache.values, cache.value_scales))
        )
        for token in range(start, end):
            num_visible = context_len - (end - 1 - token)
            seen = slice(0 if window is None else max(0, num_visible - window), num_visible)
            scores = torch.einsum("hd,shd->hs", q[token].float(), keys[seen]) * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if sinks is not None:
                scores = torch.cat((scores, sinks.float()[:, None]), dim=1)
            weights = scores.softmax(-1)[:, : num_visible - seen.start]
            out[token] = torch.einsum("hs,shd->hd", weights, values[seen]).to(q.dtype)
    return out
