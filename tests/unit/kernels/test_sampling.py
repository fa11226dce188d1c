"""Sampling follows the distribution it is given, and a row's draw is its own."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from headrace.kernels.sampling import SamplingBatch, sample, uniforms


def batch(num_rows: int, **fields: Any) -> SamplingBatch:
    defaults: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0}
    defaults |= {"choice": 0, "position": 0}
    dtypes = {"top_k": np.int64, "seed": np.uint64, "choice": np.int64, "position": np.int64}
    arrays: dict[str, Any] = {
        name: np.broadcast_to(np.asarray(fields.get(name, value)), num_rows).astype(dtypes.get(name, np.float32))
        for name, value in defaults.items()
    }
    lists = {name: fields[name] for name in ("penalties", "biased", "masked", "allowed") if name in fields}
    return SamplingBatch(**arrays, **lists)


def logits(num_rows: int, vocab: int, seed: int = 0, spread: float = 2.0) -> torch.Tensor:
    return torch.randn(num_rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def filtered(
    row: npt.NDArray[np.float64], temperature: float, top_k: int, top_p: float, min_p: float
) -> npt.NDArray[np.float64]:
    """The distribution, written out plainly."""
    probs = np.exp((row - row.max()) / temperature)
    probs /= probs.sum()
    order = np.argsort(-probs, kind="stable")
    kept = list(order[:top_k]) if top_k else list(order)
    mass = probs[kept].sum()
    nucleus: list[int] = []
    total = 0.0
    for token in kept:
        if nucleus and total >= top_p * mass:
            break
        nucleus.append(token)
        total += probs[token]
    nucleus = [token for token in nucleus if probs[token] >= min_p * probs.max()]
    result = np.zeros_like(probs)
    result[nucleus] = probs[nucleus]
    return np.asarray(result / result.sum())


SETTINGS = [
    (1.0, 0, 1.0, 0.0),
    (0.7, 0, 1.0, 0.0),
    (1.0, 5, 1.0, 0.0),
    (1.0, 0, 0.8, 0.0),
    (1.3, 0, 1.0, 0.1),
    (0.9, 20, 0.9, 0.05),
    (1.0, 1, 1.0, 0.0),
]


@pytest.mark.parametrize("setting", SETTINGS)
def test_frequencies_equal_the_filtered_softmax(setting: tuple[float, int, float, float]) -> None:
    temperature, top_k, top_p, min_p = setting
    num_draws = 20_000
    row = logits(1, 40, seed=3)
    fields = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    drawn = sample(row.repeat(num_draws, 1), batch(num_draws, position=np.arange(num_draws), **fields)).tolist()
    counts = np.bincount(drawn, minlength=40)
    expected = filtered(row[0].double().numpy(), *setting) * num_draws
    assert counts[expected == 0].sum() == 0
    live = expected > 5
    chi_square = float((((counts - expected) ** 2)[live] / expected[live]).sum())
    # 39 degrees of freedom at most: a right sampler exceeds 90 once in 100,000 runs, and these seeds are fixed.
    assert chi_square < 90


@pytest.mark.parametrize("top_p", [0.5, 0.95, 0.999])
def test_a_nucleus_wider_than_the_first_candidates_is_found_whole(top_p: float) -> None:
    rows = logits(6, 5000, seed=4, spread=0.3)
    draws = [sample(rows.clone(), batch(6, top_p=top_p, position=i)).tolist() for i in range(200)]
    for row in range(6):
        allowed = set(np.flatnonzero(filtered(rows[row].double().numpy(), 1.0, 0, top_p, 0.0)))
        seen = {draw[row] for draw in draws}
        assert seen <= allowed
        ranks = (-rows[row]).argsort().argsort()
        assert max(int(ranks[token]) for token in seen) > 256


def test_a_draw_depends_on_its_seed_and_position_only() -> None:
    rows = logits(8, 500, seed=5)
    fields = {"top_k": [0, 5, 0, 50, 0, 0, 3, 0], "top_p": [1, 1, 0.9, 0.5, 1, 0.99, 1, 1], "seed": np.arange(8)}
    together = sample(rows.clone(), batch(8, position=np.arange(8) + 10, **fields)).tolist()
    order = np.random.default_rng(1).permutation(8)
    shuffled = {name: np.asarray(values)[order] for name, values in fields.items()}
    again = sample(rows[order].clone(), batch(8, position=order + 10, **shuffled)).tolist()
    assert [again[list(order).index(i)] for i in range(8)] == together
    for i in range(8):
        own = {name: np.asarray(values)[i] for name, values in fields.items()}
        assert sample(rows[i : i + 1].clone(), batch(1, position=i + 10, **own)).tolist() == [together[i]]


def test_a_neighbours_top_k_changes_no_draw_where_many_tokens_tie() -> None:
    # bfloat16 logits are full of equal values, whose order is up to the sort.
    rows = logits(40, 5000, seed=8, spread=1.0).bfloat16().float()
    for top_k in (0, 300, 1000, 4999):
        with_neighbour = torch.cat((rows, rows[:1]))
        fields = {"top_p": np.array([0.9] * 40 + [1.0]), "top_k": np.array([0] * 40 + [top_k])}
        drawn = sample(with_neighbour, batch(41, position=np.arange(41), **fields)).tolist()
        assert drawn[:40] == sample(rows.clone(), batch(40, top_p=0.9, position=np.arange(40))).tolist()


def test_greedy_rows_take_the_largest_beside_random_ones() -> None:
    rows = logits(4, 300, seed=6)
    drawn = sample(rows.clone(), batch(4, temperature=[0, 1, 0, 1])).tolist()
    assert [drawn[0], drawn[2]] == rows[[0, 2]].argmax(-1).tolist()


def test_a_masked_token_is_never_drawn() -> None:
    rows = torch.zeros(2, 3)
    rows[:, 1] = 50.0
    for position in range(50):
        drawn = sample(
            rows.clone(),
            batch(2, temperature=[0, 1], position=position, masked=[(0, np.array([1])), (1, np.array([1]))]),
        ).tolist()
        assert 1 not in drawn


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_only_allowed_tokens_are_drawn_and_in_proportion_to_what_they_had(temperature: float) -> None:
    """With every token's bit tried on both sides of a word's border, in a vocabulary that ends within a word."""
    allowed_ids = [0, 5, 31, 32, 63, 64, 69]
    words = np.zeros(3, np.uint32)
    for token_id in allowed_ids:
        words[token_id // 32] |= np.uint32(1 << token_id % 32)
    row = logits(1, 70, seed=3)
    num_draws = 4000
    allowed = [(i, words) for i in range(0, num_draws, 2)]
    drawn = sample(
        row.repeat(num_draws, 1),
        batch(num_draws, temperature=temperature, position=np.arange(num_draws), allowed=allowed),
    )
    held, free = drawn[::2], drawn[1::2]
    assert set(held.tolist()) <= set(allowed_ids)
    assert not set(free.tolist()) <= set(allowed_ids)
    only = torch.full((70,), float("-inf"))
    only[allowed_ids] = row[0, allowed_ids]
    if temperature == 0:
        assert set(held.tolist()) == {int(only.argmax())}
        return
    expected = torch.softmax(only / temperature, dim=-1) * len(held)
    found = torch.bincount(held, minlength=70)
    chi2 = float((((found - expected) ** 2) / expected)[allowed_ids].sum())
    assert chi2 < 33.1  # 6 degrees of freedom: once in 100,000 seeds


def test_uniforms_are_uniform_over_seeds_over_choices_and_over_positions() -> None:
    zeros, numbers = np.zeros(100_000, np.int64), np.arange(100_000)
    for seed, choice, position in ((zeros, zeros, numbers), (zeros, numbers, zeros), (numbers, zeros, zeros)):
        values = uniforms(seed.astype(np.uint64), choice, position)
        assert values.min() >= 0
        assert values.max() < 1
        counts, _ = np.histogram(values, bins=50, range=(0, 1))
        chi_square = float(((counts - 2000) ** 2 / 2000).sum())
        assert chi_square < 110  # 49 degrees of freedom: once in 1,000,000


@pytest.mark.parametrize("temperature", [1e-4, 50.0])
def test_extreme_temperatures_stay_finite(temperature: float) -> None:
    rows = logits(3, 1000, seed=7) * 20
    drawn = sample(rows.clone(), batch(3, temperature=temperature, top_p=0.9)).tolist()
    assert all(0 <= token < 1000 for token in drawn)
    if temperature < 1:
        assert drawn == rows.argmax(-1).tolist()
