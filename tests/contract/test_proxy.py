"""The proxy before an upstream that the test plays, over real sockets: what is merged, who is told what, who leaves."""

import json
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import anyio
import anyio.lowlevel
import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from asgi_client import Exchange, call, chunks, exchange
from headrace.server.api_keys import append_key, create_key
from headrace.server.drain import drain
from headrace.server.proxy import Proxy
from headrace.server.proxy_settings import load_proxy_settings

pytestmark = pytest.mark.anyio


class Upstream:
    """A model server that answers in batches, once it is let. Notes the bodies and headers of its requests.

    An input that holds "bad" has its batch refused; `answer` replaces every answer.
    """

    def __init__(self) -> None:
        self.bodies: list[Any] = []
        self.headers: list[Any] = []
        self.gate = anyio.Event()
        self.gate.set()
        self.answer: Callable[[Request], Awaitable[Response]] | None = None
        self.num_gone = 0
        self.app = Starlette(routes=[Route("/{path:path}", self._respond, methods=["GET", "POST"])])

    def hold(self) -> None:
        self.gate = anyio.Event()

    async def _respond(self, request: Request) -> Response:
        if request.method == "GET":
            return JSONResponse({"path": request.url.path})
        raw = await request.body()
        is_binary = "inference-header-content-length" in request.headers
        body: Any = raw if is_binary else json.loads(raw)
        self.bodies.append(body)
        self.headers.append(request.headers)
        if not is_binary and body.get("stream"):
            return StreamingResponse(self._stream(body), media_type="text/event-stream")
        if not await self._wait(request):
            return Response()
        if self.answer is not None:
            return await self.answer(request)
        if is_binary:
            return Response(raw[::-1], media_type="application/octet-stream")
        if "bad" in raw.decode():
            return JSONResponse({"error": {"message": "a bad input"}}, 400)
        return JSONResponse(_answer(request.url.path, body))

    async def _wait(self, request: Request) -> bool:
        """Until the test lets it answer; False if the proxy has hung up first."""
        while not self.gate.is_set():
            with anyio.move_on_after(0.01):
                await self.gate.wait()
            if await request.is_disconnected():
                self.num_gone += 1
                return False
        return True

    async def _stream(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        prompts = body["prompt"] if isinstance(body["prompt"], list) else [body["prompt"]]
        try:
            for piece in ("a", "b"):
                for index, prompt in reversed(list(enumerate(prompts))):
                    choice = {"index": index, "text": f"{prompt}-{piece} ", "finish_reason": None}
                    yield _frame({"id": "upstream's", "choices": [choice]})
                await self.gate.wait()
            for index in range(len(prompts)):
                yield _frame({"id": "upstream's", "choices": [{"index": index, "text": "", "finish_reason": "stop"}]})
            if (body.get("stream_options") or {}).get("include_usage"):
                usage = {"prompt_tokens": len(prompts), "completion_tokens": 2 * len(prompts)}
                yield _frame({"id": "upstream's", "choices": [], "usage": usage})
            yield b"data: [DONE]\n\n"
        finally:
            self.num_gone += not self.gate.is_set()


def _frame(value: Any) -> bytes:
    return f"data: {json.dumps(value)}\n\n".encode()


def _answer(path: str, body: dict[str, Any]) -> dict[str, Any]:
    if path == "/v1/embeddings":
        data = [{"object": "embedding", "index": i, "embedding": [len(text)]} for i, text in enumerate(body["input"])]
        return {"object": "list", "model": body["model"], "data": data, "usage": {"prompt_tokens": 7}}
    if path == "/v1/completions":
        prompts = body["prompt"] if isinstance(body["prompt"], list) else [body["prompt"]]
        choices = [{"index": i, "text": text.upper(), "finish_reason": "stop"} for i, text in enumerate(prompts)]
        return {"id": "upstream's", "object": "text_completion", "choices": choices}
    if path.endswith("/infer"):
        [tensor] = body["inputs"]
        return {"model_name": "m", "outputs": [tensor | {"name": "y", "data": [2 * x for x in tensor["data"]]}]}
    if path.endswith(":predict"):
        return (
            {"predictions": [2 * x for x in body["instances"]]} if "instances" in body else {"outputs": body["inputs"]}
        )
    return {"results": [{"error": "zero"} if item == 0 else 2 * item for item in body["items"]]}


class Rig:
    """A proxy and its upstream."""

    def __init__(self, proxy: Proxy, upstream: Upstream, tasks: Any) -> None:
        self.proxy = proxy
        self.upstream = upstream
        self._tasks = tasks

    async def post(self, path: str, body: Any, **headers: str) -> Exchange:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        return await call(self.proxy.asgi, "POST", path, body, headers=names)

    async def get(self, path: str) -> Exchange:
        return await call(self.proxy.asgi, "GET", path)

    def start(self, path: str, body: Any, **headers: str) -> Exchange:
        """A request under way."""
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        request = exchange(self.proxy.asgi, "POST", path, headers=names)
        request.send_body(json.dumps(body).encode())
        self._tasks.start_soon(request.run)
        return request

    async def batch(self, *requests: tuple[str, Any]) -> list[Exchange]:
        """The answers to requests that wait while the upstream answers another one of their kind."""
        self.upstream.hold()
        first = self.start(*requests[0])
        await until(lambda: len(self.upstream.bodies) == 1)
        others = []
        for request in requests:
            others.append(self.start(*request))
            await until(lambda: self.proxy.num_unfinished == len(others) + 1)
        await until(lambda: self.num_queued() >= len(others))
        self.upstream.gate.set()
        for one in (first, *others):
            await one.done.wait()
        return others

    def num_queued(self) -> int:
        return sum(len(lane.lane._batcher) for lane in self.proxy._lanes.values())


async def until(predicate: Callable[[], bool]) -> None:
    with anyio.fail_after(10):
        while not predicate():  # noqa: ASYNC110 - it happens behind a socket
            await anyio.sleep(0.001)


@asynccontextmanager
async def serving(app: Any, listener: socket.socket) -> AsyncIterator[None]:
    server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_config=None, timeout_graceful_shutdown=1))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(server.serve, [listener])
        await until(lambda: server.started)
        yield
        server.should_exit = True


