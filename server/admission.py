"""Whether a request would have its first token in time, asked before it is accepted, and its place in the queue.

Lives on the event loop. It knows the engine by its last LoadSnapshot, and by itself what has been submitted and has not
been begun. A request would wait for

    TTFT = kappa (max((U + u) / mu, wait for the m-th completion) + t - u / mu) + u / mu

u are its prompt tokens, U those that weighted fair queueing serves before its last one: all of its own tenant's, of
each other's what waits and what will come meanwhile, at most what its weight is worth, and the same over tiers; and
what running prompts still need. mu are prompt tokens per second as steps go now, t is a step. Where fewer places are
free than requests come before it, m sequences have to end first. kappa is the 98th percentile of what first tokens
took, over what was predicted for them: with the 90th one in a hundred came a fifth after its target, at no more of
them in all (benchmarks/README.md).
A request is admitted where that is within 0.8 of its tier's target and the time that its own prompt takes on an idle
server.
Sources: scheduling order of VTC (OSDI 2024) as a fluid; prediction of waiting as in QLM (SoCC 2024).
"""

import itertools
import math
import random
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from headrace.scheduler.fair_queue import tenant_of
from headrace.scheduler.messages import LoadSnapshot, Tier
from headrace.server.errors import OverloadedError

_NUM_RATIOS = 128
# What is presumed at first, of as many first tokens.
_PRESUMED_RATIOS = (2.0,) * 4
_RATIOS_PER_KAPPA = 8
_QUANTILE = 0.98
_MIN_KAPPA, _MAX_KAPPA = 0.8, 3.0
# What of a target a prediction may take.
_USED_SHARE = 0.8
# What is predicted as less is noise when it is compared with what came.
_MIN_PREDICTED_S = 0.02
# How fast a tenant's share of prompts that are found in the prefix cache follows.
_FOLLOWING = 0.1
# Clients give up beyond the longer one.
_MIN_RETRY_S, _MAX_RETRY_S = 1.0, 120.0
_RETRY_JITTER = 0.25
# How old the places may be that those are told who have one, and those who have come since.
_POSITIONS_AGE_S, _NEW_POSITIONS_AGE_S = 0.5, 0.05
# Over how long arrivals are averaged, to tell how many will come.
_RATE_WINDOW_S = 10.0
# A tenant that has sent nothing for so long is forgotten.
_FORGOTTEN_S = 6 * _RATE_WINDOW_S
_MIN_KNOWN_SHARE = 0.1
_NUM_ITERATIONS = 6


@dataclass(frozen=True, slots=True)
class Demand:
    """What a request asks for: `num_tokens` of prompts, which are computed once however many of the `num_sequences`
    share them. Its `tenant` may be a flow of one. Its own `ttft_target_s` stands in place of its tier's."""

    tier: Tier
    tenant: str
    weight: float
    num_tokens: int
    num_sequences: int = 1
    ttft_target_s: float | None = None


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
    token_rate: float = 0.0  # of what was admitted lately, per second at `rate_s`
    request_rate: float = 0.0
    rate_s: float = 0.0
    known_share: float = 0.0  # of the window that the rates are averaged over

    def note_arrival(self, now: float, num_tokens: int) -> None:
        fading = math.exp((self.rate_s - now) / _RATE_WINDOW_S)
        self.token_rate = self.token_rate * fading + num_tokens / _RATE_WINDOW_S
        self.request_rate = self.request_rate * fading + 1 / _RATE_WINDOW_S
        self.known_share = 1 - (1 - self.known_share) * fading
        self.rate_s = now

    def fading(self, now: float) -> float:
        """What to multiply the rates with."""
        fading = math.exp((self.rate_s - now) / _RATE_WINDOW_S)
        return fading / max(_MIN_KNOWN_SHARE, 1 - (1 - self.known_share) * fading)


