"""One structured line per request, with the time of every stage. It holds no prompt, no text and no key."""

import json
import logging
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Any

from headrace.server.generation import Generation, usage

_STREAM_ID = re.compile("^/v1/streams/[^/]+")

logger = logging.getLogger("headrace.requests")

# Told of every refusal: the request's id, its path, when it was received, and the status.
OnRejected = Callable[[str, str, float, int], None]


def declared_route(path: str, routes: Iterable[Any]) -> str:
    """The route of `routes` that a path belongs to, as it was declared; "" where it is none: it may hold anything."""
    return next((route.path for route in routes if route.path_regex.match(path)), "")


def log_unaccepted(id: str, route: str, received_s: float, outcome: str) -> None:
    """Write the line of a request that never became a generation: refused with a status, or its client left."""
    _write(id, route, outcome, received_s, {"end_s": time.monotonic()})


def log_answered(id: str, route: str, num_items: int, num_tokens: int, stages: dict[str, float]) -> None:
    """Write the line of a request that was answered without a generation; `stages` are times, with `received_s`."""
    received_s = stages.pop("received_s")
    _write(id, route, "answered", received_s, dict(stages), prompt_tokens=num_tokens, items=num_items)


def log_request(generations: Sequence[Generation], route: str) -> None:
    """Write the line of a request whose generations are over, with the stages of the first of them.

    Stages are milliseconds after the request was received.
    """
    reasons = {generation.log.terminal.finish_reason.value for generation in generations if generation.log.terminal}
    first = generations[0]
    stages = asdict(first.stages)
    received_s = stages.pop("received_s")
    counts = usage(generations)
    _write(
        first.id,
        route,
        "+".join(sorted(reasons)),
        received_s,
        stages,
        prompt_tokens=counts["prompt_tokens"],
        cached_tokens=counts["prompt_tokens_details"]["cached_tokens"],
        completion_tokens=counts["completion_tokens"],
    )


def _write(
    id: str, route: str, finish_reason: str, received_s: float, stages: dict[str, float | None], **counts: int
) -> None:
    received_at = datetime.now(UTC) - timedelta(seconds=time.monotonic() - received_s)
    line = {
        "id": id,
        "route": _STREAM_ID.sub("/v1/streams/{id}", route)[:200],  # whoever knows a stream's id may read it
        "received": received_at.isoformat(timespec="milliseconds"),
        "finish_reason": finish_reason,
        **counts,
        "stages_ms": {
            name.removesuffix("_s"): None if at_s is None else round((at_s - received_s) * 1000, 1)
            for name, at_s in stages.items()
        },
    }
    logger.info("%s", json.dumps(line))
