"""Which replica a request goes to, from what replicas tell and what they were sent."""

import json
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from itertools import takewhile

import pytest

from headrace.server.replica_routing import (
    PIECE_BYTES,
    PIECE_TOKENS,
    Destination,
    PromptKey,
    ReplicaLoad,
    ReplicaRouting,
    prompt_key,
)

IDLE = ReplicaLoad(1, wait_s=0.0, prefill_tokens_per_s=1000, kv_cache_tokens=100_000)
CHAT = "/v1/chat/completions"
SYSTEM = {"role": "system", "content": "You mend mill wheels. " * 200}


def chat_key(*messages: str, path: str = CHAT, **fields: object) -> PromptKey:
    turns = [{"role": "user", "content": text} for text in messages]
    body = {**fields, "messages": [SYSTEM, *turns], "stream": True}
    return prompt_key(path, b"", json.dumps(body).encode())


def hear(routing: ReplicaRouting, loads: Mapping[str, ReplicaLoad]) -> None:
    for name, load in loads.items():
        routing.hear(name, load)


def among(loads: Mapping[str, ReplicaLoad]) -> ReplicaRouting:
    routing = ReplicaRouting()
    hear(routing, loads)
    return routing


def best(routing: ReplicaRouting, prompt: PromptKey, loads: Mapping[str, ReplicaLoad]) -> str:
    """Where a request would go that then does not come."""
    hear(routing, loads)
    name = next(routing.route("asked", Destination(prompt)))
    routing.end("asked", name)
    return name


def num_common(one: PromptKey, other: PromptKey) -> int:
    return sum(a == b for a, b in zip(one.pieces, other.pieces, strict=False))


def test_prompts_that_begin_alike_have_their_first_pieces_in_common() -> None:
    one, other = chat_key("What is a headrace?"), chat_key("And a tailrace? " * 100)
    num_shared = len(json.dumps(SYSTEM)) // PIECE_BYTES
    assert num_common(one, other) == num_shared > 5
    assert len(set(one.pieces)) == len(one.pieces)


def test_fields_that_stand_before_the_messages_do_not_matter_but_the_model_does() -> None:
    key = chat_key("Hello", model="mill", seed=1, user="a")
    assert key == chat_key("Hello", model="mill", seed=23, user="somebody")
    assert num_common(key, chat_key("Hello", model="other")) == 0
    assert num_common(key, chat_key("Hello", model="mill", path="/v1/completions")) == 0


def test_a_message_that_spells_a_field_begins_no_prompt() -> None:
    quoted = [{"role": "user", "content": '"messages": [] ' * 100}]
    one, other = (json.dumps({"seed": seed, "messages": quoted}).encode() for seed in (1, 2))
    assert prompt_key(CHAT, b"", one) == prompt_key(CHAT, b"", other)


def test_the_prompt_of_a_request_without_a_body_is_its_query() -> None:
    query = b"prompt=" + b"The+mill+wheel+" * 100
    assert len(prompt_key("/v1/stream", query, b"").pieces) == len(query) // PIECE_BYTES
    assert prompt_key("/v1/models", b"", b"") == PromptKey(0, ())


@pytest.mark.parametrize("body", [b"\xff\x00{", b'"prompt":', b"null", b'{"prompt": ' * 10_000])
def test_what_is_no_json_has_a_key_too(body: bytes) -> None:
    assert prompt_key(CHAT, b"", body).num_bytes <= len(body)


def busy(routing: ReplicaRouting, num_requests: Mapping[str, int]) -> dict[str, ReplicaLoad]:
    """Give replicas so many requests whose prompts are computed, and return what they tell."""
    loads = dict.fromkeys(num_requests, IDLE)
    hear(routing, loads)
    for name, num in num_requests.items():
        for n in range(num):
            routing.send(f"{name}-{n}", PromptKey(0, ()), name)
    return loads


def after_wait_s(load: ReplicaLoad, wait_s: float) -> ReplicaLoad:
    return replace(load, number=load.number + 1, wait_s=wait_s)


