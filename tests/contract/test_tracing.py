"""Spans of generations: one each, under the caller's, with the stages and no text."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import anyio
import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from asgi_client import call, exchange
from fake_engine import FakeRunner
from headrace.server.tracing import Tracing, TracingError, open_tracing
from live_app import live_app

pytestmark = pytest.mark.anyio

TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CALLER = {"traceparent": f"00-{TRACE_ID}-{SPAN_ID}-01", "tracestate": "vendor=x"}
PROMPT = "a secret question"


class Traced:
    """Tracing whose spans the test can read."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.tracing = Tracing(SimpleSpanProcessor(self._exporter))

    def spans(self) -> tuple[ReadableSpan, ...]:
        return self._exporter.get_finished_spans()

    def span(self) -> ReadableSpan:
        [span] = self.spans()
        return span


@contextmanager
def traced() -> Iterator[Traced]:
    traced = Traced()
    yield traced
    traced.tracing.close()


@pytest.mark.parametrize(
    ("method", "path", "operation"),
    [
        ("POST", "/v1/chat/completions", "chat"),
        ("POST", "/v1/completions", "text_completion"),
        ("POST", "/v1/completions?stream", "text_completion"),
        ("POST", "/v1/streams", "generate_content"),
        ("GET", "/v1/stream", "generate_content"),
    ],
)
async def test_a_request_makes_one_span_under_its_callers(method: str, path: str, operation: str) -> None:
    path, _, stream = path.partition("?")
    body: dict[str, Any] = {"max_tokens": 5, "temperature": 0, "ignore_eos": True, "stream": bool(stream)}
    body |= {"messages": [{"role": "user", "content": PROMPT}]} if "chat" in path else {"prompt": PROMPT}
    query = f"prompt={PROMPT.replace(' ', '+')}&max_tokens=5&temperature=0&ignore_eos=true"
    with traced() as seen:
        async with live_app(tracing=seen.tracing) as app:
            headers = CALLER | {"accept": "text/event-stream"}
            if method == "GET":
                answer = await call(app.asgi, method, path, query=query, headers=headers)
            else:
                answer = await call(app.asgi, method, path, body, headers=headers)
            await app.until(lambda: len(seen.spans()) == 1)
        span = seen.span()
    assert answer.status in (200, 201)
    assert span.name == f"{operation} fake"
    assert span.kind is SpanKind.SERVER
    assert f"{span.context.trace_id:032x}" == TRACE_ID
    assert span.parent is not None
    assert f"{span.parent.span_id:016x}" == SPAN_ID
    assert span.context.trace_state.get("vendor") == "x"
    assert span.status.status_code is StatusCode.UNSET
    attributes = dict(span.attributes or {})
    assert answer.headers["x-request-id"] in str(attributes.pop("gen_ai.response.id"))
    num_prompt_tokens = len(f"[user]{PROMPT}\n[assistant]" if "chat" in path else PROMPT)
    assert attributes == {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "headrace",
        "gen_ai.request.model": "fake",
        "gen_ai.response.model": "fake",
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.usage.input_tokens": num_prompt_tokens,
        "gen_ai.usage.output_tokens": 5,
        "http.route": path,
    }
    assert PROMPT not in span.to_json()
    events = {event.name: event.timestamp for event in span.events}
    stages = ["tokenized", "submitted", "scheduled", "first_token", "last_token"]
    assert set(stages) <= set(events) <= {*stages, "first_byte"}
    assert span.start_time is not None
    assert span.end_time is not None
    times = [span.start_time, *(events[name] for name in stages), span.end_time]
    assert times == sorted(times)
    assert span.resource.attributes["service.name"] == "headrace"


@pytest.mark.parametrize("traceparent", [None, "", "garbage", f"00-{'0' * 32}-{SPAN_ID}-01"])
async def test_without_a_callers_context_a_span_begins_a_trace(traceparent: str | None) -> None:
    with traced() as seen:
        async with live_app(tracing=seen.tracing) as app:
            headers = {} if traceparent is None else {"traceparent": traceparent}
            await call(app.asgi, "POST", "/v1/completions", {"prompt": "a", "max_tokens": 1}, headers=headers)
        assert seen.span().parent is None


async def test_a_caller_that_does_not_sample_costs_no_span() -> None:
    with traced() as seen:
        async with live_app(tracing=seen.tracing) as app:
            headers = {"traceparent": f"00-{TRACE_ID}-{SPAN_ID}-00"}
            await call(app.asgi, "POST", "/v1/completions", {"prompt": "a", "max_tokens": 1}, headers=headers)
        assert seen.spans() == ()


async def test_a_client_that_leaves_and_an_engine_that_fails_are_told_apart() -> None:
    runner = FakeRunner()
    with traced() as seen:
        async with live_app(runner=runner, tracing=seen.tracing) as app, anyio.create_task_group() as tasks:
            leaver = exchange(app.asgi, "POST", "/v1/completions")
            leaver.send_body(json.dumps({"prompt": "a", "max_tokens": 50, "stream": True}).encode())
            with runner.held():
                tasks.start_soon(leaver.run)
                await app.until(lambda: app.client.num_unfinished == 1)
                leaver.disconnect()
                await leaver.done.wait()
            await app.until(lambda: not app.scheduler.has_work)
            runner.fail_next = True
            failed = await call(app.asgi, "POST", "/v1/completions", {"prompt": "a", "max_tokens": 5})
        left, error = seen.spans()
    assert failed.status == 500
    assert left.attributes is not None
    assert left.attributes["gen_ai.response.finish_reasons"] == ("cancelled",)
    assert left.status.status_code is StatusCode.UNSET
    assert error.attributes is not None
    assert error.attributes["gen_ai.response.finish_reasons"] == ("error",)
    assert error.attributes["error.type"] == "engine_error"
    assert error.status.status_code is StatusCode.ERROR


def test_the_operators_variables_name_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mill")
    with traced() as seen:
        assert seen.tracing._provider.resource.attributes["service.name"] == "mill"


def test_nothing_of_opentelemetry_is_imported_while_tracing_is_off() -> None:
    code = "import sys, headrace.server.serve; sys.exit(any('opentelemetry' in name for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_absent_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(TracingError, match=r"otlp_traces_endpoint.*headrace\[otel\]"):
        open_tracing("http://127.0.0.1:4318/v1/traces")
