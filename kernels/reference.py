"""The specification of every op in `ops.Ops`: plain torch in float32, one sequence at a time, no tricks.

Tests compare every other implementation with this one. It knows nothing of speed.
"""

import torch

from headrace.kernels.ops import AttentionMetadata


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


def write_kv(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    block_size = k_cache.shape[1]
    for token, slot in enumerate(slot_mapping.tolist()):
        k_cache[slot // block_size, slot % block_size] = k[token]
        v_cache[slot // block_size, slot % block_size] = v[token]


def plan_attention(metadata: AttentionMetadata, block_size: int, device: torch.device) -> AttentionMetadata:
    del block_size, device
    return metadata


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    plan: AttentionMetadata,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    num_groups = q.shape[1] // k_cache.shape[2]
    out = torch.empty_like(q)
    for b, (context_len, blocks) in enumerate(zip(plan.context_lens, plan.block_tables, strict=True)):
        start, end = plan.query_starts[b], plan.query_starts[b + 1]
        keys = k_cache[blocks].flatten(0, 1)[:context_len].float().repeat_interleave(num_groups, dim=1)
        values = v_cache[blocks].flatten(0, 1)[:context_len].float().repeat_interleave(num_groups, dim=1)
        for token in range(start, end):
            num_visible = context_len - (end - 1 - token)
            seen = slice(0 if window is None else max(0, num_visible - window), num_visible)
            scores = torch.einsum("hd,shd->hs", q[token].float(), keys[seen]) * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            out[token] = torch.einsum("hs,shd->hd", scores.softmax(-1), values[seen]).to(q.dtype)
    return out
