"""The engine's loop, run on the test's own thread: whoever hears of a step says what comes next."""

import itertools
import logging
from collections.abc import Callable

import pytest

from fake_engine import FakeRunner, make_scheduler, next_token
from headrace.kernels.step_times import StepTimes
from headrace.scheduler.engine_core import EngineCore, Publication
from headrace.scheduler.errors import CapacityError
from headrace.scheduler.messages import (
    EngineReady,
    EngineStopped,
    FinishReason,
    GenerationRequest,
    SamplingParams,
    StepOutput,
    StepPauses,
)
from headrace.scheduler.scheduler import Scheduler


class Script:
    """An engine, all it has published, and what to do when it has published the n-th step."""

    def __init__(self, events: dict[int, Callable[["Script"], None]], *, scheduler: Scheduler | None = None) -> None:
        self.runner = FakeRunner()
        self.scheduler = scheduler or make_scheduler()
        self.publications: list[Publication] = []
        self.core = EngineCore(lambda: (self.scheduler, self.runner), self.hear, map(float, itertools.count()).__next__)
        self._events = events

    def run(self) -> None:
        self.core._main()

    def hear(self, publication: Publication) -> None:
        self.publications.append(publication)
        num_steps = sum(isinstance(p, StepOutput) for p in self.publications)
        if not isinstance(publication, EngineStopped) and (event := self._events.pop(num_steps, None)):
            event(self)

    def submit(self, id: int, max_tokens: int = 5) -> None:
        self.core.submit(GenerationRequest(id, (id, 1, 2), SamplingParams(max_tokens=max_tokens), 0.0))

    @property
    def steps(self) -> list[StepOutput]:
        return [p for p in self.publications if isinstance(p, StepOutput)]

    def tokens(self, id: int) -> list[int]:
        return [t for step in self.steps for o in step.outputs if o.request_id == id for t in o.token_ids]

    def ends(self, id: int) -> list[FinishReason]:
        return [o.finish_reason for s in self.steps for o in s.outputs if o.request_id == id and o.finish_reason]


def alone(id: int, num_tokens: int = 5) -> list[int]:
    token_ids = [id, 1, 2]
    for _ in range(num_tokens):
        token_ids.append(next_token(token_ids))
    return token_ids[3:]


def test_it_says_ready_then_each_step_then_stopped() -> None:
    script = Script({0: lambda s: s.submit(7), 5: lambda s: s.core.stop()})
    script.run()
    first, *steps, last = script.publications
    assert first == EngineReady(512, 32, 257, "fake model", make_scheduler().load())
    assert all(isinstance(step, StepOutput) for step in steps)
    assert last == EngineStopped(None)
    assert script.tokens(7) == alone(7)
    assert script.ends(7) == [FinishReason.LENGTH]
    assert [step.load.num_steps for step in script.steps] == [1, 2, 3, 4, 5, 5]
    # The clock ticks once per look: when a step begins, before and after it is computed, and at its end.
    assert script.steps[-1].load.busy_s == 5 * 3.0
    assert [step.pauses for step in script.steps] == [StepPauses(None, None), *[StepPauses(3.0, None)] * 4, None]


def test_pauses_are_those_a_runner_knows_of_and_none_is_told_across_idleness_or_a_failed_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    began_s = map(float, itertools.count(10))

    def compute(script: Script) -> None:
        began = next(began_s)
        script.runner.times = StepTimes(began, began + 0.5, 0.125)

    def fail(script: Script) -> None:
        compute(script)
        script.runner.fail_next = True
        script.submit(3, max_tokens=2)

    script = Script({1: compute, 2: compute, 3: fail, 4: compute, 5: lambda s: s.core.stop()})
    # 1 takes two steps. Then the engine looks over its books, idle, and 2 comes, whose second step fails with 3 in it.
    monkeypatch.setattr(script.scheduler, "check_books", lambda: script.submit(2, max_tokens=4))
    compute(script)
    script.submit(1, max_tokens=2)
    script.run()
    assert [step.pauses for step in script.steps] == [
        StepPauses(None, 0.125),
        StepPauses(0.5, 0.125),
        StepPauses(None, 0.125),
        None,
        StepPauses(None, 0.125),
        None,
    ]


