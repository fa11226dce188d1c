"""The step-time model against synthetic machines whose costs are known."""

import random
from collections.abc import Iterator

import pytest
from hypothesis import given, settings, strategies as st

from headrace.scheduler.step_time import StepShape, StepTimeModel

# Seconds per step, prompt token, decoding sequence, token of context, and prompt token and token of its context.
GPU = (4e-3, 2.5e-5, 3e-5, 4e-8, 2e-9)
CPU = (3e-2, 4e-3, 6e-3, 4e-6, 3e-7)


def seconds(costs_s: tuple[float, ...], shape: StepShape) -> float:
    a, b, g, h, e = costs_s
    num_prompt, num_decoding, context, prompt_context, num_drafted = shape
    assert num_drafted == 0
    return a + b * num_prompt + g * num_decoding + h * context + e * num_prompt * prompt_context


def shapes(rng: random.Random, num_shapes: int) -> Iterator[StepShape]:
    """What a server sees: some steps only decode, some only prompts."""
    for _ in range(num_shapes):
        num_decoding = rng.choice([0, rng.randint(1, 64)])
        num_prompt = rng.choice([0, rng.randint(1, 512)]) if num_decoding else rng.randint(1, 512)
        context = sum(rng.randint(10, 4000) for _ in range(num_decoding))
        yield StepShape(num_prompt, num_decoding, context, rng.uniform(0, 8000) if num_prompt else 0.0)


def learned(costs_s: tuple[float, ...], *, noise: float = 0.02, num_steps: int = 1500) -> StepTimeModel:
    model = StepTimeModel()
    learn(model, costs_s, noise=noise, num_steps=num_steps)
    return model


def learn(model: StepTimeModel, costs_s: tuple[float, ...], *, noise: float = 0.02, num_steps: int = 1500) -> None:
    rng = random.Random(num_steps)
    for shape in shapes(rng, num_steps):
        model.observe(shape, seconds(costs_s, shape) * rng.gauss(1, noise))


def found(model: StepTimeModel) -> tuple[float, ...]:
    """The five coefficients, by what the model says."""
    a, b = model.predict_s(StepShape(0, 0, 0)), model.prompt_token_s()
    g, h = (share * b for share in model.decode_cost())
    return a, b, g, h, (model.prompt_token_s(1000) - b) / 1000


@pytest.mark.parametrize("costs_s", [GPU, CPU])
def test_the_costs_are_recovered_within_a_few_percent(costs_s: tuple[float, ...]) -> None:
    assert found(learned(costs_s, noise=0)) == pytest.approx(costs_s, rel=1e-2)
    model = learned(costs_s)
    assert found(model) == pytest.approx(costs_s, rel=0.25)
    assert model.prompt_token_s() == pytest.approx(costs_s[1], rel=0.03)
    for shape in shapes(random.Random(1), 100):
        assert model.predict_s(shape) == pytest.approx(seconds(costs_s, shape), rel=0.08)


@pytest.mark.parametrize("factor", [0.2, 1.7, 20.0])
def test_another_machine_is_learned_once_the_first_is_forgotten(factor: float) -> None:
    model = learned(GPU)
    changed = tuple(cost * factor for cost in GPU)
    learn(model, changed)
    for shape in shapes(random.Random(1), 100):
        assert model.predict_s(shape) == pytest.approx(seconds(changed, shape), rel=0.05)


def test_one_cost_that_changes_moves_the_others_little() -> None:
    model = learned(GPU)
    a, b, g, h, e = GPU
    learn(model, (a, b, g, 5 * h, e), noise=0)
    assert found(model) == pytest.approx((a, b, g, 5 * h, e), rel=0.05)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), kind=st.sampled_from(["noise", "falling", "spikes"]))
