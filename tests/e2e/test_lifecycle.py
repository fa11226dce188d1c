"""Starting, refusing to start, and ending, as an operator sees it."""

import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from raw_client import RawRequest
from server_process import ServerProcess, serving, serving_script
from waiting import until

LONG = {"prompt": "Once", "max_tokens": 1000, "ignore_eos": True, "temperature": 0, "stream": True}


def _headrace(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "headrace.server", *args], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--port", "99999"], "port"),
        (["--dtype", "int3"], "dtype"),
        (["--max-num-seqs", "0"], "max_num_seqs"),
        (["--kv-cache-bytes", "lots"], "kv_cache_bytes"),
        (["--device", "toaster"], "device"),
        (["--workers", "4"], "workers"),
        (["--config", "/no/such/file.toml"], "config"),
    ],
)
def test_a_wrong_setting_is_named_before_anything_loads(args: list[str], named: str) -> None:
    result = _headrace(*args)
    assert result.returncode == 2
    assert named in result.stderr
    assert "loading" not in result.stdout
    assert "Traceback" not in result.stderr


def test_an_unknown_key_in_the_config_file_is_named(tmp_path: Path) -> None:
    config = tmp_path / "headrace.toml"
    config.write_text('prot = 8000\nhost = "127.0.0.1"\n')
    result = _headrace("--config", str(config))
    assert result.returncode == 2
    assert "prot" in result.stderr


@pytest.mark.parametrize("name", ["default", "cpu", "gpu", "lanes", "soak"])
def test_the_profiles_in_configs_are_valid(name: str) -> None:
    from headrace.server.settings import Settings, load_settings

    config = Path(__file__).parents[2] / "configs" / f"{name}.toml"
    settings = load_settings(["--config", str(config)], {})
    if name == "default":
        assert settings.model_dump() == Settings().model_dump(), "default.toml states the defaults"


def test_a_model_that_is_not_there_is_an_error_of_one_line() -> None:
    result = _headrace("/no/such/model.gguf")
    assert result.returncode == 1
    assert "/no/such/model.gguf" in result.stderr
    assert "Traceback" not in result.stderr


def test_two_models_of_one_name_are_an_error_before_anything_loads(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    path = str(tmp_path / "model")
    one_shots = f'[{{"model": "{path}", "task": "embed"}}]'
    result = _headrace(path, "--one-shot-models", one_shots)
    assert result.returncode == 1
    assert "two models are served as model" in result.stderr
    assert "loading" not in result.stdout


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        ("poet", (), "lora_adapters: poet: "),
        ("poet", ("adapter_model.safetensors",), "is no directory with an adapter_config.json"),
        ("model", ("adapter_config.json",), "two models are served as model"),
    ],
)
def test_an_adapter_that_is_none_or_has_the_models_name_is_an_error_before_anything_loads(
    tmp_path: Path, name: str, files: tuple[str, ...], message: str
) -> None:
    (tmp_path / "model").mkdir()
    for file in ("config.json", *files):
        (tmp_path / "model" / file).write_text("{}")
    path = str(tmp_path / "model")
    result = _headrace(path, f"--lora-adapters={name}={path}")
    assert result.returncode == 1
    assert message in result.stderr
    assert "loading" not in result.stdout


def test_a_model_that_cannot_be_loaded_ends_the_server(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(20))
    process = ServerProcess([str(broken)])
    assert process.process.wait(60) == 1
    assert "broken.gguf" in process.output
    process.stop()


def test_a_taken_port_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = _headrace("--port", str(taken.getsockname()[1]))
    assert result.returncode == 1
    assert "Address already in use" in result.stderr
    assert "loading" not in result.stdout


def test_the_printed_curl_line_works_and_the_server_is_ready_only_once_warm(demo_model: Path) -> None:
    with serving("--kv-cache-bytes", "256MiB") as server:
        line = server.wait_for(r"try: (curl .*)")[1]
        result = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=60, check=True)
        assert result.stdout.startswith("data: {")
        assert result.stdout.endswith("data: [DONE]\n\n")
        # A warm-up that had not run would leave its work to the first request.
        assert httpx.get(f"{server.url()}/ready").status_code == 200


