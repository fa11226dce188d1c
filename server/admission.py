"""Whether a request would have its first token in time, asked before it is accepted, and its place in the queue.

Lives on the event loop. It knows the engine by its last LoadSnapshot, and by itself what has been submitted and has not
been begun. A request would wait for

    TTFT = kappa (max((U + u) / mu, wait for the m-th completion) + t)

u are its prompt tokens, U those that weighted fair queueing serves before its last one: all of its own tenant's, of
each other's at most what that one's weight is worth meanwhile, and the same over tiers, and what running prompts still
need. mu are prompt tokens per second as steps go now, t is a step. Where fewer places are free than requests come
before it, m sequences have to end first. kappa is the 90th percentile of what first tokens took, over what was
predicted for them.
A request is admitted where that is within its tier's target and the time that its own prompt takes on an idle server.
Sources: scheduling order of VTC (OSDI 2024) as a fluid; prediction of waiting as in QLM (SoCC 2024).
"""

import random
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from headrace.scheduler.messages import LoadSnapshot, Tier
from headrace.server.errors import OverloadedError

_NUM_RATIOS = 128
_RATIOS_PER_KAPPA = 8
_MIN_KAPPA, _MAX_KAPPA = 0.8, 3.0
# What is predicted as less is noise when it is compared with what came.
_MIN_PREDICTED_S = 0.02
# How fast a tenant's share of prompts that are found in the prefix cache follows.
_FOLLOWING = 0.1
# Clients give up beyond this.
MAX_RETRY_S = 120.0
_POSITIONS_AGE_S = 0.5


@dataclass(frozen=True, slots=True)
class Demand:
    """What a request asks for: `num_tokens` of prompts, which are computed once however many of the `num_sequences`
    share them."""

    tier: Tier
    tenant: str
    weight: float
    num_tokens: int
    num_sequences: int = 1


@dataclass(frozen=True, slots=True)
class Prediction:
    """Seconds to the first token, from now, and how many it may be. `raw_s` is without kappa."""

    ttft_s: float
    target_s: float
    raw_s: float


@dataclass(slots=True, eq=False)
class _TenantQueue:
    """A tenant's submitted and not begun requests, oldest first, with their tokens."""

    weight: float = 1.0
    requests: dict[int, int] = field(default_factory=dict)
    num_tokens: int = 0
    uncached_share: float = 1.0


