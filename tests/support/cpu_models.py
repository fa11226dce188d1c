"""Tiny random models in the C++ kernel's formats, and sequences run through any backend in any order of steps.

Imported by tests/support/sanitized_kernel.py too, so it knows nothing of pytest.
"""

import ctypes
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gguf
import torch
import torch.nn.functional as F
from gguf.quants import dequantize, quantize

from headrace.kernels import torch_ops
from headrace.kernels.backend import Backend, StepBatch
from headrace.kernels.cpu_backend import CpuBackend, Weight
from headrace.kernels.cpu_library import INSTRUCTION_SETS, InstructionSet
from headrace.kernels.decoder import Decoder, DecoderConfig, KVCache
from headrace.kernels.lora import Adapter, LowRank
from headrace.kernels.quantised import QuantisedWeight
from headrace.kernels.torch_backend import TorchBackend

_NATIVE = {each.name: each for each in INSTRUCTION_SETS}
EMULATED_AMX = InstructionSet(
    "emulated_amx",
    _NATIVE["avx512_bf16"].cpu_flags,
    (*_NATIVE["avx512_bf16"].compiler_flags, "-DHEADRACE_EMULATE_AMX"),
)


@dataclass(frozen=True, kw_only=True)
class TinyModel:
    """A random model. `types` go around over its matrices; a quantised one is so for both backends."""

    hidden_size: int = 64
    intermediate_size: int = 96
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    vocab_size: int = 100
    windows: tuple[int | None, ...] = (None, None)
    rope_scale: float = 1.0
    rms_norm_eps: float = 1e-5
    types: tuple[str, ...] = ("bfloat16",)
    has_qkv_bias: bool = False
    has_other_biases: bool = False
    has_head_norms: bool = False
    is_tied: bool = False
    seed: int = 0

    @property
    def config(self) -> DecoderConfig:
        return DecoderConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            windows=self.windows,
            rms_norm_eps=self.rms_norm_eps,
            max_position=4096,
            inv_freq=1e4 ** -(torch.arange(0, self.head_dim, 2) / self.head_dim),
            rope_scale=self.rope_scale,
        )

    def weights(self) -> dict[str, Weight]:
        types = itertools.cycle(self.types)
        return {
            name: values if values.ndim == 1 else _as_type(values, next(types))
            for name, values in self._random_weights()
        }

    def _random_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every part matters: scores are spread so that single tokens get much weight, and no layer drowns another."""
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int, spread: float = 1.0, mean: float = 0.0) -> torch.Tensor:
            return (torch.randn(*shape, generator=generator) * spread + mean).bfloat16().float()

        head_spread = 2 * self.hidden_size**-0.5
        yield (
            "model.embed_tokens.weight",
            normal(self.vocab_size, self.hidden_size, spread=head_spread if self.is_tied else 1),
        )
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        for i in range(len(self.windows)):
            for name, num_outputs, num_inputs in (
                ("self_attn.q_proj", queries, self.hidden_size),
                ("self_attn.k_proj", keys, self.hidden_size),
                ("self_attn.v_proj", keys, self.hidden_size),
                ("self_attn.o_proj", self.hidden_size, queries),
                ("mlp.gate_proj", self.intermediate_size, self.hidden_size),
                ("mlp.up_proj", self.intermediate_size, self.hidden_size),
                ("mlp.down_proj", self.hidden_size, self.intermediate_size),
            ):
                yield f"model.layers.{i}.{name}.weight", normal(num_outputs, num_inputs, spread=1.4 * num_inputs**-0.5)
                if self.has_qkv_bias if name.endswith(("q_proj", "k_proj", "v_proj")) else self.has_other_biases:
                    yield f"model.layers.{i}.{name}.bias", normal(num_outputs, spread=0.7)
            for norm in ("input_layernorm", "post_attention_layernorm"):
                yield f"model.layers.{i}.{norm}.weight", normal(self.hidden_size, spread=0.3, mean=1)
            if self.has_head_norms:
                for norm in ("self_attn.q_norm", "self_attn.k_norm"):
                    yield f"model.layers.{i}.{norm}.weight", normal(self.head_dim, spread=0.3, mean=1.3)
        yield "model.norm.weight", normal(self.hidden_size, spread=0.3, mean=1)
        if not self.is_tied:
            yield "lm_head.weight", normal(self.vocab_size, self.hidden_size, spread=head_spread)


# By whose names adapters call the matrices.
MODULES = (*(f"self_attn.{name}_proj" for name in "qkvo"), *(f"mlp.{name}_proj" for name in ("gate", "up", "down")))


def random_adapter(model: TinyModel, seed: int, rank: int, modules: Sequence[str] = MODULES) -> Adapter:
    """An adapter that changes these matrices about as much as they are large; of each next one it has a rank more."""
    generator = torch.Generator().manual_seed(seed)
    adapter = {}
    for name, weight in model.weights().items():
        if name.removesuffix(".weight").endswith(tuple(modules)):
            num_outputs, num_inputs = weight.shape
            down, up = (torch.randn(*size, generator=generator) for size in ((rank, num_inputs), (num_outputs, rank)))
            scaled = (0.8 * down * num_inputs**-0.5).bfloat16().float(), (up * rank**-0.5).bfloat16().float()
            adapter[name.removesuffix(".weight")] = LowRank(*scaled)
            rank += 1
    return adapter


def merged(weights: Mapping[str, Weight], adapter: Adapter) -> dict[str, Weight]:
    """The weights in float32, with what the adapter adds to them."""
    merged = {name: dequantised(weight).float() for name, weight in weights.items()}
    for name, low_rank in adapter.items():
        merged[f"{name}.weight"] = merged[f"{name}.weight"] + low_rank.up @ low_rank.down
    return {**merged}


def _as_type(values: torch.Tensor, type_name: str) -> Weight:
    if type_name == "bfloat16":
        return values
    return QuantisedWeight(type_name, quantize(values.numpy(), gguf.GGMLQuantizationType[type_name]))


def dequantised(weight: Weight) -> torch.Tensor:
    if isinstance(weight, torch.Tensor):
        return weight
    return torch.from_numpy(dequantize(weight.rows, gguf.GGMLQuantizationType[weight.type_name]))


def reference_backend(
    model: TinyModel, num_blocks: int, block_size: int = 16, adapter: Adapter | None = None
) -> TorchBackend:
    """The same model in float32, with an adapter merged."""
    config = model.config
    decoder = Decoder(config, merged(model.weights(), adapter or {}), torch_ops)
    cache = KVCache.allocate(config.shape, num_blocks, block_size, torch.float32, torch.device("cpu"))
    return TorchBackend(decoder, cache, torch_ops)


def cpu_backend(
    library: ctypes.CDLL,
    model: TinyModel,
    num_blocks: int,
    weights: dict[str, Weight] | None = None,
    **settings: Any,
) -> CpuBackend:
    defaults: dict[str, Any] = {"block_size": 16, "max_num_batched_tokens": 2048, "num_threads": 2}
    return CpuBackend(library, model.config, weights or model.weights(), num_blocks=num_blocks, **(defaults | settings))


def random_tokens(length: int, vocab_size: int = 100, seed: int = 0) -> list[int]:
    return torch.randint(0, vocab_size, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def check_close(logits: list[torch.Tensor], expected: list[torch.Tensor], settings: dict[str, Any]) -> None:
    """Errors in spreads of a row's logits; the models here show at most two thirds of the bounds, which are wider for
    8 bits in the cache, and again of activations."""
    ours, theirs = torch.cat(logits), torch.cat(expected)
    errors = (ours - theirs) / theirs.std(dim=-1, keepdim=True)
    width = 1 + 0.5 * settings.get("is_kv_int8", False) + 0.8 * (settings.get("activation_bits") == 8)
    assert errors.pow(2).mean().sqrt() < 0.02 * width
    assert errors.abs().max() < 0.2 * width
    divergence = F.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="batchmean")
    assert divergence < 7e-4 * width**2


class PagedRun:
    """Sequences whose blocks lie scattered, computed by a backend in steps of any mixture of chunks."""

    def __init__(
        self,
        backend: Backend,
        sequences: Sequence[list[int]],
        block_size: int = 16,
        num_blocks: int = 0,
        seed: int = 0,
        adapters: Sequence[int] = (),
    ) -> None:
        self.backend, self.sequences, self.adapters = backend, sequences, adapters
        sizes = [math.ceil(len(tokens) / block_size) for tokens in sequences]
        generator = torch.Generator().manual_seed(seed)
        free = torch.randperm(max(num_blocks, sum(sizes)), generator=generator).tolist()
        self.tables = [[free.pop() for _ in range(size)] for size in sizes]
        self.num_computed = [0] * len(sequences)

    def batch(self, counts: dict[int, int]) -> StepBatch:
        """The next `counts[i]` tokens of sequence i, all rows' logits wanted; these tokens count as computed."""
        token_ids: list[int] = []
        for i, count in counts.items():
            token_ids += self.sequences[i][self.num_computed[i] : self.num_computed[i] + count]
            self.num_computed[i] += count
        return StepBatch(
            token_ids,
            list(counts.values()),
            [self.num_computed[i] for i in counts],
            [self.tables[i] for i in counts],
            list(range(len(token_ids))),
            [self.adapters[i] for i in counts] if self.adapters else [],
        )

    def step(self, counts: dict[int, int]) -> dict[int, torch.Tensor]:
        """The logits of every row, by sequence."""
        logits = self.backend.forward(self.batch(counts)).clone()
        return dict(zip(counts, logits.split(list(counts.values())), strict=True))

    def all_logits(self, schedule: Sequence[dict[int, int]] = ()) -> list[torch.Tensor]:
        """Each sequence's logits after these steps, and a last one with all that they left."""
        found: list[list[torch.Tensor]] = [[] for _ in self.sequences]
        for counts in schedule:
            for i, logits in self.step(counts).items():
                found[i].append(logits)
        lengths = {i: len(tokens) - self.num_computed[i] for i, tokens in enumerate(self.sequences)}
        if rest := {i: length for i, length in lengths.items() if length}:
            for i, logits in self.step(rest).items():
                found[i].append(logits)
        return [torch.cat(each) for each in found]
