"""A real proxy before real servers: this one with the demo model, and MLServer with a model of our own.

What the server answers without a proxy is the oracle. MLServer has an environment of its own, made by `make
setup-clients`, and joins in `make test-all`.
"""

import json
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from requirements import long, need
from server_process import ProxyProcess, ServerProcess, proxying
from waiting import until

MODEL = "SmolLM2-135M-Instruct"
PROMPTS = ["The river", "Once upon a time", "1, 2, 3,", "Water mills were"]
ASKED: dict[str, Any] = {"model": MODEL, "max_tokens": 12, "temperature": 0}
MLSERVER = Path(__file__).parent / "clients" / ".venvs" / "mlserver" / "bin" / "mlserver"


@pytest.fixture(scope="module")
def proxy(server: ServerProcess) -> Iterator[ProxyProcess]:
    with proxying(server.url(), "--max-wait-ms", "1000") as process:
        yield process


@pytest.fixture(scope="module")
def expected(server: ServerProcess) -> list[str]:
    answer = httpx.post(f"{server.url()}/v1/completions", json=ASKED | {"prompt": PROMPTS}, timeout=120)
    return [choice["text"] for choice in answer.raise_for_status().json()["choices"]]


def client_of(process: ServerProcess, *, is_strict: bool = False) -> OpenAI:
    """Streams of completions are not what the library's own types say, wherever they come from."""
    return OpenAI(base_url=f"{process.url()}/v1", api_key="none", max_retries=0, _strict_response_validation=is_strict)


def num_batches(proxy: ProxyProcess) -> float:
    """Under the model's name, or before the server's first answer under that of all unknown ones."""
    names = (f"completions:{MODEL}", "other")
    return sum(proxy.metrics().get(f'headrace_batch_size_count{{model="{name}"}}', 0) for name in names)


def test_completions_of_many_clients_are_merged(proxy: ProxyProcess, expected: list[str]) -> None:
    with client_of(proxy, is_strict=True) as client, ThreadPoolExecutor(3 * len(PROMPTS)) as pool:
        assert [model.id for model in client.models.list()][:1] == [MODEL]
        client.completions.create(**ASKED, prompt=PROMPTS[0])
        before = num_batches(proxy)
        answers = list(pool.map(lambda prompt: client.completions.create(**ASKED, prompt=prompt), 3 * PROMPTS))
    assert [answer.choices[0].text for answer in answers] == 3 * expected
    assert {answer.choices[0].index for answer in answers} == {0}
    assert len({answer.id for answer in answers}) == len(answers)
    assert sum(answer.usage.completion_tokens for answer in answers if answer.usage) == 12 * len(answers)
    assert num_batches(proxy) - before < len(answers)


def test_streams_of_many_clients_are_merged(proxy: ProxyProcess, expected: list[str]) -> None:
    def read(prompt: str) -> tuple[str, list[str | None], int]:
        options: Any = {"include_usage": True}
        stream = client.completions.create(**ASKED, prompt=prompt, stream=True, stream_options=options)
        *chunks, last = list(stream)
        assert last.usage is not None
        text = "".join(chunk.choices[0].text for chunk in chunks)
        return text, [chunk.choices[0].finish_reason for chunk in chunks][-1:], last.usage.completion_tokens

    with client_of(proxy) as client, ThreadPoolExecutor(2 * len(PROMPTS)) as pool:
        before = num_batches(proxy)
        seen = list(pool.map(read, 2 * PROMPTS))
    assert [text for text, _, _ in seen] == 2 * expected
    assert all(reasons == ["length"] for _, reasons, _ in seen)
    assert sum(count for _, _, count in seen) == 12 * len(seen)
    assert num_batches(proxy) - before < len(seen)


def test_a_refusal_is_the_servers_own(server: ServerProcess, proxy: ProxyProcess) -> None:
    seen = []
    for process in (server, proxy):
        with client_of(process) as client, pytest.raises(openai.BadRequestError) as refused:
            client.completions.create(**ASKED | {"temperature": 500}, prompt="x")
        seen.append(refused.value.body)
    assert seen[0] == seen[1]


