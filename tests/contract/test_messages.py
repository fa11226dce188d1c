"""Anthropic's routes as its client reads them in strict mode, and as they are on the wire."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anthropic
import anyio
import httpx2
import pytest
from anthropic import AsyncAnthropic
from anthropic.types import ErrorResponse, RawMessageStreamEvent
from pydantic import TypeAdapter

import chat_templates as templates
from asgi_client import Exchange, call, exchange, with_state
from fake_engine import FakeRunner, expected_text, make_scheduler
from headrace.server.api_keys import append_key, create_key
from headrace.server.app import App
from live_app import live_app
from speaking_model import speaking

pytestmark = pytest.mark.anyio

HELLO = {"role": "user", "content": "hi"}
BODY: dict[str, Any] = {"model": "fake", "max_tokens": 6, "messages": [HELLO], "temperature": 0}
PROMPT = "[user]hi\n[assistant]"
WEATHER_TOOL: dict[str, Any] = {
    "name": "weather",
    "description": "The weather of a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
BUDGET = {"type": "enabled", "budget_tokens": 1024}
EVENTS: TypeAdapter[RawMessageStreamEvent] = TypeAdapter(RawMessageStreamEvent)


@asynccontextmanager
async def client_of(app: App, key: str = "none") -> AsyncIterator[AsyncAnthropic]:
    transport = httpx2.ASGITransport(with_state(app.asgi))
    async with (
        httpx2.AsyncClient(transport=transport) as http,
        AsyncAnthropic(
            base_url="http://127.0.0.1:8000",
            api_key=key,
            max_retries=0,
            http_client=http,
            _strict_response_validation=True,
        ) as client,
    ):
        yield client


async def create(app: App, **fields: Any) -> Exchange:
    return await call(app.asgi, "POST", "/v1/messages", BODY | fields)


def events_of(answer: Exchange) -> list[dict[str, Any]]:
    """A stream's events, each of a type that the client knows."""
    assert answer.status == 200, answer.body
    read = []
    for frame in answer.body.decode().removesuffix("\n\n").split("\n\n"):
        name, data = frame.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        if event["type"] not in ("ping", "error"):
            EVENTS.validate_python(event, strict=True)
        read.append(event)
    return read


def assert_refused(answer: Exchange, status: int, type: str, param: str) -> None:
    assert answer.status == status, answer.body
    content = answer.json()
    assert set(content) == {"type", "error", "request_id"}
    assert set(content["error"]) == {"type", "message"}
    assert (content["type"], content["error"]["type"]) == ("error", type)
    assert param in content["error"]["message"]
    assert content["request_id"] == answer.headers["request-id"] == answer.headers["x-request-id"]


async def test_a_message_is_whole() -> None:
    async with live_app() as app, client_of(app) as client:
        message = await client.messages.create(
            model="fake", max_tokens=6, messages=[{"role": "user", "content": "hi"}], extra_body={"temperature": 0}
        )
    assert [block.model_dump(exclude_none=True) for block in message.content] == [
        {"type": "text", "text": expected_text(PROMPT, 6)}
    ]
    assert (message.stop_reason, message.stop_sequence, message.model) == ("max_tokens", None, "fake")
    assert message.usage.model_dump(exclude_none=True) == {
        "input_tokens": len(PROMPT),
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
        "output_tokens": 6,
    }
    assert message.id == f"msg_{message._request_id}"