def test_sigterm_lets_running_streams_finish_and_refuses_new_requests(demo_model: Path) -> None:
    # Tokens enough for the refused requests to find the server draining, and time enough for all on a busy machine.
    with serving("--kv-cache-bytes", "256MiB", "--drain-grace-s", "200") as server:
        with RawRequest(server.url(), "/v1/completions", dict(LONG, max_tokens=1500)) as request:
            request.read_until(b"data:")
            server.process.send_signal(signal.SIGTERM)
            server.wait_for("draining")
            refused = httpx.post(f"{server.url()}/v1/completions", json={"prompt": "x"})
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "draining"
            assert httpx.get(f"{server.url()}/ready").status_code == 503
            request.read_until(b"data: [DONE]\n\n")
            assert b'"finish_reason":"length"' in request.received
        assert server.process.wait(30) == 0


def test_a_server_behind_a_router_is_ready_no_more_then_refuses_and_closes_last() -> None:
    short = {"prompt": "river", "max_tokens": 2, "temperature": 0}
    with serving_script("--drain-delay-s", "1.5") as server:
        url = server.url()
        with (
            RawRequest(url, "/v1/completions", LONG | {"prompt": "slow river", "max_tokens": 450}) as running,
            RawRequest(url, "/v1/completions", {"prompt": "slow river", "max_tokens": 150}) as whole,
            httpx.Client(base_url=url) as pooled,
        ):
            running.read_until(b"data:")
            assert "connection" not in pooled.get("/ready").headers
            signalled_s = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            until(lambda: pooled.get("/ready").json() == {"status": "draining"}, "it is ready no more")
            taken = 0
            while (answer := pooled.post("/v1/completions", json=short)).status_code == 200:
                taken += 1
                assert answer.headers["connection"] == "close", "the next one is for another server"
                assert httpx.post(f"{url}/v1/completions", json=short).status_code in (200, 503)
            assert taken > 0
            assert time.monotonic() - signalled_s >= 1.5
            for refused in (answer, httpx.post(f"{url}/v1/completions", json=short)):
                assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
                assert int(refused.headers["retry-after"]) >= 1
                assert refused.headers["connection"] == "close"
            assert b"\r\nconnection: close\r\n" in whole.read_to_end(), "it was asked before the signal"
            assert [httpx.get(f"{url}{path}").status_code for path in ("/ready", "/health")] == [503, 200]
            assert server.process.poll() is None, "what runs is waited for"
        assert server.process.wait(20) == 0
        assert "Traceback" not in server.output


def test_streams_that_outlast_the_grace_time_get_a_terminal_event(demo_model: Path) -> None:
    with serving("--kv-cache-bytes", "256MiB", "--drain-grace-s", "0.5") as server:
        with RawRequest(server.url(), "/v1/completions", LONG) as request:
            request.read_until(b"data:")
            server.process.send_signal(signal.SIGINT)
            last = request.read_to_end().rstrip(b"0\r\n").split(b"data: ")[-1]
        assert b'"code":"draining"' in last
        assert server.process.wait(30) == 0


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_loading_ends_the_server_quietly(demo_model: Path, sig: int) -> None:
    process = ServerProcess(["--drain-delay-s", "5"])
    process.wait_for("loading")
    with httpx.Client() as client:  # it listens already
        address = process.wait_for(r"listening on (\S+)")[1]
        assert client.get(f"{address}/health").status_code == 200
    assert process.stop(sig) == 0
    assert "Traceback" not in process.output
    assert "terminate" not in process.output
    if "chat page:" not in process.output:
        assert "ready no more" not in process.output, "no router was told that it is ready"


def test_a_hang_up_leaves_a_server_without_keys_as_it_was(demo_model: Path) -> None:
    with serving("--kv-cache-bytes", "64MiB", "--max-model-len", "512") as server:
        server.process.send_signal(signal.SIGHUP)
        server.wait_for("no key file to read again")
        assert httpx.get(f"{server.url()}/ready").status_code == 200


def test_a_second_signal_cuts_the_drain_short(demo_model: Path) -> None:
    with serving("--kv-cache-bytes", "256MiB", "--drain-grace-s", "600") as server:
        with RawRequest(server.url(), "/v1/completions", dict(LONG, max_tokens=8000)) as request:
            request.read_until(b"data:")
            server.process.send_signal(signal.SIGTERM)
            server.wait_for("draining")
            server.process.send_signal(signal.SIGTERM)
            assert b'"code":"draining"' in request.read_to_end()
        assert server.process.wait(30) == 0


