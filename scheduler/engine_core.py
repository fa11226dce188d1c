"""The engine thread: drain the inbox, schedule, launch, record, publish, once per step.

Between steps, and between the layers of what they compute, one-shot models have their turn (see one_shot_runner).
A runner that computes while this thread goes on (a GPU's) is given the next step before what the one before sampled is
read, so that it never waits for this thread; that step is recorded while the next one runs.
Everything it owns (scheduler, blocks, model runner) is made, used and dropped on this one thread. Others reach it
through an inbox and a wake event, and hear from it through one `publish` call per step. It knows neither asyncio nor
who listens.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence as Seq
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from headrace.kernels.step_times import StepTimes
from headrace.scheduler.errors import HeadraceError
from headrace.scheduler.messages import (
    DescribeSequences,
    EngineReady,
    EngineStopped,
    OneShotBatch,
    OneShotOutput,
    RowResult,
    SequenceOutput,
    SequencesDescribed,
    StepOutput,
    StepPauses,
    StepsTraced,
    Submission,
    TraceSteps,
)
from headrace.scheduler.one_shot_runner import AbandonedError, OneShotModel, OneShotRunner
from headrace.scheduler.scheduler import ScheduledRow, Scheduler, SchedulerOutput
from headrace.scheduler.sequence import SequenceStatus
from headrace.scheduler.step_time import StepShape
from headrace.scheduler.step_tracer import StepTrace, StepTracer

logger = logging.getLogger(__name__)

Publication = EngineReady | StepOutput | OneShotOutput | StepsTraced | SequencesDescribed | EngineStopped

_FAILED = "the model failed while computing this request"
_UNKNOWN_SHAPE = StepShape(0, 0, 0)  # of rows taken out of their step


class LaunchedStep(Protocol):
    """A step that a runner computes, or has computed. `times` are known once it has been waited for, None where only
    the caller can tell."""

    @property
    def times(self) -> StepTimes | None: ...

    def wait(self) -> Seq[RowResult]:
        """Block until every row is computed. Raises: what computing it raised."""


@dataclass(frozen=True, slots=True)
class ComputedStep:
    """A step of a runner that computes it in `launch`."""

    results: Seq[RowResult]
    times: StepTimes | None = None

    def wait(self) -> Seq[RowResult]:
        return self.results


@dataclass(frozen=True, slots=True)
class _RaisedStep:
    """A step that could not be launched."""

    error: Exception
    times: StepTimes | None = None

    def wait(self) -> Seq[RowResult]:
        raise self.error


class Runner(Protocol):
    """What computes steps: the model runner, or a fake. Where it `is_asynchronous`, `launch` returns before its step is
    computed, and may be called once more before that step is waited for; steps are computed in their order."""

    description: str
    gpu_uuid: str | None
    max_context_tokens: int
    vocab_size: int
    tracer: StepTracer

    @property
    def is_asynchronous(self) -> bool: ...

    def warm_up(self) -> Seq[tuple[StepShape, float]]:
        """Compute some steps for nobody, and say what shape they had and how many seconds they took."""

    def use_idle_time(self) -> bool:
        """Do a few milliseconds of what later steps are quicker for; returns whether there was something to do."""

    def watch(self, on_loss: Callable[[], None], /) -> None:
        """Have `on_loss` called, from any thread, when what computes steps is lost: `recover` then says so."""

    def launch(self, output: SchedulerOutput) -> LaunchedStep:
        """Begin to compute all rows. What of the sequences it needs it reads before it returns."""

    def recover(self) -> None:
        """Make ready for the next step after one that raised. Raises: DeviceLostError where there can be none."""


class _Step(NamedTuple):
    """A launched step that is not recorded yet."""

    output: SchedulerOutput
    launched: LaunchedStep
    launched_s: float


def _wait(step: _Step, *, is_logged: bool) -> Seq[RowResult] | None:
    """What a step computed, None where it raised."""
    try:
        return step.launched.wait()
    except Exception as error:
        if is_logged:
            logger.exception("a step of %d sequences raised", len(step.output.rows))
        # Its frames hold what was computed until then, and the memory may be what the next try lacks.
        error.__traceback__ = None
        return None


class Engine(Protocol):
    """What the event loop asks of an engine: this thread, or a simulated one.

    `busy_since_s` is since when, on its clock, it has been at what it computes now, a step, a layer of a one-shot model
    or a piece of idle work; None while it waits, before it is ready and after its end.
    """

    @property
    def busy_since_s(self) -> float | None: ...

    def start(self) -> None: ...

    def submit(self, submission: Submission) -> None: ...

    def cancel(self, request_id: int) -> None: ...

    def stop(self) -> None: ...

    def join(self, timeout_s: float | None = None) -> bool: ...


class EngineCore:
    """Runs a scheduler and a runner on a thread of its own, and one-shot models beside them.

    `load` is called on that thread to build both, and before it `load_one_shots` for the models by their names: what
    memory they leave is the KV cache's. `publish` is called on that thread too and must return at once; it gets one
    EngineReady, then a StepOutput per step, a OneShotOutput per batch and an answer per question, and one EngineStopped
    as the last thing.
    """

    def __init__(
        self,
        load: Callable[[], tuple[Scheduler, Runner]],
        publish: Callable[[Publication], None],
        clock: Callable[[], float] = time.monotonic,
        load_one_shots: Callable[[], Mapping[str, OneShotModel]] = dict,
    ) -> None:
        self._load = load
        self._load_one_shots = load_one_shots
        self._publish = publish
        self._clock = clock
        self._inbox: deque[Submission | None] = deque()  # to submit, to stop
        self._cancels: deque[int] = deque()
        self._wake = threading.Event()
        self._is_stopping = False
        self._is_loss_heard = False
        self.busy_since_s: float | None = None  # written by the engine thread, read by any
        self._busy_s = 0.0
        self._before: _Step | None = None  # in flight
        self._computed_s: float | None = None  # when the last step was, unless there has been nothing to do since
        self._pauses: StepPauses | None = None  # around the step recorded last
        self._tracing: TraceSteps | None = None
        self._num_traced = 0  # of its steps
        self._thread = threading.Thread(target=self._main, name="headrace-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, submission: Submission) -> None:
        """Hand over a request, a batch or a question; from any thread. A request's outputs come with later StepOutputs.

        Of traces the next is asked for when the one before has been answered.
        """
        self._inbox.append(submission)
        self._wake.set()

    def cancel(self, request_id: int) -> None:
        """Ask for a request's, a batch's or a trace's end; from any thread. One that is already over is left alone."""
        self._cancels.append(request_id)
        self._wake.set()

    def stop(self) -> None:
        """Ask the thread to end; what still runs ends with an error. Join with `join()`."""
        self._inbox.append(None)
        self._wake.set()

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait for the thread's end; returns whether it has ended."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _hear_of_loss(self) -> None:
        self._is_loss_heard = True
        self._wake.set()

    def _main(self) -> None:
        error: Exception | None = None
        try:
            models = self._load_one_shots()
            scheduler, runner = self._load()
            one_shots = OneShotRunner(models, self._clock, scheduler.policy.one_shot_share)
            for shape, seconds in runner.warm_up():
                scheduler.observe(shape, seconds)
            ready = EngineReady(
                runner.max_context_tokens,
                scheduler.max_num_seqs,
                runner.vocab_size,
                runner.description,
                runner.gpu_uuid,
                scheduler.load(),
                one_shots.ready,
            )
            self._publish(ready)
            runner.watch(self._hear_of_loss)
            self._loop(scheduler, runner, one_shots)
        except HeadraceError as exception:
            error = exception  # the operator's to mend, and said where the server ends
        except BaseException as exception:  # whatever ends this thread, the streams must hear of it
            logger.exception("the engine thread ended")
            error = exception if isinstance(exception, Exception) else RuntimeError(repr(exception))
        self.busy_since_s = None
        self._publish(EngineStopped(error))

    def _loop(self, scheduler: Scheduler, runner: Runner, one_shots: OneShotRunner) -> None:
        def serve_streams() -> None:
            """Make the steps that are due before a one-shot model's next layer. Raises: AbandonedError at the end."""
            while True:
                if self._wake.is_set():
                    self._drain_inbox(scheduler, runner, one_shots)
                if self._is_stopping:
                    raise AbandonedError
                has_streams = scheduler.has_work or self._before is not None
                if not has_streams:
                    self._computed_s = None
                if one_shots.may_go_on(has_streams=has_streams, is_prompt_waiting=scheduler.has_prompts):
                    self.busy_since_s = self._clock()
                    return
                began_s = self._clock()
                self._step(scheduler, runner, one_shots.share)
                one_shots.earn(self._clock() - began_s)

        while True:
            self._drain_inbox(scheduler, runner, one_shots)
            if self._is_stopping:
                break
            if one_shots.has_work:
                self._publish(one_shots.run(serve_streams))
            elif scheduler.has_work or self._before is not None:
                self._step(scheduler, runner)
            else:
                scheduler.check_books()
                self._computed_s = None
                self._use_idle_time(runner)
                self.busy_since_s = None
                self._wake.wait()
        outputs = self._record(scheduler, runner, self._before) if self._before is not None else []
        if self._tracing is not None:
            self._end_trace(runner)
        outputs += scheduler.fail_all("the server is shutting down")
        self._publish(StepOutput(tuple(outputs), scheduler.load(self._busy_s)))

    def _step(self, scheduler: Scheduler, runner: Runner, other_share: float = 0.0) -> None:
        """Make a step and publish it. One-shot models have `other_share` of the time."""
        before, self._before = self._before, None
        scheduler.other_share = other_share
        self.busy_since_s = started_s = self._clock()
        if self._tracing is not None and not runner.tracer.is_on:
            self._begin_trace(runner)
        span = runner.tracer.range
        outputs: list[SequenceOutput] = []
        self._pauses = None
        if before is not None and scheduler.may_preempt:
            outputs += self._record(scheduler, runner, before)
            before = None
        with span("schedule"):
            output = scheduler.schedule(started_s)
        outputs += output.dropped
        step = self._launch(runner, output) if output.rows else None
        if before is not None:
            outputs += self._record(scheduler, runner, before)
        if step is not None and (not runner.is_asynchronous or isinstance(step.launched, _RaisedStep)):
            outputs += self._record(scheduler, runner, step)
            step = None
        self._before = step
        with span("publish"):
            self._publish(StepOutput(tuple(outputs), scheduler.load(self._busy_s), self._pauses))
        if runner.tracer.is_on:
            self._num_traced += bool(output.rows)
            if self._tracing is not None and self._num_traced == self._tracing.num_steps:
                self._end_trace(runner)

    def _begin_trace(self, runner: Runner) -> None:
        try:
            runner.tracer.begin()
        except Exception:
            logger.exception("a trace could not be begun")
            self._end_trace(runner, "the profiler failed")

    def _end_trace(self, runner: Runner, error: str | None = None) -> None:
        """Answer with what has been recorded, if anything has."""
        assert self._tracing is not None
        trace: StepTrace | None = None
        try:
            trace = runner.tracer.end() if runner.tracer.is_on else None
        except Exception:
            logger.exception("a trace could not be ended")
            error = "the profiler failed"
        tracing, self._tracing = self._tracing, None
        self._publish(StepsTraced(tracing.question_id, self._num_traced, trace, error))

    def _use_idle_time(self, runner: Runner) -> None:
        try:
            while not self._wake.is_set():
                self.busy_since_s = self._clock()
                if not runner.use_idle_time():
                    break
        except Exception:  # of work that nobody has asked for
            logger.exception("what the engine does in idle time failed")

    def _drain_inbox(self, scheduler: Scheduler, runner: Runner, one_shots: OneShotRunner) -> None:
        """Take what others have sent. Raises: DeviceLostError where that is what was heard."""
        # Cleared before draining: what arrives after the last pop sets it again, so no wake-up is lost.
        self._wake.clear()
        if self._is_loss_heard:
            runner.recover()
        # Taken first and acted on last: whatever they name has been submitted before them.
        cancels = [self._cancels.popleft() for _ in range(len(self._cancels))]
        while self._inbox:
            match submission := self._inbox.popleft():
                case None:
                    self._is_stopping = True
                case OneShotBatch():
                    one_shots.add(submission)
                case TraceSteps():
                    self._tracing, self._num_traced = submission, 0
                case DescribeSequences():
                    self._publish(SequencesDescribed(submission.question_id, scheduler.describe()))
                case _:
                    scheduler.add(submission)
        scheduler.cancel(*cancels)
        one_shots.cancel(cancels)
        if self._tracing is not None and self._tracing.question_id in cancels:
            self._end_trace(runner)

    def _launch(self, runner: Runner, output: SchedulerOutput) -> _Step:
        began_s = self._clock()
        try:
            with runner.tracer.range("launch"):
                return _Step(output, runner.launch(output), began_s)
        except Exception as error:
            return _Step(output, _RaisedStep(error), began_s)

    def _record(self, scheduler: Scheduler, runner: Runner, step: _Step) -> list[SequenceOutput]:
        """Wait for a step and record it. One that raises ends those of its own sequences that it raises for; the engine
        goes on. Raises: DeviceLostError."""
        with runner.tracer.range("wait"):
            results = _wait(step, is_logged=True)
        if results is None:
            self._pauses = self._computed_s = None
            runner.recover()
            if runner.is_asynchronous and not isinstance(step.launched, _RaisedStep):
                # The device's own error, heard of late: the next step may be in flight, made of what this one left.
                return scheduler.fail([row.sequence for row in step.output.rows], _FAILED)
            return self._compute_again(scheduler, runner, step.output.rows)
        ended_s = self._clock()
        # The caller can tell no more than that a step begins when it is launched and the one before it has ended.
        times = step.launched.times or StepTimes(max(step.launched_s, self._computed_s or 0.0), ended_s, None)
        gap_s = None if self._computed_s is None else max(0.0, times.began_s - self._computed_s)
        self._pauses = StepPauses(gap_s, times.lock_wait_s)
        self._busy_s += times.ended_s - times.began_s
        self._computed_s = times.ended_s
        with runner.tracer.range("update"):
            # Of steps that are recorded, and slower for it, nothing is to be learned.
            return scheduler.update(step.output, results, times, is_observed=not runner.tracer.is_on)

    def _compute_again(self, scheduler: Scheduler, runner: Runner, rows: list[ScheduledRow]) -> list[SequenceOutput]:
        """Record rows of a step that raised, computed in halves, and these in halves where they raise again, down to
        the rows that raise alone, whose sequences end. Raises: DeviceLostError.

        Nothing is in flight: all tokens are known, and a row writes to the cache what it has written there before.
        """
        # What the step before ended has no blocks any more.
        rows = [row for row in rows if row.sequence.status is not SequenceStatus.FINISHED]
        middle = len(rows) // 2
        outputs: list[SequenceOutput] = []
        for half in filter(None, (rows[:middle], rows[middle:])):
            self.busy_since_s = began_s = self._clock()
            step = self._launch(runner, SchedulerOutput(half, [], _UNKNOWN_SHAPE))
            results = _wait(step, is_logged=False)
            if results is not None:
                times = StepTimes(began_s, self._clock(), None)
                self._busy_s += times.ended_s - began_s
                outputs += scheduler.update(step.output, results, times, is_observed=False)
                continue
            runner.recover()
            if len(half) > 1:
                outputs += self._compute_again(scheduler, runner, half)
            else:
                outputs += scheduler.fail([half[0].sequence], _FAILED)
        return outputs
