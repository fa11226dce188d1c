"""The compact packed decoder: a Llama-family transformer over one packed batch and one paged KV cache.

Tensors in, tensors out: it knows no sequence, only token ids, positions, slots and an attention plan. The query, key
and value projections are one product, as are gate and up.
Paper: Llama (Touvron et al., 2023) as Hugging Face's `LlamaForCausalLM` computes it; norms, rotation and attention
accumulate in float32.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from headrace.kernels.linear import PackedLinear
from headrace.kernels.ops import Ops


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """The shape of a decoder. `inv_freq` float32 [D / 2] and `rope_scale` come from Hugging Face's RoPE maths."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    max_position: int
    inv_freq: torch.Tensor
    rope_scale: float = 1.0

    def kv_bytes_per_token(self, dtype: torch.dtype) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * dtype.itemsize


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One step's input.

    token_ids, positions, slot_mapping int64 [T]; logit_rows int64 [R], the rows whose logits are wanted;
    attention_plan from the ops' `plan_attention`.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    logit_rows: torch.Tensor
    attention_plan: Any


@dataclass(frozen=True, slots=True)
class KVCache:
    """Keys and values of every layer: per layer two tensors [N, S, G, D]."""

    keys: list[torch.Tensor]
    values: list[torch.Tensor]

    def clear(self, block_ids: torch.Tensor) -> None:
        """Zero blocks (int64 [n]) that change hands.

        Attention reads a block's unused slots too and gives them no weight, but no weight times infinity is not zero.
        """
        if len(block_ids):
            for cache in (*self.keys, *self.values):
                cache.index_fill_(0, block_ids, 0)


class _Layer:
    def __init__(self, weights: Mapping[str, torch.Tensor], prefix: str) -> None:
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        self.input_norm = weights[f"{prefix}.input_layernorm.weight"]
        self.post_norm = weights[f"{prefix}.post_attention_layernorm.weight"]
        self.qkv = PackedLinear(torch.cat([weights[f"{attention}.{name}_proj.weight"] for name in "qkv"]))
        self.out = PackedLinear(weights[f"{attention}.o_proj.weight"])
        self.gate_up = PackedLinear(torch.cat([weights[f"{mlp}.{name}_proj.weight"] for name in ("gate", "up")]))
        self.down = PackedLinear(weights[f"{mlp}.down_proj.weight"])


class Decoder:
    """The model, ready to run.

    `weights` maps Hugging Face's parameter names to tensors of one dtype on one device, and is not kept: each is let
    go once laid out. A missing `lm_head.weight` means that it is tied to the embedding.
    """

    def __init__(self, config: DecoderConfig, weights: dict[str, torch.Tensor], ops: Ops) -> None:
        self.config = config
        self._ops = ops
        self._embedding = weights["model.embed_tokens.weight"]
        self.dtype = self._embedding.dtype
        self.device = self._embedding.device
        self._norm = weights["model.norm.weight"]
        self._head = PackedLinear(weights.pop("lm_head.weight", self._embedding))
        self._layers = []
        for i in range(config.num_layers):
            prefix = f"model.layers.{i}"
            self._layers.append(_Layer(weights, prefix))
            for name in [name for name in weights if name.startswith(f"{prefix}.")]:
                del weights[name]
        angles = torch.outer(torch.arange(config.max_position, dtype=torch.float32), config.inv_freq.float().cpu())
        self._cos = (angles.cos() * config.rope_scale).to(self.device)
        self._sin = (angles.sin() * config.rope_scale).to(self.device)

    @torch.inference_mode()
    def forward(self, batch: PackedBatch, cache: KVCache) -> torch.Tensor:
        """Compute the batch, write its keys and values to the cache, return float32 logits [R, vocabulary]."""
        config, ops = self.config, self._ops
        num_q, num_kv = config.num_heads, config.num_kv_heads
        scale = config.head_dim**-0.5
        cos, sin = self._cos[batch.positions], self._sin[batch.positions]
        hidden = F.embedding(batch.token_ids, self._embedding)
        for layer, k_cache, v_cache in zip(self._layers, cache.keys, cache.values, strict=True):
            qkv = layer.qkv(ops.rms_norm(hidden, layer.input_norm, config.rms_norm_eps))
            qk, v = qkv.view(-1, num_q + 2 * num_kv, config.head_dim).split((num_q + num_kv, num_kv), dim=1)
            q, k = ops.rope(qk, cos, sin).split((num_q, num_kv), dim=1)
            ops.write_kv(k, v, k_cache, v_cache, batch.slot_mapping)
            attended = ops.paged_attention(q, k_cache, v_cache, batch.attention_plan, scale)
            hidden = hidden + layer.out(attended.flatten(1))
            gate_up = layer.gate_up(ops.rms_norm(hidden, layer.post_norm, config.rms_norm_eps))
            hidden = hidden + layer.down(ops.silu_mul(gate_up))
        # Only the rows that are sampled pass the head, the largest product of all.
        last = ops.rms_norm(hidden[batch.logit_rows], self._norm, config.rms_norm_eps)
        return self._head(last).float()
