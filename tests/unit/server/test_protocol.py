"""Bodies: what is refused is refused by name, and nothing but a refusal comes out of a wrong one."""

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from headrace.server.errors import ApiError, BadRequestError, UnsupportedParameterError
from headrace.server.protocol import (
    UNSUPPORTED,
    ChatCompletionRequest,
    CompletionRequest,
    GenerationParams,
    parse_json_object,
    parse_request,
)

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}
COMPLETION: dict[str, Any] = {"prompt": "hi"}
CALL: dict[str, Any] = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
ROUTES: list[tuple[type[GenerationParams], dict[str, Any]]] = [
    (ChatCompletionRequest, CHAT),
    (CompletionRequest, COMPLETION),
]


def refused(cls: type[GenerationParams], fields: dict[str, Any]) -> ApiError:
    error = refusal(cls, fields)
    assert error is not None, "it was accepted"
    assert error.status == 400
    assert error.param is not None
    assert error.param in error.message
    assert error.envelope()["error"]["param"] == error.param
    return error


def refusal(cls: type[GenerationParams], fields: dict[str, Any]) -> ApiError | None:
    """The refusal, None where the body is accepted."""
    try:
        parse_request(cls, fields)
    except ApiError as error:
        return error
    return None


def field_of(error: ApiError) -> str:
    """The top-level field that an error names."""
    assert error.param is not None
    return error.param.partition("[")[0].partition(".")[0]


@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
def test_what_is_not_supported_is_refused_by_name_unless_it_asks_for_nothing(name: str) -> None:
    for cls, fields in ROUTES:
        for asking in ({"a": 1}, ["a"], "something", -1, 2, 0.5, 10**40):
            error = refused(cls, fields | {name: asking})
            assert isinstance(error, UnsupportedParameterError)
            assert error.param == name
        for neutral in (None, *UNSUPPORTED[name]):
            parse_request(cls, fields | {name: neutral})


def test_a_refusal_says_what_does_as_much() -> None:
    message = refused(CompletionRequest, COMPLETION | {"best_of": 3}).message
    assert message == "`best_of` is not supported: ask for `n` answers with `logprobs`, and keep the likeliest"
    assert "`echo` and `logprobs`" in refused(ChatCompletionRequest, CHAT | {"prompt_logprobs": 1}).message


@pytest.mark.parametrize(("name", "value"), [("n", True), ("logprobs", True), ("priority", False), ("echo", 0)])
def test_numbers_and_flags_are_not_taken_for_each_other(name: str, value: Any) -> None:
    assert refused(CompletionRequest, COMPLETION | {name: value}).param == name


COUNTS = ["max_tokens", "min_tokens", "top_k", "seed", "n"]
NUMBERS = ["temperature", "top_p", "min_p", "timeout", "repetition_penalty"]
PENALTIES = ["presence_penalty", "frequency_penalty"]
FLAGS = ["stream", "ignore_eos", "skip_special_tokens", "add_special_tokens", "return_token_ids"]
NAMES = ["model", "user", "cache_salt"]


@pytest.mark.parametrize(
    ("names", "values"),
    [
        (COUNTS, [1.0, 1.5, "1", True, [1], {}, 10**400, -(10**400)]),
        (NUMBERS, ["0.5", True, [0.5], {}, float("inf"), float("nan"), -1, 1e308, 10**400]),
        (PENALTIES, ["0.5", True, [0.5], {}, float("inf"), float("nan"), -2.1, 2.1, 10**400]),
        (["logit_bias"], [5, [], "x", {"a": 1}, {"-1": 1}, {"1.5": 1}, {"²": 1}, {"1": "5"}, {"1": 101}, {"1": True}]),
        (["logit_bias"], [{"1": float("nan")}, {str(i): 1 for i in range(100_000)}, {"9" * 5000: 1}]),
        (FLAGS, [0, 1, "true", [True], {}]),
        (NAMES, [1, True, ["m"], {}, "m" * 513]),
        (["stop"], [5, True, [5], [None], {}, "", [""], ["a"] * 17, "x" * 1001]),
        (["stop_token_ids"], [5, "5", [True], [1.0], ["1"], [-1], [2**31], [0] * 1025]),
        (["stream_options"], [5, [], "x", {}, {"include_usage": True}]),
    ],
    ids=[
        "counts",
        "numbers",
        "penalties",
        "logit_bias",
        "logit_bias_size",
        "flags",
        "names",
        "stop",
        "stop_token_ids",
        "stream_options",
    ],
)
def test_a_value_of_the_wrong_type_or_range_is_refused_by_the_fields_name(names: list[str], values: list[Any]) -> None:
    for cls, fields in ROUTES:
        for name in names:
            for value in values:
                error = refused(cls, fields | {name: value})
                assert error.param is not None
                assert re.split(r"[.\[]", error.param)[0] == name, f"{name}={value!r:.40}"


