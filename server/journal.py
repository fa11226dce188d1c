"""The journal: what streams need to outlive this process, in a SQLite file.

Each stream is a table of rows, as `journal_rows` writes them. A table has pages of its own, and with it goes every byte
in them. One thread owns the connection. What comes of a stream passes through its queue, and goes on once it is
committed: nothing reaches a reader that a later process would not know. What waits at once shares a transaction.
Where writing fails the journal stops, and takes its file with it: one that lags behind what was delivered is worse
than none. What a stream's text is, and who may read it, is the event loop's affair.
"""

import itertools
import logging
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

from headrace.scheduler.errors import HeadraceError
from headrace.scheduler.messages import SequenceOutput
from headrace.server.journal_folder import Claim
from headrace.server.journal_rows import UNREADABLE, RecordedStream, RowFormat, Rows, StreamRecord, crc_of

logger = logging.getLogger(__name__)

Fsync = Literal["never", "checkpoint", "step"]
_SYNCHRONOUS = {"never": "OFF", "checkpoint": "NORMAL", "step": "FULL"}

_FORMAT = 1
# A step writes a page of each stream, so pages are small.
_PAGE_BYTES = 1024
_PAGES_PER_CHECKPOINT = 4096
# How long what was erased may stay in the write-ahead log, and how long another process may take to let go of the file.
_ERASED_WITHIN_S = 1.0
_LOCK_TIMEOUT_S = 1.0
_CLOSE_TIMEOUT_S = 5.0
_MAX_JOBS = 256
_MAX_STATEMENTS = 4096  # that are kept prepared; each stream has its own

_NEW_TABLE = 'CREATE TABLE "{}" (position INTEGER PRIMARY KEY, body BLOB, crc INTEGER)'
_NEW_ROW = 'INSERT INTO "{}" VALUES (?, ?, ?)'


class JournalError(HeadraceError):
    """The journal's file cannot be had."""


@dataclass(frozen=True, slots=True)
class Recording:
    """All that earlier processes left: streams, those of other models, and the ids of those that cannot be read."""

    streams: tuple[RecordedStream, ...] = ()
    others: tuple[RecordedStream, ...] = ()
    unreadable: tuple[str, ...] = ()


class _Job(NamedTuple):
    """What to write, and what to call once it is committed, or never will be."""

    write: Callable[[sqlite3.Connection], None]
    then: Callable[[], None]


@dataclass(slots=True)
class _Place:
    """Where a stream's next row goes."""

    id: str
    position: int


