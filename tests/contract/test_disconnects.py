"""A client that leaves takes everything with it, whatever the server was doing for it.

`live_app` asserts at its end that no block is held and no generation is left.
"""

import json
import socket
import threading
from typing import Any

import anyio
import anyio.abc
import pytest
import uvicorn

from asgi_client import Exchange, call, exchange
from fake_engine import expected_text, make_scheduler
from live_app import LiveApp, live_app
from raw_client import RawRequest

pytestmark = pytest.mark.anyio

PATHS = {
    "chat": "/v1/chat/completions",
    "completion": "/v1/completions",
    "messages": "/v1/messages",
    "response": "/v1/responses",
    "ollama": "/api/chat",
}
ROUTES = [kind + stream for kind in PATHS for stream in ("", "-stream")]


def start(app: LiveApp, route: str, tasks: anyio.abc.TaskGroup, **fields: Any) -> Exchange:
    """Send a whole request on a route and begin to answer it."""
    kind, _, stream = route.partition("-")
    body: dict[str, Any] = {"stream": bool(stream), "temperature": 0, "max_tokens": 100}
    body |= {"prompt": "hi"} if kind == "completion" else {"messages": [{"role": "user", "content": "hi"}]}
    body |= fields
    if kind == "response":
        body["input"], body["max_output_tokens"] = body.pop("messages"), body.pop("max_tokens")
    if kind == "ollama":
        body["options"] = {"temperature": 0, "num_predict": body.pop("max_tokens")}
    request = exchange(app.asgi, "POST", PATHS[kind])
    request.send_body(json.dumps(body).encode())
    tasks.start_soon(request.run)
    return request


def cancelled(app: LiveApp, phase: str) -> float:
    name = f'headrace_requests_cancelled_total{{phase="{phase}"}} '
    [line] = [line for line in app.client.metrics.expose().decode().splitlines() if line.startswith(name)]
    return float(line.removeprefix(name))


async def let_pass(app: LiveApp, num_steps: int) -> None:
    """Let a held runner compute so many steps, and wait until the loop has taken them in."""
    seen = app.client.load.num_steps
    app.runner.allow(num_steps)
    await app.until(lambda: app.client.load.num_steps >= seen + num_steps)


async def until_free(app: LiveApp) -> None:
    """Wait until the engine says that nothing runs, waits or holds a block."""
    client = app.client
    await app.until(lambda: not (client.load.num_running or client.num_waiting or client.num_unfinished))
    assert app.client.load.num_free_blocks == app.client.load.num_total_blocks


@pytest.mark.parametrize("num_bytes", [0, 10])
async def test_in_the_body_nothing_was_started(num_bytes: int) -> None:
    async with live_app() as app, anyio.create_task_group() as tasks:
        request = exchange(app.asgi, "POST", "/v1/completions")
        request.send_body(b'{"prompt": "hi"}'[:num_bytes], more_body=True)
        tasks.start_soon(request.run)
        await anyio.wait_all_tasks_blocked()
        request.disconnect()
        await request.done.wait()
        assert request.messages == []
        assert cancelled(app, "body") == 1
        assert app.runner.num_steps == 0


@pytest.mark.parametrize("route", ROUTES)
async def test_while_tokenizing_nothing_reaches_the_engine(route: str) -> None:
    async with live_app() as app, anyio.create_task_group() as tasks:
        tokenizer = app.generator.tokenizer
        assert tokenizer is not None
        may_finish = threading.Event()
        encode = tokenizer.encode

        def slow_encode(text: str, *, add_special_tokens: bool) -> list[int]:
            may_finish.wait(10)
            return encode(text, add_special_tokens=add_special_tokens)

        tokenizer.encode = slow_encode  # type: ignore[method-assign]
        request = start(app, route, tasks)
        await anyio.wait_all_tasks_blocked()
        assert app.client.num_waiting == 1, "it counts as waiting"
        request.disconnect()
        await anyio.wait_all_tasks_blocked()
        may_finish.set()  # a thread cannot be stopped, and counts as busy until it is done
        await request.done.wait()
        assert cancelled(app, "tokenizing") == 1
        assert app.client.num_waiting == 0
        assert app.runner.num_steps == 0


@pytest.mark.parametrize("route", ROUTES)
async def test_while_queued_the_others_run_on(route: str) -> None:
    scheduler = make_scheduler(max_num_seqs=1, max_num_batched_tokens=64)
    async with live_app(scheduler=scheduler) as app, anyio.create_task_group() as tasks:
        with app.runner.held():
            first = start(app, "completion", tasks)
            await anyio.wait_all_tasks_blocked()
            queued = start(app, route, tasks)
            await anyio.wait_all_tasks_blocked()
            queued.disconnect()
            await queued.done.wait()
            assert cancelled(app, "queued") >= 1
            await let_pass(app, 2)
            assert app.client.num_waiting == 0
        await first.done.wait()
        assert first.json()["choices"][0]["text"] == expected_text("hi", 100)
        await until_free(app)


@pytest.mark.parametrize("route", ROUTES)
async def test_in_a_prefill_chunk_its_blocks_are_freed(route: str) -> None:
    scheduler = make_scheduler(max_num_batched_tokens=8, max_num_seqs=8)
    async with live_app(scheduler=scheduler) as app, anyio.create_task_group() as tasks:
        long = "p" * 300
        prompt: dict[str, Any] = {"prompt": long} if "completion" in route else {}
        if not prompt:
            prompt = {"messages": [{"role": "user", "content": long}]}
        with app.runner.held():
            request = start(app, route, tasks, **prompt)
            await let_pass(app, 2)
            assert app.client.load.num_free_blocks < app.client.load.num_total_blocks
            request.disconnect()
            await request.done.wait()
            app.runner.allow(1)  # the step under way; the next schedule() frees
            await until_free(app)
        assert cancelled(app, "prefill") == 1


