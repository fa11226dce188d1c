"""The breadth path: Hugging Face's own model classes over the packed batch and the paged KV cache.

transformers calls the attention registered here in place of its own; the rest of the model is its code. What a family
keeps outside that call (masks, RoPE tables that depend on the batch's lengths) would be lost in silence: hence the
list of families, each tested equal to `generate()`, and the refusals. A mixture's experts are computed in tiles of
one height, so that no row's bits depend on where its neighbours are routed. What adapters add is added by hooks of the
linear layers that they change.
"""

import functools
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.integrations.moe import ExpertsInterface
from transformers.utils import logging as transformers_logging

from headrace.kernels.decoder import KVCache, ModelShape, PackedBatch
from headrace.kernels.lora import Adapter, LowRank, add_low_rank
from headrace.kernels.ops import Ops

FAMILIES = frozenset(
    {
        "cohere2",
        "gemma",
        "gemma2",
        "gemma3_text",
        "gpt2",
        "gpt_neox",
        "granite",
        "ministral",
        "mixtral",
        "olmo2",
        "olmo3",
        "phi",
        "phi3",
        "qwen2_moe",
        "qwen3_moe",
        "smollm3",
        "stablelm",
        "starcoder2",
    }
)
_NAME = "headrace"
# Rows of one expert's product: few enough for a decode step, enough to read the weights seldom in a prompt chunk.
_TILE_ROWS = 16


class UnsupportedConfigError(ValueError):
    """This path would lose something that the model needs; the message says what."""


class WeightsError(ValueError):
    """The weights are not those of the model; the message names one that differs."""


@dataclass(frozen=True, slots=True)
class _Step:
    """What a forward hands to its attention calls."""

    batch: PackedBatch
    cache: KVCache
    ops: Ops
    windows: list[int | None]


@dataclass(frozen=True, slots=True)
class _Probe:
    """What the attention calls of an empty forward tell of each layer: its KV shape and its window."""

    kv_shapes: dict[int, tuple[int, int]] = field(default_factory=dict)
    windows: dict[int, int | None] = field(default_factory=dict)


# Some families hand no keyword arguments on to their attention, so a forward's context is left here instead.
_current: ContextVar[_Step | _Probe] = ContextVar("current")


def declared(config: Any, name: str) -> Any:
    """A field of a config that its family has, None for any other: transformers keeps stray keys and ignores them."""
    return getattr(config, name) if hasattr(type(config), name) else None


def empty_model(config: Any) -> Any:
    """Hugging Face's model of a config on the meta device: names, shapes and structure without memory."""
    config._experts_implementation = _NAME
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=_NAME, trust_remote_code=False)
    return model.eval()


