"""Drives a third-party client that runs in a process of its own, in its own environment: see e2e/clients/driver.py."""

import json
import subprocess
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self


@dataclass(frozen=True)
class Seen:
    """What a client saw of one call."""

    texts: list[str]
    finish_reasons: list[str | None]
    logprobs: list[list[tuple[str, float]]]
    usage: dict[str, Any] | None
    num_chunks: int
    calls: list[list[str]]
    error: dict[str, Any] | None


class ClientDriver:
    """The client's process. It ends only when this is closed, so what a call leaves open stays open until then."""

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        try:
            self._process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()

    def call(
        self,
        way: str,
        body: dict[str, Any],
        *,
        extra: dict[str, Any] | None = None,
        timeout_s: float = 60,
        max_retries: int = 0,
        leave_after: int | None = None,
    ) -> Seen:
        """Make the client ask `body` in its `way` and wait for what it saw."""
        call = {"way": way, "body": body, "extra": extra or {}, "timeout_s": timeout_s, "max_retries": max_retries}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(call | {"leave_after": leave_after}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"the client's process ended with {self._process.wait()}"
        return Seen(**json.loads(line))
