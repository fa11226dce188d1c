"""Routers as PyPI has them before two real servers on the fake model: requests spread, streams come through as they are
made, whoever leaves is gone from the server too, and one server's end is not its clients' affair."""

import os
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from fake_engine import expected_text
from requirements import long, need
from server_process import ScriptedServer, serving_script
from waiting import until

PYTHON = Path(__file__).parent / "clients" / ".venvs" / "router" / "bin" / "python"
ROUTERS = {"sglang-router": "sglang_router.launch_router", "vllm-router": "vllm_router.launch_router"}
SERVER = ("--drain-delay-s", "4", "--drain-grace-s", "60", "--trusted-proxies", "127.0.0.0/8")
SHORT = {"model": "fake", "prompt": "river", "max_tokens": 8, "temperature": 0}
# A step of ten milliseconds for each token.
SLOW = {"model": "fake", "prompt": "slow river", "max_tokens": 400, "temperature": 0, "stream": True}

pytestmark = long


def free_ports(num: int) -> list[int]:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(num)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


@contextmanager
def routing(module: str, *servers: ScriptedServer, policy: str = "round_robin") -> Iterator[httpx.Client]:
    """A client of a router before these servers, once it serves both."""
    need(PYTHON.exists(), "what `make setup-clients` installs")
    port, metrics_port = free_ports(2)
    flags = {
        "host": "127.0.0.1",
        "port": port,
        "prometheus-host": "127.0.0.1",
        "prometheus-port": metrics_port,
        "policy": policy,
        "health-check-endpoint": "/ready",
        "health-check-interval-secs": 1,
        "health-failure-threshold": 1,
        "health-success-threshold": 1,
        "worker-startup-check-interval": 1,
    }
    urls = [server.url() for server in servers]
    words = ["--worker-urls", *urls, *(f"--{name}={flag}" for name, flag in flags.items())]
    command = [str(PYTHON), "-m", module, *words]
    env = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:

            def serves_all() -> bool:
                assert process.poll() is None, "the router has ended"
                try:
                    for _ in servers:
                        client.post("/v1/completions", json=SHORT).raise_for_status()
                except httpx.HTTPError:
                    return False
                return all(num_finished(server, "length") > 0 for server in servers)

            until(serves_all, "the router serves both", 60)
            yield client
    finally:
        process.terminate()
        process.wait(30)


def sample(server: ScriptedServer, name: str) -> float:
    return server.metrics()[name]


def num_finished(server: ScriptedServer, reason: str) -> float:
    return sample(server, f'headrace_requests_finished_total{{finished_reason="{reason}"}}')


def is_idle(server: ScriptedServer) -> bool:
    metrics = server.metrics()
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_ratio")
    return all(metrics[f"headrace_{name}"] == 0 for name in names)


def text_of(answer: httpx.Response) -> Any:
    answer.raise_for_status()
    return answer.json()["choices"][0]["text"]


def streamed_texts(lines: Iterator[str]) -> Iterator[str]:
    """The texts of a stream as they come, up to its [DONE]."""
    for line in lines:
        if line == "data: [DONE]":
            return
        if found := re.search(r'"text":"(\w*)"', line):
            yield found[1]
    raise AssertionError("the stream has no end")


@contextmanager
def two_servers() -> Iterator[tuple[ScriptedServer, ScriptedServer]]:
    with serving_script(*SERVER) as first, serving_script(*SERVER) as second:
        yield first, second


@pytest.fixture(scope="module", params=[*ROUTERS.values()], ids=[*ROUTERS])
def routed(request: pytest.FixtureRequest) -> Iterator[tuple[httpx.Client, tuple[ScriptedServer, ScriptedServer]]]:
    """A router and its servers, for tests that end none of them."""
    with two_servers() as servers, routing(request.param, *servers) as client:
        yield client, servers


Routed = tuple[httpx.Client, tuple[ScriptedServer, ScriptedServer]]


def test_requests_are_spread_and_answered_as_they_are_without_a_router(routed: Routed) -> None:
    client, servers = routed
    before = [num_finished(server, "length") for server in servers]
    for _ in range(8):
        assert text_of(client.post("/v1/completions", json=SHORT)) == expected_text("river", 8)
    after = [num_finished(server, "length") for server in servers]
    assert [now - then for now, then in zip(after, before, strict=True)] == [4, 4]
    answer = client.post(
        "/v1/chat/completions", json={"model": "fake", "messages": [{"role": "user", "content": "hi"}]}
    )
    assert answer.status_code == 200
    assert client.get("/v1/models").json()["data"][0]["id"] == "fake"
    assert client.get("/health_generate").status_code == 200


