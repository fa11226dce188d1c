"""The compact packed decoder: a Llama-like transformer over one packed batch and one paged KV cache.

Tensors in, tensors out: it knows no sequence, only token ids, positions, slots and an attention plan. The query, key
and value projections are one product, as are gate and up. Where some rows have an adapter, what is added to products
comes between ops that are else fused; so does what a tensor-parallel rank hears of the others.
Papers: Llama (Touvron et al., 2023), Mistral (Jiang et al., 2023), Qwen2 (2024) and Qwen3 (2025) as Hugging Face's
classes compute them; norms, rotation and attention accumulate in float32.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from headrace.kernels.linear import pack_linear
from headrace.kernels.lora import Adapter, AdapterRows, LowRank, add_low_rank, merge
from headrace.kernels.ops import HeadNorms, Hidden, LayerCache, Linear, Ops
from headrace.kernels.quantised import QuantisedWeight
from headrace.kernels.tensor_parallel import Group

Weight = torch.Tensor | QuantisedWeight
# Lays weights [out, in] out for the device, as one, with their bias; last the weight of the norm of their input.
MakeLinear = Callable[[Sequence[Weight], torch.Tensor | None, torch.Tensor | None], Linear]


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What the engine must know of a model before it has read the weights.

    `kv_shapes` has each layer's number of key/value heads and their size.
    """

    vocab_size: int
    max_position: int
    kv_shapes: tuple[tuple[int, int], ...]

    def kv_bytes_per_token(self, dtype: torch.dtype) -> int:
        scale_bytes = torch.float32.itemsize if dtype is torch.int8 else 0
        return sum(2 * num_heads * (head_dim * dtype.itemsize + scale_bytes) for num_heads, head_dim in self.kv_shapes)


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
    attention_plan from the ops' `plan_attention`; adapter_rows the rows that have adapters, where some do.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    logit_rows: torch.Tensor
    attention_plan: Any
    adapter_rows: tuple[AdapterRows, ...] = ()


