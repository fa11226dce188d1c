"""The journals of replicas that share a folder: where each is, who writes it, and reading one that another writes.

A replica has a folder of its name, and in it a file for each of its processes that found none that was free. Who holds
a file's lock writes to it; the kernel lets go of the lock when that process dies, so that two never write. Who reads a
stream of another's holds a lock too, which the writer can see. Blocking calls, for worker threads; what is locked for a
stream's readers alone is also looked at on the event loop.
Source: flock(2); SQLite, "Write-Ahead Logging", which has readers and the writer not wait for each other.
"""

import fcntl
import itertools
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from headrace.server.journal_rows import Rows

_READ_TIMEOUT_S = 1.0


@dataclass(frozen=True, slots=True)
class Claim:
    """A journal's file that this process writes, until it lets go."""

    path: Path
    descriptor: int

    def release(self) -> None:
        os.close(self.descriptor)

    def discard(self) -> None:
        """Let go of the file by deleting it, the lock last, and its folder with the last file."""
        with suppress(OSError):
            self.path.unlink()
        with suppress(OSError):
            self.path.with_suffix(".readers").rmdir()
        with suppress(OSError):
            self.path.with_suffix(".lock").unlink()
        os.close(self.descriptor)
        with suppress(OSError):
            self.path.parent.rmdir()

    def is_followed(self, id: str) -> bool:
        """Whether another process marks a stream as read."""
        try:
            descriptor = _lock(_mark_of(self.path, id), os.O_RDWR)
        except OSError:  # nobody ever has
            return False
        if descriptor is not None:
            os.close(descriptor)
        return descriptor is None

    def forget(self, id: str) -> None:
        with suppress(OSError):
            _mark_of(self.path, id).unlink()


class JournalFolder:
    """The folder `root`, for the replica `name`. Raises: OSError, wherever a file cannot be had."""

    def __init__(self, root: Path, name: str) -> None:
        self.name = name
        self.root = root
        self._own: Path | None = None

    def claim_own(self) -> Claim:
        """Of this replica's files the first that no process holds, or a new one."""
        folder = self.root / self.name
        while True:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # another process has just deleted the last file in it
                claims = (self._claim(folder / f"{number}.db", os.O_CREAT) for number in itertools.count(1))
                own = next(claim for claim in claims if claim is not None)
                self._own = own.path
                return own

    def claim(self, path: Path) -> Claim | None:
        """None where another process holds the file, or has deleted it."""
        try:
            return self._claim(path, 0)
        except FileNotFoundError:
            return None

    def _claim(self, path: Path, flags: int) -> Claim | None:
        lock = path.with_suffix(".lock")
        if (descriptor := _lock(lock, os.O_RDWR | flags)) is None:
            return None
        # Whose lock was deleted since it was opened has one that nobody else will see.
        if not _is_at(descriptor, lock):
            os.close(descriptor)
            return self._claim(path, flags)
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, self.name.encode(), 0)
        except OSError:  # of a full disk: who cannot write lets others
            os.close(descriptor)
            raise
        return Claim(path, descriptor)

    def holder_of(self, path: Path) -> str:
        """The replica that holds a file, or was the last to; where that cannot be told, the one whose file it is."""
        with suppress(OSError, ValueError):
            if name := path.with_suffix(".lock").read_text():
                return name
        return path.parent.name

    def files_of(self, name: str) -> list[Path]:
        """The files of a replica but for this process's own; none where it has never been."""
        return sorted(path for path in (self.root / name).glob("[0-9]*.db") if path != self._own)

    def files(self) -> list[Path]:
        """The same of all replicas that have left some."""
        return [path for folder in sorted(self.root.glob("*/")) for path in self.files_of(folder.name)]

    def find(self, name: str, id: str) -> tuple[Path, Rows] | None:
        """The file that a stream of a replica's is in, and all its rows; what is damaged is not found.

        Raises: sqlite3.OperationalError, OSError where it may be in a file that cannot be read now.
        """
        unread: Exception | None = None
        for path in self.files_of(name):
            try:
                if rows := read_rows(path, {id: 0}).get(id):
                    return path, rows
            except (sqlite3.OperationalError, OSError) as error:
                unread = error
            except sqlite3.DatabaseError:
                continue
        if unread is not None:
            raise unread
        return None


def mark_followed(path: Path, ids: Iterable[str]) -> dict[str, int]:
    """For each of these streams a descriptor which, while it is open, tells the writer of the file that it has readers;
    none for one that the writer looks for at this very moment, or where there can be none."""
    marks: dict[str, int] = {}
    for id in ids:
        with suppress(OSError):
            mark = _mark_of(path, id)
            mark.parent.mkdir(mode=0o700, exist_ok=True)
            if (descriptor := _lock(mark, os.O_RDWR | os.O_CREAT, fcntl.LOCK_SH)) is not None:
                marks[id] = descriptor
    return marks


def read_rows(path: Path, positions: Mapping[str, int]) -> dict[str, Rows]:
    """The rows of streams, each from a position on; those that are not in the file are left out.

    Raises: sqlite3.Error where the file cannot be read, as for a moment one that is being made.
    """
    if not path.exists():
        return {}
    uri = f"file:{quote(str(path))}?mode=ro"
    with closing(sqlite3.connect(uri, uri=True, timeout=_READ_TIMEOUT_S, isolation_level=None)) as db:
        db.execute("BEGIN")  # so that all of it is of one moment
        return dict(_read(db, positions))


def _read(db: sqlite3.Connection, positions: Mapping[str, int]) -> Iterator[tuple[str, Rows]]:
    for id, position in positions.items():
        if db.execute("SELECT 1 FROM sqlite_schema WHERE name = ?", (id,)).fetchone() is not None:
            query = f'SELECT position, body, crc FROM "{id}" WHERE position >= ? ORDER BY position'
            yield id, db.execute(query, (position,)).fetchall()


def _mark_of(path: Path, id: str) -> Path:
    return path.with_suffix(".readers") / id


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether a path is still that of an open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _lock(path: Path, flags: int, kind: int = fcntl.LOCK_EX) -> int | None:
    """A descriptor of a file, locked until it is closed; None where another lock excludes that. Raises: OSError."""
    descriptor = os.open(path, flags, 0o600)
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            return None
        raise
    return descriptor