class Admission:
    """Predicts, and keeps the books of what waits. `targets_s` may be set once the device is known."""

    def __init__(self, tier_weights: Mapping[Tier, float], clock: Callable[[], float]) -> None:
        self.targets_s: Mapping[Tier, float] = dict.fromkeys(Tier, float("inf"))
        self.kappa = max(_PRESUMED_RATIOS)
        self._clock = clock
        self._tier_weights = tier_weights
        self._queues: dict[Tier, dict[str, _TenantQueue]] = {tier: {} for tier in Tier}
        self._demands: dict[int, Demand] = {}
        self._ratios: deque[float] = deque(_PRESUMED_RATIOS, maxlen=_NUM_RATIOS)
        self._num_ratios = 0
        self._positions: dict[int, tuple[int, float]] = {}  # (place, prompt tokens up to its end)
        self._positions_s = float("-inf")

    @property
    def num_queued_tokens(self) -> int:
        return sum(queue.num_tokens for _, queue in self._every_queue())

    def num_queued(self, tier: Tier) -> int:
        return sum(len(queue.requests) for queue in self._queues[tier].values())

    def num_queued_of(self, demand: Demand) -> tuple[int, int]:
        """(Requests, their prompts' tokens) that wait of the same tenant."""
        queue = self._queues[demand.tier].get(demand.tenant)
        return (0, 0) if queue is None else (len(queue.requests), queue.num_tokens)

    def waiting_tenants(self) -> set[str]:
        return {name for name, queue in self._every_queue() if queue.requests}

    def enter(self, request_id: int, demand: Demand) -> None:
        """Count a request of one sequence as waiting."""
        now = self._clock()
        queues = self._queues[demand.tier]
        if (queue := queues.get(demand.tenant)) is None:
            self._forget_tenants(now)
            queue = queues[demand.tenant] = _TenantQueue(rate_s=now)
        queue.weight = demand.weight
        queue.requests[request_id] = demand.num_tokens
        queue.num_tokens += demand.num_tokens
        queue.note_arrival(now, demand.num_tokens)
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
        most_s = self.targets_s[demand.tier] if demand.ttft_target_s is None else demand.ttft_target_s
        if load.prefill_tokens_per_s <= 0:  # no step has been seen
            return Prediction(0.0, most_s, 0.0)
        queue = self._queues[demand.tier].get(demand.tenant, _TenantQueue())
        num_tokens = demand.num_tokens * queue.uncached_share
        now = self._clock()
        raw_s = self._served_after_s(
            demand,
            own=num_tokens + queue.num_tokens * queue.uncached_share,
            first=load.num_prefill_tokens,
            per_s=load.prefill_tokens_per_s,
            waiting=lambda q: q.num_tokens * q.uncached_share,
            rate=lambda q: q.token_rate * q.uncached_share * q.fading(now),
        )
        if load.completions_per_s > 0:
            num_places = load.num_startable + (load.num_preemptable if demand.tier is Tier.PREMIUM else 0)
            completions_s = self._served_after_s(
                demand,
                own=demand.num_sequences + len(queue.requests),
                first=-num_places,
                per_s=load.completions_per_s,
                waiting=lambda q: len(q.requests),
                rate=lambda q: q.request_rate * q.fading(now),
            )
            raw_s = max(raw_s, completions_s)
        raw_s += load.step_s
        own_s = num_tokens / load.prefill_tokens_per_s  # of which there is no doubt
        idle_s = num_tokens / load.idle_tokens_per_s if load.idle_tokens_per_s > 0 else own_s
        target_s = _USED_SHARE * most_s + idle_s
        return Prediction(self.kappa * (raw_s - own_s) + own_s, target_s, raw_s)

    def predict_longest(self, load: LoadSnapshot, tier: Tier) -> float:
        """Seconds to the first token of the next request of the tier's tenant that waits for most, beside those of its
        own prompt; none while nobody is served."""
        if self._is_idle(load):
            return 0.0
        tenant, queue = max(
            self._queues[tier].items(),
            key=lambda named: named[1].num_tokens * named[1].uncached_share / named[1].weight,
            default=("", _TenantQueue()),
        )
        return self.predict(load, Demand(tier, tenant, queue.weight, 0)).ttft_s

    def admit(self, load: LoadSnapshot, demand: Demand) -> Prediction:
        """Raises: OverloadedError where the first token would come too late. An idle server takes everything."""
        prediction = self.predict(load, demand)
        if prediction.ttft_s > prediction.target_s and not self._is_idle(load):
            raise OverloadedError(
                f"the first token would come after {prediction.ttft_s:.1f} s, and {demand.tier.value} requests of this "
                f"length are to have theirs within {prediction.target_s:.1f} s",
                retry_after_s(prediction.ttft_s - prediction.target_s),
                code="predicted_too_late",
                tier=demand.tier,
                predicted_ttft_s=prediction.ttft_s,
                target_ttft_s=prediction.target_s,
            )
        return prediction

    def _is_idle(self, load: LoadSnapshot) -> bool:
        return load.num_running == 0 and not self._demands

    def observe(self, predicted_raw_s: float, actual_s: float) -> None:
        """Learn from a first token that has come."""
        if predicted_raw_s < _MIN_PREDICTED_S:
            return
        self._ratios.append(actual_s / predicted_raw_s)
        self._num_ratios += 1
        if self._num_ratios == _RATIOS_PER_KAPPA:
            for _ in _PRESUMED_RATIOS:
                self._ratios.popleft()
        if self._num_ratios % _RATIOS_PER_KAPPA == 0:
            ordered = sorted(self._ratios)
            self.kappa = min(_MAX_KAPPA, max(_MIN_KAPPA, ordered[int(_QUANTILE * len(ordered))]))

    def position(self, load: LoadSnapshot, request_id: int) -> tuple[int, float] | None:
        """(Place in the queue from 1, estimated seconds to the first token), None where it does not wait. Readers ask
        often, so all are found at once and kept for a moment; who has come since is told the last place."""
        if request_id not in self._demands:
            return None
        now = self._clock()
        most_s = _POSITIONS_AGE_S if request_id in self._positions else _NEW_POSITIONS_AGE_S
        if now - self._positions_s > most_s:
            self._positions_s = now
            self._positions = self._find_positions()
        if (found := self._positions.get(request_id)) is None:
            num_tokens = sum(queue.num_tokens * queue.uncached_share for _, queue in self._every_queue())
            found = len(self._demands), num_tokens
        place, num_tokens = found
        return place, round(self.kappa * _wait_s(load, num_tokens, place), 3)

    def _every_queue(self) -> Iterator[tuple[str, _TenantQueue]]:
        """(Tenant, its queue) in all tiers."""
        return itertools.chain.from_iterable(queues.items() for queues in self._queues.values())

    def _forget_tenants(self, now: float) -> None:
        """Keep those that something waits of, or has come of lately: the others only cost time."""
        for queues in self._queues.values():
            for tenant in [name for name, q in queues.items() if not q.requests and now - q.rate_s > _FORGOTTEN_S]:
                del queues[tenant]

    def _served_after_s(
        self,
        demand: Demand,
        *,
        own: float,
        first: float,
        per_s: float,
        waiting: Callable[[_TenantQueue], float],
        rate: Callable[[_TenantQueue], float],
    ) -> float:
        """When fair queueing has served `own`, its tenant's work up to a request's end: others' work comes between it
        as far as it waits now or comes until then, and as their weights go; `first` is served before all."""
        queues = self._queues[demand.tier]
        num_flows = _num_flows(queues, demand.tenant)
        own_share = demand.weight / num_flows[tenant_of(demand.tenant)]
        others = [
            (waiting(q), rate(q), q.weight / max(1, num_flows[tenant_of(name)]) / own_share)
            for name, q in queues.items()
            if name != demand.tenant
        ]
        own_weight = self._tier_weights[demand.tier]
        tiers = [
            (sum(map(waiting, queues.values())), sum(map(rate, queues.values())), self._tier_weights[tier] / own_weight)
            for tier, queues in self._queues.items()
            if tier is not demand.tier
        ]
        seconds = 0.0
        for _ in range(_NUM_ITERATIONS):  # rises towards where it stays
            in_tier = own + sum(min(now + per_s_ * seconds, share * own) for now, per_s_, share in others)
            in_all = in_tier + sum(min(now + per_s_ * seconds, share * in_tier) for now, per_s_, share in tiers)
            seconds = max(0.0, in_all + first) / per_s
        return seconds

    def _find_positions(self) -> dict[int, tuple[int, float]]:
        """Fair queueing played out: requests in the order of what has been served per weight when each is through,
        among the tenants of a tier, and then among tiers."""
        order: list[tuple[float, int, float]] = []  # of tiers: (served per weight, request, tokens)
        for tier, queues in self._queues.items():
            in_tier: list[tuple[float, int, float]] = []
            num_flows = _num_flows(queues)
            for name, queue in queues.items():
                share = queue.weight / max(1, num_flows[tenant_of(name)])
                served = 0.0
                for request_id, num_tokens in queue.requests.items():
                    served += 1 + num_tokens * queue.uncached_share  # those without tokens have an order too
                    in_tier.append((served / share, request_id, num_tokens * queue.uncached_share))
            served = 0.0
            for _, request_id, tokens in sorted(in_tier):
                served += 1 + tokens
                order.append((served / self._tier_weights[tier], request_id, tokens))
        positions = {}
        total = 0.0
        for position, (_, request_id, tokens) in enumerate(sorted(order), start=1):
            total += tokens
            positions[request_id] = position, total
        return positions


