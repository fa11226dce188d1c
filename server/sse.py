"""Server-sent events: encoding frames, and the response that streams them; and frames that are lines of JSON alone.

Lives on the event loop. Frames end with a bare line feed and data is one line of JSON, which every client's parser
reads. Formats: WHATWG HTML, "Server-sent events"; NDJSON.
"""

import json
import logging
import secrets
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
from sse_starlette.sse import AppStatus, EventSourceResponse
from starlette.types import Receive, Scope, Send

from headrace.server.errors import InternalError

logger = logging.getLogger(__name__)

# Draining is the server's own: the library would cut every stream half a second after SIGTERM.
AppStatus.disable_automatic_graceful_drain()

# The name of what `EventStream` looks for in a scope's extensions: `(chunk) -> is_written`, past `send`.
WRITE_CHUNK = "headrace.write_chunk"

# What a client that asks for obfuscation has its texts padded to a multiple of.
OBFUSCATED_BYTES = 32

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


def event_frame(event: str, value: Any, *, id: str | None) -> bytes:
    """A named event for EventSource, which keeps the last id where there is none. Neither `event` nor `id` comes from a
    client."""
    head = "" if id is None else f"id: {id}\n"
    return f"{head}event: {event}\ndata: {to_json(value)}\n\n".encode("ascii")


def line_frame(value: Any) -> bytes:
    """A frame of a stream of JSON lines."""
    return f"{to_json(value)}\n".encode("ascii")


def padded(frame: bytes, text: str | None, multiple: int) -> bytes:
    """The frame with random characters in a field `obfuscation`, which bring the length of the `text` in it up to a
    multiple, or of the whole where more of it tells something: who sees encrypted streams pass knows tokens by their
    lengths.

    Source: Weiss et al., "What Was Your Prompt?" (USENIX Security 2024); the field's name is OpenAI's.
    """
    num_missing = -len(frame if text is None else to_json(text)) % multiple
    before, brace, after = frame.rpartition(b"}")
    filler = secrets.token_hex(num_missing)[:num_missing].encode("ascii")
    return b'%b,"obfuscation":"%b"%b%b' % (before, filler, brace, after)


def retry_frame(retry_ms: int) -> bytes:
    return f"retry: {retry_ms}\n\n".encode("ascii")


class EventStream(EventSourceResponse):
    """Streams ready-made frames, by default of events; `failure` ends a stream whose next frame cannot be made.

    The endpoint watches for the disconnect and the server drains by itself, so the library's tasks for these and for
    its ping are not started.
    """

    def __init__(
        self,
        frames: AsyncIterator[bytes],
        failure: bytes | None = None,
        media_type: str = "text/event-stream; charset=utf-8",
    ) -> None:
        super().__init__(
            frames,
            headers={"cache-control": "no-cache, no-transform"},
            media_type=media_type,
            ping=0,
            sep="\n",
        )
        self._failure = data_frame(InternalError().envelope()) if failure is None else failure

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
        except Exception:
            logger.exception("a stream failed while a frame was made")
            await send({"type": "http.response.body", "body": self._failure, "more_body": True})
        finally:
            # A generator that is dropped half-way runs its clean-up only when it is collected; this runs it now.
            await frames.aclose()


def _is_not_written(frame: bytes) -> bool:
    return False
