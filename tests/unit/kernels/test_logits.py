"""What changes logits before a token is drawn, and the log probabilities of those that nothing has changed."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from transformers import RepetitionPenaltyLogitsProcessor

from headrace.kernels.sampling import MAX_TOP_LOGPROBS, Penalties, SamplingBatch, log_probabilities, sample

VOCAB = 60
TOKENS = st.lists(st.integers(0, VOCAB - 1), max_size=30)


def greedy(num_rows: int, **lists: Any) -> SamplingBatch:
    floats, ints = np.zeros(num_rows, np.float32), np.zeros(num_rows, np.int64)
    return SamplingBatch(floats, ints, floats + 1, floats, ints.astype(np.uint64), ints, ints, **lists)


def random_logits(num_rows: int, seed: int, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(num_rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def penalised(logits: torch.Tensor, tokens: list[int], num_prompt: int, **penalties: float) -> torch.Tensor:
    """Row 1 of three, after `sample` has worked on it."""
    settings = {"repetition": 1.0, "presence": 0.0, "frequency": 0.0} | penalties
    rows = logits.clone()
    sample(rows, greedy(len(rows), penalties=[Penalties(1, np.array(tokens, np.int64), num_prompt, **settings)]))
    assert torch.equal(rows[[0, 2]], logits[[0, 2]]), "a neighbour's logits are its own"
    return rows[1]


@settings(max_examples=50, derandomize=True, deadline=None)
@given(prompt=TOKENS, output=TOKENS, presence=st.floats(-2, 2), frequency=st.floats(-2, 2), seed=st.integers(0, 99))
def test_presence_and_frequency_count_what_was_generated_and_not_the_prompt(
    prompt: list[int], output: list[int], presence: float, frequency: float, seed: int
) -> None:
    logits = random_logits(3, seed)
    row = penalised(logits, prompt + output, len(prompt), presence=presence, frequency=frequency)
    counts = np.bincount(output, minlength=VOCAB)
    expected = logits[1].double().numpy() - counts * frequency - (counts > 0) * presence
    np.testing.assert_allclose(row.numpy(), expected, atol=1e-4)


@settings(max_examples=50, derandomize=True, deadline=None)
@given(prompt=TOKENS, output=TOKENS, penalty=st.floats(0.1, 3), seed=st.integers(0, 99))
def test_the_repetition_penalty_is_hugging_faces(
    prompt: list[int], output: list[int], penalty: float, seed: int
) -> None:
    logits, tokens = random_logits(3, seed), prompt + output
    expected = logits[1]
    if tokens:
        processor = RepetitionPenaltyLogitsProcessor(penalty)
        [expected] = processor(torch.tensor([tokens]), logits[1:2].clone())
    assert torch.equal(penalised(logits, tokens, len(prompt), repetition=penalty), expected)


def test_a_bias_is_added_after_the_penalties_and_decides() -> None:
    logits = random_logits(2, seed=1)
    heaviest = int(logits[0].argmax())
    biased = [
        (0, np.array([heaviest, 7]), np.array([-100.0, 100.0], np.float32)),
        (1, np.array([7]), np.array([-100.0], np.float32)),
    ]
    penalties = [Penalties(0, np.array([7] * 20), 0, 10.0, 2.0, 2.0)]
    rows = logits.clone()
    drawn = sample(rows, greedy(2, biased=biased, penalties=penalties)).tolist()
    assert drawn[0] == 7
    assert drawn[1] == int(logits[1].argmax())
    assert rows[1, 7] == logits[1, 7] - 100


def test_log_probabilities_are_those_of_the_softmax_with_the_likeliest_first() -> None:
    logits = random_logits(5, seed=2, vocab=300)
    tokens, num_top = [0, 299, 5, 17, 40], [0, 3, 20, 1, 5]
    expected = torch.log_softmax(logits.double(), -1)
    found = log_probabilities(logits, torch.tensor(tokens)).as_lists(num_top)
    for row, (own, top) in enumerate(found):
        assert own == pytest.approx(float(expected[row, tokens[row]]), abs=1e-4)
        best = expected[row].argsort(descending=True)[: num_top[row]].tolist()
        assert [token for token, _ in top] == best
        assert [logprob for _, logprob in top] == pytest.approx(expected[row, best].tolist(), abs=1e-4)


def test_a_neighbour_that_asks_for_more_changes_no_row_where_tokens_tie() -> None:
    logits = random_logits(6, seed=3, vocab=2000).bfloat16().float()
    tokens = torch.ones(6, dtype=torch.int64)
    alone = log_probabilities(logits[:5], tokens[:5]).as_lists([4] * 5)
    assert log_probabilities(logits, tokens).as_lists([4] * 5 + [MAX_TOP_LOGPROBS])[:5] == alone


def test_a_vocabulary_smaller_than_the_most_likely_asked_for_is_given_whole() -> None:
    [(_, top)] = log_probabilities(random_logits(1, seed=4, vocab=3), torch.tensor([0])).as_lists([20])
    assert sorted(token for token, _ in top) == [0, 1, 2]
