"""Hugging Face directories: what differs from what their config says is refused by name, before anything runs."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import fake_flashinfer
from headrace.kernels import cpu_backend
from headrace.kernels.decoder import ModelShape
from headrace.kernels.hf_decoder import FAMILIES
from headrace.kernels.torch_backend import TorchBackend
from headrace.scheduler import model_loader, model_plan
from headrace.scheduler.config import EngineConfig
from headrace.scheduler.errors import CapacityError, HeadraceError, ModelSourceError, UnsupportedModelError
from headrace.scheduler.model_loader import choose_device, load_engine
from headrace.scheduler.model_source import resolve_model
from requirements import need_program
from tiny_models import SHAPE, generate, generate_with_hugging_face, greedy, tiny_llama, tiny_model

# 1 layer, keys and values, 2 heads of 16 floats.
KV_BYTES_PER_TOKEN = 2 * 2 * 16 * 4


def one_layer() -> Any:
    return tiny_llama(seed=3, num_hidden_layers=1, max_position_embeddings=128)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    one_layer().save_pretrained(tmp_path)
    return tmp_path


def load(folder: Path, **fields: Any) -> Any:
    defaults: dict[str, Any] = {"device": "cpu", "dtype": "float32", "kv_cache_bytes": 1 << 20}
    return load_engine(EngineConfig(folder, **(defaults | fields)))


def change_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def generate_one(engine: tuple[Any, Any], prompt: list[int], num_tokens: int) -> list[int]:
    return generate(*engine, [prompt], [greedy(num_tokens)])[0]


def reference(folder: Path, prompt: list[int], num_tokens: int) -> list[int]:
    model: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return generate_with_hugging_face(model, prompt, num_tokens)


WEIGHTS = sorted(one_layer().state_dict())


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_missing_weight_is_named(folder: Path, name: str) -> None:
    change_weights(folder, lambda weights: weights.pop(name))
    with pytest.raises(ModelSourceError, match=name):
        load(folder)


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_weight_of_the_wrong_shape_is_named(folder: Path, name: str) -> None:
    change_weights(folder, lambda weights: weights.update({name: weights[name][:-16].clone()}))
    with pytest.raises(ModelSourceError, match=name):
        load(folder)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.bias", "model.layers.0.self_attn.q_norm.weight"])
def test_a_weight_that_would_be_left_out_is_named(folder: Path, name: str) -> None:
    change_weights(folder, lambda weights: weights.update({name: torch.zeros(64)}))
    with pytest.raises(HeadraceError, match=name):
        load(folder)


def test_a_context_that_no_memory_holds_costs_nothing_until_it_is_used(folder: Path) -> None:
    change_config(folder, max_position_embeddings=10**9)
    assert generate_one(load(folder), [5, 9, 2], 8) == reference(folder, [5, 9, 2], 8)


@pytest.mark.parametrize("is_asynchronous", [False, True])
def test_drafts_are_for_backends_that_know_each_token_before_the_next_step(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, is_asynchronous: bool
) -> None:
    monkeypatch.setattr(TorchBackend, "is_asynchronous", is_asynchronous)
    scheduler, _ = load(folder, speculative_tokens=5, speculation_max_seqs=3, cpu_kernel="torch")
    assert scheduler.policy.num_speculative_tokens == (0 if is_asynchronous else 5)
    assert scheduler.policy.speculation_max_seqs == 3


def test_tables_that_old_checkpoints_carry_are_no_obstacle(folder: Path) -> None:
    table = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    change_weights(folder, lambda weights: weights.update(table))
    assert generate_one(load(folder), [5, 9, 2], 8) == reference(folder, [5, 9, 2], 8)


@pytest.mark.parametrize("is_tied", [True, False])
def test_an_output_head_is_used_or_not_as_hugging_face_does(folder: Path, is_tied: bool) -> None:
    change_config(folder, tie_word_embeddings=is_tied)
    assert generate_one(load(folder), [5, 9, 2], 12) == reference(folder, [5, 9, 2], 12)


@pytest.mark.parametrize(
    "index",
    ["{", "[]", "{}", '{"weight_map": {"model.norm.weight": "absent.safetensors"}}', '{"weight_map": []}'],
)
def test_an_index_that_leads_nowhere_is_refused(folder: Path, index: str) -> None:
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelSourceError, match=r"index|absent"):
        load(folder)


@pytest.mark.parametrize("num_bytes", [0, 4, 100, -1])
def test_a_weight_file_that_ends_too_early_is_named(folder: Path, num_bytes: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(ModelSourceError, match=r"model\.safetensors"):
        load(folder)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"{}", b'{"model_type": "no-such-model"}', b"\xff"])
def test_a_config_that_cannot_be_read_is_refused_with_its_folder(folder: Path, text: bytes) -> None:
    (folder / "config.json").write_bytes(text)
    with pytest.raises(ModelSourceError, match=folder.name):
        load(folder)


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_size": "large"},
        {"hidden_size": None},
        {"num_attention_heads": 3},
        {"num_attention_heads": 0},
        {"rms_norm_eps": None},
        {"max_position_embeddings": None},
        {"head_dim": 15},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
    ],
    ids=str,
)
def test_a_config_that_contradicts_itself_is_refused_with_its_folder(folder: Path, fields: dict[str, Any]) -> None:
    change_config(folder, **fields)
    with pytest.raises(HeadraceError, match=folder.name):
        load(folder)


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("mamba", {}, "'mamba' is not supported; supported are cohere2, .*llama, .*starcoder2"),
        ("gemma3", {}, "'gemma3' is not supported; a text-only gemma3_text is"),
        ("phi3", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "longrope"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "dynamic"),
        (
            "gemma3_text",
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                }
            },
            "dynamic",
        ),
        ("qwen3", {"layer_types": ["chunked_attention"] * 2}, "chunked_attention"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "later tokens"),
        ("llama", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ("olmo2", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ("gpt2", {"num_attention_heads": 5}, "contradicts itself"),
    ],
    ids=str,
)
def test_what_would_be_computed_wrongly_is_refused_by_name(
    tmp_path: Path, family: str, fields: dict[str, Any], message: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPE | {"model_type": family} | fields))
    with pytest.raises(HeadraceError, match=message) as caught:
        load(tmp_path)
    assert tmp_path.name in str(caught.value)


@pytest.mark.parametrize(
    ("family", "message"), [("gpt_oss", "attention sinks"), ("llama4_text", "chunked_attention"), ("bloom", "layer")]
)
def test_an_attention_that_this_path_would_lose_is_refused_even_on_the_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, message: str
) -> None:
    monkeypatch.setattr(model_plan, "FAMILIES", FAMILIES | {family})
    rope = {"rope_type": "default", "rope_theta": 1e4}
    (tmp_path / "config.json").write_text(json.dumps(SHAPE | {"model_type": family, "rope_parameters": rope}))
    with pytest.raises(UnsupportedModelError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("model_type", ["llama", "of-its-own"])
def test_a_models_own_code_is_never_run(folder: Path, model_type: str) -> None:
    classes = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    change_config(folder, model_type=model_type, auto_map=classes)
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    if model_type == "llama":
        load(folder)
    else:
        with pytest.raises(ModelSourceError, match=folder.name):
            load(folder)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("family", ["llama", "olmo2"])
def test_keys_of_another_family_in_a_config_mean_nothing(tmp_path: Path, family: str) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    prompt = [5, 9, 2, 7, 1]
    expected = generate_one(load(tmp_path), prompt, 12)
    change_config(tmp_path, sliding_window=2, layer_types=["sliding_attention"] * 2)
    assert generate_one(load(tmp_path), prompt, 12) == expected


def test_learned_positions_bound_the_context(tmp_path: Path) -> None:
    model = tiny_model("gpt2", max_position_embeddings=24)
    model.save_pretrained(tmp_path)
    engine = load(tmp_path)
    assert engine[1].max_context_tokens == 24
    assert generate_one(engine, [5, 6], 22) == generate_with_hugging_face(model, [5, 6], 22)
    with pytest.raises(CapacityError, match="max_model_len: 25"):
        load(tmp_path, max_model_len=25)


def test_a_breadth_models_weights_are_refused_by_name_with_their_folder(tmp_path: Path) -> None:
    tiny_model("olmo2").save_pretrained(tmp_path)
    change_weights(tmp_path, lambda weights: weights.pop("model.norm.weight"))
    with pytest.raises(ModelSourceError, match=rf"{tmp_path.name}.*model\.norm\.weight"):
        load(tmp_path)


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_breadth_models_output_head_is_used_or_not_as_hugging_face_does(tmp_path: Path, is_tied: bool) -> None:
    tiny_model("olmo2").save_pretrained(tmp_path)
    change_config(tmp_path, tie_word_embeddings=is_tied)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert generate_one(load(tmp_path), [5, 9, 2], 12) == generate_with_hugging_face(model, [5, 9, 2], 12)


def test_the_cache_is_sized_by_what_the_model_asks(tmp_path: Path) -> None:
    tiny_model("gemma", head_dim=40, num_key_value_heads=1).save_pretrained(tmp_path)
    # 2 layers, keys and values, 1 head of 40 floats.
    scheduler, runner = load(tmp_path, block_size=8, kv_cache_bytes=2 * 2 * 40 * 4 * 8 * 5)
    assert scheduler.load().num_total_blocks == 5
    assert "transformers' gemma, 2 layers" in runner.description


@pytest.mark.parametrize(("asked", "index"), [("auto", 0), ("cuda", 0), ("cuda:1", 1)])
def test_a_gpu_is_chosen_by_its_number(asked: str, index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device(asked) == torch.device("cuda", index)


def test_a_gpu_that_is_not_there_is_an_error_that_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(CapacityError, match="cuda:1"):
        load(folder, device="cuda:1")
    assert "on cpu" in load(folder, device="auto")[1].description


@pytest.mark.parametrize(
    ("sizes", "keys"),
    [
        ({"max_model_len": 129}, "^max_model_len: "),
        ({"kv_cache_bytes": 1}, "^kv_cache_bytes: "),
        ({"kv_cache_bytes": 64 * KV_BYTES_PER_TOKEN, "max_model_len": 65}, "^kv_cache_bytes: .*max_model_len"),
    ],
)
def test_sizes_that_do_not_fit_are_told_by_their_keys_before_the_weights_are_read(
    folder: Path, sizes: dict[str, int], keys: str
) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(CapacityError, match=keys):
        load(folder, **sizes)


def test_the_cache_takes_its_share_of_free_memory_and_no_more_than_can_be_used(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def num_blocks(available: int | None, **fields: Any) -> int:
        monkeypatch.setattr(model_loader, "available_bytes", lambda: available)
        scheduler, _ = load(folder, kv_cache_bytes=None, block_size=8, **fields)
        return int(scheduler.load().num_total_blocks)

    block_bytes = 8 * KV_BYTES_PER_TOKEN
    assert num_blocks(100 * block_bytes) == 40
    # 128 tokens in 16 blocks for each of 5 sequences.
    assert num_blocks(10**9, max_num_seqs=5) == 5 * 16
    assert num_blocks(None, max_num_seqs=5) == 5 * 16
    assert num_blocks(10**9, max_num_seqs=5, max_model_len=20) == 5 * 3
    with pytest.raises(CapacityError):
        num_blocks(0)


@pytest.mark.parametrize(("block_size", "num_blocks"), [(1, 2), (1, 3), (2, 1), (16, 1)])
def test_the_smallest_cache_is_used_to_its_last_slot(folder: Path, block_size: int, num_blocks: int) -> None:
    num_bytes = num_blocks * block_size * KV_BYTES_PER_TOKEN
    scheduler, runner = load(folder, block_size=block_size, kv_cache_bytes=num_bytes)
    runner.warm_up()
    assert runner.max_context_tokens == num_blocks * block_size
    num_tokens = runner.max_context_tokens - 1
    assert generate_one((scheduler, runner), [5], num_tokens) == reference(folder, [5], num_tokens)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_key_value_heads": 3},
        {"num_hidden_layers": 0},
        {"max_position_embeddings": 1},
        {"model_type": "mistral", "sliding_window": 0},
        {"model_type": "mistral", "sliding_window": -1},
        {"model_type": "gemma2", "attn_logit_softcapping": 0.0, "head_dim": 16},
        {"model_type": "qwen2", "layer_types": ["sliding_attention"] * 2, "sliding_window": None},
    ],
    ids=str,
)
def test_sizes_that_no_model_can_have_are_named(tmp_path: Path, fields: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPE | {"model_type": "llama"} | fields))
    field = next(name for name in reversed(fields) if name not in ("head_dim", "layer_types"))
    message = {"num_key_value_heads": "heads"}.get(field, field)
    with pytest.raises(HeadraceError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn])
def test_weights_that_are_no_plain_floats_are_refused(folder: Path, dtype: torch.dtype) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    change_weights(folder, lambda weights: weights.update({name: weights[name].to(dtype)}))
    with pytest.raises(UnsupportedModelError, match=name):
        load(folder)


@pytest.mark.parametrize("name", ["../model.safetensors", "/model.safetensors", "sub/model.safetensors"])
def test_an_index_does_not_lead_out_of_its_folder(folder: Path, name: str) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ModelSourceError, match="outside its folder"):
        load(folder)


def test_weights_of_another_format_are_to_be_converted(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelSourceError, match="convert"):
        load(folder)


def test_a_model_that_computes_no_numbers_is_refused_while_warming_up(folder: Path) -> None:
    change_weights(folder, lambda weights: weights["model.norm.weight"].fill_(float("nan")))
    _, runner = load(folder)
    with pytest.raises(ModelSourceError, match="no numbers"):
        runner.warm_up()


def test_memory_that_does_not_suffice_for_the_kernel_is_named(folder: Path) -> None:
    need_program("g++")
    with pytest.raises(CapacityError, match="does not suffice for kv_cache_bytes"):
        load(folder, dtype="bfloat16", kv_cache_bytes=1 << 60, max_num_seqs=4096, block_size=1 << 30)


def test_a_setting_that_needs_the_kernel_says_why_there_is_none(folder: Path) -> None:
    for fields, complaint in (
        ({"kv_cache_dtype": "int8"}, r"kv_cache_dtype int8 needs the C\+\+ kernel.*float32"),
        ({"batch_invariant": True}, r"batch_invariant needs the C\+\+ kernel.*float32"),
        ({"cpu_kernel": "avx2"}, r"cpu_kernel avx2 needs the C\+\+ kernel.*float32"),
        ({"dtype": "auto", "cpu_kernel": "avx2", "block_size": 24}, "block_size 24 is no multiple of 16"),
        ({"dtype": "auto", "cpu_kernel": "torch", "kv_cache_dtype": "int8"}, "cpu_kernel is torch"),
    ):
        with pytest.raises(CapacityError, match=complaint):
            load(folder, **fields)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"quantization": "fp8"}, "quantization fp8 needs a GPU .* the device is cpu"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype fp8 needs a GPU .* the device is cpu"),
        ({"gpu_attention": "flashinfer"}, "gpu_attention flashinfer needs a GPU, and the device is cpu"),
    ],
)
def test_what_only_a_gpu_can_is_refused_by_name(folder: Path, fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(CapacityError, match=complaint):
        load(folder, **fields)


def test_flashinfer_attends_where_it_is_asked_for_and_can(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("triton")
    from headrace.kernels import flashinfer_ops, triton_ops

    gpu, shape = torch.device("cuda"), ModelShape(99, 99, ((2, 128), (2, 128)))

    def choose(kv_dtype: torch.dtype = torch.bfloat16, **fields: Any) -> Any:
        config = EngineConfig(Path("model"), **fields)
        return model_loader._choose_attention(config, gpu, shape, torch.bfloat16, kv_dtype)

    assert choose().ops is triton_ops
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    with pytest.raises(CapacityError, match=r"gpu_attention flashinfer needs headrace\[flashinfer\]"):
        choose(gpu_attention="flashinfer")
    monkeypatch.setitem(sys.modules, "flashinfer", fake_flashinfer)
    found = choose(gpu_attention="flashinfer")
    assert (found.ops, found.flashinfer_wrapper) == (
        flashinfer_ops,
        fake_flashinfer.BatchPrefillWithPagedKVCacheWrapper,
    )
    assert not caplog.records
    found = choose(torch.int8, gpu_attention="flashinfer")
    assert (found.ops, found.flashinfer_wrapper) == (triton_ops, None)
    assert "no int8 cache" in found.why_not
    assert "no int8 cache" in caplog.text


def test_dummy_weights_are_noise_in_the_shape_of_the_config(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelSourceError):
        load(folder)
    _, runner = load(folder, load_format="dummy")
    assert runner.description.startswith("random weights; packed llama")
    runner.warm_up()


def test_dummy_weights_are_for_families_whose_names_are_known_and_not_for_a_gguf(tmp_path: Path) -> None:
    tiny_model("gemma2").config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="load_format dummy is for llama"):
        load(tmp_path, load_format="dummy")
    with pytest.raises(CapacityError, match="load_format dummy needs a directory"):
        load(resolve_model(None).path, load_format="dummy")


@pytest.mark.parametrize(
    ("available", "settings", "num_integer_rows", "has_copy"),
    [
        (None, {}, 16, False),
        (6 * 2**30, {}, 16, True),
        (2 * 2**30 + 2**29, {}, 16, False),
        (6 * 2**30, {}, 256, False),
        (6 * 2**30, {"max_num_seqs": 16, "max_num_batched_tokens": 16}, 16, False),
        (6 * 2**30, {"batch_invariant": True}, 256, True),
    ],
    ids=str,
)
def test_quantised_weights_have_a_wide_copy_where_steps_are_wide_and_memory_is_plenty(
    available: int | None,
    settings: dict[str, Any],
    num_integer_rows: int,
    has_copy: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    need_program("g++", "the C++ kernel")
    path = resolve_model(None).path  # 269 MB in bfloat16
    monkeypatch.setattr(model_loader, "available_bytes", lambda: available)
    monkeypatch.setattr(cpu_backend, "most_integer_rows", lambda library, bits: num_integer_rows)
    _, runner = load_engine(EngineConfig(model_path=path, kv_cache_bytes=2**26, **settings), lambda line: None)
    assert ("a copy in bfloat16 for wide batches" in runner.description) is has_copy


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "8-bit activations"),
        ({"cpu_activations": "int16"}, "16-bit activations"),
        ({"batch_invariant": True}, None),
    ],
    ids=str,
)
def test_what_is_said_of_activations_is_what_the_kernel_does(
    settings: dict[str, Any], said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_program("g++", "the C++ kernel")
    monkeypatch.setattr(cpu_backend, "most_integer_rows", lambda library, bits: 16)
    _, runner = load_engine(
        EngineConfig(model_path=resolve_model(None).path, kv_cache_bytes=2**26, **settings), lambda line: None
    )
    assert ("activations" in runner.description) is (said is not None)
    assert said is None or said in runner.description
