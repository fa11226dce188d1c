"""What events a response's parts come to, and that none depends on how its text was cut."""

from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from openai.types.responses import Response, ResponseItem, ResponseStreamEvent
from pydantic import TypeAdapter

from headrace.scheduler.messages import FinishReason, TokenLogprobs
from headrace.server.answer_parts import Part, ReasoningPart, TextPart, ToolArgumentsPart, ToolCallPart
from headrace.server.errors import ApiError, EngineFailedError, GrammarTooComplexError
from headrace.server.generation import Generation, Stages
from headrace.server.model_response import ModelResponse
from headrace.server.response_events import Event, ResponseEvents
from headrace.server.responses_protocol import MessageItem, ResponseParams, ResponsesRequest, messages_of
from headrace.server.stream_log import LogEntry, Terminal

EVENT = TypeAdapter[Any](ResponseStreamEvent)
ITEM = TypeAdapter[Any](ResponseItem)
TOOLS = [{"type": "function", "name": "look_up", "parameters": {"type": "object"}}]
ANSWER: tuple[Part, ...] = (
    ReasoningPart("let me"),
    ReasoningPart(" see"),
    TextPart("I look"),
    TextPart(" it up"),
    ToolCallPart(0, "call-0", "look_up"),
    ToolArgumentsPart(0, '{"a":'),
    ToolArgumentsPart(0, "1}"),
    ToolCallPart(1, "call-1", "look_up"),
    ToolArgumentsPart(1, "{}"),
)


class ScriptedParser:
    """Gives parts that are known beforehand: so many for each text, the rest at the end."""

    def __init__(self, parts: Sequence[Part], counts: Iterable[int]) -> None:
        self._parts = list(parts)
        self._counts = iter(counts)

    def push(self, text: str) -> list[Part]:
        return [self._parts.pop(0) for _ in range(next(self._counts))]

    def finish(self) -> list[Part]:
        return self._parts


def response_with(
    *, finish_reason: FinishReason = FinishReason.STOP, error: ApiError | None = None, **fields: Any
) -> ModelResponse:
    asked = ResponsesRequest.model_validate({"input": "hi", **fields})
    items = [MessageItem(role="user", content="hi").as_item("i0")]
    params = asked.as_chat(fields, items)
    generation = Generation("log", 0, 5, Stages(10.0, last_token_s=12.0), None)  # type: ignore[arg-type]
    generation.num_output_tokens = 9
    generation.log.close(Terminal(finish_reason, error))
    return ModelResponse(
        "resp_" + "0" * 32,
        "",
        generation,
        1_700_000_000,
        continues_alone=True,
        unread_since_s=None,
        items=items,
        settings={"model": "fake", **asked.settings(), **params.settings()},
        params=params,
    )


def events_of(
    response: ModelResponse,
    parts: Sequence[Part],
    counts: Sequence[int],
    logprobs: Sequence[tuple[TokenLogprobs, ...]] = (),
) -> list[dict[str, Any]]:
    """All events of an answer whose entries give so many parts each."""
    events = ResponseEvents(response, ScriptedParser(parts, counts), lambda items: [written(item) for item in items])
    found: list[Event] = list(events.begin())
    for i in range(len(counts)):
        found += events.push(LogEntry("x", 1, logprobs[i] if logprobs else ()))
    found += events.finish()
    assert [event.number for event in found] == list(range(events.num_events))
    return [event.fields for event in found]


def written(item: TokenLogprobs) -> dict[str, Any]:
    return {"token": str(item.token_id), "logprob": item.logprob, "bytes": [], "top_logprobs": []}