@pytest.mark.parametrize(
    "prompt",
    [5, True, None, {}, [1.5], [True], [-1], [2**31], [1, "a"], ["a", 1], [["a"]], [[[1]]]],
    ids=lambda value: repr(value),
)
def test_a_prompt_is_text_or_token_ids_or_a_list_of_either(prompt: Any) -> None:
    error = refused(CompletionRequest, {"prompt": prompt})
    assert error.param is not None
    assert error.param.partition("[")[0] == "prompt"


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (5, ""),
        ({"content": "x"}, ".role"),
        ({"role": 5, "content": "x"}, ".role"),
        ({"role": "king", "content": "x"}, ".role"),
        ({"role": "user"}, ".content"),
        ({"role": "user", "content": 5}, ".content"),
        ({"role": "user", "content": [5]}, ".content[0]"),
        ({"role": "user", "content": [{"type": "text"}]}, ".content[0].text"),
        ({"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url"}]}, ".content[1].type"),
        ({"role": "user", "content": [{"type": "text", "text": 5}]}, ".content[0].text"),
        ({"role": "user", "content": [{"type": "text", "refusal": "no"}]}, ".content[0].text"),
        ({"role": "user", "content": [{"type": "refusal", "text": "no"}]}, ".content[0].refusal"),
        ({"role": "user", "content": [{"type": ["text"], "text": "x"}]}, ".content[0].type"),
        ({"role": "user", "content": "x", "prefix": True}, ".prefix"),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_what_is_wrong_in_a_message_is_named_with_its_place(message: Any, field: str) -> None:
    good = {"role": "user", "content": "x"}
    assert refused(ChatCompletionRequest, {"messages": [good, message]}).param == f"messages[1]{field}"


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ({"role": "tool", "content": "x"}, ".tool_call_id"),
        ({"role": "tool", "tool_call_id": "a"}, ".content"),
        ({"role": "user", "content": "x", "tool_calls": [CALL]}, ".tool_calls"),
        ({"role": "assistant", "tool_calls": [5]}, ".tool_calls[0]"),
        ({"role": "assistant", "tool_calls": [CALL, {"id": "x"}]}, ".tool_calls[1].function"),
        ({"role": "assistant", "tool_calls": [CALL | {"type": "custom"}]}, ".tool_calls[0].type"),
        ({"role": "assistant", "tool_calls": [CALL] * 129}, ".tool_calls"),
        ({"role": "assistant", "content": "x", "function_call": {"name": "f"}}, ".function_call"),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_what_is_wrong_in_a_call_or_its_result_is_named_with_its_place(message: Any, field: str) -> None:
    good = {"role": "user", "content": "x"}
    assert refused(ChatCompletionRequest, {"messages": [good, message]}).param == f"messages[1]{field}"


def test_calls_and_results_are_read_where_they_belong_and_null_is_none() -> None:
    messages = [
        {"role": "user", "content": "x", "tool_calls": None, "tool_call_id": None},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "assistant", "tool_calls": [CALL, {"id": "b", "function": CALL["function"], "type": None}]},
        {"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "y"}], "name": "f"},
    ]
    params = parse_request(ChatCompletionRequest, {"messages": messages})
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    assert [message.as_template_input() for message in params.messages] == [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": ""},
        {"role": "assistant", "content": "", "tool_calls": [call, call | {"id": "b"}]},
        {"role": "tool", "content": [{"type": "text", "text": "y"}], "name": "f", "tool_call_id": "a"},
    ]


F, G = ({"type": "function", "function": {"name": name}} for name in "fg")
ALLOWED = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [G]}}


