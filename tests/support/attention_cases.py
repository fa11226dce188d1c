"""Packed batches over paged caches, for whatever attends to compare with the reference."""

from typing import Any

import torch

from headrace.kernels import reference
from headrace.kernels.ops import AttentionMetadata, LayerCache

# Relative to outputs of order one: float32 sums differ in order only, 16-bit types keep 8 or 11 bits.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
MIXES = {
    "one token": [(1, 1)],
    "decode": [(1, 5), (1, 16), (1, 17), (1, 200), (1, 33)],
    "prompts": [(7, 7), (70, 70), (2, 2)],
    "chunks": [(5, 21), (1, 64), (3, 165)],
    "all of it": [(1, 40), (9, 9), (0, 0), (1, 1), (17, 90), (1, 148), (0, 0)],
}


class AttentionCase:
    """A packed batch of rows of (query tokens, context), (0, 0) for padding, over caches of scattered blocks.

    Slots beyond the contexts hold `filler`. The query heads are a view of a batch that has the key/value heads too.
    """

    def __init__(
        self,
        rows: list[tuple[int, int]],
        *,
        block_size: int = 16,
        heads: tuple[int, int] = (6, 2),
        head_dim: int = 32,
        dtype: torch.dtype = torch.float32,
        cache_dtype: torch.dtype | None = None,
        filler: float = float("nan"),
    ) -> None:
        generator = torch.Generator().manual_seed(7)
        (num_heads, num_kv_heads), cache_dtype = heads, cache_dtype or dtype
        num_blocks = sum(-(-context // block_size) for _, context in rows) + 3
        free = torch.randperm(num_blocks, generator=generator).tolist()
        starts, tables = [0], []
        for num_query, context in rows:
            starts.append(starts[-1] + num_query)
            tables.append([free.pop() for _ in range(-(-context // block_size))])
        self.metadata = AttentionMetadata(starts, [context for _, context in rows], tables)
        self.block_size, self.scale = block_size, head_dim**-0.5

        shape = (num_blocks * block_size, num_kv_heads, head_dim)
        slots = [
            table[position // block_size] * block_size + position % block_size
            for table, context in zip(tables, self.metadata.context_lens, strict=True)
            for position in range(context)
        ]
        caches: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        for _ in range(2):
            noise = torch.randn(shape, generator=generator)
            if cache_dtype == torch.int8:
                scales = torch.full(shape[:2], filler)
                scales[slots] = noise[slots].abs().amax(-1) / 127
                stored = (noise / scales.nan_to_num(1.0)[..., None]).round().clamp(-127, 127).to(torch.int8)
                caches.append((stored, scales))
            else:
                stored = torch.full(shape, filler).to(cache_dtype)
                stored.view(torch.uint8)[slots] = noise[slots].to(cache_dtype).view(torch.uint8)
                caches.append((stored, None))
        self.cache = LayerCache(
            *(cache.unflatten(0, (num_blocks, block_size)) for cache, _ in caches),
            *(scales.unflatten(0, (num_blocks, block_size)) for _, scales in caches if scales is not None),
        )
        q = torch.randn(starts[-1] + 2, num_heads + 2 * num_kv_heads, head_dim, generator=generator)
        self.q = q.to(dtype)[:, :num_heads]

    def expected(self, **options: Any) -> torch.Tensor:
        q = self.q[: self.metadata.query_starts[-1]]
        return reference.paged_attention(q, self.cache, self.metadata, self.scale, **options)
