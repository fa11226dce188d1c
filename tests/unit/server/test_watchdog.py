"""When a step counts as hanging: by ticks, on an engine that says what a test tells it to."""

import threading

import anyio
import pytest

from headrace.scheduler.messages import LoadSnapshot
from headrace.server import watchdog as module
from headrace.server.metrics import Metrics
from headrace.server.watchdog import HANG_EXIT_CODE, Watchdog


class Watched:
    """A watchdog of 10 and 60 seconds, and what it sees and does."""

    def __init__(self) -> None:
        self.busy_since_s: float | None = None
        self.journal_since_s: float | None = None
        self.ends: list[int | str] = []
        self.metrics = Metrics("fake", LoadSnapshot, lambda: 0)
        self.watchdog = Watchdog(
            lambda: self.busy_since_s,
            lambda: self.journal_since_s,
            lambda: self.ends.append("told"),
            soft_s=10,
            hard_s=60,
            metrics=self.metrics,
            end_process=self.ends.append,
        )

    def look(self, *elapsed_s: float) -> None:
        for seconds in elapsed_s:
            self.watchdog.look(seconds)

    def state(self) -> tuple[float, str | None]:
        return self.watchdog.step_age_s, self.watchdog.hung

    def exposes(self, sample: str) -> bool:
        return f"headrace_{sample}\n" in self.metrics.expose().decode()


@pytest.fixture
def watched() -> Watched:
    return Watched()


def test_an_engine_that_waits_never_hangs(watched: Watched) -> None:
    watched.look(*[1] * 100)
    assert watched.state() == (0, None)


def test_an_engine_whose_steps_end_never_hangs(watched: Watched) -> None:
    for busy_since_s in range(100):
        watched.busy_since_s = busy_since_s
        watched.look(1)
    assert watched.state() == (0, None)


def test_a_step_hangs_beyond_the_soft_limit_until_it_ends_and_its_stacks_are_dumped_once(
    watched: Watched, capfd: pytest.CaptureFixture[str]
) -> None:
    watched.busy_since_s = 3
    watched.look(*[1] * 11)
    assert watched.state() == (10, None)
    assert capfd.readouterr().err == ""
    watched.look(*[1] * 20)
    assert watched.watchdog.hung == "engine"
    assert capfd.readouterr().err.count("(most recent call first)") >= 1
    assert watched.exposes("engine_hangs_total 1.0")
    assert watched.exposes("engine_step_age_seconds 30.0")
    watched.look(1)
    assert capfd.readouterr().err == ""
    watched.busy_since_s = 40
    watched.look(1)
    assert watched.state() == (0, None)


def test_a_process_that_was_stopped_for_an_hour_and_goes_on_does_not_hang(watched: Watched) -> None:
    watched.busy_since_s = 3
    watched.look(1, 1, 3600, 1)
    assert watched.state() == (4, None)


def test_a_disk_that_does_not_answer_the_journal_is_told_like_a_step_that_hangs(watched: Watched) -> None:
    watched.journal_since_s = 3
    for busy_since_s in range(12):  # the engine's steps go on
        watched.busy_since_s = busy_since_s
        watched.look(1)
    assert watched.state() == (0, "journal")
    watched.journal_since_s = None
    watched.look(1)
    assert watched.watchdog.hung is None


@pytest.mark.anyio
async def test_beyond_the_hard_limit_clients_are_told_before_the_process_ends(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched.busy_since_s = 3
    watched.look(*[2] * 31)
    monkeypatch.setattr(module, "_INTERVAL_S", 0.001)
    monkeypatch.setattr(module, "_FAREWELL_S", 0.001)
    await watched.watchdog.run()
    assert watched.ends == ["told", HANG_EXIT_CODE]
    assert not any(thread.name == "headrace-watchdog" for thread in threading.enumerate())


@pytest.mark.anyio
async def test_a_loop_that_hangs_beyond_the_hard_limit_ends_the_process_with_all_stacks(
    watched: Watched, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "_INTERVAL_S", 0.01)
    monkeypatch.setattr(watched.watchdog, "_hard_s", 0.1)
    has_ended = threading.Event()

    def end_process(code: int) -> None:
        watched.ends.append(code)
        has_ended.set()

    monkeypatch.setattr(watched.watchdog, "_end_process", end_process)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(watched.watchdog.run)
        await anyio.wait_all_tasks_blocked()
        assert has_ended.wait(20), "this holds up the loop"
        assert watched.ends == [HANG_EXIT_CODE]
        tasks.cancel_scope.cancel()
    assert "test_watchdog.py" in capfd.readouterr().err
