"""Streams that other replicas make, read out of their journals while these are written, and taken over where the writer
has died.

Lives on the event loop; files are read on worker threads. A stream is followed while it has readers, and a little
longer: a task looks for more of it, now and then and for all streams of a file at once. Whoever gets hold of a file
takes over all that it can go on with, as after a restart, and readers that follow read on. The rest is left in the file
for another, until it would not be kept any longer. It knows nothing of how ids name replicas.
"""

import logging
import os
import sqlite3
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import anyio
import anyio.to_thread

from headrace.scheduler.messages import FinishReason
from headrace.server.errors import (
    ApiError,
    BadRequestError,
    GoneError,
    JournalBusyError,
    ShutdownError,
    UnavailableError,
)
from headrace.server.generator import Generator
from headrace.server.journal import Fsync, Journal, JournalError
from headrace.server.journal_folder import Claim, JournalFolder, mark_followed, read_rows
from headrace.server.journal_rows import NUM_HEAD_ROWS, UNREADABLE, RecordedOutput, RecordedStream, RowFormat
from headrace.server.restore import Shelf, begun, replay, restore_streams, shelf_of, tenants_of
from headrace.server.stream_registry import KeptStream

logger = logging.getLogger(__name__)

_POLL_S = 0.05
# How long a stream is followed without a reader, so that one who asks for its state again and again costs little.
_KEPT_S = 10.0
_NUM_THREADS = 2

_T = TypeVar("_T")


class _Found(NamedTuple):
    """A stream in a file, and whose model it is of."""

    path: Path
    recorded: RecordedStream
    model: str


@dataclass(slots=True, eq=False)
class _Followed:
    """A stream in another's file, of which the first `num_rows` have been read. `mark` tells its writer of readers."""

    stream: KeptStream
    path: Path
    num_rows: int
    asked_s: float
    mark: int | None = None

    @property
    def has_readers(self) -> bool:
        return self.stream.generation.log.num_subscribers > 0