@pytest.mark.parametrize(
    ("choice", "offered", "callable", "must_call"),
    [
        (None, [0, 1], [0, 1], False),
        ("auto", [0, 1], [0, 1], False),
        ("none", [], [], False),
        ("required", [0, 1], [0, 1], True),
        (G, [0, 1], [1], True),
        (ALLOWED, [0, 1], [1], False),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [F]}}, [0, 1], [0], True),
    ],
)
def test_a_tool_choice_says_what_is_shown_what_may_be_called_and_whether_something_must(
    choice: Any, offered: list[int], callable: list[int], must_call: bool
) -> None:
    params = parse_request(ChatCompletionRequest, CHAT | {"tools": [F, G], "tool_choice": choice})
    assert params.tools is not None
    assert params.offered_tools == [params.tools[i] for i in offered]
    assert list(params.callable_tools) == callable
    assert params.must_call == must_call


def test_several_calls_may_be_made_unless_one_is_named_or_several_are_not_wanted() -> None:
    def may(**fields: Any) -> bool:
        return parse_request(ChatCompletionRequest, CHAT | {"tools": [F, G]} | fields).may_call_several

    assert may()
    assert may(parallel_tool_calls=True, tool_choice=ALLOWED)
    assert not may(parallel_tool_calls=False)
    assert not may(tool_choice=G)


def test_of_grammars_only_a_json_schema_goes_with_tools() -> None:
    body = CHAT | {"tools": [F], "guided_regex": "a"}
    for choice in (None, "auto", "required", F):
        assert refused(ChatCompletionRequest, body | {"tool_choice": choice}).param == "guided_regex"
    parse_request(ChatCompletionRequest, body | {"tool_choice": "none"})
    for choice in (None, "auto", "required", F):
        schema = {"response_format": {"type": "json_object"}, "tool_choice": choice}
        parse_request(ChatCompletionRequest, CHAT | {"tools": [F]} | schema)


def test_tools_are_for_chats_alone() -> None:
    assert refused(CompletionRequest, COMPLETION | {"tools": [F]}).param == "tools"
    assert refused(CompletionRequest, COMPLETION | {"tool_choice": "required"}).param == "tool_choice"
    parse_request(CompletionRequest, COMPLETION | {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True})


def test_null_is_absent_everywhere_and_what_is_unknown_is_ignored() -> None:
    for cls, fields in ROUTES:
        nulls: dict[str, Any] = {name: None for name in (*cls.model_fields, *UNSUPPORTED) if name not in fields}
        assert parse_request(cls, fields | nulls) == parse_request(cls, fields)
        unknown = {"surprise": [1], "__class__": 5, "model_config": {}, "prompt_field": "x"}
        assert parse_request(cls, fields | unknown) == parse_request(cls, fields)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"null",
        b"[]",
        b'"text"',
        b"5",
        b"{",
        b'{"a": 1,}',
        b"{'a': 1}",
        b'{"a": 1} {}',
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b'{"a": -Infinity}',
        b'{"a": "\\ud800"}',
        b'{"a": "\\udc00x"}',
        b'{"\\ud800": 1}',
        b'{"a": "\xff"}',
        b'{"a": "\xed\xa0\x80"}',
        b'{"a": "\n"}',
        b"\xef\xbb\xbf{}",
        '{"a": 1}'.encode("utf-16"),
        b'{"a": ' + b"[" * 100_000,
        b'{"a": ' * 100_000 + b"1" + b"}" * 100_000,
        b'{"a": ' + b"9" * 10_000 + b"}",
    ],
    ids=lambda body: repr(body[:24]),
)
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(BadRequestError) as caught:
        parse_json_object(body)
    assert len(caught.value.message) < 200


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("number", ["1e400", "-1e400", "1e308"])
def test_a_number_beyond_a_double_is_refused_where_it_is_read(name: str, number: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        parse_request(CompletionRequest, parse_json_object(f'{{"prompt": "a", "{name}": {number}}}'.encode()))
    assert caught.value.param in (name, None)


@pytest.mark.parametrize("number", ["1e400", "-1E+400", "9" * 400 + ".0", "9" * 250 + "e99"])
def test_a_number_beyond_a_double_is_refused_where_anything_may_be(number: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        parse_json_object(f'{{"tools": [0, {{"a": {{"b": ["1e400", 1e300, {number}]}}}}]}}'.encode())
    assert caught.value.param == "tools[1].a.b[2]"


def test_a_great_many_unknown_keys_are_ignored() -> None:
    body = json.dumps({f"key{i}": i for i in range(200_000)} | COMPLETION).encode()
    assert parse_request(CompletionRequest, parse_json_object(body)) == parse_request(CompletionRequest, COMPLETION)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from(sorted({*ChatCompletionRequest.model_fields, *CompletionRequest.model_fields}))


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.dictionaries(KEYS, VALUES, max_size=4))
def test_any_object_is_accepted_or_refused_with_the_name_of_one_of_its_fields(fields: dict[str, Any]) -> None:
    for cls, required in ROUTES:
        error = refusal(cls, required | fields)
        assert error is None or field_of(error) in fields


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.binary(max_size=40) | st.text(max_size=40).map(lambda text: f'{{"a": {text}}}'.encode(errors="replace")))
def test_any_bytes_are_an_object_or_refused(body: bytes) -> None:
    try:
        parsed = parse_json_object(body)
    except BadRequestError:
        return
    assert parsed == json.loads(body)


