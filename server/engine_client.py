"""The event loop's side of the engine: submit and cancel go in, one publication per step comes out.

Lives on the event loop. It maps the engine's request ids to generations and turns each step's tokens into text on
their logs. What it knows of the engine's load is the last snapshot, plus what it has itself submitted since.
"""

import asyncio
import contextlib
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import anyio
import anyio.to_thread

from headrace.scheduler.config import SchedulingPolicy
from headrace.scheduler.engine_core import Engine, EngineCore, Publication, Runner
from headrace.scheduler.fair_queue import tenant_of
from headrace.scheduler.messages import (
    DescribeSequences,
    EngineReady,
    EngineStopped,
    FinishReason,
    GenerationRequest,
    LoadSnapshot,
    OneShotBatch,
    OneShotOutput,
    SequenceOutput,
    SequencesDescribed,
    SequenceState,
    StepOutput,
    StepsTraced,
    Tier,
    TraceSteps,
)
from headrace.scheduler.one_shot_runner import OneShotModel
from headrace.scheduler.scheduler import Scheduler
from headrace.server.admission import Admission, Demand, Prediction, queue_part, retry_after_s
from headrace.server.errors import (
    ApiError,
    BadRequestError,
    ConflictError,
    EngineFailedError,
    OverloadedError,
    ShutdownError,
    UnavailableError,
)
from headrace.server.generation import Generation
from headrace.server.gpu_gauges import watch_gpu
from headrace.server.journal import Journal
from headrace.server.metrics import Metrics

_Output = tuple[Generation, SequenceOutput]

_ENGINE_ENDED = "the engine has ended"
# For a step, and for what a profiler does when it ends.
_TRACE_END_S = 10.0
# Until the device is known: what a tier's first token may take beyond the prompt's own time, on a CPU and on a GPU.
_CPU_TTFT_TARGETS_S = {Tier.PREMIUM: 2.0, Tier.STANDARD: 8.0, Tier.BATCH: 60.0}
_GPU_TTFT_TARGETS_S = {Tier.PREMIUM: 0.5, Tier.STANDARD: 2.0, Tier.BATCH: 30.0}


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """What may wait at most: sequences, their prompts' tokens, and bytes of requests that are being tokenized."""

    num_requests: int = 1024
    num_tokens: int = 2**22
    num_bytes: int = 2**28


