"""The native streams this server knows: running, finished and still readable, and lately forgotten.

Lives on the event loop; one task calls `sweep` now and then. A stream without readers is cancelled after a grace time;
a finished log is kept for a while under a byte limit, least recently read first out; of the forgotten, a bounded list
of ids remains, so that a late reader learns that it came too late.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from headrace.server.errors import GoneError, NotFoundError
from headrace.server.generation import Generation
from headrace.server.stream_log import Subscriber

_MAX_TOMBSTONES = 10_000
# What a finished stream weighs beside its log: the objects that make it up.
_STREAM_OVERHEAD_BYTES = 4096


@dataclass(slots=True, eq=False)
class NativeStream:
    """A stream: its owner, its generation, and since when it has no reader (None while it has one).

    `grace_s` is how long it may run without one, where its client asked for more or less than the server's own.
    """

    id: str
    tenant: str
    generation: Generation
    created_s: int
    continues_alone: bool
    unread_since_s: float | None
    grace_s: float | None = None


class StreamRegistry:
    """Owns the native streams. `cancel` ends a generation."""

    def __init__(
        self, *, cancel: Callable[[Generation], None], grace_s: float, ttl_s: float, max_finished_bytes: int
    ) -> None:
        self._cancel = cancel
        self._grace_s = grace_s
        self._ttl_s = ttl_s
        self._max_finished_bytes = max_finished_bytes
        self._running: dict[str, NativeStream] = {}
        self._finished: OrderedDict[str, NativeStream] = OrderedDict()  # least recently read first
        self._num_finished_bytes = 0
        self._tombstones: OrderedDict[str, str] = OrderedDict()  # whose each was

    def add(self, stream: NativeStream) -> None:
        """Take in a stream whose generation is not over."""
        self._running[stream.id] = stream

    def get(self, id: str) -> NativeStream:
        """A stream to read. Raises: NotFoundError, or GoneError where the id is remembered as forgotten."""
        stream = self._running.get(id) or self._finished.get(id)
        if stream is not None:
            return stream
        if id in self._tombstones:
            raise GoneError("this stream ended and is no longer kept")
        raise NotFoundError("no such stream")

    def get_owned(self, id: str, tenant: str) -> NativeStream:
        """The same for its owner; to others there is no such stream. Raises: NotFoundError, GoneError."""
        if self._tombstones.get(id, tenant) != tenant or (stream := self.get(id)).tenant != tenant:
            raise NotFoundError("no such stream")
        return stream

    def subscribe(self, stream: NativeStream, cursor: int) -> Subscriber:
        """A reader's subscription; report its end with `unsubscribed`."""
        stream.unread_since_s = None
        if stream.id in self._finished:
            self._finished.move_to_end(stream.id)
        return stream.generation.log.subscribe(cursor)

    def unsubscribed(self, stream: NativeStream, now: float) -> None:
        if stream.generation.log.num_subscribers == 0:
            stream.unread_since_s = now

    def finish(self, id: str) -> None:
        """Move a stream whose generation is over to the finished ones."""
        stream = self._finished[id] = self._running.pop(id)
        self._num_finished_bytes += _num_bytes(stream)

    def sweep(self, now: float) -> None:
        """Cancel streams without readers whose grace time is over, and forget finished ones."""
        for stream in list(self._running.values()):
            if stream.unread_since_s is None or stream.continues_alone:
                continue
            if now - stream.unread_since_s >= (self._grace_s if stream.grace_s is None else stream.grace_s):
                self._cancel(stream.generation)
        for stream in list(self._finished.values()):
            end_s = stream.generation.stages.end_s
            is_old = end_s is not None and now - end_s >= self._ttl_s
            if is_old or self._num_finished_bytes > self._max_finished_bytes:
                self._forget(stream)

    def _forget(self, stream: NativeStream) -> None:
        del self._finished[stream.id]
        self._num_finished_bytes -= _num_bytes(stream)
        self._tombstones[stream.id] = stream.tenant
        while len(self._tombstones) > _MAX_TOMBSTONES:
            self._tombstones.popitem(last=False)


def _num_bytes(stream: NativeStream) -> int:
    return stream.generation.log.num_bytes + _STREAM_OVERHEAD_BYTES
