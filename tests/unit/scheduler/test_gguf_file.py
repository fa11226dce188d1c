"""GGUF files: what is read equals what was written, and what cannot be read is refused by name."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from hypothesis import given, settings, strategies as st
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from gguf_writing import Array, write_gguf
from headrace.scheduler.config import EngineConfig
from headrace.scheduler.errors import HeadraceError, ModelSourceError, UnsupportedModelError
from headrace.scheduler.gguf_file import GGUFFile, open_gguf
from headrace.scheduler.model_loader import load_engine
from tiny_models import generate, generate_with_hugging_face, greedy

NUM_HEADS, NUM_KV_HEADS, HIDDEN, FEED_FORWARD, VOCAB = 4, 2, 64, 96, 96
METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.context_length": 64,
    "llama.embedding_length": HIDDEN,
    "llama.block_count": 1,
    "llama.feed_forward_length": FEED_FORWARD,
    "llama.attention.head_count": NUM_HEADS,
    "llama.attention.head_count_kv": NUM_KV_HEADS,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 10000.0,
}
# GGUF's name: (Hugging Face's, shape).
TENSORS: dict[str, tuple[str, tuple[int, ...]]] = {
    "token_embd.weight": ("model.embed_tokens.weight", (VOCAB, HIDDEN)),
    "output_norm.weight": ("model.norm.weight", (HIDDEN,)),
    "output.weight": ("lm_head.weight", (VOCAB, HIDDEN)),
    "blk.0.attn_norm.weight": ("model.layers.0.input_layernorm.weight", (HIDDEN,)),
    "blk.0.attn_q.weight": ("model.layers.0.self_attn.q_proj.weight", (HIDDEN, HIDDEN)),
    "blk.0.attn_k.weight": ("model.layers.0.self_attn.k_proj.weight", (HIDDEN // 2, HIDDEN)),
    "blk.0.attn_v.weight": ("model.layers.0.self_attn.v_proj.weight", (HIDDEN // 2, HIDDEN)),
    "blk.0.attn_output.weight": ("model.layers.0.self_attn.o_proj.weight", (HIDDEN, HIDDEN)),
    "blk.0.ffn_norm.weight": ("model.layers.0.post_attention_layernorm.weight", (HIDDEN,)),
    "blk.0.ffn_gate.weight": ("model.layers.0.mlp.gate_proj.weight", (FEED_FORWARD, HIDDEN)),
    "blk.0.ffn_up.weight": ("model.layers.0.mlp.up_proj.weight", (FEED_FORWARD, HIDDEN)),
    "blk.0.ffn_down.weight": ("model.layers.0.mlp.down_proj.weight", (HIDDEN, FEED_FORWARD)),
}


def random_tensors(seed: int = 0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) * 0.3 for name, (_, shape) in TENSORS.items()}


def write(path: Path, tensors: dict[str, Array], kind: str = "F32", metadata: dict[str, Any] | None = None) -> Path:
    """A GGUF with these tensors, matrices as `kind`, and this metadata."""
    return write_gguf(path, METADATA if metadata is None else metadata, tensors.items(), kind)


def load(path: Path) -> Any:
    return load_engine(EngineConfig(path, device="cpu", dtype="float32", kv_cache_bytes=1 << 20))


def read_all(path: Path) -> dict[str, Array]:
    file = GGUFFile(path)
    return {name: file.read(name) for name in file.names}


def from_llama_cpp_order(values: Array, num_heads: int) -> Array:
    """Row by row: what llama.cpp keeps as a head's rows 2 i and 2 i + 1 are Hugging Face's i and i + D / 2."""
    head_dim = len(values) // num_heads
    rows = np.empty_like(values)
    for head in range(num_heads):
        for i in range(head_dim // 2):
            rows[head * head_dim + i] = values[head * head_dim + 2 * i]
            rows[head * head_dim + i + head_dim // 2] = values[head * head_dim + 2 * i + 1]
    return rows


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0"])
def test_every_tensor_comes_out_dequantised_under_its_name_with_its_rows_in_order(tmp_path: Path, kind: str) -> None:
    tensors = random_tensors()
    quantization = gguf.GGMLQuantizationType[kind]
    read = read_all(write(tmp_path / "tiny.gguf", tensors, kind))
    assert set(read) == {name for name, _ in TENSORS.values()}
    for name, values in tensors.items():
        expected = values if values.ndim == 1 else dequantize(quantize(values, quantization), quantization)
        if name.endswith(("attn_q.weight", "attn_k.weight")):
            expected = from_llama_cpp_order(expected, NUM_HEADS if "attn_q" in name else NUM_KV_HEADS)
        ours = read[TENSORS[name][0]]
        np.testing.assert_array_equal(ours, expected)
        assert ours.dtype == np.float32
        assert ours.flags.writeable


def q5_0(block: bytes) -> list[float]:
    """32 values: a scale, their high bits, their low four."""
    scale, high, low = float16(block), int.from_bytes(block[2:6], "little"), block[6:]
    nibbles = [byte & 15 for byte in low] + [byte >> 4 for byte in low]
    return [scale * ((nibble | (high >> i & 1) << 4) - 16) for i, nibble in enumerate(nibbles)]


def six_bit(packed: bytes) -> tuple[list[int], list[int]]:
    """Eight scales and eight minima in twelve bytes."""
    scales, minima = [], []
    for i in range(4):
        scales.append(packed[i] & 63)
        minima.append(packed[i + 4] & 63)
    for i in range(4):
        scales.append(packed[i + 8] & 15 | packed[i] >> 6 << 4)
        minima.append(packed[i + 8] >> 4 | packed[i + 4] >> 6 << 4)
    return scales, minima


def q4_k(block: bytes) -> list[float]:
    """256 values in eight groups of 32; two groups share 32 bytes, low nibbles first."""
    return with_scales_and_minima(block, block[16:], lambda group, i: 0)


def q5_k(block: bytes) -> list[float]:
    """As Q4_K, with the fifth bits of group g in bit g of 32 bytes."""
    return with_scales_and_minima(block, block[48:], lambda group, i: block[16 + i] >> group & 1)


def with_scales_and_minima(block: bytes, low: bytes, fifth_bit: Callable[[int, int], int]) -> list[float]:
    scale, least = float16(block), float16(block[2:])
    scales, minima = six_bit(block[4:16])
    values = []
    for group in range(8):
        for i in range(32):
            nibble = low[group // 2 * 32 + i] >> 4 * (group % 2) & 15
            values.append(scale * scales[group] * (nibble | fifth_bit(group, i) << 4) - least * minima[group])
    return values


def q6_k(block: bytes) -> list[float]:
    """256 values, in sixteens with a signed scale each: low nibbles, high pairs of bits, scales, the block's scale."""
    low, high, scales, scale = block[:128], block[128:192], np.frombuffer(block[192:208], np.int8), float16(block[208:])
    values = []
    for i in range(256):
        half, quarter, at = i // 128, i % 128 // 32, i % 32
        nibble = low[half * 64 + quarter % 2 * 32 + at] >> quarter // 2 * 4 & 15
        bits = high[half * 32 + at] >> quarter * 2 & 3
        values.append(scale * int(scales[i // 16]) * ((nibble | bits << 4) - 32))
    return values


def float16(data: bytes) -> float:
    return float(np.frombuffer(data[:2], np.float16)[0])


BLOCKS: dict[str, tuple[int, int, list[int], Callable[[bytes], list[float]]]] = {
    # type: (values and bytes of a block, where its float16 are, how to read it)
    "Q5_0": (32, 22, [0], q5_0),
    "Q4_K": (256, 144, [0, 2], q4_k),
    "Q5_K": (256, 176, [0, 2], q5_k),
    "Q6_K": (256, 210, [208], q6_k),
}


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("chunk_bytes", [1, 1000, 2**20])
def test_blocks_are_read_as_their_format_defines_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, chunk_bytes: int
) -> None:
    monkeypatch.setattr("headrace.scheduler.gguf_file._CHUNK_BYTES", chunk_bytes)
    num_values, num_bytes, scales_at, read_block = BLOCKS[kind]
    rng = np.random.default_rng(1)
    rows = rng.integers(0, 256, (7, 3, num_bytes), dtype=np.uint8)
    for at in scales_at:  # random bytes would be infinities now and then
        rows[..., at : at + 2] = rng.standard_normal((7, 3, 1)).astype(np.float16).view(np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "blocks.gguf", "llama")
    quantization = gguf.GGMLQuantizationType[kind]
    writer.add_tensor("blk.0.ffn_up.weight", rows.reshape(7, -1), raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    expected = [[value for block in row for value in read_block(block.tobytes())] for row in rows]
    read = GGUFFile(tmp_path / "blocks.gguf").read("model.layers.0.mlp.up_proj.weight")
    assert read.shape == (7, 3 * num_values)
    np.testing.assert_allclose(read, np.array(expected, np.float32), rtol=1e-5, atol=1e-6)


def test_without_a_count_of_key_value_heads_there_are_as_many_as_query_heads(tmp_path: Path) -> None:
    tensors = random_tensors() | {"blk.0.attn_k.weight": random_tensors(1)["blk.0.attn_q.weight"]}
    metadata = {key: value for key, value in METADATA.items() if not key.endswith("head_count_kv")}
    read = read_all(write(tmp_path / "tiny.gguf", tensors, metadata=metadata))
    expected = from_llama_cpp_order(tensors["blk.0.attn_k.weight"], NUM_HEADS)
    np.testing.assert_array_equal(read["model.layers.0.self_attn.k_proj.weight"], expected)


def test_metadata_is_read_with_its_type_and_a_default_for_what_is_absent(tmp_path: Path) -> None:
    metadata = METADATA | {"tokenizer.ggml.tokens": ["a", "ü", "🌊"], "tokenizer.ggml.token_type": [1, 1, 3]}
    file = GGUFFile(write(tmp_path / "tiny.gguf", {}, metadata=metadata))
    assert file.architecture == "llama"
    assert file.get("tokenizer.ggml.tokens") == ["a", "ü", "🌊"]
    assert file.get("tokenizer.ggml.token_type") == [1, 1, 3]
    assert file.arch("block_count") == file.require("llama.block_count") == 1
    assert file.arch("absent", 5) == 5
    assert file.get("absent") is None
    with pytest.raises(UnsupportedModelError, match=r"tiny\.gguf.*absent\.key"):
        file.require("absent.key")


def test_a_file_is_parsed_once_for_all_who_ask(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf", {})
    assert open_gguf(path) is open_gguf(path)
    open_gguf.cache_clear()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write(tmp_path_factory.mktemp("gguf") / "whole.gguf", random_tensors(), "Q8_0").read_bytes()


def test_a_file_that_ends_too_early_is_refused_wherever_it_ends(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "short.gguf"

    @settings(max_examples=150, derandomize=True, deadline=None)
    @given(st.integers(0, len(whole) - 1) | st.integers(0, 1500))
    def refused(length: int) -> None:
        path.write_bytes(whole[:length])
        with pytest.raises(ModelSourceError, match=r"short\.gguf"):
            GGUFFile(path)

    refused()


@pytest.mark.parametrize(
    "damage",
    [lambda whole: b"GGML" + whole[4:], lambda whole: whole[:4] + b"\x09\0\0\0" + whole[8:], lambda whole: b"\0" * 500],
    ids=["magic", "version", "zeros"],
)
def test_a_file_of_another_format_is_refused(whole: bytes, tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "other.gguf"
    path.write_bytes(damage(whole))
    with pytest.raises(ModelSourceError, match=r"other\.gguf"):
        load(path)


def test_a_directory_or_nothing_in_its_place_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.gguf"):
        with pytest.raises(ModelSourceError, match=path.name):
            GGUFFile(path)


def test_a_damaged_header_is_refused_or_read_but_raises_nothing_else(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "damaged.gguf"
    messages: list[str] = []

    @settings(max_examples=400, derandomize=True, deadline=None)
    @given(st.integers(0, 1500), st.integers(0, 255))
    def survives(at: int, byte: int) -> None:
        path.write_bytes(whole[:at] + bytes([byte]) + whole[at + 1 :])
        messages.extend(refusals(path))

    survives()
    assert messages, "some damage must show"
    assert [message for message in messages if "damaged.gguf" not in message] == []


def refusals(path: Path) -> Iterator[str]:
    """What is said of a file that is refused; nothing of one that is read whole."""
    try:
        file = GGUFFile(path)
        for key in METADATA:
            file.get(key)
        with np.errstate(invalid="ignore", over="ignore"):  # numbers that are none
            for name in file.names:
                file.read(name)
    except HeadraceError as error:
        yield str(error)


@pytest.mark.parametrize("key", [key for key in METADATA if not key.endswith(("head_count_kv", "freq_base"))])
def test_missing_metadata_is_named(tmp_path: Path, key: str) -> None:
    metadata = {name: value for name, value in METADATA.items() if name != key}
    path = write(tmp_path / "tiny.gguf", random_tensors(), metadata=metadata)
    with pytest.raises(UnsupportedModelError, match=key):
        load(path)


@pytest.mark.parametrize("kind", ["Q5_1"])
def test_a_tensor_of_another_type_is_refused_with_its_name_and_type(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / "tiny.gguf", random_tensors(), kind)
    with pytest.raises(UnsupportedModelError, match=rf"token_embd\.weight is {kind}.*Q4_0"):
        load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"llama.attention.head_count": 5}, "head"),
        ({"llama.attention.head_count": 0}, "head"),
        ({"llama.attention.head_count_kv": 3}, "head|shape"),
        ({"llama.attention.head_count": [4, 4]}, "head"),
        ({"llama.rope.scaling.type": "linear"}, "rope scaling"),
        ({"llama.rope.scale_linear": 2.0}, "rope scaling"),
        ({"llama.block_count": 2}, r"layers\.1"),
        ({"llama.embedding_length": 128}, "shape"),
        ({"llama.block_count": 0}, "num_hidden_layers is below 1"),
        ({"llama.block_count": "two"}, "contradicts itself"),
        ({"llama.rope.dimension_count": 8}, "rotating 8 of 16"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_metadata_that_does_not_fit_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "tiny.gguf", random_tensors(), metadata=METADATA | change)
    with pytest.raises(HeadraceError, match=message):
        load(path)


@pytest.mark.parametrize(
    ("name", "size", "message"), [("foo.weight", 0, "cannot be read"), ("model.norm.weight", HIDDEN, "two tensors")]
)
def test_a_tensor_that_cannot_be_or_is_there_under_two_names_is_refused(
    tmp_path: Path, name: str, size: int, message: str
) -> None:
    path = write(tmp_path / "tiny.gguf", random_tensors() | {name: np.ones(size, np.float32)})
    with pytest.raises(ModelSourceError, match=message):
        load(path)


@pytest.mark.parametrize("name", [name for name in TENSORS if name != "output.weight"])
def test_a_missing_tensor_is_named(tmp_path: Path, name: str) -> None:
    tensors = {other: values for other, values in random_tensors().items() if other != name}
    path = write(tmp_path / "tiny.gguf", tensors)
    with pytest.raises(HeadraceError, match="embedding" if name == "token_embd.weight" else TENSORS[name][0]):
        load(path)


def test_frequency_factors_in_a_file_are_llama_3s_scaling(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
        "rope_theta": 10000.0,
    }
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=FEED_FORWARD,
        num_hidden_layers=1,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_KV_HEADS,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope_parameters=scaling,
        bos_token_id=None,
        eos_token_id=None,
    )
    plain = LlamaConfig(**(config.to_dict() | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}))
    factors = LlamaRotaryEmbedding(plain).inv_freq / LlamaRotaryEmbedding(config).inv_freq
    assert factors.min() < factors.max()
    path = write(tmp_path / "tiny.gguf", random_tensors() | {"rope_freqs.weight": factors.numpy()})
    model: Any = LlamaForCausalLM(config).eval()
    read = {name: torch.from_numpy(values) for name, values in read_all(path).items()}
    del read["rope_freqs.weight"]
    model.load_state_dict(read)

    prompt = list(range(40))
    scheduler, runner = load(path)
    [tokens] = generate(scheduler, runner, [prompt], [greedy(20)])
    assert tokens == generate_with_hugging_face(model, prompt, 20)
