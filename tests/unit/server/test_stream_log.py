"""Reading a log at any cursor gives all that follows it, once."""

import anyio
import pytest
from hypothesis import given, settings, strategies as st

from headrace.scheduler.messages import FinishReason
from headrace.server.stream_log import LogSlice, StreamLog, Terminal

END = Terminal(FinishReason.STOP)
ENTRIES = st.lists(st.tuples(st.text(min_size=1, max_size=4), st.integers(1, 3)), max_size=20)


@settings(max_examples=100, derandomize=True, deadline=None)
@given(ENTRIES, st.data())
def test_slices_at_any_cursors_add_up_to_the_whole(entries: list[tuple[str, int]], data: st.DataObject) -> None:
    log = StreamLog()
    text, num_tokens, cursor = "", 0, 0
    for entry in entries:
        log.append(*entry)
        if data.draw(st.booleans()):
            piece = log.read(cursor)
            text, num_tokens, cursor = text + piece.text, num_tokens + piece.num_tokens, piece.cursor
            assert piece.terminal is None
    log.close(END)
    piece = log.read(cursor)
    assert piece.terminal is END
    assert text + piece.text == "".join(text for text, _ in entries) == log.read().text
    assert num_tokens + piece.num_tokens == sum(count for _, count in entries)
    assert piece.cursor == log.end == len(entries) + 1
    assert log.read(log.end) == LogSlice("", 0, log.end, END)


@pytest.mark.anyio
async def test_a_reader_sleeps_until_something_follows_its_cursor_and_takes_it_all() -> None:
    log = StreamLog()
    pieces: list[LogSlice | None] = []

    async def follow() -> None:
        with log.subscribe() as subscriber:
            while not pieces or (last := pieces[-1]) is None or last.terminal is None:
                pieces.append(await subscriber.next())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(follow)
        await anyio.wait_all_tasks_blocked()
        assert pieces == []
        for text in ("a", "b", "c"):
            log.append(text, 1)
        await anyio.wait_all_tasks_blocked()
        assert pieces == [LogSlice("abc", 3, 3, None)]
        assert log.num_subscribers == 1
        log.append("d", 2)
        log.close(END)
    assert pieces[1:] == [LogSlice("d", 2, 5, END)]
    assert log.num_subscribers == 0


@pytest.mark.anyio
async def test_waiting_ends_empty_handed_when_its_time_is_over_and_loses_nothing() -> None:
    log = StreamLog()
    with log.subscribe() as subscriber:
        assert await subscriber.next(0.01) is None
        log.append("late", 1)
        assert await subscriber.next(0.01) == LogSlice("late", 1, 1, None)
        assert await subscriber.next(0.01) is None


def test_a_second_end_or_text_after_the_end_is_a_bug() -> None:
    log = StreamLog()
    log.close(END)
    with pytest.raises(AssertionError):
        log.close(END)
    with pytest.raises(AssertionError):
        log.append("more", 1)