@asynccontextmanager
async def rig(*, is_up: bool = True, **settings: Any) -> AsyncIterator[Rig]:
    """Without `is_up` nothing listens where the upstream should be."""
    upstream = Upstream()
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in ({"upstream": url} | settings).items()]
    proxy = Proxy(load_proxy_settings(flags, {}))
    if not is_up:
        listener.close()
    async with anyio.create_task_group() as tasks, proxy.asgi.router.lifespan_context(proxy.asgi):
        if is_up:
            async with serving(upstream.app, listener):
                yield Rig(proxy, upstream, tasks)
                upstream.gate.set()
        else:
            yield Rig(proxy, upstream, tasks)
        await until(lambda: proxy.num_unfinished == 0)
        assert all(lane.lane.num_unfinished == 0 for lane in proxy._lanes.values())


EMBED = "/v1/embeddings"
COMPLETE = "/v1/completions"
INFER = "/v2/models/m/infer"


def embed(text: Any, **fields: Any) -> tuple[str, Any]:
    return EMBED, {"model": "m", "input": text, **fields}


async def test_requests_of_many_clients_are_one_upstream_request() -> None:
    async with rig() as live:
        one, two = await live.batch(embed("four4"), embed(["a", "bc"]))
        assert live.upstream.bodies[1] == {"model": "m", "input": ["four4", "a", "bc"]}
        assert [item["embedding"] for item in one.json()["data"]] == [[5]]
        assert [(item["index"], item["embedding"]) for item in two.json()["data"]] == [(0, [1]), (1, [2])]
        assert one.json()["usage"]["prompt_tokens"] + two.json()["usage"]["prompt_tokens"] == 7
        assert one.json()["model"] == "m"
        assert one.headers["x-request-id"] != two.headers["x-request-id"]