def test_an_option_of_the_stream_that_is_no_flag_is_refused_by_name() -> None:
    body = CHAT | {"stream": True, "stream_options": {"include_obfuscation": "yes"}}
    assert refused(ChatCompletionRequest, body).param == "stream_options.include_obfuscation"
    body["stream_options"] = {"include_obfuscation": True}
    parse_request(ChatCompletionRequest, body)


def test_the_item_of_a_prompt_that_is_wrong_is_named() -> None:
    assert refused(CompletionRequest, {"prompt": [1, -1]}).param == "prompt[1]"
    assert refused(CompletionRequest, {"prompt": 5}).param == "prompt"


def test_max_tokens_may_have_its_newer_name_or_both_that_agree() -> None:
    newer = {"max_completion_tokens": 9}
    assert parse_request(ChatCompletionRequest, CHAT | newer).asked_max_tokens == ("max_completion_tokens", 9)
    both = newer | {"max_tokens": 9}
    assert parse_request(ChatCompletionRequest, CHAT | both).asked_max_tokens == ("max_completion_tokens", 9)
    assert refused(ChatCompletionRequest, CHAT | newer | {"max_tokens": 5}).param == "max_tokens"
    assert parse_request(ChatCompletionRequest, CHAT | {"max_tokens": 5}).asked_max_tokens == ("max_tokens", 5)
    assert parse_request(CompletionRequest, COMPLETION).asked_max_tokens == ("max_tokens", None)
    assert CompletionRequest.default_max_tokens == 16
    assert ChatCompletionRequest.default_max_tokens is None


def test_messages_reach_the_template_as_texts_and_parts() -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        {"role": "assistant", "content": None},
    ]
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    params = parse_request(ChatCompletionRequest, {"messages": messages})
    assert [message.as_template_input() for message in params.messages] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": ""},
    ]


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file"])
def test_a_part_that_is_no_text_is_refused_by_its_name(kind: str) -> None:
    parts = [{"type": "text", "text": "x"}, {"type": kind, kind: {"url": "data:,"}}]
    error = refused(ChatCompletionRequest, {"messages": [{"role": "user", "content": parts}]})
    assert error.message == f"messages[0].content[1].type: `{kind}` is not supported, for the model reads text alone"


ANSWERED = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well"}]


def test_the_last_message_is_continued_where_that_is_asked_for() -> None:
    def prompts(*messages: dict[str, Any], **fields: Any) -> tuple[bool, bool]:
        request = parse_request(ChatCompletionRequest, {"messages": messages or ANSWERED, **fields})
        return request.is_continued, request.has_generation_prompt

    assert prompts() == prompts(continue_final_message=False, add_generation_prompt=True) == (False, True)
    assert prompts(add_generation_prompt=False) == (False, False)
    assert prompts(continue_final_message=True) == (True, False)
    assert prompts(continue_final_message=True, add_generation_prompt=False) == (True, False)
    assert prompts(ANSWERED[0], ANSWERED[1] | {"prefix": True}) == (True, False)
    assert prompts(ANSWERED[0], ANSWERED[1] | {"prefix": False}) == (False, True)


