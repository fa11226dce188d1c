"""Who of those that wait is next: weighted fair queueing over tiers, and over tenants inside a tier.

A pure object: the scheduler's holds sequences, a dynamic batcher's holds items. Each tier and each tenant has a counter
of the service it has had, in prompt tokens (or the batcher's unit), divided by its weight. Next is the tier with the
smallest counter among those with somebody waiting, inside it the tenant with the smallest, and of a tenant's requests
the one with the earliest deadline, then the oldest. Whoever comes back from having nobody waiting is lifted to the
smallest counter of those that have: idle time is not saved up. So no tier starves: with somebody waiting it gets its
weight's share at least. A tenant may be divided into flows, named behind a slash, which are as tenants of their own but
have its weight together.
Paper: VTC (OSDI 2024). Deviations: two levels; a prompt's tokens are charged as they are computed, not when it is
picked.
"""

import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Generic, Protocol, TypeVar

from headrace.scheduler.messages import Tier
from headrace.scheduler.sequence import SequenceStatus


class Waiter(Protocol):
    """Who can wait here. Its `bucket` says who may be picked with it, and does not change while it waits; `account` is
    set when it is pushed."""

    status: SequenceStatus
    account: "TenantAccount[Any] | None"

    @property
    def request_id(self) -> int: ...

    @property
    def tier(self) -> Tier: ...

    @property
    def tenant(self) -> str: ...

    @property
    def weight(self) -> float: ...

    @property
    def bucket(self) -> Hashable: ...

    @property
    def first_token_due_s(self) -> float: ...


_Waiter = TypeVar("_Waiter", bound=Waiter)

# A tenant's heaps are rebuilt when they have so many entries of those that do not wait any more, beside as many as do.
_MIN_STALE = 64
_ANY: Hashable = object()


@dataclass(slots=True, eq=False)
class _TierAccount(Generic[_Waiter]):
    """A tier's counter, and the tenants it has seen; `last_served` is the smallest counter at its last pick."""

    weight: float
    served: float = 0.0
    tenants: "dict[str, TenantAccount[_Waiter]]" = field(default_factory=dict)
    backlogged: "dict[str, TenantAccount[_Waiter]]" = field(default_factory=dict)
    num_flows: Counter[str] = field(default_factory=Counter)  # backlogged, by the tenant that they are of
    last_served: float = 0.0


@dataclass(slots=True, eq=False)
class TenantAccount(Generic[_Waiter]):
    """A tenant's counter and those that wait, as a heap per bucket of (deadline, request id, a number of its own, who
    waits). Entries of those that wait no more are dropped when they come up."""

    name: str
    tier: _TierAccount[_Waiter]
    weight: float
    served: float = 0.0
    num_waiting: int = 0
    num_entries: int = 0  # of all heaps
    numbers: Iterator[int] = field(default_factory=itertools.count)
    heaps: dict[Hashable, list[tuple[float, int, int, _Waiter]]] = field(default_factory=dict)

    def charge(self, cost: float) -> None:
        """Count service: in prompt tokens' worth, or in a dynamic batcher's unit."""
        # One of which nobody waits any more is served all the same.
        num_flows = self.tier.num_flows[tenant_of(self.name)] + (self.num_waiting == 0)
        self.served += cost * num_flows / self.weight
        self.tier.served += cost / self.tier.weight

    def push(self, waiter: _Waiter) -> None:
        heap = self.heaps.setdefault(waiter.bucket, [])
        heapq.heappush(heap, (waiter.first_token_due_s, waiter.request_id, next(self.numbers), waiter))
        self.num_entries += 1
        if self.num_entries > 2 * self.num_waiting + _MIN_STALE:
            self._rebuild()

    def _rebuild(self) -> None:
        """Drop the entries of those that wait no more."""
        self.num_entries = 0
        for bucket, heap in list(self.heaps.items()):
            heap[:] = [entry for entry in heap if entry[3].status is SequenceStatus.WAITING]
            heapq.heapify(heap)
            self.num_entries += len(heap)
            if not heap:
                del self.heaps[bucket]

    def head(self, bucket: Hashable) -> _Waiter | None:
        """The first of those that wait in a bucket."""
        first: tuple[float, int, int, _Waiter] | None = None
        for key in list(self.heaps) if bucket is _ANY else [bucket]:
            heap = self.heaps.get(key, [])
            while heap and heap[0][3].status is not SequenceStatus.WAITING:
                heapq.heappop(heap)
                self.num_entries -= 1
            if heap:
                first = heap[0] if first is None else min(first, heap[0])
            else:
                self.heaps.pop(key, None)
        return None if first is None else first[3]


