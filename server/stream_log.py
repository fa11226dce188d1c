"""What a request has produced, as an append-only log that any number of readers follow.

Lives on the event loop. A subscriber is a cursor into the log plus an anyio memory channel of one slot, in which the
log leaves a wake-up. The reader waits for a bare future and then looks into the slot, which is empty where the timer
rang: the channel's own `receive` costs a checkpoint, an event and a record of the task each time, ten times as much.
Reading at a cursor takes all up to the tail at once: a slow reader gets fewer, larger pieces, nothing is dropped, and
the writer never waits. A subscriber can follow several logs. A log is bounded by the request's max_tokens. It carries
log probabilities without looking into them, and knows nothing of HTTP.

A cursor counts entries: 0 is the beginning, `end` the tail; the terminal entry counts as one more.
"""

import asyncio
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple, Self

import anyio

from headrace.scheduler.messages import FinishReason, TokenLogprobs
from headrace.server.errors import ApiError

# What an entry weighs beside its text: two list slots and an int.
_ENTRY_OVERHEAD_BYTES = 48
# What a token's log probabilities weigh, and each alternative among them; what its id does.
_LOGPROBS_BYTES, _ALTERNATIVE_BYTES, _TOKEN_ID_BYTES = 160, 130, 40


@dataclass(frozen=True, slots=True)
class Terminal:
    """How a log ended. `error` is what a client is told where the request did not finish as asked."""

    finish_reason: FinishReason
    error: ApiError | None = None


class LogSlice(NamedTuple):
    """All a log holds from one cursor to another: `cursor` is the one after it, `terminal` set if the log ended.

    `log_index` tells which of a subscriber's logs it is of.
    """

    text: str
    num_tokens: int
    cursor: int
    terminal: Terminal | None
    logprobs: tuple[TokenLogprobs, ...] = ()
    log_index: int = 0
    token_ids: tuple[int, ...] = ()


class LogEntry(NamedTuple):
    """What was appended at once."""

    text: str
    num_tokens: int
    logprobs: tuple[TokenLogprobs, ...]


