"""The steps of a tensor-parallel group: rank 0 tells the others what it computes, and each computes its part.

A step is sent as what differs from the one before: of a block table that was there no more than the blocks it has got
since. Tokens are drawn on rank 0 alone; what the others compute of logits is dropped. A step that raises, on whichever
rank, leaves the group out of step, for good: nobody knows how far the others have come.
Runs on the engine thread of rank 0 and the main thread of others; who they are and how they are reached, `ranks` knows.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from pydantic_core import from_json, to_json

from headrace.kernels.backend import Backend, PendingRead, StepBatch
from headrace.kernels.sampling import SamplingBatch
from headrace.kernels.step_times import StepTimes


class Followers(Protocol):
    """The other ranks, to rank 0."""

    def send(self, message: bytes) -> None:
        """Hand a message to each. Raises: RankError where one is gone."""

    def why_lost(self, timeout_s: float = 0.0) -> str | None:
        """What has become of one that is gone; None where all are there, still after `timeout_s`."""


class LockstepBackend:
    """A backend of which each rank has a part: `own` is rank 0's."""

    def __init__(self, own: Backend, followers: Followers) -> None:
        self.own = own
        self._followers = followers
        self._sent = _SentTables()
        self._failure: Exception | None = None

    @property
    def is_asynchronous(self) -> bool:
        return self.own.is_asynchronous

    def forward(self, batch: StepBatch) -> torch.Tensor:
        return self._together(self.own.forward, batch)

    def argmax(self, batch: StepBatch) -> torch.Tensor:
        return self._together(self.own.argmax, batch)

    def sample(self, logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
        return self.own.sample(logits, batch)

    def read(self, tensors: Sequence[torch.Tensor]) -> PendingRead:
        read = self.own.read(tensors)
        return _SharedRead(read, self._followers) if self.is_asynchronous else read

    def use_idle_time(self) -> bool:
        return self.own.use_idle_time()

    def profile(self) -> dict[str, float]:
        return self.own.profile()

    def recover(self) -> None:
        # A rank that goes takes its connections with it, which can be noticed before its end is.
        reason = self._followers.why_lost(timeout_s=0.0 if self._failure is None else 1.0)
        if reason is None and self._failure is not None:
            reason = f"the ranks are out of step: {self._failure}"
        if reason is not None:
            raise RuntimeError(reason)
        self.own.recover()

    def _together(self, compute: Callable[[StepBatch], torch.Tensor], batch: StepBatch) -> torch.Tensor:
        try:
            self._followers.send(self._sent.encode(batch))
            return compute(batch)
        except Exception as error:
            self._failure = error.with_traceback(None)
            raise


class _SharedRead:
    """A read of what all ranks have computed, which is nothing where one of them was lost meanwhile."""

    def __init__(self, read: PendingRead, followers: Followers) -> None:
        self._read = read
        self._followers = followers

    @property
    def times(self) -> StepTimes | None:
        return self._read.times

    def wait(self) -> list[torch.Tensor]:
        tensors = self._read.wait()
        if (reason := self._followers.why_lost()) is not None:
            raise RuntimeError(reason)
        return tensors


class _SentTables:
    """The block tables of the last step, as the other ranks have them."""

    def __init__(self) -> None:
        # By its id: the table, held so that no other has its id, its place in that step, how many blocks were sent.
        self._tables: dict[int, tuple[list[int], int, int]] = {}

    def encode(self, batch: StepBatch) -> bytes:
        tables: dict[int, tuple[list[int], int, int]] = {}
        places, added = [], []
        for place, table in enumerate(batch.block_tables):
            _, place_before, num_sent = self._tables.get(id(table), (table, -1, 0))
            places.append(place_before)
            added.append(table[num_sent:])
            tables[id(table)] = table, place, len(table)
        self._tables = tables
        step = batch.token_ids, batch.query_lens, batch.context_lens, batch.logit_rows, batch.adapters, places, added
        return to_json(step)


def follow(receive: Callable[[], bytes], backend: Backend) -> None:
    """Compute this rank's part of every step that rank 0 sends, until one raises or `receive` does."""
    tables: list[list[int]] = []
    while True:
        token_ids, query_lens, context_lens, logit_rows, adapters, places, added = from_json(receive())
        tables = [[] if place < 0 else tables[place] for place in places]
        for table, blocks in zip(tables, added, strict=True):
            table += blocks
        backend.forward(StepBatch(token_ids, query_lens, context_lens, tables, logit_rows, adapters))