def test_a_stream_comes_through_token_by_token(routed: Routed) -> None:
    client, servers = routed
    with client.stream("POST", "/v1/completions", json=SLOW) as answer:
        texts = streamed_texts(answer.iter_lines())
        first = next(texts)
        assert sum(sample(server, "headrace_num_requests_running") for server in servers) == 1, "it came as a whole"
        assert first + "".join(texts) == expected_text("slow river", 400)


def test_a_client_that_leaves_is_gone_from_its_server(routed: Routed) -> None:
    client, servers = routed
    before = sum(num_finished(server, "cancelled") for server in servers)
    with client.stream("POST", "/v1/completions", json=SLOW) as answer:
        next(streamed_texts(answer.iter_lines()))
    until(lambda: sum(num_finished(server, "cancelled") for server in servers) == before + 1, "it is cancelled", 10)
    until(lambda: all(map(is_idle, servers)), "nothing of it is left")


def test_refusals_come_through_as_they_are(routed: Routed) -> None:
    client, _ = routed
    refused = client.post("/v1/completions", json=SHORT | {"temperature": -1})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "temperature")


def test_a_gateway_is_believed_by_the_connections_own_address(routed: Routed, request: pytest.FixtureRequest) -> None:
    client, (server, _) = routed
    said = {"x-forwarded-for": "8.8.8.8", "x-slo-ttft-ms": "soon"}
    refused = client.post(f"{server.url()}/v1/completions", json=SHORT, headers=said)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "x-slo-ttft-ms")
    # One of the two hands on what it does not know.
    is_handed_on = "vllm-router" in request.node.name
    assert client.post("/v1/completions", json=SHORT, headers=said).status_code == (400 if is_handed_on else 200)


@pytest.mark.parametrize("module", ROUTERS.values(), ids=ROUTERS)
def test_where_one_server_drains_nothing_is_lost_and_its_streams_end_well(module: str) -> None:
    with two_servers() as (leaving, staying), routing(module, leaving, staying) as client:
        streams: list[str] = []

        def stream() -> None:
            with client.stream("POST", "/v1/completions", json=SLOW) as answer:
                streams.append("".join(streamed_texts(answer.iter_lines())))

        readers = [threading.Thread(target=stream) for _ in range(2)]
        for reader in readers:
            reader.start()
        until(lambda: sample(leaving, "headrace_num_requests_running") == 1, "one has a stream each")
        leaving.process.send_signal(signal.SIGTERM)
        while leaving.process.poll() is None:
            assert text_of(client.post("/v1/completions", json=SHORT)) == expected_text("river", 8)
        for reader in readers:
            reader.join(60)
        assert streams == [expected_text("slow river", 400)] * 2
        assert leaving.process.wait() == 0
        for _ in range(4):
            assert text_of(client.post("/v1/completions", json=SHORT)) == expected_text("river", 8)
        assert is_idle(staying)


@pytest.mark.parametrize("module", ROUTERS.values(), ids=ROUTERS)
def test_where_one_server_is_killed_the_other_answers_and_has_nothing_left_over(module: str) -> None:
    slow = {name: value for name, value in SLOW.items() if name != "stream"} | {"max_tokens": 50}
    with two_servers() as (killed, left), routing(module, killed, left) as client, ThreadPoolExecutor(8) as threads:

        def ask(_: int) -> Any:
            """As a client's library does: again after a failure, a few times."""
            for _ in range(3):
                try:
                    return text_of(client.post("/v1/completions", json=slow))
                except httpx.HTTPError:
                    continue
            return None

        answers = threads.map(ask, range(16))
        until(lambda: sample(killed, "headrace_num_requests_running") > 0, "it is at work")
        killed.process.kill()
        assert list(answers) == [expected_text("slow river", 50)] * 16
        until(lambda: is_idle(left), "nothing is left over")


def test_the_policy_of_least_work_is_told_how_much_there_is() -> None:
    with two_servers() as servers, routing(ROUTERS["sglang-router"], *servers, policy="power_of_two") as client:
        loads = [httpx.get(f"{server.url()}/get_load").json() for server in servers]
        assert [rank["num_tokens"] for [rank] in loads] == [0, 0]
        workers = client.get("/workers").json()["workers"]
        assert {worker["model_id"] for worker in workers} == {"fake"}
        assert text_of(client.post("/v1/completions", json=SHORT)) == expected_text("river", 8)
