"""The ops in torch, vectorised over the packed batch: the path that serves on any device torch knows.

Attention gathers each sequence's blocks and calls torch's scaled-dot-product attention once per group of sequences of
like shape: padding inside a group is bounded, and a step over hundreds of sequences takes few calls per layer.
"""

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from headrace.kernels.ops import AttentionMetadata, HeadNorms, Hidden, LayerCache, Linear

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


def norm_linear(hidden: Hidden, norm_weight: torch.Tensor, eps: float, linear: Linear) -> torch.Tensor:
    return linear(rms_norm(hidden.values, norm_weight, eps))


def norm_gate_up(hidden: Hidden, norm_weight: torch.Tensor, eps: float, linear: Linear) -> torch.Tensor:
    return silu_mul(norm_linear(hidden, norm_weight, eps, linear))


def linear_add(x: torch.Tensor, linear: Linear, hidden: Hidden) -> Hidden:
    return Hidden(hidden.values + linear(x))


def write_kv(k: torch.Tensor, v: torch.Tensor, cache: LayerCache, slot_mapping: torch.Tensor) -> None:
    assert cache.key_scales is None, "a quantised cache"
    cache.keys.flatten(0, 1).index_copy_(0, slot_mapping, k)
    cache.values.flatten(0, 1).index_copy_(0, slot_mapping, v)


def rope_and_write_kv(
    qkv: torch.Tensor,
    head_norms: HeadNorms | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cache: LayerCache,
    slot_mapping: torch.Tensor,
) -> torch.Tensor:
    num_kv_heads = cache.keys.shape[2]
    num_heads = qkv.shape[1] - 2 * num_kv_heads
    qk, v = qkv.split((num_heads + num_kv_heads, num_kv_heads), dim=1)
    if head_norms is not None:
        q, k = qk.split((num_heads, num_kv_heads), dim=1)
        qk = torch.cat(
            (rms_norm(q, head_norms.query, head_norms.eps), rms_norm(k, head_norms.key, head_norms.eps)), dim=1
        )
    qk = rope(qk, cos, sin)
    write_kv(qk[:, num_heads:], v, cache, slot_mapping)
    return qk[:, :num_heads]


@dataclass(frozen=True, slots=True)
class _Group:
    """Sequences with equally many query tokens and contexts within a factor of two of each other.

    token_index [b * q] int64 rows of the packed batch; block_index [b * n] int64 blocks, a table after the other;
    mask [b, 1, q, n * S] float, 0 where visible and -inf elsewhere.
    """

    token_index: torch.Tensor
    block_index: torch.Tensor
    mask: torch.Tensor