@dataclass(frozen=True, slots=True)
class KVCache:
    """Keys and values of every layer."""

    layers: list[LayerCache]

    @classmethod
    def allocate(
        cls, shape: ModelShape, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> "KVCache":
        """A cache of zeros; in int8 with scales."""

        def layer(num_heads: int, head_dim: int) -> LayerCache:
            size = (num_blocks, block_size, num_heads, head_dim)
            keys, values = (_zeros(size, dtype, device) for _ in range(2))
            if dtype is not torch.int8:
                return LayerCache(keys, values)
            return LayerCache(keys, values, *(_zeros(size[:-1], torch.float32, device) for _ in range(2)))

        return cls([layer(*kv_shape) for kv_shape in shape.kv_shapes])

    @property
    def block_size(self) -> int:
        return self.layers[0].keys.shape[1]

    def clear(self, block_ids: torch.Tensor) -> None:
        """Zero blocks (int64 [n]) that change hands.

        Attention reads a block's unused slots too and gives them no weight, but no weight times infinity is not zero.
        """
        if len(block_ids):
            for keys, values, *_ in self.layers:
                keys.index_fill_(0, block_ids, 0)
                values.index_fill_(0, block_ids, 0)


def _zeros(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(size, dtype=dtype, device=device)
    # numpy's zeros are pages the system hands out on first touch: an idle server stays small.
    num_bytes = math.prod(size) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(dtype).view(size)


@dataclass(frozen=True, slots=True)
class _Product:
    """A product of a layer, and what each adapter adds to it."""

    linear: Linear
    low_ranks: list[LowRank | None]


class _Layer:
    """One layer's weights, laid out. Biases (Qwen2) and the norms of query and key heads (Qwen3) are optional."""

    def __init__(
        self,
        weights: Mapping[str, Weight],
        prefix: str,
        eps: float,
        make_linear: MakeLinear,
        adapters: Sequence[Adapter],
    ) -> None:
        def product(*names: str, norm: torch.Tensor | None = None) -> _Product:
            biases = [vector(f"{prefix}.{name}.bias") for name in names if f"{prefix}.{name}.bias" in weights]
            parts = [weights[f"{prefix}.{name}.weight"] for name in names]
            linear = make_linear(parts, torch.cat(biases) if biases else None, norm)
            sizes = [part.shape[0] for part in parts]
            return _Product(
                linear, [merge([each.get(f"{prefix}.{name}") for name in names], sizes) for each in adapters]
            )

        def vector(name: str) -> torch.Tensor:
            weight = weights[name]
            assert isinstance(weight, torch.Tensor), "a quantised vector"
            return weight

        self.input_norm = vector(f"{prefix}.input_layernorm.weight")
        self.post_norm = vector(f"{prefix}.post_attention_layernorm.weight")
        q_norm, k_norm = (f"{prefix}.self_attn.{name}_norm.weight" for name in "qk")
        self.head_norms = HeadNorms(vector(q_norm), vector(k_norm), eps) if q_norm in weights else None
        self.qkv = product("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", norm=self.input_norm)
        self.out = product("self_attn.o_proj")
        self.gate_up = product("mlp.gate_proj", "mlp.up_proj", norm=self.post_norm)
        self.down = product("mlp.down_proj")


class Decoder:
    """The model, ready to run.

    `weights` maps Hugging Face's parameter names to tensors of one dtype on one device, or to quantised matrices where
    `make_linear` takes those; it is not kept: each is let go once laid out. A missing `lm_head.weight` means that it is
    tied to the embedding. `adapters` are of any dtype. With a `group` all are this rank's parts, and so are the numbers
    of `config` but the vocabulary's.
    """

    def __init__(
        self,
        config: DecoderConfig,
        weights: dict[str, Weight],
        ops: Ops,
        make_linear: MakeLinear = pack_linear,
        make_head: MakeLinear = pack_linear,
        adapters: Sequence[Adapter] = (),
        group: Group | None = None,
    ) -> None:
        self.shape = config.shape
        self._config = config
        self._ops = ops
        self._group = group
        embedding, norm = weights["model.embed_tokens.weight"], weights["model.norm.weight"]
        assert isinstance(embedding, torch.Tensor), "a quantised embedding"
        assert isinstance(norm, torch.Tensor), "a quantised vector"
        self._embedding, self._norm = embedding, norm
        self.dtype, self.device = embedding.dtype, embedding.device
        self._head = make_head([weights.pop("lm_head.weight", embedding)], None, norm)
        adapters = [
            {name: LowRank(*(part.to(self.device, self.dtype) for part in parts)) for name, parts in adapter.items()}
            for adapter in adapters
        ]
        self._layers = []
        for i in range(len(config.windows)):
            prefix = f"model.layers.{i}"
            self._layers.append(_Layer(weights, prefix, config.rms_norm_eps, make_linear, adapters))
            for name in [name for name in weights if name.startswith(f"{prefix}.")]:
                del weights[name]
        self._inv_freq = config.inv_freq.float().to(self.device)

    @torch.inference_mode()
    def forward(self, batch: PackedBatch, cache: KVCache) -> torch.Tensor:
        """Compute the batch, write its keys and values to the cache, return float32 logits [R, vocabulary]."""
        config, ops = self._config, self._ops
        num_q, num_kv, eps = config.num_heads, config.num_kv_heads, config.rms_norm_eps
        scale = config.head_dim**-0.5
        adapter_rows = batch.adapter_rows
        angles = batch.positions[:, None].float() * self._inv_freq
        cos, sin = angles.cos() * config.rope_scale, angles.sin() * config.rope_scale
        hidden = Hidden(self._embed(batch.token_ids))
        for layer, window, layer_cache in zip(self._layers, config.windows, cache.layers, strict=True):
            qkv = self._of_norm(hidden, layer.input_norm, layer.qkv, adapter_rows).view(
                -1, num_q + 2 * num_kv, config.head_dim
            )
            q = ops.rope_and_write_kv(qkv, layer.head_norms, cos, sin, layer_cache, batch.slot_mapping)
            attended = ops.paged_attention(q, layer_cache, batch.attention_plan, scale, window)
            hidden = self._added_to(hidden, attended.flatten(1), layer.out, adapter_rows)
            if adapter_rows:
                activated = ops.silu_mul(self._of_norm(hidden, layer.post_norm, layer.gate_up, adapter_rows))
            else:
                activated = ops.norm_gate_up(hidden, layer.post_norm, eps, layer.gate_up.linear)
            hidden = self._added_to(hidden, activated, layer.down, adapter_rows)
        # Only the rows that are sampled pass the head, the largest product of all.
        logits = ops.norm_linear(Hidden(hidden.values[batch.logit_rows]), self._norm, eps, self._head)
        if self._group is not None:
            logits = self._group.gather(logits)[:, : config.vocab_size]
        return logits.float()

    def _embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        if self._group is None:
            return F.embedding(token_ids, self._embedding)
        num_own = len(self._embedding)
        own = token_ids - self._group.rank * num_own
        is_other = (own < 0) | (own >= num_own)
        values = F.embedding(own.masked_fill(is_other, 0), self._embedding)
        return self._group.sum(values.masked_fill_(is_other[:, None], 0))

    def _of_norm(
        self, hidden: Hidden, norm_weight: torch.Tensor, product: _Product, adapter_rows: Sequence[AdapterRows]
    ) -> torch.Tensor:
        """The product of a norm [T, out], with what adapters add to it."""
        eps = self._config.rms_norm_eps
        y = self._ops.norm_linear(hidden, norm_weight, eps, product.linear)
        if adapter_rows:
            add_low_rank(y, self._ops.rms_norm(hidden.values, norm_weight, eps), product.low_ranks, adapter_rows)
        return y

    def _added_to(
        self, hidden: Hidden, x: torch.Tensor, product: _Product, adapter_rows: Sequence[AdapterRows]
    ) -> Hidden:
        """hidden + the product of x [T, in], with what adapters add to it."""
        if self._group is not None:
            y = product.linear(x)
            add_low_rank(y, x, product.low_ranks, adapter_rows)
            return Hidden(hidden.values + self._group.sum(y))
        hidden = self._ops.linear_add(x, product.linear, hidden)
        if not adapter_rows:
            return hidden
        add_low_rank(hidden.values, x, product.low_ranks, adapter_rows)
        return Hidden(hidden.values)  # whose squares are others now
