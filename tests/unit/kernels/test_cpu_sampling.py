"""The C++ sampler draws what `kernels.sampling` specifies: the same token for the same number of the same row."""

import ctypes
from typing import Any

import numpy as np
import pytest
import torch

import sampling_batches
from cpu_models import TinyModel, cpu_backend
from headrace.kernels.cpu_backend import CpuBackend
from headrace.kernels.sampling import Penalties, SamplingBatch, sample, uniforms
from sampling_batches import Setting, random_logits

pytestmark = pytest.mark.xdist_group("cpu kernel")  # which each worker would compile

PLAIN: Setting = (1.0, 0, 1.0, 0.0)


def sampler(library: ctypes.CDLL, vocab_size: int, num_threads: int = 2) -> CpuBackend:
    model = TinyModel(vocab_size=vocab_size, hidden_size=32, intermediate_size=32, windows=(None,))
    return cpu_backend(library, model, 1, num_threads=num_threads, max_num_batched_tokens=1)


def make_batch(rows: list[Setting], positions: list[int] | None = None, seed: int = 7, **lists: Any) -> SamplingBatch:
    num_rows = len(rows)
    choices = [row % 3 for row in range(num_rows)]
    return sampling_batches.make_batch(rows, [seed] * num_rows, positions or range(num_rows), choices, **lists)


