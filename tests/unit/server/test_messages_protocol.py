"""Anthropic's bodies as chat completions: what becomes of blocks and turns, and how errors name fields."""

import re
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from headrace.server.errors import ApiError, BadRequestError
from headrace.server.messages_protocol import FIELD_NAMES, CountTokensRequest
from headrace.server.protocol import ChatCompletionRequest, renaming, validate

USE = {"type": "tool_use", "id": "c1", "name": "now", "input": {"zone": "UTC"}}
RESULT = {"type": "tool_result", "tool_use_id": "c1", "content": "noon"}


def text(said: str) -> dict[str, Any]:
    return {"type": "text", "text": said}


def chat_of(*turns: tuple[str, Any], **fields: Any) -> ChatCompletionRequest:
    messages = [{"role": role, "content": content} for role, content in turns]
    return validate(CountTokensRequest, {"messages": messages} | fields).as_chat()


def said(request: ChatCompletionRequest) -> list[tuple[str, Any]]:
    """Roles and contents, where there are parts their texts."""
    messages = [message.as_template_input() for message in request.messages]
    contents = (m["content"] if isinstance(m["content"], str) else [p["text"] for p in m["content"]] for m in messages)
    return [(message["role"], content) for message, content in zip(messages, contents, strict=True)]


def test_results_and_texts_of_a_turn_become_messages_in_their_order() -> None:
    request = chat_of(
        ("user", "go"),
        ("assistant", [text("I call."), USE, USE | {"id": "c2"}]),
        (
            "user",
            [RESULT, RESULT | {"tool_use_id": "c2", "content": None, "is_error": True}, text("And"), text(" then?")],
        ),
    )
    assert said(request) == [
        ("user", "go"),
        ("assistant", "I call."),
        ("tool", "noon"),
        ("tool", "Error: "),
        ("user", ["And", " then?"]),
    ]
    calls = request.messages[1].as_template_input()["tool_calls"]
    assert [call["id"] for call in calls] == ["c1", "c2"]
    assert calls[0]["function"] == {"name": "now", "arguments": {"zone": "UTC"}}
    assert [message.tool_call_id for message in request.messages[2:4]] == ["c1", "c2"]


def test_a_turn_without_blocks_is_an_empty_one() -> None:
    assert said(chat_of(("user", []))) == [("user", "")]


def test_system_texts_go_first_and_a_system_turn_stays_where_it_is() -> None:
    request = chat_of(("user", "a"), ("system", [text("s2")]), ("user", "b"), system=[text("s"), text("1")])
    assert said(request) == [("system", ["s", "1"]), ("user", "a"), ("system", "s2"), ("user", "b")]


def test_turns_of_one_role_in_a_row_are_joined_by_an_empty_line_and_results_are_not() -> None:
    request = chat_of(
        ("user", "a"),
        ("user", [text("b")]),
        ("assistant", [text("c"), USE]),
        ("assistant", [USE]),
        ("user", [RESULT] * 2),
    )
    assert said(request) == [
        ("user", ["a", "\n\n", "b"]),
        ("assistant", "c"),
        ("tool", "noon"),
        ("tool", "noon"),
    ]
    assert len(request.messages[1].tool_calls or ()) == 2


def test_thinking_is_told_to_the_template_and_redacted_thinking_to_nobody() -> None:
    thoughts = [{"type": "thinking", "thinking": "Hm", "signature": "x"}, {"type": "redacted_thinking", "data": "x"}]
    request = chat_of(("user", "a"), ("assistant", [*thoughts, text("b")]), ("user", "c"))
    assert request.messages[1].as_template_input() == {"role": "assistant", "content": "b", "reasoning_content": "Hm"}


@pytest.mark.parametrize(
    ("param", "expected"),
    [
        ("max_tokens", "max_tokens"),
        ("tools[3].function.parameters.properties.a", "tools[3].input_schema.properties.a"),
        ("tools[3].function.name", "tools[3].name"),
        ("tools[3].type", "tools[3].type"),
        ("tool_choice.function.name", "tool_choice.name"),
        ("response_format.json_schema.schema", "output_config.format"),
        ("messages[3].tool_calls", "messages"),
    ],
)
def test_errors_of_the_chat_name_the_fields_of_the_message(param: str, expected: str) -> None:
    for message in (f"{param}: is wrong", f"`{param}` is wrong", "it is wrong"):
        with pytest.raises(ApiError) as caught, renaming(FIELD_NAMES):
            raise BadRequestError(message, param=param)
        assert caught.value.param == expected
        assert caught.value.message == message.replace(param, expected)
    with pytest.raises(ApiError, match=re.escape("nobody's fault")), renaming(FIELD_NAMES):
        raise BadRequestError("nobody's fault")


TEXTS = st.sampled_from(["", "a", "\n"])
CONTENTS = TEXTS | st.lists(
    st.builds(text, TEXTS)
    | st.sampled_from([USE, RESULT, RESULT | {"is_error": True}, {"type": "redacted_thinking"}, {"type": "image"}]),
    max_size=3,
)
TURNS = st.builds(
    lambda role, content: {"role": role, "content": content}, st.sampled_from(["user", "assistant", "system"]), CONTENTS
)


def refused_field(fields: dict[str, Any]) -> str | None:
    """The field that is at fault, None where the turns become a chat; each result is then a message."""
    try:
        request = validate(CountTokensRequest, fields).as_chat()
    except ApiError as error:
        return error.param
    roles = [message.role for message in request.messages]
    blocks = [block for turn in fields["messages"] for block in turn["content"] if isinstance(block, dict)]
    assert roles.count("tool") == sum(block["type"] == "tool_result" for block in blocks)
    assert request.is_continued == (roles[-1] == "assistant")
    return None


@settings(max_examples=300, derandomize=True, deadline=None)
@given(turns=st.lists(TURNS, max_size=5), system=st.none() | CONTENTS)
def test_any_turns_become_a_chat_or_are_refused_by_name(turns: list[dict[str, Any]], system: Any) -> None:
    field = refused_field({"messages": turns, "system": system})
    assert field is None or field.startswith(("messages", "system"))
