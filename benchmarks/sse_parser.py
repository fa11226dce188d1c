"""Turns the bytes of an event stream into events, however the network cut them.

Implements the parsing half of the WHATWG "server-sent events" chapter; `retry` is read and dropped. It works on bytes:
line ends are ASCII, so a line cut out of UTF-8 is whole UTF-8, whichever read its characters were split over; decoding
is left to the reader of the event.
"""

from typing import NamedTuple

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class SseEvent(NamedTuple):
    """One dispatched event; `name` is empty where the stream named none, `id` where it had none before either."""

    name: bytes
    data: bytes
    id: bytes = b""


class SseParser:
    """Incremental parser of one stream."""

    def __init__(self) -> None:
        self._tail = b""  # the line that has begun and not ended
        self._is_after_cr = False
        self._is_first_line = True
        self._name = b""
        self._data: list[bytes] = []
        self._id = b""

    def feed(self, chunk: bytes) -> list[SseEvent]:
        """Return the events that `chunk` completes."""
        if not chunk:
            return []
        if self._is_after_cr and chunk.startswith(b"\n"):
            chunk = chunk[1:]  # the second half of a CRLF; its CR ended the line in the previous read
            self._is_after_cr = False
            if not chunk:
                return []
        self._is_after_cr = chunk.endswith(b"\r")
        if b"\r" in chunk:
            chunk = chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *lines, self._tail = (self._tail + chunk).split(b"\n")
        events: list[SseEvent] = []
        for line in lines:
            if self._is_first_line:
                line = line.removeprefix(_BYTE_ORDER_MARK)
                self._is_first_line = False
            if line:
                self._read_field(line)
            elif event := self._dispatch():
                events.append(event)
        return events

    def _read_field(self, line: bytes) -> None:
        field, _, value = line.partition(b":")  # a comment has an empty field
        if field == b"data":
            self._data.append(value.removeprefix(b" "))
        elif field == b"event":
            self._name = value.removeprefix(b" ")
        elif field == b"id" and b"\0" not in value:
            self._id = value.removeprefix(b" ")

    def _dispatch(self) -> SseEvent | None:
        event = SseEvent(self._name, b"\n".join(self._data), self._id) if self._data else None
        self._name = b""
        self._data = []
        return event
