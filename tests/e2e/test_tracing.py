"""Spans of a real server at a collector that speaks OTLP over HTTP, and at one that is not there."""

import gzip
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from server_process import serving

TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class _Collector(HTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Receiver)
        self.spans: list[Span] = []
        self.paths: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}/v1/traces"


class _Receiver(BaseHTTPRequestHandler):
    server: _Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers["content-encoding"] == "gzip":
            body = gzip.decompress(body)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            for scope in resource.scope_spans:
                self.server.spans += scope.spans
        self.server.paths.append(self.path)
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def collector() -> Iterator[_Collector]:
    with _Collector() as collector:
        thread = threading.Thread(target=collector.serve_forever)
        thread.start()
        yield collector
        collector.shutdown()
        thread.join()


def _ask(url: str) -> None:
    headers = {"traceparent": f"00-{TRACE_ID}-{SPAN_ID}-01"}
    body = {"messages": [{"role": "user", "content": "Tell me a secret."}], "max_tokens": 3, "ignore_eos": True}
    assert httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=60).status_code == 200


def test_the_last_spans_reach_the_collector_before_the_server_ends(demo_model: Path, collector: _Collector) -> None:
    with serving("--kv-cache-bytes", "128MiB", "--otlp-traces-endpoint", collector.url) as server:
        _ask(server.url())
        assert server.stop() == 0
    assert set(collector.paths) == {"/v1/traces"}
    [span] = collector.spans
    assert span.name == "chat SmolLM2-135M-Instruct"
    assert span.trace_id.hex() == TRACE_ID
    assert span.parent_span_id.hex() == SPAN_ID
    counts = {item.key: item.value.int_value for item in span.attributes if "usage" in item.key}
    assert counts["gen_ai.usage.output_tokens"] == 3
    assert b"secret" not in span.SerializeToString()


def test_a_collector_that_is_gone_costs_no_request_and_holds_up_no_end(demo_model: Path) -> None:
    with _Collector() as closed:
        url = closed.url
    with serving("--kv-cache-bytes", "128MiB", "--otlp-traces-endpoint", url) as server:
        _ask(server.url())
        assert server.stop(timeout_s=30) == 0
        assert "Traceback" not in server.output