class FairQueue(Generic[_Waiter]):
    """Those that wait by tier and tenant. `pick` only looks: the caller removes who gets to run."""

    def __init__(self, tier_weights: Mapping[Tier, float]) -> None:
        self._tiers: dict[Tier, _TierAccount[_Waiter]] = {tier: _TierAccount(tier_weights[tier]) for tier in Tier}
        self._last_served = 0.0
        self._buckets: Counter[Hashable] = Counter()

    def __len__(self) -> int:
        return self._buckets.total()

    @property
    def buckets(self) -> Mapping[Hashable, int]:
        """How many wait in each bucket, those where nobody does left out."""
        return self._buckets

    def push(self, waiter: _Waiter) -> None:
        """Put one where its deadline and its age place it; a preempted sequence comes back to its place."""
        tier = self._tiers[waiter.tier]
        tenant = tier.tenants.get(waiter.tenant)
        if tenant is None:
            tenant = tier.tenants[waiter.tenant] = TenantAccount(waiter.tenant, tier, waiter.weight)
        tenant.weight = waiter.weight
        waiter.account = tenant
        if not tier.backlogged:
            others = [other.served for other in self._tiers.values() if other.backlogged]
            tier.served = max(tier.served, min(others, default=self._last_served))
        if tenant.num_waiting == 0:
            smallest = min((other.served for other in tier.backlogged.values()), default=tier.last_served)
            tenant.served = max(tenant.served, smallest)
            tier.backlogged[waiter.tenant] = tenant
            tier.num_flows[tenant_of(waiter.tenant)] += 1
        tenant.num_waiting += 1
        self._buckets[waiter.bucket] += 1
        tenant.push(waiter)

    def remove(self, waiter: _Waiter) -> None:
        """Take out one that waits, which the caller gives another status."""
        tenant = waiter.account
        assert tenant is not None
        assert tenant.num_waiting > 0, "removed from the queue twice"
        tenant.num_waiting -= 1
        self._buckets[waiter.bucket] -= 1
        if not self._buckets[waiter.bucket]:
            del self._buckets[waiter.bucket]
        if tenant.num_waiting == 0:
            del tenant.tier.backlogged[tenant.name]
            tenant.tier.num_flows[tenant_of(tenant.name)] -= 1
            tenant.heaps.clear()
            tenant.num_entries = 0

    def lead(self, tier: Tier, waiter: _Waiter) -> float:
        """How much more a tier has been served than one's own, in the unit of cost of the latter."""
        assert waiter.account is not None
        own = waiter.account.tier
        return (self._tiers[tier].served - own.served) * own.weight

    def pick(self, *, bucket: Hashable = _ANY, only: Tier | None = None) -> _Waiter | None:
        """Who is next, of all tiers or `only` one, in all buckets or this one."""
        tiers = [tier for name, tier in self._tiers.items() if tier.backlogged and only in (None, name)]
        for tier in sorted(tiers, key=_served):  # of equals the one of higher rank stays first
            for tenant in sorted(tier.backlogged.values(), key=_served):
                if (head := tenant.head(bucket)) is not None:
                    self._last_served, tier.last_served = tier.served, tenant.served
                    return head
        return None


def tenant_of(name: str) -> str:
    """The tenant that a flow is of; a tenant's own name has no slash."""
    return name.partition("/")[0]


_served: Callable[[Any], float] = attrgetter("served")