@pytest.mark.parametrize("num_each", [0, 8], ids=["idle", "eight requests each"])
def test_a_prefix_is_worth_a_wait_as_long_as_computing_it_is_for_all_who_would_wait_for_that(num_each: int) -> None:
    routing = ReplicaRouting()
    loads = busy(routing, {"a": num_each, "b": num_each})
    first = chat_key("What is a headrace?")
    routing.send("1", first, "b")
    routing.end("1", "b")
    assert best(routing, chat_key("And a tailrace?"), loads) == "b"
    worth_s = (4 + num_each) * len(first.pieces) * PIECE_TOKENS / 1000
    for wait_s, expected in ((0.9 * worth_s, "b"), (1.1 * worth_s, "a")):
        loads["b"] = after_wait_s(loads["b"], wait_s)
        assert best(routing, chat_key("And a tailrace?"), loads) == expected


def test_prefixes_are_kept_in_a_large_busy_fleet_although_somebody_is_free() -> None:
    routing = ReplicaRouting()
    names = [f"replica-{n}" for n in range(100)]
    loads = busy(routing, dict.fromkeys(names, 16) | {"free": 0})
    key = chat_key("What is a headrace?")
    routing.send("1", key, names[7])
    routing.end("1", names[7])
    loads = {name: after_wait_s(load, 0.3) for name, load in loads.items()} | {"free": loads["free"]}
    assert best(routing, chat_key("And a tailrace?"), loads) == names[7]
    assert best(routing, PromptKey(4000, ()), loads) == "free"


def test_a_prefix_that_everybody_has_spreads_as_its_replica_fills() -> None:
    routing = among({f"replica-{n}": IDLE for n in range(4)})
    chosen = Counter[str]()
    for n in range(400):
        key = chat_key(f"Question {n}")
        name = next(routing.route(str(n), Destination(key)))
        routing.send(str(n), key, name)
        chosen[name] += 1
        assert n >= 10 or len(chosen) == 1
    assert len(chosen) == 4
    assert max(chosen.values()) < 2 * min(chosen.values())


def test_requests_without_a_prefix_go_where_the_first_token_is_predicted_soonest() -> None:
    loads = {"slow": ReplicaLoad(1, 0.1, 10), "busy": ReplicaLoad(1, 2.0, 1000), "free": ReplicaLoad(1, 0.5, 1000)}
    assert list(among(loads).route("1", Destination(PromptKey(400, ())))) == ["free", "busy", "slow"]


def test_prompts_that_were_sent_since_a_replica_told_of_its_load_count_and_afterwards_no_more() -> None:
    routing = ReplicaRouting()
    loads = {"a": ReplicaLoad(1, 0.0, 1000), "b": ReplicaLoad(1, 1.0, 1000)}
    prompt = PromptKey(8000, ())  # two seconds
    best(routing, prompt, loads)
    routing.send("1", prompt, "a")
    assert best(routing, prompt, loads) == "b"
    assert best(routing, prompt, {"a": ReplicaLoad(2, 0.5, 1000), "b": ReplicaLoad(2, 3.0, 1000)}) == "a"


@pytest.mark.parametrize("has_arrived", [False, True], ids=["on their way", "arrived"])
def test_requests_that_are_not_over_count_each_and_are_shared(has_arrived: bool) -> None:
    prompt, loads = PromptKey(40, ()), {"a": IDLE, "b": IDLE}
    routing = among(loads)
    chosen = Counter[str]()
    for n in range(20):
        name = next(routing.route(str(n), Destination(prompt)))
        if has_arrived:
            routing.send(str(n), prompt, name)
        chosen[name] += 1
    assert chosen == {"a": 10, "b": 10}
    for n in range(20):
        routing.end(str(n), "a")
    routing.end("of a replica that is gone", "c")
    assert best(routing, prompt, loads) == "a"


