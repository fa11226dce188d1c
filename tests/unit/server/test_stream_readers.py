"""Readers of a log: each at its own pace and from its own cursor, none loses, repeats or holds up anything."""

import sys

import anyio
import pytest
from hypothesis import given, settings, strategies as st

from headrace.scheduler.messages import FinishReason, TokenLogprobs
from headrace.server.stream_log import LogSlice, StreamLog, Subscriber, Terminal

END = Terminal(FinishReason.LENGTH)

# What happens in turn: None lets the readers run, a text is appended.
EVENTS = st.lists(st.none() | st.text(min_size=1, max_size=3), max_size=20)


@settings(max_examples=30, derandomize=True, deadline=None)
@given(events=EVENTS, num_early=st.integers(0, 10), cursors=st.lists(st.integers(0, 10), max_size=4))
def test_every_reader_from_any_cursor_gets_the_rest_once_and_in_order(
    events: list[str | None], num_early: int, cursors: list[int]
) -> None:
    async def body() -> None:
        log = StreamLog()
        early = [f"early{i} " for i in range(num_early)]
        for text in early:
            log.append(text, 2)
        pieces: dict[int, list[LogSlice]] = {i: [] for i in range(len(cursors))}

        async def follow(i: int, cursor: int) -> None:
            with log.subscribe(cursor) as subscriber:
                while not pieces[i] or pieces[i][-1].terminal is None:
                    piece = await subscriber.next()
                    assert piece is not None
                    assert cursor < piece.cursor == log.end
                    cursor = piece.cursor
                    pieces[i].append(piece)

        async with anyio.create_task_group() as tasks:
            starts = [min(cursor, num_early) for cursor in cursors]
            for i, start in enumerate(starts):
                tasks.start_soon(follow, i, start)
            for event in events:
                if event is None:
                    await anyio.wait_all_tasks_blocked()
                else:
                    log.append(event, 3)
            log.close(END)
        assert log.num_subscribers == 0
        later = [event for event in events if event is not None]
        for i, start in enumerate(starts):
            assert "".join(piece.text for piece in pieces[i]) == "".join(early[start:] + later)
            assert sum(piece.num_tokens for piece in pieces[i]) == 2 * (num_early - start) + 3 * len(later)
            assert [piece.terminal for piece in pieces[i]] == [None] * (len(pieces[i]) - 1) + [END]
            ends = [piece.cursor for piece in pieces[i]]
            assert ends == sorted(set(ends))
            assert all(piece.text or piece.terminal for piece in pieces[i]), "a wake-up for nothing"

    anyio.run(body)


@pytest.mark.anyio
async def test_what_came_while_a_reader_was_away_is_one_piece_and_one_wake_up() -> None:
    log = StreamLog()
    with log.subscribe() as subscriber:
        for i in range(1000):
            log.append(f"{i} ", 1)
        piece = await subscriber.next()
        assert piece is not None
        assert (piece.num_tokens, piece.cursor) == (1000, 1000)
        assert await subscriber.next(0) is None
        log.close(END)
        assert await subscriber.next(0) == LogSlice("", 0, 1001, END)


@pytest.mark.anyio
async def test_a_writer_never_waits_for_a_reader_that_does_not_read() -> None:
    log = StreamLog()
    with log.subscribe() as slow, log.subscribe() as other:
        for _ in range(50):
            log.append("x", 1)
            assert await other.next(0) is not None
        piece = await slow.next()
        assert piece is not None
        assert piece.text == "x" * 50


@pytest.mark.anyio
@pytest.mark.parametrize("is_woken_first", [True, False])
async def test_a_reader_cancelled_while_it_waits_misses_nothing_when_it_comes_back(is_woken_first: bool) -> None:
    log = StreamLog()
    pieces: list[LogSlice | None] = []

    async def read(subscriber: Subscriber) -> None:
        pieces.append(await subscriber.next())

    with log.subscribe() as subscriber:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read, subscriber)
            await anyio.wait_all_tasks_blocked()
            # Woken and cancelled in the same turn of the loop: either it got the text, or the next one does.
            if is_woken_first:
                log.append("a", 1)
            tasks.cancel_scope.cancel()
            if not is_woken_first:
                log.append("a", 1)
        if not pieces:
            pieces.append(await subscriber.next(0))
        assert pieces == [LogSlice("a", 1, 1, None)]
        assert await subscriber.next(0) is None


@pytest.mark.anyio
@pytest.mark.parametrize(("cursor", "text"), [(0, "a"), (1, "")])
async def test_a_log_that_is_over_is_read_without_waiting(cursor: int, text: str) -> None:
    log = StreamLog()
    log.append("a", 1)
    log.close(END)
    with log.subscribe(cursor) as subscriber:
        assert await subscriber.next(0) == LogSlice(text, len(text), 2, END)


def test_a_cursor_beyond_the_log_is_a_bug() -> None:
    log = StreamLog()
    log.append("a", 1)
    for cursor in (-1, 2):
        with pytest.raises(AssertionError):
            log.subscribe(cursor)