class Journal:
    """The thread and its queue. What its methods are given as `then` is called on the thread."""

    def __init__(self, path: Path, fsync: Fsync, model: str, claim: Claim | None = None) -> None:
        """Open the file, read what is in it, and start the thread. Its streams are those of the `model`.

        With a `claim` to the file others may read it meanwhile; the thread lets go of it at its end, or here.

        Raises: JournalError where the file is another server's at this time, or cannot be opened.
        """
        self.is_active = True
        # Since when the thread has been at what it writes now; None while it waits. Written there, read by any.
        self.busy_since_s: float | None = None
        self.path = path
        self._path = Path(os.path.realpath(path))  # SQLite's other files lie beside the file that a link leads to
        self._synchronous = _SYNCHRONOUS[fsync]
        self._model = model
        self._claim = claim
        self._format = RowFormat()
        self._queue: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._db: sqlite3.Connection | None = None
        self._ids: set[str] = set()  # of the streams in the file
        self._places: dict[int, _Place] = {}  # by the engine's id, of streams that are not over
        self._recording = Recording()
        self._is_suspended = False
        self._is_closing = False
        self._is_discarded = False
        self._truncate_s: float | None = None  # when the write-ahead log has to be emptied
        opened: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._main, args=(opened,), name="headrace-journal", daemon=True)
        self._thread.start()
        if (error := opened.get()) is not None:
            raise error

    # From any thread

    def read(self, then: Callable[[Recording], None]) -> None:
        """Hand over what earlier processes left, once."""

        def hand_over() -> None:
            recording, self._recording = self._recording, Recording()
            then(recording)

        self._put(lambda db: None, hand_over)

    def accept(self, request_id: int, record: StreamRecord, then: Callable[[], None]) -> None:
        """Begin to record a stream, before the engine has its request."""
        self._put(partial(self._write_stream, request_id, record), then)

    def resume(self, streams: Mapping[int, str], then: Callable[[], None]) -> None:
        """Go on recording streams, each by its id, under the engine's new ids.

        That they were taken up is on the disk afterwards, whatever is synchronised otherwise: what a reader has seen
        since, and the file has lost, can then be told from what it has not.
        """
        self._put(partial(self._write_resumptions, streams), then)

    def record(self, outputs: Sequence[SequenceOutput], then: Callable[[], None]) -> None:
        """Record what comes of streams, each by its request's id; nothing of one follows its end."""
        self._put(partial(self._write_outputs, outputs), then)

    def erase(self, id: str) -> None:
        """Leave nothing of a stream in any file, soon."""
        self._put(partial(self._delete, id))

    def suspend(self) -> None:
        """Record nothing from here on: what is unfinished is the next process's."""
        self._put(self._stop_writing)

    def close(self) -> None:
        """Write what is waiting, close the file and end the thread, unless the disk keeps it too long: see
        `has_thread`."""

        def close() -> None:
            self._is_closing = True

        self._put(lambda db: None, close)
        self._thread.join(_CLOSE_TIMEOUT_S)

    def discard(self) -> None:
        """Close, and delete the file, which is claimed, unless there are streams in it."""
        self._is_discarded = True
        self.close()

    @property
    def has_thread(self) -> bool:
        """Whether the thread is alive, as it may be after `close`."""
        return self._thread.is_alive()

    def holds_more_than(self, ids: Set[str]) -> bool:
        """Whether there are other streams in the file."""
        return not self._ids <= ids

    def is_followed(self, id: str) -> bool:
        """Whether another process has readers of a stream at this time."""
        return self._claim is not None and self._claim.is_followed(id)

    def _put(self, write: Callable[[sqlite3.Connection], None], then: Callable[[], None] = lambda: None) -> None:
        self._queue.put(_Job(write, then))

    # The thread

    def _main(self, opened: "queue.SimpleQueue[Exception | None]") -> None:
        try:
            self._db = self._open()
        except Exception as error:
            if self._claim is not None:
                self._claim.release()
            opened.put(error)
            return
        opened.put(None)
        while not self._is_closing:
            jobs = self._next_jobs()
            self.busy_since_s = time.monotonic()
            if self._db is not None:
                try:
                    self._write(self._db, jobs)
                except Exception as error:  # whatever it is, the streams go on
                    self._give_up(error)
            for job in jobs:
                job.then()
            self.busy_since_s = None
        if self._db is not None:
            self._db.close()
        if self._claim is not None:  # not before: the next one writes at once
            if self._is_discarded and not self._ids:
                self._claim.discard()
            else:
                self._claim.release()

    def _next_jobs(self) -> list[_Job]:
        """What waits, or the next to come; nothing where the write-ahead log has to be emptied first."""
        wait_s = None if self._truncate_s is None else max(0.0, self._truncate_s - time.monotonic())
        jobs: list[_Job] = []
        with suppress(queue.Empty):
            jobs.append(self._queue.get(timeout=wait_s))
            while len(jobs) < _MAX_JOBS:
                jobs.append(self._queue.get_nowait())
        return jobs

    def _write(self, db: sqlite3.Connection, jobs: list[_Job]) -> None:
        for job in jobs:
            job.write(db)
        db.commit()
        if self._truncate_s is not None and time.monotonic() >= self._truncate_s:
            [is_busy, *_] = db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            self._truncate_s = time.monotonic() + _ERASED_WITHIN_S if is_busy else None  # while another process reads

    def _give_up(self, error: Exception) -> None:
        self.is_active = False
        logger.error("the journal stops, and no restart resumes the streams of this process: %s", _kind(error))
        self._truncate_s = None
        for path in self._files:
            with suppress(OSError):
                path.unlink()
        assert self._db is not None
        with suppress(sqlite3.Error):
            self._db.close()
        self._db = None

    @property
    def _files(self) -> list[Path]:
        return [self._path, Path(f"{self._path}-wal"), Path(f"{self._path}-shm"), Path(f"{self._path}-journal")]

    # What is written

    def _write_stream(self, request_id: int, record: StreamRecord, db: sqlite3.Connection) -> None:
        if self._is_suspended:
            return
        _begin(db)
        db.execute(_NEW_TABLE.format(record.id))
        place = self._places[request_id] = _Place(record.id, 0)
        self._ids.add(record.id)
        for body in self._format.write_head(record, self._model):
            self._insert(db, place, body)

    def _write_resumptions(self, streams: Mapping[int, str], db: sqlite3.Connection) -> None:
        if self._is_suspended:
            return
        db.commit()
        db.execute("PRAGMA synchronous = FULL")  # which cannot be set inside of a transaction
        body = self._format.write_resumption()
        _begin(db)
        for request_id, id in streams.items():
            [position] = db.execute(f'SELECT count(*) FROM "{id}"').fetchone()
            place = self._places[request_id] = _Place(id, position)
            self._insert(db, place, body)
        db.commit()
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        db.execute(f"PRAGMA synchronous = {self._synchronous}")

    def _write_outputs(self, outputs: Sequence[SequenceOutput], db: sqlite3.Connection) -> None:
        now = time.monotonic()
        for output in outputs:
            place = self._places.get(output.request_id)
            if place is not None:
                _begin(db)
                self._insert(db, place, self._format.write_output(output, now))
                if output.finish_reason is not None:
                    del self._places[output.request_id]

    def _insert(self, db: sqlite3.Connection, place: _Place, body: bytes) -> None:
        crc = crc_of(place.id, place.position, body)
        db.execute(_NEW_ROW.format(place.id), (place.position, body, crc))
        place.position += 1

    def _delete(self, id: str, db: sqlite3.Connection) -> None:
        if self._is_suspended or id not in self._ids:
            return
        self._ids.remove(id)
        self._places = {request_id: place for request_id, place in self._places.items() if place.id != id}
        _begin(db)
        db.execute(f'DROP TABLE "{id}"')
        if self._claim is not None:
            self._claim.forget(id)
        if self._truncate_s is None:
            self._truncate_s = time.monotonic() + _ERASED_WITHIN_S

    def _stop_writing(self, db: sqlite3.Connection) -> None:
        self._is_suspended = True
        self._places.clear()

    # What is read

    def _open(self) -> sqlite3.Connection:
        """Open the file and read it. One that is damaged is put aside, and what of it can be read goes into a new one.

        Raises: JournalError.
        """
        db: sqlite3.Connection | None = None
        found: Mapping[str, Rows | sqlite3.DatabaseError] = {}
        try:
            db = self._connect()
            try:
                self._set_up(db)
                found, damage = _read_rows(db)
            except sqlite3.DatabaseError as error:
                damage = _damage(error)
            readable = self._take_in(found)
            if not damage:
                return db
            logger.error("the journal is damaged, and what can be read of it goes into a new one: %s", damage)
            self._put_aside()
            db.close()  # which deletes by their names: not before they have others, nor when new files have theirs
            db = self._connect()
            self._set_up(db)
            _begin(db)
            for id, rows in readable.items():
                db.execute(_NEW_TABLE.format(id))
                db.executemany(_NEW_ROW.format(id), rows)
            db.commit()
            self._ids = set(readable)
            return db
        except (sqlite3.Error, OSError) as error:
            if db is not None:
                db.close()
            is_locked = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_BUSY
            reason = "another server uses it" if is_locked else str(error)
            name = "journal_file" if self._claim is None else "journal_dir"
            raise JournalError(f"{name}: cannot open {self._path}: {reason}") from None

    def _connect(self) -> sqlite3.Connection:
        os.close(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600))
        for path in self._files:  # SQLite gives new ones the first one's mode
            with suppress(FileNotFoundError):
                path.chmod(0o600)
        return sqlite3.connect(
            self._path, timeout=_LOCK_TIMEOUT_S, isolation_level=None, cached_statements=_MAX_STATEMENTS
        )

    def _set_up(self, db: sqlite3.Connection) -> None:
        db.text_factory = bytes  # what is damaged may be no text
        if self._claim is None:
            db.execute("PRAGMA locking_mode = EXCLUSIVE")
        db.execute(f"PRAGMA page_size = {_PAGE_BYTES}")
        db.execute("PRAGMA secure_delete = ON")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute(f"PRAGMA synchronous = {self._synchronous}")
        db.execute(f"PRAGMA wal_autocheckpoint = {_PAGES_PER_CHECKPOINT}")
        [version] = db.execute("PRAGMA user_version").fetchone()
        if version not in (0, _FORMAT):
            raise sqlite3.DatabaseError(f"its format is {version}, not {_FORMAT}")
        db.execute(f"PRAGMA user_version = {_FORMAT}")  # a write, which takes the lock

    def _put_aside(self) -> None:
        asides = (Path(f"{self._path}.damaged-{number}") for number in itertools.count(1))
        aside = next(path for path in asides if not path.exists())
        for path in self._files:
            with suppress(FileNotFoundError):
                path.rename(f"{aside}{path.name.removeprefix(self._path.name)}")
        logger.warning("the damaged journal is kept as %s until you delete it; it may hold prompts and answers", aside)

    def _take_in(self, found: Mapping[str, Rows | sqlite3.DatabaseError]) -> dict[str, Rows]:
        """Make `_recording` of these; returns those that can be read."""
        streams: list[RecordedStream] = []
        others: list[RecordedStream] = []
        unreadable: list[str] = []
        readable: dict[str, Rows] = {}
        self._ids = set(found)
        for id, rows in found.items():
            try:
                if isinstance(rows, sqlite3.DatabaseError):
                    raise rows
                stream, model = self._format.read_stream(id, rows)
            except (*UNREADABLE, sqlite3.DatabaseError) as error:
                logger.warning("a stream in the journal is damaged, and gone: %s", _kind(error))
                unreadable.append(id)
                continue
            readable[id] = rows
            (streams if model == self._model else others).append(stream)
        self._recording = Recording(tuple(streams), tuple(others), tuple(unreadable))
        return readable


