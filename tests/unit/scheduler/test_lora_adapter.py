"""LoRA adapters from PEFT's directories: rows that have one get what PEFT's merged weights make, in any company."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cpu_models import PagedRun
from gguf_writing import write_model
from headrace.scheduler.block_pool import BlockPool
from headrace.scheduler.config import EngineConfig
from headrace.scheduler.errors import HeadraceError, ModelSourceError
from headrace.scheduler.model_loader import load_engine
from headrace.scheduler.model_runner import ModelRunner
from headrace.scheduler.scheduler import Scheduler
from peft_adapters import save_adapter
from tiny_models import VOCAB_SIZE, generate, generate_with_hugging_face, greedy, tiny_llama, tiny_model

pytestmark = pytest.mark.xdist_group("peft")  # which takes seconds to import

NUM_TOKENS, BLOCK_SIZE = 10, 4
PROMPTS = [[(11 * i + j * j) % VOCAB_SIZE for j in range(length)] for i, length in enumerate((5, 40, 1, 17, 9))]
# Of these, "few" changes what the others leave alone, and one of each merged product's parts at most.
ADAPTERS: dict[str, dict[str, Any]] = {
    "all": {"r": 4, "lora_alpha": 10},
    "few": {"r": 3, "use_rslora": True, "target_modules": ["k_proj", "up_proj"]},
    "patterns": {
        "r": 8,
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 5},
        "alpha_pattern": {"model.layers.0.self_attn.*": 3, "down_proj": 32},
    },
}
NAMES: list[str | None] = [None, *ADAPTERS]


def load(path: Path, adapters: dict[str, Path], **fields: Any) -> ModelRunner:
    defaults: dict[str, Any] = {"dtype": "float32", "block_size": BLOCK_SIZE, "kv_cache_bytes": 1 << 20}
    _, runner = load_engine(EngineConfig(path, device="cpu", lora_adapters=adapters, **(defaults | fields)))
    return runner


def scheduler(**fields: Any) -> Scheduler:
    defaults: dict[str, Any] = {"max_num_batched_tokens": 9, "max_num_seqs": 6, "block_size": BLOCK_SIZE}
    return Scheduler(BlockPool(fields.pop("num_blocks", 128)), **(defaults | fields))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("lora")
    return {name: folder / name for name in ("model", *ADAPTERS)}


@pytest.fixture(scope="module")
def merged(folders: dict[str, Path]) -> dict[str | None, Any]:
    """The models that PEFT makes; the base and its adapters are on disk."""
    base = tiny_llama(seed=2, attention_bias=True)
    base.save_pretrained(folders["model"])
    models = {name: save_adapter(folders[name], base, i, **fields) for i, (name, fields) in enumerate(ADAPTERS.items())}
    return {None: base} | models


@pytest.fixture(scope="module")
def adapters(folders: dict[str, Path], merged: dict[str | None, Any]) -> dict[str, Path]:
    return {name: folders[name] for name in ADAPTERS}


def test_logits_beside_other_adapters_are_those_of_the_merged_weights(
    folders: dict[str, Path], adapters: dict[str, Path], merged: dict[str | None, Any]
) -> None:
    runner = load(folders["model"], adapters)
    numbers = [3, 0, 1, 2, 1]
    run = PagedRun(runner.backend, PROMPTS, BLOCK_SIZE, num_blocks=99, adapters=numbers)
    schedule = [{1: 13, 0: 4, 3: 2}, {2: 1, 0: 1, 1: 1, 3: 1}, {1: 20, 4: 9}]
    found = run.all_logits(schedule)
    for tokens, number, logits in zip(PROMPTS, numbers, found, strict=True):
        with torch.no_grad():
            expected = merged[NAMES[number]](torch.tensor([tokens])).logits[0]
            others = merged[NAMES[number - 1]](torch.tensor([tokens])).logits[0]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        assert (others - expected).abs().max() > 0.1


@pytest.mark.parametrize("budget", [6, 64])
def test_greedy_tokens_are_those_of_the_merged_weights(
    folders: dict[str, Path], adapters: dict[str, Path], merged: dict[str | None, Any], budget: int
) -> None:
    runner = load(folders["model"], adapters)
    runner.warm_up()
    prompts = [prompt for prompt in PROMPTS for _ in NAMES]
    answers = generate(
        scheduler(max_num_batched_tokens=budget),
        runner,
        prompts,
        [greedy(NUM_TOKENS)] * len(prompts),
        is_staggered=True,
        adapters=NAMES,
    )
    expected = [generate_with_hugging_face(merged[name], prompt, NUM_TOKENS) for prompt in PROMPTS for name in NAMES]
    assert answers == expected
    assert len({tuple(answer) for answer in expected}) == len(expected)


def test_cached_blocks_are_an_adapters_own(folders: dict[str, Path], adapters: dict[str, Path]) -> None:
    runner = load(folders["model"], adapters)
    cache = scheduler()
    alone = [
        generate(scheduler(has_prefix_cache=False), runner, [PROMPTS[1]], [greedy(4)], adapters=[name])
        for name in NAMES
    ]
    num_hits = []
    for _ in range(2):
        for name, expected in zip(NAMES, alone, strict=True):
            before = cache.load().num_prefix_hits
            assert generate(cache, runner, [PROMPTS[1]], [greedy(4)], adapters=[name]) == expected
            num_hits.append(cache.load().num_prefix_hits - before)
    assert num_hits == [0] * len(NAMES) + [36] * len(NAMES)


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("gemma2", {"head_dim": 32, "sliding_window": 5}),
        ("phi3", {}),
        ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}),
    ],
)
def test_adapters_of_other_families_are_as_peft_merges_them(
    tmp_path: Path, family: str, fields: dict[str, Any]
) -> None:
    base = tiny_model(family, **fields)
    base.save_pretrained(tmp_path / "model")
    targets = "all-linear" if family != "qwen3_moe" else ["q_proj", "o_proj"]  # its experts are no layers
    models = {None: base} | {
        name: save_adapter(tmp_path / name, base, i, r=4, target_modules=targets) for i, name in enumerate(("a", "b"))
    }
    runner = load(tmp_path / "model", {name: tmp_path / name for name in ("a", "b")})
    runner.warm_up()
    prompts = [prompt for prompt in PROMPTS[:2] for _ in models]
    answers = generate(scheduler(), runner, prompts, [greedy(6)] * len(prompts), adapters=[*models])
    assert answers == [generate_with_hugging_face(models[name], prompt, 6) for prompt in PROMPTS[:2] for name in models]


def test_a_gguf_takes_adapters_of_the_model_that_it_was_made_of(tmp_path: Path) -> None:
    base = tiny_llama(seed=4)
    write_model(tmp_path / "tiny.gguf", "llama", base, {})
    model = save_adapter(tmp_path / "adapter", base, 1, r=4)
    runner = load(tmp_path / "tiny.gguf", {"one": tmp_path / "adapter"})
    answers = generate(scheduler(), runner, PROMPTS, [greedy(6)] * len(PROMPTS), adapters=["one"])
    assert answers == [generate_with_hugging_face(model, prompt, 6) for prompt in PROMPTS]


@pytest.fixture
def adapter(tmp_path: Path, adapters: dict[str, Path]) -> Path:
    """A copy that a test may change."""
    for path in adapters["all"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def change_config(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in config.items() if value != "absent"}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, "use_dora true is not supported"),
        ({"bias": "all"}, 'bias "all" is not supported'),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"peft_type": "IA3"}, 'peft_type "IA3"'),
        ({"peft_type": "absent"}, "peft_type"),
        ({"task_type": "SEQ_CLS"}, "task_type"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
        ({"lora_bias": True}, "lora_bias"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"target_parameters": ["experts.down_proj"]}, "target_parameters"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"of_a_later_version": {"x": 1}}, "of_a_later_version"),
        ({"r": 5}, r"lora_A.weight has shape \(4, \d+\); for this model and its rank it would be \(5, "),
        ({"r": "absent"}, "r or rank_pattern is wrong"),
        ({"r": 0}, "rank of .* is 0; 1 to 512 is supported"),
        ({"r": 513}, "rank of .* is 513"),
        ({"r": 4.5}, "rank of .* is 4.5"),
        ({"lora_alpha": "much"}, "lora_alpha or alpha_pattern is wrong"),
        ({"lora_alpha": float("inf")}, "no numbers"),
        ({"lora_alpha": 10**400}, "lora_alpha or alpha_pattern is wrong"),
        ({"rank_pattern": {"(": 4}}, "r or rank_pattern is wrong"),
        ({"rank_pattern": 4}, "r or rank_pattern is wrong"),
    ],
    ids=str,
)
def test_an_option_that_is_not_supported_is_named(
    folders: dict[str, Path], adapter: Path, fields: dict[str, Any], message: str
) -> None:
    change_config(adapter, **fields)
    with pytest.raises(ModelSourceError, match=message) as caught:
        load(folders["model"], {"one": adapter})
    assert adapter.name in str(caught.value)


def test_options_of_training_alone_are_none_of_the_servers(folders: dict[str, Path], adapter: Path) -> None:
    change_config(
        adapter, lora_dropout=0.5, task_type="CAUSAL_LM", base_model_name_or_path="x/y", runtime_config={"a": 1}
    )
    load(folders["model"], {"one": adapter})


PREFIX = "base_model.model.model.layers.0."


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(f"{PREFIX}self_attn.q_proj.lora_B.weight"), "self_attn.q_proj has only one of"),
        (lambda w: w.update({f"{PREFIX}mlp.up_proj.lora_magnitude_vector": torch.ones(4)}), "lora_magnitude_vector"),
        (
            lambda w: w.update({"base_model.model.lm_head.lora_A.weight": torch.ones(4, 64)}),
            "lm_head, which is no layer",
        ),
        (lambda w: w.update({f"{PREFIX}mlp.u.lora_A.weight": torch.ones(4, 64)}), "mlp.u, which is no layer"),
        (lambda w: w.update({"model.layers.0.mlp.up_proj.lora_A.weight": torch.ones(4, 64)}), "is not supported"),
        (lambda w: w[f"{PREFIX}mlp.up_proj.lora_A.weight"].fill_(float("nan")), "mlp.up_proj has weights that are no"),
        (lambda w: w.update({f"{PREFIX}mlp.up_proj.lora_A.weight": torch.ones(4, 64, dtype=torch.int8)}), "int8"),
        (lambda w: w.clear(), "is empty"),
    ],
    ids=range(8),
)
def test_weights_that_do_not_belong_to_the_model_are_named(
    folders: dict[str, Path], adapter: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    change_weights(adapter, change)
    with pytest.raises(ModelSourceError, match=message):
        load(folders["model"], {"one": adapter})


def test_an_adapter_of_another_base_model_is_told_by_its_shapes(folders: dict[str, Path], tmp_path: Path) -> None:
    save_adapter(tmp_path, tiny_llama(hidden_size=32), 0, r=4)
    with pytest.raises(ModelSourceError, match=r"down_proj.lora_B.weight has shape \(32, 4\).* would be \(64, 4\)"):
        load(folders["model"], {"one": tmp_path})


def test_what_is_no_adapter_is_refused_by_its_name(folders: dict[str, Path], adapter: Path) -> None:
    config, weights = adapter / "adapter_config.json", adapter / "adapter_model.safetensors"
    kept = weights.read_bytes()
    for path, content, message in (
        (weights, kept[:100], "adapter_model.safetensors cannot be read"),
        (config, b"{", "adapter_config.json cannot be read"),
        (config, b"[]", "adapter_config.json is no JSON object"),
        (config, b"[" * 2**19, "adapter_config.json cannot be read"),
        (config, b" " * (2**20 + 1), "is larger than"),
    ):
        before = path.read_bytes()
        path.write_bytes(content)
        with pytest.raises(ModelSourceError, match=message):
            load(folders["model"], {"one": adapter})
        path.write_bytes(before)
    weights.rename(adapter / "adapter_model.bin")  # a pickle could run code
    with pytest.raises(ModelSourceError, match=r"has no adapter_model\.safetensors"):
        load(folders["model"], {"one": adapter})
    config.unlink()
    with pytest.raises(HeadraceError, match=r"adapter_config\.json cannot be read"):
        load(folders["model"], {"one": adapter})


def test_an_adapter_whose_numbers_are_too_large_is_named_at_the_start(folders: dict[str, Path], adapter: Path) -> None:
    change_weights(adapter, lambda w: [weight.mul_(1e30) for weight in w.values()])
    runner = load(folders["model"], {"one": adapter})
    with pytest.raises(ModelSourceError, match="the adapter one computes no numbers"):
        runner.warm_up()
