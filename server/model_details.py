"""What a model's files say of it, for clients that list models: its family, how large it is, how it is quantised.

Read once, on a worker thread, while the model loads. Knows nothing of how the model is computed.
"""

import json
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path

from safetensors import SafetensorError, safe_open

from headrace.scheduler.errors import ModelSourceError
from headrace.scheduler.gguf_file import open_gguf
from headrace.scheduler.model_source import ModelSource


@dataclass(frozen=True, slots=True)
class ModelDetails:
    """`value_type` is what most parameters are kept as, `modified_s` a time since the epoch; `digest` tells the model
    from others."""

    format: str = ""
    family: str = ""
    num_parameters: int = 0
    value_type: str = ""
    num_bytes: int = 0
    modified_s: float = 0
    digest: str = ""


def read_model_details(source: ModelSource) -> ModelDetails:
    """Raises: ModelSourceError."""
    if source.is_gguf:
        file, paths = open_gguf(source.path), [source.path]
        family = file.architecture
        counts = Counter[str]()
        for name in file.names:
            counts[file.quantisation(name)] += file.num_values(name)
    else:
        paths = sorted(source.path.glob("*.safetensors"))
        try:
            family = str(json.loads((source.path / "config.json").read_bytes()).get("model_type", ""))
            counts = _count_values(paths)
        except (OSError, ValueError, AttributeError, SafetensorError) as error:
            raise ModelSourceError(f"{source.path} cannot be read: {error}") from error
    stats = [path.stat() for path in paths]
    return ModelDetails(
        "gguf" if source.is_gguf else "safetensors",
        family,
        counts.total(),
        max(counts, key=lambda type: counts[type], default=""),
        sum(stat.st_size for stat in stats),
        max((stat.st_mtime for stat in stats), default=0),
        source.fingerprint(),
    )


def _count_values(paths: list[Path]) -> Counter[str]:
    """How many values of each type there are in these files."""
    counts = Counter[str]()
    for path in paths:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 - no dictionary
                values = file.get_slice(name)
                counts[values.get_dtype()] += prod(values.get_shape())
    return counts
