"""The engine thread: drain the inbox, schedule, run, update, publish, once per step.

Everything it owns (scheduler, blocks, model runner) is made, used and dropped on this one thread. Others reach it
through an inbox and a wake event, and hear from it through one `publish` call per step. It knows neither asyncio nor
who listens.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence as Seq
from typing import Protocol

from headrace.kernels.step_times import StepTimes
from headrace.scheduler.errors import HeadraceError
from headrace.scheduler.messages import (
    EngineReady,
    EngineStopped,
    GenerationRequest,
    RowResult,
    SequenceOutput,
    StepOutput,
    StepPauses,
)
from headrace.scheduler.scheduler import Scheduler, SchedulerOutput

logger = logging.getLogger(__name__)

Publication = EngineReady | StepOutput | EngineStopped


class Runner(Protocol):
    """What computes a step: the model runner, or a fake. `times` are the last step's, None where only its caller can
    tell."""

    description: str
    max_context_tokens: int
    vocab_size: int

    @property
    def times(self) -> StepTimes | None: ...

    def warm_up(self) -> None: ...

    def use_idle_time(self) -> bool:
        """Do a few milliseconds of what later steps are quicker for; returns whether there was something to do."""

    def run(self, output: SchedulerOutput) -> Seq[RowResult]:
        """Compute all rows."""


class EngineCore:
    """Runs a scheduler and a runner on a thread of its own.

    `load` is called on that thread to build both. `publish` is called on that thread too and must return at once; it
    gets one EngineReady, then a StepOutput per step, and one EngineStopped as the last thing.
    """

    def __init__(
        self,
        load: Callable[[], tuple[Scheduler, Runner]],
        publish: Callable[[Publication], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._load = load
        self._publish = publish
        self._clock = clock
        self._inbox: deque[GenerationRequest | int | None] = deque()  # to submit, to cancel, to stop
        self._wake = threading.Event()
        self._is_stopping = False
        self._busy_s = 0.0
        self._computed_s: float | None = None  # when the last step was, unless there has been nothing to do since
        self._pauses: StepPauses | None = None  # around the last step
        self._thread = threading.Thread(target=self._main, name="headrace-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, request: GenerationRequest) -> None:
        """Hand over a request; from any thread. Its outputs come with later StepOutputs."""
        self._inbox.append(request)
        self._wake.set()

    def cancel(self, request_id: int) -> None:
        """Ask for a request's end; from any thread. A request that is already over is left alone."""
        self._inbox.append(request_id)
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

    def _main(self) -> None:
        error: Exception | None = None
        try:
            scheduler, runner = self._load()
            runner.warm_up()
            ready = EngineReady(
                runner.max_context_tokens,
                scheduler.max_num_seqs,
                runner.vocab_size,
                runner.description,
                scheduler.load(),
            )
            self._publish(ready)
            self._loop(scheduler, runner)
        except HeadraceError as exception:
            error = exception  # the operator's to mend, and said where the server ends
        except BaseException as exception:  # whatever ends this thread, the streams must hear of it
            logger.exception("the engine thread ended")
            error = exception if isinstance(exception, Exception) else RuntimeError(repr(exception))
        self._publish(EngineStopped(error))

    def _loop(self, scheduler: Scheduler, runner: Runner) -> None:
        while True:
            self._drain_inbox(scheduler)
            if self._is_stopping:
                break
            if not scheduler.has_work:
                scheduler.check_books()
                self._computed_s = None
                self._use_idle_time(runner)
                self._wake.wait()
                continue
            started_s = self._clock()
            output = scheduler.schedule(started_s)
            outputs = output.dropped + self._step(scheduler, runner, output)
            self._busy_s += self._clock() - started_s
            self._publish(StepOutput(tuple(outputs), scheduler.load(self._busy_s), self._pauses))
        outputs = scheduler.fail_all("the server is shutting down")
        self._publish(StepOutput(tuple(outputs), scheduler.load(self._busy_s)))

    def _use_idle_time(self, runner: Runner) -> None:
        try:
            while not self._wake.is_set() and runner.use_idle_time():
                pass
        except Exception:  # of work that nobody has asked for
            logger.exception("what the engine does in idle time failed")

    def _drain_inbox(self, scheduler: Scheduler) -> None:
        # Cleared before draining: what arrives after the last pop sets it again, so no wake-up is lost.
        self._wake.clear()
        while self._inbox:
            item = self._inbox.popleft()
            if item is None:
                self._is_stopping = True
            elif isinstance(item, GenerationRequest):
                scheduler.add(item)
            else:
                scheduler.cancel(item)

    def _step(self, scheduler: Scheduler, runner: Runner, output: SchedulerOutput) -> list[SequenceOutput]:
        """Run and record one step. A step that raises ends its own sequences; the engine goes on."""
        self._pauses = None
        if not output.rows:
            return []
        began_s = self._clock()
        try:
            results = runner.run(output)
        except Exception:
            logger.exception("a step of %d sequences raised", len(output.rows))
            self._computed_s = None
            return scheduler.fail(
                [row.sequence for row in output.rows], "the model failed while computing this request"
            )
        ended_s = self._clock()
        times = runner.times or StepTimes(began_s, ended_s, None)
        gap_s = None if self._computed_s is None else times.began_s - self._computed_s
        self._pauses = StepPauses(gap_s, times.lock_wait_s)
        self._computed_s = times.ended_s
        return scheduler.update(output, results)
