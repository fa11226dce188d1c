"""Ollama's routes as its client reads them, and as they are on the wire."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import anyio
import httpx
import ollama
import pytest
from ollama import AsyncClient, ChatResponse, GenerateResponse, ListResponse, ProcessResponse, ShowResponse

import chat_templates as templates
from asgi_client import Exchange, call, exchange, with_state
from fake_engine import FakeRunner, byte_tokenizer, expected_text
from headrace.server.api_keys import append_key, create_key
from headrace.server.app import App
from headrace.server.model_details import ModelDetails
from live_app import live_app
from speaking_model import speaking

pytestmark = pytest.mark.anyio

HELLO = {"role": "user", "content": "hi"}
OPTIONS = {"temperature": 0, "num_predict": 6}
CHAT: dict[str, Any] = {"model": "fake", "messages": [HELLO], "options": OPTIONS}
GENERATE: dict[str, Any] = {"model": "fake", "prompt": "hi", "options": OPTIONS}
PROMPT = "[user]hi\n[assistant]"
WEATHER = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
TOOLS = [{"type": "function", "function": WEATHER}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'


@asynccontextmanager
async def client_of(app: App, **headers: str) -> AsyncIterator[AsyncClient]:
    transport = httpx.ASGITransport(with_state(app.asgi))
    async with AsyncClient("http://127.0.0.1:8000", transport=transport, headers=headers) as client:
        yield client


def lines_of(answer: Exchange, type: type[ChatResponse] | type[GenerateResponse]) -> list[dict[str, Any]]:
    """A stream's objects, of which only the last is done."""
    assert answer.status == 200, answer.body
    assert answer.headers["content-type"] == "application/x-ndjson"
    assert answer.body.endswith(b"\n")
    read = [json.loads(line) for line in answer.body.splitlines()]
    for line in read:
        type.model_validate(line, strict=True)
        assert datetime.fromisoformat(line["created_at"]).tzinfo == UTC
        assert line["created_at"].endswith("Z")
    assert [line["done"] for line in read] == [False] * (len(read) - 1) + [True]
    return read


def assert_refused(answer: Exchange, status: int, said: str) -> None:
    assert answer.status == status, answer.body
    content = answer.json()
    assert list(content) == ["error"]
    assert said in content["error"]


async def test_chats_are_streamed_unless_that_is_not_wanted() -> None:
    async with live_app() as app:
        *pieces, end = lines_of(await call(app.asgi, "POST", "/api/chat", CHAT), ChatResponse)
        whole = (await call(app.asgi, "POST", "/api/chat", CHAT | {"stream": False})).json()
    text = "".join(piece["message"]["content"] for piece in pieces)
    assert text == whole["message"]["content"] == expected_text(PROMPT, 6)
    assert {tuple(piece) for piece in pieces} == {("model", "created_at", "message", "done")}
    assert end["message"] == {"role": "assistant", "content": ""}
    assert whole.keys() == end.keys()
    assert (end["done_reason"], end["prompt_eval_count"], end["eval_count"]) == ("length", len(PROMPT), 6)
    parts = [end[f"{part}_duration"] for part in ("load", "prompt_eval", "eval")]
    assert all(isinstance(part, int) and part > 0 for part in parts)
    assert sum(parts) <= end["total_duration"] + 3000


async def test_the_client_reads_both_routes() -> None:
    async with live_app() as app, client_of(app) as client:
        chat = await client.chat("fake", [HELLO], options=OPTIONS)
        chats = [part async for part in await client.chat("fake", [HELLO], options=OPTIONS, stream=True)]
        generated = await client.generate("fake", "hi", options=OPTIONS)
        parts = [part async for part in await client.generate("fake", "hi", options=OPTIONS, stream=True)]
    text = expected_text(PROMPT, 6)
    assert chat.message.content == "".join(part.message.content or "" for part in chats) == text
    assert generated.response == "".join(part.response or "" for part in parts) == text
    assert chat.done_reason == chats[-1].done_reason == generated.done_reason == parts[-1].done_reason == "length"


