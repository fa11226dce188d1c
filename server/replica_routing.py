"""Which of several replicas a request goes to: the one that has made what it names, or that answers all with the same
idempotency key; else where the first token is predicted soonest, its own and those of the others there.

Pure: knows neither Ray nor sockets nor clocks. Requests that share the beginning of their messages share its bytes, so
a prompt is known by hashes of its first bytes, piece by piece, each over all before it, and a replica by the pieces
that it was sent, as many as its KV cache may hold, least recently sent out first. A wrong guess costs time alone. What
a replica tells of its load is a second old: prompts that it was sent since then are added, and what each request that
is not over costs the others. What no prefix cache has is waited for by all who are there, and weighs so much more: for
its own first token alone a request would go to whoever is free, a large fleet always has one, and prefixes were lost.
Source: Preble (Srivatsa et al., 2024), which weighs hits in the prefix cache against load; the weight is our own.
"""

import random
import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain

import numpy as np
import numpy.typing as npt

# Some eight KV blocks of English.
PIECE_BYTES = 512
_MAX_PIECES = 128
# What a request that is not over costs those who come, as tokens of a prompt: its answer shares every step with them.
_REQUEST_TOKENS = 64
# Who waits while a prompt is computed: all who are there, and so many who are not yet, itself among them.
_NUM_LATER = 4
# What English has; only how prompts compare with each other matters.
BYTES_PER_TOKEN = 4
PIECE_TOKENS = PIECE_BYTES // BYTES_PER_TOKEN
# Where what a model reads begins in a body: before it clients write fields that change with every request. A quote in
# a string has a backslash before it.
_PROMPT_KEY = re.compile(rb'"(?:system|instructions|messages|prompt|input)"\s*:')
_MODEL = re.compile(rb'"model"\s*:\s*"([^"\\]*)"')
_MAX_HEAD_BYTES = 64 * 2**10


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """What a replica tells of itself, the `number`th time. A request without a prompt would have its first token after
    `wait_s`, and prompts get `prefill_tokens_per_s` then; 0 where no step has been seen."""

    number: int = 0
    wait_s: float = 0.0
    prefill_tokens_per_s: float = 0.0
    kv_cache_tokens: int = 0


@dataclass(frozen=True, slots=True)
class PromptKey:
    """A prompt as routing knows it: its length in bytes, and the hashes of its first pieces."""

    num_bytes: int
    pieces: tuple[bytes, ...]

    @property
    def num_tokens(self) -> float:
        return self.num_bytes / BYTES_PER_TOKEN


@dataclass(frozen=True, slots=True)
class Destination:
    """What says where a request should go: its prompt, the replicas that its ids name, and its idempotency key."""

    prompt: PromptKey
    owners: tuple[str, ...] = ()
    idempotency_key: str | None = None


