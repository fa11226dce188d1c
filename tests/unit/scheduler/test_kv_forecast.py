"""The forecast of the cache against sequences that are played to their ends."""

import math
import random

import numpy as np
import pytest
from hypothesis import given, strategies as st

from headrace.scheduler.kv_forecast import OutputLengths, projected_peak

PRESUMED = [64, 128, 256, 512] * 4


def played_peak(sequences: list[tuple[int, int]]) -> int:
    """The most tokens held at once, if each of (held, remaining) adds one a step and leaves after its last."""
    peak, running = 0, list(sequences)
    while running:
        peak = max(peak, sum(held for held, _ in running))
        running = [(held + 1, remaining - 1) for held, remaining in running if remaining > 0]
    return peak


@given(sequences=st.lists(st.tuples(st.integers(0, 50), st.integers(0, 30)), max_size=12))
def test_the_peak_is_that_of_sequences_played_to_their_ends(sequences: list[tuple[int, int]]) -> None:
    held, remaining = [s[0] for s in sequences], [s[1] for s in sequences]
    assert projected_peak(held, remaining) == played_peak(sequences)


def test_nobody_holds_nothing() -> None:
    assert projected_peak([], []) == 0


def played_lengths(answers: list[int]) -> list[int]:
    """Those that count: the last 512, and what is presumed until there are as many real ones as presumed."""
    return (PRESUMED + answers if len(answers) <= len(PRESUMED) else answers)[-512:]


@given(
    answers=st.lists(st.integers(1, 40), max_size=40),
    num_tokens=st.lists(st.integers(0, 600), min_size=1, max_size=10),
)
def test_an_answer_is_expected_to_go_on_as_those_did_that_were_longer(
    answers: list[int], num_tokens: list[int]
) -> None:
    lengths = OutputLengths()
    for answer in answers:
        lengths.observe(answer)
    known = played_lengths(answers)
    for num, expected in zip(num_tokens, lengths.expected_remaining(np.array(num_tokens)), strict=True):
        longer = [length for length in known if length > num]
        if longer:
            assert math.isclose(expected, sum(longer) / len(longer) - num, rel_tol=1e-9, abs_tol=1e-9)
            assert expected > 0
        else:
            assert expected == max(num, 1), "longer than any before: half done"


def test_old_answers_are_forgotten() -> None:
    rng, lengths, answers = random.Random(1), OutputLengths(), list[int]()
    num_tokens = np.arange(0, 400, 7)
    for i in range(1500):
        answers.append(rng.randint(1, 30) if i < 700 else rng.randint(100, 300))
        lengths.observe(answers[-1])
        if i % 100 == 99 or i in (15, 16, 17, 511, 512, 513):
            known = np.array(played_lengths(answers))
            expected = [(known[known > n] - n).mean() if (known > n).any() else max(n, 1) for n in num_tokens]
            assert lengths.expected_remaining(num_tokens) == pytest.approx(expected)
    assert lengths.expected_remaining(np.array([0])) == pytest.approx([200], rel=0.05)


def test_the_mean_counts_tokens_of_answers_that_are_not_over() -> None:
    lengths = OutputLengths()
    assert lengths.mean == sum(PRESUMED) / len(PRESUMED)
    # Of each two answers one ends after 10 tokens, and the other goes on for 190.
    for _ in range(2000):
        lengths.count_tokens(10)
        lengths.observe(10)
        lengths.count_tokens(190)
        lengths.observe(190)
    assert lengths.mean == pytest.approx(100, rel=0.05)
    for _ in range(20):
        lengths.count_tokens(1000)
    assert lengths.mean > 150, "nobody has ended since"
