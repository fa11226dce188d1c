"""Reading a GGUF file: its metadata, and its tensors dequantised to float32 under Hugging Face's names.

The `gguf` package does the parsing and the dequantising; here are the names and the layout that differ from Hugging
Face's. Read on whatever thread asks; holds no torch tensor.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import functools
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf.quants import dequantize

from headrace.scheduler.errors import ModelSourceError, UnsupportedModelError

_SUPPORTED_TYPES = {"F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q4_K", "Q5_K", "Q6_K"}
_ARRAY, _STRING = gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING
# Dequantised at a time: a whole tensor at once takes twice the time and three times its size.
_CHUNK_BYTES = 2**20

_TENSOR_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA_TENSOR_NAMES = _TENSOR_NAMES | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


class _PlainReader(gguf.GGUFReader):
    """The package's reader without its cost: a memory map is sliced four times as slowly as the array under it, and
    a vocabulary's numbers would be 500,000 slices."""

    def _get(self, offset: int, dtype: npt.DTypeLike, count: int = 1, override_order: Any = None) -> npt.NDArray[Any]:
        if isinstance(self.data, np.memmap):
            self.data = self.data.view(np.ndarray)  # type: ignore[assignment]
        if self.byte_order != "I":
            raise ValueError("the file is of a machine with another byte order")
        end = offset + np.dtype(dtype).itemsize * int(count)
        if end > len(self.data):
            raise ValueError("the file ends too early")
        return self.data[offset:end].view(dtype)

    def _get_field_parts(
        self, orig_offs: int, raw_type: int
    ) -> tuple[int, list[npt.NDArray[Any]], list[int], list[gguf.GGUFValueType]]:
        """(Bytes, parts, which of the parts are values, types) of a metadata value."""
        if raw_type != _ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        head = [self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)]
        kind, count, start = gguf.GGUFValueType(head[0][0]), int(head[1][0]), orig_offs + 12
        if (dtype := self.gguf_scalar_to_np.get(kind)) is not None:
            values = [self._get(start, dtype, count)]
            end = start + values[0].nbytes
        elif kind == _STRING:
            values, end, view = [], start, self.data.data
            for _ in range(count):
                begin, end = end + 8, end + 8 + int.from_bytes(view[end : end + 8], sys.byteorder)
                if end > len(view):
                    raise ValueError("the file ends too early")
                values.append(self.data[begin:end])
        else:
            raise ValueError("an array of arrays")
        return end - orig_offs, head + values, list(range(2, 2 + len(values))), [_ARRAY, kind]


