"""What a request has produced, as an append-only log that any number of readers follow.

Lives on the event loop. A subscriber is a cursor into the log plus an anyio memory channel of one slot that wakes it.
Reading at a cursor takes all up to the tail at once: a slow reader gets fewer, larger pieces, nothing is dropped, and
the writer never waits. The log is bounded by the request's max_tokens. It knows neither tokens nor HTTP.

A cursor counts entries: 0 is the beginning, `end` the tail; the terminal entry counts as one more.
"""

import sys
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import anyio

from headrace.scheduler.messages import FinishReason
from headrace.server.errors import ApiError

# What an entry weighs beside its text: two list slots and an int.
_ENTRY_OVERHEAD_BYTES = 48


@dataclass(frozen=True, slots=True)
class Terminal:
    """How a log ended. `error` is what a client is told where the request did not finish as asked."""

    finish_reason: FinishReason
    error: ApiError | None = None


@dataclass(frozen=True, slots=True)
class LogSlice:
    """All a log holds from one cursor to another: `cursor` is the one after it, `terminal` set if the log ended."""

    text: str
    num_tokens: int
    cursor: int
    terminal: Terminal | None


class StreamLog:
    """The log. `append` and `close` are for its one writer; readers use `subscribe`."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._num_tokens: list[int] = [0]  # running totals, so that a slice's count is one subtraction
        self._subscribers: set[Subscriber] = set()
        self.terminal: Terminal | None = None
        self.num_bytes = 0

    @property
    def end(self) -> int:
        """The cursor behind everything there is."""
        return len(self._texts) + (self.terminal is not None)

    @property
    def num_subscribers(self) -> int:
        return len(self._subscribers)

    def append(self, text: str, num_tokens: int) -> None:
        """Add a piece of text, made of `num_tokens` tokens, and wake the readers."""
        assert self.terminal is None, "append after close"
        self._texts.append(text)
        self._num_tokens.append(self._num_tokens[-1] + num_tokens)
        self.num_bytes += sys.getsizeof(text) + _ENTRY_OVERHEAD_BYTES
        self._wake()

    def close(self, terminal: Terminal) -> None:
        """Add the one terminal entry and wake the readers."""
        assert self.terminal is None, "a second terminal event"
        self.terminal = terminal
        self._wake()

    def read(self, cursor: int) -> LogSlice:
        """Everything from `cursor`, at most `end`, on."""
        texts = self._texts[cursor:]
        first = min(cursor, len(self._texts))
        return LogSlice("".join(texts), self._num_tokens[-1] - self._num_tokens[first], self.end, self.terminal)

    def text(self) -> str:
        return "".join(self._texts)

    def subscribe(self, cursor: int = 0) -> "Subscriber":
        """A reader from `cursor` on, as a context manager; leaving it unsubscribes."""
        assert 0 <= cursor <= self.end, "a cursor beyond the log"
        return Subscriber(self, cursor)

    def _wake(self) -> None:
        for subscriber in self._subscribers:
            subscriber.wake()


class Subscriber:
    """One reader's cursor."""

    def __init__(self, log: StreamLog, cursor: int) -> None:
        self.log = log
        self.cursor = cursor
        self._send, self._receive = anyio.create_memory_object_stream[None](1)

    def __enter__(self) -> Self:
        self.log._subscribers.add(self)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.log._subscribers.discard(self)
        self._send.close()
        self._receive.close()

    def wake(self) -> None:
        # A full slot means that the reader has been woken and not yet looked.
        if self._send.statistics().current_buffer_used == 0:
            self._send.send_nowait(None)

    async def next(self, timeout_s: float | None = None) -> LogSlice | None:
        """Wait for something behind the cursor and move past it; None where `timeout_s` passed first.

        After a slice with a terminal there is nothing more to wait for.
        """
        while self.cursor >= self.log.end:
            if timeout_s is None:
                await self._receive.receive()
            else:
                with anyio.move_on_after(timeout_s) as scope:
                    await self._receive.receive()
                if scope.cancelled_caught:
                    return None
        piece = self.log.read(self.cursor)
        self.cursor = piece.cursor
        return piece
