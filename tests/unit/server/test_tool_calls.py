"""A family's format is told by its template, which is rendered as Hugging Face does; grammars hold calls to schemas."""

import json
from typing import Any

import pytest

import chat_templates as templates
from fake_engine import byte_tokenizer
from headrace.scheduler.grammar import GrammarCompiler, GrammarError
from headrace.server.answer_parser import make_parser
from headrace.server.answer_parts import ReasoningPart, TextPart, ToolArgumentsPart, ToolCallPart
from headrace.server.control_tokens import MARK
from headrace.server.errors import BadRequestError
from headrace.server.protocol import ChatCompletionRequest, parse_request
from headrace.server.tokenizer import Tokenizer
from headrace.server.tool_calls import (
    CallStyle,
    call_grammar,
    find_format,
    find_reasoning,
    parameter_schemas,
    template_input,
)

WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "weather", "description": "The weather, é ünï", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now"}},
]
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Köln"}'}}
CONVERSATION: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How is the weather?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "abcdefghi", "content": "Rain."},
    {"role": "user", "content": "And tomorrow?"},
]


def request(messages: list[dict[str, Any]] = CONVERSATION, **fields: Any) -> ChatCompletionRequest:
    return parse_request(ChatCompletionRequest, {"messages": messages, "tools": TOOLS, **fields})


def rendered(tokenizer: Tokenizer, asked: ChatCompletionRequest) -> str:
    return tokenizer.render_chat(*template_input(tokenizer, asked)).replace(MARK, "")


@pytest.mark.parametrize(
    ("template", "style", "is_native"),
    [
        (templates.QWEN2, CallStyle.HERMES, True),
        (templates.QWEN3, CallStyle.HERMES, True),
        (templates.QWEN3_THINKING, CallStyle.HERMES, True),
        (templates.SMOLLM3, CallStyle.HERMES, True),
        (templates.LLAMA, CallStyle.LLAMA, True),
        (templates.MISTRAL_V3, CallStyle.MISTRAL_LIST, True),
        (templates.MISTRAL_V11, CallStyle.MISTRAL_NAMED, True),
        (templates.QWEN3_CODER, CallStyle.HERMES, False),
        (templates.PLAIN, CallStyle.HERMES, False),
        (templates.R1, CallStyle.HERMES, False),
        ("", CallStyle.HERMES, False),
    ],
)
def test_the_format_of_calls_is_told_by_the_template(template: str, style: CallStyle, is_native: bool) -> None:
    assert find_format(template) == (style, is_native)


def test_only_templates_with_reasoning_have_its_markers() -> None:
    assert find_reasoning(templates.QWEN3) == find_reasoning(templates.R1) == ("<think>", "</think>")
    assert find_reasoning(templates.QWEN3.replace("<think>", "[THINK]").replace("</think>", "[/THINK]")) == (
        "[THINK]",
        "[/THINK]",
    )
    assert find_reasoning(templates.QWEN2) is None


@pytest.mark.parametrize("name", ["QWEN2", "QWEN3", "LLAMA", "MISTRAL_V3", "MISTRAL_V11"])
def test_tools_calls_and_results_are_rendered_as_hugging_face_does(name: str) -> None:
    tokenizer = byte_tokenizer(getattr(templates, name))
    theirs = tokenizer._wrapper
    # Arguments are objects there, and parameters are always given.
    call = CALL | {"function": {"name": "weather", "arguments": {"city": "Köln"}}}
    messages = [m | {"tool_calls": [call], "content": ""} if "tool_calls" in m else m for m in CONVERSATION]
    tools = [TOOLS[0], {"type": "function", "function": {"name": "now", "parameters": NO_PARAMETERS}}]
    for shown in (messages, messages[:-1], messages[:2]):
        expected = theirs.apply_chat_template(shown, tools=tools, tokenize=False, add_generation_prompt=True)
        asked = request(CONVERSATION[: len(shown)])
        assert rendered(tokenizer, asked) == expected
        assert "Köln" in expected or len(shown) == 2


NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}