class StreamLog:
    """The log. `append` and `close` are for its one writer; readers use `subscribe`."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        # By entry, and empty unless they were asked for.
        self._logprobs: dict[int, tuple[TokenLogprobs, ...]] = {}
        self._token_ids: dict[int, tuple[int, ...]] = {}
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

    def append(
        self,
        text: str,
        num_tokens: int,
        logprobs: tuple[TokenLogprobs, ...] = (),
        token_ids: tuple[int, ...] = (),
    ) -> None:
        """Add a piece of text, made of `num_tokens` tokens, and wake the readers."""
        assert self.terminal is None, "append after close"
        if logprobs:
            self._logprobs[len(self._texts)] = logprobs
            self.num_bytes += sum(_LOGPROBS_BYTES + _ALTERNATIVE_BYTES * len(item.top) for item in logprobs)
        if token_ids:
            self._token_ids[len(self._texts)] = token_ids
            self.num_bytes += _TOKEN_ID_BYTES * len(token_ids)
        self._texts.append(text)
        self._num_tokens.append(self._num_tokens[-1] + num_tokens)
        self.num_bytes += sys.getsizeof(text) + _ENTRY_OVERHEAD_BYTES
        self._wake()

    def close(self, terminal: Terminal) -> None:
        """Add the one terminal entry and wake the readers."""
        assert self.terminal is None, "a second terminal event"
        self.terminal = terminal
        self._wake()

    def read(self, cursor: int = 0, log_index: int = 0) -> LogSlice:
        """Everything from `cursor`, at most `end`, on, labelled with `log_index`."""
        end = len(self._texts)
        first = min(cursor, end)
        logprobs: tuple[TokenLogprobs, ...] = ()
        if self._logprobs:
            logprobs = tuple(item for entry in range(first, end) for item in self._logprobs.get(entry, ()))
        token_ids: tuple[int, ...] = ()
        if self._token_ids:
            token_ids = tuple(item for entry in range(first, end) for item in self._token_ids.get(entry, ()))
        num_tokens, text = self._num_tokens[-1] - self._num_tokens[first], "".join(self._texts[first:])
        return LogSlice(text, num_tokens, self.end, self.terminal, logprobs, log_index, token_ids)

    def entries(self, begin: int, end: int) -> list[LogEntry]:
        """What was appended from one cursor to another; a terminal entry is none of them."""
        totals = self._num_tokens
        return [
            LogEntry(text, totals[i + 1] - totals[i], self._logprobs.get(i, ()))
            for i, text in enumerate(self._texts[begin:end], start=begin)
        ]

    def subscribe(self, cursor: int = 0, interval_s: float = 0.0) -> "Subscriber":
        """A reader from `cursor` on, as a context manager; leaving it unsubscribes."""
        assert 0 <= cursor <= self.end, "a cursor beyond the log"
        return Subscriber([self], cursor, interval_s)

    def _wake(self) -> None:
        for subscriber in self._subscribers:
            subscriber.wake()


class Subscriber:
    """One reader: a cursor into each of its logs, and one channel that all of them wake. It takes from each log at most
    once in `interval_s`, and then all that came meanwhile; an end is not waited for."""

    def __init__(self, logs: Sequence[StreamLog], cursor: int = 0, interval_s: float = 0.0) -> None:
        self._logs = logs
        self._cursors = [cursor] * len(logs)
        self._turn = 0
        self._interval_s = interval_s
        self._due_s = 0.0
        self._served: set[int] = set()  # the logs that nothing is taken from until then
        self._send, self._receive = anyio.create_memory_object_stream[None](1)
        self._bell: asyncio.Future[None] | None = None  # while the reader waits
        self._expires_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due_s = math.inf

    def __enter__(self) -> Self:
        for log in self._logs:
            log._subscribers.add(self)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        for log in self._logs:
            log._subscribers.discard(self)
        if self._timer is not None:
            self._timer.cancel()
            self._timer_due_s = math.inf
        self._send.close()
        self._receive.close()

    def wake(self) -> None:
        # A full slot means that the reader has been woken before and found what was behind its cursor by itself.
        try:  # noqa: SIM105 - `suppress` costs more than all the rest
            self._send.send_nowait(None)
        except anyio.WouldBlock:
            pass
        self._ring()

    async def next(self, timeout_s: float | None = None) -> LogSlice | None:
        """Wait for something behind a cursor and move past it, by turns; None where `timeout_s` passed first.

        After a slice with a terminal there is nothing more to wait for from that log.
        """
        assert self._bell is None, "two readers on one subscription"
        loop = asyncio.get_running_loop()
        expires_s = math.inf if timeout_s is None else loop.time() + timeout_s
        while (piece := self._take()) is None:
            self._bell = loop.create_future()
            self._expire_at(min(expires_s, self._due_s) if self._served else expires_s)
            try:
                await self._bell
            finally:
                self._bell = None
            try:
                self._receive.receive_nowait()
            except anyio.WouldBlock:
                if not self._served or loop.time() < self._due_s:
                    return None
            if self._served and loop.time() >= self._due_s:
                self._served.clear()
        if self._interval_s:
            if not self._served:
                self._due_s = loop.time() + self._interval_s
            self._served.add(piece.log_index)
        return piece

    def _expire_at(self, expires_s: float) -> None:
        """Have the bell rung by then. A timer that is due earlier finds that out for itself: one serves many waits."""
        self._expires_s = expires_s
        if expires_s < self._timer_due_s:
            if self._timer is not None:
                self._timer.cancel()
            self._timer_due_s = expires_s
            self._timer = asyncio.get_running_loop().call_at(expires_s, self._expire)

    def _expire(self) -> None:
        self._timer_due_s = math.inf
        if asyncio.get_running_loop().time() < self._expires_s:
            self._expire_at(self._expires_s)
        else:
            self._ring()

    def _ring(self) -> None:
        if self._bell is not None and not self._bell.done():
            self._bell.set_result(None)

    def _take(self) -> LogSlice | None:
        for _ in self._logs:
            index = self._turn
            self._turn = (index + 1) % len(self._logs)
            if index in self._served and self._logs[index].terminal is None:
                continue
            piece = self._logs[index].read(self._cursors[index], index)
            if piece.cursor > self._cursors[index]:
                self._cursors[index] = piece.cursor
                return piece
        return None
