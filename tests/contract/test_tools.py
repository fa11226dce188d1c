"""Tool calls and reasoning as OpenAI's clients read them, of a model that says what it is told to."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import httpx2
import jsonschema
import openai
import pytest
from openai import AsyncOpenAI, pydantic_function_tool
from pydantic import BaseModel

import chat_templates as templates
from asgi_client import call, chunks, exchange, with_state
from fake_engine import FakeRunner, byte_tokenizer
from headrace.server.app import App
from live_app import LiveApp, live_app
from speaking_model import SpeakingRunner

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 9}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "now"}},
]
QUESTION = {"role": "user", "content": "How is the weather?"}
BODY: dict[str, Any] = {"messages": [QUESTION], "tools": TOOLS, "temperature": 0}
WEATHER = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
TEXT = "It rains <b>today</b>, I think.\n"
NAMED = {"type": "function", "function": {"name": "weather"}}


@asynccontextmanager
async def speaking(
    *answers: str, template: str = templates.QWEN2, special_tokens: tuple[str, ...] = (), **settings: Any
) -> AsyncIterator[LiveApp]:
    tokenizer = byte_tokenizer(template, special_tokens)
    async with live_app(runner=SpeakingRunner(tokenizer, *answers), tokenizer=tokenizer, **settings) as app:
        yield app


@asynccontextmanager
async def client_of(app: App) -> AsyncIterator[AsyncOpenAI]:
    async with (
        httpx2.AsyncClient(transport=httpx2.ASGITransport(with_state(app.asgi))) as http,
        AsyncOpenAI(
            base_url="http://127.0.0.1:8000/v1",
            api_key="none",
            max_retries=0,
            http_client=http,
            _strict_response_validation=True,
        ) as client,
    ):
        yield client


async def whole(app: App, **fields: Any) -> dict[str, Any]:
    answer = await call(app.asgi, "POST", CHAT, BODY | fields)
    assert answer.status == 200, answer.body
    return answer.json()  # type: ignore[no-any-return]


async def streamed(app: App, **fields: Any) -> list[dict[str, Any]]:
    answer = await call(app.asgi, "POST", CHAT, BODY | fields | {"stream": True})
    assert answer.status == 200, answer.body
    return chunks(answer.body)


def joined(deltas: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that a choice's deltas come to, as a client adds them up."""
    message: dict[str, Any] = {"role": None, "content": None, "refusal": None}
    for delta in deltas:
        assert set(delta) <= {"role", "content", "reasoning_content", "tool_calls"}
        if "role" in delta:
            assert message["role"] is None, "the role comes once"
            message["role"] = delta["role"]
        for field in ("content", "reasoning_content"):
            if delta.get(field) is not None:
                message[field] = (message.get(field) or "") + delta[field]
        for piece in delta.get("tool_calls", ()):
            calls = message.setdefault("tool_calls", [])
            if "id" in piece:
                assert piece["index"] == len(calls)
                assert piece["function"]["arguments"] == ""
                calls.append({name: value for name, value in piece.items() if name != "index"})
            else:
                assert set(piece) == {"index", "function"}
                assert set(piece["function"]) == {"arguments"}
                calls[piece["index"]]["function"]["arguments"] += piece["function"]["arguments"]
    if message["content"] is None and "tool_calls" not in message:
        message["content"] = ""
    return message


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    calls = message.get("tool_calls", [])
    assert len({each.pop("id") for each in calls}) == len(calls)
    return message


async def test_a_call_is_a_message_of_its_own_kind() -> None:
    async with speaking(WEATHER) as app:
        answer = await whole(app)
    [choice] = answer["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["tool_calls"][0]["id"].startswith("call_")
    assert without_ids(choice["message"]) == {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": '{"city": "Köln"}'}}],
    }
    assert answer["usage"]["completion_tokens"] == len(WEATHER.encode()) + 1


async def test_a_call_is_streamed_as_it_is_written() -> None:
    async with speaking(f"I look.\n{WEATHER}") as app:
        read = await streamed(app, stream_options={"include_usage": True})
    usage, *others = reversed(read)
    assert usage["choices"] == []
    deltas = [chunk["choices"][0]["delta"] for chunk in reversed(others)]
    assert deltas[0] == {"role": "assistant", "content": None}
    texts = [delta["content"] for delta in deltas[1:] if "content" in delta]
    assert "".join(texts) == "I look."
    first, *pieces = [delta["tool_calls"] for delta in deltas if "tool_calls" in delta]
    assert first[0].pop("id").startswith("call_")
    assert first == [{"index": 0, "type": "function", "function": {"name": "weather", "arguments": ""}}]
    assert "".join(piece[0]["function"]["arguments"] for piece in pieces) == '{"city": "Köln"}'
    assert deltas[-1] == {}
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in reversed(others)]
    assert reasons == [None] * (len(reasons) - 1) + ["tool_calls"]