def random_modifiers(num_rows: int, vocab_size: int, generator: np.random.Generator) -> dict[str, Any]:
    """Penalties, biases and masks of about a third of the rows each; tokens occur several times in penalties."""
    penalties, biased, masked, allowed = [], [], [], []
    for row in range(num_rows):
        if generator.random() < 0.3:
            token_ids = generator.integers(0, min(vocab_size, 50), generator.integers(0, 80))
            num_prompt_tokens = int(generator.integers(0, len(token_ids) + 1))
            repetition, presence, frequency = generator.choice([(1, 0.5, 0), (1.3, 0, 0.2), (0.7, -1, 0.4), (2, 0, 0)])
            penalties.append(Penalties(row, token_ids, num_prompt_tokens, repetition, presence, frequency))
        if generator.random() < 0.3:
            token_ids = generator.choice(vocab_size, generator.integers(0, min(vocab_size, 20)), replace=False)
            biased.append((row, token_ids, generator.normal(0, 5, len(token_ids)).astype(np.float32)))
        if generator.random() < 0.3:
            masked.append((row, generator.choice(vocab_size, vocab_size // 2, replace=False)))
        elif generator.random() < 0.4:  # a row of which nothing is left draws any token
            share = generator.choice([0.01, 0.5, 0.999])
            words = np.packbits(generator.random(-(-vocab_size // 32) * 32) < share, bitorder="little").view(np.uint32)
            words[generator.random(len(words)) < 0.2] = generator.choice([0, 2**32 - 1])
            words[0] |= 2
            allowed.append((row, words))
    return {"penalties": penalties, "biased": biased, "masked": masked, "allowed": allowed}


@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])
def test_tokens_are_the_specifications_for_any_mixture_of_settings(library: ctypes.CDLL, spread: float) -> None:
    """Both map the same number through cumulative sums of floats, whose last bits differ: where the number falls so
    near to a bound between two tokens, or a filter's cut so near to one, they may part. One row in 500 may."""
    generator = np.random.default_rng(int(spread * 10))
    num_rows, num_different, num_all = 400, 0, 0
    for vocab_size in (2, 17, 256, 1000, 3001):
        rows: list[Setting] = [
            (
                float(generator.choice([0, 0.25, 1, 3])),
                int(generator.choice([0, 0, 1, 2, 40, 300, 5000])),
                float(generator.choice([1, 1, 0.999, 0.9, 0.5, 0.01])),
                float(generator.choice([0, 0, 0.001, 0.1, 1])),
            )
            for _ in range(num_rows)
        ]
        modifiers = random_modifiers(num_rows, vocab_size, generator)
        batch = make_batch(rows, seed=vocab_size, **modifiers)
        logits = random_logits(num_rows, vocab_size, seed=vocab_size, spread=spread)
        expected_logits = logits.clone()
        expected = sample(expected_logits, batch).tolist()
        drawn = sampler(library, vocab_size).sample(logits, batch).tolist()
        torch.testing.assert_close(logits, expected_logits, rtol=1e-6, atol=1e-5)
        num_different += sum(a != b for a, b in zip(drawn, expected, strict=True))
        num_all += num_rows
        assert all(a == b for a, b, row in zip(drawn, expected, rows, strict=True) if row[0] == 0), "greedy"
    assert num_different <= num_all / 500


@pytest.mark.parametrize(
    ("num_tail", "tail", "setting"),
    [
        pytest.param(2000, -9.0, (1.0, 1500, 0.5, 0.0), id="top-k reaches into the tail"),
        pytest.param(2000, -9.0, (1.0, 1500, 0.5, 0.1), id="min-p cuts the tail that top-p's mass counts"),
        pytest.param(2900, -12.0, (1.0, 0, 0.99, 0.0), id="top-p reaches into the tail"),
        pytest.param(2900, -20.0, (1.0, 2000, 1.0, 0.0), id="top-k reaches far down"),
        pytest.param(2900, -9.0, (1.0, 0, 0.8, 0.01), id="top-p within, min-p beyond"),
    ],
)
def test_filters_that_reach_below_the_first_candidates(
    library: ctypes.CDLL, num_tail: int, tail: float, setting: Setting
) -> None:
    """Few likely tokens and a long tail of unlikely ones, each below the sampler's first floor of 2 ** -12, that
    together have as much mass, but for which a filter's cut would be elsewhere."""
    num_rows = 300
    head = torch.tensor([0.0, -0.7, -1.4, -2.0])
    noise = random_logits(1, num_tail, seed=3, spread=0.05)[0]
    logits = torch.cat([noise[:1000] + tail, head, noise[1000:] + tail]).repeat(num_rows, 1)
    batch = make_batch([setting] * num_rows)
    expected = sample(logits.clone(), batch).tolist()
    drawn = sampler(library, logits.shape[1]).sample(logits, batch).tolist()
    assert sum(a != b for a, b in zip(drawn, expected, strict=True)) <= num_rows / 100


@pytest.mark.parametrize(
    "setting",
    [PLAIN, (0.7, 0, 1.0, 0.0), (1.5, 300, 1.0, 0.0), (1.0, 0, 0.9, 0.0), (1.0, 500, 0.95, 0.0), (2.0, 0, 1.0, 0.02)],
    ids=str,
)
def test_frequencies_equal_the_distribution(library: ctypes.CDLL, setting: Setting) -> None:
    num_draws, vocab_size = 20_000, 601
    logits = random_logits(1, vocab_size, seed=9, spread=0.4)
    temperature, top_k, top_p, min_p = setting
    probs = (logits[0].double() / temperature).softmax(-1).numpy()
    order = np.argsort(-probs, kind="stable")[: top_k or None]
    before = probs[order].cumsum() - probs[order]
    kept = order[(before < top_p * probs[order].sum()) & (probs[order] >= min_p * probs.max())]
    drawn = sampler(library, vocab_size).sample(logits.repeat(num_draws, 1), make_batch([setting] * num_draws)).tolist()
    counts = np.bincount(drawn, minlength=vocab_size)
    assert counts.sum() == counts[kept].sum() == num_draws
    expected = probs[kept] / probs[kept].sum() * num_draws
    degrees = len(kept) - 1
    chi_square = float(((counts[kept] - expected) ** 2 / expected).sum())
    # Normal approximation: a right sampler is 5 sigma off once in 1,700,000 runs, on either side; the seeds are fixed.
    assert abs(chi_square - degrees) < 5 * (2 * degrees) ** 0.5


def test_greedy_rows_take_the_largest_logit_and_the_lowest_of_equal_ones(library: ctypes.CDLL) -> None:
    for vocab_size in (1, 7, 16, 33, 1001):
        # Eight bits of mantissa: many are equal.
        logits = random_logits(200, vocab_size, seed=vocab_size, spread=0.01).bfloat16().float()
        expected = [int(np.flatnonzero(row == row.max())[0]) for row in logits.numpy()]
        settings: list[Setting] = [(0.0, 0, 1.0, 0.0), (0.0, 5, 0.5, 0.1), (1.0, 1, 1.0, 0.0), (1.0, 0, 1e-9, 0.0)]
        for setting in settings:
            assert sampler(library, vocab_size).sample(logits.clone(), make_batch([setting] * 200)).tolist() == expected


def test_of_equal_tokens_at_a_cut_the_lowest_are_kept(library: ctypes.CDLL) -> None:
    backend = sampler(library, 403)
    logits = torch.full((400, 403), -5.0)
    logits[:, 200:320] = 1.0  # 120 equal ones
    logits[:, 390] = 2.0
    for setting, num_equal in (
        ((1.0, 31, 1.0, 0.0), 30),
        ((1.0, 121, 1.0, 0.0), 120),
        # e of 120 + e is the first one's, 60 + e / 2 are reached with the 59th equal one.
        ((1.0, 0, 0.5, 0.0), 59),
        ((1.0, 61, 0.5, 0.0), 29),
        ((1.0, 0, 1.0, 0.3), 120),
        ((1.0, 0, 1.0, 0.5), 0),
        ((0.3, 11, 1.0, 0.0), 10),
    ):
        drawn = backend.sample(logits.clone(), make_batch([setting] * 400)).tolist()
        kept = {390, *range(200, 200 + num_equal)}
        assert set(drawn) <= kept, setting
        assert len(set(drawn)) > 0.9 * len(kept), setting


@pytest.mark.parametrize("setting", [PLAIN, (1.0, 400, 1.0, 0.0), (1.0, 0, 0.5, 0.0), (1.0, 0, 1.0, 0.9)], ids=str)
def test_a_flat_distribution_is_drawn_in_the_order_of_token_numbers(library: ctypes.CDLL, setting: Setting) -> None:
    """Every probability is 1 / 1024, which floats add up exactly: nothing may differ."""
    logits = torch.full((500, 1024), 3.25)
    batch = make_batch([setting] * 500)
    num_kept = 400 if setting[1] else 512 if setting[2] < 1 else 1024
    assert sampler(library, 1024).sample(logits.clone(), batch).tolist() == [
        int(uniform * num_kept) for uniform in uniforms_of(batch)
    ]


def uniforms_of(batch: SamplingBatch) -> list[float]:
    return [float(u) for u in uniforms(batch.seed, batch.choice, batch.position)]


@pytest.mark.parametrize("setting", [PLAIN, (1.0, 50, 1.0, 0.0), (1.0, 0, 0.9, 0.0), (1.0, 0, 1.0, 1.0)], ids=str)
def test_what_is_minus_infinite_is_never_drawn(library: ctypes.CDLL, setting: Setting) -> None:
    backend = sampler(library, 1000)
    for allowed in ([0], [999], [511, 512], [3, 500, 998]):
        logits = torch.full((200, 1000), float("-inf"))
        logits[:, allowed] = -50.0
        assert set(backend.sample(logits.clone(), make_batch([setting] * 200)).tolist()) == set(allowed)
        masked = [(row, np.setdiff1d(np.arange(1000), allowed)) for row in range(200)]
        drawn = backend.sample(
            random_logits(200, 1000, seed=1, spread=0.1), make_batch([setting] * 200, masked=masked)
        ).tolist()
        assert set(drawn) <= set(allowed)


def test_where_all_is_masked_some_token_is_drawn(library: ctypes.CDLL) -> None:
    for setting in (PLAIN, (1.0, 5, 0.5, 0.1), (0.0, 0, 1.0, 0.0)):
        drawn = sampler(library, 100).sample(torch.full((3, 100), float("-inf")), make_batch([setting] * 3)).tolist()
        assert all(0 <= token < 100 for token in drawn)


@pytest.mark.parametrize("filters", [(0, 1.0, 0.0), (5, 1.0, 0.0), (0, 0.9, 0.0), (0, 1.0, 0.1)], ids=str)
def test_the_ends_of_the_temperature_scale(library: ctypes.CDLL, filters: tuple[int, float, float]) -> None:
    logits = random_logits(300, 401, seed=2, spread=100.0)
    backend = sampler(library, 401)
    best = logits.argmax(-1).tolist()
    for temperature in (1e-5, 1e-30, 1e-37):
        assert backend.sample(logits.clone(), make_batch([(temperature, *filters)] * 300)).tolist() == best
    batch = make_batch([(100.0, *filters)] * 300)
    drawn = backend.sample(logits.clone(), batch).tolist()
    assert sum(a != b for a, b in zip(drawn, sample(logits.clone(), batch).tolist(), strict=True)) <= 1
    # So near to each other that rounding orders them.
    drawn = backend.sample(logits.clone(), make_batch([(1e6, *filters)] * 300)).tolist()
    assert len(set(drawn)) > 150
    assert all(0 <= token < 401 for token in drawn)


@pytest.mark.parametrize("temperature", [1e-39, 1e-42])
def test_a_temperature_whose_inverse_is_no_float_is_almost_greedy(library: ctypes.CDLL, temperature: float) -> None:
    logits = random_logits(50, 401, seed=2)
    best = logits.argmax(-1).tolist()
    for filters in ((0, 1.0, 0.0), (5, 1.0, 0.0), (0, 0.9, 0.0), (0, 1.0, 0.1)):
        assert (
            sampler(library, 401).sample(logits.clone(), make_batch([(temperature, *filters)] * 50)).tolist() == best
        ), filters


def test_neither_neighbours_nor_order_nor_threads_change_a_draw(library: ctypes.CDLL) -> None:
    generator = np.random.default_rng(4)
    num_rows, vocab_size = 60, 3001
    settings: list[Setting] = [
        PLAIN,
        (0.0, 0, 1.0, 0.0),
        (0.8, 40, 1.0, 0.0),
        (1.2, 0, 0.95, 0.0),
        (2.0, 1000, 0.9, 0.01),
    ]
    rows = [settings[i % len(settings)] for i in range(num_rows)]
    logits = random_logits(num_rows, vocab_size, seed=4).bfloat16().float()
    modifiers = random_modifiers(num_rows, vocab_size, generator)
    batch = make_batch(rows, **modifiers)
    expected = sampler(library, vocab_size, num_threads=1).sample(logits.clone(), batch).tolist()
    for num_threads in (2, 3, 5):
        backend = sampler(library, vocab_size, num_threads)
        assert backend.sample(logits.clone(), batch).tolist() == expected
        for _ in range(3):
            order = generator.permutation(num_rows)[: generator.integers(1, num_rows + 1)]
            assert backend.sample(logits[order].clone(), subset(batch, order)).tolist() == [expected[i] for i in order]


def subset(batch: SamplingBatch, order: Any) -> SamplingBatch:
    """The settings of these rows, in this order."""
    place = {int(row): i for i, row in enumerate(order)}
    return SamplingBatch(
        *(
            getattr(batch, name)[order]
            for name in ("temperature", "top_k", "top_p", "min_p", "seed", "choice", "position")
        ),
        penalties=[
            Penalties(place[p.row], p.token_ids, p.num_prompt_tokens, p.repetition, p.presence, p.frequency)
            for p in batch.penalties
            if p.row in place
        ],
        biased=[(place[row], *lists) for row, *lists in batch.biased if row in place],  # type: ignore[misc]
        masked=[(place[row], token_ids) for row, token_ids in batch.masked if row in place],
        allowed=[(place[row], words) for row, words in batch.allowed if row in place],
    )


def test_seeds_choices_and_positions_of_any_size_are_the_specifications(library: ctypes.CDLL) -> None:
    generator = np.random.default_rng(5)
    num_rows = 500
    batch = SamplingBatch(
        np.ones(num_rows, np.float32),
        np.zeros(num_rows, np.int64),
        np.ones(num_rows, np.float32),
        np.zeros(num_rows, np.float32),
        generator.integers(0, 2**64, num_rows, np.uint64),
        generator.integers(0, 128, num_rows),
        generator.integers(0, 2**31, num_rows),
    )
    logits = torch.zeros(num_rows, 4096)
    assert sampler(library, 4096).sample(logits, batch).tolist() == [
        int(uniform * 4096) for uniform in uniforms_of(batch)
    ]


def test_nothing_to_sample_is_no_error(library: ctypes.CDLL) -> None:
    floats, ints, seeds = np.empty(0, np.float32), np.empty(0, np.int64), np.empty(0, np.uint64)
    batch = SamplingBatch(floats, ints, floats, floats, seeds, ints, ints)
    assert sampler(library, 10).sample(torch.empty(0, 10), batch).tolist() == []


@pytest.mark.parametrize("token_id", [-1, 96])
def test_tokens_that_do_not_exist_are_refused(any_library: ctypes.CDLL, token_id: int) -> None:
    backend, ids = sampler(any_library, 96), np.array([3, token_id], np.int64)
    for lists in (
        {"penalties": [Penalties(0, ids, 1, 1.5, 0.0, 0.0)]},
        {"biased": [(0, ids, np.ones(2, np.float32))]},
        {"masked": [(0, ids)]},
    ):
        with pytest.raises(IndexError, match="not within 0"):
            backend.sample(random_logits(1, 96, seed=1), make_batch([(1.0, 0, 1.0, 0.0)], **lists))