class HuggingFaceDecoder:
    """A model with the interface of `decoder.Decoder`.

    It is made without weights, so that its shape is known before they are read; `load` makes it ready to run.
    Raises: UnsupportedConfigError.
    """

    dtype: torch.dtype
    device: torch.device

    def __init__(self, config: Any) -> None:
        self._model = empty_model(config)
        probe = _Probe()
        token = torch.zeros(1, 1, dtype=torch.int64, device="meta")
        self._run(probe, token, token, token[0])
        layers = range(config.num_hidden_layers)
        if sorted(probe.kv_shapes) != list(layers):
            raise UnsupportedConfigError("not every layer attends as this version can serve it")
        self.shape = ModelShape(
            config.vocab_size, config.max_position_embeddings, tuple(probe.kv_shapes[i] for i in layers)
        )
        # Where layers have types, Hugging Face's masks go by these, whatever the attention is told.
        types = declared(config, "layer_types")
        self._windows = [
            probe.windows[i] if types is None else config.sliding_window if types[i] == "sliding_attention" else None
            for i in layers
        ]

    @property
    def linears(self) -> dict[str, torch.Size]:
        """The weights [out, in] that an adapter can add to: of every linear layer but the head, which does not see all
        rows."""
        head = self._model.get_output_embeddings()
        modules = self._model.named_modules()
        return {name: each.weight.shape for name, each in modules if isinstance(each, nn.Linear) and each is not head}

    def load(
        self,
        weights: dict[str, torch.Tensor],
        dtype: torch.dtype,
        device: torch.device,
        ops: Ops,
        adapters: Sequence[Adapter] = (),
    ) -> None:
        """Take the weights, by Hugging Face's names of any age, and adapters of any dtype. Raises: WeightsError."""
        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()  # what it would report is raised below
        try:
            self._model, report = type(self._model).from_pretrained(
                None,
                config=self._model.config,
                state_dict=weights,
                dtype=dtype,
                attn_implementation=_NAME,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        except RuntimeError as error:
            raise WeightsError(f"the weights do not fit the config: {error}") from error
        for name, found, expected in sorted(report["mismatched_keys"]):
            raise WeightsError(f"weight {name} has shape {tuple(found)}, the config says {tuple(expected)}")
        for kind, verb in (("missing_keys", "lacks"), ("unexpected_keys", "should not have")):
            for name in sorted(report[kind]):
                if not name.endswith(_DERIVED):
                    raise WeightsError(f"the model {verb} the weight {name}")
        self._model.to(device)
        self.dtype, self.device, self._ops = dtype, device, ops
        for name in set().union(*adapters):
            parts = [adapter.get(name) for adapter in adapters]
            low_ranks = [
                None if each is None else LowRank(*(part.to(device, dtype) for part in each)) for each in parts
            ]
            self._model.get_submodule(name).register_forward_hook(functools.partial(_adapt, low_ranks))

    def forward(self, batch: PackedBatch, cache: KVCache) -> torch.Tensor:
        """Compute the batch, write its keys and values to the cache, return float32 logits [R, vocabulary]."""
        step = _Step(batch, cache, self._ops, self._windows)
        logits = self._run(step, batch.token_ids[None], batch.positions[None], batch.logit_rows)
        return logits[0].float()

    @torch.inference_mode()
    def _run(
        self, context: _Step | _Probe, token_ids: torch.Tensor, positions: torch.Tensor, logit_rows: torch.Tensor
    ) -> torch.Tensor:
        token = _current.set(context)
        try:
            output = self._model(token_ids, position_ids=positions, use_cache=False, logits_to_keep=logit_rows)
        finally:
            _current.reset(token)
        return output.logits  # type: ignore[no-any-return]


# Tables that old checkpoints carry beside their weights.
_DERIVED = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias")


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers calls it: query [1, H, T, D], key and value [1, G, T, D] -> [1, T, H, D]."""
    context, layer = _current.get(), module.layer_idx
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if isinstance(context, _Probe):
        if k.shape != v.shape or k.shape[-1] != q.shape[-1]:
            raise UnsupportedConfigError("values of another size than keys are not supported")
        if not getattr(module, "is_causal", True) or attention_mask is not None:
            raise UnsupportedConfigError("attention to later tokens is not supported")
        if others.get("s_aux") is not None:
            raise UnsupportedConfigError("attention sinks are not supported")
        context.kv_shapes[layer] = (k.shape[1], k.shape[2])
        context.windows[layer] = sliding_window
        return torch.empty_like(q)[None], None
    cache = context.cache.layers[layer]
    context.ops.write_kv(k, v, cache, context.batch.slot_mapping)
    attended = context.ops.paged_attention(
        q,
        cache,
        context.batch.attention_plan,
        q.shape[-1] ** -0.5 if scaling is None else scaling,
        context.windows[layer],
        softcap,
    )
    return attended[None], None


def _adapt(
    low_ranks: list[LowRank | None], module: nn.Linear, inputs: tuple[torch.Tensor], output: torch.Tensor
) -> None:
    """Add to a linear layer's output what adapters do."""
    context = _current.get()
    if isinstance(context, _Step) and context.batch.adapter_rows:
        x, y = inputs[0].reshape(-1, module.in_features), output.view(-1, module.out_features)
        assert len(x) == len(context.batch.token_ids), "a layer that does not see every row"
        add_low_rank(y, x, low_ranks, context.batch.adapter_rows)


def _mix_experts(
    module: Any, hidden: torch.Tensor, expert_ids: torch.Tensor, expert_weights: torch.Tensor
) -> torch.Tensor:
    """The weighted sum of each token's experts: hidden [T, E], ids and weights [T, K] -> [T, E]."""
    if hidden.is_meta:
        return torch.empty_like(hidden)
    num_choices = expert_ids.shape[-1]
    choices = expert_ids.flatten()
    counts = torch.bincount(choices, minlength=module.num_experts).tolist()
    outputs = hidden.new_empty(len(choices), hidden.shape[-1])
    tile = hidden.new_zeros(_TILE_ROWS, hidden.shape[-1])
    for expert, chosen in enumerate(choices.argsort(stable=True).split(counts)):
        for rows in chosen.split(_TILE_ROWS):
            tile[: len(rows)] = hidden[rows // num_choices]
            gate, up = F.linear(tile, module.gate_up_proj[expert]).chunk(2, dim=-1)
            outputs[rows] = F.linear(module.act_fn(gate) * up, module.down_proj[expert])[: len(rows)]
    outputs *= expert_weights.flatten()[:, None].to(outputs.dtype)
    return outputs.view(-1, num_choices, hidden.shape[-1]).sum(dim=1)


AttentionInterface.register(_NAME, _attend)
ExpertsInterface.register(_NAME, _mix_experts)
