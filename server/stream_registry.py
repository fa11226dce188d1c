"""The streams of one kind this server knows: running, finished and still readable, lately forgotten, and those that
another process makes and this one follows. Those of an earlier process are among them once the journal has been read.
There are two kinds, native streams and responses.

Lives on the event loop; one task calls `sweep` now and then. A stream without readers is cancelled after a grace time;
a finished log is kept for a while under a byte limit, least recently read first out; of the forgotten, a bounded list
of ids remains, so that a late reader learns that it came too late.
"""

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, Self, TypeVar

from headrace.server.errors import GoneError, NotFoundError, UnavailableError
from headrace.server.generation import Generation, Recipe
from headrace.server.journal_rows import StreamRecord
from headrace.server.stream_log import Subscriber

_MAX_TOMBSTONES = 10_000
# What a finished stream weighs beside its log: the objects that make it up.
_STREAM_OVERHEAD_BYTES = 4096
# What the journal keeps for each token of its prompt.
_TOKEN_BYTES = 8


@dataclass(slots=True, eq=False)
class KeptStream:
    """A stream: its owner, its generation, and since when it has no reader (None while it has one).

    `grace_s` is how long it may run without one, where its client asked for more or less than the server's own. At each
    of the cursors `resumed_at` a restart has taken it up, the last at `restored_s`. `num_own_bytes` is what it holds
    beside its log.
    """

    id: str
    tenant: str
    generation: Generation
    created_s: int
    continues_alone: bool
    unread_since_s: float | None
    grace_s: float | None = None
    resumed_at: list[int] = field(default_factory=list)
    restored_s: float = -math.inf
    num_own_bytes: int = 0

    @property
    def num_bytes(self) -> int:
        """What it costs to keep, in memory and in the journal."""
        num_prompt_bytes = (
            _TOKEN_BYTES * self.generation.num_prompt_tokens if self.generation.journal is not None else 0
        )
        return self.generation.log.num_bytes + num_prompt_bytes + self.num_own_bytes + _STREAM_OVERHEAD_BYTES

    @property
    def is_read_elsewhere(self) -> bool:
        """Whether another process, which follows it, has readers."""
        return self.generation.journal is not None and self.generation.journal.is_followed(self.id)

    def record(self, recipe: Recipe, submitted_s: float) -> StreamRecord:
        """What the journal has to know of it."""
        return StreamRecord(
            self.id,
            self.tenant,
            self.generation.id,
            self.created_s,
            self.continues_alone,
            self.grace_s,
            self.generation.stages.received_s,
            submitted_s,
            recipe,
        )

    @classmethod
    def from_record(cls, record: StreamRecord, generation: Generation, restored_s: float) -> Self:
        """A recorded stream, with a generation that is made for it."""
        return cls(
            record.id,
            record.tenant,
            generation,
            record.created_s,
            record.continues_alone,
            unread_since_s=None,
            grace_s=record.grace_s,
            restored_s=restored_s,
        )


@dataclass(slots=True, eq=False)
class NativeStream(KeptStream):
    """A stream whose events are named by their cursors."""

    def event_id(self, cursor: int) -> str:
        """What an event of this stream is called, in a way that tells which restarts its reader knows of: a crash can
        lose the end of what was delivered, and what comes in its place may be another text."""
        return f"{self.id}:{cursor}" + (f"-{len(self.resumed_at)}" if self.resumed_at else "")

    def has_kept(self, cursor: int, num_restarts: int) -> bool:
        """Whether what a reader has seen up to there, knowing of so many restarts, is the beginning of this log."""
        is_known = num_restarts <= len(self.resumed_at)
        return cursor <= min(self.resumed_at[num_restarts:] if is_known else [0], default=cursor)


StreamT = TypeVar("StreamT", bound=KeptStream)


