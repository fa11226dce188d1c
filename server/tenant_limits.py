"""What a tenant's key allows: requests and tokens per minute, and answers at once.

Lives on the event loop. A rate is a bucket that holds a minute's worth and refills steadily (GCRA, of pyrate-limiter):
one number per tenant, whatever it asks for. From rest a tenant can use the minute's worth at once while it refills, so
m minutes hold at most m + 1 times the limit. How many tokens an answer takes is known only afterwards: they are charged
in full, below zero where need be, and the tenant waits until that is made good; the last request let in may so exceed
the limit. Limits are read from the keys each time, so a reload takes effect at once; what a rate has changed to begins
with a whole minute's worth.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pyrate_limiter import GCRA, Decision, Rate

from headrace.server.api_keys import ApiKeys
from headrace.server.errors import BadRequestError, RateLimitError

# pyrate-limiter's unit of time is the millisecond, of which it keeps thousandths and rounds the time per token up to
# them. For millions of tokens a minute that is too coarse, so that its millisecond is a microsecond here.
_UNITS_PER_S = 1_000_000
_MINUTE = 60 * _UNITS_PER_S

_CONCURRENT_RETRY_S = 1.0


class _Bucket:
    """What of a rate per minute each tenant has used."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._algorithm = GCRA()
        self._states: dict[str, tuple[int, tuple[float, ...]]] = {}  # with the limit that each was counted against

    def wait_s(self, tenant: str, per_minute: int) -> float:
        """Seconds until there is room for one more, 0 where there is now. Uses nothing."""
        _, decision = self._step(tenant, Rate(per_minute, _MINUTE), 1)
        return (decision.retry_after_ms or 0) / _UNITS_PER_S

    def use(self, tenant: str, per_minute: int, num: int) -> None:
        """Use `num` of it, whether there is room or not."""
        state, decision = self._step(tenant, Rate(per_minute, _MINUTE, burst=sys.maxsize), num)
        assert decision.allowed
        self._states[tenant] = (per_minute, state)

    def keep_only(self, tenants: frozenset[str]) -> None:
        for tenant in self._states.keys() - tenants:
            del self._states[tenant]

    def _step(self, tenant: str, rate: Rate, num: int) -> tuple[tuple[float, ...], Decision]:
        limit, state = self._states.get(tenant, (0, ()))
        if limit != rate.limit:
            state = self._algorithm.initial([rate])
        return self._algorithm.step([rate], state, round(self._clock() * _UNITS_PER_S), num)


class TenantLimits:
    """What every tenant has used and has under way. Who has no entry in the keys has no limits."""

    def __init__(self, keys: ApiKeys | None, clock: Callable[[], float]) -> None:
        self._keys = keys
        self._requests = _Bucket(clock)
        self._tokens = _Bucket(clock)
        self._running: Counter[str] = Counter()

    def admit(self, tenant: str, num_sequences: int) -> None:
        """Let a request in and count it; it is the caller's to begin its answers before it awaits anything.

        Raises: RateLimitError where a limit is used up, and nothing is counted; BadRequestError for more answers than
        the tenant may ever have at once.
        """
        key = None if self._keys is None else self._keys.get(tenant)
        if key is None:
            return
        waits = []  # (seconds, the limit)
        if key.max_concurrent is not None:
            if num_sequences > key.max_concurrent:
                raise BadRequestError(f"{num_sequences} answers are more than this key's {key.max_concurrent} at once")
            if self._running[tenant] + num_sequences > key.max_concurrent:
                waits.append((_CONCURRENT_RETRY_S, f"{key.max_concurrent} answers at once"))
        if key.requests_per_minute is not None:
            wait_s = self._requests.wait_s(tenant, key.requests_per_minute)
            waits.append((wait_s, f"{key.requests_per_minute} requests per minute"))
        if key.tokens_per_minute is not None:
            wait_s = self._tokens.wait_s(tenant, key.tokens_per_minute)
            waits.append((wait_s, f"{key.tokens_per_minute} tokens per minute"))
        wait_s, limit = max(waits, default=(0.0, ""))
        if wait_s > 0:
            raise RateLimitError(f"this key's limit of {limit} is used up", wait_s)
        if key.requests_per_minute is not None:
            self._requests.use(tenant, key.requests_per_minute, 1)

    @contextmanager
    def within(self, tenant: str, num_sequences: int) -> Iterator[None]:
        """Hold a tenant's places inside the block; what begins there takes places of its own.

        Raises: as `admit`.
        """
        self.admit(tenant, num_sequences)
        self.begin(tenant, num_sequences)
        try:
            yield
        finally:
            self.end(tenant, num_sequences)

    def charge(self, tenant: str, num_tokens: int) -> None:
        """Count tokens of a prompt that was let in, or of an answer that is over."""
        key = None if self._keys is None else self._keys.get(tenant)
        if num_tokens and key is not None and key.tokens_per_minute is not None:
            self._tokens.use(tenant, key.tokens_per_minute, num_tokens)

    def begin(self, tenant: str, num_sequences: int = 1) -> None:
        """Count answers as under way, limits or none: a reload may bring some."""
        self._running[tenant] += num_sequences

    def end(self, tenant: str, num_sequences: int = 1) -> None:
        """Count answers that began as over."""
        assert self._running[tenant] >= num_sequences
        self._running[tenant] -= num_sequences
        if not self._running[tenant]:
            del self._running[tenant]

    def num_running(self, tenant: str) -> int:
        """Answers under way, those that wait to run among them."""
        return self._running[tenant]

    def keep_only(self, tenants: frozenset[str]) -> None:
        """Forget the rates of tenants that are none any more; of their answers each is still to end."""
        self._requests.keep_only(tenants)
        self._tokens.keep_only(tenants)
