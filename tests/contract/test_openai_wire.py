"""What OpenAI-shaped clients read, byte for byte."""

import json
from typing import Any

import anyio
import pytest

from asgi_client import call, chunks, exchange
from fake_engine import FakeRunner, expected_text, make_scheduler
from live_app import live_app

pytestmark = pytest.mark.anyio

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 6, "temperature": 0}
CHAT_PROMPT = "[user]hi\n[assistant]"


async def test_a_chat_stream_is_data_lines_ended_by_done() -> None:
    async with live_app() as app:
        answer = await call(app.asgi, "POST", "/v1/chat/completions", CHAT | {"stream": True})
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache, no-transform"
    assert answer.headers["x-accel-buffering"] == "no"
    assert len(answer.headers["x-request-id"]) == 32
    assert b"\r" not in answer.body
    read = chunks(answer.body)
    assert read[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    texts = [chunk["choices"][0]["delta"].get("content") for chunk in read[1:-1]]
    assert "".join(texts) == expected_text(CHAT_PROMPT, 6)
    assert read[-1]["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}
    for field in ("id", "created", "model", "system_fingerprint", "object"):
        assert len({chunk[field] for chunk in read}) == 1
    assert not any("usage" in chunk for chunk in read)


async def test_the_role_travels_with_the_first_text_and_headers_go_out_at_once() -> None:
    runner = FakeRunner()
    async with live_app(runner=runner) as app, anyio.create_task_group() as tasks:
        request = exchange(app.asgi, "POST", "/v1/chat/completions")
        request.send_body(json.dumps(CHAT | {"stream": True}).encode())
        with runner.held():
            tasks.start_soon(request.run)
            await request.wait_until(lambda: request.status == 200)
            await anyio.wait_all_tasks_blocked()
            assert request.body == b""
        await request.done.wait()
    first = next(m["body"] for m in request.messages if m.get("body"))
    assert b'"role":"assistant"' in first
    assert f'"content":"{expected_text(CHAT_PROMPT, 1)}'.encode() in first


@pytest.mark.parametrize("has_usage", [False, True])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", CHAT | {"n": 2}),
        ("/v1/completions", {"prompt": ["ab", "cde"], "max_tokens": 6, "temperature": 0, "logprobs": 1}),
    ],
    ids=["chat", "completions"],
)
async def test_continuous_usage_is_in_every_chunk_the_last_included(
    path: str, body: dict[str, Any], has_usage: bool
) -> None:
    options = {"include_usage": has_usage, "continuous_usage_stats": True}
    async with live_app() as app:
        answer = await call(app.asgi, "POST", path, body | {"stream": True, "stream_options": options})
    read = chunks(answer.body)
    num_prompt = 2 + 3 if "prompt" in body else len(CHAT_PROMPT)
    counts = [chunk["usage"]["completion_tokens"] for chunk in read]
    assert counts == sorted(counts)
    assert counts[-1] == 12
    for chunk in read:
        usage = chunk["usage"]
        assert usage["prompt_tokens"] == num_prompt
        assert usage["total_tokens"] == num_prompt + usage["completion_tokens"]
    assert (read[-1]["choices"] == []) == has_usage
    # What a chunk says is what has come by then.
    num_come = 0
    for chunk in read:
        for choice in chunk["choices"]:
            num_come += len(choice.get("text") or choice.get("delta", {}).get("content") or "")
        assert chunk["usage"]["completion_tokens"] == num_come