def test_a_client_that_closes_its_stream_ends_the_generation(server: ServerProcess, proxy: ProxyProcess) -> None:
    cancelled = 'headrace_requests_finished_total{finished_reason="cancelled"}'
    before = server.metrics()[cancelled]
    with client_of(proxy) as client:
        stream = client.completions.create(model=MODEL, prompt="Once", max_tokens=2000, stream=True)
        next(stream)
        stream.close()
        until(lambda: server.metrics()[cancelled] == before + 1, "the generation is cancelled")


def test_a_signal_lets_requests_finish_and_ends_the_process(server: ServerProcess, expected: list[str]) -> None:
    with proxying(server.url()) as proxy, client_of(proxy) as client, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(lambda: client.completions.create(**ASKED | {"max_tokens": 60}, prompt=PROMPTS[1]))
        until(lambda: num_batches(proxy) == 1, "the upstream is asked")
        assert proxy.stop() == 0
        assert answer.result().choices[0].text.startswith(expected[1])


@contextmanager
def mlserver(folder: Path) -> Iterator[str]:
    """MLServer's address, with a model that doubles its input and writes down how many rows it got each time."""
    (folder / "doubler.py").write_text(
        "from mlserver import MLModel\n"
        "from mlserver.codecs import NumpyCodec\n"
        "from mlserver.types import InferenceRequest, InferenceResponse\n\n\n"
        "class Doubler(MLModel):\n"
        "    async def predict(self, payload: InferenceRequest) -> InferenceResponse:\n"
        "        array = NumpyCodec.decode_input(payload.inputs[0])\n"
        "        with open('rows.txt', 'a') as file:\n"
        "            print(len(array), file=file)\n"
        "        output = NumpyCodec.encode_output('y', 2 * array)\n"
        "        return InferenceResponse(id=payload.id, model_name=self.name, outputs=[output])\n"
    )
    (folder / "model-settings.json").write_text(json.dumps({"name": "doubler", "implementation": "doubler.Doubler"}))
    ports = []
    for name in ("http", "grpc", "metrics"):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            ports.append((name, listener.getsockname()[1]))
    settings = {f"{name}_port": port for name, port in ports} | {"host": "127.0.0.1", "parallel_workers": 0}
    (folder / "settings.json").write_text(json.dumps(settings))
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen([str(MLSERVER), "start", "."], cwd=folder, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{ports[0][1]}"
    try:

        def is_ready() -> bool:
            assert process.poll() is None, (folder / "log.txt").read_text()
            try:
                return httpx.get(f"{url}/v2/models/doubler/ready").status_code == 200
            except httpx.TransportError:
                return False

        until(is_ready, "MLServer is ready", timeout_s=120)
        yield url
    finally:
        process.terminate()
        process.wait(60)


@long
def test_tensors_for_mlserver_are_merged(tmp_path: Path) -> None:
    need(MLSERVER.exists(), "what `make setup-clients` installs")

    def ask(number: int) -> Any:
        data = [[float(number), 0.5]] * (1 + number % 3)
        tensor = {"name": "x", "datatype": "FP32", "shape": [len(data), 2], "data": data}
        body = {"id": str(number), "inputs": [tensor]}
        return client.post("/v2/models/doubler/infer", json=body, timeout=60).raise_for_status().json()

    with (
        mlserver(tmp_path) as url,
        proxying(url, "--max-wait-ms", "1000", "--health-path", "/v2/health/ready") as process,
        httpx.Client(base_url=process.url()) as client,
    ):
        assert client.get("/ready").json() == {"status": "ready"}
        assert client.get("/v2/models/doubler").json()["name"] == "doubler"
        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(ask, range(48)))
        refused = client.post("/v2/models/other/infer", json={"inputs": []})
    for number, answer in enumerate(answers):
        [output] = answer["outputs"]
        num_rows = 1 + number % 3
        assert (answer["id"], output["shape"]) == (str(number), [num_rows, 2])
        assert output["data"] == [2.0 * number, 1.0] * num_rows
    rows = [int(line) for line in (tmp_path / "rows.txt").read_text().split()]
    assert sum(rows) == sum(1 + number % 3 for number in range(48))
    assert len(rows) < 48
    assert refused.status_code == 404
