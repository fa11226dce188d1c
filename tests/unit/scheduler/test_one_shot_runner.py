"""Batches between the engine's steps: whose turn it is, on a clock that only layers and steps move."""

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from headrace.scheduler.messages import OneShotBatch, OneShotOutput, OneShotReady
from headrace.scheduler.one_shot_runner import AbandonedError, OneShotRunner

SHARE = 0.2
MOST_S = 0.05  # what is saved up at most
TICK_S = 1 / 1024  # sums of which are exact


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Layers:
    """A model that doubles numbers in layers of so many seconds. What it stumbles over raises at its second layer."""

    num_bytes = 8
    description = "layers"

    def __init__(self, clock: Clock, *layers_s: float) -> None:
        self.clock = clock
        self.layers_s = layers_s
        self.num_layers = 0

    def run(self, inputs: Sequence[Any], pause: Callable[[], None]) -> Sequence[Any]:
        for i, layer_s in enumerate(self.layers_s):
            if i:
                pause()
            if i == 1 and "stone" in inputs:
                raise ZeroDivisionError("stumbled")
            self.clock.now_s += layer_s
            self.num_layers += 1
        return [2 * number for number in inputs]


class Engine:
    """A runner and the loop around it: steps of `step_s` are made whenever the runner leaves the time to streams."""

    def __init__(self, *layers_s: float, step_s: float = 0.01, share: float = SHARE) -> None:
        self.clock = Clock()
        self.model = Layers(self.clock, *layers_s)
        self.runner = OneShotRunner({"model": self.model}, self.clock, share)
        self.step_s = step_s
        self.has_streams = True
        self.is_prompt_waiting = False
        self.steps: list[int] = []  # by how many layers were computed before each
        self.on_step: Callable[[], None] = lambda: None

    def serve_streams(self) -> None:
        while not self.runner.may_go_on(has_streams=self.has_streams, is_prompt_waiting=self.is_prompt_waiting):
            self.step()

    def step(self) -> None:
        self.steps.append(self.model.num_layers)
        self.clock.now_s += self.step_s
        self.runner.earn(self.step_s)
        self.on_step()

    def add(self, *inputs: Any, id: int = 1, model: str = "model") -> None:
        self.runner.add(OneShotBatch(id, model, inputs))

    def run(self) -> OneShotOutput:
        return self.runner.run(self.serve_streams)


def test_it_says_what_it_has() -> None:
    assert Engine().runner.ready == (OneShotReady("model", 8, "layers"),)


def test_with_nobody_generating_a_batch_has_the_machine_to_itself() -> None:
    engine = Engine(0.1, 0.2, 0.3)
    engine.has_streams = False
    engine.add(1, 2)
    assert engine.runner.has_work
    output = engine.run()
    assert (output.outputs, output.error) == ((2, 4), None)
    assert output.busy_s == pytest.approx(0.6)
    assert engine.steps == []
    assert not engine.runner.has_work


def test_who_comes_waits_for_one_layer_and_pauses_are_not_counted_as_computing() -> None:
    engine = Engine(0.002, 0.002, 0.002, step_s=0.004)
    engine.has_streams = False
    engine.add(1)

    def serve() -> None:
        if engine.model.num_layers == 1:
            engine.has_streams = True
        if engine.model.num_layers == 2:
            engine.has_streams = False
        engine.serve_streams()

    output = engine.runner.run(serve)
    assert engine.steps != []
    assert set(engine.steps) == {1}, "after the first layer, and until its time is made good"
    assert output.busy_s == pytest.approx(0.006)


@pytest.mark.parametrize("share", [0.05, 0.15, 0.25, 0.5])
@pytest.mark.parametrize("seed", range(3))
def test_in_the_long_run_layers_have_their_share_of_the_time(seed: int, share: float) -> None:
    rng = random.Random(seed)
    engine = Engine(*(rng.uniform(0.0001, 0.02) for _ in range(4000)), share=share)
    engine.on_step = lambda: setattr(engine, "step_s", rng.uniform(0.001, 0.03))
    engine.add(1)
    output = engine.run()
    assert output.busy_s / engine.clock.now_s == pytest.approx(share, abs=0.01)


def test_short_layers_come_together_after_a_step_and_long_ones_are_paid_for_first() -> None:
    engine = Engine(*[2 * TICK_S] * 9, step_s=5 * TICK_S, share=0.5)  # of which all is earned
    engine.add(1)
    engine.run()
    # Layers go on until the credit is used up, and what the last took more is owed.
    assert engine.steps == [0, 3, 5, 8]
    engine = Engine(*[3 * TICK_S] * 3, step_s=TICK_S, share=0.5)
    engine.add(1)
    engine.run()
    assert engine.steps == [0, 1, 1, 1, 2, 2, 2]


def test_while_a_prompt_waits_layers_wait_too_until_the_most_is_saved() -> None:
    engine = Engine(TICK_S, TICK_S, step_s=8 * TICK_S, share=0.5)
    engine.is_prompt_waiting = True
    engine.add(1)
    engine.run()
    # The first layer takes it below, and one step makes that good.
    assert engine.steps == [0] * math.ceil(MOST_S / engine.step_s) + [1]