def test_what_a_template_cannot_do_with_tools_is_shown_to_the_model_as_text() -> None:
    assert rendered(byte_tokenizer(templates.PLAIN), request()) == (
        f"<|im_start|>system\nBe brief.\n\n{TOLD}<|im_end|>\n"
        "<|im_start|>user\nHow is the weather?<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
        "<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\nRain.\n</tool_response>\nAnd tomorrow?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    alone = rendered(byte_tokenizer(templates.PLAIN), request([{"role": "user", "content": "Hi"}]))
    assert alone == f"<|im_start|>system\n{TOLD}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


TOLD = """\
You can call functions. Each line here is one: its name, what it does, and the JSON schema of its arguments.
<tools>
{"name": "weather", "description": "The weather, é ünï", "parameters": {"type": "object", "properties": \
{"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"], "additionalProperties": false}}
{"name": "now", "parameters": {"type": "object", "properties": {}}}
</tools>
To call one, write its name and its arguments as JSON between these tags, and nothing behind them:
<tool_call>
{"name": "the function's name", "arguments": {"an argument's name": "its value"}}
</tool_call>
The result comes back between <tool_response> and </tool_response>. Call a function only where it helps."""


def test_several_calls_and_results_stay_in_their_turns_where_a_template_knows_none() -> None:
    second = CALL | {"id": "jklmnopqr"}
    messages = [
        CONVERSATION[1],
        {"role": "assistant", "content": "I look.", "tool_calls": [CALL, second]},
        {"role": "tool", "tool_call_id": "abcdefghi", "content": "Rain."},
        {"role": "tool", "tool_call_id": "jklmnopqr", "content": [{"type": "text", "text": "Sun."}]},
    ]
    shown, told = template_input(byte_tokenizer(templates.PLAIN), request(messages, tool_choice="none"))
    assert told == []
    assert [message["role"] for message in shown] == ["user", "assistant", "user"]
    assert shown[1]["content"].startswith("I look.\n<tool_call>")
    assert shown[1]["content"].count("<tool_call>") == 2
    assert shown[2]["content"] == ("<tool_response>\nRain.\n</tool_response>\n<tool_response>\nSun.\n</tool_response>")


def test_tools_that_may_not_be_called_at_all_are_not_shown() -> None:
    for template in (templates.QWEN2, templates.PLAIN):
        assert "ünï" not in rendered(byte_tokenizer(template), request(tool_choice="none"))
    assert "ünï" in rendered(byte_tokenizer(templates.SMOLLM3), request())


def test_a_named_template_for_tools_is_used_with_them() -> None:
    tokenizer = byte_tokenizer({"default": templates.PLAIN, "tool_use": templates.QWEN2})
    assert "<tools>" in rendered(tokenizer, request())
    assert find_format(tokenizer.chat_template(has_tools=True)).is_native
    assert "<tools>" not in rendered(tokenizer, request([CONVERSATION[1]], tools=None))


def test_ids_that_mistrals_templates_would_refuse_are_replaced_alike_in_call_and_result() -> None:
    messages = json.loads(json.dumps(CONVERSATION).replace("abcdefghi", "call_0123456789"))
    shown, _ = template_input(byte_tokenizer(templates.MISTRAL_V3), request(messages))
    [call] = shown[2]["tool_calls"]
    assert call["id"] == shown[3]["tool_call_id"]
    assert len(call["id"]) == 9
    assert "call_0123456789" not in rendered(byte_tokenizer(templates.MISTRAL_V3), request(messages))


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [('{"a": 1}', {"a": 1}), ("", {}), ('{"a": ', '{"a": '), ("[1]", "[1]"), ("[" * 9999, "[" * 9999)],
    ids=lambda value: repr(value)[:20],
)
def test_arguments_reach_a_template_as_an_object_where_they_are_one(arguments: str, shown: Any) -> None:
    call = CALL | {"function": {"name": "weather", "arguments": arguments}}
    asked = request([CONVERSATION[1], {"role": "assistant", "tool_calls": [call]}])
    assert asked.messages[1].as_template_input()["tool_calls"][0]["function"]["arguments"] == shown


def test_earlier_reasoning_reaches_the_template() -> None:
    messages = [CONVERSATION[1], {"role": "assistant", "content": "x", "reasoning_content": "Hm."}, CONVERSATION[1]]
    assert "<think>\nHm.\n</think>" in rendered(byte_tokenizer(templates.QWEN3), request(messages))


# (Template, special tokens, an answer of one call, what stands between two)
FORMATS = {
    "hermes": (templates.QWEN2, (), '<tool_call>\n{"name": "@name", "arguments": @arguments}\n</tool_call>', "\n"),
    "special hermes": (
        templates.QWEN2,
        ("<tool_call>", "</tool_call>"),
        '<tool_call>\n{"name": "@name", "arguments": @arguments}\n</tool_call>',
        "\n",
    ),
    "fallback": (templates.PLAIN, (), '<tool_call>\n{"name": "@name", "arguments": @arguments}\n</tool_call>', "\n"),
    "llama": (templates.LLAMA, ("<|python_tag|>",), '{"name": "@name", "parameters": @arguments}', "; "),
    "named mistral": (templates.MISTRAL_V11, ("[TOOL_CALLS]", "[ARGS]"), "[TOOL_CALLS]@name[ARGS]@arguments", ""),
}
VOCAB_SIZE = 262


