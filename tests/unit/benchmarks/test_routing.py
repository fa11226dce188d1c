"""Routing policies, without a simulation."""

import random
from collections import Counter

import pytest

from headrace.benchmarks.routing import POLICIES, Gauges, Policy, PrefixTable
from headrace.server.replica_routing import BYTES_PER_TOKEN, PIECE_TOKENS, PromptKey, ReplicaLoad


def router(policy: str, gauges: Gauges, seed: int = 0) -> Policy:
    return POLICIES[policy](gauges, random.Random(seed))


def load_of(num_requests: float, number: int = 1) -> ReplicaLoad:
    """Each makes a first token come a second later."""
    return ReplicaLoad(number, num_requests, 100.0, 2**17)


def gauges_of(*num_requests: int, counts_sent: bool = True) -> Gauges:
    """Replicas with so many requests."""
    gauges = Gauges(len(num_requests), counts_sent=counts_sent)
    for replica, num in enumerate(num_requests):
        gauges.hear(replica, num, load_of(num))
    return gauges


def key(num_tokens: int, *pieces: int) -> PromptKey:
    return PromptKey(num_tokens * BYTES_PER_TOKEN, tuple(piece.to_bytes(8) for piece in pieces))


def prompt(number: int, num_pieces: int = 4) -> PromptKey:
    return key(num_pieces * PIECE_TOKENS + 10, *(1000 * number + i for i in range(num_pieces)))


def test_round_robin_gives_each_replica_its_turn() -> None:
    policy = router("round robin", gauges_of(9, 0, 5))
    assert Counter(policy.choose(i, prompt(i)) for i in range(9)) == {0: 3, 1: 3, 2: 3}


@pytest.mark.parametrize("policy", ["least queue", "predicted TTFT", "headrace"])
def test_the_least_busy_replica_is_taken(policy: str) -> None:
    assert router(policy, gauges_of(4, 2, 3)).choose(0, prompt(0)) == 1


@pytest.mark.parametrize("policy", ["least queue", "predicted TTFT"])
def test_a_herd_goes_where_old_gauges_say_unless_what_was_sent_counts(policy: str) -> None:
    def chosen(counts_sent: bool) -> Counter[int]:
        chooser = router(policy, gauges_of(1, 0, 1, 1, counts_sent=counts_sent))
        return Counter(chooser.choose(i, prompt(i)) for i in range(41))

    assert chosen(False) == {1: 41}
    assert max(chosen(True).values()) <= 12


def test_what_is_heard_takes_the_place_of_what_was_counted() -> None:
    gauges = gauges_of(0, 0)
    policy = router("least queue", gauges)
    for i in range(10):
        policy.choose(i, prompt(i))
    gauges.hear(0, 0, load_of(0))
    assert policy.choose(99, prompt(99)) == 0


def test_equals_are_chosen_among_at_random() -> None:
    chosen = Counter(router("least queue", gauges_of(0, 0, 0, 0), seed).choose(0, prompt(0)) for seed in range(200))
    assert min(chosen[replica] for replica in range(4)) > 20


@pytest.mark.parametrize("policy", ["prefix-aware", "headrace"])
def test_a_conversation_comes_back_to_its_replica_as_long_as_that_is_not_far_busier(policy: str) -> None:
    gauges = gauges_of(*[0] * 16)
    chooser = router(policy, gauges)
    replica = chooser.choose(0, prompt(7, num_pieces=8))
    gauges.hear(replica, 2.0, load_of(2, number=2))
    assert chooser.choose(1, prompt(7, num_pieces=10)) == replica
    gauges.hear(replica, 100, load_of(100, number=3))
    assert chooser.choose(2, prompt(7, num_pieces=10)) != replica


def test_a_short_prefix_is_not_worth_a_way() -> None:
    gauges = gauges_of(*[0] * 64)
    chooser = router("prefix-aware", gauges)
    first = chooser.choose(0, key(1000, 1, 2))
    chosen = {chooser.choose(i, key(1000, 1, 2, 100 + i)) for i in range(20)}
    assert len(chosen | {first}) > 10


@pytest.mark.parametrize("policy", ["prefix-aware", "headrace"])
def test_a_conversation_is_found_although_many_others_begin_as_it_does(policy: str) -> None:
    gauges = gauges_of(*[0] * 32)
    chooser = router(policy, gauges)
    replica = chooser.choose(0, key(600, 1, 70, 71, 72))
    gauges.hear(replica, 99.0, load_of(99, number=2))
    for i in range(1, 40):
        chooser.note_over(i, chooser.choose(i, key(600, 1, 100 + i)))
    for other in range(32):
        gauges.hear(other, 0.0, load_of(0, number=3))
    assert chooser.choose(99, key(700, 1, 70, 71, 72, 73)) == replica


@pytest.mark.parametrize("policy", ["prefix-aware", "headrace"])
def test_a_conversation_that_was_there_before_is_known(policy: str) -> None:
    chooser = router(policy, gauges_of(*[0] * 32))
    chooser.note_cached(17, prompt(7))
    assert chooser.choose(0, prompt(7)) == 17


def test_the_table_keeps_what_was_sent_last_and_the_beginnings_of_prompts_longest() -> None:
    table = PrefixTable(3)
    table.note_sent(0, (b"1", b"2"))
    table.note_sent(0, (b"3", b"4"))
    assert table.find((b"1", b"2")) == [(0,)]
    assert table.find((b"3", b"4")) == [(0,), (0,)]