async def test_other_parameters_or_credentials_are_not_merged_and_credentials_are_passed_on() -> None:
    async with rig(max_concurrent_batches=8) as live:
        live.upstream.hold()
        asked = [
            live.start(*embed("a"), authorization="Bearer one"),
            live.start(*embed("a"), authorization="Bearer two"),
            live.start(*embed("a", dimensions=3), authorization="Bearer one"),
            live.start(*embed([1, 2]), authorization="Bearer one"),
        ]
        await until(lambda: len(live.upstream.bodies) == 4)
        live.upstream.gate.set()
        for one in asked:
            await one.done.wait()
        sent = sorted(headers["authorization"] for headers in live.upstream.headers)
        assert sent == ["Bearer one"] * 3 + ["Bearer two"]


async def test_one_bad_item_fails_alone_with_the_upstreams_own_answer() -> None:
    async with rig() as live:
        good, bad, other = await live.batch(embed("good"), embed("bad"), embed(["fine", "too"]))
        assert (good.status, other.status) == (200, 200)
        assert (bad.status, bad.json()) == (400, {"error": {"message": "a bad input"}})
        assert len(other.json()["data"]) == 2


async def test_completions_are_split_by_index_each_with_an_id_of_its_own() -> None:
    async with rig() as live:
        one, two = await live.batch(
            (COMPLETE, {"model": "m", "prompt": "a"}), (COMPLETE, {"model": "m", "prompt": ["b", "c"]})
        )
        assert live.upstream.bodies[1]["prompt"] == ["a", "b", "c"]
        assert [choice["text"] for choice in two.json()["choices"]] == ["B", "C"]
        assert [choice["index"] for choice in two.json()["choices"]] == [0, 1]
        assert one.json()["choices"] == [{"index": 0, "text": "A", "finish_reason": "stop"}]
        assert one.json()["id"] == f"cmpl-{one.headers['x-request-id']}"


async def test_several_choices_of_a_prompt_are_passed_through() -> None:
    async with rig() as live:
        body = {"model": "m", "prompt": "a", "n": 2}
        answer = await live.post(COMPLETE, body)
        assert live.upstream.bodies == [body]
        assert answer.json()["id"] == "upstream's"
        streamed = await live.post(COMPLETE, body | {"stream": True})
        assert [chunk["id"] for chunk in chunks(streamed.body)] == ["upstream's"] * 3


async def test_streams_are_merged_and_each_client_gets_its_own() -> None:
    async with rig() as live:
        plain = {"model": "m", "stream": True}
        first = await live.post(COMPLETE, plain | {"prompt": "z"})
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks(first.body)) == "z-a z-b "
        live.upstream.bodies.clear()
        usage = plain | {"stream_options": {"include_usage": True}}
        one, two = await live.batch((COMPLETE, usage | {"prompt": "x"}), (COMPLETE, usage | {"prompt": ["y", "z"]}))
        assert live.upstream.bodies[1]["prompt"] == ["x", "y", "z"]
        *pieces, last = chunks(one.body)
        assert [piece["choices"][0]["text"] for piece in pieces] == ["x-a ", "x-b ", ""]
        assert pieces[-1]["choices"][0]["finish_reason"] == "stop"
        assert {piece["choices"][0]["index"] for piece in pieces} == {0}
        assert {piece["id"] for piece in (*pieces, last)} == {f"cmpl-{one.headers['x-request-id']}"}
        *others, both = chunks(two.body)
        texts = ["".join(p["choices"][0]["text"] for p in others if p["choices"][0]["index"] == i) for i in (0, 1)]
        assert texts == ["y-a y-b ", "z-a z-b "]
        assert (last["choices"], both["choices"]) == ([], [])
        assert last["usage"]["completion_tokens"] + both["usage"]["completion_tokens"] == 6
        assert two.headers["content-type"] == "text/event-stream; charset=utf-8"