@pytest.mark.anyio
async def test_leaving_ends_the_subscription_whatever_happens() -> None:
    log = StreamLog()

    async def fail() -> None:
        with log.subscribe():
            assert log.num_subscribers == 1
            raise RuntimeError("reader")

    with pytest.raises(RuntimeError, match="reader"):
        await fail()
    assert log.num_subscribers == 0
    log.append("a", 1)
    log.close(END)
    assert log.read(0).text == "a"


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=40), max_size=20))
def test_a_log_weighs_at_least_its_text(texts: list[str]) -> None:
    log = StreamLog()
    for text in texts:
        log.append(text, 1)
    assert log.num_bytes >= sum(len(text.encode()) for text in texts)
    assert log.num_bytes <= sum(4 * len(text) + 256 for text in texts)


@pytest.mark.anyio
async def test_one_reader_of_several_logs_takes_turns_and_misses_nothing() -> None:
    logs = [StreamLog() for _ in range(3)]
    with Subscriber(logs) as subscriber:
        for i, log in enumerate(logs):
            log.append(f"a{i}", 1)
            log.append(f"b{i}", 1)
        pieces = [await subscriber.next(0) for _ in logs]
        assert [(piece.log_index, piece.text) for piece in pieces if piece] == [(i, f"a{i}b{i}") for i in range(3)]
        assert await subscriber.next(0) is None
        logs[1].append("x", 1)
        logs[0].close(END)
        again = [await subscriber.next(0) for _ in "12"]
        assert [(piece.log_index, piece.text, piece.terminal) for piece in again if piece] == [
            (0, "", END),
            (1, "x", None),
        ]
        assert [log.num_subscribers for log in logs] == [1, 1, 1]
    assert [log.num_subscribers for log in logs] == [0, 0, 0]


@pytest.mark.anyio
async def test_a_log_that_talks_all_the_time_does_not_drown_another() -> None:
    logs = [StreamLog(), StreamLog()]
    logs[1].append("quiet", 1)
    seen = []
    with Subscriber(logs) as subscriber:
        for _ in range(2):
            logs[0].append("loud ", 1)
            piece = await subscriber.next()
            assert piece is not None
            seen.append(piece.log_index)
    assert seen == [0, 1]


def test_log_probabilities_are_read_from_a_cursor_on_and_weigh_something() -> None:
    log = StreamLog()
    log.append("a", 1)
    bare = log.num_bytes
    items = tuple(TokenLogprobs(i, -1.0, ((1, -0.5),) * 20) for i in range(3))
    log.append("b", 1, items[:2])
    log.append("c", 1, items[2:])
    log.close(END)
    assert [log.read(cursor).logprobs for cursor in range(5)] == [items, items, items[2:], (), ()]
    assert log.num_bytes - 3 * bare >= 3 * sys.getsizeof(items[0].top)


class IntervalReader:
    """Reads two logs, from each once in an hour, or in as many seconds as a test lets pass."""

    def __init__(self) -> None:
        self.logs = [StreamLog(), StreamLog()]
        self.subscriber = Subscriber(self.logs, interval_s=3600)
        self.pieces: list[str] = []

    async def read(self) -> None:
        with self.subscriber:
            num_open = len(self.logs)
            while num_open:
                piece = await self.subscriber.next()
                assert piece is not None
                self.pieces.append(f"{piece.log_index}{piece.text}")
                num_open -= piece.terminal is not None

    async def append(self, log_index: int, text: str) -> None:
        self.logs[log_index].append(text, 1)
        await anyio.wait_all_tasks_blocked()

    async def pass_interval(self) -> None:
        self.subscriber._due_s = 0
        self.subscriber.wake()
        await anyio.wait_all_tasks_blocked()


@pytest.mark.anyio
async def test_a_reader_with_an_interval_takes_from_each_log_once_in_it_and_then_all() -> None:
    reader = IntervalReader()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(reader.read)
        await anyio.wait_all_tasks_blocked()
        for log_index, text in ((0, "a"), (0, "b"), (1, "x"), (0, "c"), (1, "y")):
            await reader.append(log_index, text)
        assert reader.pieces == ["0a", "1x"], "the first ones wait for nothing"
        await reader.pass_interval()
        assert sorted(reader.pieces[2:]) == ["0bc", "1y"]
        await reader.append(0, "d")
        assert len(reader.pieces) == 4
        tasks.cancel_scope.cancel()


@pytest.mark.anyio
async def test_an_end_is_not_held_back_for_an_interval() -> None:
    reader = IntervalReader()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(reader.read)
        await anyio.wait_all_tasks_blocked()
        for text in "ab":
            await reader.append(0, text)
        for log in reader.logs:
            log.close(END)
    assert reader.pieces == ["0a", "0b", "1"] or reader.pieces == ["0a", "1", "0b"]


@pytest.mark.anyio
async def test_a_reader_that_waits_for_an_interval_still_hears_that_its_time_has_passed() -> None:
    log = StreamLog()
    with log.subscribe(interval_s=3600) as subscriber:
        log.append("a", 1)
        assert await subscriber.next(0) is not None
        log.append("b", 1)
        assert await subscriber.next(0.001) is None
        assert await subscriber.next(0) is None
