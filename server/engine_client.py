"""The event loop's side of the engine: submit and cancel go in, one publication per step comes out.

Lives on the event loop. It maps the engine's request ids to generations and turns each step's tokens into text on
their logs. What it knows of the engine's load is the last snapshot, plus what it has itself submitted since.
"""

import asyncio
import contextlib
import itertools
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import anyio
import anyio.to_thread

from headrace.scheduler.engine_core import EngineCore, Publication, Runner
from headrace.scheduler.messages import (
    EngineReady,
    EngineStopped,
    FinishReason,
    GenerationRequest,
    LoadSnapshot,
    StepOutput,
)
from headrace.scheduler.scheduler import Scheduler
from headrace.server.errors import ApiError, BadRequestError, EngineFailedError, OverloadedError, UnavailableError
from headrace.server.generation import Generation
from headrace.server.gpu_gauges import watch_gpu
from headrace.server.metrics import Metrics

logger = logging.getLogger(__name__)

# How fast the estimate of the queue's pace follows what is seen.
_PACE_WEIGHT = 0.2


class EngineClient:
    """Owns the engine thread and every generation that is not over."""

    def __init__(
        self,
        load_engine: Callable[[], tuple[Scheduler, Runner]],
        *,
        model_name: str,
        max_queue_size: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.clock = clock
        self.ready: EngineReady | None = None
        self.is_draining = False
        self.error: Exception | None = None
        self.settled = anyio.Event()  # the engine is ready, or has ended without ever being so
        self.stopped = anyio.Event()
        self.load = LoadSnapshot()
        self._max_queue_size = max_queue_size
        self._num_submitted = 0
        self._num_reserved = 0
        self._ids = itertools.count()
        self._generations: dict[int, Generation] = {}
        self._queued: dict[int, Generation] = {}  # accepted and not yet scheduled, in order
        self._pace = _QueuePace()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._engine = EngineCore(load_engine, self._publish, clock)
        self.metrics = Metrics(model_name, lambda: self.load, lambda: self.num_waiting)

    @property
    def num_waiting(self) -> int:
        """Requests accepted and not yet running: the snapshot's, the inbox's, and those still being tokenized."""
        return self.load.num_waiting + self._num_submitted - self.load.num_received + self._num_reserved

    @property
    def num_unfinished(self) -> int:
        return len(self._generations)

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
    def has_thread(self) -> bool:
        """Whether the engine thread is alive, as it may be after `stop`."""
        return not self._engine.join(0)

    @contextmanager
    def reserve(self, num_sequences: int) -> Iterator[None]:
        """Hold places in the queue while prompts are tokenized, until `submit`.

        Raises: UnavailableError while loading, draining or after the engine has ended; OverloadedError where the
        queue is full; BadRequestError where an empty one would be too short.
        """
        self._check_accepting()
        # Who can start at once does not wait: with nobody in the engine's queue, that is one for each free place.
        assert self.ready is not None
        num_startable = 0 if self.load.num_waiting else self.ready.max_num_seqs - self.load.num_running
        if num_sequences > self._max_queue_size + self.ready.max_num_seqs:
            raise BadRequestError(f"{num_sequences} answers at once are more than this server can queue")
        if self.num_waiting + num_sequences > self._max_queue_size + num_startable:
            # Jitter keeps the refused from coming back all at once; clients give up beyond 120 s.
            wait_s = self._pace.seconds_per_start * self.num_waiting * random.uniform(0.75, 1.25)
            raise OverloadedError(f"{self.num_waiting} requests are waiting already", min(120.0, max(1.0, wait_s)))
        self._num_reserved += num_sequences
        try:
            yield
        finally:
            self._num_reserved -= num_sequences

    def next_request_id(self) -> int:
        return next(self._ids)

    def submit(self, request: GenerationRequest, generation: Generation) -> None:
        """Accept a request: from here on it ends with exactly one terminal entry in its generation's log.

        Raises: UnavailableError where the server began to drain, or the engine ended, since `reserve`.
        """
        self._check_accepting()
        generation.stages.submitted_s = self.clock()
        generation.on_end.insert(0, self._forget)
        self._generations[request.request_id] = generation
        self._queued[request.request_id] = generation
        self._num_submitted += 1
        if generation.choice == 0:
            self.metrics.prompt_tokens.inc(generation.num_prompt_tokens)
        self._engine.submit(request)

    def cancel(self, generation: Generation, error: ApiError | None = None) -> None:
        """End a generation now; the engine frees its blocks within a step. Without effect on one that is over.

        `error` is what its readers are told, where it was not their doing.
        """
        if not generation.is_over:
            self._engine.cancel(generation.request_id)
            generation.end(FinishReason.CANCELLED, self.clock(), error)

    def cancel_all(self, error: ApiError) -> None:
        for generation in list(self._generations.values()):
            self.cancel(generation, error)

    def queue_position(self, generation: Generation) -> tuple[int, float | None] | None:
        """(Place in the queue from 1, estimated seconds to wait or None), None once it has been scheduled."""
        for position, queued in enumerate(self._queued.values(), start=1):
            if queued is generation:
                return position, round(self._pace.seconds_per_start * position, 3) or None
        return None

    def _check_accepting(self) -> None:
        if self.stopped.is_set():
            raise UnavailableError("the engine has ended", "engine_dead", retry_after_s=None)
        if self.is_draining:
            raise UnavailableError("the server is shutting down", "draining")
        if self.ready is None:
            raise UnavailableError("the model is still loading", "loading")

    def _publish(self, publication: Publication) -> None:
        """Carry a publication to the loop; runs on the engine thread."""
        assert self._loop is not None
        # Where the loop has been closed nobody is left to tell.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._receive, publication)

    def _receive(self, publication: Publication) -> None:
        match publication:
            case StepOutput():
                self._receive_step(publication)
            case EngineReady():
                self.ready = publication
                self.load = publication.load
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
                for generation in list(self._generations.values()):
                    generation.end(FinishReason.ERROR, self.clock(), EngineFailedError("the engine has ended"))

    def _receive_step(self, step: StepOutput) -> None:
        now = self.clock()
        self.load = step.load
        if step.pauses is not None:
            self.metrics.observe_pauses(step.pauses)
        num_started = num_tokens = 0
        last_tokens_s: list[float] = []  # of each stream that has one more
        for output in step.outputs:
            generation = self._generations.get(output.request_id)
            if generation is None:
                continue  # cancelled or stopped on this side, and the engine had not heard yet
            if output.scheduled_s is not None:
                num_started += 1
                self._observe_start(generation, output.scheduled_s)
            if output.token_ids:
                num_tokens += len(output.token_ids)
                if (last_token_s := generation.stages.last_token_s) is not None:
                    last_tokens_s.append(last_token_s)
                else:
                    self.metrics.ttft.observe(now - generation.stages.received_s)
            try:
                generation.receive(output, now)
            except Exception:  # of this one's text: it must not cost the others theirs
                logger.exception("request %s failed while its text was made", generation.id)
                generation.end(FinishReason.ERROR, now, EngineFailedError("the text could not be decoded"))
            if generation.is_over and output.finish_reason is None:
                self._engine.cancel(output.request_id)  # a stop string, which the engine cannot see
        self.metrics.generation_tokens.inc(num_tokens)
        for last_token_s, count in Counter(last_tokens_s).items():
            self.metrics.itl.observe(now - last_token_s, count)
        self._pace.observe(now, num_started, is_backlogged=bool(self._queued))

    def _observe_start(self, generation: Generation, scheduled_s: float) -> None:
        self._queued.pop(generation.request_id, None)
        if generation.stages.submitted_s is not None:
            self.metrics.queue_time.observe(scheduled_s - generation.stages.submitted_s)

    def _forget(self, generation: Generation) -> None:
        del self._generations[generation.request_id]
        self._queued.pop(generation.request_id, None)
        self.metrics.observe_end(generation)


class _QueuePace:
    """How fast the queue moves: an average of the seconds between starts while others wait."""

    def __init__(self) -> None:
        self.seconds_per_start = 0.0
        self._last_start_s: float | None = None

    def observe(self, now: float, num_started: int, is_backlogged: bool) -> None:
        if num_started:
            if self._last_start_s is not None:
                seconds = (now - self._last_start_s) / num_started
                self.seconds_per_start += _PACE_WEIGHT * (seconds - self.seconds_per_start)
            self._last_start_s = now
        if not is_backlogged:
            self._last_start_s = None  # idle time says nothing of the pace
