"""lm-evaluation-harness, offline and on tasks of our own, comes to Hugging Face's numbers.

It runs in an environment of its own, in `make test-all`; what it sends is tried in tests/contract/test_scoring.py too.
"""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fake_engine import EOS
from requirements import IS_LONG, need
from scored_model import loglikelihood, write_scored_model
from server_process import serving
from tiny_models import generate_with_hugging_face

HERE = Path(__file__).parent
PYTHON = HERE / "clients" / ".venvs" / "lm-eval" / "bin" / "python"
TASKS = HERE / "evaluation"


def evaluate(url: str, model: Path, out: Path) -> dict[str, list[dict[str, Any]]]:
    """What the harness had answered to, and what it made of that, by task."""
    arguments = {
        "model": model.name,
        "base_url": f"{url}/v1/completions",
        "tokenizer": model,
        "tokenizer_backend": "huggingface",
        "tokenized_requests": True,
        "num_concurrent": 3,
        "max_length": 512,
        "max_retries": 1,
    }
    command = [
        str(PYTHON),
        "-m",
        "lm_eval",
        "run",
        "--model",
        "local-completions",
        "--batch_size",
        "4",
        "--log_samples",
    ]
    command += ["--tasks", "mill_choice,mill_text,mill_answer", "--include_path", str(TASKS), "--output_path", str(out)]
    command += ["--model_args", ",".join(f"{name}={value}" for name, value in arguments.items())]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(out)}
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | offline
    run = subprocess.run(command, cwd=TASKS, env=environ, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    samples: dict[str, list[dict[str, Any]]] = {}
    for file in out.rglob("samples_*.jsonl"):
        lines = file.read_text().splitlines()
        samples[file.name.removeprefix("samples_").rpartition("_")[0]] = [json.loads(line) for line in lines]
    return samples


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, dict[str, list[dict[str, Any]]]]]:
    """The model, and what the harness found."""
    if not IS_LONG:
        pytest.skip("a client of `make test-all`")
    need(PYTHON.exists(), "what `make setup-clients` installs")
    path = tmp_path_factory.mktemp("evaluation") / "scored"
    model = write_scored_model(path)
    with serving(str(path), "--dtype", "float32", "--kv-cache-bytes", "64MiB") as server:
        yield model, evaluate(server.url(), path, tmp_path_factory.mktemp("out"))


def test_choices_are_as_likely_as_hugging_face_has_them(evaluated: tuple[Any, Any]) -> None:
    model, samples = evaluated
    assert len(samples["mill_choice"]) == 5
    for sample in samples["mill_choice"]:
        totals = []
        for asked, [(total, is_greedy)] in zip(sample["arguments"].values(), sample["resps"], strict=True):
            expected, is_likeliest = loglikelihood(model, asked["arg_0"].encode(), asked["arg_1"].encode())
            assert float(total) == pytest.approx(expected, abs=1e-2)
            assert (is_greedy == "True") == is_likeliest
            totals.append(expected)
        assert sample["acc"] == (totals.index(max(totals)) == sample["doc"]["answer"])


def test_whole_texts_are_as_likely_as_hugging_face_has_them(evaluated: tuple[Any, Any]) -> None:
    model, samples = evaluated
    assert len(samples["mill_text"]) == 5
    for sample in samples["mill_text"]:
        text = sample["doc"]["text"].encode()
        expected, _ = loglikelihood(model, [EOS], text)
        assert float(sample["resps"][0][0]) == pytest.approx(expected, abs=1e-2)
        assert sample["bits_per_byte"] == pytest.approx([expected, len(text)], rel=1e-4)


def test_what_is_generated_is_what_hugging_face_generates(evaluated: tuple[Any, Any]) -> None:
    model, samples = evaluated
    assert len(samples["mill_answer"]) == 5
    for sample in samples["mill_answer"]:
        asked = sample["arguments"]["gen_args_0"]["arg_0"]
        token_ids = generate_with_hugging_face(model, [*asked.encode()], 24)
        text = bytes(token_id for token_id in token_ids if token_id != EOS).decode(errors="replace")
        assert sample["resps"][0][0] == text.partition("\n\n")[0]