def test_a_request_counts_where_it_has_gone_and_nowhere_else_and_no_longer_where_it_never_came() -> None:
    prompt, loads = PromptKey(40, ()), {"a": IDLE, "b": ReplicaLoad(1, 0.01, 1000)}
    routing = among(loads)
    assert next(routing.route("full", Destination(prompt))) == "a"
    routing.send("full", prompt, "b")  # "a" had no room
    assert best(routing, prompt, loads) == "a"
    routing.route("gave up", Destination(prompt))
    routing.end("full", "b")
    assert best(routing, prompt, loads) == "b"
    assert best(routing, prompt, {name: ReplicaLoad(2, load.wait_s, 1000) for name, load in loads.items()}) == "a"


def test_replicas_that_are_alike_share_what_comes() -> None:
    routing = ReplicaRouting()
    chosen = Counter(best(routing, PromptKey(0, ()), {"a": IDLE, "b": IDLE}) for _ in range(200))
    assert min(chosen["a"], chosen["b"]) > 50


def test_one_that_has_computed_nothing_is_taken_for_as_fast_as_the_others() -> None:
    loads = {"new": ReplicaLoad(), "busy": ReplicaLoad(1, 1.0, 500)}
    assert best(ReplicaRouting(), PromptKey(4000, ()), loads) == "new"


def test_what_a_replica_may_hold_is_bounded_by_its_cache_and_the_oldest_goes_first() -> None:
    routing = ReplicaRouting()
    small = ReplicaLoad(1, 0.0, 1000, kv_cache_tokens=1)  # but a prompt's pieces fit always
    loads = {"a": small, "b": small}
    old, *later = [prompt_key(CHAT, b"", b'{"prompt":' + bytes([65 + n]) * 64 * PIECE_BYTES) for n in range(3)]
    best(routing, old, loads)
    for key in (old, *later):
        routing.send("", key, "a")
    routing.end("", "a")
    told = {"a": ReplicaLoad(2, 0.001, 1000, 1), "b": small}  # a little worse, but for what it holds
    for key, is_held in ((old, False), (later[1], True)):
        assert (best(routing, key, told) == "a") is is_held


def test_a_replica_that_is_gone_is_forgotten() -> None:
    routing = among({"a": IDLE, "b": IDLE})
    key = chat_key("Hello")
    routing.send("1", key, "a")
    routing.keep_only(["b"])
    assert list(routing.route("2", Destination(key))) == ["b"]
    routing.send("3", key, "a")
    routing.end("1", "a")
    routing.end("2", "b")
    chosen = Counter(best(routing, key, {"a": IDLE, "b": IDLE}) for _ in range(200))
    assert min(chosen["a"], chosen["b"]) > 50


def test_what_names_a_replica_goes_to_it_while_it_is_there() -> None:
    busy = {"a": ReplicaLoad(1, 60.0, 10), "b": IDLE}
    named = Destination(PromptKey(0, ()), owners=("gone", "a"))
    assert list(among(busy).route("1", named)) == ["a"]
    assert list(among({"b": IDLE}).route("1", named)) == ["b"]


def test_requests_with_one_idempotency_key_meet_in_one_replica_whatever_its_load() -> None:
    names = ["a", "b", "c"]
    first = set()
    for n in range(30):
        keyed = Destination(PromptKey(n, ()), idempotency_key=f"key-{n}")
        orders = {
            tuple(among({name: ReplicaLoad(1, wait_s, 10) for name in some}).route("1", keyed))
            for wait_s, some in ((0.0, names), (1.0, names[::-1]))
        }
        [order] = orders
        assert sorted(order) == names
        first.add(order[0])
        without = among(dict.fromkeys(names, IDLE))
        without.keep_only(order[1:])
        assert tuple(without.route("1", keyed)) == order[1:]
    assert first == set(names)


