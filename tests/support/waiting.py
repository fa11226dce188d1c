"""Waiting for what another process does, where nothing tells when it is done."""

import time
from collections.abc import Callable


def until(predicate: Callable[[], bool], what: str, timeout_s: float = 20) -> None:
    """Ask again until it holds: the server's side of a hang-up is a packet away."""
    deadline_s = time.monotonic() + timeout_s
    while not predicate():
        assert time.monotonic() < deadline_s, f"never: {what}"
