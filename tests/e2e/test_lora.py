"""LoRA adapters over the real model in the CPU kernel, over real sockets: asked for by name, side by side."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from openai import NotFoundError, OpenAI
from safetensors.torch import save_file

from headrace.scheduler.gguf_config import gguf_config
from headrace.scheduler.gguf_file import open_gguf
from headrace.scheduler.model_source import DEMO_MODEL_NAME
from server_process import ServerProcess, serving

PROMPTS = ["The mill wheel turned", "1, 2, 4, 8,", "Once upon a time, in a village by the river,"]
NAMES = [DEMO_MODEL_NAME, "strong", "weak"]


def write_adapter(folder: Path, config: object, seed: int, alpha: float) -> Path:
    generator = torch.Generator().manual_seed(seed)
    hidden_size, num_layers = config.hidden_size, config.num_hidden_layers  # type: ignore[attr-defined]
    weights = {}
    for name in (
        f"base_model.model.model.layers.{i}.self_attn.{name}_proj" for i in range(num_layers) for name in "qo"
    ):
        weights[f"{name}.lora_A.weight"] = torch.randn(8, hidden_size, generator=generator) * hidden_size**-0.5
        weights[f"{name}.lora_B.weight"] = torch.randn(hidden_size, 8, generator=generator) * 0.1
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    options = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": alpha, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(options))
    return folder


@pytest.fixture(scope="module")
def adapted(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder, config = tmp_path_factory.mktemp("lora"), gguf_config(open_gguf(demo_model))
    paths = {name: write_adapter(folder / name, config, 1, alpha) for name, alpha in (("strong", 16), ("weak", 4))}
    flags = [f"--lora-adapters={name}={path}" for name, path in paths.items()]
    with serving("--batch-invariant", "--kv-cache-bytes", "256MiB", *flags) as process:
        yield process


def test_adapters_answer_beside_each_other_as_they_do_alone(adapted: ServerProcess) -> None:
    client = OpenAI(base_url=f"{adapted.url()}/v1", api_key="none")

    def ask(name: str, prompt: str) -> str:
        completion = client.completions.create(model=name, prompt=prompt, max_tokens=12, temperature=0)
        assert completion.model == name
        return completion.choices[0].text

    asked = [(name, prompt) for prompt in PROMPTS for name in NAMES]
    alone = [ask(*each) for each in asked]
    with ThreadPoolExecutor(2 * len(asked)) as pool:
        assert [*pool.map(lambda each: ask(*each), 2 * asked)] == 2 * alone
    assert len(set(alone)) > len(PROMPTS) + 1, "the adapters change nothing"
    assert [model.id for model in client.models.list()] == NAMES
    with pytest.raises(NotFoundError, match="`of another server` does not exist"):
        ask("of another server", "a")


def test_the_start_says_which_adapters_there_are(adapted: ServerProcess) -> None:
    assert "LoRA adapters: strong, weak" in adapted.output