async def test_who_leaves_a_merged_stream_is_dropped_and_the_last_one_ends_it_upstream() -> None:
    async with rig() as live:
        live.upstream.hold()
        body = {"model": "m", "stream": True, "prompt": ["x", "y"]}
        blocking = live.start(COMPLETE, body)
        await blocking.wait_until(lambda: b"y-a" in blocking.body)
        one, two = live.start(COMPLETE, body | {"prompt": "p"}), live.start(COMPLETE, body | {"prompt": "q"})
        await until(lambda: live.num_queued() == 2)
        blocking.disconnect()
        await until(lambda: live.upstream.num_gone == 1)
        await two.wait_until(lambda: b"q-a" in two.body)
        await one.wait_until(lambda: b"p-a" in one.body)
        one.disconnect()
        await one.done.wait()
        assert live.upstream.num_gone == 1, "the other one still reads"
        two.disconnect()
        await until(lambda: live.upstream.num_gone == 2)


async def test_a_stream_that_fails_before_its_first_piece_has_a_status_and_later_an_event() -> None:
    frames: list[bytes] = []

    async def answer(request: Request) -> Response:
        async def stream() -> AsyncIterator[bytes]:
            for frame in frames:
                yield frame

        return StreamingResponse(stream(), media_type="text/event-stream")

    async with rig(retries=0) as live:
        live.upstream.app.router.routes = [Route("/{path:path}", answer, methods=["POST"])]
        body = {"model": "m", "stream": True, "prompt": "x"}
        frames += [b'data: {"error": {"message": "broken"}}\n\n']
        refused = await live.post(COMPLETE, body)
        assert (refused.status, refused.json()) == (500, {"error": {"message": "broken"}})
        frames[:0] = [_frame({"choices": [{"index": 0, "text": "x"}]})]
        torn = await live.post(COMPLETE, body)
        assert torn.status == 200
        assert [json.loads(event["data"]) for event in torn.events()][-1] == {"error": {"message": "broken"}}
        frames.pop()
        torn = await live.post(COMPLETE, body)
        assert json.loads(torn.events()[-1]["data"])["error"]["code"] == "upstream_unreachable"


async def test_tensors_are_concatenated_and_split_and_binary_ones_passed_through() -> None:
    def tensor(*data: float) -> dict[str, Any]:
        return {"name": "x", "datatype": "FP32", "shape": [len(data)], "data": list(data)}

    async with rig() as live:
        one, two = await live.batch((INFER, {"id": "1", "inputs": [tensor(1)]}), (INFER, {"inputs": [tensor(2, 3)]}))
        assert live.upstream.bodies[1] == {"inputs": [tensor(1, 2, 3)]}
        assert one.json() == {"model_name": "m", "outputs": [tensor(2) | {"name": "y"}], "id": "1"}
        assert two.json()["outputs"] == [tensor(4, 6) | {"name": "y"}]
        headers = {"inference_header_content_length": "1", "content_type": "application/octet-stream"}
        binary = await live.post(INFER, b"\x00\x01", **headers)
        assert (binary.body, binary.headers["content-type"]) == (b"\x01\x00", "application/octet-stream")
        assert live.upstream.headers[-1]["inference-header-content-length"] == "1"


async def test_instances_are_merged_and_columns_passed_through() -> None:
    async with rig() as live:
        path = "/v1/models/m/versions/2:predict"
        one, two = await live.batch((path, {"instances": [1, 2]}), (path, {"instances": [3]}))
        assert live.upstream.bodies[1] == {"instances": [1, 2, 3]}
        assert (one.json(), two.json()) == ({"predictions": [2, 4]}, {"predictions": [6]})
        columns = await live.post("/v1/models/m:predict", {"inputs": [1]})
        assert columns.json() == {"outputs": [1]}


