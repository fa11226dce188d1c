"""Answers that a request gets again when it is repeated with its Idempotency-Key.

Lives on the event loop. The answer to a request with a key is made once, into a recording; whoever asks with the same
key reads that from its beginning, while it is made or for a while afterwards. Who asked first is a reader like others.
When the last reader has left an answer that is not finished, it is cancelled. A key is free again after that, after a
refusal, and after an answer that failed. Keys are their tenant's own. It knows neither what is asked nor what is
answered.
Source: draft-ietf-httpapi-idempotency-key-header, which answers 409 while an answer is made; here it can be read.
"""

import hashlib
import re
from collections import OrderedDict
from collections.abc import Awaitable, Callable

import anyio
import anyio.to_thread
from starlette.types import Message, Send

from headrace.server.errors import BadRequestError, IdempotencyKeyReusedError

HEADER = "Idempotency-Key"
REPLAYED_HEADER = "idempotent-replayed"
_KEY = re.compile("[!-~]{1,255}")
# What an answer weighs beside its bytes.
_OVERHEAD_BYTES = 2048
# A longer body's digest takes the loop too long.
_MAX_INLINE_BYTES = 2**18


class Recording:
    """An answer's bytes so far. `make` is called once, `read` by any number of readers, until it `is_abandoned`.
    `digest` is of what was asked."""

    def __init__(self, tenant: str, key: str, digest: bytes) -> None:
        self.place = tenant, key
        self.digest = digest
        self.num_bytes = _OVERHEAD_BYTES
        self.expires_s = 0.0
        self.is_abandoned = False
        self._start: Message | None = None
        self._chunks: list[bytes] = []
        self._is_whole = self._is_over = False
        self._num_readers = 0
        self._changed = anyio.Event()
        self._scope = anyio.CancelScope()

    @property
    def is_success(self) -> bool:
        """Whether the answer is there and is no refusal."""
        return self._is_whole and self._start is not None and self._start["status"] < 300

    async def make(self, respond: Callable[[Send], Awaitable[None]]) -> None:
        """Record what `respond` sends; cancelled when nobody reads it any more."""
        try:
            with self._scope:
                await respond(self._record)
        finally:
            self._is_over = True
            self._wake()

    async def read(self, send: Send, headers: Callable[[], dict[str, str]]) -> None:
        """Send all of it, as it comes, with these headers over the answer's own, made when it begins."""
        self._num_readers += 1
        try:
            cursor, has_started = 0, False
            while True:
                if self._start is not None and not has_started:
                    await send({**self._start, "headers": _with(self._start["headers"], headers())})
                    has_started = True
                # Looked at before the wait, since sending lets others run.
                changed, is_over, end = self._changed, self._is_over, len(self._chunks)
                if has_started and (end > cursor or is_over):
                    body = b"".join(self._chunks[cursor:end])
                    if is_over and not self._is_whole:
                        return  # cut off: an end would pass for the whole answer's
                    await send({"type": "http.response.body", "body": body, "more_body": not is_over})
                    cursor = end
                if is_over:
                    return
                await changed.wait()
        finally:
            self._num_readers -= 1
            if not self._num_readers and not self._is_over:
                self.is_abandoned = True
                self._scope.cancel()

    async def _record(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
        else:
            chunk = message.get("body", b"")
            self._chunks.append(chunk)
            self.num_bytes += len(chunk)
            self._is_whole = not message.get("more_body", False)
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()


class Idempotency:
    """The recordings of one server: those being made, and finished ones for `ttl_s`, of `max_bytes` in all, the oldest
    first out."""

    def __init__(self, clock: Callable[[], float], *, ttl_s: float, max_bytes: int) -> None:
        self._clock = clock
        self._ttl_s = ttl_s
        self._max_bytes = max_bytes
        # By tenant and key.
        self._making: dict[tuple[str, str], Recording] = {}
        self._finished: OrderedDict[tuple[str, str], Recording] = OrderedDict()  # the oldest first
        self._num_bytes = 0

    async def claim(self, path: str, tenant: str, key: str, body: bytes) -> tuple[Recording, bool]:
        """The recording of a request's answer, and whether it is the caller's to make, and then to `settle`.

        Raises: BadRequestError for a key that is none, IdempotencyKeyReusedError.
        """
        if _KEY.fullmatch(key) is None:
            raise BadRequestError(f"{HEADER}: must be 1 to 255 visible characters of ASCII", param=HEADER)

        def digest() -> bytes:
            return hashlib.sha256(f"{path}\0".encode() + body).digest()

        own = digest() if len(body) <= _MAX_INLINE_BYTES else await anyio.to_thread.run_sync(digest)
        self.sweep()
        recording = self._making.get((tenant, key)) or self._finished.get((tenant, key))
        if recording is None or recording.is_abandoned:
            recording = Recording(tenant, key, own)
            self._making[recording.place] = recording
            return recording, True
        if recording.digest != own:
            raise IdempotencyKeyReusedError(f"{HEADER}: belongs to another request, of a while ago", param=HEADER)
        return recording, False

    def settle(self, recording: Recording, *, has_failed: bool) -> None:
        """Keep what has been made, if it is of use to others, or free its key."""
        if self._making[recording.place] is recording:  # else it was abandoned, and another is made in its place
            del self._making[recording.place]
        if recording.is_success and not has_failed:
            recording.expires_s = self._clock() + self._ttl_s
            self._finished[recording.place] = recording
            self._num_bytes += recording.num_bytes
        self.sweep()

    def sweep(self) -> None:
        """Forget what is too old, and the oldest of what is too much."""
        now = self._clock()
        while self._finished:
            place, oldest = next(iter(self._finished.items()))
            if oldest.expires_s > now and self._num_bytes <= self._max_bytes:
                break
            del self._finished[place]
            self._num_bytes -= oldest.num_bytes


def _with(headers: list[tuple[bytes, bytes]], own: dict[str, str]) -> list[tuple[bytes, bytes]]:
    kept = [(name, value) for name, value in headers if name.decode("latin-1").lower() not in own]
    return kept + [(name.encode("latin-1"), value.encode("latin-1")) for name, value in own.items()]