async def test_a_stream_has_the_events_of_one_text_block() -> None:
    async with live_app() as app:
        answer = await create(app, stream=True)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["request-id"] == answer.headers["x-request-id"]
    start, block, *deltas, stop, end, last = events_of(answer)
    assert start["message"] | {"usage": {}} == {
        "id": f"msg_{answer.headers['request-id']}",
        "type": "message",
        "role": "assistant",
        "model": "fake",
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {},
    }
    assert start["message"]["usage"]["input_tokens"] == len(PROMPT)
    assert block == {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
    assert {(delta["type"], delta["index"], delta["delta"]["type"]) for delta in deltas} == {
        ("content_block_delta", 0, "text_delta")
    }
    assert "".join(delta["delta"]["text"] for delta in deltas) == expected_text(PROMPT, 6)
    assert stop == {"type": "content_block_stop", "index": 0}
    assert end["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    assert end["usage"]["output_tokens"] == 6
    assert last == {"type": "message_stop"}


async def test_the_clients_stream_helper_comes_to_the_whole_message() -> None:
    async with speaking(f"I look.\n{CALL}") as app, client_of(app) as client:
        asked: Any = {"model": "fake", "max_tokens": 200, "messages": [HELLO], "tools": [WEATHER_TOOL]}
        whole = await client.messages.create(**asked)
        async with client.messages.stream(**asked) as stream:
            streamed = await stream.get_final_message()
    content = [block.model_dump(exclude_none=True) for block in whole.content]
    assert content[1].pop("id") != (other := [b.model_dump(exclude_none=True) for b in streamed.content])[1].pop("id")
    assert content == other
    assert content == [
        {"type": "text", "text": "I look."},
        {"type": "tool_use", "name": "weather", "input": {"city": "Köln"}},
    ]
    assert whole.stop_reason == streamed.stop_reason == "tool_use"
    assert whole.usage.output_tokens == streamed.usage.output_tokens


async def test_message_start_goes_out_with_the_first_token_and_headers_at_once() -> None:
    async with live_app() as app, anyio.create_task_group() as tasks:
        request = exchange(app.asgi, "POST", "/v1/messages")
        request.send_body(json.dumps(BODY | {"stream": True}).encode())
        with app.runner.held():
            tasks.start_soon(request.run)
            await request.wait_until(lambda: request.status == 200)
            await anyio.wait_all_tasks_blocked()
            assert request.body == b""
        await request.done.wait()
    first = next(m["body"] for m in request.messages if m.get("body"))
    assert first.startswith(b"event: message_start\n")
    assert f'"text":"{expected_text(PROMPT, 1)}'.encode() in first


async def test_silence_is_filled_with_pings() -> None:
    async with live_app(heartbeat_s=1) as app, anyio.create_task_group() as tasks:
        request = exchange(app.asgi, "POST", "/v1/messages")
        request.send_body(json.dumps(BODY | {"stream": True}).encode())
        with app.runner.held():
            tasks.start_soon(request.run)
            await request.wait_until(lambda: b"event: ping" in request.body)
        await request.done.wait()
    assert [event["type"] for event in events_of(request)][:2] == ["ping", "message_start"]


@pytest.mark.parametrize("stream", [False, True])
async def test_the_stop_sequence_that_ended_the_message_is_told(stream: bool) -> None:
    text = expected_text(PROMPT, 30)
    stop = text[10:12]
    async with live_app() as app:
        answer = await create(app, max_tokens=30, stop_sequences=["never there", stop, text[20:22]], stream=stream)
    end = events_of(answer)[-2]["delta"] if stream else answer.json()
    assert (end["stop_reason"], end["stop_sequence"]) == ("stop_sequence", stop)
    texts = (
        [event["delta"]["text"] for event in events_of(answer)[2:-3]]
        if stream
        else [answer.json()["content"][0]["text"]]
    )
    assert "".join(texts) == text[: text.index(stop)]


async def test_an_answer_that_ends_by_itself_ends_its_turn() -> None:
    async with speaking("Done.") as app:
        whole, streamed = await create(app), await create(app, stream=True)
    assert whole.json()["content"] == [{"type": "text", "text": "Done."}]
    assert (whole.json()["stop_reason"], events_of(streamed)[-2]["delta"]["stop_reason"]) == ("end_turn", "end_turn")


async def test_an_answer_without_text_has_no_blocks() -> None:
    async with speaking("") as app:
        whole, streamed = await create(app), await create(app, stream=True)
    assert whole.json()["content"] == []
    assert [event["type"] for event in events_of(streamed)] == ["message_start", "message_delta", "message_stop"]


async def test_tools_make_a_round_trip() -> None:
    """The client sends back what it got, and the template sees the call and its result as those of a chat."""
    async with speaking(CALL) as app, client_of(app) as client:
        asked: Any = {"model": "fake", "max_tokens": 200, "tools": [WEATHER_TOOL], "system": "Be brief."}
        first = await client.messages.create(messages=[HELLO], **asked)  # type: ignore[list-item]
        [use] = first.content
        assert use.type == "tool_use"
        result = {"type": "tool_result", "tool_use_id": use.id, "content": [{"type": "text", "text": "rain"}]}
        turns: Any = [HELLO, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
        await client.messages.create(messages=turns, **asked)
        prompts = sorted((bytes(prompt).decode() for prompt in app.runner.prompts), key=len)  # type: ignore[attr-defined]
    assert '"name": "weather"' in prompts[0]
    assert prompts[1].startswith(prompts[0].removesuffix("<|im_start|>assistant\n"))
    rest = prompts[1].removeprefix(prompts[0].removesuffix("<|im_start|>assistant\n"))
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>' in rest
    assert "<tool_response>\nrain\n</tool_response>" in rest


@pytest.mark.parametrize(
    ("choice", "types"),
    [
        ({"type": "auto"}, ["text"]),
        ({"type": "none"}, ["text"]),
        ({"type": "any", "disable_parallel_tool_use": True}, ["tool_use"]),
        ({"type": "tool", "name": "weather"}, ["tool_use"]),
    ],
)
async def test_a_tool_is_used_where_one_must_be(choice: dict[str, Any], types: list[str]) -> None:
    schema = {"type": "object", "properties": {"is_day": {"type": "boolean"}}, "required": ["is_day"]}
    tool = WEATHER_TOOL | {"input_schema": schema | {"additionalProperties": False}}
    async with live_app(runner=FakeRunner(max_context_tokens=4096), scheduler=make_scheduler(num_blocks=512)) as app:
        answer = (await create(app, max_tokens=200, tools=[tool], tool_choice=choice)).json()
    assert [block["type"] for block in answer["content"]] == types
    assert answer["stop_reason"] == ("tool_use" if types == ["tool_use"] else "max_tokens")
    if types == ["tool_use"]:
        assert list(answer["content"][0]["input"]) == ["is_day"]


async def test_arguments_that_are_cut_are_told_as_far_as_they_are_whole() -> None:
    num_tokens = len('<tool_call>\n{"name": "weather", "arguments": {"city": "Köln", "days": [1, 2'.encode())
    call = CALL.replace("}}", ', "days": [1, 22, 3]}}')
    async with speaking(call) as app:
        answer = (await create(app, max_tokens=num_tokens, tools=[WEATHER_TOOL])).json()
    assert answer["content"][0]["input"]["city"] == "Köln"
    assert answer["stop_reason"] == "max_tokens"


async def test_what_json_has_no_number_for_is_null_in_arguments() -> None:
    call = CALL.replace("}}", ', "days": [NaN, 1e999], "low": -Infinity}}')
    async with speaking(call) as app:
        answer = await create(app, max_tokens=2000, tools=[WEATHER_TOOL])
    assert answer.json()["content"][0]["input"] == {"city": "Köln", "days": [None, None], "low": None}


async def test_what_was_thought_in_turns_in_a_row_is_kept() -> None:
    def turn(thought: str) -> dict[str, Any]:
        return {"role": "assistant", "content": [{"type": "thinking", "thinking": thought, "signature": ""}]}

    template = "{% for m in messages %}({{ m.reasoning_content }}){% endfor %}"
    async with speaking("Yes.", template) as app:
        await create(app, messages=[HELLO, turn("a"), turn("b"), HELLO])
        [prompt] = app.runner.prompts  # type: ignore[attr-defined]
    assert "(ab)" in bytes(prompt).decode()


@pytest.mark.parametrize("stream", [False, True])
async def test_reasoning_is_a_thinking_block(stream: bool) -> None:
    async with speaking("<think>\nHm.\n</think>\n\nYes.") as app:
        answer = await create(app, max_tokens=2000, thinking=BUDGET, stream=stream)
    if not stream:
        assert answer.json()["content"] == [
            {"type": "thinking", "thinking": "Hm.", "signature": ""},
            {"type": "text", "text": "Yes."},
        ]
        return
    events = events_of(answer)
    assert [e["content_block"] for e in events if e["type"] == "content_block_start"] == [
        {"type": "thinking", "thinking": "", "signature": ""},
        {"type": "text", "text": ""},
    ]
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    assert "".join(delta.get("thinking", "") for delta in deltas) == "Hm."
    assert "".join(delta.get("text", "") for delta in deltas) == "Yes."


@pytest.mark.parametrize(
    ("thinking", "is_told"),
    [(None, "unknown"), ({"type": "disabled"}, "no"), ({"type": "adaptive"}, "yes"), (BUDGET, "yes")],
)
async def test_whether_to_think_is_told_to_the_template(thinking: Any, is_told: str) -> None:
    told = "{{ ('yes' if enable_thinking else 'no') if enable_thinking is defined else 'unknown' }}"
    async with speaking("Yes.", template=f"{templates.QWEN3}{told}") as app:
        await create(app, max_tokens=2000, thinking=thinking)
        [prompt] = app.runner.prompts  # type: ignore[attr-defined]
    assert bytes(prompt).decode().endswith(is_told)


async def test_a_last_turn_of_the_assistant_is_continued() -> None:
    turns = [HELLO, {"role": "assistant", "content": [{"type": "text", "text": "The answer"}]}]
    async with live_app() as app:
        whole, streamed = await create(app, messages=turns), await create(app, messages=turns, stream=True)
    text = expected_text("[user]hi\n[assistant]The answer", 6)
    assert whole.json()["content"][0]["text"] == text
    assert "".join(event["delta"]["text"] for event in events_of(streamed)[2:-3]) == text


async def test_a_schema_holds_the_answer() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    async with live_app() as app:
        for fields in ({"output_config": {"format": {"type": "json_schema", "schema": schema}}},):
            answer = await create(app, max_tokens=100, **fields)
            assert isinstance(json.loads(answer.json()["content"][0]["text"])["a"], bool)


async def test_what_is_sent_twice_is_read_from_the_cache() -> None:
    async with live_app() as app:
        message = {"role": "user", "content": "x" * 60}
        first = (await create(app, messages=[message])).json()["usage"]
        second = (await create(app, messages=[message])).json()["usage"]
    assert first["cache_read_input_tokens"] == 0
    assert second["cache_read_input_tokens"] > 0
    assert second["input_tokens"] + second["cache_read_input_tokens"] == first["input_tokens"]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]},
        {"tools": [WEATHER_TOOL]},
        {"messages": [HELLO, {"role": "assistant", "content": "ho"}, HELLO, HELLO]},
    ],
)
async def test_counted_tokens_are_those_of_the_message(fields: dict[str, Any]) -> None:
    async with live_app(runner=FakeRunner(max_context_tokens=4096), scheduler=make_scheduler(num_blocks=512)) as app:
        async with client_of(app) as client:
            asked: Any = {"model": "fake", "messages": [HELLO]} | fields
            counted = (await client.messages.count_tokens(**asked)).input_tokens
        usage = (await create(app, **fields)).json()["usage"]
        assert app.client.num_waiting == 0
    assert counted == usage["input_tokens"] + usage["cache_read_input_tokens"]