ANSWERS = {
    "one call": (WEATHER, templates.QWEN2, ()),
    "two calls": (f"Let me see.\n{WEATHER}\n{NOW}", templates.QWEN2, ()),
    "text": (TEXT, templates.QWEN2, ()),
    "nothing": ("", templates.QWEN2, ()),
    "an unknown tool": (WEATHER.replace("weather", "future"), templates.QWEN2, ()),
    "no tools in the template": (WEATHER, templates.PLAIN, ()),
    "special tokens": (f"Well. {WEATHER}", templates.QWEN2, ("<tool_call>", "</tool_call>")),
    "llama": ('<|python_tag|>{"name": "weather", "parameters": {"city": "x"}}', templates.LLAMA, ("<|python_tag|>",)),
    "mistral": ('[TOOL_CALLS] [{"name": "now", "arguments": {}}]', templates.MISTRAL_V3, ("[TOOL_CALLS]",)),
    "reasoning": (f"<think>\nHm, <b>.\n</think>\n\n{TEXT}", templates.QWEN3, ()),
    "reasoning and a call": (f"<think>\nHm.\n</think>\n\n{NOW}", templates.QWEN3, ("<think>", "</think>")),
    "reasoning that the prompt begins": (f"Hm.\n</think>\n\n{TEXT}", templates.QWEN3_THINKING, ()),
}


@pytest.mark.parametrize("name", ANSWERS)
async def test_a_stream_adds_up_to_the_whole_answer(name: str) -> None:
    answer, template, special_tokens = ANSWERS[name]
    async with speaking(answer, template=template, special_tokens=special_tokens) as app:
        [choice] = (await whole(app))["choices"]
        read = [chunk["choices"][0] for chunk in await streamed(app)]
        padded = await call(app.asgi, "POST", CHAT, BODY | {"stream": True, "stream_options": OBFUSCATED})
    message = joined([each["delta"] for each in read])
    assert without_ids(message) == without_ids(choice["message"])
    assert read[-1]["finish_reason"] == choice["finish_reason"]
    assert choice["finish_reason"] == ("tool_calls" if "tool_calls" in message else "stop")
    shown = json.dumps(choice["message"])
    assert not any(token in shown for token in special_tokens)
    if "reasoning" in name:
        assert message["reasoning_content"].startswith("Hm")
    [first, *parts, last] = chunks(padded.body)
    assert without_ids(joined([each["choices"][0]["delta"] for each in (first, *parts, last)])) == message
    assert all("obfuscation" in each for each in parts)


OBFUSCATED = {"include_obfuscation": True}


async def test_each_choice_is_read_by_itself() -> None:
    async with speaking(TEXT, WEATHER, f"{NOW}\n{WEATHER}") as app:
        choices = (await whole(app, n=3))["choices"]
        read = [choice for chunk in await streamed(app, n=3) for choice in chunk["choices"]]
    assert [choice["finish_reason"] for choice in choices] == ["stop", "tool_calls", "tool_calls"]
    assert [len(choice["message"].get("tool_calls", ())) for choice in choices] == [0, 1, 2]
    ids = [call["id"] for choice in choices for call in choice["message"].get("tool_calls", ())]
    assert len(set(ids)) == 3
    for index, choice in enumerate(choices):
        own = [each["delta"] for each in read if each["index"] == index]
        assert without_ids(joined(own)) == without_ids(choice["message"])