def test_no_cost_is_ever_negative_whatever_is_observed(seed: int, kind: str) -> None:
    rng, model = random.Random(seed), StepTimeModel()
    for shape in shapes(rng, 150):
        measured_s = {
            "noise": rng.expovariate(100),
            "falling": 0.1 / (1 + shape.num_prompt_tokens + shape.decode_context),
            "spikes": rng.choice([0.0, 1e-6, 10.0]),
        }[kind]
        model.observe(shape, measured_s)
        assert min(found(model)) >= -1e-15
        assert model.margin_s >= 0


@pytest.mark.parametrize("costs_s", [GPU, CPU])
def test_the_budget_keeps_95_of_100_steps_within_the_target(costs_s: tuple[float, ...]) -> None:
    rng, model = random.Random(3), learned(costs_s)
    target_s, num_late, used_s = 12 * costs_s[0], 0, 0.0
    for i in range(3000):
        num_decoding = rng.randint(1, 32)
        decoding = StepShape(0, num_decoding, 500 * num_decoding)
        num_prompt = max(0, int(model.prefill_budget(target_s, decoding, 1000.0)))
        shape = decoding._replace(num_prompt_tokens=num_prompt, prompt_context=1000 + num_prompt / 2)
        # Skewed, as other processes on the machine make it.
        measured_s = seconds(costs_s, shape) * (0.97 + rng.expovariate(1 / 0.05))
        model.observe(shape, measured_s)
        if i >= 1000:  # by then the margin is of these steps
            num_late += measured_s > 0.9 * target_s
            used_s += measured_s / 2000
    assert num_late <= 0.07 * 2000
    assert used_s > 0.7 * target_s, "and they are well filled"


def test_the_budget_is_nothing_where_decoding_alone_takes_too_long_and_has_no_end_where_nothing_is_known() -> None:
    model = learned(CPU)
    assert model.prefill_budget(0.1, StepShape(0, 30, 10_000), 0.0) == 0
    assert StepTimeModel().prefill_budget(0.1, StepShape(0, 30, 10_000), 0.0) == float("inf")
    assert StepTimeModel().decode_cost() == (1.0, 0.0)
    assert StepTimeModel().predict_s(StepShape(10, 10, 10)) == 0


def test_a_step_in_which_the_machine_did_something_else_moves_little() -> None:
    model, shape = learned(GPU), StepShape(100, 20, 20_000, 500.0)
    before = model.predict_s(shape)
    model.observe(shape, 1000 * before)
    assert model.predict_s(shape) > before
    for _ in range(20):
        assert model.predict_s(shape) < 1.15 * before
        learn(model, GPU, num_steps=50)
    assert model.predict_s(shape) == pytest.approx(before, rel=0.03)


def test_what_the_steps_tell_nothing_about_keeps_its_last_value() -> None:
    rng, model = random.Random(5), learned(CPU, noise=0)
    a, b, g, h, e = CPU
    for factor, tolerance in ((1, 0.03), (2, 0.2)):
        for _ in range(8000):  # after which nothing is left of the prompts
            shape = StepShape(0, rng.randint(1, 64), rng.randint(64, 100_000))
            model.observe(shape, factor * seconds(CPU, shape) * rng.gauss(1, 0.01))
        assert found(model)[::2][:2] == pytest.approx((factor * a, factor * g), rel=0.05)
        assert found(model)[3] == pytest.approx(factor * h, rel=0.05)
        assert (found(model)[1], found(model)[4]) == pytest.approx((b, e), rel=tolerance)


def test_a_cost_that_was_nothing_is_found_late() -> None:
    model = StepTimeModel()
    for i in range(200):
        model.observe(StepShape(1 + i % 50, 0, 0), 0.001 * (1 + i % 50))
    assert model.predict_s(StepShape(0, 8, 0)) == pytest.approx(0, abs=1e-6)
    for _ in range(400):
        model.observe(StepShape(0, 8, 0), 0.02)
    assert model.predict_s(StepShape(0, 8, 0)) == pytest.approx(0.02, rel=0.05)
