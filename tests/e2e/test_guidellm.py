"""guidellm, run as its manual says, finds nothing wrong and counts the tokens that the server counts.

It runs in an environment of its own, in `make test-all`.
"""

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from requirements import long, need
from scored_model import write_scored_model
from server_process import ServerProcess, serving

GUIDELLM = Path(__file__).parent / "clients" / ".venvs" / "guidellm" / "bin" / "guidellm"
NUM_REQUESTS = 24
NUM_STREAMS = [1, 4]
NUM_PROMPT_TOKENS, NUM_OUTPUT_TOKENS = 48, 20

pytestmark = long


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("guidellm") / "bytes"
    write_scored_model(path)
    return path


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[ServerProcess]:
    with serving(str(model), "--dtype", "float32", "--kv-cache-bytes", "64MiB") as process:
        yield process


def benchmark(server: ServerProcess, model: Path, route: str, out: Path) -> list[dict[str, Any]]:
    """What guidellm reports, a benchmark for each count of streams."""
    spec: dict[str, Any] = {
        "backend": {"kind": "openai_http", "target": server.url(), "request_format": route},
        "tokenizer": {"kind": "huggingface_auto", "model": str(model)},
        "data": [
            {
                "kind": "synthetic_text",
                "prompt_tokens": NUM_PROMPT_TOKENS,
                "output_tokens": NUM_OUTPUT_TOKENS,
            }
        ],
        "profile": {"kind": "concurrent", "streams": NUM_STREAMS},
        "constraints": [{"kind": "max_requests", "count": NUM_REQUESTS}],
        "outputs": [{"kind": "json", "path": str(out / "report.json")}],
    }
    (out / "run.json").write_text(json.dumps({"spec": spec}))
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # One process for its requests: each of them imports torch.
    environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(out), "GUIDELLM__MAX_WORKER_PROCESSES": "1"}
    command = [str(GUIDELLM), "run", "--config", str(out / "run.json"), "--disable-console"]
    run = subprocess.run(command, cwd=out, env=environ, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stderr
    benchmarks: list[dict[str, Any]] = json.loads((out / "report.json").read_text())["benchmarks"]
    return benchmarks


def num_generated(server: ServerProcess) -> float:
    metrics = httpx.get(f"{server.url()}/metrics").text
    found = re.findall(r"^headrace_generation_tokens_total(?:{.*})? (\S+)$", metrics, re.MULTILINE)
    return sum(map(float, found))


@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions", "/v1/responses"])
def test_all_requests_succeed_and_both_sides_count_the_same(
    server: ServerProcess, model: Path, route: str, tmp_path: Path
) -> None:
    need(GUIDELLM.exists(), "what `make setup-clients` installs")
    before = num_generated(server)
    benchmarks = benchmark(server, model, route, tmp_path)
    totals = [each["metrics"]["request_totals"] for each in benchmarks]
    assert [(each["successful"], each["errored"], each["incomplete"]) for each in totals] == [
        (NUM_REQUESTS, 0, 0) for _ in NUM_STREAMS
    ]
    told = 0
    for each in benchmarks:
        for request in each["requests"]["successful"]:
            assert 0 < request["output_tokens"] <= NUM_OUTPUT_TOKENS
            told += request["output_tokens"]
    assert num_generated(server) - before >= told
