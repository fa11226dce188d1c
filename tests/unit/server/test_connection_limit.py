"""Who gets a place, and who makes room: connections that only say whether they are open."""

import pytest

from headrace.server.connection_limit import ConnectionLimit
from headrace.server.metrics import RequestMetrics


class Connection:
    is_writing = False
    is_open = True

    def make_room(self) -> None:
        self.is_open = False


class Limited:
    """A limit, and connections that open under it."""

    def __init__(self, max_connections: int) -> None:
        self.metrics = RequestMetrics()
        self.limit = ConnectionLimit(max_connections, self.metrics)

    def open(self, *, is_busy: bool = False) -> Connection:
        connection = Connection()
        connection.is_open = self.limit.open(connection)
        if is_busy:
            self.limit.note(connection, is_idle=False)
        return connection

    def exposes(self, num_open: int, num_closed: int) -> bool:
        exposed = self.metrics.expose().decode()
        samples = f"connections {num_open}.0", f"connections_closed_total {num_closed}.0"
        return all(f"\nheadrace_{sample}\n" in exposed for sample in samples)


def test_below_the_limit_nobody_makes_room() -> None:
    limited = Limited(3)
    connections = [limited.open() for _ in range(3)]
    assert all(connection.is_open and limited.limit.find_place(connection) for connection in connections)
    assert limited.exposes(3, 0)


def test_the_longest_idle_connection_makes_room_and_one_with_a_request_never_does() -> None:
    limited = Limited(3)
    busy, first, second = limited.open(is_busy=True), limited.open(), limited.open()
    limited.limit.note(first, is_idle=False)
    limited.limit.note(first, is_idle=True)  # so it is idle since later than the second
    limited.limit.note(first, is_idle=True)
    third, fourth = limited.open(), limited.open()
    assert [each.is_open for each in (busy, second, first, third, fourth)] == [True, False, False, True, True]
    limited.limit.close(second)
    assert limited.exposes(3, 2)


def test_of_three_the_one_that_was_idle_first_goes_first() -> None:
    limited = Limited(2)
    first, second = limited.open(), limited.open()
    limited.limit.note(first, is_idle=False)
    limited.limit.note(first, is_idle=True)
    limited.open()
    assert (first.is_open, second.is_open) == (True, False)


def test_an_answer_that_is_still_on_its_way_is_not_cut_off() -> None:
    limited = Limited(2)
    writing, silent = limited.open(), limited.open()
    writing.is_writing = True
    limited.open()
    assert (writing.is_open, silent.is_open) == (True, False)


def test_where_all_are_busy_a_few_more_may_ask_and_get_a_place_once_there_is_one() -> None:
    limited = Limited(2)
    busy = [limited.open(is_busy=True) for _ in range(2)]
    late = limited.open()
    assert late.is_open
    assert not limited.limit.find_place(late)
    assert limited.exposes(3, 0)
    limited.limit.note(busy[0], is_idle=True)
    assert limited.limit.find_place(late)
    assert [each.is_open for each in busy] == [False, True]
    limited.limit.close(late)
    assert limited.exposes(1, 1)


@pytest.mark.parametrize("is_busy", [False, True])
def test_of_those_without_a_place_there_are_a_few_at_most(*, is_busy: bool) -> None:
    limited = Limited(1)
    busy = limited.open(is_busy=True)
    late = [limited.open(is_busy=is_busy) for _ in range(40)]
    assert [each.is_open for each in late] == ([True] * 32 + [False] * 8 if is_busy else [False] * 8 + [True] * 32)
    assert busy.is_open
    assert limited.exposes(33, 8)


def test_a_connection_that_has_gone_holds_nothing() -> None:
    limited = Limited(1)
    for _ in range(3):
        for connection in [limited.open(is_busy=True) for _ in range(40)]:
            limited.limit.close(connection)
        assert "\nheadrace_connections 0.0\n" in limited.metrics.expose().decode()