async def test_the_generic_form_has_an_error_for_each_item() -> None:
    async with rig(generic_path="/predict/batch") as live:
        one, many, bad = await live.batch(
            ("/batch", {"item": 2}), ("/batch", {"items": [3, 0, 4]}), ("/batch", {"items": [5, "bad"]})
        )
        assert one.json() == {"result": 4}
        assert many.json() == {"results": [6, {"error": "zero"}, 8]}
        assert bad.json() == {"results": [10, {"error": {"message": "a bad input"}}]}
        assert ((await live.post("/batch", {"item": 0})).status) == 422
        assert ((await live.post("/batch", {"item": "bad"})).status) == 400


async def test_what_clients_ask_beside_is_passed_through_and_all_else_is_unknown() -> None:
    async with rig() as live:
        for path in ("/v1/models", "/v1/models/m", "/v2", "/v2/health/live", "/v2/models/m", "/v2/models/m/ready"):
            assert (await live.get(path)).json() == {"path": path}
        for path in ("/v1/other", "/v2/models/..", "/v2/models/../ready", "/v1/chat/completions"):
            refused = await live.get(path)
            assert (refused.status, refused.json()["error"]["code"]) == (404, "not_found")
        assert (await live.post("/v2/models/../infer", {})).status == 404
        assert (await live.get("/health")).status == 200
        assert (await live.get("/ready")).json() == {"status": "ready"}
        await live.post(*embed("a"))
        metrics = (await live.get("/metrics")).body.decode()
        assert 'headrace_batch_items_total{model="embeddings:m",outcome="ok"} 1.0' in metrics
        assert 'headrace_upstream_attempts_total{outcome="ok"}' in metrics
        assert "kv_cache" not in metrics


async def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    async with rig(max_queue_size=2, max_batch_size=1) as live:
        live.upstream.hold()
        asked = [live.start(*embed("a"))]
        await until(lambda: len(live.upstream.bodies) == 1)
        for _ in range(2):
            asked.append(live.start(*embed("a")))
        await until(lambda: live.num_queued() == 2)
        refused = await live.post(*embed("a"))
        assert refused.status == 429
        assert int(refused.headers["retry-after"]) >= 1
        live.upstream.gate.set()
        for one in asked:
            await one.done.wait()
            assert one.status == 200


async def test_bodies_that_wait_are_bounded_together() -> None:
    async with rig(max_queue_bytes=100) as live:
        live.upstream.hold()
        asked = live.start(*embed("a" * 50))
        await until(lambda: len(live.upstream.bodies) == 1)
        assert (await live.post(*embed("a" * 50))).status == 429
        live.upstream.gate.set()
        await asked.done.wait()
        assert (await live.post(*embed("a" * 50))).status == 200


async def test_a_model_is_named_in_metrics_once_the_upstream_has_answered_for_it_and_in_no_line_of_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def refuse(request: Request) -> Response:
        return JSONResponse({"error": {"message": "no such model"}}, 404)

    path, body = "/v1/models/canary:predict", {"instances": [1, 2]}
    with caplog.at_level("INFO"):
        async with rig() as live:
            live.upstream.answer = refuse
            assert (await live.post(path, body)).status == 404
            assert b"canary" not in (await live.get("/metrics")).body
            live.upstream.answer = None
            assert (await live.post(path, body)).status == 200
            assert b"canary" in (await live.get("/metrics")).body
            live.upstream.hold()
            leaving = live.start(path, body)
            await until(lambda: len(live.upstream.bodies) == 3)
            leaving.disconnect()
            await leaving.done.wait()
    lines = [record.getMessage() for record in caplog.records if record.name == "headrace.requests"]
    assert len(lines) == 3
    assert all('"route": "/v1/models/{model}:predict"' in line and "canary" not in line for line in lines)