async def test_a_prompt_may_have_a_system_prompt_or_be_raw() -> None:
    async with live_app() as app, client_of(app) as client:
        told = await client.generate("fake", "hi", system="s", options=OPTIONS)
        raw = await client.generate("fake", "hi", raw=True, options=OPTIONS)
    assert told.response == expected_text(f"[system]s\n{PROMPT}", 6)
    assert raw.response == expected_text("hi", 6)


async def test_without_a_chat_template_a_prompt_is_completed() -> None:
    async with live_app(tokenizer=byte_tokenizer("")) as app, client_of(app) as client:
        assert (await client.generate("fake", "hi", options=OPTIONS)).response == expected_text("hi", 6)
        with pytest.raises(ollama.ResponseError, match="no chat template"):
            await client.chat("fake", [HELLO])


async def test_an_answer_may_fill_the_context() -> None:
    async with live_app(runner=FakeRunner(max_context_tokens=80)) as app:
        for path, body in (("chat", CHAT), ("generate", GENERATE), ("generate", GENERATE | {"raw": True})):
            for options in ({}, {"num_predict": -1}):
                answer = await call(app.asgi, "POST", f"/api/{path}", body | {"options": options, "stream": False})
                end = answer.json()
                assert end["prompt_eval_count"] + end["eval_count"] == 80 or end["done_reason"] == "stop"


async def test_a_stop_string_ends_an_answer() -> None:
    text = expected_text(PROMPT, 30)
    async with live_app() as app, client_of(app) as client:
        answer = await client.chat("fake", [HELLO], options={"temperature": 0, "stop": ["never", text[9:11]]})
    assert (answer.message.content, answer.done_reason) == (text[: text.index(text[9:11])], "stop")


@pytest.mark.parametrize("stream", [False, True])
async def test_calls_are_whole_with_their_arguments_as_objects(stream: bool) -> None:
    async with speaking(f"I look.\n{CALL}\n{CALL}") as app:
        body = CHAT | {"options": {}, "tools": TOOLS, "stream": stream}
        answer = await call(app.asgi, "POST", "/api/chat", body)
    messages = [line["message"] for line in (lines_of(answer, ChatResponse) if stream else [answer.json()])]
    assert "".join(message["content"] for message in messages) == "I look."
    calls = [each for message in messages for each in message.get("tool_calls", ())]
    assert len({each["id"] for each in calls}) == 2
    assert [each["function"] for each in calls] == [{"name": "weather", "arguments": {"city": "Köln"}}] * 2
    end = lines_of(answer, ChatResponse)[-1] if stream else answer.json()
    assert end["done_reason"] == "stop"


@pytest.mark.parametrize("stream", [False, True])
async def test_what_json_has_no_number_for_is_null_in_arguments(stream: bool) -> None:
    async with speaking(CALL.replace("}}", ', "days": NaN, "high": 1e999}}')) as app:
        answer = await call(app.asgi, "POST", "/api/chat", CHAT | {"options": {}, "tools": TOOLS, "stream": stream})
    messages = [line["message"] for line in (lines_of(answer, ChatResponse) if stream else [answer.json()])]
    [called] = [each for message in messages for each in message.get("tool_calls", ())]
    assert called["function"]["arguments"] == {"city": "Köln", "days": None, "high": None}


async def test_tools_make_a_round_trip() -> None:
    def weather(city: str) -> str:
        """The weather.

        Args:
            city: Where.
        """
        return f"rain in {city}"

    async with speaking(CALL) as app, client_of(app) as client:
        messages: list[Any] = [HELLO]
        answer = await client.chat("fake", messages, tools=[weather])
        [call] = answer.message.tool_calls or ()
        messages += [
            answer.message,
            {"role": "tool", "tool_name": "weather", "content": weather(**call.function.arguments)},
        ]
        await client.chat("fake", messages, tools=[weather])
        prompts = sorted((bytes(prompt).decode() for prompt in app.runner.prompts), key=len)  # type: ignore[attr-defined]
    assert '"name": "weather"' in prompts[0]
    assert '{"name": "weather", "arguments": {"city": "Köln"}}' in prompts[1]
    assert "<tool_response>\nrain in Köln\n</tool_response>" in prompts[1]