class Judge:
    """A model's grammar of calls, asked about whole answers."""

    def __init__(self, tokenizer: Tokenizer, asked: ChatCompletionRequest, *, has_begun: bool = False) -> None:
        self._tokenizer = tokenizer
        source = call_grammar(tokenizer, asked, begins_in_reasoning=has_begun)
        compiler = tokenizer.grammar_compiler(VOCAB_SIZE)
        try:
            self._matcher = compiler.compile(source.kind, source.text).matcher
        finally:
            compiler.close()

    def accepts(self, text: str) -> bool:
        token_ids = self._tokenizer.encode(text, add_special_tokens=False)
        matcher = self._matcher.deep_copy()
        return matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting()


def answer(name: str, tool: str, arguments: str) -> str:
    return FORMATS[name][2].replace("@name", tool).replace("@arguments", arguments)


@pytest.mark.parametrize("name", FORMATS)
def test_a_grammar_lets_through_calls_that_fit_their_schema_and_the_parser_reads_them(name: str) -> None:
    template, special_tokens, _, separator = FORMATS[name]
    tokenizer = byte_tokenizer(template, special_tokens)
    asked = request(tool_choice="required")
    judge = Judge(tokenizer, asked)
    weather, now = answer(name, "weather", '{"city": "Köln \\"x\\"", "days": 3}'), answer(name, "now", "{}")
    assert all(map(judge.accepts, (weather, now, weather + separator + now)))
    for wrong in (
        "",
        "Hello",
        f"Hello {now}",
        f"{now} Hello",
        now[:-2],
        answer(name, "later", "{}"),
        answer(name, "weather", "{}"),
        answer(name, "weather", '{"city": 5}'),
        answer(name, "weather", '{"city": "x", "more": 1}'),
        answer(name, "now", '{"city": "x"}'),
        answer(name, "now", "{" + " " * 200),
    ):
        assert not judge.accepts(wrong), wrong
    parts = make_parser(tokenizer, asked).push(weather + separator + now)
    assert [part.name for part in parts if isinstance(part, ToolCallPart)] == ["weather", "now"]
    arguments = "".join(part.text for part in parts if isinstance(part, ToolArgumentsPart) and part.index == 0)
    assert json.loads(arguments) == {"city": 'Köln "x"', "days": 3}


def test_a_grammar_of_mistrals_lists() -> None:
    tokenizer = byte_tokenizer(templates.MISTRAL_V3, ("[TOOL_CALLS]",))
    several, one = Judge(tokenizer, request(tool_choice="required")), Judge(tokenizer, request(tool_choice=NAMED))
    now, weather = '{"name": "now", "arguments": {}}', '{"name": "weather", "arguments": {"city": "x"}}'
    for space in ("", " "):
        assert several.accepts(f"[TOOL_CALLS]{space}[{now}, {weather}]")
        assert one.accepts(f"[TOOL_CALLS]{space}[{weather}]")
    for wrong in (f"[{now}]", "[TOOL_CALLS][]", f"[TOOL_CALLS][{now}", f"[TOOL_CALLS][{now}]{now}"):
        assert not several.accepts(wrong), wrong
    for wrong in (f"[TOOL_CALLS][{now}]", f"[TOOL_CALLS][{weather}, {weather}]"):
        assert not one.accepts(wrong), wrong


NAMED = {"type": "function", "function": {"name": "weather"}}


@pytest.mark.parametrize("name", FORMATS)
def test_a_grammar_has_but_the_calls_that_were_asked_for(name: str) -> None:
    template, special_tokens, _, separator = FORMATS[name]
    tokenizer = byte_tokenizer(template, special_tokens)
    weather, now = answer(name, "weather", '{"city": "x"}'), answer(name, "now", "{}")
    named, single = Judge(tokenizer, request(tool_choice=NAMED)), Judge(tokenizer, request(**ONE_CALL))
    assert named.accepts(weather)
    assert not named.accepts(now)
    assert not named.accepts(weather + separator + weather)
    assert single.accepts(now)
    assert not single.accepts(now + separator + now)
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NAMED]}}
    only = Judge(tokenizer, request(tool_choice=allowed))
    assert only.accepts(weather + separator + weather)
    assert not only.accepts(now)


