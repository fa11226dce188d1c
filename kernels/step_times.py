"""When a step was computed: what a backend knows of it, and the engine publishes. Imports nothing."""

from typing import NamedTuple


class StepTimes(NamedTuple):
    """When computing began and ended, in seconds of time.monotonic(), and how long after each of its parts the caller
    waited for the interpreter's lock, None where that cannot be told."""

    began_s: float
    ended_s: float
    lock_wait_s: float | None
