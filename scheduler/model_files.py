"""A model's files: its config, and its weights under Hugging Face's names, out of safetensors or of a GGUF.

Weights are read one by one, without a second copy of all; a rank of a tensor-parallel group reads its own part of them.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from headrace.kernels.cpu_backend import Weight
from headrace.kernels.quantised import GROUP_BYTES, QuantisedWeight
from headrace.kernels.tensor_parallel import Sharding
from headrace.scheduler.errors import ModelSourceError, UnsupportedModelError
from headrace.scheduler.gguf_file import GGUFFile

_ROPE_FACTORS = "rope_freqs.weight"


def read_config(folder: Path) -> Any:
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a config that contradicts itself fails wherever transformers first looks
        hint = "; code that comes with a model is never run" if "trust_remote_code" in str(error) else ""
        raise ModelSourceError(f"{folder}: the config cannot be read{hint}: {error}") from error


def read_directory(folder: Path, sharding: Sharding | None) -> dict[str, Weight]:
    weights: dict[str, torch.Tensor] = {}
    for path in _weight_files(folder):
        try:
            with safe_open(path, "pt") as file:
                names = file.keys()
                for name in names:
                    if sharding is None:
                        weights[name] = file.get_tensor(name)
                    else:
                        weights[name] = sharding.take(name, file.get_slice(name))
        except (OSError, SafetensorError) as error:
            raise ModelSourceError(f"{path} cannot be read: {error}") from error
    for name, weight in weights.items():
        # Others stand for numbers by a scale that this loader does not know of.
        if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise UnsupportedModelError(f"{folder}: weight {name} is {weight.dtype}; use a float checkpoint or a GGUF")
    return dict(weights)


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        if not (folder / "model.safetensors").is_file():
            raise ModelSourceError(f"{folder} has no model.safetensors; convert weights of other formats to it")
        return [folder / "model.safetensors"]
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        if outside := [name for name in names if Path(name).name != name]:
            raise ModelSourceError(f"{index} names a file outside its folder: {outside[0]}")
        return [folder / name for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelSourceError(f"{index} is no index of weight files: {error!r}") from error


def read_gguf(
    file: GGUFFile, dtype: torch.dtype, *, keeps_quants: bool, sharding: Sharding | None = None
) -> dict[str, Weight]:
    """The weights in `dtype`, or a rank's part of them; with `keeps_quants` those as they are that the C++ kernel takes
    so.

    Raises: UnsupportedModelError, ModelSourceError.
    """

    def read(name: str) -> Weight:
        # Quantised vectors there are none; what is not a product's weight is small and wanted as numbers.
        if keeps_quants and (type_name := file.quantisation(name)) in GROUP_BYTES:
            return take(name, QuantisedWeight(type_name, file.read_quantised(name)))
        # Cast one by one: all of them in float32 would be twice the model.
        return take(name, torch.from_numpy(file.read(name)).to(dtype))

    def take(name: str, weight: Weight) -> Weight:
        return weight if sharding is None else sharding.take(name, weight)

    try:
        return {name: read(name) for name in file.names if name != _ROPE_FACTORS}
    except ValueError as error:
        raise ModelSourceError(f"{file.path} has a tensor that cannot be read: {error}") from error


def gguf_rope_factors(file: GGUFFile) -> torch.Tensor | None:
    """Llama 3's scaling reaches a GGUF as one factor per frequency."""
    return torch.from_numpy(file.read(_ROPE_FACTORS)) if _ROPE_FACTORS in file.names else None