async def test_what_waits_for_models_without_a_name_yet_is_told_together_and_then_by_name() -> None:
    async def depths() -> dict[str, str]:
        metrics = (await live.get("/metrics")).body.decode()
        return dict(re.findall(r'^headrace_batch_queue_depth\{model="(.*?)"\} (\S+)$', metrics, re.MULTILINE))

    async with rig(max_batch_size=1) as live:
        live.upstream.hold()
        asked = [live.start(*embed("a", model=model)) for model in "mmmnnn"]
        await until(lambda: live.num_queued() == 4)
        assert await depths() == {"other": "4.0"}
        live.upstream.gate.set()
        for one in asked:
            await one.done.wait()
        live.upstream.hold()
        asked = [live.start(*embed("a", model=model)) for model in "nn"]
        await until(lambda: live.num_queued() == 1)
        assert await depths() == {"other": "0.0", "embeddings:m": "0.0", "embeddings:n": "1.0"}
        live.upstream.gate.set()
        for one in asked:
            await one.done.wait()


async def test_a_batch_that_nobody_waits_for_is_ended_upstream() -> None:
    async with rig() as live:
        live.upstream.hold()
        asked = live.start(*embed("a"))
        await until(lambda: len(live.upstream.bodies) == 1)
        asked.disconnect()
        await until(lambda: live.upstream.num_gone == 1)
        await asked.done.wait()
        assert asked.messages == []


async def test_a_clients_deadline_is_passed_on_and_kept() -> None:
    async with rig(timeout_s=20) as live:
        await live.post(*embed("a"))
        await live.post(*embed("a"), x_request_timeout="5")
        left = [float(headers["x-request-timeout"]) for headers in live.upstream.headers]
        assert 19 < left[0] <= 20
        assert 4 < left[1] <= 5
        live.upstream.hold()
        late = await live.post(*embed("a"), x_request_timeout="0.05")
        assert (late.status, late.json()["error"]["code"]) == (504, "deadline_exceeded")
        await until(lambda: live.upstream.num_gone == 1)
        assert (await live.post(*embed("a"), x_request_timeout="never")).status == 400


async def test_an_upstream_that_is_down_is_left_alone_and_found_again() -> None:
    async with rig(is_up=False, retries=0, breaker_failures=2, breaker_reset_s=0.2) as live:
        assert [(await live.post(*embed("a"))).status for _ in range(3)] == [502, 502, 503]
        refused = await live.post(*embed("a"))
        assert "retry-after" in refused.headers
        assert (await live.get("/ready")).status == 503
        port = int(live.proxy.settings.upstream.rpartition(":")[2])
        async with serving(live.upstream.app, socket.create_server(("127.0.0.1", port))):
            await anyio.sleep(0.2)
            assert (await live.post(*embed("a"))).status == 200
            assert (await live.get("/ready")).status == 200


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (JSONResponse({"data": []}), "upstream_wrong_count"),
        (JSONResponse(["data"]), "upstream_bad_answer"),
        (Response(b"<html>"), "upstream_bad_answer"),
        (Response(b"x" * 2000), "upstream_answer_too_large"),
    ],
    ids=["wrong count", "wrong shape", "no JSON", "too large"],
)
async def test_an_answer_that_cannot_be_used_is_a_bad_gateway(answer: Response, code: str) -> None:
    async def respond(request: Request) -> Response:
        return answer

    async with rig(max_response_bytes=1000) as live:
        live.upstream.answer = respond
        refused = await live.post(*embed(["a", "b"]))
        assert (refused.status, refused.json()["error"]["code"]) == (502, code)


async def test_an_answer_too_large_for_all_is_asked_for_in_halves() -> None:
    async with rig(max_response_bytes=300) as live:
        answer = await live.post(*embed(["a"] * 8))
        assert answer.status == 200
        assert len(answer.json()["data"]) == 8
        assert len(live.upstream.bodies) > 1


class Refusal(httpx.AsyncByteStream):
    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield b'{"error": {"message": "bad"}}'