def test_a_drain_with_many_streams_gives_each_of_them_one_end(demo_model: Path) -> None:
    last_chunk = b"\r\n0\r\n\r\n"
    short, long = (dict(LONG, max_tokens=max_tokens) for max_tokens in (12, 4000))
    with serving("--kv-cache-bytes", "2GiB", "--drain-grace-s", "600") as server, ThreadPoolExecutor(50) as threads:
        url = server.url()

        def start(body: dict[str, Any]) -> tuple[list[RawRequest], list[RawRequest], RawRequest]:
            """Streams of OpenAI's, native ones, and an answer in one piece."""
            fields = {name: value for name, value in body.items() if name != "stream"}
            events_urls = [httpx.post(f"{url}/v1/streams", json=fields).json()["events_url"] for _ in range(5)]
            streams = [RawRequest(url, "/v1/completions", body) for _ in range(44)]
            return streams, [RawRequest(url, path) for path in events_urls], RawRequest(url, "/v1/completions", fields)

        def finish(requests: list[RawRequest], end: bytes) -> None:
            list(threads.map(lambda request: request.read_until(end), requests))

        done, done_native, done_whole = start(short)
        cut, cut_native, cut_whole = start(long)
        finish([*done, *done_native, *cut, *cut_native], b"data:")
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("draining")
        assert httpx.get(f"{url}/ready").status_code == 503
        assert httpx.get(f"{url}/health").status_code == 200
        for path in ("/v1/completions", "/v1/streams"):
            refused = httpx.post(url + path, json={"prompt": "x"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
            assert int(refused.headers["retry-after"]) >= 1
        with RawRequest(url, "/v1/stream?prompt=x") as source:
            source.read_until(last_chunk)
        assert source.received.startswith(b"HTTP/1.1 200")
        assert b"retry: 1000" in source.received
        assert b"event:" not in source.received

        finish([*done, *done_native], last_chunk)
        finish([done_whole], b'"finish_reason":"length"')
        server.process.send_signal(signal.SIGTERM)  # what is left would go on for long
        everything = [*done, *done_native, done_whole, *cut, *cut_native, cut_whole]
        list(threads.map(RawRequest.read_to_end, everything))
        assert server.process.wait(60) == 0
        for request in everything:
            request.close()
    for request in done:
        assert request.received.count(b'"finish_reason":"length"') == request.received.count(b"[DONE]") == 1
        assert b'"error"' not in request.received
    for request in done_native:
        assert request.received.count(b"event: done") == 1
        assert b"event: error" not in request.received
    for request in cut:
        assert request.received.count(b'"error":{') == request.received.count(b'"code":"draining"') == 1
        assert b"[DONE]" not in request.received
    for request in cut_native:
        assert request.received.count(b"event: error") == request.received.count(b'"code":"draining"') == 1
        assert b"event: done" not in request.received
    for request in (*cut, *cut_native):
        assert request.received.endswith(last_chunk), "ended, not torn"
    assert cut_whole.received.startswith(b"HTTP/1.1 503")
    assert "Traceback" not in server.output


def _num_unread_bytes(request: RawRequest) -> int:
    """What the server's side of this connection holds because the client does not take it."""
    remote = f"0100007F:{request.socket.getsockname()[1]:04X}"
    [line] = [line for line in Path("/proc/net/tcp").read_text().splitlines() if line.split()[2] == remote]
    return int(line.split()[4].partition(":")[0], 16)


def test_clients_that_read_nothing_do_not_keep_the_server_nor_make_it_complain(demo_model: Path) -> None:
    with serving("--kv-cache-bytes", "256MiB", "--drain-grace-s", "0") as server:
        # A stream, and answers that fill every buffer between here and there.
        stream = RawRequest(server.url(), "/v1/completions", LONG, receive_bytes=2048)
        full = RawRequest(server.url(), "/health", receive_bytes=2048)
        with stream, full:
            stream.read_until(b"data:")
            full.socket.sendall(b"GET /static/chat.js HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n" * 1000)
            sizes = [0]
            while sizes[-1] == 0 or sizes[-5:] != sizes[-1:] * 5:
                assert httpx.get(f"{server.url()}/health").status_code == 200
                sizes.append(_num_unread_bytes(full))
            assert server.stop() == 0
    assert "Traceback" not in server.output
    assert "ERROR" not in server.output
