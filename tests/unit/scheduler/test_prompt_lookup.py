"""Drafts are what a plain search finds; what is drawn at their places counts as far as it came true; few pay."""

import itertools
import math
import random
import time
from array import array
from collections.abc import Sequence as Seq

import pytest
from hypothesis import example, given, strategies as st

from headrace.scheduler.prompt_lookup import PromptLookup, num_worthwhile, verified


def searched(token_ids: Seq[int]) -> int | None:
    """Where what follows the last earlier place of the last tokens begins: of three of them, or else of two."""
    for size in (3, 2):
        for start in range(len(token_ids) - 1, size - 1, -1):
            if len(token_ids) > size and token_ids[start - size : start] == token_ids[-size:]:
                return start
    return None


@given(
    tokens=st.lists(st.integers(0, 3), max_size=300), first=st.integers(0, 300), strides=st.lists(st.integers(1, 80))
)
@example(tokens=[2**21 - 1] * 300, first=2, strides=[])
def test_a_place_is_that_which_a_search_finds_however_many_tokens_come_between_two_looks(
    tokens: list[int], first: int, strides: list[int]
) -> None:
    lookup = PromptLookup()
    for num_known in itertools.accumulate([*strides, 1, 1, 1], initial=first):
        known = array("q", tokens[:num_known])
        match = lookup.find(known)
        assert (None if match is None else match.start) == searched(list(known))


def test_a_draft_is_what_followed_and_goes_on_in_itself_at_the_end() -> None:
    token_ids = array("q", [5, 6, 7, 8, 9, 1, 5, 6, 7])
    lookup = PromptLookup()
    match = lookup.find(token_ids)
    assert match is not None
    assert lookup.draft(match, token_ids, 4) == (8, 9, 1, 5)
    assert lookup.draft(match, token_ids, 9) == (8, 9, 1, 5, 6, 7, 8, 9, 1)
    repeated = array("q", [3, 4, 4, 4, 4])
    match = PromptLookup().find(repeated)
    assert match is not None
    assert lookup.draft(match, repeated, 5) == (4, 4, 4, 4, 4)


def test_of_what_is_drawn_counts_what_stands_behind_drafts_that_came_true_and_no_place_without_numbers() -> None:
    assert verified((), (1,)) == (1,)
    assert verified((1, 2), (1, 2, 3)) == (1, 2, 3)
    assert verified((1, 2), (1, 7, 3)) == (1, 7)
    assert verified((1, 2), (7, 2, 3)) == (7,)
    assert verified((1, 2), (1, None, 3)) == (1,)
    assert verified((1, 2), (1, 2, None)) == (1, 2)
    assert verified((1, 2), (None, 2, 3)) == ()


def test_a_sequence_whose_drafts_fail_is_drafted_for_less_and_one_whose_drafts_come_true_for_more() -> None:
    token_ids = array("q", [1, 2, 3, 4, 1, 2, 3])
    num_drafted = {}
    for is_true in (False, True):
        lookup = PromptLookup()
        for _ in range(20):
            match = lookup.find(token_ids)
            assert match is not None
            # A token more costs a sixth of a step.
            num_tokens = num_worthwhile(8, match.chance, 1, 6.0, 1.0)
            lookup.draft(match, token_ids, num_tokens)
            lookup.learn(num_tokens, num_tokens if is_true else 0)
        num_drafted[is_true] = num_tokens
    assert num_drafted[True] == 8
    assert num_drafted[False] <= 1
    assert match is not None
    assert match.chance > 0.9


def test_of_what_would_not_pay_a_token_is_tried_now_and_then() -> None:
    token_ids = array("q", [1, 2, 3, 4, 1, 2, 3])
    lookup = PromptLookup()
    match = lookup.find(token_ids)
    assert match is not None
    for _ in range(40):
        lookup.draft(match, token_ids, 1)
        lookup.learn(1, 0)
    assert num_worthwhile(8, match.chance, 1, 4.0, 1.0) == 0
    drafts = [lookup.draft(match, token_ids, 0) for _ in range(48)]
    assert drafts.count((4,)) == 3
    assert drafts.count(()) == 45
    lookup.learn(1, 1)
    assert num_worthwhile(8, match.chance, 1, 8.0, 1.0) > 0


@given(
    most=st.integers(0, 15),
    chance=st.floats(0.01, 0.99),
    num_decoding=st.integers(1, 8),
    token_share=st.floats(0.001, 1),
)
def test_so_many_tokens_are_drafted_as_make_the_most_tokens_per_second(
    most: int, chance: float, num_decoding: int, token_share: float
) -> None:
    def rate(num: int) -> float:
        return (num_decoding + sum(chance**i for i in range(1, num + 1))) / (1 + num * token_share)

    best = max(range(most + 1), key=rate)
    found = num_worthwhile(most, chance, num_decoding, 1.0, token_share)
    assert math.isclose(rate(found), rate(best), rel_tol=1e-9)


def test_a_wide_batch_is_given_no_drafts_for_its_step_yields_enough() -> None:
    """A step of 4 ms and 1 ms per sequence."""
    assert [num_worthwhile(8, 0.7, num, 4.0 + num, 1.0) for num in (1, 2, 4, 16)] == [3, 2, 1, 0]


@pytest.mark.parametrize("num_tokens", [1000, 30_000])
def test_a_look_takes_no_longer_at_any_length(num_tokens: int) -> None:
    rng = random.Random(1)
    token_ids = array("q", [rng.randrange(50_000) for _ in range(num_tokens)])
    lookup = PromptLookup()
    lookup.find(token_ids)
    times_s = []
    for _ in range(50):
        token_ids.append(rng.randrange(50_000))
        began_s = time.perf_counter()
        lookup.find(token_ids)
        times_s.append(time.perf_counter() - began_s)
    assert min(times_s) < 100e-6