@pytest.mark.parametrize("path", ["chat", "generate"])
@pytest.mark.parametrize("stream", [False, True])
async def test_reasoning_is_told_apart(path: str, stream: bool) -> None:
    async with speaking("<think>\nHm.\n</think>\n\nYes.") as app:
        body = (CHAT if path == "chat" else GENERATE) | {"options": {}, "think": True, "stream": stream}
        answer = await call(app.asgi, "POST", f"/api/{path}", body)
    type = ChatResponse if path == "chat" else GenerateResponse
    lines = lines_of(answer, type) if stream else [answer.json()]
    parts = [line["message"] if path == "chat" else line for line in lines]
    assert "".join(part.get("thinking", "") for part in parts) == "Hm."
    assert "".join(part["content" if path == "chat" else "response"] for part in parts) == "Yes."


@pytest.mark.parametrize(("think", "told"), [(None, "-"), (False, "no"), (True, "yes"), ("low", "yes low")])
async def test_whether_to_think_is_told_to_the_template(think: Any, told: str) -> None:
    said = "{{ ('yes' if enable_thinking else 'no') if enable_thinking is defined else '-' }}"
    depth = "{{ ' ' ~ reasoning_effort if reasoning_effort is defined else '' }}"
    async with speaking("Yes.", template=f"{templates.QWEN3}{said}{depth}") as app:
        for path, body in (("chat", CHAT), ("generate", GENERATE)):
            assert (await call(app.asgi, "POST", f"/api/{path}", body | {"think": think})).status == 200
        [prompt] = app.runner.prompts  # type: ignore[attr-defined]
    assert bytes(prompt).decode().endswith(f"assistant\n{told}")


async def test_a_last_message_of_the_assistant_is_continued() -> None:
    messages = [HELLO, {"role": "assistant", "content": "The answer"}]
    async with live_app() as app, client_of(app) as client:
        answer = await client.chat("fake", messages, options=OPTIONS)
    assert answer.message.content == expected_text("[user]hi\n[assistant]The answer", 6)


@pytest.mark.parametrize("format", ["json", {"type": "object", "properties": {"a": {"type": "boolean"}}}])
async def test_a_format_holds_the_answer(format: Any) -> None:
    async with live_app() as app, client_of(app) as client:
        answer = await client.generate("fake", "hi", format=format, options={"num_predict": 200})
    assert answer.done_reason == "length" or isinstance(json.loads(answer.response or ""), dict)


async def test_a_request_for_nothing_loads_the_model() -> None:
    async with live_app() as app, client_of(app) as client:
        chat, generated = await client.chat("fake", []), await client.generate("fake", keep_alive=5)
        assert (chat.done, chat.done_reason, chat.message.content) == (True, "load", "")
        assert (generated.done, generated.done_reason, generated.response) == (True, "load", "")
        assert_refused(await call(app.asgi, "POST", "/api/generate", {"model": "other"}), 404, "`other`")
        assert app.runner.num_steps == 0
        app.stop_accepting()
        assert_refused(await call(app.asgi, "POST", "/api/generate", {"model": "fake"}), 503, "shut")


@pytest.mark.parametrize("served", ["fake", "fake:latest", "fake:8b"])
async def test_a_models_name_may_have_the_default_tag(served: str) -> None:
    async with live_app() as app, client_of(app) as client:
        app.generator.model_name = served
        listed = (await client.list()).models[0].model
        assert listed == (served if ":" in served else f"{served}:latest")
        for name in {served, listed, *(["fake", "fake:latest"] if served != "fake:8b" else [])}:
            assert (await client.chat(name, [HELLO], options=OPTIONS)).model == name
        with pytest.raises(ollama.ResponseError, match="does not exist"):
            await client.chat("fake:7b", [HELLO])