class Admission:
    """Predicts, and keeps the books of what waits. `targets_s` may be set once the device is known."""

    def __init__(self, tier_weights: Mapping[Tier, float], clock: Callable[[], float]) -> None:
        self.targets_s: Mapping[Tier, float] = dict.fromkeys(Tier, float("inf"))
        self.kappa = 1.0
        self._clock = clock
        self._tier_weights = tier_weights
        self._queues: dict[Tier, dict[str, _TenantQueue]] = {tier: {} for tier in Tier}
        self._demands: dict[int, Demand] = {}
        self._ratios: deque[float] = deque(maxlen=_NUM_RATIOS)
        self._num_ratios = 0
        self._positions: dict[int, tuple[int, float]] = {}
        self._positions_s = float("-inf")

    @property
    def num_queued_tokens(self) -> int:
        return sum(queue.num_tokens for queues in self._queues.values() for queue in queues.values())

    def num_queued(self, tier: Tier) -> int:
        return sum(len(queue.requests) for queue in self._queues[tier].values())

    def enter(self, request_id: int, demand: Demand) -> None:
        """Count a request of one sequence as waiting."""
        queue = self._queues[demand.tier].setdefault(demand.tenant, _TenantQueue())
        queue.weight = demand.weight
        queue.requests[request_id] = demand.num_tokens
        queue.num_tokens += demand.num_tokens
        self._demands[request_id] = demand

    def leave(self, request_id: int, num_cached: int | None = None) -> None:
        """Count it as begun, with so many tokens found in the cache, or as over; without effect the second time."""
        demand = self._demands.pop(request_id, None)
        if demand is None:
            return
        queue = self._queues[demand.tier][demand.tenant]
        del queue.requests[request_id]
        queue.num_tokens -= demand.num_tokens
        if num_cached is not None and demand.num_tokens > 0:
            uncached = 1 - num_cached / demand.num_tokens
            queue.uncached_share += _FOLLOWING * (max(0.0, uncached) - queue.uncached_share)

    def predict(self, load: LoadSnapshot, demand: Demand) -> Prediction:
        """How soon a request would have its first token if it were submitted now."""
        queue = self._queues[demand.tier].get(demand.tenant, _TenantQueue())
        num_tokens = demand.num_tokens * queue.uncached_share
        tokens = self._served_before(demand, lambda q: q.num_tokens * q.uncached_share, num_tokens)
        requests = self._served_before(demand, lambda q: len(q.requests), demand.num_sequences)
        raw_s = _wait_s(load, tokens, requests)
        own_s = num_tokens / load.idle_tokens_per_s if load.idle_tokens_per_s > 0 else 0.0
        return Prediction(self.kappa * raw_s, self.targets_s[demand.tier] + own_s, raw_s)

    def admit(self, load: LoadSnapshot, demand: Demand) -> Prediction:
        """Raises: OverloadedError where the first token would come too late. An idle server takes everything."""
        prediction = self.predict(load, demand)
        is_idle = load.num_running == 0 and not self._demands
        if prediction.ttft_s > prediction.target_s and not is_idle:
            # Jitter keeps the refused from coming back all at once.
            wait_s = (prediction.ttft_s - prediction.target_s) * random.uniform(0.75, 1.25)
            raise OverloadedError(
                f"the first token would come after {prediction.ttft_s:.1f} s, and {demand.tier.value} requests of this "
                f"length are to have theirs within {prediction.target_s:.1f} s",
                min(MAX_RETRY_S, max(1.0, wait_s)),
                code="predicted_too_late",
                tier=demand.tier,
                predicted_ttft_s=prediction.ttft_s,
                target_ttft_s=prediction.target_s,
            )
        return prediction

    def observe(self, predicted_raw_s: float, actual_s: float) -> None:
        """Learn from a first token that has come."""
        if predicted_raw_s < _MIN_PREDICTED_S:
            return
        self._ratios.append(actual_s / predicted_raw_s)
        self._num_ratios += 1
        if self._num_ratios % _RATIOS_PER_KAPPA == 0:
            ordered = sorted(self._ratios)
            self.kappa = min(_MAX_KAPPA, max(_MIN_KAPPA, ordered[int(0.9 * len(ordered))]))

    def position(self, load: LoadSnapshot, request_id: int) -> tuple[int, float] | None:
        """(Place in the queue from 1, estimated seconds to the first token), None where it does not wait. Readers ask
        often, so all are found at once and kept for a moment."""
        if request_id not in self._demands:
            return None
        now = self._clock()
        if request_id not in self._positions or now - self._positions_s > _POSITIONS_AGE_S:
            self._positions_s = now
            self._positions = self._find_positions(load)
        return self._positions[request_id]

    def _served_before(self, demand: Demand, size: Callable[[_TenantQueue], float], own: float) -> float:
        """What fair queueing serves up to a request's end: its own tenant's, and others' as far as their weights go."""
        tenants = self._queues[demand.tier]
        if (queue := tenants.get(demand.tenant)) is not None:
            own += size(queue)
        per_weight = own / demand.weight
        in_tier = own + sum(
            min(size(queue), queue.weight * per_weight)
            for tenant, queue in tenants.items()
            if tenant != demand.tenant and queue.requests
        )
        per_weight = in_tier / self._tier_weights[demand.tier]
        return in_tier + sum(
            min(sum(map(size, queues.values())), self._tier_weights[tier] * per_weight)
            for tier, queues in self._queues.items()
            if tier is not demand.tier
        )

    def _find_positions(self, load: LoadSnapshot) -> dict[int, tuple[int, float]]:
        """Fair queueing played out: requests in the order of what has been served per weight when each is through,
        among the tenants of a tier, and then among tiers."""
        order: list[tuple[float, int, float]] = []  # of tiers: (served per weight, request, tokens)
        for tier, queues in self._queues.items():
            in_tier: list[tuple[float, int, float]] = []
            for queue in queues.values():
                served = 0.0
                for request_id, num_tokens in queue.requests.items():
                    served += 1 + num_tokens * queue.uncached_share  # those without tokens have an order too
                    in_tier.append((served / queue.weight, request_id, num_tokens * queue.uncached_share))
            served = 0.0
            for _, request_id, tokens in sorted(in_tier):
                served += 1 + tokens
                order.append((served / self._tier_weights[tier], request_id, tokens))
        positions = {}
        total = 0.0
        for position, (_, request_id, tokens) in enumerate(sorted(order), start=1):
            total += tokens
            positions[request_id] = position, round(self.kappa * _wait_s(load, total, position), 3)
        return positions


def _wait_s(load: LoadSnapshot, num_tokens: float, num_requests: float) -> float:
    """Seconds until so many queued prompt tokens, and so many requests with them, have been served."""
    if load.prefill_tokens_per_s <= 0:
        return 0.0  # no step has been seen
    wait_s = (num_tokens + load.num_prefill_tokens) / load.prefill_tokens_per_s
    num_completions = num_requests - load.num_startable
    if num_completions > 0 and load.completions_per_s > 0:
        wait_s = max(wait_s, num_completions / load.completions_per_s)
    return wait_s + load.step_s
