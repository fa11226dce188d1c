"""Server-sent events: encoding frames, and the response that streams them.

Lives on the event loop. Frames end with a bare line feed and data is one line of JSON, which every client's parser
reads. Format: WHATWG HTML, "Server-sent events".
"""

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
from sse_starlette.sse import AppStatus, EventSourceResponse
from starlette.types import Receive, Scope, Send

# Draining is the server's own: the library would cut every stream half a second after SIGTERM.
AppStatus.disable_automatic_graceful_drain()

# The name of what `EventStream` looks for in a scope's extensions: `(chunk) -> is_written`, past `send`.
WRITE_CHUNK = "headrace.write_chunk"

# A comment, which every parser skips.
HEARTBEAT = b":\n\n"

# Made once: `json.dumps` would make one for every text.
_encoder = json.JSONEncoder(separators=(",", ":"), allow_nan=False)


def to_json(value: Any) -> str:
    """One line of ASCII JSON: text with line separators of any alphabet cannot break a frame."""
    return _encoder.encode(value)


def data_frame(value: Any) -> bytes:
    """A frame as OpenAI's clients read it: data alone."""
    return f"data: {to_json(value)}\n\n".encode("ascii")


def event_frame(event: str, value: Any, *, id: str) -> bytes:
    """A named event with an id, for EventSource. Neither `event` nor `id` comes from a client."""
    return f"id: {id}\nevent: {event}\ndata: {to_json(value)}\n\n".encode("ascii")


def retry_frame(retry_ms: int) -> bytes:
    return f"retry: {retry_ms}\n\n".encode("ascii")


class EventStream(EventSourceResponse):
    """Streams ready-made frames.

    The endpoint watches for the disconnect and the server drains by itself, so the library's tasks for these and for
    its ping are not started.
    """

    def __init__(self, frames: AsyncIterator[bytes]) -> None:
        super().__init__(
            frames,
            headers={"cache-control": "no-cache, no-transform"},
            media_type="text/event-stream; charset=utf-8",
            ping=0,
            sep="\n",
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        # In a task of its own: waking a task walks all its frames, and here a dozen of middleware are below.
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._write, scope.get("extensions", {}).get(WRITE_CHUNK, _is_not_written), send)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _write(self, write_chunk: Callable[[bytes], bool], send: Send) -> None:
        frames: Any = self.body_iterator
        try:
            async for frame in frames:
                if not write_chunk(frame):
                    await send({"type": "http.response.body", "body": frame, "more_body": True})
        finally:
            # A generator that is dropped half-way runs its clean-up only when it is collected; this runs it now.
            await frames.aclose()


def _is_not_written(frame: bytes) -> bool:
    return False