async def test_turns_of_one_role_in_a_row_are_one_turn() -> None:
    blocks = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    async with live_app() as app:
        answer = await create(app, messages=[{"role": "user", "content": blocks}, HELLO], system="s")
    assert answer.json()["content"][0]["text"] == expected_text("[system]s\n[user]ab\n\nhi\n[assistant]", 6)


async def test_a_result_that_is_an_error_says_so_and_texts_beside_it_stay_in_order() -> None:
    call = {"type": "tool_use", "id": "c1", "name": "weather", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "c1", "content": "no such city", "is_error": True}
    turns = [HELLO, {"role": "assistant", "content": [call]}, {"role": "user", "content": [result, *TEXTS]}]
    async with speaking("ok") as app:
        await create(app, messages=turns)
        [prompt] = app.runner.prompts  # type: ignore[attr-defined]
    text = bytes(prompt).decode()
    assert "<tool_response>\nError: no such city\n</tool_response>" in text
    assert text.index("no such city") < text.index("And then?")


TEXTS = [{"type": "text", "text": "And then?"}]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": None}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 10**6}, "max_tokens"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [{"type": "document", "source": {}}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
    ({"messages": [{"role": "user", "content": "x" * 600}]}, "messages"),
    ({"messages": [HELLO, {"role": "assistant", "content": [{"type": "tool_result", "tool_use_id": "x"}]}]}, "type"),
    ({"system": 5}, "system"),
    ({"system": [{"type": "image"}]}, "system[0].type"),
    ({"stop_sequences": [""]}, "stop_sequences[0]"),
    ({"stop_sequences": ["x"] * 100}, "stop_sequences"),
    ({"stream": "yes"}, "stream"),
    ({"temperature": 1.1}, "temperature"),
    ({"top_k": -1}, "top_k"),
    ({"top_p": 0}, "top_p"),
    ({"metadata": {"user_id": 5}}, "metadata.user_id"),
    ({"service_tier": "priority"}, "service_tier"),
    ({"thinking": {"type": "enabled", "budget_tokens": 1000}}, "thinking.budget_tokens"),
    ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking.budget_tokens"),
    ({"thinking": {"type": "adaptive"}}, "thinking"),
    ({"thinking": {"type": "deep"}}, "thinking.type"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"name": "weather"}]}, "tools[0].input_schema"),
    ({"tools": [{"name": "a b", "input_schema": {}}]}, "tools[0].name"),
    ({"tools": [{"name": "a", "input_schema": {"type": "array"}}]}, "tools[0].input_schema"),
    ({"tools": [WEATHER_TOOL, WEATHER_TOOL]}, "tools[1].name"),
    ({"tools": [WEATHER_TOOL | {"defer_loading": True}]}, "tools[0].defer_loading"),
    ({"tool_choice": {"type": "any"}}, "tool_choice"),
    ({"tool_choice": {"type": "tool", "name": "now"}, "tools": [WEATHER_TOOL]}, "tool_choice.name"),
    ({"tool_choice": {"type": "tool"}, "tools": [WEATHER_TOOL]}, "tool_choice.name"),
    ({"output_config": {"effort": "utmost"}}, "output_config.effort"),
    ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, "context_management"),
    ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
    ({"output_config": {"format": {"type": "json_schema", "schema": {"type": "king"}}}}, "output_config.format"),
    ({"mcp_servers": [{"name": "x"}]}, "mcp_servers"),
    ({"container": "x"}, "container"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=lambda value: repr(value)[:50])