@pytest.mark.parametrize("name", FORMATS)
def test_beside_a_json_schema_an_answer_is_calls_or_fulfils_it(name: str) -> None:
    template, special_tokens, _, separator = FORMATS[name]
    tokenizer = byte_tokenizer(template, special_tokens)
    schema = {"properties": {"dry": {"type": "boolean"}}, "required": ["dry"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object", **schema}}}
    asked = request(response_format=form)
    judge = Judge(tokenizer, asked)
    weather, now = answer(name, "weather", '{"city": "x"}'), answer(name, "now", "{}")
    assert all(map(judge.accepts, (weather + separator + now, '{"dry": true}')))
    for wrong in ("", "Dry.", '{"dry": 1}', "{}", f'{{"dry": true}} {now}', answer(name, "later", "{}")):
        assert not judge.accepts(wrong), wrong
    parser = make_parser(tokenizer, asked)
    parts = [*parser.push('{"dry": true}'), *parser.finish()]
    assert "".join(part.text for part in parts if isinstance(part, TextPart)) == '{"dry": true}'
    assert not Judge(tokenizer, request(response_format=form, tool_choice="required")).accepts('{"dry": true}')


ONE_CALL: dict[str, Any] = {"tool_choice": "required", "parallel_tool_calls": False}


@pytest.mark.parametrize("special_tokens", [(), ("<think>", "</think>")], ids=["text", "special"])
def test_a_model_that_reasons_may_do_so_before_its_call(special_tokens: tuple[str, ...]) -> None:
    tokenizer = byte_tokenizer(templates.QWEN3, special_tokens)
    call = answer("hermes", "now", "{}")
    judge = Judge(tokenizer, request(tool_choice="required"))
    assert judge.accepts(call)
    assert judge.accepts(f"<think>\nHm </thin <b>.\n</think>\n\n{call}")
    assert not judge.accepts(f"Hm.\n</think>\n\n{call}")
    assert not judge.accepts(f"<think>Hm. {call}")
    begun = Judge(tokenizer, request(tool_choice="required"), has_begun=True)
    assert begun.accepts(f"Hm.\n</think>\n\n{call}")
    assert not begun.accepts(call)
    [first, *_] = make_parser(tokenizer, request(), begins_in_reasoning=True).push(f"Hm.\n</think>\n\n{call}")
    assert first == ReasoningPart("Hm.")


def test_a_schema_is_a_grammar_whatever_its_texts_hold() -> None:
    function = {"name": "f", "description": '"', "parameters": {"description": '::= /x/ """ \n <[5]> %json', **WEATHER}}
    asked = request(tools=[{"type": "function", "function": function}], tool_choice="required")
    assert Judge(byte_tokenizer(templates.QWEN2), asked).accepts(answer("hermes", "f", '{"city": "x"}'))


def test_a_schemas_own_definitions_are_found() -> None:
    schema = {
        "properties": {"place": {"$ref": "#/$defs/place"}},
        "required": ["place"],
        "additionalProperties": False,
        "$defs": {"place": {"enum": ["here", "there"]}},
    }
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    judge = Judge(byte_tokenizer(templates.QWEN2), request(tools=[TOOLS[0], tool], tool_choice="required"))
    assert judge.accepts(answer("hermes", "f", '{"place": "here"}'))
    assert not judge.accepts(answer("hermes", "f", '{"place": "nowhere"}'))


def test_schemas_are_named_by_their_places() -> None:
    bad = {"type": "function", "function": {"name": "bad", "parameters": {"properties": {"a": {"not": {}}}}}}
    first, second = parameter_schemas(request(tools=[TOOLS[0], bad], tool_choice="required"))
    assert (first.field, second.field) == ("tools[0].function.parameters", "tools[1].function.parameters")
    named = {"type": "function", "function": {"name": "bad"}}
    [only] = parameter_schemas(request(tools=[TOOLS[0], bad], tool_choice=named))
    assert only.field == "tools[1].function.parameters"
    compiler = GrammarCompiler(byte_tokenizer()._backend.to_str(), VOCAB_SIZE, frozenset({256}))
    with pytest.raises(GrammarError, match="not"):
        compiler.compile(only.kind, only.text)
    compiler.close()


def test_schemas_too_large_for_a_grammar_are_refused() -> None:
    large = {"type": "function", "function": {"name": "f", "parameters": {"description": "x" * 200_000}}}
    with pytest.raises(BadRequestError) as refused:
        call_grammar(byte_tokenizer(), request(tools=[large], tool_choice="required"), begins_in_reasoning=False)
    assert refused.value.param == "tools"
