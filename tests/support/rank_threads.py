"""Tensor-parallel ranks as threads of this process, which compute together over gloo as processes do."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from queue import SimpleQueue
from typing import Any, cast

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from headrace.kernels.backend import Backend
from headrace.kernels.tensor_parallel import Group
from headrace.scheduler.config import EngineConfig
from headrace.scheduler.lockstep import LockstepBackend, follow
from headrace.scheduler.model_loader import load_model


class RankThreads:
    """Ranks 1 to N - 1 of a group. `sent` has the sizes of the messages that they got."""

    rank = 0

    def __init__(self, size: int, timeout_s: float = 20) -> None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        self._inboxes: list[SimpleQueue[bytes | None]] = [SimpleQueue() for _ in range(size - 1)]
        self._pool = ThreadPoolExecutor(size)
        self._followers: list[Future[None]] = []
        self.sent: list[int] = []
        self.loss: str | None = None
        store = HashStore()

        def meet(rank: int) -> Group:
            ranks = dist.ProcessGroupGloo(store, rank, size, timedelta(seconds=timeout_s))
            return Group(cast(dist.ProcessGroup, ranks))

        self.groups = list(self._pool.map(meet, range(size)))

    def start(self, make: Callable[[Group], Backend]) -> None:
        """Have each make its backend, and follow."""

        def run(group: Group, inbox: "SimpleQueue[bytes | None]") -> None:
            backend = make(group)

            def receive() -> bytes:
                if (message := inbox.get()) is None:
                    raise EOFError
                return message

            follow(receive, backend)

        ranks = zip(self.groups[1:], self._inboxes, strict=True)
        self._followers = [self._pool.submit(run, *rank) for rank in ranks]

    def meet(self, device: torch.device) -> Group:
        return self.groups[0]

    def least(self, num_bytes: int) -> int:
        return num_bytes

    def wait_loaded(self) -> None: ...

    def send(self, message: bytes) -> None:
        self.sent.append(len(message))
        for inbox in self._inboxes:
            inbox.put(message)

    def watch(self, on_loss: Callable[[], None]) -> None: ...

    def why_lost(self, timeout_s: float = 0.0) -> str | None:
        return self.loss

    def close(self) -> None:
        for inbox in self._inboxes:
            inbox.put(None)
        for follower in self._followers:
            assert isinstance(follower.exception(30), EOFError), follower.exception()
        self._pool.shutdown()


@contextmanager
def in_lockstep(size: int, make: Callable[[Group], Backend]) -> Iterator[tuple[LockstepBackend, RankThreads]]:
    """A backend of which each rank makes its part."""
    ranks = RankThreads(size)
    try:
        ranks.start(make)
        yield LockstepBackend(make(ranks.groups[0]), ranks), ranks
    finally:
        ranks.close()


class _Member:
    """The group, to a rank that loads its part of a model."""

    def __init__(self, group: Group) -> None:
        self.rank, self._group = group.rank, group

    def meet(self, device: torch.device) -> Group:
        return self._group

    def least(self, num_bytes: int) -> int:
        return num_bytes


def loading_ranks(config: EngineConfig) -> Any:
    """In place of `ranks.Ranks`: threads that load the model, each its part."""
    ranks = RankThreads(config.tensor_parallel_size)
    ranks.start(lambda group: load_model(config, lambda line: None, _Member(group)).backend)
    return ranks
