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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

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
    """What one replica was sent: its requests, and the pieces it may hold."""

    def __init__(self) -> None:
        self.load = ReplicaLoad()
        self.requests: dict[str, _Request] = {}
        self._num_untold_tokens = 0.0
        self._pieces: OrderedDict[bytes, None] = OrderedDict()

    def hear(self, load: ReplicaLoad) -> None:
        """Take what it has told of its load, once."""
        if load.number != self.load.number:
            self.load = load
            self._num_untold_tokens = 0.0
            # What has not arrived within a second went elsewhere, or nowhere.
            self.requests = {id: _Request(0.0, True) for id, request in self.requests.items() if request.is_sent}

    def num_uncached_tokens(self, prompt: PromptKey) -> float:
        num_held = 0
        for piece in prompt.pieces:
            if piece not in self._pieces:
                break
            num_held += 1
        return prompt.num_tokens - num_held * PIECE_TOKENS

    def cost_tokens(self, prompt: PromptKey) -> float:
        """What stands between a prompt and its first token, as tokens of prompts; its own count for each who waits
        while they are computed."""
        num_requests = len(self.requests)
        num_before = self._num_untold_tokens + _REQUEST_TOKENS * num_requests
        return num_before + (_NUM_LATER + num_requests) * self.num_uncached_tokens(prompt)

    def expect(self, request_id: str, prompt: PromptKey) -> None:
        self.requests[request_id] = request = _Request(self.num_uncached_tokens(prompt))
        self._num_untold_tokens += request.num_untold_tokens

    def drop(self, request_id: str) -> None:
        if (request := self.requests.pop(request_id, None)) is not None:
            self._num_untold_tokens -= request.num_untold_tokens

    def receive(self, request_id: str, prompt: PromptKey) -> None:
        if request_id not in self.requests:
            self.expect(request_id, prompt)
        self.requests[request_id].is_sent = True
        for piece in reversed(prompt.pieces):  # the first ones are of use the longest
            self._pieces[piece] = None
            self._pieces.move_to_end(piece)
        max_pieces = max(_MAX_PIECES, self.load.kv_cache_tokens // PIECE_TOKENS)
        while len(self._pieces) > max_pieces:
            self._pieces.popitem(last=False)


class ReplicaRouting:
    """Ranks replicas for requests. Replicas are known by their names, requests by ids."""

    def __init__(self) -> None:
        self._replicas: dict[str, _Replica] = {}

    def hear(self, loads: Mapping[str, ReplicaLoad]) -> None:
        """Take what replicas have told of their loads."""
        for name, load in loads.items():
            self._replicas.setdefault(name, _Replica()).hear(load)

    def route(self, request_id: str, destination: Destination, loads: Mapping[str, ReplicaLoad]) -> Sequence[str]:
        """The names in `loads`, best first. Whoever comes next counts the request to the first one, until `send`."""
        self.hear(loads)
        self._forget(request_id)
        names = self._rank(destination, loads)
        self._replicas[names[0]].expect(request_id, destination.prompt)
        return names

    def send(self, request_id: str, prompt: PromptKey, name: str) -> None:
        """Note which replica has taken a request, with this prompt."""
        replica = self._replicas.setdefault(name, _Replica())
        if request_id not in replica.requests:
            self._forget(request_id)
        replica.receive(request_id, prompt)

    def end(self, request_id: str, name: str) -> None:
        """Note that a request is over."""
        if (replica := self._replicas.get(name)) is not None:
            replica.drop(request_id)

    def keep_only(self, names: Iterable[str]) -> None:
        """Forget all other replicas."""
        kept = set(names)
        self._replicas = {name: replica for name, replica in self._replicas.items() if name in kept}

    def _forget(self, request_id: str) -> None:
        for replica in self._replicas.values():
            replica.drop(request_id)

    def _rank(self, destination: Destination, loads: Mapping[str, ReplicaLoad]) -> Sequence[str]:
        if owners := [name for name in destination.owners if name in loads]:
            return owners
        if (key := destination.idempotency_key) is not None:
            return sorted(loads, key=lambda name: blake2b(f"{key}\0{name}".encode()).digest())
        # One that has computed nothing yet is taken for as fast as the others.
        rates = [load.prefill_tokens_per_s for load in loads.values() if load.prefill_tokens_per_s > 0]
        usual_rate = sum(rates) / len(rates) if rates else 1.0

        def cost_s(name: str) -> tuple[float, float]:
            load = loads[name]
            rate = load.prefill_tokens_per_s or usual_rate
            # At random where they are equal.
            return load.wait_s + self._replicas[name].cost_tokens(destination.prompt) / rate, random.random()

        return sorted(loads, key=cost_s)
