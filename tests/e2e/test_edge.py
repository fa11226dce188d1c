"""Keys and peers over real sockets: a key file read again by a running server, peers that vanish without a word."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from headrace.server.cli import main
from raw_client import RawRequest
from requirements import need_program
from server_process import ServerProcess, serving


def _create_key(name: str, file: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["create-key", name, "--file", str(file)]) == 0
    return capsys.readouterr().out.strip()


def test_a_running_server_takes_new_keys_and_revokes_old_ones_on_sighup(
    demo_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "keys.toml"
    alice = _create_key("alice", file, capsys)
    # Keys let it listen beyond loopback, and be asked for by any name.
    with serving("--kv-cache-bytes", "256MiB", "--api-keys-file", str(file), "--host", "0.0.0.0") as server:
        url = server.url()

        def models(key: str) -> list[str]:
            client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
            with client:
                return [model.id for model in client.models.list()]

        def reload(text: str, line: str) -> None:
            file.write_text(text)
            num_lines = len(server.lines)
            server.process.send_signal(signal.SIGHUP)
            server.wait_for(rf"(?s)(?:.*\n){{{num_lines}}}.*{line}")

        [model] = models(alice)
        with openai.OpenAI(base_url=f"{url}/v1", api_key=alice) as client:
            chat = client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": "hi"}], max_tokens=3, stream=True
            )
            assert list(chat)[-1].choices[0].finish_reason == "length"
        with pytest.raises(openai.AuthenticationError) as refused:
            models("wrong")
        assert refused.value.code == "invalid_api_key"
        assert httpx.get(f"{url}/v1/models", headers={"host": "any.example", "x-api-key": alice}).status_code == 200
        assert httpx.get(f"{url}/metrics").status_code == 401

        entries = file.read_text()
        bob = _create_key("bob", file, capsys)
        with pytest.raises(openai.AuthenticationError):
            models(bob)
        reload(file.read_text().replace(entries, ""), "1 keys")
        assert models(bob) == [model]
        with pytest.raises(openai.AuthenticationError):
            models(alice)
        reload(f'[[keys]]\nname = "eve"\nsha256 = "{alice}"\n', "the keys stay as they were")
        assert models(bob) == [model]
        output = server.output
    assert server.process.returncode == 0
    for secret in (alice, bob):
        assert secret not in output


def test_a_key_file_that_is_wrong_ends_the_start_with_one_line(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text('[[keys]]\nname = "alice"\nsha256 = "hr-a-key-in-the-wrong-place"\n')
    for path, said in ((file, "sha256 must be"), (tmp_path / "absent.toml", "cannot read the key file")):
        process = ServerProcess(["--api-keys-file", str(path)])
        assert process.process.wait(60) == 1
        process.stop()
        assert said in process.output
        assert "hr-a-key" not in process.output
        assert "Traceback" not in process.output
        assert "loading" not in process.output


_CLIENT = """
import socket, sys
connection = socket.create_connection((sys.argv[1], int(sys.argv[2])))
connection.sendall(sys.argv[3].encode())
while connection.recv(65536):
    print("reading", flush=True)
"""
_LONG = {"prompt": "Once", "max_tokens": 8000, "ignore_eos": True, "stream": True}


class FarClients:
    """Clients at the other end of a cable, in a network namespace of their own, and a server at this end."""

    def __init__(self, server: ServerProcess, prefix: list[str]) -> None:
        self.server = server
        self._prefix = prefix

    @contextmanager
    def client(self, body: dict[str, Any]) -> Iterator[subprocess.Popen[str]]:
        parts, payload = urlsplit(self.server.url()), json.dumps(body)
        head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        request = f"{head}content-length: {len(payload)}\r\n\r\n{payload}"
        command = [*self._prefix, sys.executable, "-c", _CLIENT, str(parts.hostname), str(parts.port), request]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                yield process
            finally:
                process.kill()

    @contextmanager
    def unplugged(self) -> Iterator[None]:
        self._set_link("down")
        try:
            yield
        finally:
            self._set_link("up")

    def _set_link(self, state: str) -> None:
        subprocess.run([*self._prefix, "ip", "link", "set", "far", state], check=True)


@pytest.fixture(scope="module")
def far(demo_model: Path) -> Iterator[FarClients]:
    ip, name, here = need_program("ip"), f"hr{os.getpid()}", "10.213.77.1"
    steps = [
        f"netns add {name}",
        f"link add {name} type veth peer name far netns {name}",
        f"address add {here}/30 dev {name}",
        f"link set {name} up",
        f"-n {name} address add 10.213.77.2/30 dev far",
        f"-n {name} link set far up",
    ]
    try:
        for step in steps:
            done = subprocess.run([ip, *step.split()], capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"no network namespace can be made here: {done.stderr.strip()}")
        flags = ["--kv-cache-bytes", "256MiB", "--host", here, "--peer-timeout-s", "4", "--max-num-seqs", "1"]
        flags += ["--ttft-targets-s=1e6,1e6,1e6"]  # who waits behind a long stream is not refused
        with serving(*flags) as server:
            yield FarClients(server, [ip, "netns", "exec", name])
    finally:
        subprocess.run([ip, "netns", "del", name], capture_output=True, check=False)


def _until_metric(server: ServerProcess, name: str, value: float) -> None:
    deadline_s = time.monotonic() + 60
    while server.metrics()[name] != value:
        assert time.monotonic() < deadline_s, f"{name} is never {value}"


def test_a_reader_that_vanishes_without_a_word_takes_its_stream_along(far: FarClients) -> None:
    cancelled = 'headrace_requests_cancelled_total{phase="decode"}'
    before = far.server.metrics()[cancelled]
    with far.client(_LONG) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == "reading\n"
        with far.unplugged():
            _until_metric(far.server, cancelled, before + 1)


def test_a_client_that_vanishes_while_nothing_is_sent_takes_its_request_along(far: FarClients) -> None:
    cancelled = 'headrace_requests_cancelled_total{phase="queued"}'
    before = far.server.metrics()[cancelled]
    with RawRequest(far.server.url(), "/v1/completions", _LONG) as running:
        running.read_until(b"data:")
        with far.client({"prompt": "Once"}):
            _until_metric(far.server, "headrace_num_requests_waiting", 1)
            with far.unplugged():
                _until_metric(far.server, cancelled, before + 1)