@pytest.mark.parametrize("has_usage", [False, True])
@pytest.mark.parametrize("is_continuous", [False, True])
async def test_usage_comes_only_as_asked(has_usage: bool, is_continuous: bool) -> None:
    options = {"include_usage": has_usage, "continuous_usage_stats": is_continuous}
    async with live_app() as app:
        answer = await call(
            app.asgi, "POST", "/v1/chat/completions", CHAT | {"stream": True, "stream_options": options}
        )
    read = chunks(answer.body)
    total = {
        "prompt_tokens": len(CHAT_PROMPT),
        "completion_tokens": 6,
        "total_tokens": len(CHAT_PROMPT) + 6,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    if has_usage:
        assert read[-1]["choices"] == []
        timings = read[-1]["usage"].pop("timings")
        assert list(timings) == ["queue_s", "prefill_s", "ttft_s", "decode_s", "total_s"]
        assert 0 <= timings["queue_s"] + timings["prefill_s"] <= timings["ttft_s"]
        assert timings["ttft_s"] + timings["decode_s"] <= timings["total_s"] + 1e-5
        assert read[-1]["usage"] == total
        read = read[:-1]
    if is_continuous:
        counts = [chunk["usage"]["completion_tokens"] for chunk in read]
        assert counts == sorted(counts)
        assert counts[0] == 0
        assert read[-1]["usage"] == total
    else:
        assert all(chunk.get("usage") is None for chunk in read)
    assert all(chunk["choices"] for chunk in read)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_a_whole_answer_has_the_text_of_the_stream(path: str) -> None:
    body = CHAT if "chat" in path else {"prompt": "hello", "temperature": 0, "max_tokens": 9}
    async with live_app() as app:
        whole = (await call(app.asgi, "POST", path, body)).json()
        streamed = chunks((await call(app.asgi, "POST", path, body | {"stream": True})).body)
    choice = whole["choices"][0]
    text = choice["message"]["content"] if "chat" in path else choice["text"]
    pieces = [c.get("text") or c.get("delta", {}).get("content") or "" for chunk in streamed for c in chunk["choices"]]
    assert "".join(pieces) == text
    assert choice["finish_reason"] == streamed[-1]["choices"][0]["finish_reason"] == "length"
    assert whole["usage"]["completion_tokens"] == len(text)


async def test_completions_default_to_sixteen_tokens_and_chat_to_the_rest_of_the_context() -> None:
    async with live_app(runner=FakeRunner(max_context_tokens=80)) as app:
        completion = await call(app.asgi, "POST", "/v1/completions", {"prompt": "abc", "temperature": 0})
        chat = await call(app.asgi, "POST", "/v1/chat/completions", {"messages": CHAT["messages"], "temperature": 0})
    assert completion.json()["usage"]["completion_tokens"] == 16
    assert chat.json()["usage"]["total_tokens"] == 80


@pytest.mark.parametrize("num_stop_chars", [1, 2, 5])
async def test_a_stop_string_ends_the_text_before_it(num_stop_chars: int) -> None:
    text = expected_text("stop here", 40)
    stop = text[20 : 20 + num_stop_chars]
    at = text.index(stop)
    body = {"prompt": "stop here", "max_tokens": 40, "temperature": 0, "stop": ["never there", stop]}
    async with live_app() as app:
        whole = await call(app.asgi, "POST", "/v1/completions", body)
        streamed = await call(app.asgi, "POST", "/v1/completions", body | {"stream": True})
        await app.until(lambda: app.client.load.num_running == 0)
    assert whole.json()["choices"][0]["text"] == text[:at]
    assert whole.json()["choices"][0]["finish_reason"] == "stop"
    assert whole.json()["usage"]["completion_tokens"] == at + num_stop_chars
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks(streamed.body)) == text[:at]


async def test_a_stop_string_frees_the_sequence_in_the_engine_too() -> None:
    text = expected_text("stop here", 40)
    async with live_app() as app, anyio.create_task_group() as tasks:
        request = exchange(app.asgi, "POST", "/v1/completions")
        request.send_body(
            json.dumps({"prompt": "stop here", "max_tokens": 400, "stop": text[4:7], "temperature": 0}).encode()
        )
        with app.runner.held():
            tasks.start_soon(request.run)
            app.runner.allow(7)
            await request.done.wait()
            app.runner.allow(1)  # the step that was under way when the text was complete
            await app.until(lambda: app.client.load.num_running == 0)
        assert request.json()["choices"][0]["text"] == text[:4]


async def test_a_silent_stream_gets_comments_and_a_flowing_one_none() -> None:
    runner = FakeRunner()
    async with live_app(runner=runner, heartbeat_s=1) as app, anyio.create_task_group() as tasks:
        request = exchange(app.asgi, "POST", "/v1/completions")
        request.send_body(json.dumps({"prompt": "x", "stream": True, "temperature": 0}).encode())
        with runner.held():
            tasks.start_soon(request.run)
            await request.wait_until(lambda: request.body.count(b":\n\n") == 2)
            assert request.body == b":\n\n:\n\n"
        await request.done.wait()
    assert b":\n\n" not in request.body.removeprefix(b":\n\n:\n\n")
    assert len(chunks(request.body.removeprefix(b":\n\n:\n\n"))) > 1


