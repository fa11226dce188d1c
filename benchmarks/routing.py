"""Which replica a router sends a request to: what it knows of its replicas, and the policies that choose by that.

A router knows a replica by its gauges, as they were when it last asked for them, and may add what it has sent there
since. It knows a prompt by hashes of its pieces, each over all before it. Pure: no clock and no sockets, randomness by
a seed, equal choices at random. One router's own; routers know nothing of each other.
Sources: the harm of old gauges and what two random choices do about it, Mitzenmacher (How Useful Is Old Information,
2000); which replica holds which prefix, kept by the router and never asked for, as in SGLang's and Preble's routers.
"""

import random
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np

PIECE_TOKENS = 64
# Of those that were sent a piece, the newest: who begins with an instruction that all know need not find them all.
_MAX_HOLDERS = 8
# A prefix is worth going to a replica for if it is so much of the prompt, and while the replica has no more requests
# beyond those of the least busy of two others.
_WORTHWHILE_SHARE = 0.5
_MOST_AHEAD = 8.0


class Prompt(NamedTuple):
    """A prompt as routers know it."""

    num_tokens: int
    pieces: tuple[int, ...]


class Gauges:
    """Of replicas [N], as each was when it was last asked: how many requests wait or run, and when a request would have
    its first token, in seconds without a prompt and for each token of one."""

    def __init__(self, num_replicas: int, *, counts_sent: bool) -> None:
        """Where it `counts_sent`, what was sent since a replica was asked counts as there."""
        self.num_requests = np.zeros(num_replicas)
        self.wait_s = np.zeros(num_replicas)
        self.token_s = np.zeros(num_replicas)
        self._counts_sent = counts_sent

    def hear(self, replica: int, num_requests: float, wait_s: float, token_s: float) -> None:
        """Take what a replica tells."""
        self.num_requests[replica] = num_requests
        self.wait_s[replica] = wait_s
        self.token_s[replica] = token_s

    def note_sent(self, replica: int, num_tokens: float) -> None:
        """Count a request of so many tokens that are to be computed."""
        if self._counts_sent:
            self.num_requests[replica] += 1
            self.wait_s[replica] += num_tokens * self.token_s[replica]


class PrefixTable:
    """Which replicas were sent which pieces, and so all before each. Of more than `max_pieces` those go that were sent
    least lately."""

    def __init__(self, max_pieces: int) -> None:
        self._max_pieces = max_pieces
        self._holders: OrderedDict[int, tuple[int, ...]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._holders)

    def find(self, pieces: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Who was sent each of the first pieces, as far as anybody was."""
        found: list[tuple[int, ...]] = []
        for piece in pieces:
            holders = self._holders.get(piece)
            if holders is None:
                break
            found.append(holders)
        return found

    def note_sent(self, replica: int, pieces: tuple[int, ...]) -> None:
        for piece in reversed(pieces):  # the first ones are of use the longest
            holders = self._holders.get(piece, ())
            if replica not in holders:
                self._holders[piece] = (*holders, replica)[-_MAX_HOLDERS:]
            self._holders.move_to_end(piece)
        while len(self._holders) > self._max_pieces:
            self._holders.popitem(last=False)


class Policy(Protocol):
    """Chooses a replica, and notes that the request goes there."""

    def choose(self, prompt: Prompt) -> int: ...


class RoundRobin:
    """One after the other."""

    def __init__(self, gauges: Gauges, table: PrefixTable, draws: random.Random) -> None:
        self._num_replicas = len(gauges.num_requests)
        self._next = draws.randrange(self._num_replicas)

    def choose(self, prompt: Prompt) -> int:
        self._next = (self._next + 1) % self._num_replicas
        return self._next


class FewestRequests:
    """The one with the fewest requests, as `least` finds it: of all, or of two at random."""

    def __init__(
        self,
        least: Callable[[np.ndarray, random.Random], int],
        gauges: Gauges,
        table: PrefixTable,
        draws: random.Random,
    ) -> None:
        self._least, self._gauges, self._draws = least, gauges, draws

    def choose(self, prompt: Prompt) -> int:
        replica = self._least(self._gauges.num_requests, self._draws)
        self._gauges.note_sent(replica, prompt.num_tokens)
        return replica


class PrefixAware:
    """Of those that were sent most of the prompt, the one with the fewest requests; two choices where that is little of
    it, or they have too many."""

    def __init__(self, gauges: Gauges, table: PrefixTable, draws: random.Random) -> None:
        self._gauges, self._table, self._draws = gauges, table, draws

    def choose(self, prompt: Prompt) -> int:
        num_requests = self._gauges.num_requests
        replica = _better_of_two(num_requests, self._draws)
        found = self._table.find(prompt.pieces)
        num_known = len(found) * PIECE_TOKENS
        num_tokens = prompt.num_tokens
        if num_known >= _WORTHWHILE_SHARE * prompt.num_tokens:
            holder = min(found[-1], key=num_requests.__getitem__)
            if num_requests[holder] <= num_requests[replica] + _MOST_AHEAD:
                replica = holder
                num_tokens -= num_known
        self._gauges.note_sent(replica, num_tokens)
        self._table.note_sent(replica, prompt.pieces)
        return replica


class PredictedTtft:
    """The one that would have the first token soonest, by its own prediction, which knows nothing of prefixes."""

    def __init__(self, gauges: Gauges, table: PrefixTable, draws: random.Random) -> None:
        self._gauges, self._draws = gauges, draws

    def choose(self, prompt: Prompt) -> int:
        gauges = self._gauges
        replica = _least(gauges.wait_s + prompt.num_tokens * gauges.token_s, self._draws)
        gauges.note_sent(replica, prompt.num_tokens)
        return replica


class PrefixTtft:
    """The same, where what a replica was sent of the prompt need not be computed there."""

    def __init__(self, gauges: Gauges, table: PrefixTable, draws: random.Random) -> None:
        self._gauges, self._table, self._draws = gauges, table, draws

    def choose(self, prompt: Prompt) -> int:
        gauges = self._gauges
        ttft_s = gauges.wait_s + prompt.num_tokens * gauges.token_s
        # Who is among the newest holders of a later piece has those before it, among whose newest it need not be.
        num_known = {
            replica: num_pieces * PIECE_TOKENS
            for num_pieces, holders in enumerate(self._table.find(prompt.pieces), start=1)
            for replica in holders
        }
        for replica, num_tokens in num_known.items():
            ttft_s[replica] -= num_tokens * gauges.token_s[replica]
        replica = _least(ttft_s, self._draws)
        gauges.note_sent(replica, prompt.num_tokens - num_known.get(replica, 0))
        self._table.note_sent(replica, prompt.pieces)
        return replica


def _least(values: np.ndarray, draws: random.Random) -> int:
    best = np.flatnonzero(values == values.min())
    return int(best[draws.randrange(len(best))])


def _better_of_two(values: np.ndarray, draws: random.Random) -> int:
    first, second = draws.randrange(len(values)), draws.randrange(len(values))
    return first if values[first] <= values[second] else second


POLICIES: dict[str, Callable[[Gauges, PrefixTable, random.Random], Policy]] = {
    "round robin": RoundRobin,
    "least queue": partial(FewestRequests, _least),
    "two choices": partial(FewestRequests, _better_of_two),
    "prefix-aware": PrefixAware,
    "predicted TTFT": PredictedTtft,
    "prefix and TTFT": PrefixTtft,
}