def test_idle_time_is_used_until_there_is_nothing_to_do_or_somebody_comes(caplog: pytest.LogCaptureFixture) -> None:
    done: list[str] = []
    script = Script({4: lambda s: s.core.stop()})

    def work() -> bool:
        """Two pieces, then none; somebody comes during the fourth, and the fifth fails."""
        done.append("piece")
        if len(done) == 4:
            script.submit(2, max_tokens=1)
        if len(done) == 5:
            script.submit(3, max_tokens=1)
            raise MemoryError("of idle work")
        if len(done) == 3:
            script.submit(1, max_tokens=2)
        return len(done) != 3

    script.runner.use_idle_time = work  # type: ignore[method-assign]
    script.run()
    assert script.tokens(1) == alone(1, 2)
    assert script.tokens(2) == alone(2, 1)
    assert script.tokens(3) == alone(3, 1)
    assert len(done) == 5
    assert script.publications[-1] == EngineStopped(None)
    assert "idle time failed" in caplog.text


def test_what_arrives_during_a_step_joins_the_next_one() -> None:
    script = Script({0: lambda s: s.submit(1), 2: lambda s: s.submit(2), 7: lambda s: s.core.stop()})
    script.run()
    assert script.runner.widths == [1, 1, 2, 2, 2, 1, 1]
    assert script.tokens(1) == alone(1)
    assert script.tokens(2) == alone(2)
    assert [step.load.num_received for step in script.steps[:3]] == [1, 1, 2]


def test_a_cancel_frees_the_blocks_within_a_step() -> None:
    def cancel(script: Script) -> None:
        assert script.steps[-1].load.num_free_blocks == 64 - 1
        script.core.cancel(1)
        script.core.cancel(99)

    script = Script({0: lambda s: s.submit(1), 2: cancel, 3: lambda s: s.core.stop()})
    script.run()
    assert script.steps[2].load.num_free_blocks == 64
    assert script.runner.num_steps == 2, "nothing is computed for it any more"
    assert script.tokens(1) == alone(1)[:2]
    assert script.ends(1) == [FinishReason.CANCELLED]


def test_a_step_that_raises_costs_only_its_own_sequences(caplog: pytest.LogCaptureFixture) -> None:
    def fail(script: Script) -> None:
        script.runner.fail_next = True
        script.submit(3)

    script = Script(
        {2: fail, 8: lambda s: s.core.stop()},
        scheduler=make_scheduler(max_num_seqs=2),
    )
    script.submit(1)
    script.submit(2)
    script.run()
    for id in (1, 2):
        assert script.ends(id) == [FinishReason.ERROR]
        assert script.tokens(id) == alone(id)[:2]
    assert script.ends(3) == [FinishReason.LENGTH]
    assert script.tokens(3) == alone(3)
    assert script.steps[2].load.num_free_blocks == 64
    assert "the fake model fails as told" in caplog.text
    [error] = {o.error for o in script.steps[2].outputs}
    assert error is not None
    assert "as told" not in error, "a client is not told what went wrong inside"


@pytest.mark.parametrize("num_steps", [0, 1, 3])
def test_stopping_ends_all_that_was_submitted_before_it_and_nothing_is_computed_after(num_steps: int) -> None:
    def stop(script: Script) -> None:
        script.submit(3)
        script.core.stop()

    events: dict[int, Callable[[Script], None]] = {num_steps: stop}
    script = Script(events, scheduler=make_scheduler(max_num_seqs=1))
    script.submit(1, max_tokens=50)
    script.submit(2, max_tokens=50)
    script.run()
    assert script.runner.num_steps == num_steps
    for id in (1, 2, 3):
        assert script.ends(id) == [FinishReason.ERROR]
    assert script.publications[-1] == EngineStopped(None)
    assert script.steps[-1].load.num_free_blocks == 64


@pytest.mark.parametrize("error", [CapacityError("too small"), ValueError("a bug")])
def test_a_model_that_cannot_be_loaded_is_the_only_thing_said(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    published: list[Publication] = []

    def load() -> tuple[Scheduler, FakeRunner]:
        raise error

    with caplog.at_level(logging.ERROR):
        EngineCore(load, published.append)._main()
    assert published == [EngineStopped(error)]
    assert bool(caplog.records) == isinstance(error, ValueError), "the operator's mistake needs no stack"


def test_books_that_do_not_add_up_end_the_engine_aloud(caplog: pytest.LogCaptureFixture) -> None:
    def lose_a_block(script: Script) -> None:
        script.scheduler._pool.allocate(1)

    script = Script({0: lambda s: s.submit(1), 5: lose_a_block})
    script.run()
    last = script.publications[-1]
    assert isinstance(last, EngineStopped)
    assert isinstance(last.error, AssertionError)
    assert "blocks do not add up" in caplog.text