def accumulated(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The output items as a client puts them together, which is told of each that begins and that ends."""
    items: dict[int, dict[str, Any]] = {}
    ended: set[int] = set()
    for event in events:
        index: int = event.get("output_index", -1)
        match event["type"].removeprefix("response."):
            case "output_item.added":
                assert index == len(items)
                assert set(range(index)) == ended
                items[index] = {**event["item"], "text": ""}
            case "output_text.delta" | "reasoning_text.delta" | "function_call_arguments.delta":
                assert event["item_id"] == items[index]["id"]
                items[index]["text"] += event["delta"]
            case "output_text.done" | "reasoning_text.done":
                assert event["text"] == items[index]["text"]
            case "function_call_arguments.done":
                assert event["arguments"] == items[index]["text"]
            case "output_item.done":
                whole = event["item"]
                said = whole["arguments"] if "arguments" in whole else whole["content"][0]["text"]
                assert (whole["id"], said) == (items[index]["id"], items[index]["text"])
                ended.add(index)
    assert ended == items.keys()
    return [items[index] for index in sorted(items)]


def test_reasoning_text_and_calls_are_items_of_their_own() -> None:
    events = events_of(response_with(tools=TOOLS), ANSWER, [1] * len(ANSWER))
    for event in events:
        EVENT.validate_python(event)
    items = accumulated(events)
    assert [(item["type"], item["text"]) for item in items] == [
        ("reasoning", "let me see"),
        ("message", "I look it up"),
        ("function_call", '{"a":1}'),
        ("function_call", "{}"),
    ]
    final = Response.model_validate(events[-1]["response"])
    assert (final.status, [item.type for item in final.output]) == ("completed", [item["type"] for item in items])
    assert final.usage is not None
    assert final.usage.output_tokens_details.reasoning_tokens == 2
    calls = [item for item in events[-1]["response"]["output"] if item["type"] == "function_call"]
    assert len({call["call_id"] for call in calls}) == 2
    assert all(call["name"] == "look_up" for call in calls)


@pytest.mark.parametrize("counts", [[9], [0, 9], [3, 3, 3], [2, 0, 5], []])
def test_items_do_not_depend_on_where_the_text_was_cut(counts: list[int]) -> None:
    response = response_with(tools=TOOLS)
    one_by_one = events_of(response, ANSWER, [1] * len(ANSWER))
    cut = events_of(response, ANSWER, counts)
    assert cut[-1]["response"]["output"] == one_by_one[-1]["response"]["output"]
    assert events_of(response, ANSWER, counts) == cut


@pytest.mark.parametrize(
    ("reason", "error", "status", "type"),
    [
        (FinishReason.STOP, None, "completed", "response.completed"),
        (FinishReason.LENGTH, None, "incomplete", "response.incomplete"),
        (FinishReason.CANCELLED, None, "cancelled", "response.incomplete"),
        (FinishReason.ERROR, EngineFailedError("it failed"), "failed", "response.failed"),
    ],
)
@pytest.mark.parametrize("num_parts", range(len(ANSWER) + 1))
def test_every_item_ends_however_the_response_does(
    reason: FinishReason, error: ApiError | None, status: str, type: str, num_parts: int
) -> None:
    response = response_with(finish_reason=reason, error=error, tools=TOOLS)
    events = events_of(response, ANSWER[:num_parts], [1] * num_parts)
    accumulated(events)
    final = events[-1]["response"]
    EVENT.validate_python(events[-1])
    assert (events[-1]["type"], final["status"]) == (type, status)
    statuses = [item["status"] for item in final["output"]]
    assert statuses[:-1] == ["completed"] * (len(statuses) - 1)
    if statuses:
        assert statuses[-1] == ("completed" if status == "completed" else "incomplete")
    assert (final["error"] is None) == (error is None)
    assert (final["incomplete_details"] is None) == (status != "incomplete")


def test_a_grammar_at_fault_is_named_as_it_was_asked_for() -> None:
    error = GrammarTooComplexError(
        "response_format.json_schema.schema: is it", param="response_format.json_schema.schema"
    )
    events = events_of(response_with(finish_reason=FinishReason.ERROR, error=error), [], [])
    assert events[-1]["response"]["error"]["message"] == "text.format.schema: is it"


def test_an_answer_without_text_is_an_empty_message() -> None:
    events = events_of(response_with(), [], [0])
    [item] = events[-1]["response"]["output"]
    assert item["content"][0]["text"] == ""
    accumulated(events)


def test_log_probabilities_go_with_the_text_and_only_with_text() -> None:
    def scored(*token_ids: int) -> tuple[TokenLogprobs, ...]:
        return tuple(TokenLogprobs(token_id, -1.0) for token_id in token_ids)

    parts = (ReasoningPart("r"), TextPart("a"), TextPart("b"))
    logprobs = (scored(1), scored(2), scored(3), scored(4), scored(5))
    events = events_of(response_with(), parts, [1, 0, 1, 1, 0], logprobs)
    tokens = [
        [item["token"] for item in event["logprobs"]]
        for event in events
        if "text.delta" in event["type"] and "logprobs" in event
    ]
    assert tokens == [["2", "3"], ["4"], ["5"]]
    message = events[-1]["response"]["output"][-1]
    assert [item["token"] for item in message["content"][0]["logprobs"]] == ["2", "3", "4", "5"]


def test_output_comes_back_as_what_the_assistant_said() -> None:
    events = events_of(response_with(tools=TOOLS), ANSWER, [9])
    output = events[-1]["response"]["output"]
    for item in output:
        ITEM.validate_python(item)
    asked = ResponsesRequest.model_validate(
        {"input": [*output, {"type": "function_call_output", "call_id": "c", "output": "42"}]}
    )
    items = [item.as_item(f"i{i}") for i, item in enumerate(asked.own_items)]
    for item in items:
        ITEM.validate_python(item)
    said, result = messages_of(None, items)
    assert said["role"] == "assistant"
    assert said["reasoning_content"] == "let me see"
    assert [part["text"] for part in said["content"]] == ["I look it up"]
    assert [(call["id"], call["function"]["arguments"]) for call in said["tool_calls"]] == [
        (item["call_id"], item["arguments"]) for item in output[2:]
    ]
    assert result == {"role": "tool", "tool_call_id": "c", "content": "42"}
    ResponseParams.model_validate({"messages": [said, result]})


def test_what_the_assistant_says_twice_are_two_messages() -> None:
    asked = ResponsesRequest.model_validate(
        {
            "input": [
                {"role": "assistant", "content": "a"},
                {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "b"}]},
                {"type": "reasoning", "summary": [], "encrypted_content": "x"},
                {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                {"type": "function_call", "call_id": "d", "name": "f", "arguments": "{}"},
            ]
        }
    )
    messages = messages_of("be kind", [item.as_item(f"i{i}") for i, item in enumerate(asked.own_items)])
    assert [message["role"] for message in messages] == ["system", "assistant", "assistant", "assistant"]
    assert len(messages[-1]["tool_calls"]) == 2


def test_settings_come_back_as_they_were_asked_for() -> None:
    asked: dict[str, Any] = {
        "tools": [{**TOOLS[0], "description": "looks it up", "strict": True}],
        "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "look_up"}]},
        "parallel_tool_calls": False,
        "reasoning": {"effort": "none"},
        "metadata": {"a": "b"},
        "max_output_tokens": 7,
        "max_tool_calls": 3,
        "temperature": 0.5,
        "top_p": 0.5,
        "user": "someone",
        "safety_identifier": "x",
        "prompt_cache_key": "y",
        "service_tier": "auto",
    }
    said = Response.model_validate(response_with(**asked).unfinished([]), strict=True).model_dump(by_alias=True)
    for name in asked.keys() - {"tools", "reasoning", "service_tier"}:
        assert said[name] == asked[name]
    assert said["text"]["format"] == {"type": "text"}
    assert {name: said["tools"][0][name] for name in asked["tools"][0]} == asked["tools"][0]
    assert (said["reasoning"]["effort"], said["service_tier"]) == ("none", "default")
    format = {"type": "json_schema", "name": "answer", "schema": {"type": "object"}, "description": "x", "strict": True}
    said = Response.model_validate(response_with(text={"format": format}).unfinished([])).model_dump(by_alias=True)
    assert said["text"]["format"] == format
