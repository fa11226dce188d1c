"""More connections than a process has descriptors for, in the middle of a stream."""

import contextlib
import re
import signal
import socket
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from certificates import make_certificate
from fake_engine import expected_text
from raw_client import RawRequest
from server_process import ProxyProcess, proxying, serving_script
from waiting import until

HALF_A_HEAD = b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\n"


def connect(url: str) -> socket.socket:
    parts = urlsplit(url)
    connection = socket.create_connection((parts.hostname, parts.port), timeout=20)
    connection.settimeout(20)
    return connection


def test_a_flood_beyond_the_descriptors_leaves_a_stream_and_the_probes_alone_and_nothing_behind() -> None:
    with serving_script(FAKE_DESCRIPTORS="128") as server:
        url = server.url()
        server.wait_for("32 connections at most, not 4096")
        body = {"prompt": "slow on", "max_tokens": 200, "ignore_eos": True, "temperature": 0, "stream": True}
        with RawRequest(url, "/v1/completions", body) as request:
            request.read_until(b"data:")
            before = server.num_descriptors()
            # All at once, more than there are descriptors, then some after the other.
            server.process.send_signal(signal.SIGSTOP)
            flood = [connect(url) for _ in range(400)]
            server.process.send_signal(signal.SIGCONT)
            assert httpx.get(f"{url}/health").status_code == 200
            for _ in range(100):
                flood.append(connect(url))
                flood[-1].sendall(HALF_A_HEAD)
            assert httpx.get(f"{url}/health").status_code == 200
            metrics = server.metrics()
            assert metrics["headrace_connections"] <= 32
            assert metrics["headrace_connections_closed_total"] >= 100
            request.read_until(b"data: [DONE]\n\n")
            for connection in flood:
                connection.close()
            until(lambda: server.num_descriptors() <= before, "the descriptors are back")
        texts = re.findall(rb'"text":"([a-z]*)"', request.received)
        assert b"".join(texts).decode() == expected_text("slow on", 200)
        assert "Traceback" not in server.output


def test_with_shared_journals_there_is_a_descriptor_for_every_stream_that_is_read_from_another(tmp_path: Path) -> None:
    flags = ("--replica-name", "alpha", "--journal-dir", str(tmp_path / "journals"))
    with serving_script(*flags, FAKE_DESCRIPTORS="128") as server:
        server.wait_for("16 connections at most, not 4096")


def test_silent_connections_beyond_the_descriptors_leave_a_server_with_tls_alone(tmp_path: Path) -> None:
    certificate = make_certificate(tmp_path)
    flags = ["--tls-cert-file", str(certificate.cert_file), "--tls-key-file", str(certificate.key_file)]
    with serving_script(*flags, FAKE_DESCRIPTORS="128") as server, contextlib.ExitStack() as flood:
        url, tls = server.url(), certificate.trusted()
        body = {"prompt": "slow on", "max_tokens": 100, "ignore_eos": True, "temperature": 0, "stream": True}
        with RawRequest(url, "/v1/completions", body, tls=tls) as request, httpx.Client(verify=tls) as client:
            request.read_until(b"data:")
            before = server.num_descriptors()
            for _ in range(300):
                flood.enter_context(connect(url))
            assert client.get(f"{url}/health").status_code == 200
            exposed = client.get(f"{url}/metrics").text
            assert server.num_descriptors() <= before + 32
            assert int(re.findall(r"headrace_connections_closed_total (\d+)", exposed)[0]) >= 250
            request.read_until(b"data: [DONE]\n\n")
            flood.close()
            until(lambda: "headrace_connections 2.0" in client.get(f"{url}/metrics").text, "none is left of the flood")
        texts = re.findall(rb'"text":"([a-z]*)"', request.received)
        assert b"".join(texts).decode() == expected_text("slow on", 100)
        assert "Traceback" not in server.output


class PoorProxy(ProxyProcess):
    """A proxy with few descriptors."""

    start = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128)); "
    command = ("-c", start + ProxyProcess.command[1], "proxy")


def test_a_proxy_has_a_descriptor_for_every_connection_to_its_upstream() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=512) as upstream, contextlib.ExitStack() as flood:
        proxy = PoorProxy(["--upstream", f"http://127.0.0.1:{upstream.getsockname()[1]}"])
        flood.callback(proxy.stop)
        proxy.wait_for("16 connections at most, not 4096")
        for _ in range(100):
            flood.enter_context(connect(proxy.url())).sendall(HALF_A_HEAD.replace(b"/health", b"/v1/models") + b"\r\n")
        for _ in range(16):
            flood.enter_context(upstream.accept()[0])
        assert httpx.get(f"{proxy.url()}/health").status_code == 200
        assert proxy.num_descriptors() <= 128 - 32


def test_the_longest_idle_connection_of_a_proxy_makes_room_for_a_new_one() -> None:
    with proxying("http://127.0.0.1:9", "--max-connections", "2") as proxy:
        first, second = connect(proxy.url()), connect(proxy.url())
        with first, second:
            assert httpx.get(f"{proxy.url()}/health").status_code == 200
            assert first.recv(1) == b""
            second.sendall(HALF_A_HEAD + b"\r\n")
            assert second.recv(4096).startswith(b"HTTP/1.1 200")
