"""The ops in torch, vectorised over the packed batch: the path that serves on any device torch knows.

Attention gathers each sequence's blocks and calls torch's scaled-dot-product attention once per group of sequences of
like shape: padding inside a group is bounded, and a step over hundreds of sequences takes few calls per layer.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from headrace.kernels.ops import AttentionMetadata

# Keys and values gathered for one call: enough rows to share its cost, little enough memory whatever the batch.
_MAX_GATHERED_TOKENS = 16384


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    out = torch.empty_like(x)
    half = first.shape[-1]
    out[..., :half] = first * cos - second * sin
    out[..., half:] = second * cos + first * sin
    return out


def write_kv(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    k_cache.flatten(0, 1).index_copy_(0, slot_mapping, k)
    v_cache.flatten(0, 1).index_copy_(0, slot_mapping, v)


@dataclass(frozen=True, slots=True)
class _Group:
    """Sequences with equally many query tokens and contexts within a factor of two of each other.

    token_index [b * q] int64 rows of the packed batch; block_index [b * n] int64 blocks, a table after the other;
    mask [b, 1, q, n * S] float, 0 where visible and -inf elsewhere.
    """

    token_index: torch.Tensor
    block_index: torch.Tensor
    mask: torch.Tensor


def plan_attention(metadata: AttentionMetadata, block_size: int, device: torch.device) -> list[_Group]:
    members: dict[tuple[int, int], list[int]] = {}
    for b, context_len in enumerate(metadata.context_lens):
        num_query = metadata.query_starts[b + 1] - metadata.query_starts[b]
        num_blocks = -(-context_len // block_size)
        # A prompt chunk stands alone; decode rows share a call with contexts of the same power of two.
        width = num_blocks.bit_length() if num_query == 1 else -1 - b
        members.setdefault((num_query, width), []).append(b)
    groups = []
    for (num_query, _), batch in members.items():
        longest = max(metadata.context_lens[b] for b in batch)
        width = max(1, _MAX_GATHERED_TOKENS // longest)
        groups += [
            _make_group(metadata, num_query, batch[i : i + width], block_size, device)
            for i in range(0, len(batch), width)
        ]
    return groups


def _make_group(
    metadata: AttentionMetadata, num_query: int, batch: list[int], block_size: int, device: torch.device
) -> _Group:
    context_lens = torch.tensor([metadata.context_lens[b] for b in batch])
    num_blocks = -(-int(context_lens.max()) // block_size)
    blocks = []
    for b in batch:
        table = metadata.block_tables[b][:num_blocks]
        # Any block may pad a table: the mask hides it.
        blocks += table + table[:1] * (num_blocks - len(table))
    starts = torch.tensor([metadata.query_starts[b] for b in batch])
    token_index = starts[:, None] + torch.arange(num_query)
    num_visible = (context_lens - num_query + 1)[:, None] + torch.arange(num_query)
    is_hidden = torch.arange(num_blocks * block_size) >= num_visible[..., None]
    mask = torch.zeros(is_hidden.shape).masked_fill_(is_hidden, float("-inf"))
    return _Group(
        token_index.flatten().to(device),
        torch.tensor(blocks, device=device),
        mask.unsqueeze(1).to(device),
    )


def paged_attention(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, plan: list[_Group], scale: float
) -> torch.Tensor:
    num_heads, head_dim = q.shape[1:]
    num_kv_heads = k_cache.shape[2]
    out = torch.empty_like(q)
    for group in plan:
        num_seqs, _, num_query, _ = group.mask.shape
        k = k_cache.index_select(0, group.block_index).view(num_seqs, -1, num_kv_heads, head_dim).transpose(1, 2)
        v = v_cache.index_select(0, group.block_index).view(num_seqs, -1, num_kv_heads, head_dim).transpose(1, 2)
        # The query heads that share a key/value head become further query rows: nothing is repeated.
        heads_per_kv = num_heads // num_kv_heads
        rows = q.index_select(0, group.token_index).view(num_seqs, num_query, num_kv_heads, heads_per_kv, head_dim)
        rows = rows.permute(0, 2, 3, 1, 4).reshape(num_seqs, num_kv_heads, heads_per_kv * num_query, head_dim)
        mask = group.mask.to(q.dtype).repeat(1, 1, heads_per_kv, 1)
        attended = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=scale)
        attended = attended.view(num_seqs, num_kv_heads, heads_per_kv, num_query, head_dim).permute(0, 3, 1, 2, 4)
        out.index_copy_(0, group.token_index, attended.reshape(num_seqs * num_query, num_heads, head_dim))
    return out