class StreamRegistry(Generic[StreamT]):
    """Owns the streams of a kind. `cancel` ends a generation, `on_forget` hears of every stream that is forgotten.

    While it is not `is_whole`, no stream is said not to exist. A finished one is kept for `ttl_s`.
    """

    def __init__(
        self,
        *,
        cancel: Callable[[Generation], None],
        grace_s: float,
        ttl_s: float,
        max_finished_bytes: int,
        on_forget: Callable[[str], None] = lambda id: None,
        is_whole: bool = True,
    ) -> None:
        self.is_whole = is_whole
        self._cancel = cancel
        self._on_forget = on_forget
        self._grace_s = grace_s
        self.ttl_s = ttl_s
        self._max_finished_bytes = max_finished_bytes
        self._running: dict[str, StreamT] = {}
        self._finished: OrderedDict[str, StreamT] = OrderedDict()  # least recently read first
        self._followed: dict[str, StreamT] = {}
        self._num_finished_bytes = 0
        self._tombstones: OrderedDict[str, str] = OrderedDict()  # whose each was

    def add(self, stream: StreamT) -> None:
        """Take in a stream, which counts as running until `finish`; one that was followed is this server's now."""
        self._followed.pop(stream.id, None)
        self._running[stream.id] = stream

    def follow(self, stream: StreamT) -> None:
        """Take in a stream that another process makes, until `unfollow`: it is there to be read, and nothing else."""
        self._followed[stream.id] = stream

    def unfollow(self, id: str) -> None:
        del self._followed[id]

    def is_followed(self, id: str) -> bool:
        return id in self._followed

    def __contains__(self, id: str) -> bool:
        """Whether there is such a stream here, or was."""
        return any(id in ids for ids in (self._running, self._finished, self._followed, self._tombstones))

    def get(self, id: str) -> StreamT:
        """A stream to read. Raises: NotFoundError, GoneError where the id is remembered as forgotten, or
        UnavailableError where it may yet come."""
        stream = self._running.get(id) or self._finished.get(id) or self._followed.get(id)
        if stream is not None:
            return stream
        if id in self._tombstones:
            raise GoneError("this stream ended and is no longer kept")
        if not self.is_whole:
            raise UnavailableError("streams from before the restart are still being read", "loading")
        raise NotFoundError("no such stream")

    def get_owned(self, id: str, tenant: str) -> StreamT:
        """The same for its owner, as one who reads it; to others there is no such stream. Raises: as `get`."""
        if self._tombstones.get(id, tenant) != tenant or (stream := self.get(id)).tenant != tenant:
            raise NotFoundError("no such stream")
        self._note_read(stream)
        return stream

    def subscribe(self, stream: StreamT, cursor: int, interval_s: float = 0.0) -> Subscriber:
        """A reader's subscription; report its end with `unsubscribed`."""
        stream.unread_since_s = None
        self._note_read(stream)
        return stream.generation.log.subscribe(cursor, interval_s)

    def unsubscribed(self, stream: StreamT, now: float) -> None:
        if stream.generation.log.num_subscribers == 0:
            stream.unread_since_s = now

    def _note_read(self, stream: StreamT) -> None:
        if stream.id in self._finished:
            self._finished.move_to_end(stream.id)

    def finish(self, id: str) -> None:
        """Move a stream whose generation is over to the finished ones."""
        stream = self._finished[id] = self._running.pop(id)
        self._num_finished_bytes += stream.num_bytes

    def sweep(self, now: float) -> None:
        """Cancel streams without readers whose grace time is over, and forget finished ones."""
        for stream in list(self._running.values()):
            if stream.unread_since_s is None or stream.continues_alone:
                continue
            if now - stream.unread_since_s >= (self._grace_s if stream.grace_s is None else stream.grace_s):
                if stream.is_read_elsewhere:
                    stream.unread_since_s = now
                else:
                    self._cancel(stream.generation)
        for stream in list(self._finished.values()):
            end_s = stream.generation.stages.end_s
            is_old = end_s is not None and now - max(end_s, stream.restored_s) >= self.ttl_s
            if is_old or self._num_finished_bytes > self._max_finished_bytes:
                self.forget(stream)

    def forget(self, stream: StreamT) -> None:
        """Let go of a finished stream, and remember that there was one."""
        del self._finished[stream.id]
        self._num_finished_bytes -= stream.num_bytes
        self.remember_gone(stream.id, stream.tenant)

    def remember_gone(self, id: str, tenant: str) -> None:
        """Tell who asks for a stream that it came too late."""
        self._on_forget(id)
        self._tombstones[id] = tenant
        while len(self._tombstones) > _MAX_TOMBSTONES:
            self._tombstones.popitem(last=False)
