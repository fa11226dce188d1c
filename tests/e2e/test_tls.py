"""HTTPS by the server itself, over real TLS sockets."""

import json
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from certificates import Certificate, make_certificate
from raw_client import RawRequest
from server_process import ServerProcess, serving
from waiting import until

LONG = {"prompt": "Once upon a time", "max_tokens": 2000, "ignore_eos": True, "temperature": 0, "stream": True}


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return make_certificate(tmp_path_factory.mktemp("tls"))


def _flags(certificate: Certificate) -> list[str]:
    return ["--tls-cert-file", str(certificate.cert_file), "--tls-key-file", str(certificate.key_file)]


@pytest.fixture(scope="module")
def secure(demo_model: Path, certificate: Certificate) -> Iterator[ServerProcess]:
    with serving("--kv-cache-bytes", "256MiB", *_flags(certificate)) as process:
        yield process


@pytest.fixture
def client(secure: ServerProcess, certificate: Certificate) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=secure.url(), verify=certificate.trusted(), timeout=60) as client:
        yield client


def test_a_stream_over_tls_has_the_text_of_the_whole_answer(secure: ServerProcess, client: httpx.Client) -> None:
    assert secure.url().startswith("https://")
    assert f"curl -N {secure.url()}" in secure.output
    body = {"prompt": "The mill wheel", "max_tokens": 12, "temperature": 0}
    whole = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
    with client.stream("POST", "/v1/completions", json=dict(body, stream=True)) as response:
        lines = [line for line in response.iter_lines() if line]
    assert lines.pop() == "data: [DONE]"
    texts = [json.loads(line.removeprefix("data: "))["choices"][0]["text"] for line in lines]
    assert "".join(texts) == whole
    assert len(texts) > 2


@pytest.mark.parametrize("hang_up", ["close", "reset"])
def test_a_client_that_leaves_over_tls_frees_its_blocks(
    secure: ServerProcess, client: httpx.Client, certificate: Certificate, hang_up: str
) -> None:
    request = RawRequest(secure.url(), "/v1/completions", LONG, tls=certificate.trusted())
    request.read_until(b"data: ")
    getattr(request, hang_up)()
    until(lambda: "headrace_num_requests_running 0.0" in client.get("/metrics").text, "nothing runs")


def test_who_does_not_know_the_certificate_is_not_served(secure: ServerProcess) -> None:
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(f"{secure.url()}/health", verify=ssl.create_default_context())


def test_plain_http_on_the_tls_port_harms_nobody(secure: ServerProcess, client: httpx.Client) -> None:
    with RawRequest(secure.url(), "/health") as request:
        assert b"200" not in request.read_to_end()
    assert client.get("/health").status_code == 200
    assert "Traceback" not in secure.output


def test_a_certificate_that_cannot_be_used_ends_the_start(certificate: Certificate, tmp_path: Path) -> None:
    missing = Certificate(tmp_path / "missing.pem", certificate.key_file)
    result = subprocess.run(
        [sys.executable, "-m", "headrace.server", *_flags(missing)], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 1
    assert result.stderr == f"headrace: tls_cert_file: {missing.cert_file} cannot be read: No such file or directory\n"
    assert "loading" not in result.stdout
