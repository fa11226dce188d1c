"""The order of an end: refused, waited for, ended."""

import anyio
import pytest

from headrace.server.drain import drain, take_leave

pytestmark = pytest.mark.anyio


class Served:
    """Something with requests left; `calls` is what was asked of it, and how many were left then."""

    has_been_ready = True

    def __init__(self, num_unfinished: int) -> None:
        self.num_unfinished = num_unfinished
        self.calls: list[tuple[str, int]] = []

    def leave(self) -> None:
        self.calls.append(("leave", self.num_unfinished))

    def stop_accepting(self) -> None:
        self.calls.append(("stop accepting", self.num_unfinished))

    def end_unfinished(self) -> None:
        self.calls.append(("end", self.num_unfinished))


async def test_requests_are_waited_for_once_no_more_are_accepted() -> None:
    served = Served(2)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(drain, served, 60, anyio.Event())
        await anyio.wait_all_tasks_blocked()
        assert served.calls == [("stop accepting", 2)]
        served.num_unfinished = 0
    assert served.calls == [("stop accepting", 2), ("end", 0)]


async def test_what_outlasts_the_grace_time_is_ended() -> None:
    served = Served(2)
    await drain(served, 0, anyio.Event())
    assert served.calls == [("stop accepting", 2), ("end", 2)]


async def test_a_drain_that_is_hurried_waits_no_longer() -> None:
    served, hurried = Served(2), anyio.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(drain, served, 60, hurried)
        await anyio.wait_all_tasks_blocked()
        hurried.set()
    assert served.calls == [("stop accepting", 2), ("end", 2)]


async def test_who_takes_leave_is_ready_no_more_and_takes_requests_until_the_delay_is_over_or_cut_short() -> None:
    for delay_s, is_hurried in ((0, False), (60, True)):
        served, hurried = Served(2), anyio.Event()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(take_leave, served, delay_s, hurried)
            if is_hurried:
                await anyio.wait_all_tasks_blocked()
                hurried.set()
        assert served.calls == [("leave", 2)]
