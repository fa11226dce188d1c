"""The kernel interface: every op the decoder is made of, besides matrix products.

Two modules have this shape: `reference`, plain torch that is each op's specification, and `torch_ops`, the torch path
that serves. Whatever else implements it must agree with the reference within the tolerance of its dtype.

Dimension letters, here and in the modules: T tokens in the packed batch, B sequences in it, H query heads, G key/value
heads, D head size, E hidden size, F feed-forward size, N blocks in the cache, S tokens in a block.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """Where the packed batch's sequences lie, in the batch and in the cache.

    Sequence b has query tokens `query_starts[b] : query_starts[b + 1]` of the batch, the last ones of its
    `context_lens[b]` tokens, which lie in order in the blocks `block_tables[b]`.

    - query_starts: B + 1 ints
    - context_lens: B ints, the query tokens included
    - block_tables: B lists of block numbers, each at least ceil(context_lens[b] / S) long
    """

    query_starts: list[int]
    context_lens: list[int]
    block_tables: list[list[int]]


class Ops(Protocol):
    """The ops, as a module or an object."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Root-mean-square norm over the last axis. x [..., E], weight [E] -> like x.

        Zhang and Sennrich, 2019.
        """

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up. gate_up [T, 2 F], the gate first -> [T, F]. SwiGLU (Shazeer, 2020)."""

    def rope(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Rotate each head by its token's angles. x [T, heads, D], cos and sin float32 [T, D / 2] -> like x.

        RoFormer (Su et al., 2021) in Hugging Face's layout: dimension i pairs with i + D / 2.
        """

    def write_kv(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Store k and v [T, G, D] in caches [N, S, G, D]; token t goes to slot `slot_mapping[t]` (int64 [T]), that is
        to block slot // S, offset slot % S."""

    def plan_attention(self, metadata: AttentionMetadata, block_size: int, device: torch.device) -> Any:
        """Prepare what all layers of a step share; the result is for this implementation's `paged_attention`."""

    def paged_attention(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        plan: Any,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """Causal attention of every query token over its own sequence's context in the cache.

        q [T, H, D], caches [N, S, G, D], query head h reads key/value head h // (H / G) -> [T, H, D] in q's dtype.
        `window` lets a token see that many tokens, the last of them itself (Mistral; Jiang et al., 2023); `softcap`
        bounds the scaled scores to +-softcap by tanh (Gemma 2; 2024). PagedAttention (Kwon et al., SOSP 2023).
        """
