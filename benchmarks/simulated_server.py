"""The production server without its sockets, its thread and its model, on a virtual clock.

`SimulatedEngine` stands in for the engine thread: it steps the production scheduler, takes a cost model's time for each
step, and answers with a fixed function of the request. `SimulatedServer` puts it under the production EngineClient,
with admission, generations and stream logs, and submits as the generator does. One event queue drives all; nothing
sleeps, and the same calls give the same run.
"""

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial

from headrace.kernels.step_times import StepTimes
from headrace.scheduler.block_pool import BlockPool
from headrace.scheduler.config import SchedulingPolicy
from headrace.scheduler.engine_core import Publication
from headrace.scheduler.messages import (
    EngineReady,
    EngineStopped,
    FinishReason,
    GenerationRequest,
    RowResult,
    SamplingParams,
    SequenceOutput,
    StepOutput,
    Submission,
    Tier,
)
from headrace.scheduler.scheduler import ScheduledRow, Scheduler, SchedulerOutput
from headrace.scheduler.step_time import StepShape
from headrace.server.admission import Demand
from headrace.server.detokenizer import Detokenizer
from headrace.server.engine_client import EngineClient, QueueLimits
from headrace.server.errors import ApiError
from headrace.server.generation import Generation, Stages

END_TOKEN = 0
_LETTERS = 26
# Where a step has nothing to compute, its engine looks again so much later.
_EMPTY_STEP_S = 0.005


class EventQueue:
    """Callbacks at points of virtual time, run in their order."""

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, Callable[[], object]]] = []
        self._numbers = itertools.count()

    def at(self, at_s: float, callback: Callable[[], object]) -> None:
        heapq.heappush(self._heap, (max(at_s, self.now), next(self._numbers), callback))

    def run(self, until_s: float = float("inf")) -> None:
        """Run what is due until then, or until nothing is."""
        while self._heap and self._heap[0][0] <= until_s:
            self.now, _, callback = heapq.heappop(self._heap)
            callback()


@dataclass(frozen=True, slots=True)
class CostModel:
    """Seconds of a step: a + b P + g D + h K + e P C (see step_time)."""

    constant_s: float = 1.5e-3
    prompt_token_s: float = 1.7e-4
    sequence_s: float = 2.5e-4
    context_token_s: float = 2e-7
    attention_s: float = 2e-8

    def step_s(self, shape: StepShape) -> float:
        return (
            self.constant_s
            + self.prompt_token_s * shape.num_prompt_tokens
            + self.sequence_s * shape.num_decoding
            + self.context_token_s * shape.decode_context
            + self.attention_s * shape.num_prompt_tokens * shape.prompt_context
        )