@pytest.mark.parametrize("route", ROUTES)
async def test_in_decode_its_neighbour_keeps_its_text(route: str) -> None:
    async with live_app() as app, anyio.create_task_group() as tasks:
        neighbour = start(app, "completion-stream", tasks, prompt="neighbour", max_tokens=200)
        with app.runner.held():
            request = start(app, route, tasks, max_tokens=400)
            await anyio.wait_all_tasks_blocked()
            await let_pass(app, 4)
            request.disconnect()
            await request.done.wait()
            await let_pass(app, 2)
            assert app.client.load.num_running == 1, "only the neighbour runs on"
        assert cancelled(app, "decode") == 1
        await neighbour.done.wait()
        texts = [json.loads(event["data"])["choices"][0]["text"] for event in neighbour.events()[:-1]]
        assert "".join(texts) == expected_text("neighbour", 200)
        await until_free(app)


@pytest.mark.parametrize("max_tokens", [1, 2, 3])
@pytest.mark.parametrize("route", ROUTES)
async def test_at_the_instant_of_the_last_token_it_ends_once(route: str, max_tokens: int) -> None:
    async with live_app() as app:
        for num_turns in range(12):
            async with anyio.create_task_group() as tasks:
                request = start(app, route, tasks, max_tokens=max_tokens)
                # Leave after ever more turns of the loop: before, at and after the end.
                for _ in range(num_turns * 3):
                    await anyio.lowlevel.checkpoint()
                if not request.done.is_set():
                    request.disconnect()
        await until_free(app)
        finished = app.client.metrics.expose().decode()
        ended = [
            float(line.split()[-1]) for line in finished.splitlines() if "headrace_requests_finished_total{" in line
        ]
        tokenizing = cancelled(app, "tokenizing")
        assert sum(ended) + tokenizing == 12


async def test_a_reader_that_takes_nothing_is_let_go_when_it_leaves() -> None:
    async def take_nothing(message: Any) -> None:
        if message.get("body"):
            await anyio.sleep_forever()

    async with live_app() as app, anyio.create_task_group() as tasks:
        with app.runner.held():
            request = start(app, "completion-stream", tasks, max_tokens=300)
            request.reader = take_nothing
            app.runner.allow(1)
            await request.wait_until(lambda: request.body != b"")
            [generation] = app.client._generations.values()
            request.disconnect()
            await request.done.wait()
            assert generation.log.num_subscribers == 0
            app.runner.allow(1)
            await until_free(app)


@pytest.mark.parametrize("hang_up", ["close", "reset"])
async def test_a_socket_that_is_full_is_let_go_when_its_client_leaves(hang_up: str) -> None:
    with socket.socket() as listener:
        # Small buffers, inherited by connections, fill within a few hundred events.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        listener.bind(("127.0.0.1", 0))
        async with live_app() as app, anyio.create_task_group() as tasks:
            server = uvicorn.Server(uvicorn.Config(app.asgi, http="h11", lifespan="off", log_config=None))
            tasks.start_soon(server.serve, [listener])
            await app.until(lambda: server.started)
            with app.runner.held():
                usage = {"include_usage": True, "continuous_usage_stats": True}
                body = {"prompt": "hi", "max_tokens": 500, "stream": True, "stream_options": usage}
                url = f"http://127.0.0.1:{listener.getsockname()[1]}"
                client = RawRequest(url, "/v1/completions", body, receive_bytes=2048)
                for _ in range(400):
                    await let_pass(app, 1)
                [connection] = server.server_state.connections
                assert connection.flow.write_paused, "the socket is full"  # type: ignore[union-attr]
                [generation] = app.client._generations.values()
                getattr(client, hang_up)()
                await app.until(lambda: generation.is_over)
                assert generation.log.num_subscribers == 0
                app.runner.allow(1)
                await until_free(app)
            assert cancelled(app, "decode") == 1
            server.should_exit = True


async def test_a_reader_that_takes_one_write_at_a_time_gets_fewer_larger_events_without_a_gap() -> None:
    async with live_app() as app:
        may_read_on = anyio.Event()
        writes: list[bytes] = []

        async def take_one_then_wait(message: Any) -> None:
            if body := message.get("body"):
                writes.append(body)
                if len(writes) == 1:
                    await may_read_on.wait()

        async with anyio.create_task_group() as tasks:
            request = start(app, "completion-stream", tasks, max_tokens=120)
            request.reader = take_one_then_wait
            await request.wait_until(lambda: writes != [])
            await until_free(app)  # the engine did not wait for the reader
            may_read_on.set()
    texts = [json.loads(event["data"])["choices"][0]["text"] for event in request.events()[:-1]]
    assert "".join(texts) == expected_text("hi", 120)
    assert len(writes) <= 3


async def test_get_stream_is_cancelled_after_its_grace_time_and_not_before() -> None:
    async with live_app(stream_grace_s=0.2) as app, anyio.create_task_group() as tasks:
        with app.runner.held():
            request = exchange(
                app.asgi, "GET", "/v1/stream", query="prompt=hi&max_tokens=400", headers={"accept": "text/event-stream"}
            )
            tasks.start_soon(request.run)
            await request.wait_until(lambda: b"event: queued" in request.body)
            request.disconnect()
            await request.done.wait()
            assert app.client.num_unfinished == 1, "a reader may come back within the grace time"
            await app.until(lambda: app.client.num_unfinished == 0)
        await until_free(app)
        id = request.events()[1]["id"].split(":")[0]
        snapshot = await call(app.asgi, "GET", f"/v1/streams/{id}")
        assert snapshot.json()["finish_reason"] == "cancelled"