def prompt_key(path: str, query: bytes, body: bytes) -> PromptKey:
    """The key of what a request asks a model to read; without a body that is in the query."""
    head = body[:_MAX_HEAD_BYTES]
    start = 0 if (key := _PROMPT_KEY.search(head)) is None else key.end()
    model = b"" if (named := _MODEL.search(head)) is None else named[1]
    prompt = memoryview(body)[start:] if body else memoryview(query)
    digest = blake2b(b"%b\0%b\0" % (path.encode(), model), digest_size=8)
    pieces = []
    for number in range(min(_MAX_PIECES, len(prompt) // PIECE_BYTES)):
        digest.update(prompt[number * PIECE_BYTES : (number + 1) * PIECE_BYTES])
        pieces.append(digest.digest())
    return PromptKey(len(prompt), tuple(pieces))


@dataclass(slots=True)
class _Request:
    """A request that is not over: the tokens of its prompt that its replica has not told of yet, and whether it has
    arrived there."""

    num_untold_tokens: float
    is_sent: bool = False


class _Replica:
    """What one replica was sent: its requests, and the pieces it may hold. Others know it by its slot, or that bit."""

    def __init__(self, slot: int) -> None:
        self.slot, self.bit = slot, 1 << slot
        self.load = ReplicaLoad()
        self.requests: dict[str, _Request] = {}
        self.pieces: OrderedDict[bytes, None] = OrderedDict()


class ReplicaRouting:
    """Ranks replicas for requests. Replicas are known by their names, requests by ids.

    What a decision looks at is kept as things happen: numbers by slot, which numpy looks at together, and the slots of
    those who may hold a piece, as the bits of an int."""

    def __init__(self) -> None:
        self._replicas: dict[str, _Replica] = {}
        self._replica_of: dict[str, _Replica] = {}  # by a request that is not over
        self._holders: dict[bytes, int] = {}
        # By slot. One that is free has no name and an infinite wait.
        self._names: list[str] = []
        self._wait_s, self._tokens_per_s = np.zeros(0), np.zeros(0)
        self._num_requests, self._untold_tokens = np.zeros(0), np.zeros(0)
        self._hashes = np.zeros(0, np.uint64)

    def hear(self, name: str, load: ReplicaLoad) -> None:
        """Take what a replica has told of its load, once. Those are ranked that have."""
        replica = self._replicas.get(name) or self._add(name)
        if load.number == replica.load.number:
            return
        replica.load = load
        self._wait_s[replica.slot] = load.wait_s
        self._tokens_per_s[replica.slot] = load.prefill_tokens_per_s
        self._untold_tokens[replica.slot] = 0.0
        for request_id, request in list(replica.requests.items()):
            request.num_untold_tokens = 0.0
            if not request.is_sent:  # what has not arrived within a second went elsewhere, or nowhere
                self._forget(request_id)

    def keep_only(self, names: Iterable[str]) -> None:
        """Forget all other replicas."""
        for name in self._replicas.keys() - set(names):
            replica = self._replicas.pop(name)
            for request_id in list(replica.requests):
                self._forget(request_id)
            for piece in replica.pieces:
                self._let_go(replica, piece)
            self._names[replica.slot] = ""
            self._wait_s[replica.slot] = np.inf
            self._tokens_per_s[replica.slot] = 0.0

    def route(self, request_id: str, destination: Destination) -> Iterator[str]:
        """The names of replicas, best first. Whoever comes next counts the request to the first one, until `send`."""
        self._forget(request_id)
        names = self._rank(destination)
        best = next(names)
        self._expect(request_id, destination.prompt, self._replicas[best])
        return chain((best,), names)

    def send(self, request_id: str, prompt: PromptKey, name: str) -> None:
        """Note which replica has taken a request, with this prompt."""
        if (replica := self._replicas.get(name)) is None:  # gone meanwhile
            return
        if self._replica_of.get(request_id) is not replica:
            self._forget(request_id)
            self._expect(request_id, prompt, replica)
        replica.requests[request_id].is_sent = True
        for piece in reversed(prompt.pieces):  # the first ones are of use the longest
            if piece not in replica.pieces:
                # One int for all the pieces that it alone holds.
                others = self._holders.get(piece)
                self._holders[piece] = replica.bit if others is None else others | replica.bit
            replica.pieces[piece] = None
            replica.pieces.move_to_end(piece)
        max_pieces = max(_MAX_PIECES, replica.load.kv_cache_tokens // PIECE_TOKENS)
        while len(replica.pieces) > max_pieces:
            self._let_go(replica, replica.pieces.popitem(last=False)[0])

    def end(self, request_id: str, name: str) -> None:
        """Note that a request is over."""
        if (replica := self._replicas.get(name)) is not None and request_id in replica.requests:
            self._forget(request_id)

    def _add(self, name: str) -> _Replica:
        slot = self._names.index("") if "" in self._names else len(self._names)
        if slot == len(self._names):
            self._names.append("")
            for numbers in (self._wait_s, self._tokens_per_s, self._num_requests, self._untold_tokens, self._hashes):
                numbers.resize(slot + 1, refcheck=False)
        self._names[slot] = name
        self._wait_s[slot] = 0.0
        self._hashes[slot] = _hash(name)
        self._replicas[name] = replica = _Replica(slot)
        return replica

    def _let_go(self, replica: _Replica, piece: bytes) -> None:
        if others := self._holders[piece] ^ replica.bit:
            self._holders[piece] = others
        else:
            del self._holders[piece]

    def _expect(self, request_id: str, prompt: PromptKey, replica: _Replica) -> None:
        num_held = next((n for n, piece in enumerate(prompt.pieces) if piece not in replica.pieces), len(prompt.pieces))
        num_tokens = prompt.num_tokens - num_held * PIECE_TOKENS
        replica.requests[request_id] = _Request(num_tokens)
        self._replica_of[request_id] = replica
        self._num_requests[replica.slot] += 1
        self._untold_tokens[replica.slot] += num_tokens

    def _forget(self, request_id: str) -> None:
        if (replica := self._replica_of.pop(request_id, None)) is not None:
            self._num_requests[replica.slot] -= 1
            self._untold_tokens[replica.slot] -= replica.requests.pop(request_id).num_untold_tokens

    def _rank(self, destination: Destination) -> Iterator[str]:
        if owners := [name for name in destination.owners if name in self._replicas]:
            return iter(owners)
        if (key := destination.idempotency_key) is not None:
            order = _mixed(self._hashes ^ _hash(key))
            return self._ascending(np.where(np.isinf(self._wait_s), np.inf, order))
        return self._ascending(self._cost_s(destination.prompt))

    def _ascending(self, values: np.ndarray) -> Iterator[str]:
        """Those with the least values first, at random where they are equal."""
        least = np.flatnonzero(values == values.min())
        first = int(least[random.randrange(len(least))])
        yield self._names[first]
        # Hardly anybody asks who comes next.
        slots = np.random.default_rng(random.getrandbits(64)).permutation(len(values))
        for slot in slots[np.argsort(values[slots], kind="stable")].tolist():
            if slot != first and (name := self._names[slot]):
                yield name

    def _cost_s(self, prompt: PromptKey) -> np.ndarray:
        """By slot, what stands between a prompt and its first token, its own count for each who waits while they are
        computed."""
        num_later = _NUM_LATER + self._num_requests
        num_tokens = self._untold_tokens + _REQUEST_TOKENS * self._num_requests
        num_tokens += num_later * (prompt.num_tokens - PIECE_TOKENS * self._num_held(prompt))
        # One that has computed nothing yet is taken for as fast as the others.
        rates = self._tokens_per_s
        num_rates = np.count_nonzero(rates)
        usual_rate = rates.sum() / num_rates if num_rates else 1.0
        if num_rates < len(rates):
            rates = np.where(rates > 0, rates, usual_rate)
        return self._wait_s + num_tokens / rates

    def _num_held(self, prompt: PromptKey) -> np.ndarray:
        """How many of a prompt's first pieces each slot may hold."""
        num_bytes = -(-len(self._names) // 8)
        counts: dict[int, int] = {}  # of pieces by their holders, which are often the same ones
        for piece in prompt.pieces:
            if not (holders := self._holders.get(piece)):  # who holds a piece holds those before it
                break
            counts[holders] = counts.get(holders, 0) + 1
        bits = np.frombuffer(b"".join(holders.to_bytes(num_bytes, "little") for holders in counts), np.uint8)
        by_slot = np.unpackbits(bits.reshape(-1, num_bytes), axis=1, count=len(self._names), bitorder="little")
        return np.array(list(counts.values())) @ by_slot


def _hash(text: str) -> np.uint64:
    return np.uint64(int.from_bytes(blake2b(text.encode(), digest_size=8).digest()))


def _mixed(numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """64 bits of which each depends on all that were there: the last step of splitmix64 (Steele et al., 2014)."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))
