"""Tiny random models on disk: loaded, they continue prompts as Hugging Face's `generate()` does, or are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize

from gguf_writing import write_model
from headrace.kernels.torch_backend import TorchBackend
from headrace.scheduler.block_pool import BlockPool
from headrace.scheduler.config import EngineConfig
from headrace.scheduler.errors import CapacityError, HeadraceError, ModelSourceError
from headrace.scheduler.gguf_file import GGUFFile
from headrace.scheduler.messages import SamplingParams
from headrace.scheduler.model_loader import load_engine
from headrace.scheduler.scheduler import Scheduler
from tiny_models import VOCAB_SIZE, generate, generate_with_hugging_face, greedy, tiny_config, tiny_llama

NUM_TOKENS = 12


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(7)
    return [rng.integers(0, VOCAB_SIZE, length).tolist() for length in (1, 2, 5, 15, 16, 17, 31, 40)]


def reference(model: Any) -> list[list[int]]:
    return [generate_with_hugging_face(model, prompt, NUM_TOKENS) for prompt in prompts()]


def generate_all(
    path: Path,
    *,
    num_blocks: int = 64,
    block_size: int = 4,
    budget: int = 64,
    max_num_seqs: int = 8,
    num_short_answers: int = 0,
) -> tuple[list[list[int]], int]:
    config = EngineConfig(path, device="cpu", dtype="float32", block_size=block_size, kv_cache_bytes=1 << 20)
    _, runner = load_engine(config)
    runner.warm_up()
    scheduler = Scheduler(
        BlockPool(num_blocks), block_size=block_size, max_num_batched_tokens=budget, max_num_seqs=max_num_seqs
    )
    for _ in range(num_short_answers):
        scheduler._lengths.observe(1)
    outputs = generate(scheduler, runner, prompts(), [greedy(NUM_TOKENS)] * len(prompts()))
    return outputs, scheduler.load().num_preemptions


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tie_word_embeddings": True},
        {"head_dim": 32},
        {"num_key_value_heads": 1},
        {"num_key_value_heads": 4},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
                "rope_theta": 10000.0,
            }
        },
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "rope_theta": 1e4,
            }
        },
    ],
    ids=lambda fields: str(fields)[:50],
)
def test_a_llama_continues_as_generate_does(tmp_path: Path, fields: dict[str, Any]) -> None:
    model = tiny_llama(**fields)
    model.save_pretrained(tmp_path)
    assert generate_all(tmp_path)[0] == reference(model)


@pytest.mark.parametrize("budget", [1, 2, 3, 5, 7, 13])
def test_chunks_of_any_size_change_nothing(tmp_path: Path, budget: int) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    assert generate_all(tmp_path, budget=budget, max_num_seqs=min(budget, 4))[0] == reference(model)


@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_preemption_changes_nothing(tmp_path: Path, block_size: int) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    # After short answers more are admitted than will find blocks.
    outputs, num_preemptions = generate_all(
        tmp_path, block_size=block_size, num_blocks=-(-96 // block_size), num_short_answers=100
    )
    assert outputs == reference(model)
    assert num_preemptions > 0


def test_a_sharded_model_is_read_whole(tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert generate_all(tmp_path)[0] == reference(model)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_a_gguf_of_every_supported_type_equals_its_dequantised_weights(tmp_path: Path, kind: str) -> None:
    quantization = gguf.GGMLQuantizationType[kind]
    model = tiny_llama()
    write_model(tmp_path / "tiny.gguf", "llama", model, {}, kind)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            values = dequantize(quantize(parameter.detach().numpy(), quantization), quantization)
            parameter.data = torch.from_numpy(values.copy())
        read = GGUFFile(tmp_path / "tiny.gguf").read(name)
        np.testing.assert_array_equal(read, parameter.detach().numpy())
    assert generate_all(tmp_path / "tiny.gguf")[0] == reference(model)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:3000])


def _garble(path: Path) -> None:
    path.write_bytes(b"NOPE" + path.read_bytes()[4:])


@pytest.mark.parametrize("damage", [_truncate, _garble])
def test_a_damaged_gguf_is_refused_by_its_name(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    path = tmp_path / "tiny.gguf"
    write_model(path, "llama", tiny_llama(), {})
    damage(path)
    with pytest.raises(ModelSourceError, match=r"tiny\.gguf"):
        load_engine(EngineConfig(path, kv_cache_bytes=1 << 20))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_bias": True}, r"layers\.0\.self_attn\.q_proj\.bias"),
        ({"mlp_bias": True}, r"layers\.0\.mlp\.gate_proj\.bias"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "dynamic"),
        ({"num_hidden_layers": 3}, r"layers\.2"),
        ({"intermediate_size": 128}, "shape"),
        ({"num_hidden_layers": 1}, r"layers\.1"),
    ],
    ids=lambda change: str(change)[:40],
)
def test_a_directory_that_is_not_supported_or_does_not_fit_its_config_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    tiny_llama().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(HeadraceError, match=message):
        load_engine(EngineConfig(tmp_path, kv_cache_bytes=1 << 20))


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    tiny_config().save_pretrained(tmp_path)
    with pytest.raises(ModelSourceError, match=r"model\.safetensors"):
        load_engine(EngineConfig(tmp_path, kv_cache_bytes=1 << 20))


def test_a_cache_below_one_block_is_refused_and_a_small_one_bounds_the_context(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(CapacityError):
        load_engine(EngineConfig(tmp_path, device="cpu", kv_cache_bytes=100))
    # 2 layers, keys and values, 2 heads of 16 floats: 512 bytes a token in float32.
    config = EngineConfig(tmp_path, device="cpu", dtype="float32", block_size=8, kv_cache_bytes=512 * 8 * 5)
    _, runner = load_engine(config)
    assert runner.max_context_tokens == 40
    config = EngineConfig(tmp_path, device="cpu", dtype="float32", kv_cache_bytes=1 << 20, max_model_len=99)
    assert load_engine(config)[1].max_context_tokens == 99


def test_min_tokens_holds_the_end_back_for_so_many_tokens(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    _, runner = load_engine(EngineConfig(tmp_path, device="cpu", dtype="float32", kv_cache_bytes=1 << 20))
    end = frozenset(range(VOCAB_SIZE - 1))  # all tokens but one end the sequence
    for min_tokens in (0, 1, 5):
        scheduler = Scheduler(BlockPool(16), block_size=16, max_num_batched_tokens=16, max_num_seqs=1)
        sampling = SamplingParams(temperature=0, max_tokens=20, min_tokens=min_tokens, stop_token_ids=end)
        [tokens] = generate(scheduler, runner, [[1, 2, 3]], [sampling])
        assert tokens[:min_tokens] == [VOCAB_SIZE - 1] * min_tokens
        assert len(tokens) >= min_tokens + 1


def test_what_a_block_held_before_never_reaches_its_next_owner(tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    _, runner = load_engine(EngineConfig(tmp_path, device="cpu", dtype="float32", kv_cache_bytes=1 << 20))
    assert isinstance(runner.backend, TorchBackend)
    for cache in (tensor for layer in runner.backend._cache.layers for tensor in layer[:2]):
        cache.fill_(float("nan"))
    scheduler = Scheduler(BlockPool(16), block_size=16, max_num_batched_tokens=7, max_num_seqs=4)
    outputs = generate(scheduler, runner, prompts(), [greedy(NUM_TOKENS)] * len(prompts()))
    assert outputs == reference(model)


def test_an_output_projection_that_is_missing_or_misshapen_is_refused(tmp_path: Path) -> None:
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": False}))
    with pytest.raises(ModelSourceError, match="lm_head"):
        load_engine(EngineConfig(tmp_path, kv_cache_bytes=1 << 20))
