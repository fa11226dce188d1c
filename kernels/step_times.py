"""When a step was computed: what a backend knows of it, and the engine publishes. Imports nothing."""

from typing import NamedTuple


class StepTimes(NamedTuple):
    """When computing began and ended, and when its caller had the interpreter's lock again: in seconds of
    time.monotonic()."""

    began_s: float
    ended_s: float
    resumed_s: float