async def test_a_wrong_value_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    async with live_app() as app:
        assert_refused(await create(app, **fields), 400, "invalid_request_error", param)
        assert app.runner.num_steps == 0


async def test_null_is_absent_and_what_asks_for_nothing_is_taken() -> None:
    nulls = dict.fromkeys(
        ("system", "tools", "tool_choice", "thinking", "metadata", "stop_sequences", "stream", "top_k")
    )
    nothing = {
        "thinking": {"type": "disabled"},
        "tools": [],
        "tool_choice": {"type": "none"},
        "service_tier": "auto",
        "speed": "standard",
        "mcp_servers": [],
        "output_config": {"effort": "max", "format": None},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "cache_control": {"type": "ephemeral"},
        "metadata": {"user_id": "someone"},
        "surprise": 1,
    }
    async with live_app() as app:
        for fields in (nulls, nothing):
            assert (await create(app, **fields)).json()["content"][0]["text"] == expected_text(PROMPT, 6)


async def test_errors_are_anthropics_whoever_refuses(tmp_path: Path) -> None:
    secret, key = create_key("someone")
    append_key(tmp_path / "keys.toml", key)
    async with live_app(max_body_bytes=1000) as app:
        path = "/v1/messages"
        assert_refused(await create(app, model="other"), 404, "not_found_error", "model")
        assert_refused(await call(app.asgi, "POST", path, b"{"), 400, "invalid_request_error", "JSON")
        assert_refused(await call(app.asgi, "POST", path, b"x" * 1001), 413, "request_too_large", "1000")
        assert_refused(await call(app.asgi, "GET", path), 405, "invalid_request_error", "GET")
        assert_refused(await call(app.asgi, "POST", f"{path}/batches"), 404, "not_found_error", "batches")
        text = {"content-type": "text/plain"}
        assert_refused(await call(app.asgi, "POST", path, headers=text), 415, "invalid_request_error", "content-type")
        foreign = {"origin": "http://evil.example"}
        assert_refused(await call(app.asgi, "POST", path, headers=foreign), 403, "permission_error", "evil")
        app.stop_accepting()
        assert_refused(await create(app), 503, "overloaded_error", "shut")
    async with live_app(api_keys_file=tmp_path / "keys.toml") as app:
        assert_refused(await create(app), 401, "authentication_error", "key")
        async with client_of(app, "wrong") as client:
            with pytest.raises(anthropic.AuthenticationError):
                await client.messages.create(model="fake", max_tokens=1, messages=[HELLO])  # type: ignore[list-item]
        async with client_of(app, secret) as client:
            await client.messages.create(model="fake", max_tokens=1, messages=[HELLO])  # type: ignore[list-item]