class PlainRouting:
    """The rule as it reads, asked of one replica after the other."""

    def __init__(self) -> None:
        self.loads: dict[str, ReplicaLoad] = {}
        self.pieces: dict[str, list[bytes]] = {}  # those of least use first
        self.requests: dict[str, dict[str, tuple[float, bool]]] = {}  # (tokens it has not told of, has arrived)

    def hear(self, name: str, load: ReplicaLoad) -> None:
        requests = self.requests.setdefault(name, {})
        if name not in self.loads or load.number != self.loads[name].number:
            self.requests[name] = {id: (0.0, True) for id, (_, is_sent) in requests.items() if is_sent}
        self.loads[name] = load

    def keep_only(self, names: set[str]) -> None:
        for known in (self.loads, self.pieces, self.requests):
            for name in known.keys() - names:
                del known[name]

    def num_uncached_tokens(self, prompt: PromptKey, name: str) -> float:
        held = self.pieces.get(name, [])
        return prompt.num_tokens - PIECE_TOKENS * len(list(takewhile(held.__contains__, prompt.pieces)))

    def cost_s(self, prompt: PromptKey, name: str) -> float:
        rates = [load.prefill_tokens_per_s for load in self.loads.values() if load.prefill_tokens_per_s]
        rate = self.loads[name].prefill_tokens_per_s or (sum(rates) / len(rates) if rates else 1.0)
        requests = self.requests[name]
        num_before = sum(num_tokens for num_tokens, _ in requests.values()) + 64 * len(requests)
        num_tokens = num_before + (4 + len(requests)) * self.num_uncached_tokens(prompt, name)
        return self.loads[name].wait_s + num_tokens / rate

    def expect(self, request_id: str, prompt: PromptKey, name: str) -> None:
        self.end(request_id, *self.requests)
        self.requests[name][request_id] = self.num_uncached_tokens(prompt, name), False

    def send(self, request_id: str, prompt: PromptKey, name: str) -> None:
        if request_id not in self.requests[name]:
            self.expect(request_id, prompt, name)
        self.requests[name][request_id] = self.requests[name][request_id][0], True
        held = [piece for piece in self.pieces.get(name, []) if piece not in prompt.pieces]
        self.pieces[name] = [*held, *reversed(prompt.pieces)][-max(128, self.loads[name].kv_cache_tokens // 128) :]

    def end(self, request_id: str, *names: str) -> None:
        for name in names:
            self.requests.get(name, {}).pop(request_id, None)


@pytest.mark.parametrize("seed", range(20))
def test_a_decision_is_the_plain_rules_whatever_was_sent_and_told_and_whoever_came_and_went(seed: int) -> None:
    draws = random.Random(seed)
    routing, plain = ReplicaRouting(), PlainRouting()
    names: list[str] = []
    conversations = [[draws.randbytes(8) for _ in range(draws.choice((1, 5, 60)))] for _ in range(4)]
    asked: dict[str, str] = {}
    for n in range(300):
        if not names or draws.random() < 0.1:
            names.append(f"replica-{n}")
        if draws.random() < 0.05:
            names = draws.sample(names, draws.randint(1, len(names)))
            for known in (routing, plain):
                known.keep_only(set(names))
        for name in names:
            if name not in plain.loads or draws.random() < 0.1:
                load = ReplicaLoad(n + 1, draws.random(), draws.choice((0, 500, 1000)), draws.choice((0, 2**15)))
                if name not in plain.loads and draws.random() < 0.5:  # it has told of nothing yet
                    load = ReplicaLoad()
                for known in (routing, plain):
                    known.hear(name, load)
        shared = draws.choice(conversations)
        pieces = (*shared[: draws.randint(0, len(shared))], *map(draws.randbytes, [8] * draws.randint(0, 50)))
        prompt = PromptKey(PIECE_BYTES * len(pieces) + draws.randrange(PIECE_BYTES), pieces)
        id = draws.choice([*asked, str(n)])
        ranked = list(routing.route(id, Destination(prompt)))
        plain.end(id, *names)
        costs_s = [plain.cost_s(prompt, name) for name in ranked]
        assert set(ranked) == set(names)
        assert costs_s == pytest.approx(sorted(costs_s), rel=1e-9)
        plain.expect(id, prompt, ranked[0])
        if draws.random() < 0.9:
            asked[id] = name = ranked[0] if draws.random() < 0.9 else draws.choice(names)
            for known in (routing, plain):
                known.send(id, prompt, name)
        for id in [id for id in asked if draws.random() < 0.1]:
            name = asked.pop(id)
            for known in (routing, plain):
                known.end(id, name)