@pytest.mark.parametrize(
    ("messages", "fields", "param"),
    [
        (ANSWERED[:1], {"continue_final_message": True}, "continue_final_message"),
        (ANSWERED, {"continue_final_message": True, "add_generation_prompt": True}, "add_generation_prompt"),
        ([ANSWERED[0], ANSWERED[1] | {"prefix": True}], {"add_generation_prompt": True}, "add_generation_prompt"),
        ([ANSWERED[1] | {"prefix": True}, ANSWERED[0]], {}, "messages[0].prefix"),
        ([ANSWERED[0] | {"prefix": True}], {}, "messages[0].prefix"),
        (ANSWERED, {"continue_final_message": "yes"}, "continue_final_message"),
    ],
)
def test_what_cannot_be_continued_is_refused(messages: Any, fields: dict[str, Any], param: str) -> None:
    assert refused(ChatCompletionRequest, {"messages": messages, **fields}).param == param
    assert refused(CompletionRequest, COMPLETION | {"continue_final_message": True}).param == "continue_final_message"


def test_a_templates_variables_are_bounded() -> None:
    def param(variables: Any) -> str | None:
        return refused(ChatCompletionRequest, CHAT | {"chat_template_kwargs": variables}).param

    assert param({str(i): 1 for i in range(65)}) == param({"a": "x" * 2**14}) == param([1]) == "chat_template_kwargs"
    assert param({"messages": []}) == "chat_template_kwargs.messages"
    variables = {"enable_thinking": False, "deep": {"a": [1, None]}}
    request = parse_request(ChatCompletionRequest, CHAT | {"chat_template_kwargs": variables})
    assert request.chat_template_kwargs == variables


def test_stop_is_one_string_or_several() -> None:
    for stop, expected in ((None, ()), ("a", ("a",)), (["a", "b"], ("a", "b")), ([], ())):
        assert parse_request(CompletionRequest, COMPLETION | {"stop": stop}).stop_strings == expected


@pytest.mark.parametrize("value", [5, "x", 0, 1, [True]])
def test_a_chats_logprobs_are_a_flag(value: Any) -> None:
    assert refused(ChatCompletionRequest, CHAT | {"logprobs": value}).param == "logprobs"


@pytest.mark.parametrize("value", [21, -1, 10**40, True, "5", 1.0])
def test_log_probabilities_of_more_than_twenty_tokens_or_of_no_number_are_refused(value: Any) -> None:
    assert refused(ChatCompletionRequest, CHAT | {"logprobs": True, "top_logprobs": value}).param == "top_logprobs"
    assert refused(CompletionRequest, COMPLETION | {"logprobs": value}).param == "logprobs"


def test_each_route_has_its_own_way_to_ask_for_log_probabilities() -> None:
    def chat(**fields: Any) -> int | None:
        return parse_request(ChatCompletionRequest, CHAT | fields).num_logprobs

    assert [chat(), chat(logprobs=False), chat(top_logprobs=0)] == [None] * 3
    assert [chat(logprobs=True), chat(logprobs=True, top_logprobs=5)] == [0, 5]
    assert refused(ChatCompletionRequest, CHAT | {"top_logprobs": 1}).param == "top_logprobs"
    assert refused(ChatCompletionRequest, CHAT | {"echo": True}).param == "echo"
    assert refused(CompletionRequest, COMPLETION | {"top_logprobs": 1}).param == "top_logprobs"
    asked = [parse_request(CompletionRequest, COMPLETION | {"logprobs": value}) for value in (None, False, 0, 3)]
    assert [request.num_logprobs for request in asked] == [None, None, 0, 3]


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        ("", [""]),
        ([1, 2], [[1, 2]]),
        ([], [[]]),
        (["a", "b"], ["a", "b"]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_prompts_are_one_or_several(prompt: Any, prompts: list[Any]) -> None:
    request = parse_request(CompletionRequest, {"prompt": prompt, "n": 3})
    assert (request.prompts, request.num_sequences) == (prompts, 3 * len(prompts))


@pytest.mark.parametrize(("num_prompts", "n"), [(129, 1), (65, 2), (1, 129), (1, 10**9), (2, 10**40)])
def test_too_many_answers_in_one_request_are_refused(num_prompts: int, n: int) -> None:
    assert refused(CompletionRequest, {"prompt": ["a"] * num_prompts, "n": n}).param in ("prompt", "n")
