"""How many connections there may be, and which makes room for a new one: the one without a request for longest.

Lives on the event loop, one object for all connections of a server. Where every place has a request under way a few
more connections are accepted, so that they can be told, and probes answered; those have no place until one is free. It
knows nothing of HTTP: connections say when a request of theirs begins and ends.
"""

import resource
import sys
from contextlib import suppress
from typing import Protocol

from prometheus_client import Counter

from headrace.server.metrics import RequestMetrics

# For files, listeners, connections to an upstream.
_NUM_OTHER_DESCRIPTORS = 64
_NUM_SPARE_PLACES = 32


class Connection(Protocol):
    """What may have to make room."""

    @property
    def is_writing(self) -> bool:
        """Whether some of its last answer is still to be sent."""

    def make_room(self) -> None:
        """Close, at once."""


class _Places:
    """So many connections, and which of them has been idle for longest."""

    def __init__(self, num_places: int, num_closed: Counter) -> None:
        self._num_places = num_places
        self._num_closed = num_closed
        self._busy: set[Connection] = set()
        self._idle: dict[Connection, None] = {}  # the longest idle first

    def __len__(self) -> int:
        return len(self._busy) + len(self._idle)

    def __contains__(self, connection: Connection) -> bool:
        return connection in self._busy or connection in self._idle

    def take(self, connection: Connection) -> bool:
        """Give an idle connection a place, another idle one's if need be; False where there is none."""
        if len(self) >= self._num_places:
            leaving = next((each for each in self._idle if not each.is_writing), None)
            if leaving is None:
                return False
            del self._idle[leaving]
            self._num_closed.inc()
            leaving.make_room()
        self._idle[connection] = None
        return True

    def note(self, connection: Connection, *, is_idle: bool) -> None:
        if is_idle and connection in self._busy:
            self._busy.remove(connection)
            self._idle[connection] = None
        elif not is_idle and connection in self._idle:
            del self._idle[connection]
            self._busy.add(connection)

    def leave(self, connection: Connection) -> None:
        self._busy.discard(connection)
        self._idle.pop(connection, None)


class ConnectionLimit:
    """The places of a server's connections: `max_connections`, and a few spare ones."""

    def __init__(self, max_connections: int, metrics: RequestMetrics) -> None:
        self._num_closed = metrics.connections_closed
        self._places = _Places(max_connections, self._num_closed)
        self._spare = _Places(_NUM_SPARE_PLACES, self._num_closed)
        metrics.watch("connections", "Connections open", lambda: len(self._places) + len(self._spare))

    def open(self, connection: Connection) -> bool:
        """Take a new connection in, if only to tell it; False where it has to be closed at once."""
        is_open = self.find_place(connection) or self._spare.take(connection)
        if not is_open:
            self._num_closed.inc()
        return is_open

    def has_place(self, connection: Connection) -> bool:
        return connection in self._places

    def find_place(self, connection: Connection) -> bool:
        """Whether an open connection has a place, or gets one now."""
        if connection in self._places:
            return True
        has_place = self._places.take(connection)
        if has_place:
            self._spare.leave(connection)
        return has_place

    def note(self, connection: Connection, *, is_idle: bool) -> None:
        """Take note of whether a connection has a request under way."""
        self._places.note(connection, is_idle=is_idle)
        self._spare.note(connection, is_idle=is_idle)

    def close(self, connection: Connection) -> None:
        """Give a connection's place back; without effect on one that has none."""
        self._places.leave(connection)
        self._spare.leave(connection)


def affordable_connections(max_connections: int, descriptors_each: int) -> int:
    """Raise this process's limit on descriptors as far as it goes; returns how many connections that leaves."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # macOS names a limit that its kernel refuses
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    num_descriptors = sys.maxsize if soft == resource.RLIM_INFINITY else soft
    num_left = num_descriptors - _NUM_OTHER_DESCRIPTORS - _NUM_SPARE_PLACES
    return max(1, min(max_connections, num_left // descriptors_each))
