"""Items of many requests into batches, batches to whatever computes them, and each outcome back to who asked for it.

Lives on the event loop: one lane per model, or per upstream service. It drives a dynamic batcher, bounds its queue, and
knows nothing of what items are. An item whose request has left is not computed, and a batch that nobody waits for is
given up. A batch that fails is computed again in halves as long as it may be one item's fault, so that this one fails
alone.
"""

import itertools
import logging
from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import anyio

from headrace.scheduler.dynamic_batcher import Batch, BatchItem, BatchPolicy, DynamicBatcher
from headrace.scheduler.messages import Tier
from headrace.scheduler.sequence import SequenceStatus
from headrace.server.admission import queue_part, retry_after_s
from headrace.server.errors import (
    ApiError,
    BadRequestError,
    DeadlineError,
    EngineFailedError,
    OverloadedError,
    UnavailableError,
)
from headrace.server.metrics import RequestMetrics

logger = logging.getLogger(__name__)


class LaneInput(NamedTuple):
    """What to compute, and its cost; only inputs of an equal `group` share a batch."""

    content: Any
    cost: float = 1.0
    group: Hashable = None


class Computed(NamedTuple):
    """A batch's outcomes, an ApiError where one item has failed, and the seconds it took."""

    outcomes: Sequence[Any]
    seconds: float


class Asker(NamedTuple):
    """Who asks, as far as the fair queue cares."""

    tier: Tier = Tier.STANDARD
    tenant: str = ""
    weight: float = 1.0


class _Request:
    """The items of one request; `settled` when all have an outcome, or one has failed and the others go with it."""

    def __init__(self, num_items: int, *, is_all_or_nothing: bool) -> None:
        self.outcomes: list[Any] = [None] * num_items
        self.num_left = num_items
        self.error: ApiError | None = None
        self.settled = anyio.Event()
        self._is_all_or_nothing = is_all_or_nothing

    def settle(self, index: int, outcome: Any) -> None:
        self.outcomes[index] = outcome
        self.num_left -= 1
        if self._is_all_or_nothing and isinstance(outcome, ApiError):
            self.error = outcome
        if self.num_left == 0 or self.error is not None:
            self.settled.set()


class _Work(NamedTuple):
    """An item's content, as the lane sees it."""

    content: Any
    request: _Request
    place: int


class _Running:
    """A batch being computed, which is given up when the last of its items is."""

    def __init__(self, num_items: int) -> None:
        self.scope = anyio.CancelScope()
        self.num_wanted = num_items


