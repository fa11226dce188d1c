"""Which replica a request goes to, from what replicas tell and what they were sent."""

import json
from collections import Counter

import pytest

from headrace.server.replica_routing import (
    PIECE_BYTES,
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


def best(routing: ReplicaRouting, prompt: PromptKey, loads: dict[str, ReplicaLoad]) -> str:
    return routing.rank(Destination(prompt), loads)[0]


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


def test_a_request_goes_where_its_prefix_is_until_the_wait_there_costs_more_than_the_prefix_saves() -> None:
    routing = ReplicaRouting()
    loads = {"a": IDLE, "b": IDLE}
    first = chat_key("What is a headrace?")
    routing.send(first, "b")
    for number in (2, 3):  # news: what was sent is in it
        loads = {name: ReplicaLoad(number, 0.001, 1000, 100_000) for name in loads}
        assert best(routing, chat_key("And a tailrace?"), loads) == "b"
    saved_s = len(first.pieces) * PIECE_BYTES / 4 / 1000
    for number, wait_s, expected in ((4, 0.9 * saved_s, "b"), (5, 1.1 * saved_s, "a")):
        loads["b"] = ReplicaLoad(number, wait_s, 1000, 100_000)
        assert best(routing, chat_key("And a tailrace?"), loads) == expected


def test_requests_without_a_prefix_go_where_the_first_token_is_predicted_soonest() -> None:
    loads = {"slow": ReplicaLoad(1, 0.1, 10), "busy": ReplicaLoad(1, 2.0, 1000), "free": ReplicaLoad(1, 0.5, 1000)}
    assert list(ReplicaRouting().rank(Destination(PromptKey(400, ())), loads)) == ["free", "busy", "slow"]


def test_what_was_sent_since_a_replica_told_of_its_load_counts_and_afterwards_no_more() -> None:
    routing = ReplicaRouting()
    loads = {"a": ReplicaLoad(1, 0.0, 1000), "b": ReplicaLoad(1, 0.3, 1000)}
    chosen = Counter[str]()
    for _ in range(10):
        key = PromptKey(800, ())  # 0.2 s each
        name = best(routing, key, loads)
        routing.send(key, name)
        chosen[name] += 1
    assert chosen == {"a": 6, "b": 4} or chosen == {"a": 5, "b": 5}
    assert best(routing, PromptKey(0, ()), {"a": ReplicaLoad(2, 0.01, 1000), "b": ReplicaLoad(2, 0.3, 1000)}) == "a"


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
    routing.send(old, "a")
    for key in later:
        routing.send(key, "a")
    told = {"a": ReplicaLoad(2, 0.001, 1000, 1), "b": small}  # a little worse, but for what it holds
    for key, is_held in ((old, False), (later[1], True)):
        assert (best(routing, key, told) == "a") is is_held


def test_a_replica_that_is_gone_is_forgotten() -> None:
    routing = ReplicaRouting()
    key = chat_key("Hello")
    routing.send(key, "a")
    routing.keep_only(["b"])
    chosen = Counter(best(routing, key, {"a": IDLE, "b": IDLE}) for _ in range(200))
    assert min(chosen["a"], chosen["b"]) > 50


def test_what_names_a_replica_goes_to_it_while_it_is_there() -> None:
    busy = {"a": ReplicaLoad(1, 60.0, 10), "b": IDLE}
    named = Destination(PromptKey(0, ()), owners=("gone", "a"))
    assert list(ReplicaRouting().rank(named, busy)) == ["a"]
    assert list(ReplicaRouting().rank(named, {"b": IDLE})) == ["b"]


def test_requests_with_one_idempotency_key_meet_in_one_replica_whatever_its_load() -> None:
    names = ["a", "b", "c"]
    first = set()
    for n in range(30):
        keyed = Destination(PromptKey(n, ()), idempotency_key=f"key-{n}")
        orders = {
            tuple(ReplicaRouting().rank(keyed, {name: ReplicaLoad(1, wait_s, 10) for name in names}))
            for wait_s in (0.0, 1.0)
        }
        [order] = orders
        assert sorted(order) == names
        first.add(order[0])
    assert first == set(names)
