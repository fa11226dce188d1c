"""The waiting sequences, and who of them is next: weighted fair queueing over tiers, and over tenants inside a tier.

Owned by the engine thread. Each tier and each tenant has a counter of the service it has had, in prompt tokens, divided
by its weight. Next is the tier with the smallest counter among those with somebody waiting, inside it the tenant with
the smallest, and of a tenant's requests the one with the earliest deadline, then the oldest. Whoever comes back from
having nobody waiting is lifted to the smallest counter of those that have: idle time is not saved up. So no tier
starves: with somebody waiting it gets its weight's share at least.
Paper: VTC (OSDI 2024). Deviations: two levels; a prompt's tokens are charged as they are computed, not when it is
picked.
"""

import heapq
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from headrace.scheduler.messages import Tier
from headrace.scheduler.sequence import Sequence, SequenceStatus

# A tenant's heap is rebuilt when it has so many entries of sequences that do not wait any more, beside as many as do.
_MIN_STALE = 64


@dataclass(slots=True, eq=False)
class _TierAccount:
    """A tier's counter, and the tenants it has seen; `last_served` is the smallest counter at its last pick."""

    weight: float
    served: float = 0.0
    tenants: "dict[str, TenantAccount]" = field(default_factory=dict)
    backlogged: "dict[str, TenantAccount]" = field(default_factory=dict)
    last_served: float = 0.0


@dataclass(slots=True, eq=False)
class TenantAccount:
    """A tenant's counter and its waiting sequences, as heaps of (deadline, request id, a number of its own,
    sequence): prompts that end within two steps, and longer ones. Entries of sequences that wait no more are dropped
    when they come up."""

    name: str
    tier: _TierAccount
    weight: float
    served: float = 0.0
    num_waiting: int = 0
    numbers: Iterator[int] = field(default_factory=itertools.count)
    heaps: tuple[list[tuple[float, int, int, Sequence]], ...] = field(default_factory=lambda: ([], []))

    def charge(self, tokens: float) -> None:
        """Count service, in prompt tokens' worth."""
        self.served += tokens / self.weight
        self.tier.served += tokens / self.tier.weight

    def push(self, sequence: Sequence) -> None:
        heap = self.heaps[sequence.is_long]
        heapq.heappush(heap, (sequence.first_token_due_s, sequence.request_id, next(self.numbers), sequence))
        if len(heap) > 2 * self.num_waiting + _MIN_STALE:
            heap[:] = [entry for entry in heap if entry[3].status is SequenceStatus.WAITING]
            heapq.heapify(heap)

    def head(self, *, takes_long: bool) -> Sequence | None:
        """The first of those that wait; without `takes_long` the first short one."""
        entries = []
        for heap in self.heaps[: 1 + takes_long]:
            while heap and heap[0][3].status is not SequenceStatus.WAITING:
                heapq.heappop(heap)
            if heap:
                entries.append(heap[0])
        return min(entries)[3] if entries else None


class FairQueue:
    """Waiting sequences by tier and tenant. `pick` only looks: the caller removes who gets to run."""

    def __init__(self, tier_weights: Mapping[Tier, float]) -> None:
        self._tiers = {tier: _TierAccount(tier_weights[tier]) for tier in Tier}
        self._last_served = 0.0
        self._num_short = 0
        self._num_waiting = 0

    def __len__(self) -> int:
        return self._num_waiting

    @property
    def has_short(self) -> bool:
        """Whether a prompt waits that would end within two steps."""
        return self._num_short > 0

    def push(self, sequence: Sequence) -> None:
        """Put a sequence where its deadline and its age place it; a preempted one comes back to its place."""
        request = sequence.request
        tier = self._tiers[request.tier]
        tenant = tier.tenants.get(request.tenant)
        if tenant is None:
            tenant = tier.tenants[request.tenant] = TenantAccount(request.tenant, tier, request.weight)
        tenant.weight = request.weight
        sequence.account = tenant
        if not tier.backlogged:
            others = [other.served for other in self._tiers.values() if other.backlogged]
            tier.served = max(tier.served, min(others, default=self._last_served))
        if tenant.num_waiting == 0:
            smallest = min((other.served for other in tier.backlogged.values()), default=tier.last_served)
            tenant.served = max(tenant.served, smallest)
            tier.backlogged[request.tenant] = tenant
        tenant.num_waiting += 1
        self._num_waiting += 1
        self._num_short += not sequence.is_long
        tenant.push(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take out a waiting sequence, which the caller gives another status."""
        tenant = sequence.account
        assert tenant is not None
        assert tenant.num_waiting > 0, "removed from the queue twice"
        tenant.num_waiting -= 1
        self._num_waiting -= 1
        self._num_short -= not sequence.is_long
        if tenant.num_waiting == 0:
            del tenant.tier.backlogged[tenant.name]
            for heap in tenant.heaps:
                heap.clear()

    def lead(self, tier: Tier, sequence: Sequence) -> float:
        """How much more a tier has been served than a sequence's own, in prompt tokens of the latter."""
        assert sequence.account is not None
        own = sequence.account.tier
        return (self._tiers[tier].served - own.served) * own.weight

    def pick(self, *, takes_long: bool = True, only: Tier | None = None) -> Sequence | None:
        """Who is next, of all tiers or `only` one. Without `takes_long` long prompts are passed over."""
        tiers = [tier for name, tier in self._tiers.items() if tier.backlogged and only in (None, name)]
        for tier in sorted(tiers, key=_served):  # of equals the one of higher rank stays first
            for tenant in sorted(tier.backlogged.values(), key=_served):
                if (head := tenant.head(takes_long=takes_long)) is not None:
                    self._last_served, tier.last_served = tier.served, tenant.served
                    return head
        return None


_served: Callable[[Any], float] = attrgetter("served")
