"""GGUF files as small as a test wants them."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf.quants import quantize

Array = npt.NDArray[np.float32]


def write_gguf(
    path: Path, metadata: Mapping[str, Any], tensors: Iterable[tuple[str, Array]] = (), kind: str = "F32"
) -> Path:
    """A file with this metadata, but for what is None, and these tensors, matrices as `kind`."""
    quantization = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, "")  # the metadata has the architecture, or lacks it
    adders: dict[type, Any] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
    }
    for key, value in metadata.items():
        if value is not None:
            adders.get(type(value), writer.add_array)(key, value)
    for name, values in tensors:
        if values.ndim == 1:
            writer.add_tensor(name, np.ascontiguousarray(values))
        else:
            writer.add_tensor(name, quantize(np.ascontiguousarray(values), quantization), raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_model(path: Path, architecture: str, model: Any, metadata: Mapping[str, Any], kind: str = "F32") -> Path:
    """A model of Hugging Face's as llama.cpp's converter writes it; the keys of `metadata` go without architecture."""
    config = model.config
    fields = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
    } | dict(metadata)
    named = {"general.architecture": architecture} | {f"{architecture}.{key}": value for key, value in fields.items()}
    return write_gguf(path, named, _converted_tensors(architecture, model), kind)


def _converted_tensors(architecture: str, model: Any) -> Iterator[tuple[str, Array]]:
    """The weights under the names that the `gguf` package has for them, changed as the converter does."""
    config = model.config
    [kind] = [kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture]
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem, _, suffix = name.rpartition(".")
        values = weight.numpy()
        if architecture == "llama" and stem.endswith(("q_proj", "k_proj")):
            # Rows in interleaved order.
            heads = config.num_attention_heads if stem.endswith("q_proj") else config.num_key_value_heads
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            values = values + 1
        yield f"{names.get_name(stem)}.{suffix}", values