async def test_a_full_queue_is_a_rate_limit_that_says_when_to_come_back() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    async with live_app(scheduler=scheduler, max_queue_size=1) as app, anyio.create_task_group() as tasks:
        with app.runner.held():
            for _ in range(2):
                request = exchange(app.asgi, "POST", "/v1/messages")
                request.send_body(json.dumps(BODY).encode())
                tasks.start_soon(request.run)
                await anyio.wait_all_tasks_blocked()
                app.runner.allow(1)
                await app.until(lambda: app.client.load.num_running == 1)
            refused = await create(app)
            async with client_of(app) as client:
                with pytest.raises(anthropic.RateLimitError):
                    await client.messages.create(model="fake", max_tokens=1, messages=[HELLO])  # type: ignore[list-item]
    assert_refused(refused, 429, "rate_limit_error", "waiting")
    assert int(refused.headers["retry-after"]) >= 1


async def test_a_failure_midway_is_an_error_event() -> None:
    async with live_app() as app, anyio.create_task_group() as tasks:
        requests = [exchange(app.asgi, "POST", "/v1/messages") for _ in range(2)]
        with app.runner.held():
            for request, stream in zip(requests, (True, False), strict=True):
                request.send_body(json.dumps(BODY | {"stream": stream, "max_tokens": 50}).encode())
                tasks.start_soon(request.run)
            await app.until(lambda: app.client.num_unfinished == 2)
            app.runner.allow(3)
            await requests[0].wait_until(lambda: b"text_delta" in requests[0].body)
            app.client.interrupt_all()
        for request in requests:
            await request.done.wait()
    error = events_of(requests[0])[-1]
    ErrorResponse.model_validate(error, strict=True)
    assert error["error"]["type"] == "overloaded_error"
    assert error["request_id"] == requests[0].headers["request-id"]
    assert_refused(requests[1], 503, "overloaded_error", "shutting down")


async def test_padding_makes_the_lengths_of_texts_even() -> None:
    async with live_app(stream_padding_bytes=32) as app:
        events = events_of(await create(app, stream=True))
    deltas = [event for event in events if event["type"] == "content_block_delta"]
    assert deltas
    assert all(len(json.dumps(e["delta"]["text"]) + e["obfuscation"]) % 32 == 0 for e in deltas)
