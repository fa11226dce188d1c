"""What of a model is known before its weights are read, and how they become a decoder.

Made of the config, in Hugging Face's classes: these supply RoPE maths, names and shapes. The families of the compact
decoder are packed from the weights, since filling a Hugging Face model first takes several times as long; other
families go the breadth path. It reads no file, and knows neither settings nor memory.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from headrace.kernels.cpu_backend import Weight
from headrace.kernels.decoder import Decoder, DecoderConfig, ModelShape
from headrace.kernels.hf_decoder import (
    FAMILIES,
    HuggingFaceDecoder,
    UnsupportedConfigError,
    WeightsError,
    declared,
    empty_model,
)
from headrace.kernels.lora import Adapter
from headrace.kernels.ops import Ops
from headrace.kernels.quantised import QuantisedWeight
from headrace.kernels.tensor_parallel import Group, Sharding, UnsupportedPlanError
from headrace.scheduler.errors import ModelSourceError, UnsupportedModelError

COMPACT_FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
# RoPE variants whose angles depend on each sequence's own length are not the same for all rows of a batch.
_ROPE_TYPES = frozenset({"default", "linear", "llama3", "yarn"})
_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
# The layers of the compact decoder that an adapter can change.
_LINEARS = tuple(f".self_attn.{name}_proj.weight" for name in "qkvo") + tuple(
    f".mlp.{name}_proj.weight" for name in ("gate", "up", "down")
)

_Build = Callable[
    [dict[str, Weight], torch.dtype, torch.device, Ops, str, Sequence[Adapter], Group | None],
    Decoder | HuggingFaceDecoder,
]


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """What is to be known before the weights are read, and what checks them and turns them into a decoder.

    `linears` are the shapes of what adapters can change, by the modules' names. `decoder_config` is that of the compact
    decoder and `expected` its weights' shapes by name, None for other families. `sharding` is what a rank has of the
    weights; all but the linears is then of its part.
    """

    shape: ModelShape
    linears: Mapping[str, torch.Size]
    check: Callable[[dict[str, Weight]], None]
    build: _Build
    decoder_config: DecoderConfig | None = None
    expected: Mapping[str, torch.Size] | None = None
    sharding: Sharding | None = None

    def random_weights(self, is_tied: bool, dtype: torch.dtype, device: torch.device) -> dict[str, Weight]:
        """Noise in the shape of the model's weights, made where it is used; norms are ones.

        Raises: UnsupportedModelError where the names are not known.
        """
        if self.expected is None:
            raise UnsupportedModelError(f"load_format dummy is for {', '.join(sorted(COMPACT_FAMILIES))}")
        generator = torch.Generator(device).manual_seed(0)
        weights: dict[str, Weight] = {}
        for name, shape in self.expected.items():
            if is_tied and name == _HEAD:
                continue
            weight = torch.ones(shape, dtype=dtype, device=device)
            if not name.endswith("norm.weight"):
                weight.normal_(std=shape[-1] ** -0.5, generator=generator)
            weights[name] = weight
        return weights


def plan_model(
    path: Path, config: Any, rope_factors: torch.Tensor | None, rank: int = 0, num_ranks: int = 1
) -> ModelPlan:
    """The plan of a whole model, or of one rank's part.

    Raises: UnsupportedModelError, naming what is not supported; ModelSourceError for a config that cannot be.
    """
    try:
        _check_config(config)
        if config.model_type in COMPACT_FAMILIES:
            return _plan_compact(path, config, rope_factors, rank, num_ranks)
        if num_ranks > 1:
            families = ", ".join(sorted(COMPACT_FAMILIES))
            raise UnsupportedModelError(f"tensor_parallel_size is for {families}, and this is {config.model_type}")
        return _plan_breadth(path, config)
    except (UnsupportedModelError, UnsupportedConfigError) as error:
        raise UnsupportedModelError(f"{path}: {error}") from error
    except Exception as error:  # as where it was read
        raise ModelSourceError(f"{path}: the config contradicts itself: {error}") from error


def _check_config(config: Any) -> None:
    """Raises: UnsupportedModelError for a family that was not tested, or a feature no path has."""
    families = COMPACT_FAMILIES | FAMILIES
    if config.model_type not in families:
        text_type = getattr(getattr(config, "text_config", None), "model_type", None)
        hint = f"; a text-only {text_type} is" if text_type in families else ""
        raise UnsupportedModelError(
            f"model type {config.model_type!r} is not supported{hint}; supported are {', '.join(sorted(families))}"
        )
    if getattr(config, "quantization_config", None):
        raise UnsupportedModelError("quantization_config is not supported; a float checkpoint or a GGUF is")
    num_kv_heads = declared(config, "num_key_value_heads") or config.num_attention_heads
    window, types = declared(config, "sliding_window"), declared(config, "layer_types")
    has_sliding_layers = "sliding_attention" in (types or ())
    for is_wrong, text in (
        (config.num_hidden_layers < 1, "num_hidden_layers is below 1"),
        (config.max_position_embeddings < 2, "max_position_embeddings is below 2"),
        (config.num_attention_heads % num_kv_heads, f"{num_kv_heads} key/value heads do not divide the heads"),
        (has_sliding_layers and window is None, "layer_types has sliding layers, but there is no sliding_window"),
        ((has_sliding_layers or types is None) and window is not None and window < 1, "sliding_window is below 1"),
        (declared(config, "attn_logit_softcapping") == 0, "attn_logit_softcapping is 0"),
    ):
        if is_wrong:
            raise UnsupportedModelError(text)
    rope = getattr(config, "rope_parameters", None) or {}
    parts = [part for part in rope.values() if isinstance(part, dict)] or [rope]
    for rope_type in (part.get("rope_type", "default") for part in parts):
        if rope_type not in _ROPE_TYPES:
            raise UnsupportedModelError(
                f"rope type {rope_type!r} is not supported; {', '.join(sorted(_ROPE_TYPES))} are"
            )
    for layer_type in types or ():
        if layer_type not in _LAYER_TYPES:
            raise UnsupportedModelError(
                f"layer type {layer_type!r} is not supported; {', '.join(sorted(_LAYER_TYPES))} are"
            )


def _plan_compact(path: Path, config: Any, rope_factors: torch.Tensor | None, rank: int, num_ranks: int) -> ModelPlan:
    if config.hidden_act != "silu":
        raise UnsupportedModelError(f"hidden_act {config.hidden_act!r} is not supported; silu is")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotary = LlamaRotaryEmbedding(config)
    if 2 * len(rotary.inv_freq) != head_dim:
        raise UnsupportedModelError(f"head_dim {head_dim} does not rotate whole")
    types = declared(config, "layer_types") or ["sliding_attention"] * config.num_hidden_layers
    window = declared(config, "sliding_window")
    decoder_config = DecoderConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        windows=tuple(window if kind == "sliding_attention" else None for kind in types),
        rms_norm_eps=config.rms_norm_eps,
        max_position=config.max_position_embeddings,
        inv_freq=rotary.inv_freq if rope_factors is None else rotary.inv_freq / rope_factors,
        rope_scale=rotary.attention_scaling,
    )
    model = empty_model(config)
    expected = {name: weight.shape for name, weight in model.state_dict().items()}
    linears = {name.removesuffix(".weight"): shape for name, shape in expected.items() if name.endswith(_LINEARS)}
    sharding = None
    if num_ranks > 1:
        sharding = _shard(model.tp_plan, decoder_config, rank, num_ranks)
        expected = {name: sharding.shape(name, shape) for name, shape in expected.items()}
        decoder_config = replace(
            decoder_config,
            intermediate_size=decoder_config.intermediate_size // num_ranks,
            num_heads=decoder_config.num_heads // num_ranks,
            num_kv_heads=decoder_config.num_kv_heads // num_ranks,
        )

    def check(weights: dict[str, Weight]) -> None:
        _check_weights(path, expected, weights, _is_tied(config, weights))

    def build(
        weights: dict[str, Weight],
        dtype: torch.dtype,
        device: torch.device,
        ops: Ops,
        quantization: str,
        adapters: Sequence[Adapter],
        group: Group | None,
    ) -> Decoder:
        if device.type != "cuda":
            tensors: dict[str, Weight] = {**_take_tensors(weights, dtype, device)}
            return Decoder(decoder_config, tensors, ops, adapters=adapters, group=group)
        from headrace.kernels.gpu_linear import dense, gpu_linear

        quantised = {name: weights.pop(name) for name in [*weights] if isinstance(weights[name], QuantisedWeight)}
        taken = quantised | _take_tensors(weights, dtype, device)
        if (embedding := quantised.get(_EMBEDDING)) is not None:
            taken.setdefault(_HEAD, embedding)  # which is read whole in every step
            taken[_EMBEDDING] = dense(embedding, dtype, device)
        make_head = functools.partial(gpu_linear, dtype=dtype, device=device)
        make_linear = functools.partial(make_head, is_fp8=quantization == "fp8")
        return Decoder(decoder_config, taken, ops, make_linear, make_head, adapters, group)

    return ModelPlan(decoder_config.shape, linears, check, build, decoder_config, expected, sharding)


def _shard(plan: Mapping[str, str], config: DecoderConfig, rank: int, num_ranks: int) -> Sharding:
    """Raises: UnsupportedModelError where the model cannot be split into so many parts."""
    for count, what in (
        (config.num_kv_heads, "key/value heads"),
        (config.intermediate_size, "feed-forward inputs"),
    ):
        if count % num_ranks:
            raise UnsupportedModelError(f"tensor_parallel_size {num_ranks} does not divide its {count} {what}")
    try:
        return Sharding.by_plan(plan, rank, num_ranks)
    except UnsupportedPlanError as error:
        raise UnsupportedModelError(f"tensor_parallel_size {num_ranks}: {error}") from error


def _plan_breadth(path: Path, config: Any) -> ModelPlan:
    decoder = HuggingFaceDecoder(config)

    def build(
        weights: dict[str, Weight],
        dtype: torch.dtype,
        device: torch.device,
        ops: Ops,
        quantization: str,
        adapters: Sequence[Adapter],
        group: Group | None,
    ) -> HuggingFaceDecoder:
        assert group is None, "a rank's part"
        if quantization != "none":
            raise UnsupportedModelError(f"quantization is for {', '.join(sorted(COMPACT_FAMILIES))}")
        try:
            decoder.load(_take_tensors(weights), dtype, device, ops, adapters)
        except WeightsError as error:
            raise ModelSourceError(f"{path}: {error}") from error
        return decoder

    return ModelPlan(decoder.shape, decoder.linears, lambda weights: None, build)


def _take_tensors(
    weights: dict[str, Weight], dtype: torch.dtype | None = None, device: torch.device | None = None
) -> dict[str, torch.Tensor]:
    """Empty `weights`, none of which is quantised here, one by one."""
    taken = {}
    for name in [*weights]:
        weight = weights.pop(name)
        assert isinstance(weight, torch.Tensor)
        taken[name] = weight.to(device, dtype)
    return taken


def _check_weights(path: Path, expected: Mapping[str, torch.Size], weights: dict[str, Weight], is_tied: bool) -> None:
    """Compare names and shapes. Raises: ModelSourceError, naming the first that differs."""
    if is_tied:
        weights.pop(_HEAD, None)
    for name, shape in expected.items():
        if is_tied and name == _HEAD:
            continue
        if name not in weights:
            raise ModelSourceError(f"{path} lacks the weight {name}")
        if weights[name].shape != shape:
            raise ModelSourceError(
                f"{path}: weight {name} has shape {tuple(weights[name].shape)}, the config says {tuple(shape)}"
            )
    for name in set(weights) - set(expected):
        if not name.endswith("rotary_emb.inv_freq"):
            raise ModelSourceError(f"{path} has a weight that the config has not: {name}")
        del weights[name]


def _is_tied(hf_config: Any, weights: Mapping[str, Weight]) -> bool:
    """Whether the output projection is the embedding. As in transformers, it is not where the two differ."""
    if not hf_config.tie_word_embeddings:
        return False
    head, embedding = weights.get(_HEAD), weights.get(_EMBEDDING)
    if isinstance(head, torch.Tensor) and isinstance(embedding, torch.Tensor):
        return torch.equal(head, embedding)
    return True
