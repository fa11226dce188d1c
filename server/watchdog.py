"""Tells an engine or a journal that hangs from one that is busy, and ends the process where it hangs for good.

A task on the event loop, which looks once a second at since when they have been at what they do, and a thread that sees
to it that the loop still looks. Both count seconds by their own ticks, so that a process that was stopped and goes on
is not taken for one that hangs. A thread that keeps the interpreter's lock for good stops both of them: only a probe
from outside tells.
"""

import faulthandler
import logging
import os
import threading
import time
from collections.abc import Callable
from operator import itemgetter

import anyio

from headrace.server.metrics import Metrics

logger = logging.getLogger(__name__)

# What sysexits.h calls EX_SOFTWARE.
HANG_EXIT_CODE = 70
_INTERVAL_S = 1.0
# For connections to take their last event.
_FAREWELL_S = 1.0
_STDERR = 2


class _Age:
    """For how many seconds a value, other than None, has been the same."""

    def __init__(self, value: Callable[[], float | None]) -> None:
        self.seconds = 0.0
        self._value = value
        self._seen: float | None = None  # at the last look

    def look(self, elapsed_s: float) -> None:
        """See whether it still is, `elapsed_s` after the last look."""
        value = self._value()
        is_same = value is not None and value == self._seen
        self._seen = value
        # A tick that comes much too late tells of this process, not of who is watched.
        self.seconds = self.seconds + min(elapsed_s, 2 * _INTERVAL_S) if is_same else 0.0


class Watchdog:
    """`engine_since_s` says since when the engine has been at what it computes, `journal_since_s` since when the
    journal has been at what it writes; None while they wait.

    Beyond `soft_s` one of them is `hung`, until it goes on after all. Beyond `hard_s` `end_unfinished` is called and
    the process ends.
    """

    def __init__(
        self,
        engine_since_s: Callable[[], float | None],
        journal_since_s: Callable[[], float | None],
        end_unfinished: Callable[[], None],
        *,
        soft_s: float,
        hard_s: float,
        metrics: Metrics,
        end_process: Callable[[int], object] = os._exit,
    ) -> None:
        self.hung: str | None = None
        self._ages = {"engine": _Age(engine_since_s), "journal": _Age(journal_since_s)}
        self._end_unfinished = end_unfinished
        self._soft_s = soft_s
        self._hard_s = hard_s
        self._num_hangs = metrics.engine_hangs
        self._end_process = end_process
        self._num_looks = 0
        self._is_over = threading.Event()
        metrics.watch("engine_step_age_seconds", "How long the engine has been at it", lambda: self.step_age_s)

    @property
    def step_age_s(self) -> float:
        """For how long the engine has been at what it computes."""
        return self._ages["engine"].seconds

    async def run(self) -> None:
        """Look until cancelled, or until one of them hangs for good."""
        loop_watch = threading.Thread(target=self._watch_loop, name="headrace-watchdog", daemon=True)
        loop_watch.start()
        try:
            looked_s = time.monotonic()
            while self._longest[1] <= self._hard_s:
                await anyio.sleep(_INTERVAL_S)
                now = time.monotonic()
                self.look(now - looked_s)
                looked_s = now
            logger.critical("the %s hangs, and this process ends", self._longest[0])
            self._end_unfinished()
            await anyio.sleep(_FAREWELL_S)
            self._end_process(HANG_EXIT_CODE)
        finally:
            self._is_over.set()
            loop_watch.join()

    def look(self, elapsed_s: float) -> None:
        """See who is still at the same, `elapsed_s` after the last look."""
        self._num_looks += 1
        for age in self._ages.values():
            age.look(elapsed_s)
        name, age_s = self._longest
        was_hung, self.hung = self.hung, name if age_s > self._soft_s else None
        if self.hung is not None and was_hung is None:
            self._num_hangs.inc()
            logger.error("the %s has been at the same for %.0f s; this is what all threads do", name, age_s)
            faulthandler.dump_traceback(file=_STDERR)
        elif self.hung is None and was_hung is not None:
            logger.warning("the %s goes on", was_hung)

    @property
    def _longest(self) -> tuple[str, float]:
        """Who has been at the same for longest, and for how many seconds."""
        return max(((name, age.seconds) for name, age in self._ages.items()), key=itemgetter(1))

    def _watch_loop(self) -> None:
        """End the process where the event loop has not looked for `hard_s`; runs on a thread of its own."""
        age, looked_s = _Age(lambda: self._num_looks), time.monotonic()
        while not self._is_over.wait(_INTERVAL_S):
            now = time.monotonic()
            age.look(now - looked_s)
            looked_s = now
            if age.seconds > self._hard_s:
                logger.critical("the event loop hangs, and this process ends; this is what all threads do")
                faulthandler.dump_traceback(file=_STDERR)
                self._end_process(HANG_EXIT_CODE)
                return