@dataclass(frozen=True, slots=True)
class Job:
    """A request as the world sends it. Its answer has `num_answer_tokens`, of the `max_tokens` that were asked for;
    the first `num_shared_tokens` of its prompt are those of all jobs in its `group`. Timeouts are seconds."""

    number: int
    at_s: float
    num_prompt_tokens: int
    num_answer_tokens: int
    max_tokens: int
    tenant: str = ""
    tier: Tier = Tier.STANDARD
    weight: float = 1.0
    group: int = 0
    num_shared_tokens: int = 0
    timeout_s: float = float("inf")
    ttft_timeout_s: float = float("inf")

    def prompt(self) -> tuple[int, ...]:
        shared = min(self.num_shared_tokens, self.num_prompt_tokens)
        return (
            *((self.group * 31 + i) % 1000 for i in range(shared)),
            *((1000 + self.number * 7 + i) % 9973 for i in range(self.num_prompt_tokens - shared)),
        )

    def token(self, index: int) -> int:
        """The answer's token at an index, END_TOKEN behind its last."""
        if index >= self.num_answer_tokens:
            return END_TOKEN
        return ord("a") + (self.number * 7 + index * 3 + index // 5) % _LETTERS

    def text(self) -> str:
        return "".join(chr(self.token(i)) for i in range(min(self.num_answer_tokens, self.max_tokens)))


class SimulatedEngine:
    """An engine without a thread. With `is_asynchronous` a step is scheduled while the one before it is computed.

    `step_fault` is asked for each step: a factor on its time, or None to have it raise. `on_step` sees every scheduled
    step and how long it will take.
    """

    def __init__(
        self,
        queue: EventQueue,
        scheduler: Scheduler,
        costs: CostModel,
        jobs: dict[int, Job],
        *,
        is_asynchronous: bool = False,
        step_fault: Callable[[int], float | None] = lambda number: 1.0,
        on_step: Callable[[SchedulerOutput, float], None] = lambda output, seconds: None,
    ) -> None:
        self.scheduler = scheduler
        self.publish: Callable[[Publication], None] = lambda publication: None
        self._queue = queue
        self._costs = costs
        self._jobs = jobs
        self._num_ahead = int(is_asynchronous)
        self._step_fault = step_fault
        self._on_step = on_step
        self._requests: deque[GenerationRequest] = deque()
        self._cancels: deque[int] = deque()
        self._in_flight: deque[tuple[SchedulerOutput, StepTimes, bool]] = deque()
        self._num_steps = 0
        self._num_empty = 0
        self._is_idle = True
        self._busy_s = 0.0

    def start(self) -> None:
        # As the runner's warm-up: a chunk and decode steps of known shapes.
        for shape in (StepShape(256, 0, 0, 128), StepShape(0, 1, 255), StepShape(64, 0, 0, 32), StepShape(0, 8, 0)):
            self.scheduler.observe(shape, self._costs.step_s(shape))
        num_tokens = self.scheduler.load().num_total_blocks * 16
        self.publish(
            EngineReady(num_tokens, self.scheduler.max_num_seqs, 10_000, "simulated", None, self.scheduler.load())
        )

    def submit(self, submission: Submission) -> None:
        assert isinstance(submission, GenerationRequest), "nothing else is simulated"
        self._requests.append(submission)
        self._wake_up()

    def cancel(self, request_id: int) -> None:
        self._cancels.append(request_id)
        self._wake_up()

    def stop(self) -> None:
        self.publish(EngineStopped())

    def join(self, timeout_s: float | None = None) -> bool:
        return True

    @property
    def busy_since_s(self) -> None:
        return None  # it takes none of its clock's time to compute

    def _wake_up(self) -> None:
        if self._is_idle:
            self._is_idle = False
            self._queue.at(self._queue.now, self._advance)

    def _advance(self) -> None:
        """Schedule as many steps as may be in flight, and come back when the first of them is computed."""
        scheduler = self.scheduler
        while True:
            while self._requests:
                scheduler.add(self._requests.popleft())
            scheduler.cancel(*self._cancels)
            self._cancels.clear()
            if not scheduler.has_work and not self._in_flight:
                scheduler.check_books()
                self._is_idle = True
                return
            if len(self._in_flight) > self._num_ahead or (self._in_flight and scheduler.may_preempt):
                break
            output = scheduler.schedule(self._queue.now)
            self._num_empty = 0 if output.rows else self._num_empty + 1
            assert self._num_empty <= 3, "an engine that has work and does nothing"
            if output.rows:
                self._launch(output)
            if output.dropped or not output.rows:
                self._publish_outputs(output.dropped)
            if not output.rows:
                if not self._in_flight:
                    self._queue.at(self._queue.now + _EMPTY_STEP_S, self._advance)
                    return
                break
        self._queue.at(self._in_flight[0][1].ended_s, self._record)

    def _launch(self, output: SchedulerOutput) -> None:
        began_s = max(self._queue.now, self._in_flight[-1][1].ended_s if self._in_flight else 0.0)
        factor = self._step_fault(self._num_steps)
        self._num_steps += 1
        seconds = self._costs.step_s(output.shape) * (1.0 if factor is None else factor)
        self._on_step(output, seconds)
        self._busy_s += seconds
        self._in_flight.append((output, StepTimes(began_s, began_s + seconds, None), factor is None))

    def _record(self) -> None:
        output, times, is_raising = self._in_flight.popleft()
        if is_raising:
            outputs = self.scheduler.fail([row.sequence for row in output.rows], "simulated fault")
        else:
            outputs = self.scheduler.update(output, [self._compute(row) for row in output.rows], times)
        self._publish_outputs(outputs)
        self._advance()

    def _compute(self, row: ScheduledRow) -> RowResult:
        if not row.is_sampled:
            return RowResult()
        index = row.start + row.num_tokens - row.sequence.num_prompt_tokens
        return RowResult(self._jobs[row.sequence.request.request_id].token(index))

    def _publish_outputs(self, outputs: list[SequenceOutput]) -> None:
        self.publish(StepOutput(tuple(outputs), self.scheduler.load(self._busy_s)))


class _LetterDetokenizer(Detokenizer):
    """A token is a letter."""

    def __init__(self) -> None:
        self.num_chars = 0
        self.stop_string = None

    def push(self, token_id: int) -> str:
        self.num_chars += 1
        return chr(token_id)

    def flush(self) -> str:
        return ""


@dataclass(slots=True)
class Life:
    """What became of a job: refused with an error, or its generation and the times of its tokens."""

    job: Job
    refusal: ApiError | None = None
    generation: Generation | None = None
    target_s: float = float("inf")  # seconds from its arrival
    token_s: list[float] = field(default_factory=list)

    @property
    def ttft_s(self) -> float | None:
        return self.token_s[0] - self.job.at_s if self.token_s else None


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Of the simulated server. `is_fair` False has every job come as one tenant of one tier."""

    num_blocks: int = 1024
    block_size: int = 16
    max_num_batched_tokens: int = 512
    max_num_seqs: int = 64
    policy: SchedulingPolicy = field(default_factory=SchedulingPolicy)
    ttft_targets_s: tuple[float, float, float] = (2.0, 8.0, 60.0)
    max_queue_size: int = 100_000
    is_fair: bool = True
    is_asynchronous: bool = False


class SimulatedServer:
    """The server; `submit` and `cancel` are what its clients do. `lives` are of all jobs, in their order."""

    def __init__(
        self,
        settings: ServerSettings,
        costs: CostModel,
        *,
        queue: EventQueue | None = None,
        step_fault: Callable[[int], float | None] = lambda number: 1.0,
        on_step: Callable[[SchedulerOutput, float], None] = lambda output, seconds: None,
        on_published: Callable[[list[Life]], None] = lambda lives: None,
    ) -> None:
        """Servers that share a `queue` share its clock."""
        self.queue = EventQueue() if queue is None else queue
        self.lives: list[Life] = []
        self.scheduler = Scheduler(
            BlockPool(settings.num_blocks),
            block_size=settings.block_size,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            max_num_seqs=settings.max_num_seqs,
            policy=settings.policy,
        )
        self._settings = settings
        self._lives_by_id: dict[int, Life] = {}
        self._jobs: dict[int, Job] = {}
        self._on_published = on_published
        engine = SimulatedEngine(
            self.queue,
            self.scheduler,
            costs,
            self._jobs,
            is_asynchronous=settings.is_asynchronous,
            step_fault=step_fault,
            on_step=on_step,
        )
        self.client = EngineClient(
            lambda: (self.scheduler, None),  # type: ignore[arg-type, return-value]  # the engine has it already
            model_name="simulated",
            limits=QueueLimits(num_requests=settings.max_queue_size),
            tier_weights=settings.policy.tier_weights,
            ttft_targets_s=dict(zip(Tier, settings.ttft_targets_s, strict=True)),
            clock=lambda: self.queue.now,
            make_engine=lambda load, publish, clock, load_one_shots: engine,
        )
        engine.publish = self._receive
        engine.start()

    def play(self, jobs: Iterable[Job]) -> None:
        """Submit each at its time, and run until nothing is left to do."""
        for job in jobs:
            self.queue.at(job.at_s, partial(self.submit, job))
        self.queue.run()

    def submit(self, job: Job) -> Life:
        """What the generator does with a request whose prompt is tokenized."""
        life = Life(job)
        self.lives.append(life)
        if not self._settings.is_fair:
            job = replace(job, tenant="", tier=Tier.STANDARD, weight=1.0)
        client, now = self.client, self.queue.now
        try:
            demand = Demand(job.tier, job.tenant, job.weight, job.num_prompt_tokens)
            with client.reserve(demand, 0):
                prediction = client.admit(demand)
                generation = Generation(
                    str(job.number),
                    client.next_request_id(),
                    job.num_prompt_tokens,
                    Stages(job.at_s),
                    _LetterDetokenizer(),
                    tier=job.tier,
                    predicted_ttft_s=prediction.raw_s,
                )
                life.generation, life.target_s = generation, prediction.target_s
                self._jobs[generation.request_id] = job
                self._lives_by_id[generation.request_id] = life
                client.submit(
                    GenerationRequest(
                        generation.request_id,
                        job.prompt(),
                        SamplingParams(max_tokens=job.max_tokens, stop_token_ids=frozenset({END_TOKEN})),
                        arrival_s=now,
                        deadline_s=now + job.timeout_s,
                        first_token_deadline_s=now + job.ttft_timeout_s,
                        target_s=now + prediction.target_s,
                        tier=job.tier,
                        tenant=job.tenant,
                        weight=job.weight,
                        cache_salt=job.tenant.encode(),
                    ),
                    generation,
                )
        except ApiError as error:
            life.refusal = error
        return life

    def forget(self, life: Life) -> None:
        """Let go of one that was refused or is over: of a long run not all fit in memory."""
        self.lives.remove(life)
        if life.generation is not None:
            assert life.generation.is_over
            assert not self._settings.is_asynchronous, "a step in flight may still have a row of it"
            del self._lives_by_id[life.generation.request_id], self._jobs[life.generation.request_id]

    def _receive(self, publication: Publication) -> None:
        touched = []
        if isinstance(publication, StepOutput):
            for output in publication.outputs:
                life = self._lives_by_id.get(output.request_id)
                if life is not None and life.generation is not None and not life.generation.is_over:
                    touched.append(life)
                    if output.token_ids and output.finish_reason is not FinishReason.STOP:
                        life.token_s.append(self.queue.now)
        self.client.receive(publication)
        if isinstance(publication, StepOutput):
            self._on_published(touched)
