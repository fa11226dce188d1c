"""A journal without a server: streams to record, and what it has of them afterwards."""

import queue
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from headrace.scheduler.messages import FinishReason, SamplingParams, SequenceOutput
from headrace.server.generation import Recipe
from headrace.server.journal import Fsync, Journal, Recording
from headrace.server.journal_folder import Claim
from headrace.server.journal_rows import StreamRecord

PROMPT = tuple(range(1000, 1040))
RECIPE = Recipe(PROMPT, SamplingParams(seed=2**64 - 1), ("END",), True, "", b"\0salt", 600, 500, 400, 60)


def record_of(id: str, *, tenant: str = "", recipe: Recipe = RECIPE) -> StreamRecord:
    return StreamRecord(id, tenant, f"log-{id}", 1_700_000_000, False, 5.0, 1.0, 2.0, recipe)


def token(request_id: int, token_id: int, **fields: Any) -> SequenceOutput:
    return SequenceOutput(request_id, (token_id,), **fields)


def finished(request_id: int) -> SequenceOutput:
    return SequenceOutput(request_id, finish_reason=FinishReason.LENGTH)


class Recorder:
    """A journal whose methods return when they are done."""

    def __init__(self, path: Path, fsync: Fsync = "never", model: str = "model", claim: Claim | None = None) -> None:
        self.journal = Journal(path, fsync, model, claim)

    def do(self, ask: Callable[..., None], *args: Any) -> Any:
        """Call a method of the journal's; returns what its `then` was given."""
        done: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        ask(*args, lambda *given: done.put(given))
        given = done.get(timeout=30)
        return given[0] if given else None

    def accept(self, request_id: int, id: str, **fields: Any) -> None:
        self.do(self.journal.accept, request_id, record_of(id, **fields))

    def publish(self, *outputs: SequenceOutput) -> None:
        self.do(self.journal.record, outputs)

    def read(self) -> Recording:
        recording = self.do(self.journal.read)
        assert isinstance(recording, Recording)
        return recording


@contextmanager
def recorder(path: Path, fsync: Fsync = "never", model: str = "model") -> Iterator[Recorder]:
    recorder = Recorder(path, fsync, model)
    try:
        yield recorder
    finally:
        recorder.journal.close()
        assert not recorder.journal._thread.is_alive()


def crash(path: Path, into: Path) -> Path:
    """A copy of the files as they are now, which is what a process that is killed leaves."""
    into.mkdir()
    for file in path.parent.glob(f"{path.name}*"):
        (into / file.name).write_bytes(file.read_bytes())
    return into / path.name