class BatchLane:
    """One model's queue and batches. `compute` gets the contents of a batch; an ApiError that it raises is every item's
    unless `is_divisible` says that it may be one's."""

    def __init__(
        self,
        name: str,
        policy: BatchPolicy,
        compute: Callable[[Sequence[Any]], Awaitable[Computed]],
        *,
        tier_weights: Mapping[Tier, float],
        max_queue_size: int,
        metrics: RequestMetrics,
        clock: Callable[[], float],
        num_at_once: int = 1,
        is_divisible: Callable[[ApiError], bool] = lambda error: isinstance(error, EngineFailedError),
    ) -> None:
        self._batcher = DynamicBatcher(policy, tier_weights)
        self.name = name
        self._open_metrics = metrics.open_lane
        self._metrics = metrics.open_lane(name)
        self._compute = compute
        self._max_queue_size = max_queue_size
        self._clock = clock
        self._num_at_once = num_at_once
        self._is_divisible = is_divisible
        self._ids = itertools.count()
        self._waiting_of: dict[str, int] = {}  # by tenant
        self._running: dict[BatchItem, _Running] = {}
        self._num_running = 0  # batches
        self._changed = anyio.Event()

    def rename(self, name: str) -> None:
        """Count under another name from here on."""
        self.name = name
        self._metrics.waiting.dec(len(self._batcher))
        self._metrics = self._open_metrics(name)
        self._metrics.waiting.inc(len(self._batcher))

    @property
    def num_waiting(self) -> int:
        """Items in no batch yet."""
        return len(self._batcher)

    @property
    def num_computing(self) -> int:
        return len(self._running)

    @property
    def num_unfinished(self) -> int:
        """Items that wait or are computed."""
        return self.num_waiting + self.num_computing

    async def run(self) -> None:
        """Form batches and have them computed, until cancelled; what then waits or is computed is told."""
        try:
            await self._run_batches()
        finally:
            self.fail_all(UnavailableError("the server is shutting down", "draining"))

    def fail_all(self, error: ApiError) -> None:
        """End whatever waits or is computed."""
        for item in self._batcher.waiting:
            self._batcher.remove(item)
            self._leave_queue(item)
            self._hand_over(item, error)
            item.content = None
        for item, running in list(self._running.items()):
            running.scope.cancel()
            self._settle(item, error)

    async def _run_batches(self) -> None:
        async with anyio.create_task_group() as tasks:
            while True:
                batch = self._batcher.next_batch(self._clock()) if self._num_running < self._num_at_once else None
                if batch is not None:
                    running = _Running(len(batch.items))
                    self._num_running += 1
                    for item in batch.items:
                        self._leave_queue(item)
                        self._running[item] = running
                    tasks.start_soon(self._run_batch, batch, running)
                    continue
                self._changed = anyio.Event()
                due_s = self._batcher.due_s() if self._num_running < self._num_at_once else float("inf")
                with anyio.move_on_after(None if due_s == float("inf") else max(0.0, due_s - self._clock())):
                    await self._changed.wait()

    async def submit(
        self,
        inputs: Sequence[LaneInput],
        asker: Asker,
        timeout_s: float,
        *,
        is_all_or_nothing: bool = True,
    ) -> list[Any]:
        """Have inputs computed; returns their outcomes in order.

        With `is_all_or_nothing` the first item's failure is the request's, and the others are given up; without it,
        outcomes can be ApiErrors.

        Raises: OverloadedError where the queue is full; BadRequestError where an empty one would be too short;
        DeadlineError after `timeout_s`; with `is_all_or_nothing` what an item failed of.
        """
        self._check_room(len(inputs), asker)
        now = self._clock()
        request = _Request(len(inputs), is_all_or_nothing=is_all_or_nothing)
        items = []
        for index, (content, cost, group) in enumerate(inputs):
            work = _Work(content, request, index)
            item = BatchItem(
                next(self._ids), work, cost, group, asker.tier, asker.tenant, asker.weight, now, now + timeout_s
            )
            self._batcher.add(item)
            items.append(item)
        self._waiting_of[asker.tenant] = self._waiting_of.get(asker.tenant, 0) + len(items)
        self._metrics.waiting.inc(len(items))
        self._changed.set()
        end = "cancelled"
        try:
            with anyio.move_on_after(timeout_s) as scope:
                await request.settled.wait()
            if scope.cancelled_caught:
                end = "deadline"
        finally:
            for item in items:
                self._drop(item, end)
        if request.error is not None:
            raise request.error
        if request.num_left:
            raise DeadlineError(f"the request was not answered within {timeout_s:g} s")
        return request.outcomes

    def _check_room(self, num_items: int, asker: Asker) -> None:
        if num_items > self._max_queue_size:
            raise BadRequestError(f"{num_items} inputs are more than this server can queue ({self._max_queue_size})")
        if len(self._batcher) + num_items <= self._max_queue_size:
            return
        # Of a full queue each tenant that waits may hold its part: who floods it shuts himself out, and nobody else.
        num_own = self._waiting_of.get(asker.tenant, 0) + num_items
        if num_own <= self._max_queue_size * queue_part(asker.tenant, self._waiting_of):
            return
        self._metrics.items["refused"].inc(num_items)
        raise OverloadedError(
            f"{len(self._batcher)} inputs wait for {self.name} already",
            retry_after_s(self._batcher.wait_s()),
            code="queue_full",
            tier=asker.tier,
        )

    def _leave_queue(self, item: BatchItem) -> None:
        self._metrics.waiting.dec()
        left = self._waiting_of[item.tenant] - 1
        if left:
            self._waiting_of[item.tenant] = left
        else:
            del self._waiting_of[item.tenant]

    def _drop(self, item: BatchItem, end: str) -> None:
        """Forget an item whose request is over; without effect on one that is."""
        if item.status is SequenceStatus.WAITING:
            self._batcher.remove(item)
            self._leave_queue(item)
            item.content = None  # the queue forgets it later
        elif item.status is SequenceStatus.RUNNING:
            item.status = SequenceStatus.FINISHED
            running = self._running.pop(item)
            running.num_wanted -= 1
            if running.num_wanted == 0:
                running.scope.cancel()
        else:
            return
        self._metrics.items[end].inc()

    async def _run_batch(self, batch: Batch, running: _Running) -> None:
        began_s = self._clock()
        self._metrics.size.observe(len(batch.items))
        self._metrics.cost.inc(batch.cost)
        self._metrics.padding.inc(batch.padding * batch.cost)
        for item in batch.items:
            self._metrics.wait_s.observe(began_s - item.arrival_s)
        computed_s = None
        try:
            with running.scope:
                computed_s = await self._compute_items(batch.items)
        finally:
            if computed_s is not None:
                self._metrics.compute_s.observe(computed_s)
            self._batcher.end(batch, self._clock(), computed_s)
            self._num_running -= 1
            self._changed.set()

    async def _compute_items(self, items: Sequence[BatchItem]) -> float | None:
        """Compute those that are still wanted; returns the seconds that took in one piece."""
        items = [item for item in items if item.status is SequenceStatus.RUNNING]
        if not items:
            return None
        try:
            outcomes, seconds = await self._compute([item.content.content for item in items])
        except ApiError as error:
            if len(items) > 1 and self._is_divisible(error):
                half = len(items) // 2
                await self._compute_items(items[:half])
                await self._compute_items(items[half:])
            else:
                for item in items:
                    self._settle(item, error)
            return None
        except Exception:
            logger.exception("a batch of %d for %s failed", len(items), self.name)
            for item in items:
                self._settle(item, EngineFailedError("the request could not be computed"))
            return None
        for item, outcome in zip(items, outcomes, strict=True):
            self._settle(item, outcome)
        return seconds

    def _settle(self, item: BatchItem, outcome: Any) -> None:
        """Hand an item its outcome; without effect on one that is over."""
        if item.status is not SequenceStatus.RUNNING:
            return
        item.status = SequenceStatus.FINISHED
        self._running.pop(item).num_wanted -= 1
        self._hand_over(item, outcome)

    def _hand_over(self, item: BatchItem, outcome: Any) -> None:
        self._metrics.items["error" if isinstance(outcome, ApiError) else "ok"].inc()
        item.content.request.settle(item.content.place, outcome)