def test_a_prompt_that_is_computed_lets_the_layers_go_on() -> None:
    engine = Engine(0.001, step_s=0.01)
    engine.is_prompt_waiting = True
    engine.add(1)
    engine.on_step = lambda: setattr(engine, "is_prompt_waiting", len(engine.steps) < 3)
    engine.run()
    assert engine.steps == [0, 0, 0]


def test_nothing_is_saved_up_while_there_is_no_batch() -> None:
    engine = Engine(*[0.001] * 3)
    for _ in range(100):
        engine.step()
    engine.steps.clear()
    engine.add(1)
    engine.run()
    assert engine.steps == [0], "it is earned from the batch's arrival on"


def test_nothing_is_saved_up_beyond_the_most() -> None:
    engine = Engine(*[16 * TICK_S] * 10)
    engine.add(1)
    for _ in range(1000):
        engine.step()
    engine.steps.clear()
    engine.run()
    assert engine.steps[0] == math.ceil(MOST_S / (16 * TICK_S))


def test_what_is_left_is_not_kept_for_the_next_batch_but_a_debt_is_not_either() -> None:
    engine = Engine(0.3, step_s=0.01)
    for id in (1, 2):
        engine.add(1, id=id)
        engine.run()
    assert engine.steps == [0, 1], "with no batch left nobody owes anything"
    # With one behind it, it does.
    engine = Engine(4 * TICK_S, step_s=TICK_S, share=0.5)
    engine.add(1, id=1)
    engine.add(1, id=2)
    engine.run()
    engine.run()
    assert engine.steps == [0, 1, 1, 1, 1]


def test_time_without_streams_is_no_debt() -> None:
    engine = Engine(5.0, 0.001, 0.001)
    engine.has_streams = False
    engine.add(1)

    def serve() -> None:
        engine.has_streams = engine.model.num_layers > 1
        engine.serve_streams()

    engine.runner.run(serve)
    assert engine.steps == [2]


def test_batches_are_computed_in_the_order_in_which_they_came() -> None:
    engine = Engine(0.001)
    for id in (5, 3, 9):
        engine.add(id, id=id)
    outputs = []
    while engine.runner.has_work:
        outputs.append(engine.run())
    assert [(output.batch_id, output.outputs) for output in outputs] == [(5, (10,)), (3, (6,)), (9, (18,))]


def test_a_batch_that_waits_is_dropped_when_it_is_cancelled() -> None:
    engine = Engine(0.001)
    for id in (1, 2, 3):
        engine.add(id, id=id)
    engine.runner.cancel([2, 77])
    assert [engine.run().batch_id for _ in range(2)] == [1, 3]
    assert not engine.runner.has_work
    engine.runner.cancel([1])  # over


def test_a_batch_that_is_computed_ends_at_its_next_pause_when_it_is_cancelled_and_no_other() -> None:
    engine = Engine(0.001, 0.001, 0.001, step_s=1.0)
    engine.add(1, id=1)
    engine.add(2, id=2)

    def cancel() -> None:
        if engine.model.num_layers == 1:
            engine.runner.cancel([1])

    engine.on_step = cancel
    engine.step_s = 0.001
    output = engine.run()
    assert (output.batch_id, output.outputs) == (1, ())
    assert output.error is not None
    assert output.busy_s == pytest.approx(0.001)
    following = engine.run()
    assert (following.batch_id, following.outputs, following.error) == (2, (4,), None)
    assert engine.model.num_layers == 4


def test_the_first_batch_cancelled_before_it_is_begun_computes_nothing() -> None:
    engine = Engine(0.001)
    engine.add(1, id=1)
    engine.add(2, id=2)
    engine.runner.cancel([1])
    assert engine.run().error is not None
    assert engine.model.num_layers == 0
    assert engine.run().outputs == (4,)


def test_a_model_that_raises_costs_its_own_batch(caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine(0.001, 0.001)
    engine.add("stone", "mill", id=1)
    engine.add(2, id=2)
    output = engine.run()
    assert (output.batch_id, output.outputs) == (1, ())
    assert output.error is not None
    assert "stumbled" not in output.error, "a client is not told what went wrong inside"
    assert "stumbled" in caplog.text
    assert engine.run().outputs == (4,)


def test_a_model_that_is_not_there_is_an_error_of_that_batch() -> None:
    engine = Engine(0.001)
    engine.add(1, model="another")
    assert engine.run().error is not None
    assert not engine.runner.has_work


@pytest.mark.parametrize("num_layers", [0, 1])
def test_what_the_streams_raise_comes_out(num_layers: int) -> None:
    engine = Engine(0.001, 0.001)
    engine.add(1)

    def serve() -> None:
        if engine.model.num_layers == num_layers:
            raise LookupError("of a step")

    with pytest.raises(LookupError, match="of a step"):
        engine.runner.run(serve)


@pytest.mark.parametrize("num_layers", [0, 1])
def test_but_for_an_end_that_is_asked_for_which_ends_the_batch_alone(num_layers: int) -> None:
    engine = Engine(0.001, 0.001)
    engine.add(1, id=1)
    engine.add(2, id=2)

    def serve() -> None:
        if engine.model.num_layers == num_layers:
            raise AbandonedError

    output = engine.runner.run(serve)
    assert (output.batch_id, output.outputs) == (1, ())
    assert output.error is not None
    assert engine.model.num_layers == num_layers
    assert engine.run().outputs == (4,)
