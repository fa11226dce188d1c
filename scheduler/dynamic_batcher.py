"""Single items into batches, by size, cost and wait: for models that answer in one pass, and for services that do.

A pure object: no clock, thread or tensor inside; the event loop owns it and tells it the time. Items wait in a fair
queue, in buckets: items of different groups never share a batch, and of a group those of near cost (tokens, pixels) are
picked together, since a batch costs its number of items times the largest of them. `max_padding` bounds what of that is
nobody's.

While a batch is computed the next one fills by itself. Only where whatever computes is free is there something to
decide: take what there is, or wait for more. It waits until as many have come as came together lately, within
`max_wait_s` of the oldest item, and after each arrival for no longer than starting one more batch costs, if items come
faster than that: idling for what a batch costs anyway at most doubles it, whatever comes (the ski-rental argument).
So a lone client's items never wait, and those of many clients, who all come back when a batch has been answered, wait
for each other.
Sources: dynamic batching as in Triton Inference Server (maximum size, maximum delay); the step-time model's fit for
what a batch costs.
"""

import math
from collections import deque
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from headrace.scheduler.fair_queue import FairQueue, TenantAccount
from headrace.scheduler.messages import Tier
from headrace.scheduler.sequence import SequenceStatus
from headrace.scheduler.step_time import StepShape, StepTimeModel

_NEVER = float("inf")
# Costs within this factor share a bucket.
_BUCKET_FACTOR = 1.1
# How many batches back it counts how many came together, and how many gaps between arrivals tell their pace.
_NUM_SIZES, _NUM_GAPS = 8, 16


@dataclass(frozen=True, slots=True)
class BatchPolicy:
    """`max_cost` bounds a batch's number of items times its largest one's cost, in the unit of costs; a larger item
    goes alone. `max_padding` is the share of that which may be padding."""

    max_size: int = 32
    max_wait_s: float = 0.005
    max_cost: float = _NEVER
    max_padding: float = 0.2


@dataclass(slots=True, eq=False)
class BatchItem:
    """Something to compute. Only items of an equal `group` share a batch; `content` is the executor's own affair.

    Meets what the fair queue asks of who waits there; `first_token_due_s` orders a tenant's own items.
    """

    request_id: int
    content: Any
    cost: float = 1.0
    group: Hashable = None
    tier: Tier = Tier.STANDARD
    tenant: str = ""
    weight: float = 1.0
    arrival_s: float = 0.0
    first_token_due_s: float = _NEVER
    status: SequenceStatus = SequenceStatus.WAITING
    account: TenantAccount[Any] | None = None
    bucket: tuple[Hashable, int] = field(init=False)

    def __post_init__(self) -> None:
        self.bucket = (self.group, math.ceil(math.log(max(1.0, self.cost), _BUCKET_FACTOR)))


class Batch(NamedTuple):
    """What is computed together. `cost` counts the padding, of which `padding` is the share."""

    items: list[BatchItem]
    cost: float
    padding: float


class DynamicBatcher:
    """Owns the items that wait."""

    def __init__(self, policy: BatchPolicy, tier_weights: Mapping[Tier, float]) -> None:
        self.policy = policy
        self.time = StepTimeModel()  # of a batch, by its cost
        self.waiting_cost = 0.0
        self._queue: FairQueue[BatchItem] = FairQueue(tier_weights)
        self._waiting: dict[int, BatchItem] = {}  # in the order of their arrival
        self._last_arrival_s = -_NEVER
        self._gaps_s: deque[float] = deque(maxlen=_NUM_GAPS)
        self._sizes: deque[int] = deque(maxlen=_NUM_SIZES)

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, item: BatchItem) -> None:
        """Queue an item; they come in the order of their arrival."""
        if self._last_arrival_s > -_NEVER:
            self._gaps_s.append(item.arrival_s - self._last_arrival_s)
        self._last_arrival_s = item.arrival_s
        self._waiting[item.request_id] = item
        self.waiting_cost += item.cost
        self._queue.push(item)

    def remove(self, item: BatchItem) -> None:
        """Take out an item that nobody wants any more; without effect on one that does not wait."""
        if item.status is SequenceStatus.WAITING:
            self._take(item, SequenceStatus.FINISHED)

    def due_s(self) -> float:
        """When the next batch is to be computed if nothing more comes; never where nothing waits."""
        if not self._waiting:
            return _NEVER
        num_expected = max(self._sizes, default=1)
        if len(self._waiting) >= min(num_expected, self.policy.max_size) or self.waiting_cost >= self.policy.max_cost:
            return -_NEVER
        oldest = next(iter(self._waiting.values()))
        return min(oldest.arrival_s + self.policy.max_wait_s, self._last_arrival_s + self._patience_s())

    def next_batch(self, now: float) -> Batch | None:
        """The next batch, its items taken out; None where it is better to wait, until `due_s`, or nothing waits."""
        if self.due_s() > now:
            return None
        head = self._queue.pick()
        assert head is not None
        self._take(head, SequenceStatus.RUNNING)
        items, largest, total = [head], head.cost, head.cost
        group, place = head.bucket
        near = [bucket for bucket in self._queue.buckets if isinstance(bucket, tuple) and bucket[0] == group]
        for bucket in sorted(near, key=lambda bucket: abs(bucket[1] - place)):
            while len(items) < self.policy.max_size and (item := self._queue.pick(bucket=bucket)) is not None:
                most = max(largest, item.cost)
                cost = most * (len(items) + 1)
                if cost > self.policy.max_cost or total + item.cost < (1 - self.policy.max_padding) * cost:
                    break
                self._take(item, SequenceStatus.RUNNING)
                items.append(item)
                largest, total = most, total + item.cost
        self._sizes.append(len(items) + len(self._waiting))
        cost = largest * len(items)
        return Batch(items, cost, 1 - total / cost if cost else 0.0)

    def observe(self, cost: float, seconds: float) -> None:
        """Learn how long a batch took."""
        self.time.observe(StepShape(cost, 0, 0), seconds)

    def wait_s(self) -> float:
        """How long what waits will take, 0 where nothing is known."""
        return self.time.prompt_token_s() * self.waiting_cost

    def _patience_s(self) -> float:
        """How long the next item is waited for: what starting a batch costs, if items come faster than that."""
        start_s = self.time.predict_s(StepShape(0, 0, 0))
        gaps_s = sorted(self._gaps_s)
        return start_s if gaps_s and gaps_s[len(gaps_s) // 2] <= start_s else 0.0

    def _take(self, item: BatchItem, status: SequenceStatus) -> None:
        self._queue.remove(item)
        item.status = status
        del self._waiting[item.request_id]
        self.waiting_cost -= item.cost
        if not self._waiting:
            self.waiting_cost = 0.0  # no sum of roundings
        if status is SequenceStatus.RUNNING:
            assert item.account is not None
            item.account.charge(item.cost)