async def test_a_step_that_fails_ends_its_streams_with_an_error_event_and_the_engine_goes_on() -> None:
    runner = FakeRunner()
    body = {"prompt": "x", "max_tokens": 20, "temperature": 0}
    async with live_app(runner=runner) as app, anyio.create_task_group() as tasks:
        streamed = exchange(app.asgi, "POST", "/v1/completions")
        streamed.send_body(json.dumps(body | {"stream": True}).encode())
        whole = exchange(app.asgi, "POST", "/v1/completions")
        whole.send_body(json.dumps(body).encode())
        with runner.held():
            tasks.start_soon(streamed.run)
            tasks.start_soon(whole.run)
            await anyio.wait_all_tasks_blocked()
            runner.fail_next = True
        await streamed.done.wait()
        await whole.done.wait()
        after = await call(app.asgi, "POST", "/v1/completions", body)
    # The first step may have taken in one of the two only.
    failed = [request for request in (streamed, whole) if b"engine_error" in request.body]
    assert failed
    if streamed in failed:
        frames = streamed.body.decode().split("\n\n")
        error = json.loads(frames[-2].removeprefix("data: "))["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert "fake model" not in error["message"], "internals stay inside"
        assert b"[DONE]" not in streamed.body
    if whole in failed:
        assert whole.status == 500
    assert after.json()["choices"][0]["text"] == expected_text("x", 20)


async def test_a_step_that_fails_leaves_those_that_waited() -> None:
    async with live_app(scheduler=make_scheduler(max_num_seqs=1)) as app, anyio.create_task_group() as tasks:
        requests = [exchange(app.asgi, "POST", "/v1/completions") for _ in range(2)]
        with app.runner.held():
            for i, request in enumerate(requests):
                request.send_body(json.dumps({"prompt": f"w{i}", "max_tokens": 9, "temperature": 0}).encode())
                tasks.start_soon(request.run)
                await anyio.wait_all_tasks_blocked()
            app.runner.allow(2)
            await app.until(lambda: app.client.load.num_waiting == 1)
            app.runner.fail_next = True
        for request in requests:
            await request.done.wait()
    assert requests[0].status == 500
    assert requests[1].json()["choices"][0]["text"] == expected_text("w1", 9)


async def test_a_deadline_ends_a_stream_with_an_error_event_and_a_whole_answer_with_504() -> None:
    runner = FakeRunner()
    body = {"prompt": "x", "max_tokens": 20, "temperature": 0, "timeout": 0.05}
    async with live_app(runner=runner) as app, anyio.create_task_group() as tasks:
        requests = [exchange(app.asgi, "POST", "/v1/completions") for _ in range(2)]
        with runner.held():
            for request, stream in zip(requests, (True, False), strict=True):
                request.send_body(json.dumps(body | {"stream": stream}).encode())
                tasks.start_soon(request.run)
            await anyio.sleep(0.1)  # the time that is over is real time
        for request in requests:
            await request.done.wait()
    assert b'"code":"deadline_exceeded"' in requests[0].body
    assert b"[DONE]" not in requests[0].body
    assert requests[1].status == 504
    assert requests[1].headers["x-should-retry"] == "false"
    assert requests[1].json()["error"]["code"] == "deadline_exceeded"


async def test_streams_are_merged_into_one_running_batch() -> None:
    runner = FakeRunner()
    async with live_app(runner=runner, scheduler=make_scheduler(num_blocks=256)) as app:
        async with anyio.create_task_group() as tasks:
            requests = []
            with runner.held():
                for i in range(20):
                    request = exchange(app.asgi, "POST", "/v1/completions")
                    request.send_body(json.dumps({"prompt": f"n{i}", "max_tokens": 30, "temperature": 0}).encode())
                    requests.append(request)
                    tasks.start_soon(request.run)
                await anyio.wait_all_tasks_blocked()
        texts = [request.json()["choices"][0]["text"] for request in requests]
    assert texts == [expected_text(f"n{i}", 30) for i in range(20)]
    assert max(runner.widths) == 20
