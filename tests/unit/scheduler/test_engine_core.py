"""The engine's loop, run on the test's own thread: whoever hears of a step says what comes next."""

import itertools
import logging
import math
import random
import weakref
from collections.abc import Callable, Sequence as Seq
from typing import Any

import pytest

from fake_engine import AsynchronousFakeRunner, FakeRunner, make_scheduler, next_token
from headrace.kernels.step_times import StepTimes
from headrace.scheduler.engine_core import EngineCore, LaunchedStep, Publication
from headrace.scheduler.errors import CapacityError, DeviceLostError
from headrace.scheduler.messages import (
    DescribeSequences,
    EngineReady,
    EngineStopped,
    FinishReason,
    GenerationRequest,
    OneShotBatch,
    OneShotOutput,
    OneShotReady,
    SamplingParams,
    SequencesDescribed,
    SequenceState,
    StepOutput,
    StepPauses,
    StepsTraced,
    TraceSteps,
)
from headrace.scheduler.scheduler import Scheduler, SchedulerOutput
from headrace.scheduler.step_time import StepShape


class Layers:
    """A one-shot model that doubles numbers, once it has paused between its layers; what is to be done before the n-th
    of all its layers can be said."""

    num_bytes = 8
    description = "layers"

    def __init__(self, num_layers: int = 3) -> None:
        self.events: dict[int, Callable[[], None]] = {}
        self.num_computed = 0
        self._num_layers = num_layers

    def run(self, inputs: Seq[int], pause: Callable[[], None]) -> list[int]:
        for _ in range(self._num_layers):
            pause()
            if event := self.events.pop(self.num_computed, None):
                event()
            self.num_computed += 1
        return [2 * number for number in inputs]


class Script:
    """An engine, all it has published, and what to do when it has published the n-th step."""

    def __init__(
        self,
        events: dict[int, Callable[["Script"], None]],
        *,
        scheduler: Scheduler | None = None,
        runner: FakeRunner | None = None,
        num_requests: int = 0,
        one_shot: Layers | None = None,
        num_batches: int = 0,
    ) -> None:
        self.runner = runner or FakeRunner()
        self.scheduler = scheduler or make_scheduler()
        self.publications: list[Publication] = []
        self.core = EngineCore(
            lambda: (self.scheduler, self.runner),
            self.hear,
            map(float, itertools.count()).__next__,
            lambda: {} if one_shot is None else {"layers": one_shot},
        )
        self._events = events
        # After whose ends the engine is stopped.
        self._num_requests = num_requests
        self._num_batches = num_batches

    def run(self) -> None:
        self.core._main()

    def hear(self, publication: Publication) -> None:
        self.publications.append(publication)
        num_steps = sum(isinstance(p, StepOutput) for p in self.publications)
        if not isinstance(publication, EngineStopped) and (event := self._events.pop(num_steps, None)):
            event(self)
        num_ended = sum(o.finish_reason is not None for step in self.steps for o in step.outputs)
        if (num_ended, len(self.batches)) == (self._num_requests, self._num_batches) != (0, 0):
            self.core.stop()

    def submit(self, id: int, max_tokens: int = 5, **fields: Any) -> None:
        self.core.submit(GenerationRequest(id, (id, 1, 2), SamplingParams(max_tokens=max_tokens, **fields), 0.0))

    def submit_batch(self, id: int, *inputs: int) -> None:
        self.core.submit(OneShotBatch(id, "layers", inputs))

    @property
    def batches(self) -> list[OneShotOutput]:
        return [p for p in self.publications if isinstance(p, OneShotOutput)]

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
    assert first == EngineReady(512, 32, 257, "fake model", None, make_scheduler().load())
    assert all(isinstance(step, StepOutput) for step in steps)
    assert last == EngineStopped(None)
    assert script.tokens(7) == alone(7)
    assert script.ends(7) == [FinishReason.LENGTH]
    assert [step.load.num_steps for step in script.steps] == [1, 2, 3, 4, 5, 5]
    # The clock ticks once per look: before a step is computed, and after.
    assert script.steps[-1].load.busy_s == 5 * 1.0
    assert [step.pauses for step in script.steps] == [StepPauses(None, None), *[StepPauses(2.0, None)] * 4, None]


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

    script = Script({2: fail}, scheduler=make_scheduler(max_num_seqs=2), num_requests=3)
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


