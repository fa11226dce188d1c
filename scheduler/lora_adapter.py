"""Reading LoRA adapters as PEFT saves them: a directory with adapter_config.json and adapter_model.safetensors.

Called once, on the engine thread, before the weights are read. An option that asks for more than a plain low-rank
addition to linear layers is refused by its name, and so is one that this version has not heard of: an answer that
ignored it would look like the adapter's and be none. Weights in other formats, which could run code, are not read.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from headrace.kernels.lora import Adapter, LowRank
from headrace.scheduler.errors import ModelSourceError

MAX_RANK = 512
_MAX_CONFIG_BYTES, _MAX_WEIGHT_BYTES = 2**20, 2**32
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
_READ = frozenset({"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"})
# What was asked of training, or says where it comes from; which layers are changed, the weights tell.
_WITHOUT_EFFECT = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "lora_dropout",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "target_modules",
        "velora_config",
    }
)
# Of others that start from, and thereby change, the base model's own weights.
_PLAIN = {
    "peft_type": ("LORA",),
    "task_type": (None, "CAUSAL_LM"),
    "bias": ("none",),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}


def read_adapter(folder: Path, linears: Mapping[str, torch.Size]) -> Adapter:
    """The adapter in a directory, in float32, for a model whose linear layers have weights of these shapes, by name.

    Raises: ModelSourceError, naming what is missing, not supported or of another shape.
    """
    config = _read_config(folder / _CONFIG)
    weights = _read_weights(folder)
    if not weights:
        raise ModelSourceError(f"{folder}: {_WEIGHTS} is empty")
    adapter: dict[str, LowRank] = {}
    for name in sorted(weights):
        module = name.removeprefix(_PREFIX).removesuffix(_DOWN).removesuffix(_UP)
        names = f"{_PREFIX}{module}{_DOWN}", f"{_PREFIX}{module}{_UP}"
        if name not in names:
            raise ModelSourceError(f"{folder}: the weight {name} is not supported; those of linear layers' LoRA are")
        if module not in linears:
            raise ModelSourceError(f"{folder} changes {module}, which is no layer of this model that an adapter can")
        if not weights.keys() >= {*names}:
            raise ModelSourceError(f"{folder}: {module} has only one of {_DOWN[1:]} and {_UP[1:]}")
        if module not in adapter:
            down, up = (weights[each] for each in names)
            adapter[module] = _low_rank(folder, config, module, down, up, linears[module])
    return adapter


def _low_rank(
    folder: Path, config: dict[str, Any], module: str, down: torch.Tensor, up: torch.Tensor, shape: torch.Size
) -> LowRank:
    """What is added to a module's weight of this shape. Raises: ModelSourceError."""
    rank = _of_module(folder, config, "rank_pattern", "r", module)
    alpha = _of_module(folder, config, "alpha_pattern", "lora_alpha", module)
    if not 1 <= rank <= MAX_RANK or rank != int(rank):
        raise ModelSourceError(f"{folder}: the rank of {module} is {rank:g}; 1 to {MAX_RANK} is supported")
    num_outputs, num_inputs = shape
    for ending, weight, expected in ((_DOWN, down, (int(rank), num_inputs)), (_UP, up, (num_outputs, int(rank)))):
        if tuple(weight.shape) != expected:
            raise ModelSourceError(
                f"{folder}: {module}{ending} has shape {tuple(weight.shape)}; for this model and its rank it would be "
                f"{expected}"
            )
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    low_rank = LowRank(down.float(), scale * up.float())
    if not all(part.isfinite().all() for part in low_rank):
        raise ModelSourceError(f"{folder}: {module} has weights that are no numbers")
    return low_rank


def _read_config(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise ModelSourceError(f"{path} is larger than {_MAX_CONFIG_BYTES} bytes")
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelSourceError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ModelSourceError(f"{path} is no JSON object")
    for name, value in config.items():
        if name in _READ or name in _WITHOUT_EFFECT:
            continue
        is_plain = value in _PLAIN[name] if name in _PLAIN else not value
        if not is_plain:
            raise ModelSourceError(f"{path}: {name} {json.dumps(value)[:80]} is not supported")
    if "peft_type" not in config:
        raise ModelSourceError(f"{path} has no peft_type")
    return config


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / _WEIGHTS
    if not path.is_file():
        raise ModelSourceError(f"{folder} has no {_WEIGHTS}; convert weights of other formats to it")
    try:
        if path.stat().st_size > _MAX_WEIGHT_BYTES:
            raise ModelSourceError(f"{path} is larger than {_MAX_WEIGHT_BYTES} bytes")
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelSourceError(f"{path} cannot be read: {error}") from error
    for name, weight in weights.items():
        if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise ModelSourceError(f"{path}: weight {name} is {weight.dtype}")
    return weights


def _of_module(folder: Path, config: dict[str, Any], pattern: str, default: str, module: str) -> float:
    """A number of the config, which patterns of modules' names override; the first that matches the end of one does."""
    patterns = config.get(pattern) or {}
    try:
        matching = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module))
        return float(next(matching, config[default]))
    except (re.error, AttributeError, LookupError, OverflowError, TypeError, ValueError) as error:
        raise ModelSourceError(f"{folder / _CONFIG}: {default} or {pattern} is wrong: {error}") from error