class _Plan:
    """A step's groups, made at the first layer that asks: one list for full attention, one for each window."""

    def __init__(self, metadata: AttentionMetadata, block_size: int, device: torch.device) -> None:
        self._metadata, self._block_size, self._device = metadata, block_size, device
        self._longest = max(metadata.context_lens, default=0)
        self._groups: dict[int | None, list[_Group]] = {}

    def groups(self, window: int | None) -> list[_Group]:
        if window is not None and window >= self._longest:
            window = None
        if window not in self._groups:
            self._groups[window] = self._make(window)
        return self._groups[window]

    def _make(self, window: int | None) -> list[_Group]:
        metadata = self._metadata if window is None else _trim(self._metadata, self._block_size, window)
        members: dict[tuple[int, int], list[int]] = {}
        for b, context_len in enumerate(metadata.context_lens):
            num_query = metadata.query_starts[b + 1] - metadata.query_starts[b]
            num_blocks = -(-context_len // self._block_size)
            # A prompt chunk stands alone; decode rows share a call with contexts of the same power of two.
            width = num_blocks.bit_length() if num_query == 1 else -1 - b
            members.setdefault((num_query, width), []).append(b)
        groups = []
        for (num_query, _), batch in members.items():
            longest = max(metadata.context_lens[b] for b in batch)
            width = max(1, _MAX_GATHERED_TOKENS // longest)
            groups += [
                _make_group(metadata, num_query, batch[i : i + width], window, self._block_size, self._device)
                for i in range(0, len(batch), width)
            ]
        return groups


def plan_attention(metadata: AttentionMetadata, block_size: int, device: torch.device) -> _Plan:
    return _Plan(metadata, block_size, device)


def _trim(metadata: AttentionMetadata, block_size: int, window: int) -> AttentionMetadata:
    """Leave out the leading blocks that no query token's window reaches."""
    num_queries = (end - start for start, end in itertools.pairwise(metadata.query_starts))
    hidden_blocks = [
        max(0, context_len - num_query + 1 - window) // block_size
        for context_len, num_query in zip(metadata.context_lens, num_queries, strict=True)
    ]
    return AttentionMetadata(
        metadata.query_starts,
        [length - hidden * block_size for length, hidden in zip(metadata.context_lens, hidden_blocks, strict=True)],
        [table[hidden:] for table, hidden in zip(metadata.block_tables, hidden_blocks, strict=True)],
    )


def _make_group(
    metadata: AttentionMetadata,
    num_query: int,
    batch: list[int],
    window: int | None,
    block_size: int,
    device: torch.device,
) -> _Group:
    context_lens = torch.tensor([metadata.context_lens[b] for b in batch])
    num_blocks = -(-int(context_lens.max()) // block_size)
    blocks = []
    for b in batch:
        # Blocks behind its context may hold another's keys. Any that was written may pad a table: the mask hides it.
        table = metadata.block_tables[b][: -(-metadata.context_lens[b] // block_size)]
        blocks += table + table[:1] * (num_blocks - len(table))
    starts = torch.tensor([metadata.query_starts[b] for b in batch])
    token_index = starts[:, None] + torch.arange(num_query)
    num_visible = (context_lens - num_query + 1)[:, None] + torch.arange(num_query)
    slots = torch.arange(num_blocks * block_size)
    is_hidden = slots >= num_visible[..., None]
    if window is not None:
        is_hidden |= slots < num_visible[..., None] - window
    mask = torch.zeros(is_hidden.shape).masked_fill_(is_hidden, float("-inf"))
    return _Group(
        token_index.flatten().to(device),
        torch.tensor(blocks, device=device),
        mask.unsqueeze(1).to(device),
    )


def paged_attention(
    q: torch.Tensor,
    cache: LayerCache,
    plan: _Plan,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    assert cache.key_scales is None, "a quantised cache"
    assert sinks is None, "sinks"
    num_heads, head_dim = q.shape[1:]
    num_kv_heads = cache.keys.shape[2]
    out = torch.empty_like(q)
    for group in plan.groups(window):
        num_seqs, _, num_query, _ = group.mask.shape
        k = cache.keys.index_select(0, group.block_index).view(num_seqs, -1, num_kv_heads, head_dim).transpose(1, 2)
        v = cache.values.index_select(0, group.block_index).view(num_seqs, -1, num_kv_heads, head_dim).transpose(1, 2)
        # The query heads that share a key/value head become further query rows: nothing is repeated.
        heads_per_kv = num_heads // num_kv_heads
        rows = q.index_select(0, group.token_index).view(num_seqs, num_query, num_kv_heads, heads_per_kv, head_dim)
        rows = rows.permute(0, 2, 3, 1, 4).reshape(num_seqs, num_kv_heads, heads_per_kv * num_query, head_dim)
        mask = group.mask.to(q.dtype).repeat(1, 1, heads_per_kv, 1)
        if softcap is None:
            attended = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=scale)
        else:
            scores = torch.tanh((rows @ k.mT).float() * (scale / softcap)) * softcap + mask
            attended = scores.softmax(-1).to(q.dtype) @ v
        attended = attended.view(num_seqs, num_kv_heads, heads_per_kv, num_query, head_dim).permute(0, 3, 1, 2, 4)
        out.index_copy_(0, group.token_index, attended.reshape(num_seqs * num_query, num_heads, head_dim))
    return out
