"""The kernel interface: every op the decoder is made of, with the products that an op can be fused into.

Four modules have this shape: `reference`, plain torch that is each op's specification, `torch_ops`, the torch path
that serves on any device, `triton_ops` for NVIDIA GPUs, and `flashinfer_ops`, which has another attention. They agree
with the reference within the tolerance of their dtype.

Dimension letters, here and in the modules: T tokens in the packed batch, B sequences in it, H query heads, G key/value
heads, D head size, E hidden size, F feed-forward size, N blocks in the cache, S tokens in a block.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

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

    def padded_tables(self, device: torch.device) -> torch.Tensor:
        """The block tables, int32 [B, as long as the longest]."""
        width = max(map(len, self.block_tables), default=1)
        tables = [table + [0] * (width - len(table)) for table in self.block_tables]
        return torch.tensor(tables, dtype=torch.int32, device=device).view(len(tables), width)


class LayerCache(NamedTuple):
    """One layer's keys and values, each [N, S, G, D]: in the model's dtype, in float8_e4m3fn, or in int8 with a scale
    per token and head (float32 [N, S, G])."""

    keys: torch.Tensor
    values: torch.Tensor
    key_scales: torch.Tensor | None = None
    value_scales: torch.Tensor | None = None


class HeadNorms(NamedTuple):
    """The norms of query and key heads: weights [D]."""

    query: torch.Tensor
    key: torch.Tensor
    eps: float


class Hidden(NamedTuple):
    """The residual stream [T, E]; `squares` [P, T] float32 are parts of its rows' sums of squares, which the next norm
    needs, where what made it knows them."""

    values: torch.Tensor
    squares: torch.Tensor | None = None


class Linear(Protocol):
    """x [T, in] -> [T, out]."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...


class Ops(Protocol):
    """The ops, as a module or an object."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Root-mean-square norm over the last axis. x [..., E], weight [E] -> like x.

        Zhang and Sennrich, 2019.
        """

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up. gate_up [T, 2 F], the gate first -> [T, F]. SwiGLU (Shazeer, 2020)."""

    def norm_linear(self, hidden: Hidden, norm_weight: torch.Tensor, eps: float, linear: Linear) -> torch.Tensor:
        """linear(rms_norm(hidden)), of a linear that was made for this norm -> [T, out]."""

    def norm_gate_up(self, hidden: Hidden, norm_weight: torch.Tensor, eps: float, linear: Linear) -> torch.Tensor:
        """silu_mul(linear(rms_norm(hidden))), whose outputs are 2 F, the gate first -> [T, F]."""

    def linear_add(self, x: torch.Tensor, linear: Linear, hidden: Hidden) -> Hidden:
        """hidden + linear(x). x [T, in] -> like hidden."""

    def write_kv(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        cache: LayerCache,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Store k and v [T, G, D]; token t goes to slot `slot_mapping[t]` (int64 [T]), that is to block slot // S,
        offset slot % S, and nowhere if that is negative."""

    def rope_and_write_kv(
        self,
        qkv: torch.Tensor,
        head_norms: HeadNorms | None,
        cos: torch.Tensor,
        sin: torch.Tensor,
        cache: LayerCache,
        slot_mapping: torch.Tensor,
    ) -> torch.Tensor:
        """Norm (Qwen3) and rotate the query and key heads by their token's angles, and store keys and values: qkv
        [T, H + 2 G, D], which may be overwritten, cos and sin float32 [T, D / 2] -> q [T, H, D].

        RoFormer (Su et al., 2021) in Hugging Face's layout: dimension i pairs with i + D / 2.
        """

    def plan_attention(self, metadata: AttentionMetadata, block_size: int, device: torch.device) -> Any:
        """Prepare what all layers of a step share; the result is for this implementation's `paged_attention`."""

    def paged_attention(
        self,
        q: torch.Tensor,
        cache: LayerCache,
        plan: Any,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Causal attention of every query token over its own sequence's context in the cache.

        q [T, H, D], query head h reads key/value head h // (H / G) -> [T, H, D] in q's dtype. `window` lets a token see
        that many tokens, the last of them itself (Mistral; Jiang et al., 2023); `softcap` bounds the scaled scores to
        +-softcap by tanh (Gemma 2; 2024); `sinks` [H] are scores of each head that have a share and no value (gpt-oss;
        2025). PagedAttention (Kwon et al., SOSP 2023).
        """
