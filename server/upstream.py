"""The server behind the proxy: one HTTP client, its deadlines and retries, and what of its failures is told to whom.

Lives on the event loop. It knows nothing of what is asked. A request is tried again only while nothing of its answer
has been used, within its deadline and the retry budget; a circuit breaker keeps a server that fails from being asked.
How much of an answer is read is bounded.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import anyio
import httpx
from prometheus_client import CollectorRegistry, Counter, Gauge
from pydantic_core import from_json
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, wait_random_exponential

from headrace.server.circuit_breaker import CircuitBreaker, RetryBudget
from headrace.server.errors import (
    ApiError,
    BadGatewayError,
    BadRequestError,
    DeadlineError,
    UnavailableError,
    UpstreamError,
    envelope,
)

TIMEOUT_HEADER = "x-request-timeout"
# Of a refusal or an answer, what clients act on.
_PASSED_HEADERS = ("content-type", "inference-header-content-length")
_PASSED_REFUSAL_HEADERS = ("retry-after", "retry-after-ms", "x-should-retry", "www-authenticate", "allow")
# Not 429: whom that is for has used up his own share, and others would wait behind his retries.
_RETRIED_STATUSES = frozenset({502, 503, 504})
# The longest that an upstream which asks for a wait is waited for: a lane's others wait too.
_LONGEST_WAIT_S = 2.0
# The longest line of a stream.
_MOST_LINE_BYTES = 2**20
_OUTCOMES = ("ok", "refused", "failed", "unreachable", "timeout", "unusable", "cancelled")
_CONNECT_TIMEOUT_S = 5.0
_MAX_IDLE_CONNECTIONS = 64
# A deadline that a client has chosen says something of the server only where it is not far below the operator's.
_TELLING_SHARE = 0.5
# What has ended this near to its deadline has ended of it.
_DEADLINE_SLACK_S = 0.05
_MIN_BACKOFF_S, _MAX_BACKOFF_S = 0.1, 1.0

UNREACHABLE = "upstream_unreachable"
TOO_LARGE = "upstream_answer_too_large"
BAD_ANSWER = "upstream_bad_answer"

T = TypeVar("T")


class Answer(NamedTuple):
    """A 2xx, whole, with those of its headers that are passed on."""

    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        """Raises: BadGatewayError."""
        try:
            return from_json(self.body)
        except ValueError:
            raise BadGatewayError("the upstream's answer is not JSON", BAD_ANSWER) from None


@dataclass(frozen=True, slots=True)
class Call:
    """A request to the upstream. `due_s` is on the clock; of a call that `is_shared` by several items one may be to
    blame for an internal error, so that it says nothing of the server."""

    method: str
    path: str
    headers: Mapping[str, str]
    due_s: float
    body: bytes = b""
    is_shared: bool = False


class Upstream:
    """One server. `registry` gets its metrics."""

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float,
        retries: int,
        retry_budget: float,
        breaker: CircuitBreaker,
        max_response_bytes: int,
        max_connections: int,
        clock: Callable[[], float],
        registry: CollectorRegistry,
        transport: httpx.AsyncBaseTransport | None = None,
        sleep: Callable[[float], Awaitable[None]] = anyio.sleep,
    ) -> None:
        self.breaker = breaker
        self._timeout_s = timeout_s
        self._retries = retries
        self._budget = RetryBudget(retry_budget)
        self._max_response_bytes = max_response_bytes
        self._clock = clock
        self._sleep = sleep
        # A transport of our own, since the client would send even what is for this machine to a proxy in the
        # environment.
        limits = httpx.Limits(max_connections=max_connections, max_keepalive_connections=_MAX_IDLE_CONNECTIONS)
        self._client = httpx.AsyncClient(
            base_url=url,
            transport=transport or httpx.AsyncHTTPTransport(limits=limits),
            headers={"accept-encoding": "identity", "user-agent": "headrace-proxy"},
        )
        attempts = Counter("headrace_upstream_attempts", "Requests sent, by end", ["outcome"], registry=registry)
        self._attempts = {outcome: attempts.labels(outcome) for outcome in _OUTCOMES}
        self._num_retries = Counter("headrace_upstream_retries", "Of those, second and later tries", registry=registry)
        is_open = Gauge("headrace_upstream_breaker_open", "1 while nothing is asked", registry=registry)
        is_open.set_function(lambda: float(breaker.retry_in_s(clock()) > 0))

    async def close(self) -> None:
        await self._client.aclose()

    async def fetch(self, call: Call) -> Answer:
        """Ask, and read the whole answer.

        Raises: UpstreamError for what the upstream refuses; BadGatewayError, DeadlineError, UnavailableError.
        """

        async def attempt() -> Answer:
            with self._watched(call):
                request = self._request(call)
                response = await self._client.send(request, stream=True)
                try:
                    await self._check(response)
                    body = b"".join([chunk async for chunk in self._chunks(response)])
                finally:
                    await response.aclose()
                return Answer(_passed(response, _PASSED_HEADERS), body)

        return await self._retry(call, attempt)

    @asynccontextmanager
    async def stream(self, call: Call) -> AsyncIterator[AsyncIterator[bytes]]:
        """Ask, and yield the pieces of a stream of events once the first is there. Raises: as `fetch` does."""
        async with AsyncExitStack() as stack:

            async def attempt() -> AsyncGenerator[bytes]:
                with self._watched(call):
                    response = await self._client.send(self._request(call), stream=True)
                    async with AsyncExitStack() as opened:
                        opened.push_async_callback(response.aclose)
                        await self._check(response)
                        if not response.headers.get("content-type", "").startswith("text/event-stream"):
                            raise BadGatewayError("the upstream does not stream", BAD_ANSWER)
                        chunks = self._chunks(response)
                        first = await anext(chunks, b"")
                        stack.push_async_exit(opened.pop_all())
                    return self._rest(first, chunks)

            async with aclosing(await self._retry(call, attempt)) as chunks:
                yield chunks

    async def is_reachable(self, path: str, timeout_s: float) -> bool:
        """Whether it answers, beside all other requests and without a retry."""
        try:
            response = await self._client.get(path, timeout=timeout_s)
        except httpx.HTTPError:
            return False
        return response.status_code < 500

    async def _retry(self, call: Call, attempt: Callable[[], Awaitable[T]]) -> T:
        self._budget.note_request(self._clock())
        backoff = wait_random_exponential(multiplier=_MIN_BACKOFF_S, max=_MAX_BACKOFF_S)

        def wait(state: RetryCallState) -> float:
            return max(backoff(state), _retry_after_s(_error_of(state)))

        def stop(state: RetryCallState) -> bool:
            now = self._clock()
            is_late = now + state.upcoming_sleep >= call.due_s or state.upcoming_sleep > _LONGEST_WAIT_S
            return state.attempt_number > self._retries or is_late or not self._budget.take(now)

        retrying = AsyncRetrying(
            retry=retry_if_exception(_is_transient),
            wait=wait,
            stop=stop,
            sleep=self._sleep,
            before_sleep=lambda state: self._num_retries.inc(),
            reraise=True,
        )
        return await retrying(attempt)

    def _request(self, call: Call) -> httpx.Request:
        left_s = call.due_s - self._clock()
        if left_s <= 0:
            raise DeadlineError("the request's time was over before the upstream was asked")
        return self._client.build_request(
            call.method,
            call.path,
            headers={**call.headers, TIMEOUT_HEADER: f"{left_s:.3f}"},
            content=call.body or None,
            timeout=httpx.Timeout(left_s, connect=min(left_s, _CONNECT_TIMEOUT_S)),
        )

    @contextmanager
    def _watched(self, call: Call) -> Iterator[None]:
        """Let an attempt through or refuse it, name what it fails of, and tell the breaker."""
        began_s = self._clock()
        wait_s = self.breaker.begin(began_s)
        if wait_s > 0:
            raise UnavailableError("the upstream keeps failing and is left alone for a while", "upstream_down", wait_s)
        outcome, is_failure = "cancelled", False
        try:
            yield
            outcome = "ok"
        except UpstreamError as error:
            is_failure = error.status >= 500 and not (error.status == 500 and call.is_shared)
            outcome = "failed" if error.status >= 500 else "refused"
            raise
        except BadGatewayError:
            outcome = "unusable"
            raise
        except httpx.ConnectTimeout:
            outcome, is_failure = "unreachable", True
            raise BadGatewayError("the upstream cannot be reached", UNREACHABLE) from None
        except (httpx.TimeoutException, DeadlineError):
            outcome, is_failure = "timeout", self._is_telling(began_s)
            raise DeadlineError("the upstream did not answer in time") from None
        except httpx.TransportError:
            outcome, is_failure = "unreachable", True
            raise BadGatewayError("the upstream cannot be reached", UNREACHABLE) from None
        except anyio.get_cancelled_exc_class():
            # Who waits for the answer has the same deadline, and may have been quicker to see it.
            if self._clock() >= call.due_s - _DEADLINE_SLACK_S:
                outcome, is_failure = "timeout", self._is_telling(began_s)
            raise
        finally:
            self._attempts[outcome].inc()
            if is_failure:
                self.breaker.fail(self._clock())
            elif outcome in ("ok", "refused", "unusable"):
                self.breaker.succeed()
            else:
                self.breaker.abandon()

    def _is_telling(self, began_s: float) -> bool:
        return self._clock() - began_s >= _TELLING_SHARE * self._timeout_s

    async def _check(self, response: httpx.Response) -> None:
        """Raises: UpstreamError unless it is a 2xx."""
        if response.is_success:
            return
        if not 400 <= response.status_code < 600:
            raise BadGatewayError(f"the upstream answered {response.status_code}", BAD_ANSWER)
        content = b"".join([chunk async for chunk in self._chunks(response)])
        try:
            body = from_json(content, allow_inf_nan=False)
        except ValueError:
            body = envelope(f"the upstream answered {response.status_code}: {content[:500]!r}", type="upstream_error")
        raise UpstreamError(response.status_code, body, _passed(response, _PASSED_REFUSAL_HEADERS))

    async def _chunks(self, response: httpx.Response) -> AsyncGenerator[bytes]:
        """The body as it comes. Raises: BadGatewayError where it is too long, or compressed, which was not asked."""
        if response.headers.get("content-encoding", "identity") != "identity":
            raise BadGatewayError("the upstream's answer is compressed", BAD_ANSWER)
        num_bytes = 0
        async with aclosing(response.aiter_raw()) as chunks:  # type: ignore[type-var]  # a generator, as typed an iterator
            async for chunk in chunks:
                num_bytes += len(chunk)
                if num_bytes > self._max_response_bytes:
                    raise BadGatewayError(f"the answer is larger than {self._max_response_bytes} bytes", TOO_LARGE)
                yield chunk

    async def _rest(self, first: bytes, chunks: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
        try:
            async with aclosing(chunks):
                yield first
                async for chunk in chunks:
                    yield chunk
        except httpx.TimeoutException:
            raise DeadlineError("the upstream did not answer in time") from None
        except httpx.TransportError:
            raise BadGatewayError("the upstream's stream was cut off", UNREACHABLE) from None


async def event_data(chunks: AsyncIterator[bytes]) -> AsyncGenerator[bytes]:
    """The data of a stream of events as OpenAI's servers write them, a line each."""
    buffered = b""
    async for chunk in chunks:
        *lines, buffered = (buffered + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line.removeprefix(b"data:").strip()
        if len(buffered) > _MOST_LINE_BYTES:
            raise BadGatewayError("a line of the upstream's stream is too long", BAD_ANSWER)


def _passed(response: httpx.Response, names: tuple[str, ...]) -> dict[str, str]:
    return {name: response.headers[name] for name in names if name in response.headers}


def _error_of(state: RetryCallState) -> BaseException | None:
    return None if state.outcome is None else state.outcome.exception()


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, UpstreamError):
        return error.status in _RETRIED_STATUSES
    return isinstance(error, BadGatewayError) and error.code == UNREACHABLE


def _retry_after_s(error: BaseException | None) -> float:
    """How long the upstream asks to be left alone; a date counts as nothing."""
    headers = error.headers if isinstance(error, ApiError) else {}
    for name, unit in (("retry-after-ms", 1000), ("retry-after", 1)):
        try:
            return max(0.0, float(headers[name]) / unit)
        except (KeyError, ValueError):
            continue
    return 0.0


def requested_timeout_s(written: str | None, longest_s: float) -> float:
    """What a client's header allows, at most the operator's. Raises: BadRequestError."""
    if written is None:
        return longest_s
    try:
        timeout_s = float(written)
    except ValueError:
        timeout_s = -1.0
    if not 0 < timeout_s < float("inf"):
        raise BadRequestError(f"{TIMEOUT_HEADER} must be a positive number of seconds", param=TIMEOUT_HEADER)
    return min(timeout_s, longest_s)
