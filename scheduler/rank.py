"""A rank other than 0 of a tensor-parallel group: `python -m headrace.scheduler.rank DESCRIPTOR`.

Started by `ranks`, with the descriptor of its connection with rank 0. It loads its part of the model on the main
thread, and computes it in the steps that come; another thread reads what comes, and ends the process where nothing
will any more: no signal but SIGKILL ends it sooner, since the server goes on for a while after one.
"""

import gc
import logging
import os
import signal
import sys
import threading
from multiprocessing.connection import Connection
from queue import SimpleQueue

import torch
from pydantic_core import from_json, to_json

from headrace.kernels.tensor_parallel import Group
from headrace.scheduler.errors import HeadraceError
from headrace.scheduler.lockstep import follow
from headrace.scheduler.model_loader import load_model
from headrace.scheduler.ranks import GREETING, share_threads

logger = logging.getLogger(__name__)

# What is said where nothing more is to be told.
_DONE = 0


class _Rank:
    """The group, to this rank."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._inbox: SimpleQueue[bytes] = SimpleQueue()
        threading.Thread(target=self._read, name="headrace-inbox", daemon=True).start()
        self.rank, self.config, self._meeting_place = GREETING.validate_json(self.receive())

    def meet(self, device: torch.device) -> Group:
        self.say(_DONE)
        share_threads(self.config, device)
        size, timeout_s = self.config.tensor_parallel_size, self.config.collective_timeout_s
        return Group.open(self._meeting_place, self.rank, size, device, timeout_s)

    def least(self, num_bytes: int) -> int:
        self.say(num_bytes)
        least: int = from_json(self.receive())
        return least

    def say(self, message: int | str) -> None:
        """Tell rank 0 a number that it waits for, or why this rank ends."""
        self._connection.send_bytes(to_json(message))

    def receive(self) -> bytes:
        return self._inbox.get()

    def _read(self) -> None:
        try:
            while True:
                self._inbox.put(self._connection.recv_bytes())
        except (EOFError, OSError):  # nothing more comes
            os._exit(0)


def main(descriptor: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    rank = _Rank(Connection(descriptor))
    try:
        model = load_model(rank.config, lambda line: None, rank)
        gc.freeze()  # a collection here would hold up every rank
        rank.say(_DONE)
        follow(rank.receive, model.backend)
    except Exception as error:
        if not isinstance(error, HeadraceError):
            logger.exception("rank %d ends", rank.rank)
        rank.say(str(error) or repr(error))
    os._exit(1)  # where others are gone, taking leave of them would wait for them


if __name__ == "__main__":
    main(int(sys.argv[1]))
