"""Which replica a router sends a request to: what it knows of its replicas, and the policies that choose by that.

A router knows a replica by its gauges, as they were when it last asked for them, and may add what it has sent there
since; it knows a prompt by its key. One of the policies is the production rule itself, the others are what it is
compared with. Pure: no clock and no sockets, randomness by a seed, equal choices at random. One router's own; routers
know nothing of each other.
Sources: the harm of old gauges and what two random choices do about it, Mitzenmacher (How Useful Is Old Information,
2000); which replica holds which prefix, kept by the router and never asked for, as in SGLang's and Preble's routers.
"""

import random
from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import numpy as np

from headrace.server.replica_routing import PIECE_TOKENS, Destination, PromptKey, ReplicaLoad, ReplicaRouting

# Of those that were sent a piece, the newest: who begins with an instruction that all know need not find them all.
_MAX_HOLDERS = 8
# A prefix is worth going to a replica for if it is so much of the prompt, and while the replica has no more requests
# beyond those of the least busy of two others.
_WORTHWHILE_SHARE = 0.5
_MOST_AHEAD = 8.0


class Gauges:
    """Of replicas [N], as each was when it was last asked: how many requests wait or run, and its load."""

    def __init__(self, num_replicas: int, *, counts_sent: bool) -> None:
        """Where it `counts_sent`, what was sent since a replica was asked counts as there."""
        self.num_requests = np.zeros(num_replicas)
        self.wait_s = np.zeros(num_replicas)
        self.token_s = np.zeros(num_replicas)
        self.loads = {str(replica): ReplicaLoad() for replica in range(num_replicas)}
        self.news: dict[str, ReplicaLoad] = {}  # of `loads`, for who takes them from here
        self._counts_sent = counts_sent

    def hear(self, replica: int, num_requests: float, load: ReplicaLoad) -> None:
        """Take what a replica tells."""
        self.num_requests[replica] = num_requests
        self.wait_s[replica] = load.wait_s
        self.token_s[replica] = 1 / load.prefill_tokens_per_s if load.prefill_tokens_per_s > 0 else 0.0
        self.loads[str(replica)] = self.news[str(replica)] = load

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
        self._holders: OrderedDict[bytes, tuple[int, ...]] = OrderedDict()

    def find(self, pieces: tuple[bytes, ...]) -> list[tuple[int, ...]]:
        """Who was sent each of the first pieces, as far as anybody was."""
        found: list[tuple[int, ...]] = []
        for piece in pieces:
            holders = self._holders.get(piece)
            if holders is None:
                break
            found.append(holders)
        return found

    def note_sent(self, replica: int, pieces: tuple[bytes, ...]) -> None:
        for piece in reversed(pieces):  # the first ones are of use the longest
            holders = self._holders.get(piece, ())
            if replica not in holders:
                self._holders[piece] = (*holders, replica)[-_MAX_HOLDERS:]
            self._holders.move_to_end(piece)
        while len(self._holders) > self._max_pieces:
            self._holders.popitem(last=False)


class Policy:
    """Chooses a replica for each request, known by its number, and notes that it goes there."""

    def __init__(self, gauges: Gauges, draws: random.Random) -> None:
        self._gauges, self._draws = gauges, draws

    def choose(self, number: int, prompt: PromptKey) -> int:
        raise NotImplementedError

    def note_cached(self, replica: int, prompt: PromptKey) -> None:
        """Note that a replica was sent a prompt before."""

    def note_over(self, number: int, replica: int) -> None:
        """Note that a request is over."""


class RoundRobin(Policy):
    """One after the other."""

    def __init__(self, gauges: Gauges, draws: random.Random) -> None:
        super().__init__(gauges, draws)
        self._next = draws.randrange(len(gauges.loads))

    def choose(self, number: int, prompt: PromptKey) -> int:
        self._next = (self._next + 1) % len(self._gauges.loads)
        return self._next


class FewestRequests(Policy):
    """The one with the fewest requests, as `least` finds it: of all, or of two at random."""

    def __init__(self, least: Callable[[np.ndarray, random.Random], int], gauges: Gauges, draws: random.Random) -> None:
        super().__init__(gauges, draws)
        self._least = least

    def choose(self, number: int, prompt: PromptKey) -> int:
        replica = self._least(self._gauges.num_requests, self._draws)
        self._gauges.note_sent(replica, prompt.num_tokens)
        return replica


class PrefixAware(Policy):
    """Of those that were sent most of the prompt, the one with the fewest requests; two choices where that is little of
    it, or they have too many."""

    def __init__(self, gauges: Gauges, draws: random.Random) -> None:
        super().__init__(gauges, draws)
        self._table = PrefixTable(sum(load.kv_cache_tokens for load in gauges.loads.values()) // PIECE_TOKENS)

    def choose(self, number: int, prompt: PromptKey) -> int:
        num_requests = self._gauges.num_requests
        replica = _better_of_two(num_requests, self._draws)
        found = self._table.find(prompt.pieces)
        num_tokens = prompt.num_tokens
        num_known = len(found) * PIECE_TOKENS
        if num_known >= _WORTHWHILE_SHARE * num_tokens:
            holder = min(found[-1], key=num_requests.__getitem__)
            if num_requests[holder] <= num_requests[replica] + _MOST_AHEAD:
                replica = holder
                num_tokens -= num_known
        self._gauges.note_sent(replica, num_tokens)
        self._table.note_sent(replica, prompt.pieces)
        return replica

    def note_cached(self, replica: int, prompt: PromptKey) -> None:
        self._table.note_sent(replica, prompt.pieces)


class PredictedTtft(Policy):
    """The one that would have the first token soonest, by its own prediction, which knows nothing of prefixes."""

    def choose(self, number: int, prompt: PromptKey) -> int:
        gauges = self._gauges
        replica = _least(gauges.wait_s + prompt.num_tokens * gauges.token_s, self._draws)
        gauges.note_sent(replica, prompt.num_tokens)
        return replica


class Headrace(Policy):
    """The rule of `headrace deploy`, which counts for itself what it has sent."""

    def __init__(self, gauges: Gauges, draws: random.Random) -> None:
        super().__init__(gauges, draws)
        self._routing = ReplicaRouting()
        self._hear()

    def choose(self, number: int, prompt: PromptKey) -> int:
        self._hear()
        name = next(self._routing.route(str(number), Destination(prompt)))
        self._routing.send(str(number), prompt, name)
        return int(name)

    def note_cached(self, replica: int, prompt: PromptKey) -> None:
        self._routing.send("", prompt, str(replica))
        self._routing.end("", str(replica))

    def note_over(self, number: int, replica: int) -> None:
        self._routing.end(str(number), str(replica))

    def _hear(self) -> None:
        while self._gauges.news:
            self._routing.hear(*self._gauges.news.popitem())


def _least(values: np.ndarray, draws: random.Random) -> int:
    best = np.flatnonzero(values == values.min())
    return int(best[draws.randrange(len(best))])


def _better_of_two(values: np.ndarray, draws: random.Random) -> int:
    first, second = draws.randrange(len(values)), draws.randrange(len(values))
    return first if values[first] <= values[second] else second


POLICIES: dict[str, Callable[[Gauges, random.Random], Policy]] = {
    "round robin": RoundRobin,
    "least queue": partial(FewestRequests, _least),
    "two choices": partial(FewestRequests, _better_of_two),
    "prefix-aware": PrefixAware,
    "predicted TTFT": PredictedTtft,
    "headrace": Headrace,
}