BOTH_RUNNERS = pytest.mark.parametrize("runner_type", [FakeRunner, AsynchronousFakeRunner])


@BOTH_RUNNERS
@pytest.mark.parametrize("guilty", [(4,), (0, 4, 5, 9), range(10)], ids=str)
def test_of_a_steps_sequences_only_those_fail_that_raise_alone(
    runner_type: type[FakeRunner],
    guilty: Seq[int],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(script: Script) -> None:
        script.runner.failing_prompts = {(id, 1, 2) for id in guilty}

    script = Script({3: fail}, runner=runner_type(), num_requests=10)
    shapes: list[StepShape] = []
    monkeypatch.setattr(script.scheduler, "observe", lambda shape, seconds: shapes.append(shape))
    for id in range(10):
        script.submit(id, seed=id)
    script.run()
    for id in range(10):
        is_guilty = id in guilty
        assert script.ends(id) == [FinishReason.ERROR if is_guilty else FinishReason.LENGTH]
        assert script.tokens(id) == (alone(id)[: len(script.tokens(id))] if is_guilty else alone(id))
        assert 3 - script.runner.is_asynchronous <= len(script.tokens(id)) < 5 or not is_guilty
    assert len(caplog.records) == 1, "a step's error is told once"
    script.scheduler.check_books()
    assert script.steps[-1].load.num_free_blocks == 64
    assert shapes
    assert StepShape(0, 0, 0) not in shapes, "of rows that are computed again nothing is learned"


@BOTH_RUNNERS
def test_what_only_the_whole_batch_cannot_do_costs_nobody(runner_type: type[FakeRunner]) -> None:
    runner = runner_type()
    runner.most_rows = 3
    script = Script({}, runner=runner, num_requests=11)
    for id in range(11):
        script.submit(id, max_tokens=3 + id % 4)
    script.submit(10, max_tokens=4, presence_penalty=1.0, num_logprobs=1)
    script.run()
    for id in range(10):
        assert (script.tokens(id), script.ends(id)) == (alone(id, 3 + id % 4), [FinishReason.LENGTH])


def test_a_fault_of_the_moment_costs_nobody_though_one_sequence_runs_alone() -> None:
    class Stumbling(FakeRunner):
        def launch(self, output: SchedulerOutput) -> LaunchedStep:
            step = super().launch(output)
            if self.num_steps == 2:
                raise MemoryError("of this moment")
            return step

    script = Script({}, runner=Stumbling(), num_requests=1)
    script.submit(1)
    script.run()
    assert (script.tokens(1), script.ends(1)) == (alone(1), [FinishReason.LENGTH])


def test_what_a_launch_held_when_it_raised_is_let_go_before_rows_are_computed_again() -> None:
    class Memory:
        pass

    held: list[weakref.ref[Memory]] = []

    class Greedy(FakeRunner):
        def launch(self, output: SchedulerOutput) -> LaunchedStep:
            assert [reference() for reference in held] == [None] * len(held)
            memory = Memory()
            held.append(weakref.ref(memory))
            return super().launch(output)

    runner = Greedy()
    runner.most_rows = 1
    script = Script({}, runner=runner, num_requests=4)
    for id in range(4):
        script.submit(id, max_tokens=1)
    logging.disable()  # a record keeps the frames
    script.run()
    logging.disable(logging.NOTSET)
    assert [script.ends(id) for id in range(4)] == [[FinishReason.LENGTH]] * 4
    assert len(held) == 1 + 2 + 4


@BOTH_RUNNERS
@pytest.mark.parametrize("fields", [{}, {"num_prompt_logprobs": 0}], ids=["", "scored"])
def test_a_row_that_comes_to_no_numbers_costs_its_own_sequence(
    runner_type: type[FakeRunner], fields: dict[str, Any]
) -> None:
    runner = runner_type()
    runner.nan_prompts = {(1, 1, 2)}
    script = Script({3: lambda s: runner.nan_prompts.add((2, 1, 2))}, runner=runner, num_requests=4)
    for id in range(4):
        script.submit(id, **fields)
    script.run()
    for id in (0, 3):
        assert (script.tokens(id), script.ends(id)) == (alone(id), [FinishReason.LENGTH])
    for id, most in ((1, 0), (2, 4)):
        assert script.ends(id) == [FinishReason.ERROR]
        assert script.tokens(id) == alone(id)[: len(script.tokens(id))]
        assert len(script.tokens(id)) <= most
    errors = {o.error for step in script.steps for o in step.outputs if o.finish_reason is FinishReason.ERROR}
    assert errors == {"the model computed no numbers for this request"}
    assert script.steps[-1].load.num_free_blocks == 64


@pytest.mark.parametrize(
    ("runner", "how"),
    [
        (FakeRunner(), "fail_next"),
        (AsynchronousFakeRunner(), "fail_next"),
        (AsynchronousFakeRunner(), "fail_next_wait"),
    ],
)
def test_a_device_that_is_lost_ends_the_engine(runner: FakeRunner, how: str, caplog: pytest.LogCaptureFixture) -> None:
    def lose(script: Script) -> None:
        setattr(runner, how, True)
        runner.is_lost = True

    script = Script({2: lose}, runner=runner)
    script.submit(1, max_tokens=50)
    script.run()
    last = script.publications[-1]
    assert isinstance(last, EngineStopped)
    assert isinstance(last.error, DeviceLostError)
    assert script.core.busy_since_s is None
    assert script.ends(1) == []
    assert "the engine thread ended" not in caplog.text, "it is told where the server ends"


def test_since_when_it_is_busy_is_told_anew_for_each_step_layer_and_piece_of_idle_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: dict[str, list[float | None]] = {what: [] for what in ("ready", "step", "layer", "piece", "wait", "stopped")}

    def note(what: str) -> None:
        told[what].append(script.core.busy_since_s)

    class Noting(FakeRunner):
        def launch(self, output: SchedulerOutput) -> LaunchedStep:
            note("step")
            return super().launch(output)

        def use_idle_time(self) -> bool:
            note("piece")
            return len(told["piece"]) < 3

    def wait() -> None:
        note("wait")
        script.core.stop()

    layers = Layers(4)
    script = Script({0: lambda s: note("ready")}, runner=Noting(), one_shot=layers)
    layers.events = {i: lambda: note("layer") for i in range(4)}
    monkeypatch.setattr(script.core._wake, "wait", wait)
    script.submit(1, max_tokens=3)
    script.submit_batch(7, 1)
    script.run()
    note("stopped")
    assert told["ready"] == told["wait"] == told["stopped"] == [None]
    times = [time_s for what in ("step", "layer", "piece") for time_s in told[what]]
    assert [len(told[what]) for what in ("step", "layer", "piece")] == [3, 4, 3]
    assert None not in times
    assert len(set(times)) == len(times)


@pytest.mark.parametrize("num_requests", [0, 1])
def test_a_device_that_is_lost_while_there_is_nothing_to_do_ends_the_engine(num_requests: int) -> None:
    class Losing(FakeRunner):
        def use_idle_time(self) -> bool:
            self.is_lost = True
            self.on_loss()
            return False

    script = Script({}, runner=Losing())
    for i in range(num_requests):
        script.submit(i)
    script.run()
    stopped = script.publications[-1]
    assert isinstance(stopped, EngineStopped)
    assert isinstance(stopped.error, DeviceLostError)
    assert sum(o.finish_reason is not None for step in script.steps for o in step.outputs) == num_requests


def test_rows_that_are_computed_again_count_as_busy_from_then_on() -> None:
    told: list[float | None] = []

    class Noting(FakeRunner):
        def launch(self, output: SchedulerOutput) -> LaunchedStep:
            told.append(script.core.busy_since_s)
            return super().launch(output)

    runner = Noting()
    runner.most_rows = 1
    script = Script({}, runner=runner, num_requests=3)
    for id in range(3):
        script.submit(id, max_tokens=1)
    script.run()
    assert len(set(told)) == len(told) == 1 + 2 + 2
    assert None not in told


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


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_streams_are_those_of_each_request_alone_whether_steps_are_launched_ahead_or_not(
    seed: int, *, ahead: bool
) -> None:
    """Stop tokens, penalties, followers, preemption and shared prefixes; cancelled and late ones get a beginning."""
    rng = random.Random(seed)
    scheduler = make_scheduler(
        num_blocks=rng.randint(12, 20),
        block_size=rng.choice([1, 1, 1, 4]),
        max_num_batched_tokens=rng.randint(6, 24),
        max_num_seqs=6,
        has_prefix_cache=rng.random() < 0.8,
    )
    for _ in range(rng.choice([0, 100, 100, 100])):
        scheduler._lengths.observe(1)  # so that more are admitted than will find blocks
    requests = [random_request(rng, id) for id in range(rng.randint(8, 20))]
    cancels: dict[int, list[int]] = {}
    for request in rng.sample(requests, 3):
        cancels.setdefault(rng.randint(1, 40), []).append(request.request_id)

    class Life(Script):
        def hear(self, publication: Publication) -> None:
            super().hear(publication)
            num_steps = len(self.steps)
            for request in requests[num_steps * 2 : num_steps * 2 + 2]:
                self.core.submit(request)
            for id in cancels.get(num_steps, []):
                self.core.cancel(id)

    runner = AsynchronousFakeRunner() if ahead else FakeRunner()
    script = Life({}, scheduler=scheduler, runner=runner, num_requests=len(requests))
    script.run()
    assert script.publications[-1] == EngineStopped(None)
    scheduler.check_books()
    assert scheduler.load().num_free_blocks == scheduler.load().num_total_blocks
    for request in requests:
        tokens, reason = uninterrupted(request)
        received = script.tokens(request.request_id)
        [end] = script.ends(request.request_id)
        if end in (FinishReason.STOP, FinishReason.LENGTH):
            assert (received, end) == (tokens, reason)
        else:
            is_cancelled = any(request.request_id in ids for ids in cancels.values())
            assert is_cancelled if end is FinishReason.CANCELLED else request.deadline_s < math.inf
            assert end in (FinishReason.CANCELLED, FinishReason.DEADLINE)
            assert received == tokens[: len(received)]


def random_request(rng: random.Random, id: int) -> GenerationRequest:
    max_tokens = rng.choice([0, 1, 10, 10, rng.randint(1, 10)])
    prompt = tuple(range(rng.choice([0, 50]), 55))[: rng.randint(1, 12 - max_tokens)]
    sampling = SamplingParams(
        max_tokens=max_tokens,
        min_tokens=rng.randint(0, max_tokens),
        stop_token_ids=frozenset(rng.sample(range(ord("a"), ord("z")), rng.choice([0, 4]))),
        frequency_penalty=rng.choice([0, 0, 0.5]),
    )
    deadline_s = rng.randint(10, 100) if rng.random() < 0.1 else math.inf
    leader_id = id - 1 if id and rng.random() < 0.3 else None
    return GenerationRequest(id, prompt, sampling, 0.0, deadline_s, leader_id=leader_id)


def uninterrupted(request: GenerationRequest) -> tuple[list[int], FinishReason]:
    sampling, tokens = request.sampling, list[int]()
    while len(tokens) < sampling.max_tokens:
        tokens.append(next_token([*request.prompt_token_ids, *tokens]))
        if tokens[-1] in sampling.stop_token_ids and len(tokens) > sampling.min_tokens:
            return tokens, FinishReason.STOP
    return tokens, FinishReason.LENGTH


def test_a_step_is_launched_before_the_one_before_is_read_and_no_more_of_them_than_tokens_are_wanted() -> None:
    script = Script({6: lambda s: s.core.stop()}, runner=AsynchronousFakeRunner())
    script.submit(1, max_tokens=5)
    script.run()
    assert script.runner.num_steps == 5
    assert [[o.token_ids for o in step.outputs] for step in script.steps[:-1]] == [
        [],
        *([(token,)] for token in alone(1)),
    ]
    assert script.ends(1) == [FinishReason.LENGTH]


def test_a_row_that_needs_its_last_token_runs_in_every_other_step_and_the_others_in_each() -> None:
    script = Script({}, runner=AsynchronousFakeRunner(), num_requests=2)
    script.submit(1, max_tokens=8)
    script.submit(2, max_tokens=4, presence_penalty=1.0)
    script.run()
    assert script.runner.widths == [2, 1] * 4
    assert script.tokens(1) == alone(1, 8)
    assert script.tokens(2) == alone(2, 4)


def test_what_was_launched_for_a_sequence_that_stopped_is_nobodys_and_its_blocks_are_free() -> None:
    tokens = alone(1, 9)
    stop = next(i for i in range(1, 9) if tokens[i] not in tokens[:i])
    script = Script({stop + 3: lambda s: s.core.stop()}, runner=AsynchronousFakeRunner())
    script.submit(1, max_tokens=9, stop_token_ids=frozenset({tokens[stop]}))
    script.run()
    assert script.runner.num_steps == stop + 2, "one more than it has tokens"
    assert script.tokens(1) == tokens[: stop + 1]
    assert script.ends(1) == [FinishReason.STOP]
    assert script.steps[stop + 1].load.num_free_blocks == 64
    assert script.steps[stop + 2].outputs == ()


def test_stopping_delivers_the_step_in_flight_and_then_ends_what_runs() -> None:
    script = Script({3: lambda s: s.core.stop()}, runner=AsynchronousFakeRunner())
    script.submit(1, max_tokens=50)
    script.run()
    assert script.runner.num_steps == 3
    assert script.tokens(1) == alone(1, 3)
    assert script.ends(1) == [FinishReason.ERROR]


def test_a_step_that_cannot_be_launched_costs_its_own_sequences_what_follows_the_step_before() -> None:
    def fail(script: Script) -> None:
        script.runner.fail_next = True
        script.submit(3)

    # 1 is in both steps, and 2 ends with the one in flight.
    script = Script({2: fail}, runner=AsynchronousFakeRunner(), num_requests=3)
    script.submit(1)
    script.submit(2, max_tokens=2)
    script.run()
    assert (script.tokens(1), script.ends(1)) == (alone(1, 2), [FinishReason.ERROR])
    assert (script.tokens(2), script.ends(2)) == (alone(2, 2), [FinishReason.LENGTH])
    assert script.ends(3) == [FinishReason.ERROR]
    assert script.steps[2].load.num_free_blocks == 64
    assert script.steps[2].pauses is None


def test_a_step_that_raises_when_it_is_waited_for_costs_its_own_sequences_and_not_those_launched_since() -> None:
    runner = AsynchronousFakeRunner()

    def fail(script: Script) -> None:
        runner.fail_next_wait = True

    script = Script({1: fail, 2: lambda s: s.submit(2)}, runner=runner, num_requests=2)
    script.submit(1)
    script.run()
    assert (script.tokens(1), script.ends(1)) == (alone(1, 1), [FinishReason.ERROR])
    assert runner.widths[:4] == [1, 1, 2, 1], "1 was in the step launched on the one that fails"
    assert (script.tokens(2), script.ends(2)) == (alone(2), [FinishReason.LENGTH])
    assert script.steps[-1].load.num_free_blocks == 64


def test_blocks_that_run_short_are_taken_from_a_sequence_only_when_all_its_tokens_are_known() -> None:
    scheduler = make_scheduler(num_blocks=6, block_size=2)
    for _ in range(100):
        scheduler._lengths.observe(1)  # so that both are admitted
    script = Script({}, scheduler=scheduler, runner=AsynchronousFakeRunner(), num_requests=2)
    script.submit(1, max_tokens=9)
    script.submit(2, max_tokens=9)
    script.run()
    assert scheduler.load().num_preemptions > 0
    for id in (1, 2):
        assert (script.tokens(id), script.ends(id)) == (alone(id, 9), [FinishReason.LENGTH])


def test_the_pauses_of_steps_launched_ahead_are_the_devices_or_none_where_only_the_engine_can_tell() -> None:
    times = [StepTimes(10.0, 10.5, None), StepTimes(10.75, 11.5, None), None, None]

    class Timed(AsynchronousFakeRunner):
        def launch(self, output: SchedulerOutput) -> LaunchedStep:
            self.times = times[self.num_steps]
            return super().launch(output)

    script = Script({}, runner=Timed(), num_requests=1)
    script.submit(1, max_tokens=4)
    script.run()
    assert [step.pauses for step in script.steps[:3]] == [None, StepPauses(None, None), StepPauses(0.25, None)]
    assert script.steps[4].pauses == StepPauses(0.0, None), "it was launched before the one before had ended"


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


def test_a_batch_is_computed_where_there_is_nothing_else_to_do() -> None:
    script = Script({}, one_shot=Layers(), num_batches=2)
    script.submit_batch(1, 3, 4)
    script.submit_batch(2, 5)
    script.run()
    ready, first, second, _, stopped = script.publications
    assert isinstance(ready, EngineReady)
    assert ready.one_shots == (OneShotReady("layers", 8, "layers"),)
    assert [(p.batch_id, p.outputs, p.error) for p in (first, second) if isinstance(p, OneShotOutput)] == [
        (1, (6, 8), None),
        (2, (10,), None),
    ]
    assert stopped == EngineStopped(None)
    assert script.runner.num_steps == 0


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_streams_and_batches_beside_each_other_are_what_they_are_alone(seed: int, *, ahead: bool) -> None:
    rng = random.Random(seed)
    layers = Layers(rng.randint(1, 20))
    num_requests, num_batches = rng.randint(1, 8), rng.randint(1, 8)
    lengths = {id: rng.randint(1, 12) for id in range(num_requests)}

    class Life(Script):
        def hear(self, publication: Publication) -> None:
            super().hear(publication)
            for ids, submit in ((requests, submit_request), (batches, submit_batch)):
                if ids and rng.random() < 0.5:
                    submit(ids.pop(0))

    def submit_request(id: int) -> None:
        script.submit(id, max_tokens=lengths[id])

    def submit_batch(id: int) -> None:
        script.submit_batch(id, id, 7)

    requests, batches = list(range(num_requests)), [100 + i for i in range(num_batches)]
    runner = AsynchronousFakeRunner() if ahead else FakeRunner()
    script = Life({}, runner=runner, num_requests=num_requests, one_shot=layers, num_batches=num_batches)
    for submit, ids in ((submit_request, requests), (submit_batch, batches)):
        submit(ids.pop(0))

    def submit_next() -> None:
        if requests:
            submit_request(requests.pop(0))
        elif batches:
            submit_batch(batches.pop(0))

    script.scheduler.check_books = submit_next  # type: ignore[method-assign]  # where all is quiet what is left comes
    script.run()
    assert script.publications[-1] == EngineStopped(None)
    for id, length in lengths.items():
        assert (script.tokens(id), script.ends(id)) == (alone(id, length), [FinishReason.LENGTH])
    assert sorted((output.batch_id, output.outputs, output.error) for output in script.batches) == [
        (100 + i, (200 + 2 * i, 14), None) for i in range(num_batches)
    ]
    assert script.steps[-1].load.num_free_blocks == 64


def test_who_comes_while_a_batch_is_computed_waits_for_one_layer() -> None:
    layers = Layers(1000)
    script = Script({1: lambda s: s.core.stop()}, one_shot=layers)
    layers.events[10] = lambda: script.submit(1)
    script.submit_batch(7, 1)
    script.run()
    assert layers.num_computed == 11
    assert script.tokens(1) == alone(1)[:1]


def test_beside_streams_layers_take_turns_with_steps_and_the_scheduler_knows_of_it() -> None:
    layers = Layers(30)
    shares: list[float] = []
    script = Script({}, one_shot=layers, num_requests=1, num_batches=1)
    schedule = script.scheduler.schedule

    def noting(now: float) -> SchedulerOutput:
        shares.append(script.scheduler.other_share)
        return schedule(now)

    script.scheduler.schedule = noting  # type: ignore[method-assign]
    script.submit(1, max_tokens=300)
    script.submit_batch(7, 1)
    script.run()
    done = script.publications.index(script.batches[0])
    steps = [p for p in script.publications[:done] if isinstance(p, StepOutput)]
    assert 30 < len(steps) < 300, "steps were made between its layers, and the batch did not wait for the stream's end"
    assert shares == [script.scheduler.policy.one_shot_share] * len(steps) + [0.0] * (300 - len(steps))
    assert script.tokens(1) == alone(1, 300)


def test_a_batch_is_cancelled_like_a_request_whether_it_waits_or_is_computed() -> None:
    layers = Layers(5)
    script = Script({}, one_shot=layers, num_batches=2)
    for id in (1, 2, 3):
        script.submit_batch(id, id)

    def cancel() -> None:
        for id in (1, 2, 99):
            script.core.cancel(id)

    layers.events[2] = cancel
    script.run()
    first, last = script.batches
    assert (first.batch_id, first.outputs, last.batch_id, last.outputs) == (1, (), 3, (6,))
    assert first.error is not None
    assert layers.num_computed == 3 + 5, "the layer under way is the last"


@pytest.mark.parametrize("has_stream", [False, True])
def test_stopping_in_the_middle_of_a_batch_ends_it_and_the_streams(*, has_stream: bool) -> None:
    layers = Layers(5)
    script = Script({}, one_shot=layers)
    layers.events[2] = script.core.stop
    if has_stream:
        script.submit(9, max_tokens=400)
    for id in (1, 2):
        script.submit_batch(id, id)
    script.run()
    [output] = script.batches
    assert (output.batch_id, output.outputs) == (1, ())
    assert output.error is not None
    assert layers.num_computed == 3
    assert script.publications[-1] == EngineStopped(None)
    assert script.ends(9) == [FinishReason.ERROR] * has_stream
    assert script.steps[-1].load.num_free_blocks == 64


def test_a_one_shot_model_that_raises_costs_its_batch_and_nobody_else(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise MemoryError("of the model")

    layers = Layers(5)
    layers.events[2] = fail
    script = Script({}, one_shot=layers, num_requests=1, num_batches=2)
    script.submit(9, max_tokens=30)
    script.submit_batch(1, 1)
    script.submit_batch(2, 2)
    script.run()
    failed, answered = script.batches
    assert failed.error is not None
    assert "of the model" not in failed.error
    assert (answered.outputs, answered.error) == ((4,), None)
    assert script.tokens(9) == alone(9, 30)
    assert "of the model" in caplog.text


def test_a_step_that_raises_between_two_layers_costs_its_sequences_and_not_the_batch() -> None:
    layers = Layers(5)
    script = Script({}, one_shot=layers, num_requests=1, num_batches=1)
    layers.events[2] = lambda: setattr(script.runner, "fail_next", True)
    script.submit(9, max_tokens=400)
    script.submit_batch(1, 1)
    script.run()
    assert script.ends(9) == [FinishReason.ERROR]
    assert [(output.outputs, output.error) for output in script.batches] == [((2,), None)]


def test_what_is_wrong_with_the_engine_itself_ends_it_though_a_batch_is_computed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def break_books(*args: Any) -> None:
        raise LookupError("the books are wrong")

    layers = Layers(5)
    script = Script({}, one_shot=layers)
    layers.events[2] = lambda: monkeypatch.setattr(script.scheduler, "schedule", break_books)
    script.submit(9, max_tokens=400)
    script.submit_batch(1, 1)
    script.run()
    last = script.publications[-1]
    assert isinstance(last, EngineStopped)
    assert isinstance(last.error, LookupError)
    assert script.batches == []
    assert "the engine thread ended" in caplog.text


def test_a_one_shot_model_that_cannot_be_loaded_is_the_only_thing_said() -> None:
    error = CapacityError("too large")
    published: list[Publication] = []

    def load() -> dict[str, Layers]:
        raise error

    EngineCore(lambda: (make_scheduler(), FakeRunner()), published.append, load_one_shots=load)._main()
    assert published == [EngineStopped(error)]


def traces(script: Script) -> list[tuple[int, int, bool, str | None]]:
    """Of each answer the question, how many steps it has, whether there is a trace of them, and what went wrong."""
    answers = [p for p in script.publications if isinstance(p, StepsTraced)]
    return [(each.question_id, each.num_steps, each.trace is not None, each.error) for each in answers]


@pytest.mark.parametrize("runner", [FakeRunner, AsynchronousFakeRunner])
def test_as_many_steps_are_traced_as_were_asked_for_and_the_answer_comes_behind_the_last(
    runner: type[FakeRunner],
) -> None:
    script = Script({2: lambda s: s.core.submit(TraceSteps(9, 3))}, runner=runner(), num_requests=1)
    script.core.submit(TraceSteps(8, 1))
    script.submit(1, max_tokens=8)
    script.run()
    assert traces(script) == [(8, 1, True, None), (9, 3, True, None)]
    places = [i for i, p in enumerate(script.publications) if isinstance(p, StepsTraced)]
    assert [sum(isinstance(p, StepOutput) for p in script.publications[:place]) for place in places] == [1, 5]
    assert script.tokens(1) == alone(1, 8)


def test_a_trace_that_is_cancelled_ends_with_the_steps_that_it_has() -> None:
    script = Script({3: lambda s: s.core.cancel(9)}, num_requests=1)
    script.core.submit(TraceSteps(9, 100))
    script.submit(1, max_tokens=8)
    script.run()
    assert traces(script) == [(9, 3, True, None)]


def test_an_idle_engine_traces_nothing_until_there_is_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script({})
    whiles_idle: list[Callable[[], None]] = [
        lambda: script.core.cancel(8),
        lambda: script.core.submit(TraceSteps(9, 2)),
        lambda: script.submit(1, max_tokens=2),
        script.core.stop,
    ]
    monkeypatch.setattr(script.core._wake, "wait", lambda: whiles_idle.pop(0)())
    script.core.submit(TraceSteps(8, 2))
    script.run()
    assert traces(script) == [(8, 0, False, None), (9, 2, True, None)]


def test_an_engine_that_stops_answers_with_what_it_has_traced() -> None:
    script = Script({2: lambda s: s.core.stop()})
    script.core.submit(TraceSteps(9, 100))
    script.submit(1, max_tokens=8)
    script.run()
    assert traces(script) == [(9, 2, True, None)]
    assert not script.runner.tracer.is_on


@pytest.mark.parametrize("what", ["begin", "end"])
def test_a_profiler_that_fails_costs_the_trace_alone(
    what: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    script = Script({}, num_requests=1)

    def fail() -> None:
        raise RuntimeError("as told")

    begin_or_end = getattr(script.runner.tracer, what)
    monkeypatch.setattr(script.runner.tracer, what, fail)
    script.core.submit(TraceSteps(9, 2))
    script.submit(1)
    script.run()
    assert traces(script) == [(9, 2 if what == "end" else 0, False, "the profiler failed")]
    assert script.tokens(1) == alone(1)
    assert "as told" in caplog.text
    if what == "end":
        begin_or_end()


def test_nothing_is_learned_of_steps_that_are_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = make_scheduler()
    observed: list[float] = []
    monkeypatch.setattr(scheduler, "observe", lambda shape, seconds: observed.append(seconds))
    script = Script({}, scheduler=scheduler, num_requests=1)
    script.core.submit(TraceSteps(9, 3))
    script.submit(1)
    script.run()
    assert len(observed) == 2


def test_how_sequences_stand_is_told_between_steps() -> None:
    script = Script(
        {2: lambda s: s.core.submit(DescribeSequences(9))}, scheduler=make_scheduler(max_num_seqs=1), num_requests=3
    )
    script.submit(1)
    script.submit(2)
    script.core.submit(
        GenerationRequest(3, tuple(range(40)), SamplingParams(max_tokens=1), 0.0, leader_id=2),
    )
    script.run()
    [answer] = [p for p in script.publications if isinstance(p, SequencesDescribed)]
    assert answer.question_id == 9
    assert answer.states == {
        1: SequenceState(True, False, 5, 4, 1, 0, 0),
        2: SequenceState(False, False, 3, 0, 0, 0, 0),
        3: SequenceState(False, True, 40, 0, 0, 0, 0),
    }
