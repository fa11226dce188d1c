"""Whether a server that keeps failing is asked at all, and how many of its failures are tried again.

Pure objects: the caller tells them the time. After so many failures in a row the breaker is open and nothing is asked;
after a while one request is let through, whose end closes it or opens it again. Retries are at most a share of the
requests of late, so that they cannot multiply the load of a server that fails of it.
Sources: circuit breakers as in Nygard, Release It!; retry budgets as in Finagle.
"""

from collections import deque

_WINDOW_S = 30.0
# Retries that a client alone on an idle proxy has.
_MIN_RETRIES = 3


class CircuitBreaker:
    """Every `begin` is followed by exactly one of `succeed`, `fail` and `abandon`."""

    def __init__(self, max_failures: int, reset_s: float) -> None:
        self._max_failures = max_failures
        self._reset_s = reset_s
        self._num_failures = 0
        self._opened_s: float | None = None
        self._is_trying = False  # a request is under way that was let through although it is open

    def retry_in_s(self, now: float) -> float:
        """Seconds until a request may be let through, 0 where one may be now."""
        if self._opened_s is None:
            return 0.0
        return max(0.0, self._opened_s + self._reset_s - now)

    def begin(self, now: float) -> float:
        """Let a request through where this returns 0; otherwise it is refused, for so many seconds."""
        if self._opened_s is None:
            return 0.0
        if self._is_trying:
            return self._reset_s
        wait_s = self.retry_in_s(now)
        self._is_trying = wait_s == 0
        return wait_s

    def succeed(self) -> None:
        self._num_failures = 0
        self._opened_s = None
        self._is_trying = False

    def fail(self, now: float) -> None:
        self._num_failures += 1
        if self._is_trying or (self._opened_s is None and self._num_failures >= self._max_failures):
            self._opened_s = now
        self._is_trying = False

    def abandon(self) -> None:
        """Nothing has come of it: its client left, or its end says nothing of the server."""
        self._is_trying = False


class RetryBudget:
    """Retries of late, against requests of late."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._requests: deque[float] = deque()
        self._retries: deque[float] = deque()

    def note_request(self, now: float) -> None:
        self._requests.append(now)
        self._forget(now)

    def take(self, now: float) -> bool:
        """Use a retry, if there is one."""
        self._forget(now)
        has_one = len(self._retries) < _MIN_RETRIES + self._share * len(self._requests)
        if has_one:
            self._retries.append(now)
        return has_one

    def _forget(self, now: float) -> None:
        for times in (self._requests, self._retries):
            while times and times[0] <= now - _WINDOW_S:
                times.popleft()
