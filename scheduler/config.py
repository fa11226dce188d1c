"""The engine's settings, as the engine needs them: plain values, checked by whoever made them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Literal

from headrace.scheduler.messages import Tier

_NEVER = float("inf")


@dataclass(frozen=True, slots=True)
class SchedulingPolicy:
    """What the scheduler aims at: each tier's weight, the time between a stream's tokens that steps are sized for (none
    by default), what of the time beside streams is one-shot models', and how many tokens are drafted for a sequence
    (none by default) while no more than `speculation_max_seqs` run."""

    tier_weights: Mapping[Tier, float] = field(
        default_factory=lambda: {Tier.PREMIUM: 8.0, Tier.STANDARD: 3.0, Tier.BATCH: 1.0}
    )
    itl_targets_s: Mapping[Tier, float] = field(default_factory=lambda: dict.fromkeys(Tier, _NEVER))
    one_shot_share: float = 0.25
    num_speculative_tokens: int = 0
    speculation_max_seqs: int = 4


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """`kv_cache_bytes` None sizes the cache from free memory; `max_model_len` None takes the model's own limit.

    `tier_weights` and `itl_targets_s` are in the order of tiers; None takes the targets of the device. `lora_adapters`
    are PEFT's directories by the names that requests have. Tensor-parallel ranks wait `collective_timeout_s` for each
    other.
    """

    model_path: Path
    device: str = "cpu"
    tensor_parallel_size: int = 1
    collective_timeout_s: float = 60.0
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    kv_cache_dtype: Literal["auto", "int8", "fp8"] = "auto"
    quantization: Literal["none", "fp8"] = "none"
    load_format: Literal["auto", "dummy"] = "auto"
    gpu_attention: Literal["triton", "flashinfer"] = "triton"
    cpu_kernel: Literal["auto", "amx", "avx512_bf16", "avx512_vnni", "avx512", "avx2", "torch"] = "auto"
    cpu_activations: Literal["int8", "int16"] = "int8"
    batch_invariant: bool = False
    max_model_len: int | None = None
    block_size: int = 16
    kv_cache_bytes: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 256
    enable_prefix_caching: bool = True
    tier_weights: tuple[float, ...] = (8.0, 3.0, 1.0)
    itl_targets_s: tuple[float, ...] | None = None
    one_shot_share: float = 0.25
    speculative_tokens: int = 0
    speculation_max_seqs: int = 4
    lora_adapters: Mapping[str, Path] = field(default_factory=dict)


class OneShotTask(StrEnum):
    """What a model that answers in one pass is asked for: a text's vector, a pair's score, an image's labels."""

    EMBED = "embed"
    SCORE = "score"
    CLASSIFY = "classify"


@dataclass(frozen=True, slots=True)
class OneShotConfig:
    """A model that answers in one pass: a Hugging Face directory, and the name it is served under."""

    name: str
    path: Path
    task: OneShotTask
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