async def test_a_limit_in_the_middle_of_a_call_leaves_what_there_is_of_it() -> None:
    async with speaking(WEATHER) as app:
        [choice] = (await whole(app, max_tokens=WEATHER.index("Köln")))["choices"]
        [cut] = (await whole(app, max_tokens=14))["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city": "'}
    assert cut["message"] == {"role": "assistant", "content": WEATHER[:14], "refusal": None}


async def test_nothing_is_written_while_all_there_is_may_come_before_a_marker() -> None:
    async with speaking(f"{' ' * 400}{TEXT}") as app, anyio.create_task_group() as tasks:
        request = exchange(app.asgi, "POST", CHAT)
        request.send_body(json.dumps(BODY | {"stream": True}).encode())

        def has_begun() -> bool:
            app.runner.allow(1)
            return any(generation.num_output_tokens > 5 for generation in app.client._generations.values())

        with app.runner.held():
            tasks.start_soon(request.run)
            await app.until(has_begun)
            await anyio.wait_all_tasks_blocked()
            assert request.status == 200
            assert request.body == b""
        await request.done.wait()
    [first, *_] = [m["body"] for m in request.messages if m.get("body")]
    assert first.startswith(b"data: ")
    assert b'"role":"assistant"' in first
    assert b'"content":"     ' in first, "the role travels with the first text that is certain"


@pytest.mark.parametrize("name", ["two calls", "reasoning and a call", "text"])
async def test_log_probabilities_of_all_tokens_come_with_the_chunks(name: str) -> None:
    answer, template, special_tokens = ANSWERS[name]
    async with speaking(answer, template=template, special_tokens=special_tokens) as app:
        [choice] = (await whole(app, logprobs=True, top_logprobs=1))["choices"]
        read = [chunk["choices"][0] for chunk in await streamed(app, logprobs=True, top_logprobs=1)]
    items = [item for each in read if each["logprobs"] for item in each["logprobs"]["content"]]
    assert items == choice["logprobs"]["content"]
    assert b"".join(bytes(item["bytes"]) for item in items).decode() == answer
    assert without_ids(joined([each["delta"] for each in read])) == without_ids(choice["message"])


async def test_usage_can_be_on_every_chunk_of_a_call() -> None:
    async with speaking(f"I look.\n{WEATHER}") as app:
        read = await streamed(app, stream_options={"include_usage": True, "continuous_usage_stats": True})
    counts = [chunk["usage"]["completion_tokens"] for chunk in read]
    assert counts == sorted(counts)
    assert counts[0] == 0
    assert counts[-2:] == [len(WEATHER.encode()) + 9] * 2


async def test_a_conversation_goes_on_with_the_result_of_a_call() -> None:
    async with speaking(WEATHER) as app, client_of(app) as client:
        asked: Any = {"model": "fake", "messages": [QUESTION], "tools": TOOLS}
        said: Any = (await client.chat.completions.create(**asked)).choices[0].message
        [made] = said.tool_calls
        result = {"role": "tool", "tool_call_id": made.id, "content": "Rain."}
        assert isinstance(app.runner, SpeakingRunner)
        app.runner.prompts.clear()
        await client.chat.completions.create(**asked | {"messages": [QUESTION, said, result]})
        [prompt] = app.runner.prompts
    text = bytes(token_id for token_id in prompt if token_id < 256).decode()
    assert text.endswith(
        f"<|im_start|>assistant\n{WEATHER}<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\nRain.\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )


class GetWeather(BaseModel):
    """The weather of a city."""

    city: str


GET_WEATHER = WEATHER.replace('"weather"', '"GetWeather"')


async def test_openais_client_reads_calls_in_strict_mode() -> None:
    asked: dict[str, Any] = {
        "model": "fake",
        "messages": [QUESTION],
        "tools": [pydantic_function_tool(GetWeather)],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
    }
    async with speaking(f"{GET_WEATHER}\n{GET_WEATHER.replace('Köln', 'Ulm')}") as app, client_of(app) as client:
        answer = await client.chat.completions.create(**asked)
        parsed = await client.chat.completions.parse(**asked)
        stream = await client.chat.completions.create(**asked, stream=True)
        read = [chunk.choices[0] async for chunk in stream]
        async with client.chat.completions.stream(**asked) as helper:
            events = [event async for event in helper]
            final = await helper.get_final_completion()
    [first, second] = answer.choices[0].message.tool_calls
    assert [json.loads(each.function.arguments) for each in (first, second)] == [{"city": "Köln"}, {"city": "Ulm"}]
    for choice in (parsed.choices[0], final.choices[0]):
        assert choice.finish_reason == "tool_calls"
        assert [each.function.parsed_arguments for each in choice.message.tool_calls or ()] == [
            GetWeather(city="Köln"),
            GetWeather(city="Ulm"),
        ]
    done = [event for event in events if event.type == "tool_calls.function.arguments.done"]
    assert [(event.index, event.name, event.arguments) for event in done] == [
        (0, "GetWeather", '{"city": "Köln"}'),
        (1, "GetWeather", '{"city": "Ulm"}'),
    ]
    assert [choice.finish_reason for choice in read] == [None] * (len(read) - 1) + ["tool_calls"]


async def test_openais_client_is_told_which_parameter_is_refused() -> None:
    wrong: Any = {"model": "fake", "messages": [QUESTION], "tools": [{"type": "function"}]}
    async with speaking(TEXT) as app, client_of(app) as client:
        with pytest.raises(openai.BadRequestError) as refused:
            await client.chat.completions.create(**wrong)
    assert refused.value.param == "tools[0].function"


@pytest.mark.parametrize(
    ("template", "special_tokens"),
    [
        (templates.QWEN2, ()),
        (templates.QWEN2, ("<tool_call>", "</tool_call>")),
        (templates.LLAMA, ()),
        (templates.MISTRAL_V3, ("[TOOL_CALLS]",)),
        (templates.MISTRAL_V11, ("[TOOL_CALLS]", "[ARGS]")),
        (templates.PLAIN, ()),
    ],
)
@pytest.mark.parametrize("choice", ["required", "named"])
async def test_a_call_that_is_required_comes_and_fits_its_schema(
    template: str, special_tokens: tuple[str, ...], choice: str
) -> None:
    # This model's tokens depend on its prompt alone: whatever it would like to say, the grammar makes calls of it.
    runner = FakeRunner(4096)
    runner.vocab_size = 257 + len(special_tokens)
    async with live_app(runner=runner, tokenizer=byte_tokenizer(template, special_tokens)) as app:
        fields = {"tool_choice": NAMED if choice == "named" else "required", "parallel_tool_calls": False}
        [first, second] = (await whole(app, n=2, max_tokens=300, **fields))["choices"]
        read = [c for chunk in await streamed(app, n=2, max_tokens=300, **fields) for c in chunk["choices"]]
    for each in (first, second):
        assert each["finish_reason"] == "tool_calls", each
        [made] = each["message"]["tool_calls"]
        schema = {"weather": SCHEMA, "now": {"maxProperties": 0}}[made["function"]["name"]]
        jsonschema.validate(json.loads(made["function"]["arguments"]), schema)
        assert each["message"]["content"] is None
        assert choice == "required" or made["function"]["name"] == "weather"
    own = [each["delta"] for each in read if each["index"] == 0]
    assert without_ids(joined(own)) == without_ids(first["message"])


async def test_a_schema_that_cannot_be_kept_to_is_named_where_calls_are_required() -> None:
    bad = {"type": "function", "function": {"name": "bad", "parameters": {"properties": {"a": {"not": {}}}}}}
    large: dict[str, Any] = {"properties": {"a": {"const": 2**60 + 1}}}
    inexact = [{"type": "function", "function": {"name": "inexact", "parameters": large}}]
    async with speaking(TEXT) as app:
        answer = await call(app.asgi, "POST", CHAT, BODY | {"tools": inexact, "tool_choice": "required"})
        assert (answer.status, answer.json()["error"]["param"]) == (400, "tools[0].function.parameters")
        assert '"const"' in answer.json()["error"]["message"]
        for fields, status in (
            ({"tool_choice": "required"}, 400),
            ({"tool_choice": {"type": "function", "function": {"name": "bad"}}}, 400),
            ({"tool_choice": NAMED, "max_tokens": 1}, 200),
            ({"tool_choice": "auto"}, 200),
        ):
            answer = await call(app.asgi, "POST", CHAT, BODY | {"tools": [*TOOLS, bad], **fields})
            assert answer.status == status, answer.body
            if status == 400:
                assert answer.json()["error"]["param"] == "tools[2].function.parameters"
                assert "not" in answer.json()["error"]["message"]


async def test_tools_are_refused_by_name_where_an_answer_is_one_text() -> None:
    async with speaking(f"<think>Hm.</think>{NOW}", template=templates.QWEN3) as app:
        for path, body in (
            ("/v1/completions", {"prompt": "x", "tools": TOOLS}),
            ("/v1/streams", BODY),
            ("/v1/streams", {"prompt": "x", "tools": TOOLS}),
        ):
            error = (await call(app.asgi, "POST", path, body)).json()["error"]
            assert (error["param"], error["code"]) == ("tools", "unsupported_parameter")
        query = "prompt=x&tools=[1]"
        refused = await call(app.asgi, "GET", "/v1/stream", query=query, headers={"accept": "text/event-stream"})
        assert refused.json()["error"]["param"] == "tools"
        created = await call(app.asgi, "POST", "/v1/streams", {"messages": [QUESTION], "tools": []})
        assert created.status == 201
        await app.until(lambda: app.client.num_unfinished == 0)
        snapshot = await call(app.asgi, "GET", created.json()["url"])
    assert snapshot.json()["text"] == f"<think>Hm.</think>{NOW}"