class GGUFFile:
    """A parsed file. The tensors stay on disk, mapped, until they are asked for."""

    def __init__(self, path: Path) -> None:
        try:
            self._reader = _PlainReader(path)
        except (ValueError, IndexError, KeyError, OSError, UnicodeDecodeError, OverflowError) as error:
            raise ModelSourceError(f"{path} is not a readable GGUF file: {error}") from error
        self.path = path
        self._check_tensors()
        self._is_gemma = str(self.get("general.architecture")).startswith("gemma")
        names = _GEMMA_TENSOR_NAMES if self._is_gemma else _TENSOR_NAMES
        self._tensors = {_hugging_face_name(tensor.name, names): tensor for tensor in self._reader.tensors}
        if len(self._tensors) < len(self._reader.tensors):
            raise ModelSourceError(f"{path} has two tensors of one name")

    def _check_tensors(self) -> None:
        """Raises: ModelSourceError for a tensor without values, and where tensors share bytes: a small file would fill
        any memory."""
        for tensor in self._reader.tensors:
            if len(tensor.shape) == 0 or tensor.n_elements == 0:
                raise ModelSourceError(f"{self.path}: the tensor {tensor.name} cannot be read: it has no values")
        if sum(tensor.n_bytes for tensor in self._reader.tensors) > len(self._reader.data):
            raise ModelSourceError(f"{self.path} has more tensors than bytes for them")

    def get(self, key: str, default: Any = None) -> Any:
        """A metadata value as a Python object, `default` where it is absent."""
        field = self._reader.get_field(key)
        try:
            return default if field is None else field.contents()
        except (ValueError, IndexError) as error:
            raise ModelSourceError(f"{self.path}: the metadata `{key}` cannot be read: {error}") from error

    def require(self, key: str) -> Any:
        """A metadata value. Raises: UnsupportedModelError where it is absent."""
        value = self.get(key)
        if value is None:
            raise UnsupportedModelError(f"{self.path} lacks the metadata `{key}`")
        return value

    def head_counts(self) -> tuple[int, int]:
        """(Query heads, key and value heads). Raises: UnsupportedModelError where they differ from layer to layer."""
        num_heads = self.require(f"{self.architecture}.attention.head_count")
        num_kv_heads = self.arch("attention.head_count_kv", num_heads)
        if not all(isinstance(count, int) and count > 0 for count in (num_heads, num_kv_heads)):
            raise UnsupportedModelError(f"{self.path}: head counts of {num_heads} and {num_kv_heads} are not supported")
        return num_heads, num_kv_heads

    @property
    def architecture(self) -> str:
        return str(self.require("general.architecture"))

    def arch(self, key: str, default: Any = None) -> Any:
        """A metadata value under the architecture's own prefix."""
        return self.get(f"{self.architecture}.{key}", default)

    @property
    def names(self) -> Iterable[str]:
        """The tensors' names as Hugging Face has them."""
        return self._tensors.keys()

    def num_rows(self, name: str) -> int:
        """A tensor's first dimension, which the file writes last."""
        return int(self._tensors[name].shape[-1])

    def num_values(self, name: str) -> int:
        return int(self._tensors[name].n_elements)

    def read(self, name: str) -> npt.NDArray[np.float32]:
        """Dequantise a tensor, and undo what llama.cpp's conversion did to its values.

        Raises: UnsupportedModelError for a tensor type that is not read here; ModelSourceError where the head counts
        do not divide a tensor's rows.
        """
        tensor = self._checked(name)
        rows = tensor.data.reshape(-1, tensor.data.shape[-1])
        values = np.empty((len(rows), int(tensor.shape[0])), np.float32)
        step = max(1, _CHUNK_BYTES // max(1, rows[:1].nbytes))
        for start in range(0, len(rows), step):
            values[start : start + step] = dequantize(rows[start : start + step], tensor.tensor_type)
        values = values.reshape([int(size) for size in reversed(tensor.shape)])
        if self._is_gemma and name.endswith("norm.weight"):
            values -= 1  # llama.cpp multiplies by the weight, Hugging Face by one more
        return self._in_order(name, values)

    def quantisation(self, name: str) -> str:
        """The type of a tensor's values, such as Q4_1 or F32."""
        return str(self._tensors[name].tensor_type.name)

    def read_quantised(self, name: str) -> npt.NDArray[np.uint8]:
        """A tensor's rows as they are stored, uint8 [rows, bytes], in Hugging Face's order. Raises: as `read`."""
        return self._in_order(name, np.ascontiguousarray(self._checked(name).data))

    def _checked(self, name: str) -> Any:
        tensor = self._tensors[name]
        if (type_name := self.quantisation(name)) not in _SUPPORTED_TYPES:
            supported = ", ".join(sorted(_SUPPORTED_TYPES))
            raise UnsupportedModelError(f"{self.path}: tensor {tensor.name} is {type_name}; supported are {supported}")
        return tensor

    def _in_order(self, name: str, rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Undo llama.cpp's order of the rows of a query or key projection."""
        if self.architecture != "llama" or not name.endswith(("q_proj.weight", "k_proj.weight")):
            return rows
        num_heads, num_kv_heads = self.head_counts()
        count = num_heads if name.endswith("q_proj.weight") else num_kv_heads
        if rows.ndim != 2 or len(rows) % (2 * count):
            raise ModelSourceError(f"{self.path}: {count} heads do not divide {self._tensors[name].name}, {rows.shape}")
        return _unpermute(rows, count)


@functools.lru_cache(maxsize=2)
def open_gguf(path: Path) -> GGUFFile:
    """Parse a file once for both who need it: the tokenizer on the server's side and the model loader."""
    return GGUFFile(path)


def _hugging_face_name(name: str, names: Mapping[str, str]) -> str:
    stem, _, suffix = name.rpartition(".")
    prefix = ""
    if stem.startswith("blk.") and stem.count(".") == 2:
        _, layer, stem = stem.split(".")
        prefix = f"model.layers.{layer}."
    return f"{prefix}{names.get(stem, stem)}.{suffix}"


def _unpermute(weight: npt.NDArray[Any], num_heads: int) -> npt.NDArray[Any]:
    """Undo llama.cpp's row order, which pairs rotary dimensions 2i and 2i + 1, not i and i + D / 2."""
    rows, columns = weight.shape
    head_dim = rows // num_heads
    return weight.reshape(num_heads, head_dim // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
