"""The processes of one target: a session of its own, with whatever they fork. Reads Linux's /proc.

A session holds its members even where a parent dies and its children are adopted, which a tree does not.
"""

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class ProcessStat:
    """One process; `cpu_s` is user and system time, its own and that of children it has waited for."""

    pid: int
    state: str
    session: int
    cpu_s: float

    @classmethod
    def parse(cls, text: str) -> "ProcessStat":
        """Read /proc/PID/stat; the command in it may hold blanks and parentheses."""
        head, _, tail = text.rpartition(")")
        fields = tail.split()
        ticks = sum(map(int, fields[11:15]))
        return cls(int(head.partition(" ")[0]), fields[0], int(fields[3]), ticks / _TICKS_PER_S)


@dataclass(frozen=True, slots=True)
class ProcessSession:
    """The living processes of the session that `leader` began."""

    leader: int

    def members(self) -> list[ProcessStat]:
        """List them; one that has ended but was not waited for is no member."""
        return [stat for stat in _every_process() if stat.session == self.leader and stat.state != "Z"]

    def cpu_s(self) -> float:
        """Sum their CPU seconds."""
        return sum(stat.cpu_s for stat in self.members())

    def signal(self, number: signal.Signals) -> None:
        """Signal each of them, none of which needs to be there still."""
        for stat in self.members():
            try:
                os.kill(stat.pid, number)
            except ProcessLookupError:
                continue


def _every_process() -> Iterator[ProcessStat]:
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                yield ProcessStat.parse((folder / "stat").read_text(errors="replace"))
            except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
                continue
