"""The processes of a tensor-parallel group: rank 0 is the server's, and starts, watches and ends the others.

Each has a connection with rank 0, a pair of sockets that nobody else can reach. Settings and steps go out on it; what
comes back is that it is there, how much memory it has, that its part is loaded, or why it ends. A process ends with
whoever is at the other side. What the ranks compute together goes through torch.distributed. This is rank 0's side: it
runs on the engine thread, and on one that reads what the others say; theirs is `rank`.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from queue import SimpleQueue
from typing import Protocol

import torch
from pydantic import TypeAdapter
from pydantic_core import from_json, to_json

from headrace.kernels.tensor_parallel import Group
from headrace.scheduler.config import EngineConfig
from headrace.scheduler.errors import RankError

# For a process whose connection is lost, or that was told to end.
_FAREWELL_S = 5.0
# For the end of a rank to be known, where something that follows from it is.
_NEWS_S = 1.0
# What each is told first: its rank, and where the group meets.
GREETING = TypeAdapter(tuple[int, EngineConfig, Path])


class Peers(Protocol):
    """The group, to one of its ranks that loads its part of the model."""

    @property
    def rank(self) -> int: ...

    def meet(self, device: torch.device) -> Group:
        """Wait until all are there. Raises: RankError, RuntimeError."""

    def least(self, num_bytes: int) -> int:
        """What every rank has of something that this one has so much of. Raises: RankError."""


class Ranks:
    """Ranks 1 to N - 1, to rank 0. They end with this object, if they were not closed before."""

    rank = 0

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._processes = _Processes()
        self.close = weakref.finalize(self, self._processes.end)

    def meet(self, device: torch.device) -> Group:
        """Start them, and wait until all are there."""
        config = self._config
        share_threads(config, device)
        place = self._processes.start(config)
        self._processes.hear()
        group = Group.open(place, 0, config.tensor_parallel_size, device, config.collective_timeout_s)
        self._processes.group = group
        return group

    def least(self, num_bytes: int) -> int:
        num_bytes = min(num_bytes, *self._processes.hear())
        self.send(to_json(num_bytes))
        return num_bytes

    def wait_loaded(self) -> None:
        """Wait until each has loaded its part. Raises: RankError."""
        self._processes.hear()
        self._processes.remove_folder()

    def send(self, message: bytes) -> None:
        """Hand a message to each. Raises: RankError where one is gone."""
        try:
            for connection in self._processes.connections:
                connection.send_bytes(message)
        except OSError as error:
            raise RankError(self.why_lost(_NEWS_S) or "a rank is gone") from error

    def watch(self, on_loss: Callable[[], None]) -> None:
        """Have `on_loss` called, from any thread, when one is gone."""
        self._processes.on_loss = on_loss
        if self._processes.is_loss_known.is_set():
            on_loss()

    def why_lost(self, timeout_s: float = 0.0) -> str | None:
        """What has become of one that is gone; None where all are there, still after `timeout_s`."""
        self._processes.is_loss_known.wait(timeout_s)
        return self._processes.loss


class _Processes:
    """The other ranks' processes, and what they have said."""

    def __init__(self) -> None:
        self.connections: list[Connection] = []
        self.group: Group | None = None
        self.loss: str | None = None
        self.is_loss_known = threading.Event()
        self.on_loss: Callable[[], None] = lambda: None
        self._processes: list[subprocess.Popen[bytes]] = []
        self._listener = threading.Thread(target=self._listen, name="headrace-ranks", daemon=True)
        self._said: list[SimpleQueue[int | None]] = []  # by each; None: one of them is lost
        self._folder: str | None = None
        self._is_closing = False

    def start(self, config: EngineConfig) -> Path:
        """Returns where to meet them."""
        self._folder = tempfile.mkdtemp(prefix="headrace-")
        meeting_place = Path(self._folder) / "group"
        for rank in range(1, config.tensor_parallel_size):
            ours, theirs = Pipe()
            with theirs:
                # In a group of its own: what a terminal sends to the server is the server's to act on.
                process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "headrace.scheduler.rank", str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    process_group=0,
                )
            self._processes.append(process)
            self.connections.append(ours)
            self._said.append(SimpleQueue())
            with suppress(OSError):  # it has ended already, which is seen where it is listened to
                ours.send_bytes(GREETING.dump_json((rank, config, meeting_place)))
        self._listener.start()
        return meeting_place

    def remove_folder(self) -> None:
        """Forget where they have met."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def hear(self) -> list[int]:
        """The next thing that each says. Raises: RankError."""
        numbers = []
        for said in self._said:
            if (number := said.get()) is None:
                raise RankError(self.loss)
            numbers.append(number)
        return numbers

    def end(self) -> None:
        """End them, and let go of the group."""
        self._is_closing = True
        for connection in self.connections:
            # Not by a message, which a rank that stands still may not take.
            with suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as ours:
                ours.shutdown(socket.SHUT_WR)
        for process in self._processes:
            try:
                process.wait(_FAREWELL_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._listener.ident is not None:
            self._listener.join()
        for connection in self.connections:
            connection.close()
        self.remove_folder()
        if self.group is not None and self.loss is None:
            self.group.close()

    def _listen(self) -> None:
        """Take down what they say until all have ended."""
        ranks = {connection: rank for rank, connection in enumerate(self.connections, start=1)}
        while ranks:
            for connection in wait(list(ranks)):
                assert isinstance(connection, Connection)
                try:
                    said: int | str = from_json(connection.recv_bytes())
                except (EOFError, OSError):
                    said = ""
                rank = ranks[connection]
                if isinstance(said, int):
                    self._said[rank - 1].put(said)
                    continue
                del ranks[connection]
                if not self._is_closing:
                    self._lose(rank, said)

    def _lose(self, rank: int, reason: str) -> None:
        """One of them has ended, for that reason if it said one: what waits for it shall not."""
        if not reason:
            try:
                code: object = self._processes[rank - 1].wait(_FAREWELL_S)
            except subprocess.TimeoutExpired:
                code = "unknown"
            reason = f"it has ended (exit code {code})"
        if self.loss is None:
            self.loss = f"rank {rank}: {reason}"
        self.is_loss_known.set()
        self.on_loss()
        for said in self._said:
            said.put(None)
        if self.group is not None:
            self.group.abort()


def share_threads(config: EngineConfig, device: torch.device) -> None:
    """Give this rank its share of the cores, where the ranks compute on them."""
    if device.type == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // config.tensor_parallel_size))
