"""Which of several replicas a request goes to: the one that has made what it names, or that answers all with the same
idempotency key; else where its first token is predicted soonest, with what a replica's prefix cache saves.

Pure: knows neither Ray nor sockets nor clocks. Requests that share the beginning of their messages share its bytes, so
a prompt is known by hashes of its first bytes, piece by piece, each over all before it, and a replica by the pieces
that it was sent, as many as its KV cache may hold, least recently sent out first. A wrong guess costs time alone. What
a replica tells of its load is a second old; what it was sent since then is added.
Source: Preble (Srivatsa et al., 2024), which weighs hits in the prefix cache against load.
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
# What English has; only how prompts compare with each other matters.
_BYTES_PER_TOKEN = 4
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


class _Replica:
    """What one replica was sent: the pieces it may hold, and how many tokens since it last told of its load."""

    def __init__(self) -> None:
        self.load = ReplicaLoad()
        self.num_sent_tokens = 0.0
        self._pieces: OrderedDict[bytes, None] = OrderedDict()

    def hear(self, load: ReplicaLoad) -> None:
        """Take what it has told of its load, once."""
        if load.number != self.load.number:
            self.load = load
            self.num_sent_tokens = 0.0

    def num_uncached_tokens(self, key: PromptKey) -> float:
        num_held = next((n for n, piece in enumerate(key.pieces) if piece not in self._pieces), len(key.pieces))
        return (key.num_bytes - num_held * PIECE_BYTES) / _BYTES_PER_TOKEN

    def send(self, key: PromptKey) -> None:
        self.num_sent_tokens += self.num_uncached_tokens(key)
        for piece in reversed(key.pieces):  # the first ones are of use the longest
            self._pieces[piece] = None
            self._pieces.move_to_end(piece)
        max_pieces = max(_MAX_PIECES, self.load.kv_cache_tokens * _BYTES_PER_TOKEN // PIECE_BYTES)
        while len(self._pieces) > max_pieces:
            self._pieces.popitem(last=False)


class ReplicaRouting:
    """Ranks replicas for requests. Replicas are known by their names."""

    def __init__(self) -> None:
        self._replicas: dict[str, _Replica] = {}

    def rank(self, destination: Destination, loads: Mapping[str, ReplicaLoad]) -> Sequence[str]:
        """The names in `loads`, best first, at random where they are equal."""
        if owners := [name for name in destination.owners if name in loads]:
            return owners
        if (key := destination.idempotency_key) is not None:
            return sorted(loads, key=lambda name: blake2b(f"{key}\0{name}".encode()).digest())
        for name, load in loads.items():
            self._replicas.setdefault(name, _Replica()).hear(load)
        # One that has computed nothing yet is taken for as fast as the others.
        rates = [load.prefill_tokens_per_s for load in loads.values() if load.prefill_tokens_per_s > 0]
        usual_rate = sum(rates) / len(rates) if rates else 1.0

        def predicted_ttft_s(name: str) -> float:
            replica = self._replicas[name]
            num_tokens = replica.num_sent_tokens + replica.num_uncached_tokens(destination.prompt)
            return replica.load.wait_s + num_tokens / (replica.load.prefill_tokens_per_s or usual_rate)

        return sorted(random.sample(list(loads), len(loads)), key=predicted_ttft_s)

    def send(self, prompt: PromptKey, name: str) -> None:
        """Note that a request with this prompt has gone to a replica."""
        self._replicas.setdefault(name, _Replica()).send(prompt)

    def keep_only(self, names: Iterable[str]) -> None:
        """Forget all other replicas."""
        kept = set(names)
        self._replicas = {name: replica for name, replica in self._replicas.items() if name in kept}