async def test_the_model_is_described() -> None:
    details = ModelDetails("gguf", "llama", 134_515_008, "Q4_1", 91_728_000, 1.7e9, "ab" * 32)
    async with live_app() as app, client_of(app) as client:
        app._ollama.details = details
        [listed], [running] = (await client.list()).models, (await client.ps()).models
        shown = await client.show("fake")
        for type, method, path in (
            (ListResponse, "GET", "tags"),
            (ProcessResponse, "GET", "ps"),
            (ShowResponse, "POST", "show"),
        ):
            answer = (await call(app.asgi, method, f"/api/{path}", {})).json()
            type.model_validate(answer)
        for field in ("model", "name"):
            assert_refused(await call(app.asgi, "POST", "/api/show", {field: "other"}), 404, "`other`")
    for model in (listed, running):
        assert (model.model, model.size, model.digest) == ("fake:latest", 91_728_000, "ab" * 32)
        assert model.details is not None
        assert (model.details.family, model.details.parameter_size) == ("llama", "134.52M")
        assert (model.details.format, model.details.quantization_level) == ("gguf", "Q4_1")
    assert running.context_length == 512
    assert running.expires_at is not None
    assert shown.modelinfo == {
        "general.architecture": "llama",
        "general.parameter_count": 134_515_008,
        "llama.context_length": 512,
    }
    assert shown.template
    assert shown.capabilities == ["completion", "tools"]


async def test_adapters_are_models_with_a_parent() -> None:
    async with live_app() as app, client_of(app) as client:
        app.generator.adapters = {"poet": ""}
        model, adapter = (await client.list()).models
        assert (model.model, adapter.model) == ("fake:latest", "poet:latest")
        assert model.details is not None
        assert adapter.details is not None
        assert (model.details.parent_model, adapter.details.parent_model) == ("", "fake")
        shown = await client.show("poet")
        assert shown.details == adapter.details
        assert (await client.generate("poet")).done_reason == "load"


async def test_a_model_that_reasons_says_so() -> None:
    async with speaking("x") as app, client_of(app) as client:
        assert (await client.show("fake")).capabilities == ["completion", "tools", "thinking"]


