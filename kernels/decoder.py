"""The compact packed decoder: a Llama-like transformer over one packed batch and one paged KV cache.

Tensors in, tensors out: it knows no sequence, only token ids, positions, slots and an attention plan. The query, key
and value projections are one product, as are gate and up.
Papers: Llama (Touvron et al., 2023), Mistral (Jiang et al., 2023), Qwen2 (2024) and Qwen3 (2025) as Hugging Face's
classes compute them; norms, rotation and attention accumulate in float32.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from headrace.kernels.linear import PackedLinear
from headrace.kernels.ops import Ops


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What the engine must know of a model before it has read the weights.

    `kv_shapes` has each layer's number of key/value heads and their size.
    """

    vocab_size: int
    max_position: int
    kv_shapes: tuple[tuple[int, int], ...]

    def kv_bytes_per_token(self, dtype: torch.dtype) -> int:
        return sum(2 * num_heads * head_dim for num_heads, head_dim in self.kv_shapes) * dtype.itemsize


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """The sizes of a decoder; which biases and norms it has, its weights tell.

    `windows` has each layer's sliding window in tokens, None for full attention; `inv_freq` float32 [D / 2] and
    `rope_scale` come from Hugging Face's RoPE maths.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]
    rms_norm_eps: float
    max_position: int
    inv_freq: torch.Tensor
    rope_scale: float = 1.0

    @property
    def shape(self) -> ModelShape:
        kv_shapes = ((self.num_kv_heads, self.head_dim),) * len(self.windows)
        return ModelShape(self.vocab_size, self.max_position, kv_shapes)


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
    """One layer's weights, laid out. Biases (Qwen2) and the norms of query and key heads (Qwen3) are optional."""

    def __init__(self, weights: Mapping[str, torch.Tensor], prefix: str) -> None:
        def linear(*names: str) -> PackedLinear:
            biases = [weights[f"{prefix}.{name}.bias"] for name in names if f"{prefix}.{name}.bias" in weights]
            weight = torch.cat([weights[f"{prefix}.{name}.weight"] for name in names])
            return PackedLinear(weight, torch.cat(biases) if biases else None)

        self.input_norm = weights[f"{prefix}.input_layernorm.weight"]
        self.post_norm = weights[f"{prefix}.post_attention_layernorm.weight"]
        self.q_norm = weights.get(f"{prefix}.self_attn.q_norm.weight")
        self.k_norm = weights.get(f"{prefix}.self_attn.k_norm.weight")
        self.qkv = linear("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        self.out = linear("self_attn.o_proj")
        self.gate_up = linear("mlp.gate_proj", "mlp.up_proj")
        self.down = linear("mlp.down_proj")


class Decoder:
    """The model, ready to run.

    `weights` maps Hugging Face's parameter names to tensors of one dtype on one device, and is not kept: each is let
    go once laid out. A missing `lm_head.weight` means that it is tied to the embedding.
    """

    def __init__(self, config: DecoderConfig, weights: dict[str, torch.Tensor], ops: Ops) -> None:
        self.shape = config.shape
        self._config = config
        self._ops = ops
        self._embedding = weights["model.embed_tokens.weight"]
        self.dtype = self._embedding.dtype
        self.device = self._embedding.device
        self._norm = weights["model.norm.weight"]
        self._head = PackedLinear(weights.pop("lm_head.weight", self._embedding))
        self._layers = []
        for i in range(len(config.windows)):
            prefix = f"model.layers.{i}"
            self._layers.append(_Layer(weights, prefix))
            for name in [name for name in weights if name.startswith(f"{prefix}.")]:
                del weights[name]
        self._inv_freq = config.inv_freq.float().to(self.device)

    @torch.inference_mode()
    def forward(self, batch: PackedBatch, cache: KVCache) -> torch.Tensor:
        """Compute the batch, write its keys and values to the cache, return float32 logits [R, vocabulary]."""
        config, ops = self._config, self._ops
        num_q, num_kv, eps = config.num_heads, config.num_kv_heads, config.rms_norm_eps
        scale = config.head_dim**-0.5
        angles = batch.positions[:, None].float() * self._inv_freq
        cos, sin = angles.cos() * config.rope_scale, angles.sin() * config.rope_scale
        hidden = F.embedding(batch.token_ids, self._embedding)
        layers = zip(self._layers, config.windows, cache.keys, cache.values, strict=True)
        for layer, window, k_cache, v_cache in layers:
            qkv = layer.qkv(ops.rms_norm(hidden, layer.input_norm, eps))
            qk, v = qkv.view(-1, num_q + 2 * num_kv, config.head_dim).split((num_q + num_kv, num_kv), dim=1)
            if layer.q_norm is not None and layer.k_norm is not None:
                q, k = qk.split((num_q, num_kv), dim=1)
                qk = torch.cat((ops.rms_norm(q, layer.q_norm, eps), ops.rms_norm(k, layer.k_norm, eps)), dim=1)
            q, k = ops.rope(qk, cos, sin).split((num_q, num_kv), dim=1)
            ops.write_kv(k, v, k_cache, v_cache, batch.slot_mapping)
            attended = ops.paged_attention(q, k_cache, v_cache, batch.attention_plan, scale, window)
            hidden = hidden + layer.out(attended.flatten(1))
            gate_up = layer.gate_up(ops.rms_norm(hidden, layer.post_norm, eps))
            hidden = hidden + layer.down(ops.silu_mul(gate_up))
        # Only the rows that are sampled pass the head, the largest product of all.
        last = ops.rms_norm(hidden[batch.logit_rows], self._norm, eps)
        return self._head(last).float()