def queue_part(own: str, waiting: Iterable[str]) -> float:
    """The part of a full queue that one of those that wait in it may hold: tenants have equal ones, and of a tenant's
    its flows."""
    num_flows = Counter(map(tenant_of, {own, *waiting}))
    return 1 / (len(num_flows) * num_flows[tenant_of(own)])


def _num_flows(queues: Mapping[str, _TenantQueue], own: str | None = None) -> Counter[str]:
    """How many flows each tenant has that something waits of, and `own`. They have its weight together."""
    waiting = {name for name, queue in queues.items() if queue.requests}
    return Counter(map(tenant_of, waiting if own is None else waiting | {own}))


def retry_after_s(wait_s: float) -> float:
    """When a refused client is asked to come back. Jitter keeps them from doing so all at once."""
    most_s = _MAX_RETRY_S / (1 + _RETRY_JITTER)
    return min(most_s, max(_MIN_RETRY_S, wait_s)) * random.uniform(1 - _RETRY_JITTER, 1 + _RETRY_JITTER)


def _wait_s(load: LoadSnapshot, num_tokens: float, num_requests: float) -> float:
    """Seconds until so many queued prompt tokens, and so many requests with them, have been served."""
    if load.prefill_tokens_per_s <= 0:
        return 0.0  # no step has been seen
    wait_s = (num_tokens + load.num_prefill_tokens) / load.prefill_tokens_per_s
    num_completions = num_requests - load.num_startable
    if num_completions > 0 and load.completions_per_s > 0:
        wait_s = max(wait_s, num_completions / load.completions_per_s)
    return wait_s + load.step_s
