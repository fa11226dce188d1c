"""One OpenTelemetry span per accepted request, made of its stages once it is over; off unless an endpoint is set.

Called on the event loop; the SDK sends batches from a thread of its own, so a collector that is slow or gone costs
spans, not tokens. Attributes have the names of the GenAI semantic conventions; none holds a prompt or a text. Nothing
of OpenTelemetry is imported before `open_tracing`.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from headrace.scheduler.errors import HeadraceError
from headrace.server.generation import Generation, usage
from headrace.server.version import VERSION

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor

# How long the end of the server may wait for the last spans to be sent.
_CLOSE_TIMEOUT_S = 5.0
# Called with the generations of a request that is over, its route and its caller's trace context.
Report = Callable[[Sequence[Generation], str, Mapping[str, str]], None]

_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    "/v1/messages": "chat",
    "/api/chat": "chat",
}


class TracingError(HeadraceError):
    """Tracing is asked for and cannot be had."""


def trace_context(headers: Mapping[str, str]) -> dict[str, str]:
    """The W3C trace context that a request came with."""
    return {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}


def open_tracing(endpoint: str) -> "Tracing":
    """Trace to an OTLP endpoint; further settings are the standard OTEL_* variables. Raises: TracingError."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        return Tracing(BatchSpanProcessor(OTLPSpanExporter(endpoint)))
    except ImportError as error:
        message = f"OpenTelemetry is not installed ({error}); pip install 'headrace[otel]'"
        raise TracingError(f"otlp_traces_endpoint: {message}") from None
    except ValueError as error:  # an OTEL_* variable
        raise TracingError(f"otlp_traces_endpoint: {error}") from None


class Tracing:
    """Makes the spans. `processor` takes them away."""

    def __init__(self, processor: "SpanProcessor") -> None:
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider

        resource = Resource.create({"service.name": "headrace", "service.version": VERSION})
        # What the operator says of the service in OTEL_* variables wins.
        resource = resource.merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("headrace", VERSION)

    def record(self, generations: Sequence[Generation], route: str, context: Mapping[str, str]) -> None:
        """Make the span of a request that is over, under the caller's where `context` names one.

        The stages are those of its first generation.
        """
        from opentelemetry.trace import SpanKind, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        terminals = [generation.log.terminal for generation in generations if generation.log.terminal is not None]
        counts = usage(generations)
        clock_offset_ns = time.time_ns() - time.monotonic_ns()
        times_ns = {
            name.removesuffix("_s"): int(at_s * 1e9) + clock_offset_ns
            for name, at_s in asdict(generations[0].stages).items()
            if at_s is not None
        }
        operation, model = _OPERATIONS.get(route, "generate_content"), generations[0].model
        attributes: dict[str, Any] = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "headrace",
            "gen_ai.request.model": model,
            "gen_ai.response.model": model,
            "gen_ai.response.id": generations[0].id,
            "gen_ai.response.finish_reasons": [terminal.finish_reason.value for terminal in terminals],
            "gen_ai.usage.input_tokens": counts["prompt_tokens"],
            "gen_ai.usage.output_tokens": counts["completion_tokens"],
            "http.route": route,
        }
        span = self._tracer.start_span(
            f"{operation} {model}",
            context=TraceContextTextMapPropagator().extract(context),
            kind=SpanKind.SERVER,
            attributes=attributes,
            start_time=times_ns.pop("received"),
        )
        end_ns = times_ns.pop("end")
        for name, at_ns in sorted(times_ns.items(), key=lambda item: item[1]):
            span.add_event(name, timestamp=at_ns)
        error = next((terminal.error for terminal in terminals if terminal.error is not None), None)
        if error is not None:
            span.set_attribute("error.type", error.code or error.type)
            span.set_status(StatusCode.ERROR, error.message)
        span.end(end_ns)

    def close(self) -> None:
        """Send what is left, within a few seconds."""
        # The SDK's own patience is longer, and its threads do not hold up the process's end.
        thread = threading.Thread(target=self._provider.shutdown, daemon=True)
        thread.start()
        thread.join(_CLOSE_TIMEOUT_S)
