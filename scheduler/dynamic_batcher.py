"""Single items into batches, by size, cost and wait: for models that answer in one pass, and for services that do.

A pure object: no clock, thread or tensor inside; the event loop owns it and tells it the time. Items wait in a fair
queue, in buckets: items of different groups never share a batch, and of a group those of near cost (tokens, pixels) are
picked together, since a batch costs its number of items times the largest of them. `max_padding` bounds what of that is
nobody's.

While a batch is computed the next one fills by itself. Only where whatever computes is free is there something to
decide: take what there is, or wait for more, for `max_wait_s` at most. Those whose answers have just been given are
likely to ask again, so it waits until as many have come as that batch and those waiting beside it were. To wait for one
more item delays all n that are here, and spares it a batch of its own: so that is done for at most the nth part of what
a batch of them takes, and only if items come faster than that. What waiting can cost is then no more than what it could
have spared (the ski-rental argument). A lone client's items never wait, and those of many clients, who all come back
when a batch has been answered, wait for each other.
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
# How many gaps between arrivals tell their pace.
_NUM_GAPS = 16


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
        self._last_arrival_s = self._last_end_s = -_NEVER
        self._gaps_s: deque[float] = deque(maxlen=_NUM_GAPS)
        self._num_expected = 1

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def waiting(self) -> list[BatchItem]:
        """In the order of their arrival."""
        return list(self._waiting.values())

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
        is_full = len(self._waiting) >= min(self._num_expected, self.policy.max_size)
        if is_full or self.waiting_cost >= self.policy.max_cost:
            return -_NEVER
        oldest_s = next(iter(self._waiting.values())).arrival_s
        return min(
            max(oldest_s, self._last_end_s) + self.policy.max_wait_s,
            max(self._last_arrival_s, self._last_end_s) + self._patience_s(),
        )

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
        cost = largest * len(items)
        return Batch(items, cost, 1 - total / cost if cost else 0.0)

    def end(self, batch: Batch, now: float, seconds: float | None) -> None:
        """Learn that a batch is over, and how long it took, where that is known."""
        self._last_end_s = now
        self._num_expected = len(batch.items) + len(self._waiting)
        if seconds is not None:
            self.time.observe(StepShape(batch.cost, 0, 0), seconds)

    def wait_s(self) -> float:
        """How long what waits will take, 0 where nothing is known."""
        return self.time.prompt_token_s() * self.waiting_cost

    def _patience_s(self) -> float:
        """How long the next item is waited for."""
        share_s = self.time.predict_s(StepShape(self.waiting_cost, 0, 0)) / len(self._waiting)
        gaps_s = sorted(self._gaps_s)
        return share_s if gaps_s and gaps_s[len(gaps_s) // 2] <= share_s else 0.0

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
