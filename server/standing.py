"""Who a request is among those that wait: its tier, what the queue is fair to, its weight, and when it is due.

A pure function of its tenant's key and of what a trusted gateway says of it. A gateway may divide a tenant into flows,
which have the tenant's weight together, and may lower a tier; no key lets it raise one. As ids of flows are anybody's,
there is a fixed number of flows, and an id falls into one of them by a hash that differs from process to process.
Paper: stochastic fairness queueing (McKenney, 1990).
"""

from typing import NamedTuple

from headrace.scheduler.messages import Tier
from headrace.server.api_keys import ApiKeys

NUM_FLOWS = 256
_RANKS = {tier: rank for rank, tier in enumerate(Tier)}


class Hints(NamedTuple):
    """What a gateway says of a request; None for what it does not say."""

    tier: Tier | None = None
    fairness_id: str | None = None
    ttft_target_s: float | None = None


NO_HINTS = Hints()


class Standing(NamedTuple):
    """`tenant` is a tenant's name, or behind a slash one of its flows. Without a `ttft_target_s` its tier's holds."""

    tier: Tier
    tenant: str
    weight: float
    ttft_target_s: float | None = None


def standing_of(keys: ApiKeys | None, tenant: str, hints: Hints = NO_HINTS) -> Standing:
    """The standing of a tenant's request; that of anybody where the tenant has no entry."""
    key = None if keys is None else keys.get(tenant)
    tier, weight = (Tier.STANDARD, 1.0) if key is None else (key.tier, key.weight)
    if hints.tier is not None:
        tier = hints.tier if keys is None else max(tier, hints.tier, key=_RANKS.__getitem__)
    if hints.fairness_id is not None:
        tenant = f"{tenant}/{hash(hints.fairness_id) % NUM_FLOWS}"
    return Standing(tier, tenant, weight, hints.ttft_target_s)