class SharedJournals:
    """The journals in a folder, but for this server's own. `model` is what its streams are of."""

    def __init__(
        self, folder: JournalFolder, fsync: Fsync, model: str, generator: Generator, shelves: Sequence[Shelf]
    ) -> None:
        self._folder = folder
        self._fsync: Fsync = fsync
        self._model = model
        self._generator = generator
        self._client = generator.client
        self._shelves = shelves
        self._format = RowFormat()
        self._followed: dict[str, _Followed] = {}
        self._taken: list[Journal] = []  # over, and not let go of yet
        # What was found in files, and is not for this server: by its id, when it would not be kept any longer.
        self._left: dict[Path, dict[str, float]] = {}
        self._lock = anyio.Lock()  # over all that follows or takes over
        self._limiter = anyio.CapacityLimiter(_NUM_THREADS)
        self._has_work = anyio.Event()
        self._unreadable: set[Path] = set()

    async def bring(self, name: str, id: str) -> bool:
        """Have a stream in its registry that a process of the replica `name` has made, with all that has come of it:
        who was at that replica a moment ago may have seen it all. False where there is none.

        Raises: UnavailableError where it can neither be read nor taken over for now, or is to be taken over, and this
        server is about to end.
        """
        # Not to be left half-way where a client leaves: others wait for what is taken over.
        with anyio.CancelScope(shield=True):
            async with self._lock:
                try:
                    await self._bring(name, id)
                except (sqlite3.Error, OSError) as error:
                    logger.warning("another replica's journal cannot be read for now: %s", type(error).__name__)
                    raise JournalBusyError from None
        return id in shelf_of(id, self._shelves).registry

    async def _bring(self, name: str, id: str) -> None:
        """Raises: as `bring`, and sqlite3.Error or OSError for what cannot be read."""
        if (followed := self._followed.get(id)) is not None:
            await self._look_into(followed.path, {id: followed})
            if followed.stream.generation.is_interrupted:
                raise JournalBusyError
            return
        if id in shelf_of(id, self._shelves).registry:
            return
        found = await self._on_worker(partial(self._find, name, id))
        if found is None or found.model != self._model:
            return
        self._client.check_accepting()
        if await self._follow(id, found):
            await self._take_if_free(found.path, [id])
            if id not in shelf_of(id, self._shelves).registry:
                raise JournalBusyError

    def holder_of(self, id: str) -> str:
        """The replica that makes a stream which is followed."""
        return self._folder.holder_of(self._followed[id].path)

    async def take_over_own(self) -> None:
        """Take over what earlier processes of this replica have left in further files."""
        await self._take_over_free(partial(self._folder.files_of, self._folder.name))

    async def take_over_left(self) -> None:
        """Take over what any replica has left that runs no more, where no other will ever bear its name."""
        try:
            await self._take_over_free(self._folder.files)
        except OSError as error:
            self._warn_once(self._folder.root, "the replicas' journals cannot be looked for for now: %s", error)
        else:
            self._unreadable.discard(self._folder.root)

    async def run(self) -> None:
        """Follow what is followed, until cancelled."""
        while True:
            await self._has_work.wait()
            await anyio.sleep(_POLL_S)
            with anyio.CancelScope(shield=True):
                async with self._lock:
                    await self._look()

    async def sweep(self) -> None:
        """Let go of files that were taken over, once their streams are forgotten; those that hold no more go too."""
        now = self._client.clock()
        for journal in list(self._taken):
            left = self._left[journal.path]
            for id in [id for id, end_s in left.items() if end_s <= now]:
                journal.erase(id)
                del left[id]
            if not journal.holds_more_than(left.keys()):
                self._taken.remove(journal)
                self._client.journals.remove(journal)
                await self._on_worker(journal.discard)
        held = {journal.path for journal in self._taken}
        is_over = {path: min(left.values(), default=now) <= now for path, left in self._left.items()}
        self._left = {path: left for path, left in self._left.items() if path in held or not is_over[path]}

    def interrupt(self) -> None:
        """Tell readers of what is followed that this server ends, and the stream does not."""
        for id in list(self._followed):
            self._let_go(id, ShutdownError(is_resumable=True))

    def _find(self, name: str, id: str) -> _Found | None:
        """Runs on a worker thread. Raises: sqlite3.OperationalError, OSError for what cannot be read now."""
        try:
            if (found := self._folder.find(name, id)) is None:
                return None
            path, rows = found
            recorded, model = self._format.read_stream(id, rows)
        except UNREADABLE as error:
            logger.warning("a stream in another replica's journal cannot be read: %s", type(error).__name__)
            return None
        return _Found(path, recorded, model)

    async def _follow(self, id: str, found: _Found) -> bool:
        """False where a stream cannot be made here: of another tenant, or of what this version has not."""
        record, outputs = found.recorded.record, found.recorded.outputs
        if record.tenant not in tenants_of(self._generator):
            return False
        try:
            stream = begun(self._generator, record, self._shelves)
        except BadRequestError as error:
            logger.warning("a stream in another replica's journal asks for what is not here: %s", error.param)
            return False
        await replay(stream, outputs)
        shelf_of(id, self._shelves).registry.follow(stream)
        self._followed[id] = _Followed(stream, found.path, NUM_HEAD_ROWS + len(outputs), self._client.clock())
        self._has_work.set()
        return True

    async def _look(self) -> None:
        """Feed every stream that is followed what is new of it."""
        now = self._client.clock()
        for id, followed in list(self._followed.items()):
            if followed.has_readers:
                followed.asked_s = now
                continue
            _unmark(followed)
            if now - followed.asked_s >= _KEPT_S:
                self._let_go(id)
        for path in {followed.path for followed in self._followed.values()}:
            streams = {id: each for id, each in self._followed.items() if each.path == path}
            try:
                await self._look_into(path, streams)
            except (sqlite3.Error, OSError) as error:
                self._warn_once(path, "another replica's journal cannot be read for now: %s", error)
            else:
                self._unreadable.discard(path)
        if not self._followed:
            self._has_work = anyio.Event()

    async def _look_into(self, path: Path, streams: Mapping[str, _Followed]) -> None:
        """Feed these streams of a file what is new of each. Raises: sqlite3.Error, OSError."""
        if await self._take_if_free(path, streams):
            return
        unmarked = [id for id, each in streams.items() if each.has_readers and each.mark is None]
        positions = {id: each.num_rows for id, each in streams.items()}
        marks, found = await self._on_worker(partial(self._read, path, unmarked, positions))
        for id, mark in marks.items():
            streams[id].mark = mark
        for id, followed in streams.items():
            if id not in self._followed:  # since this server ends
                _unmark(followed)
            elif (outputs := found.get(id)) is None:
                self._let_go(id, GoneError("the replica that makes this stream keeps it no longer"))
            else:
                followed.num_rows += len(outputs)
                await replay(followed.stream, outputs)

    def _read(
        self, path: Path, unmarked: Sequence[str], positions: Mapping[str, int]
    ) -> tuple[dict[str, int], dict[str, Sequence[RecordedOutput]]]:
        """Marks of streams that have none, and what is new of each that can be read; runs on a worker thread."""
        found: dict[str, Sequence[RecordedOutput]] = {}
        for id, rows in read_rows(path, positions).items():
            with suppress(*UNREADABLE):
                found[id] = self._format.read_outputs(id, rows, positions[id])
        return mark_followed(path, unmarked), found

    async def _take_over_free(self, files: Callable[[], list[Path]]) -> None:
        with anyio.CancelScope(shield=True):
            async with self._lock:
                for path in await self._on_worker(files):
                    if path not in self._left:
                        await self._take_if_free(path)

    async def _take_if_free(self, path: Path, ids: Collection[str] = ()) -> bool:
        """Take over a file whose writer has died, unless these streams of it are known not to be for this server. False
        where the file is not taken over, as where this server is about to end itself."""
        if ids and self._left.get(path, {}).keys() >= set(ids):
            return False
        lock = path.with_suffix(".lock")
        try:
            self._client.check_accepting()
            claim = await self._on_worker(partial(self._folder.claim, path))
        except UnavailableError:
            return False
        except OSError as error:
            self._warn_once(lock, "another replica's journal cannot be locked: %s", error)
            return False
        self._unreadable.discard(lock)
        if claim is None:
            return False
        await self._take_over(claim)
        return True

    async def _take_over(self, claim: Claim) -> None:
        followed = {id: each for id, each in self._followed.items() if each.path == claim.path}
        try:
            journal = await self._on_worker(lambda: Journal(claim.path, self._fsync, self._model, claim))
        except JournalError as error:
            logger.error("%s", error)
        else:
            if self._client.is_draining:
                await self._on_worker(journal.close)
                return
            for each in followed.values():
                _unmark(each)
            self._client.journals.append(journal)
            fed = {id: (each.stream, each.num_rows - NUM_HEAD_ROWS) for id, each in followed.items()}
            left = await restore_streams(journal, self._generator, self._shelves, fed, leaves_others=True)
            self._left[claim.path] = left
            self._taken.append(journal)
        for id in followed:
            if id not in self._followed or self._client.is_draining:
                continue
            if not shelf_of(id, self._shelves).registry.is_followed(id):
                del self._followed[id]  # it is this server's now
            elif id not in self._left.get(claim.path, ()):  # else another may go on with it
                self._let_go(id, JournalBusyError())

    def _let_go(self, id: str, error: ApiError | None = None) -> None:
        """Follow a stream no longer; `error` is what its readers are told."""
        followed = self._followed.pop(id)
        _unmark(followed)
        shelf_of(id, self._shelves).registry.unfollow(id)
        if error is not None:
            followed.stream.generation.end(FinishReason.ERROR, self._client.clock(), error)

    def _warn_once(self, path: Path, message: str, error: Exception) -> None:
        """Once until it can be had again: it is tried again and again."""
        if path not in self._unreadable:
            logger.warning(message, type(error).__name__)
        self._unreadable.add(path)

    async def _on_worker(self, work: Callable[[], _T]) -> _T:
        return await anyio.to_thread.run_sync(work, limiter=self._limiter)


def open_own_journal(folder: JournalFolder, fsync: Fsync, model: str) -> Journal:
    """This process's own in the folder. Raises: JournalError."""
    try:
        claim = folder.claim_own()
    except OSError as error:
        raise JournalError(f"journal_dir: {error}") from None
    return Journal(claim.path, fsync, model, claim)


def _unmark(followed: _Followed) -> None:
    if followed.mark is not None:
        os.close(followed.mark)
        followed.mark = None