async def test_a_client_that_leaves_as_its_stream_fails_takes_nothing_else_along() -> None:
    """However near to each other both come."""
    gate = anyio.Event()

    async def fail(request: httpx.Request) -> httpx.Response:
        await gate.wait()
        for _ in range(20):
            await anyio.lowlevel.checkpoint()
        return httpx.Response(400, stream=Refusal())

    proxy = Proxy(load_proxy_settings(["--upstream=http://upstream"], {}), httpx.MockTransport(fail))
    async with proxy.asgi.router.lifespan_context(proxy.asgi), anyio.create_task_group() as tasks:
        for num_turns in range(45):
            gate = anyio.Event()
            leaving = exchange(proxy.asgi, "POST", COMPLETE)
            leaving.send_body(json.dumps({"model": "m", "prompt": "x", "stream": True}).encode())
            tasks.start_soon(leaving.run)
            await until(lambda: any(lane.lane._running for lane in proxy._lanes.values()))
            gate.set()
            for _ in range(num_turns):
                await anyio.lowlevel.checkpoint()
            with suppress(anyio.ClosedResourceError):  # it is over
                leaving.disconnect()
            await leaving.done.wait()
            await until(lambda: all(lane.lane.num_unfinished == 0 for lane in proxy._lanes.values()))
            assert not proxy._tasks.cancel_scope.cancel_called


async def test_a_lane_that_a_request_is_on_its_way_to_is_not_closed() -> None:
    async with rig(max_models=1) as live:
        for _ in range(5):
            one = live.start(COMPLETE, {"model": "a", "prompt": "x", "stream": True})
            two = live.start(COMPLETE, {"model": "b", "prompt": "x", "stream": True})
            for request in (one, two):
                await request.done.wait()
            assert {one.status, two.status} <= {200, 429}
            assert 200 in (one.status, two.status)


async def test_credentials_beyond_ascii_are_refused_by_name() -> None:
    async with rig() as live:
        refused = await live.post(*embed("x"), authorization="Bearer é")
        assert (refused.status, refused.json()["error"]["param"]) == (400, "authorization")


async def test_idle_lanes_make_room_and_busy_ones_do_not() -> None:
    async with rig(max_models=2) as live:
        for model in ("a", "b", "c", "d"):
            assert (await live.post(*embed("x", model=model))).status == 200
        assert len(live.proxy._lanes) == 2
        live.upstream.hold()
        busy = [live.start(*embed("x", model=model)) for model in ("a", "b")]
        await until(lambda: len(live.upstream.bodies) == 6)
        refused = await live.post(*embed("x", model="c"))
        assert (refused.status, refused.json()["error"]["code"]) == (429, "too_many_models")
        live.upstream.gate.set()
        for one in busy:
            await one.done.wait()


async def test_with_keys_clients_credentials_stay_here_and_the_upstream_is_shown_its_own(tmp_path: Any) -> None:
    secret, key = create_key("alice")
    append_key(tmp_path / "keys.toml", key)
    (tmp_path / "key.txt").write_text("upstream's\n")
    async with rig(api_keys_file=tmp_path / "keys.toml", upstream_key_file=tmp_path / "key.txt") as live:
        assert (await live.post(*embed("a"))).status == 401
        assert (await live.post(*embed("a"), authorization=f"Bearer {secret}")).status == 200
        assert live.upstream.headers[0]["authorization"] == "Bearer upstream's"


async def test_while_draining_new_requests_are_refused_and_the_rest_is_ended() -> None:
    async with rig(max_batch_size=1) as live:
        live.upstream.hold()
        asked = [live.start(*embed("a")), live.start(*embed("b"))]
        await until(lambda: len(live.upstream.bodies) == 1 and live.num_queued() == 1)
        await drain(live.proxy, 0.05, anyio.Event())
        for one in asked:
            await one.done.wait()
            assert (one.status, one.json()["error"]["code"]) == (503, "draining")
        assert (await live.post(*embed("a"))).json()["error"]["code"] == "draining"
        assert (await live.get("/ready")).json() == {"status": "draining"}
