"""Who watches an encrypted stream pass sees when events come and how long they are; both can be made to tell little."""

import json
from typing import Any

import anyio
import pytest

from asgi_client import Exchange, call, chunks, exchange
from fake_engine import FakeRunner, expected_text
from live_app import LiveApp, live_app

pytestmark = pytest.mark.anyio

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 6, "temperature": 0, "stream": True}
COMPLETION = {"prompt": "hi", "max_tokens": 6, "temperature": 0, "stream": True}
OBFUSCATED = {"stream_options": {"include_obfuscation": True}}


def data_lengths(body: bytes, mark: bytes) -> set[int]:
    """The lengths of the data lines with `mark` in them."""
    return {len(line) for line in body.split(b"\n") if line.startswith(b"data: ") and mark in line}


async def stream_in_steps(app: LiveApp, runner: FakeRunner, path: str, body: Any) -> Exchange:
    """The answer where some pieces are of one token and some of several: of different lengths, that is."""
    request = exchange(app.asgi, "POST", path)
    request.send_body(json.dumps(body).encode())
    async with anyio.create_task_group() as tasks:
        with runner.held():
            tasks.start_soon(request.run)
            for num_steps in (1, 1, 3):
                length = len(request.body)
                runner.allow(num_steps)
                await request.wait_until(lambda length=length: len(request.body) > length)
        await request.done.wait()
    return request


@pytest.mark.parametrize(
    ("settings", "fields"), [({}, OBFUSCATED), ({"stream_padding_bytes": 32}, {})], ids=["asked for", "set"]
)
@pytest.mark.parametrize(("path", "body"), [("/v1/chat/completions", CHAT), ("/v1/completions", COMPLETION)])
async def test_events_with_text_are_equally_long_and_say_what_they_said(
    path: str, body: dict[str, Any], settings: dict[str, Any], fields: dict[str, Any]
) -> None:
    runner = FakeRunner()
    async with live_app(runner=runner, **settings) as app:
        answer = await stream_in_steps(app, runner, path, body | fields)
    texts = [chunk["choices"][0] for chunk in chunks(answer.body) if "obfuscation" in chunk]
    prompt = "hi" if "prompt" in body else "[user]hi\n[assistant]"
    said = [choice.get("text") or choice["delta"]["content"] for choice in texts]
    assert "".join(said) == expected_text(prompt, 6)
    assert len(said) >= 3
    assert len(data_lengths(answer.body, b'"obfuscation"')) == 1


async def test_without_either_there_is_no_padding() -> None:
    async with live_app() as app:
        for fields in ({}, {"stream_options": {"include_obfuscation": False}}):
            assert b"obfuscation" not in (await call(app.asgi, "POST", "/v1/completions", COMPLETION | fields)).body


async def test_what_a_client_asks_for_does_not_lessen_what_is_set() -> None:
    async with live_app(stream_padding_bytes=64) as app:
        body = COMPLETION | {"stream_options": {"include_obfuscation": False}}
        assert b"obfuscation" in (await call(app.asgi, "POST", "/v1/completions", body)).body


async def test_native_events_with_text_are_equally_long_too() -> None:
    async with live_app(stream_padding_bytes=32) as app:
        query = "prompt=hi&max_tokens=6&temperature=0"
        answer = await call(app.asgi, "GET", "/v1/stream", query=query, headers={"accept": "text/event-stream"})
        tokens = [json.loads(event["data"]) for event in answer.events() if event.get("event") == "token"]
        assert "".join(token["text"] for token in tokens) == expected_text("hi", 6)
        assert {(len(json.dumps(token["text"])) + len(token["obfuscation"])) % 32 for token in tokens} == {0}


@pytest.mark.parametrize("is_native", [False, True])
async def test_tokens_that_come_within_an_interval_are_one_event(is_native: bool) -> None:
    runner = FakeRunner()
    async with live_app(runner=runner, stream_interval_ms=500) as app:
        if is_native:
            query = "prompt=hi&max_tokens=40&temperature=0"
            request = exchange(app.asgi, "GET", "/v1/stream", query=query, headers={"accept": "text/event-stream"})
        else:
            request = exchange(app.asgi, "POST", "/v1/completions")
            request.send_body(json.dumps(COMPLETION | {"max_tokens": 40}).encode())
        async with anyio.create_task_group() as tasks:
            with runner.held():
                tasks.start_soon(request.run)
                runner.allow(1)
                await request.wait_until(lambda: b'"text"' in request.body)
                for num_steps in range(2, 41):  # each waits for the reader to have had its turn
                    runner.allow(1)
                    while app.client.load.num_steps < num_steps:  # noqa: ASYNC110 - no event tells of a step
                        await anyio.sleep(0.001)
            await request.done.wait()
        texts = [json.loads(event["data"]) for event in request.events() if '"text"' in event.get("data", "")]
        said = [event.get("text") or event["choices"][0]["text"] for event in texts if "choices" in event or is_native]
    assert "".join(said) == expected_text("hi", 40)
    assert len(said) < 10, "without an interval it is one each"