class EngineClient:
    """Owns the engine thread and every generation that is not over."""

    def __init__(
        self,
        load_engine: Callable[[], tuple[Scheduler, Runner]],
        *,
        model_name: str,
        limits: QueueLimits,
        tier_weights: Mapping[Tier, float] | None = None,
        ttft_targets_s: Mapping[Tier, float] | None = None,
        clock: Callable[[], float] = time.monotonic,
        make_engine: Callable[..., Engine] = EngineCore,
        load_one_shots: Callable[[], Mapping[str, OneShotModel]] = dict,
        journal: Journal | None = None,
    ) -> None:
        """`ttft_targets_s` None takes those of the device. What comes of a generation with a journal passes through
        that first: `journal` is for new ones, and among `journals` are those that were taken over."""
        self.clock = clock
        self.journal = journal
        self.journals = [] if journal is None else [journal]
        self.ready: EngineReady | None = None
        self.is_draining = False
        self.error: Exception | None = None
        self.settled = anyio.Event()  # the engine is ready, or has ended without ever being so
        self.stopped = anyio.Event()
        self.load = LoadSnapshot()
        self._limits = limits
        self._ttft_targets_s = ttft_targets_s
        self.admission = Admission(tier_weights or SchedulingPolicy().tier_weights, clock)
        self._num_submitted = 0
        self._num_reserved: Counter[str] = Counter()  # by tenant
        self._num_reserved_bytes = 0
        self._ids = itertools.count()
        self._generations: dict[int, Generation] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._batches: dict[int, asyncio.Future[OneShotOutput]] = {}
        self._questions: dict[int, asyncio.Future[Any]] = {}
        self._is_tracing = False
        self._engine = make_engine(load_engine, self._publish, clock, load_one_shots)
        self.metrics = Metrics(model_name, lambda: self.load, lambda: self.num_waiting)
        admission = self.admission
        for tier in Tier:
            self.metrics.watch_tier(
                tier,
                partial(admission.num_queued, tier),
                partial(self.predicted_ttft_s, tier),
                partial(self._ttft_target_s, tier),
            )
        self.metrics.watch("queued_prompt_tokens", "Prompt tokens not begun", lambda: admission.num_queued_tokens)
        self.metrics.watch("ttft_kappa", "How far predictions are stretched", lambda: admission.kappa)

    @property
    def num_waiting(self) -> int:
        """Requests accepted and not yet running: the snapshot's, the inbox's, and those still being tokenized."""
        return self.load.num_waiting + self._num_submitted - self.load.num_received + self.num_tokenizing

    @property
    def num_tokenizing(self) -> int:
        """Sequences whose places are held while their prompts are tokenized."""
        return self._num_reserved.total()

    @property
    def num_unfinished(self) -> int:
        return len(self._generations)

    @property
    def unfinished(self) -> list[Generation]:
        return list(self._generations.values())

    def predicted_ttft_s(self, tier: Tier) -> float:
        """See `Admission.predict_longest`."""
        return self.admission.predict_longest(self.load, tier)

    def _ttft_target_s(self, tier: Tier) -> float:
        return self.admission.targets_s[tier]

    def start(self) -> None:
        """Start the engine thread; its publications arrive on the running loop."""
        self._loop = asyncio.get_running_loop()
        self._engine.start()

    async def stop(self, timeout_s: float) -> None:
        """End the engine thread; generations that still run end with an error.

        A thread that is still loading, or hangs in a step, is not waited for beyond `timeout_s`: see `has_thread`.
        """
        self._engine.stop()
        with anyio.move_on_after(timeout_s):
            await self.stopped.wait()
            await anyio.to_thread.run_sync(self._engine.join)

    @property
    def engine_busy_since_s(self) -> float | None:
        """Since when the engine has been at what it computes now; None while it waits, loads, or has ended."""
        return self._engine.busy_since_s

    @property
    def has_thread(self) -> bool:
        """Whether the engine thread is alive, as it may be after `stop`."""
        return not self._engine.join(0)

    @contextmanager
    def reserve(self, demand: Demand, num_bytes: int) -> Iterator[None]:
        """Hold places in the queue while prompts are tokenized, until `submit`; how many tokens they have is not known.

        Raises: UnavailableError while loading, draining or after the engine has ended; OverloadedError where the
        queue is full; BadRequestError where an empty one would be too short.
        """
        self.check_accepting()
        # Who can start at once does not wait: with nobody in the engine's queue, that is one for each free place.
        assert self.ready is not None
        limits, num_sequences = self._limits, demand.num_sequences
        num_startable = 0 if self.load.num_waiting else self.ready.max_num_seqs - self.load.num_running
        if num_sequences > limits.num_requests + self.ready.max_num_seqs:
            raise BadRequestError(f"{num_sequences} answers at once are more than this server can queue")
        full = ""
        is_full = self.num_waiting + num_sequences > limits.num_requests + num_startable
        num_own, num_own_tokens = self.admission.num_queued_of(demand)
        num_own += self._num_reserved[demand.tenant] + num_sequences
        # Of a full queue each tenant that waits may hold its part: who floods it shuts himself out, and nobody else.
        part = queue_part(demand.tenant, self.admission.waiting_tenants() | self._num_reserved.keys())
        if is_full and num_own > limits.num_requests * part:
            full = f"{self.num_waiting} requests are waiting already"
        elif self.admission.num_queued_tokens > limits.num_tokens and num_own_tokens > limits.num_tokens * part:
            full = f"{self.admission.num_queued_tokens} prompt tokens are waiting already"
        elif self._num_reserved_bytes and self._num_reserved_bytes + num_bytes > limits.num_bytes:
            full = f"{self._num_reserved_bytes} bytes of requests are being read already"
        if full:
            self.metrics.count_shed(demand.tier, "queue_full")
            prediction = self.admission.predict(self.load, demand)
            raise OverloadedError(
                full,
                retry_after_s(prediction.ttft_s),
                code="queue_full",
                tier=demand.tier,
                predicted_ttft_s=prediction.ttft_s,
                target_ttft_s=prediction.target_s,
            )
        self._num_reserved[demand.tenant] += num_sequences
        self._num_reserved_bytes += num_bytes
        try:
            yield
        finally:
            self._num_reserved[demand.tenant] -= num_sequences
            if not self._num_reserved[demand.tenant]:
                del self._num_reserved[demand.tenant]
            self._num_reserved_bytes -= num_bytes

    def admit(self, demand: Demand) -> Prediction:
        """Decide on a tokenized request; the caller submits its sequences before it awaits anything.

        Raises: OverloadedError where its first token would come too late.
        """
        try:
            return self.admission.admit(self.load, demand)
        except OverloadedError:
            self.metrics.count_shed(demand.tier, "predicted_too_late")
            raise

    def next_request_id(self) -> int:
        return next(self._ids)

    def submit(self, request: GenerationRequest, generation: Generation) -> None:
        """Accept a request: from here on it ends with exactly one terminal entry in its generation's log.

        Raises: UnavailableError where the server began to drain, or the engine ended, since `reserve`.
        """
        self.check_accepting()
        if generation.num_output_tokens == 0:  # else an earlier process was asked first
            generation.stages.submitted_s = self.clock()
        generation.tenant = tenant_of(request.tenant)
        generation.on_end.insert(0, self._forget)
        self._generations[request.request_id] = generation
        num_tokens = generation.num_prompt_tokens if request.leader_id is None else 0
        demand = Demand(request.tier, request.tenant, request.weight, num_tokens)
        self.admission.enter(request.request_id, demand)
        self._num_submitted += 1
        if generation.choice == 0:
            self.metrics.count_prompt(generation.tenant, generation.num_prompt_tokens)
        self._engine.submit(request)

    async def compute(self, model: str, inputs: Sequence[Any]) -> OneShotOutput:
        """Have a one-shot model compute a batch; where the caller is cancelled, the batch is.

        Raises: UnavailableError where the engine has ended; EngineFailedError where it fails, or ends meanwhile.
        """
        if self.stopped.is_set():
            raise _engine_dead()
        batch_id = self.next_request_id()
        future: asyncio.Future[OneShotOutput] = asyncio.get_running_loop().create_future()
        self._batches[batch_id] = future
        self._engine.submit(OneShotBatch(batch_id, model, tuple(inputs)))
        try:
            output = await future
        except asyncio.CancelledError:
            self._engine.cancel(batch_id)
            raise
        finally:
            del self._batches[batch_id]
        if output.error is not None:
            raise EngineFailedError(output.error)
        return output

    async def trace(self, num_steps: int, timeout_s: float) -> StepsTraced:
        """Have the engine trace its next steps, those at most that it makes in `timeout_s`; where the caller is
        cancelled, the trace is.

        Raises: ConflictError beside another trace; UnavailableError where the engine has ended; EngineFailedError where
        the trace fails, or the engine does not answer.
        """
        if self._is_tracing:
            raise ConflictError("steps are being traced already", "tracing")
        question_id = self.next_request_id()
        answer = self._ask(TraceSteps(question_id, num_steps))
        # Until the engine has answered, whether somebody still waits for that or not.
        self._is_tracing = True
        answer.add_done_callback(self._forget_trace)
        try:
            await asyncio.wait([answer], timeout=timeout_s)
        finally:
            if not answer.done():
                self._engine.cancel(question_id)
        await asyncio.wait([answer], timeout=_TRACE_END_S)
        traced: StepsTraced | None = answer.result() if answer.done() else None
        if traced is None or traced.error is not None:
            raise EngineFailedError("the engine does not answer" if traced is None else str(traced.error))
        return traced

    def _forget_trace(self, answer: object) -> None:
        self._is_tracing = False

    async def describe(self, timeout_s: float) -> Mapping[int, SequenceState] | None:
        """How the engine's sequences stand, by request id; None where it does not say so in time.

        Raises: UnavailableError where it has ended.
        """
        answer = self._ask(DescribeSequences(self.next_request_id()))
        await asyncio.wait([answer], timeout=timeout_s)
        described: SequencesDescribed | None = answer.result() if answer.done() else None
        return None if described is None else described.states

    def _ask(self, question: TraceSteps | DescribeSequences) -> asyncio.Future[Any]:
        """The answer, None where the engine ends without one. Raises: UnavailableError where it has ended."""
        if self.stopped.is_set():
            raise _engine_dead()
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._questions[question.question_id] = answer
        self._engine.submit(question)
        return answer

    def cancel(self, generation: Generation, error: ApiError | None = None) -> None:
        """End a generation now; the engine frees its blocks within a step. Without effect on one that is over or has
        been cancelled before.

        `error` is what its readers are told, where it was not their doing. One with a journal ends a moment later,
        when its end is in that, behind all that was put there before.
        """
        if generation.is_over or generation.is_cancelled:
            return
        generation.is_cancelled = True
        self._engine.cancel(generation.request_id)
        if generation.journal is None:
            generation.end(FinishReason.CANCELLED, self.clock(), error)
            return
        self.admission.leave(generation.request_id)  # which would else wait for the disk
        output = SequenceOutput(generation.request_id, finish_reason=FinishReason.CANCELLED)
        if error is not None:
            output = output._replace(finish_reason=FinishReason.ERROR, error=error.message)
        self._record([(generation, output)])

    async def end(self, generation: Generation) -> None:
        """Cancel a generation and wait until it is over, as one with a journal is not at once."""
        if not generation.is_over:
            ended = anyio.Event()
            generation.on_end.append(lambda _: ended.set())
            self.cancel(generation)
            await ended.wait()

    def cancel_all(self, error: ApiError) -> None:
        for generation in list(self._generations.values()):
            self.cancel(generation, error)

    def interrupt_all(self) -> None:
        """End everything because the server does; the next process goes on with what is in the journal.

        What was put into the journal until now is still recorded: readers come back to a log that is no shorter than
        theirs.
        """
        for journal in self.journals:
            journal.suspend()  # before the engine speaks of what follows
        for generation in list(self._generations.values()):
            self._engine.cancel(generation.request_id)
            error = ShutdownError(is_resumable=generation.journal is not None and generation.journal.is_active)
            generation.end(FinishReason.CANCELLED, self.clock(), error)

    def queue_position(self, generation: Generation) -> tuple[int, float | None] | None:
        """(Place in the queue from 1, estimated seconds to wait or None), None once it has been scheduled."""
        found = self.admission.position(self.load, generation.request_id)
        return None if found is None else (found[0], found[1] or None)

    def check_accepting(self) -> None:
        """Raises: UnavailableError while loading, draining or after the engine has ended."""
        if self.stopped.is_set():
            raise _engine_dead()
        if self.is_draining:
            raise UnavailableError("the server is shutting down", "draining")
        if self.ready is None:
            raise UnavailableError("the model is still loading", "loading")

    def call_soon(self, callback: Callable[..., None], *args: Any) -> None:
        """Have the loop call this; from any thread."""
        assert self._loop is not None
        # Where the loop has been closed nobody is left to tell.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(callback, *args)

    def _publish(self, publication: Publication) -> None:
        """Carry a publication to the loop; runs on the engine thread."""
        self.call_soon(self.receive, publication)

    def receive(self, publication: Publication) -> None:
        """Take what the engine publishes; runs on the loop."""
        match publication:
            case StepOutput():
                self._receive_step(publication)
            case OneShotOutput():
                future = self._batches.get(publication.batch_id)
                if future is not None and not future.done():
                    future.set_result(publication)
            case StepsTraced() | SequencesDescribed():
                self._questions.pop(publication.question_id).set_result(publication)
            case EngineReady():
                self.ready = publication
                for one_shot in publication.one_shots:
                    self.metrics.set_model_bytes(one_shot.name, one_shot.num_bytes)
                self.load = publication.load
                on_device = _CPU_TTFT_TARGETS_S if publication.gpu_uuid is None else _GPU_TTFT_TARGETS_S
                self.admission.targets_s = self._ttft_targets_s or on_device
                self.settled.set()
                if publication.gpu_uuid is not None:
                    watch_gpu(self.metrics, publication.gpu_uuid)
            case EngineStopped():
                self.error = publication.error
                self.stopped.set()
                self.settled.set()
                num_blocks = self.load.num_total_blocks
                self.load = LoadSnapshot(
                    num_received=self._num_submitted, num_total_blocks=num_blocks, num_free_blocks=num_blocks
                )
                end = SequenceOutput(-1, finish_reason=FinishReason.ERROR, error=_ENGINE_ENDED)
                self._hand_out([(each, end._replace(request_id=id)) for id, each in self._generations.items()])
                for future in self._batches.values():
                    if not future.done():
                        future.set_exception(EngineFailedError(_ENGINE_ENDED))
                while self._questions:
                    self._questions.popitem()[1].set_result(None)

    def _receive_step(self, step: StepOutput) -> None:
        self.load = step.load
        if step.pauses is not None:
            self.metrics.observe_pauses(step.pauses)
        now = self.clock()
        outputs: list[_Output] = []
        for output in step.outputs:
            generation = self._generations.get(output.request_id)
            if generation is None or generation.is_cancelled:
                continue  # cancelled or stopped on this side, and the engine had not heard yet
            self._note_progress(generation, output, now)
            outputs.append((generation, output))
        self._hand_out(outputs)

    def _note_progress(self, generation: Generation, output: SequenceOutput, now: float) -> None:
        """Keep admission's books, which are about the engine, whatever holds up the journal."""
        submitted_s, predicted_s = generation.stages.submitted_s, generation.predicted_ttft_s
        if output.scheduled_s is not None:
            self.admission.leave(generation.request_id, output.num_cached_tokens)
            if submitted_s is not None and generation.num_output_tokens == 0:
                self.metrics.queue_time[generation.tier].observe(output.scheduled_s - submitted_s)
        elif output.finish_reason is not None:
            self.admission.leave(generation.request_id)
        if output.token_ids and predicted_s is not None and submitted_s is not None:
            self.admission.observe(predicted_s, now - submitted_s)
            generation.predicted_ttft_s = None

    def _hand_out(self, outputs: list[_Output]) -> None:
        recorded = [each for each in outputs if each[0].journal is not None]
        if recorded:
            self._record(recorded)
            outputs = [each for each in outputs if each[0].journal is None]
        self._receive_outputs(outputs)

    def _record(self, outputs: list[_Output]) -> None:
        """Have outputs of generations with a journal received once they are in it."""
        for journal in {generation.journal for generation, _ in outputs}:
            assert journal is not None
            own = [each for each in outputs if each[0].journal is journal]
            journal.record([output for _, output in own], partial(self.call_soon, self._receive_outputs, own))

    def _receive_outputs(self, outputs: list[_Output]) -> None:
        now = self.clock()
        num_tokens: Counter[str] = Counter()  # by tenant
        last_tokens_s: list[tuple[Tier, float]] = []  # of each stream that has one more
        for generation, output in outputs:
            if generation.is_over:
                continue  # since the journal was asked
            if output.token_ids:
                num_tokens[generation.tenant] += len(output.token_ids)
                if (last_token_s := generation.stages.last_token_s) is not None:
                    last_tokens_s.append((generation.tier, last_token_s))
                else:
                    self.metrics.ttft[generation.tier].observe(now - generation.stages.received_s)
            generation.receive(output, now)
            if (terminal := generation.log.terminal) is not None and output.finish_reason is None:
                self._engine.cancel(output.request_id)  # a stop string, which the engine cannot see
                if generation.journal is not None:
                    error = None if terminal.error is None else terminal.error.message
                    end = SequenceOutput(output.request_id, finish_reason=terminal.finish_reason, error=error)
                    self._record([(generation, end)])
        self.metrics.count_generated(num_tokens)
        for (tier, last_token_s), count in Counter(last_tokens_s).items():
            self.metrics.itl[tier].observe(now - last_token_s, count)

    def _forget(self, generation: Generation) -> None:
        del self._generations[generation.request_id]
        self.admission.leave(generation.request_id)
        self.metrics.observe_end(generation)


def _engine_dead() -> UnavailableError:
    return UnavailableError(_ENGINE_ENDED, "engine_dead", retry_after_s=None)