async def test_the_server_is_alive_and_of_some_version() -> None:
    async with live_app() as app:
        assert (await call(app.asgi, "HEAD", "/")).status == 200
        version = (await call(app.asgi, "GET", "/api/version")).json()["version"]
        assert all(part.isdigit() for part in version.split("."))


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("chat", {"model": 5}, "model"),
    ("chat", {"messages": "hi"}, "messages"),
    ("chat", {"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
    ("chat", {"messages": [HELLO | {"images": ["AAAA"]}]}, "messages[0].images"),
    ("chat", {"messages": [HELLO | {"tool_calls": [{"function": {"name": "x", "arguments": {}}}]}]}, "tool_calls"),
    ("chat", {"messages": [HELLO | {"content": "x" * 600}]}, "messages"),
    ("chat", {"stream": "yes"}, "stream"),
    ("chat", {"think": True}, "think"),
    ("chat", {"think": "deep"}, "think"),
    ("chat", {"format": "xml"}, "format"),
    ("chat", {"format": {"type": "king"}}, "format"),
    ("chat", {"logprobs": True}, "logprobs"),
    ("chat", {"truncate": True}, "truncate"),
    ("chat", {"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    ("chat", {"tools": [{"type": "function"}]}, "tools[0].function"),
    ("chat", {"options": 5}, "options"),
    ("chat", {"options": {"num_predict": 0}}, "options.num_predict"),
    ("chat", {"options": {"num_predict": 10**6}}, "options.num_predict"),
    ("chat", {"options": {"temperature": -1}}, "options.temperature"),
    ("chat", {"options": {"top_k": 1.5}}, "options.top_k"),
    ("chat", {"options": {"stop": [""]}}, "options.stop[0]"),
    ("chat", {"options": {"repeat_penalty": 0}}, "options.repeat_penalty"),
    ("chat", {"options": {"mirostat": 2}}, "options.mirostat"),
    ("chat", {"options": {"typical_p": 0.5}}, "options.typical_p"),
    ("generate", {"prompt": 5}, "prompt"),
    ("generate", {"prompt": "x" * 600}, "prompt"),
    ("generate", {"prompt": "x" * 600, "raw": True}, "prompt"),
    ("generate", {"suffix": "x"}, "suffix"),
    ("generate", {"template": "x"}, "template"),
    ("generate", {"images": ["AAAA"]}, "images"),
    ("generate", {"context": [1, 2]}, "context"),
    ("generate", {"raw": True, "system": "x"}, "system"),
    ("generate", {"options": {"num_predict": 10**6}}, "options.num_predict"),
    ("generate", {"width": 512}, "width"),
]


@pytest.mark.parametrize(("path", "fields", "param"), REFUSED, ids=lambda value: repr(value)[:50])
async def test_a_wrong_value_is_refused_by_name(path: str, fields: dict[str, Any], param: str) -> None:
    async with live_app() as app:
        body = (CHAT if path == "chat" else GENERATE) | fields
        assert_refused(await call(app.asgi, "POST", f"/api/{path}", body), 400, param)
        assert app.runner.num_steps == 0


async def test_null_is_absent_and_what_asks_for_nothing_is_taken() -> None:
    loading = {"num_ctx": 2048, "num_gpu": 1, "num_thread": 4, "use_mmap": True, "low_vram": False, "num_keep": 4}
    neutral = {"mirostat": 0, "typical_p": 1, "tfs_z": 1.0, "repeat_last_n": -1, "repeat_penalty": 1.0, "top_k": 0}
    nothing = {"think": False, "format": "", "tools": [], "keep_alive": "5m", "logprobs": False, "surprise": 1}
    generate = {"suffix": "", "template": "", "system": "", "images": [], "context": [], "raw": False}
    async with live_app() as app:
        for path, body in (("chat", CHAT), ("generate", GENERATE | generate)):
            body = {**body, **nothing, "options": OPTIONS | loading | neutral, "stream": False}
            nulls = dict.fromkeys(set(body) - {"messages", "prompt", "options", "stream"})
            for fields in ({}, nulls, {"options": OPTIONS | dict.fromkeys([*loading, *neutral])}):
                answer = (await call(app.asgi, "POST", f"/api/{path}", body | fields)).json()
                text = answer["message"]["content"] if path == "chat" else answer["response"]
                assert text == expected_text(PROMPT, 6)


async def test_errors_are_ollamas_whoever_refuses(tmp_path: Path) -> None:
    secret, key = create_key("someone")
    append_key(tmp_path / "keys.toml", key)
    async with live_app(max_body_bytes=1000) as app:
        assert_refused(await call(app.asgi, "POST", "/api/chat", b"{"), 400, "JSON")
        assert_refused(await call(app.asgi, "POST", "/api/chat", b"x" * 1001), 413, "1000")
        assert_refused(
            await call(app.asgi, "POST", "/api/chat", headers={"content-type": "text/plain"}), 415, "content"
        )
        assert_refused(await call(app.asgi, "POST", "/api/pull", {"model": "x"}), 404, "/api/pull")
        assert_refused(await call(app.asgi, "GET", "/api/tags", headers={"host": "evil.example"}), 403, "evil")
    async with live_app(api_keys_file=tmp_path / "keys.toml") as app:
        assert_refused(await call(app.asgi, "GET", "/api/tags"), 401, "key")
        async with client_of(app, authorization=f"Bearer {secret}") as client:
            assert (await client.list()).models


async def test_a_failure_midway_is_a_line_that_says_so() -> None:
    async with live_app() as app, anyio.create_task_group() as tasks:
        requests = [exchange(app.asgi, "POST", "/api/chat") for _ in range(2)]
        with app.runner.held():
            for request, stream in zip(requests, (True, False), strict=True):
                request.send_body(json.dumps(CHAT | {"stream": stream, "options": {"num_predict": 50}}).encode())
                tasks.start_soon(request.run)
            await app.until(lambda: app.client.num_unfinished == 2)
            app.runner.allow(3)
            await requests[0].wait_until(lambda: b"content" in requests[0].body)
            app.client.interrupt_all()
        for request in requests:
            await request.done.wait()
    assert json.loads(requests[0].body.splitlines()[-1]) == {"error": "the server is shutting down"}
    assert_refused(requests[1], 503, "the server is shutting down")


async def test_padding_makes_the_lengths_of_texts_even() -> None:
    async with live_app(stream_padding_bytes=32) as app:
        *pieces, _ = lines_of(await call(app.asgi, "POST", "/api/chat", CHAT), ChatResponse)
    assert pieces
    assert all(len(json.dumps(each["message"]["content"]) + each["obfuscation"]) % 32 == 0 for each in pieces)
