"""A random model of each family, written to a GGUF as llama.cpp's converter does, continues as `generate()` does."""

from pathlib import Path
from typing import Any

import pytest

from gguf_writing import write_model
from headrace.scheduler.config import EngineConfig
from headrace.scheduler.errors import HeadraceError, ModelSourceError, UnsupportedModelError
from headrace.scheduler.gguf_config import gguf_config
from headrace.scheduler.gguf_file import GGUFFile
from headrace.scheduler.model_loader import load_engine
from tiny_models import generate, generate_with_hugging_face, greedy, tiny_model

GEMMA = {"tie_word_embeddings": True, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 6}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
# GGUF's architecture and a variant: (transformers' model type, fields of its config, metadata beside the usual).
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {}, {}),
    "qwen2": ("qwen2", {}, {}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}, {}),
    "qwen3": ("qwen3", {"head_dim": 32}, {"attention.key_length": 32}),
    "gemma2": (
        "gemma2",
        GEMMA | {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0},
        {
            "attention.key_length": 32,
            "attention.sliding_window": 6,
            "attn_logit_softcapping": 20.0,
            "final_logit_softcapping": 10.0,
        },
    ),
    "gemma3": (
        "gemma3_text",
        GEMMA | {"num_hidden_layers": 7, "rope_parameters": GEMMA3_ROPE},
        {"attention.key_length": 32, "attention.sliding_window": 6, "rope.freq_base": 1000000.0},
    ),
    "gemma3 scaled": (
        "gemma3_text",
        GEMMA
        | {
            "num_hidden_layers": 6,
            "rope_parameters": GEMMA3_ROPE
            | {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0}},
        },
        {
            "attention.key_length": 32,
            "attention.sliding_window": 6,
            "rope.freq_base": 1000000.0,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
        },
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_each_family_continues_as_generate_does(tmp_path: Path, family: str) -> None:
    model_type, fields, metadata = FAMILIES[family]
    model = tiny_model(model_type, **fields)
    path = write_model(tmp_path / "tiny.gguf", family.partition(" ")[0], model, metadata)
    scheduler, runner = load_engine(
        EngineConfig(
            path, device="cpu", dtype="float32", kv_cache_bytes=1 << 20, max_num_batched_tokens=7, max_num_seqs=4
        )
    )
    prompts = [list(range(3, 23)), [5], [40, 41, 42] * 5]
    answers = generate(scheduler, runner, prompts, [greedy(16)] * len(prompts))
    assert answers == [generate_with_hugging_face(model, prompt, 16) for prompt in prompts]
    assert len({tuple(answer) for answer in answers}) == len(answers)


def config_of(tmp_path: Path, architecture: str, metadata: dict[str, Any], num_layers: int = 2) -> Any:
    model = tiny_model("gemma2" if architecture == "gemma2" else "gemma3_text", **GEMMA, num_hidden_layers=num_layers)
    usual = {"attention.sliding_window": 6, "attention.key_length": 32}
    return gguf_config(GGUFFile(write_model(tmp_path / "tiny.gguf", architecture, model, usual | metadata)))


@pytest.mark.parametrize(("architecture", "num_layers"), [("gemma2", 46), ("gemma3", 62)])
def test_only_the_largest_gemmas_scale_attention_by_another_size_than_the_heads(
    tmp_path: Path, architecture: str, num_layers: int
) -> None:
    assert config_of(tmp_path, architecture, {}).query_pre_attn_scalar == 32
    assert config_of(tmp_path, architecture, {}, num_layers).query_pre_attn_scalar == 64 // 4


def test_what_a_gemma_file_leaves_out_is_as_llama_cpp_has_it(tmp_path: Path) -> None:
    gemma2, gemma3 = config_of(tmp_path, "gemma2", {}), config_of(tmp_path, "gemma3", {}, 7)
    assert (gemma2.attn_logit_softcapping, gemma2.final_logit_softcapping) == (50.0, 30.0)
    assert gemma2.layer_types == ["sliding_attention", "full_attention"]
    assert gemma3.layer_types == ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"]
    assert gemma3.rope_parameters["sliding_attention"]["rope_theta"] == 10000.0


@pytest.mark.parametrize(
    ("metadata", "error", "message"),
    [
        ({"rope.scaling.type": "yarn"}, UnsupportedModelError, "rope scaling"),
        ({"attention.head_count_kv": 3}, UnsupportedModelError, "do not divide"),
        ({"attention.key_length": 16}, ModelSourceError, "the config says"),
    ],
    ids=str,
)
def test_metadata_that_does_not_fit_is_refused(
    tmp_path: Path, metadata: dict[str, Any], error: type[HeadraceError], message: str
) -> None:
    usual = {"attention.sliding_window": 6, "attention.key_length": 32}
    path = write_model(tmp_path / "tiny.gguf", "gemma3", tiny_model("gemma3_text", **GEMMA), usual | metadata)
    with pytest.raises(error, match=message):
        load_engine(EngineConfig(path, device="cpu", dtype="float32", kv_cache_bytes=1 << 20))


def test_an_architecture_that_is_not_read_is_refused_with_those_that_are(tmp_path: Path) -> None:
    path = write_model(tmp_path / "tiny.gguf", "phi3", tiny_model("phi3"), {})
    with pytest.raises(UnsupportedModelError, match=r"'phi3'.*qwen3.*directory"):
        load_engine(EngineConfig(path, device="cpu", dtype="float32", kv_cache_bytes=1 << 20))
