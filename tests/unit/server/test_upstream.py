"""Retries within budget and deadline, the circuit breaker, and bounded answers, on a clock of the test's own."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any

import anyio
import httpx
import pytest
from prometheus_client import CollectorRegistry

from headrace.server.circuit_breaker import CircuitBreaker, RetryBudget
from headrace.server.errors import (
    ApiError,
    BadGatewayError,
    BadRequestError,
    DeadlineError,
    UnavailableError,
    UpstreamError,
)
from headrace.server.upstream import Call, Upstream, event_data, requested_timeout_s

pytestmark = pytest.mark.anyio

Step = httpx.Response | Exception | Callable[[], Awaitable[httpx.Response]]


class Server:
    """An upstream of prepared answers, the last of which is repeated, and the clock that its callers sleep on."""

    def __init__(self, *steps: Step, **settings: Any) -> None:
        self.now = 1000.0
        self.requests: list[httpx.Request] = []
        self.slept: list[float] = []
        self._steps = list(steps)
        breaker = CircuitBreaker(settings.pop("breaker_failures", 5), 10.0)
        settings = {"timeout_s": 60.0, "retries": 2, "retry_budget": 1.0, "max_response_bytes": 1000} | settings
        self.upstream = Upstream(
            "http://upstream/base",
            breaker=breaker,
            registry=CollectorRegistry(),
            clock=lambda: self.now,
            max_connections=10,
            transport=httpx.MockTransport(self._answer),
            sleep=self._sleep,
            **settings,
        )

    async def fetch(self, timeout_s: float = 60.0, **options: Any) -> bytes:
        call = Call("POST", "/v1/x", {"authorization": "a"}, self.now + timeout_s, b"body", **options)
        return (await self.upstream.fetch(call)).body

    async def fail(self, **options: Any) -> ApiError:
        with pytest.raises(ApiError) as caught:
            await self.fetch(**options)
        return caught.value

    async def _answer(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        step = self._steps.pop(0) if len(self._steps) > 1 else self._steps[0]
        if isinstance(step, Exception):
            raise step
        if not isinstance(step, httpx.Response):
            return await step()
        return httpx.Response(step.status_code, headers=step.headers, stream=httpx.ByteStream(step.content))

    async def _sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def status(code: int, **headers: str) -> httpx.Response:
    return httpx.Response(code, headers={k.replace("_", "-"): v for k, v in headers.items()}, json={"error": code})


OK = httpx.Response(200, content=b"ok")
REFUSED = httpx.ConnectError("refused")


async def test_a_request_carries_its_headers_body_and_what_is_left_of_its_time() -> None:
    server = Server(OK)
    assert await server.fetch(timeout_s=2.5) == b"ok"
    [request] = server.requests
    assert str(request.url) == "http://upstream/base/v1/x"
    assert request.headers["authorization"] == "a"
    assert request.headers["x-request-timeout"] == "2.500"
    assert request.content == b"body"


@pytest.mark.parametrize("failure", [REFUSED, httpx.ReadError("reset"), *map(status, (502, 503, 504))], ids=str)
async def test_what_may_mend_is_tried_again(failure: Step) -> None:
    server = Server(failure, failure, OK)
    assert await server.fetch() == b"ok"
    assert len(server.requests) == 3
    assert len(server.slept) == 2
    assert float(server.requests[2].headers["x-request-timeout"]) <= 60 - sum(server.slept) + 1e-3


@pytest.mark.parametrize("code", [400, 401, 404, 422, 429, 500])
async def test_what_may_not_is_told_with_its_own_status_and_body(code: int) -> None:
    server = Server(status(code, www_authenticate="Bearer", x_secret="no"))
    error = await server.fail()
    assert isinstance(error, UpstreamError)
    assert (error.status, error.envelope(), error.headers) == (code, {"error": code}, {"www-authenticate": "Bearer"})
    assert len(server.requests) == 1


async def test_a_status_that_is_none_is_a_bad_answer() -> None:
    for code in (302, 600, 999):
        assert (await Server(status(code)).fail()).status == 502


async def test_retries_end_and_the_last_failure_is_told() -> None:
    server = Server(status(503), status(502), status(503, retry_after="1"))
    error = await server.fail()
    assert (error.status, error.headers) == (503, {"retry-after": "1"})
    assert len(server.requests) == 3
    assert (await Server(REFUSED).fail()).status == 502


async def test_retry_after_is_honoured_within_the_deadline_but_a_long_one_is_the_clients_to_wait_for() -> None:
    server = Server(status(503, retry_after="2"), OK)
    assert await server.fetch() == b"ok"
    assert server.slept == [2.0]
    for retry_after, timeout_s in (("2", 1.5), ("3", 60.0)):
        server = Server(status(503, retry_after=retry_after), OK)
        assert (await server.fail(timeout_s=timeout_s)).status == 503
        assert server.slept == []


async def test_retries_have_a_budget() -> None:
    server = Server(status(503), retry_budget=0.1, breaker_failures=1000)
    for _ in range(50):
        await server.fail()
    assert len(server.requests) - 50 == pytest.approx(3 + 0.1 * 50, abs=1)


def test_a_budget_is_a_share_of_the_requests_of_late() -> None:
    budget = RetryBudget(0.5)
    for _ in range(4):
        budget.note_request(0.0)
    assert [budget.take(1.0) for _ in range(6)] == [True] * 5 + [False]
    assert [budget.take(100.0) for _ in range(4)] == [True] * 3 + [False], "a few are always there"


async def test_the_breaker_opens_tells_when_to_come_back_and_closes_again() -> None:
    server = Server(*[REFUSED] * 4, OK, retries=0, breaker_failures=3)
    for _ in range(3):
        assert (await server.fail()).status == 502
    error = await server.fail()
    assert isinstance(error, UnavailableError)
    assert error.headers["retry-after"] == "10"
    assert len(server.requests) == 3, "nothing is asked"
    server.now += 10
    assert (await server.fail()).status == 502, "one is let through, and fails"
    server.now += 9
    assert (await server.fail()).status == 503
    server.now += 1
    assert [await server.fetch() for _ in range(3)] == [b"ok"] * 3


def test_a_half_open_breaker_lets_one_through() -> None:
    breaker = CircuitBreaker(1, 10)
    assert breaker.begin(0) == 0
    breaker.fail(0)
    assert breaker.begin(4) == 6
    assert breaker.begin(10) == 0
    assert breaker.begin(10) > 0
    breaker.abandon()
    assert breaker.begin(10) == 0, "the one that was let through has left"
    breaker.succeed()
    assert (breaker.begin(10), breaker.begin(10)) == (0, 0)


async def test_refusals_and_an_internal_error_of_a_batch_do_not_open_the_breaker() -> None:
    server = Server(status(400), breaker_failures=1)
    await server.fail()
    server = Server(status(500), breaker_failures=1)
    assert (await server.fail(is_shared=True)).status == 500
    assert (await server.fail()).status == 500
    assert (await server.fail()).status == 503


@pytest.mark.parametrize("error", [httpx.ReadTimeout, httpx.PoolTimeout])
async def test_an_upstream_that_does_not_answer_opens_the_breaker_a_client_in_a_hurry_does_not(
    error: type[httpx.TimeoutException],
) -> None:
    async def late() -> httpx.Response:
        server.now += took_s
        raise error("late")

    server, took_s = Server(late, breaker_failures=1), 1.0
    assert isinstance(await server.fail(timeout_s=1.0), DeadlineError)
    took_s = 60.0
    assert isinstance(await server.fail(), DeadlineError)
    assert (await server.fail()).status == 503
    assert len(server.requests) == 2, "a request whose time is over is not tried again"


async def test_a_request_whose_client_leaves_says_nothing_of_the_upstream() -> None:
    server = Server(REFUSED, breaker_failures=1, retries=0)
    await server.fail()
    server.now += 10
    server._steps = [anyio.sleep_forever]  # type: ignore[list-item]
    with anyio.move_on_after(0) as scope:
        await server.fetch()
    assert scope.cancelled_caught
    assert server.upstream.breaker.begin(server.now) == 0


async def test_an_answers_size_is_bounded_and_compressed_ones_are_refused() -> None:
    assert await Server(httpx.Response(200, content=b"x" * 1000)).fetch() == b"x" * 1000
    for step in (
        httpx.Response(200, content=b"x" * 1001),
        httpx.Response(400, content=b"x" * 1001),
        httpx.Response(307, headers={"location": "http://elsewhere/"}),
    ):
        assert isinstance(await Server(step).fail(), BadGatewayError)

    async def compressed() -> httpx.Response:
        return httpx.Response(200, headers={"content-encoding": "br"}, stream=httpx.ByteStream(b"x"))

    assert isinstance(await Server(compressed).fail(), BadGatewayError)


async def test_a_refusal_that_is_no_json_is_put_into_the_envelope() -> None:
    error = await Server(httpx.Response(404, content=b"<html>")).fail()
    assert error.status == 404
    assert "<html>" in error.envelope()["error"]["message"]


async def test_a_stream_is_tried_again_before_its_first_byte_and_not_after() -> None:
    class Torn(httpx.AsyncByteStream):
        def __init__(self, *chunks: bytes) -> None:
            self._chunks = chunks

        async def __aiter__(self) -> AsyncIterator[bytes]:
            for chunk in self._chunks:
                yield chunk
            raise httpx.ReadError("torn")

    def torn(*chunks: bytes) -> Callable[[], Awaitable[httpx.Response]]:
        async def answer() -> httpx.Response:
            return httpx.Response(200, headers={"content-type": "text/event-stream"}, stream=Torn(*chunks))

        return answer

    server = Server(torn(), REFUSED, torn(b"data: 1\n\nda", b"ta: 2\r\n\r\n: x\n"))
    call = Call("POST", "/", {}, server.now + 60)
    seen = []
    with suppress(BadGatewayError):
        async with server.upstream.stream(call) as chunks:
            async for data in event_data(chunks):
                seen.append(data)
        pytest.fail("its end was not missed")
    assert seen == [b"1", b"2"]
    assert len(server.requests) == 3
    with pytest.raises(BadGatewayError, match="does not stream"):
        async with Server(OK).upstream.stream(call):
            pass


def test_a_client_may_shorten_its_time_and_not_lengthen_it() -> None:
    assert requested_timeout_s(None, 60) == 60
    assert requested_timeout_s("0.5", 60) == 0.5
    assert requested_timeout_s("1e9", 60) == 60
    for written in ("", "soon", "0", "-1", "nan", "inf"):
        with pytest.raises(BadRequestError):
            requested_timeout_s(written, 60)
