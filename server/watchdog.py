"""Tells an engine that hangs from one that is busy, and ends the process where it hangs for good.

A task on the event loop, which looks once a second at since when the engine has been at what it computes, and a thread
that sees to it that the loop still looks. Both count seconds by their own ticks, so that a process that was stopped and
goes on is not taken for one that hangs. A thread that keeps the interpreter's lock for good stops both of them: only a
probe from outside tells.
"""

import faulthandler
import logging
import os
import threading
import time
from collections.abc import Callable

import anyio

from headrace.server.metrics import Metrics

logger = logging.getLogger(__name__)

# What sysexits.h calls EX_SOFTWARE.
HANG_EXIT_CODE = 70
_INTERVAL_S = 1.0
# For connections to take their last event.
_FAREWELL_S = 1.0
_STDERR = 2


class Watchdog:
    """`busy_since_s` says since when the engine has been at what it computes, None while it waits.

    Beyond `soft_s` the engine `is_hung`, until it goes on after all. Beyond `hard_s` `end_unfinished` is called and the
    process ends.
    """

    def __init__(
        self,
        busy_since_s: Callable[[], float | None],
        end_unfinished: Callable[[], None],
        *,
        soft_s: float,
        hard_s: float,
        metrics: Metrics,
        end_process: Callable[[int], object] = os._exit,
    ) -> None:
        self.step_age_s = 0.0
        self.is_hung = False
        self._busy_since_s = busy_since_s
        self._end_unfinished = end_unfinished
        self._soft_s = soft_s
        self._hard_s = hard_s
        self._num_hangs = metrics.engine_hangs
        self._end_process = end_process
        self._seen_s: float | None = None  # what `busy_since_s` was at the last look
        self._num_looks = 0
        self._is_over = threading.Event()
        metrics.watch("engine_step_age_seconds", "How long the engine has been at it", lambda: self.step_age_s)

    async def run(self) -> None:
        """Look until cancelled, or until the engine hangs for good."""
        loop_watch = threading.Thread(target=self._watch_loop, name="headrace-watchdog", daemon=True)
        loop_watch.start()
        try:
            looked_s = time.monotonic()
            while self.step_age_s <= self._hard_s:
                await anyio.sleep(_INTERVAL_S)
                now = time.monotonic()
                self.look(now - looked_s)
                looked_s = now
            logger.critical("the engine hangs, and this process ends")
            self._end_unfinished()
            await anyio.sleep(_FAREWELL_S)
            self._end_process(HANG_EXIT_CODE)
        finally:
            self._is_over.set()
            loop_watch.join()

    def look(self, elapsed_s: float) -> None:
        """See whether the engine is still at the same, `elapsed_s` after the last look."""
        self._num_looks += 1
        busy_since_s = self._busy_since_s()
        is_same = busy_since_s is not None and busy_since_s == self._seen_s
        self._seen_s = busy_since_s
        self.step_age_s = self.step_age_s + _counted(elapsed_s) if is_same else 0.0
        was_hung, self.is_hung = self.is_hung, self.step_age_s > self._soft_s
        if self.is_hung and not was_hung:
            self._num_hangs.inc()
            logger.error("the engine has been at one step for %.0f s; this is what all threads do", self.step_age_s)
            faulthandler.dump_traceback(file=_STDERR)
        elif was_hung and not self.is_hung:
            logger.warning("the engine goes on")

    def _watch_loop(self) -> None:
        """End the process where the event loop has not looked for `hard_s`; runs on a thread of its own."""
        age_s, num_seen, looked_s = 0.0, 0, time.monotonic()
        while not self._is_over.wait(_INTERVAL_S):
            now = time.monotonic()
            age_s = age_s + _counted(now - looked_s) if num_seen == self._num_looks else 0.0
            num_seen, looked_s = self._num_looks, now
            if age_s > self._hard_s:
                logger.critical("the event loop hangs, and this process ends; this is what all threads do")
                faulthandler.dump_traceback(file=_STDERR)
                self._end_process(HANG_EXIT_CODE)
                return


def _counted(elapsed_s: float) -> float:
    """A tick that comes much too late tells of this process, not of who is watched."""
    return min(elapsed_s, 2 * _INTERVAL_S)