def _read_rows(db: sqlite3.Connection) -> tuple[dict[str, Rows | sqlite3.DatabaseError], str]:
    """Each stream's rows or why they cannot be read, and what is wrong with the file, if something is.

    Raises: sqlite3.DatabaseError where that is not known, or all of it is damaged.
    """
    [[check]] = db.execute("PRAGMA quick_check(1)").fetchall()
    damage = "" if check == b"ok" else "its pages do not fit together"
    found: dict[str, Rows | sqlite3.DatabaseError] = {}
    for [name] in db.execute("SELECT name FROM sqlite_schema WHERE type = 'table'").fetchall():
        id = name.decode("utf-8", "replace")
        try:
            found[id] = db.execute(f'SELECT position, body, crc FROM "{id}" ORDER BY position').fetchall()
        except sqlite3.DatabaseError as error:
            damage = damage or _damage(error)
            found[id] = error
    return found, damage


def _begin(db: sqlite3.Connection) -> None:
    if not db.in_transaction:
        db.execute("BEGIN")


def _damage(error: sqlite3.DatabaseError) -> str:
    """What is wrong with the file. Raises: the error, where the file may be as good as ever: of a full disk, say."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_NOTADB) & 0xFF  # of a wrong format the error is our own
    # The last of them is what a table is answered with that is none of ours.
    if code not in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR):
        raise error
    return _kind(error)


def _kind(error: Exception) -> str:
    """What may stand in a log: messages can name streams, and whoever knows a stream's id may read it."""
    return getattr(error, "sqlite_errorname", type(error).__name__)
