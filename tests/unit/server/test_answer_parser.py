"""What an answer is taken apart into does not depend on where it is cut, and nothing of it is lost or thrown."""

import json
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

import chat_templates as templates
from fake_engine import byte_tokenizer
from headrace.server.answer_parser import begins_in_reasoning, is_only_text, kept_token_ids, make_parser
from headrace.server.answer_parts import Part, ReasoningPart, TextPart, ToolArgumentsPart, ToolCallPart
from headrace.server.detokenizer import Detokenizer
from headrace.server.protocol import ChatCompletionRequest, parse_request
from headrace.server.tokenizer import Tokenizer

MISTRAL_TOKENS = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")
HERMES_TOKENS = ("<tool_call>", "</tool_call>")
TOKENIZERS: dict[str, Tokenizer] = {
    "hermes": byte_tokenizer(templates.QWEN2),
    "special hermes": byte_tokenizer(templates.QWEN2, HERMES_TOKENS),
    "fallback": byte_tokenizer(templates.PLAIN),
    "llama": byte_tokenizer(templates.LLAMA),
    "special llama": byte_tokenizer(templates.LLAMA, ("<|python_tag|>",)),
    "mistral": byte_tokenizer(templates.MISTRAL_V3, MISTRAL_TOKENS),
    "named mistral": byte_tokenizer(templates.MISTRAL_V11, MISTRAL_TOKENS),
    "reasoning": byte_tokenizer(templates.QWEN3),
    "special reasoning": byte_tokenizer(templates.QWEN3, ("<think>", "</think>", *HERMES_TOKENS)),
    "begun": byte_tokenizer(templates.R1),
}


def request(*tools: str, **fields: Any) -> ChatCompletionRequest:
    offered = [{"type": "function", "function": {"name": name}} for name in tools]
    return parse_request(
        ChatCompletionRequest, {"messages": [{"role": "user", "content": "x"}], "tools": offered, **fields}
    )


ASKED = request("f", "g")
Read = list[tuple[str, ...]]


def summary(parts: Iterable[Part]) -> Read:
    """Parts without where they were cut: ("text", ...), ("reasoning", ...), ("call", name, arguments)."""
    read: Read = []
    ids = set()
    for part in parts:
        match part:
            case TextPart(text):
                kind = "text"
            case ReasoningPart(text):
                kind = "reasoning"
            case ToolCallPart(index, id, name):
                assert index == len([each for each in read if each[0] == "call"])
                assert id not in ids
                ids.add(id)
                read.append(("call", name, ""))
                continue
            case ToolArgumentsPart(index, text):
                assert index == len([each for each in read if each[0] == "call"]) - 1
                assert read[-1][0] == "call", "arguments follow their call"
                read[-1] = (*read[-1][:2], read[-1][2] + text)
                continue
        assert text, "an empty part"
        if read and read[-1][0] == kind:
            text = read.pop()[1] + text
        read.append((kind, text))
    return read


def read(name: str, pieces: Iterable[str], asked: ChatCompletionRequest = ASKED, *, has_begun: bool = False) -> Read:
    parser = make_parser(TOKENIZERS[name], asked, begins_in_reasoning=has_begun)
    return summary([*(part for piece in pieces for part in parser.push(piece)), *parser.finish()])


def read_any_way(name: str, text: str, asked: ChatCompletionRequest = ASKED, *, has_begun: bool = False) -> Read:
    """The same however it is cut: in two anywhere, in characters, in threes."""
    whole = read(name, [text], asked, has_begun=has_begun)
    for at in range(1, len(text)):
        assert read(name, [text[:at], text[at:]], asked, has_begun=has_begun) == whole, f"cut at {at}"
    for length in (1, 3):
        pieces = [text[at : at + length] for at in range(0, len(text), length)]
        assert read(name, pieces, asked, has_begun=has_begun) == whole, f"in pieces of {length}"
    return whole


HARD = '{"a": "x}\\"</tool_call>{[", "b": [1, {"c": null}], "d": "\\\\"}'


@pytest.mark.parametrize("name", ["hermes", "special hermes", "fallback"])
@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>', [("call", "f", "{}")]),
        ('<tool_call>{"name":"f","arguments":{"a":1}}</tool_call>', [("call", "f", '{"a":1}')]),
        (
            f'Let me see.\n<tool_call>\n{{"name": "f", "arguments": {HARD}}}\n</tool_call>\n',
            [("text", "Let me see."), ("call", "f", HARD)],
        ),
        (
            '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>\n<tool_call>\n'
            '{"name": "g", "arguments": {}}\n</tool_call>\n\nDone. ',
            [("call", "f", '{"a": 1}'), ("call", "g", "{}"), ("text", "Done. ")],
        ),
        # Fields in another order, without arguments, with arguments as text, and with more fields.
        ('<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', [("call", "f", '{"a": 1}')]),
        ('<tool_call>{"name": "f"}</tool_call>', [("call", "f", "{}")]),
        ('<tool_call>{"name": "f", "arguments": null}', [("call", "f", "{}")]),
        ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}', [("call", "f", '{"a": 1}')]),
        ('<tool_call>{"name": "f", "arguments": {}, "id": "}"}</tool_call>ok', [("call", "f", "{}"), ("text", "ok")]),
        # Cut by a limit, or never closed.
        ('<tool_call>{"name": "f", "arguments": {"a": "x\\', [("call", "f", '{"a": "x\\')]),
        ('<tool_call>{"name": "f", "arguments": {"a": 1</tool_call> ok', [("call", "f", '{"a": 1'), ("text", "ok")]),
        ('<tool_call>{"name": "f", "arguments": {}', [("call", "f", "{}")]),
        ("Hello <b>there</b>. \n", [("text", "Hello <b>there</b>. \n")]),
        (" \n ", [("text", " \n ")]),
        ("a <tool_cal", [("text", "a <tool_cal")]),
    ],
    ids=lambda value: repr(value)[:50] if isinstance(value, str) else "",
)
def test_calls_in_hermes_format(name: str, text: str, parts: Read) -> None:
    assert read_any_way(name, text) == parts


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>\n{"name": "unknown", "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": 5}\n</tool_call> and on',
        '<tool_call>\n{"name": 5, "arguments": {}}\n</tool_call>',
        '<tool_call>{"name": "f", arguments: {}}</tool_call>',
        '<tool_call>{"name": "f", "argu',
        '<tool_call>{"city": "Paris"}</tool_call>',
        "a \n <tool_call> none \n</tool_call> b",
        "<tool_call>",
        "<tool_call></tool_call>",
    ],
)
def test_what_is_no_call_of_a_given_tool_stays_text_but_for_special_tokens(text: str) -> None:
    assert read_any_way("hermes", text) == [("text", text)]
    shown = text.replace("<tool_call>", "").replace("</tool_call>", "")
    assert read_any_way("special hermes", text) == ([("text", shown)] if shown else [])


@pytest.mark.parametrize("name", ["llama", "special llama"])
@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('{"name": "f", "parameters": {"a": 1}}', [("call", "f", '{"a": 1}')]),
        ('\n<|python_tag|>{"name": "f", "parameters": {}}', [("call", "f", "{}")]),
        (
            f'{{"name": "f", "parameters": {HARD}}}; {{"name": "g", "parameters": {{}}}}',
            [("call", "f", HARD), ("call", "g", "{}")],
        ),
        ('{"type": "function", "name": "f", "parameters": {}}', [("call", "f", "{}")]),
        ('{"type": "function", "function": "f", "parameters": {}}', [("call", "f", "{}")]),
        ('{"name": "f", "parameters": {}} I called.', [("call", "f", "{}"), ("text", "I called.")]),
        ('Wait.<|python_tag|>{"name": "f", "parameters": {}}', [("text", "Wait."), ("call", "f", "{}")]),
        ('The answer is {"name": "f", "parameters": {}}', [("text", 'The answer is {"name": "f", "parameters": {}}')]),
        ('{"city": "Paris", "name": "f"}', [("text", '{"city": "Paris", "name": "f"}')]),
        ('{"name": "Paris", "parameters": {}} x', [("text", '{"name": "Paris", "parameters": {}} x')]),
        ('{"name": "f", "parameters": [1]}', [("text", '{"name": "f", "parameters": [1]}')]),
        (" Hello", [("text", " Hello")]),
        ("", []),
    ],
    ids=lambda value: repr(value)[:50] if isinstance(value, str) else "",
)
def test_calls_in_llamas_format(name: str, text: str, parts: Read) -> None:
    assert read_any_way(name, text) == parts


def test_python_behind_llamas_tag_is_text() -> None:
    assert read_any_way("llama", "<|python_tag|>print(5)") == [("text", "<|python_tag|>print(5)")]
    assert read_any_way("special llama", "<|python_tag|>print(5)") == [("text", "print(5)")]


@pytest.mark.parametrize("name", ["mistral", "named mistral"])
@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}]', [("call", "f", '{"a": 1}')]),
        (
            f'[TOOL_CALLS][{{"name": "f", "arguments": {HARD}}}, {{"name": "g", "arguments": {{}}, "id": "abcdefgh"}}]',
            [("call", "f", HARD), ("call", "g", "{}")],
        ),
        ('So:\n[TOOL_CALLS]f[ARGS]{"a": 1}', [("text", "So:"), ("call", "f", '{"a": 1}')]),
        ('[TOOL_CALLS]f{"a": 1}', [("call", "f", '{"a": 1}')]),
        ("[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{}[TOOL_CALLS]g[ARGS] {}", [("call", "f", "{}"), ("call", "g", "{}")]),
        ("[TOOL_CALLS]h[ARGS]{}", [("text", "h{}")]),
        ("[TOOL_CALLS] [1, 2]", [("text", " [1, 2]")]),
        (
            '[TOOL_CALLS][{"name": "f", "arguments": {}}, {"name": "h"}]',
            [("call", "f", "{}"), ("text", ', {"name": "h"}]')],
        ),
        ("[TOOL_CALLS]f[ARGS]5", [("text", "f5")]),
    ],
    ids=lambda value: repr(value)[:50] if isinstance(value, str) else "",
)
def test_calls_in_mistrals_formats(name: str, text: str, parts: Read) -> None:
    assert read_any_way(name, text) == parts


CALL = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'


@pytest.mark.parametrize("name", ["reasoning", "special reasoning"])
@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("<think>\nHm, a < b.\n</think>\n\nYes. ", [("reasoning", "Hm, a < b."), ("text", "Yes. ")]),
        (f"<think>\nHm.\n</think>\n\n{CALL}", [("reasoning", "Hm."), ("call", "f", "{}")]),
        (f"<think>\n\n</think>\n\nWell.\n{CALL}", [("text", "Well."), ("call", "f", "{}")]),
        (f"<think>I could write {CALL}.</think>No.", [("reasoning", f"I could write {CALL}."), ("text", "No.")]),
        ("<think>Hm, cut", [("reasoning", "Hm, cut")]),
        ("\nNo thought.", [("text", "\nNo thought.")]),
    ],
    ids=lambda value: repr(value)[:50] if isinstance(value, str) else "",
)
def test_reasoning_is_apart_from_the_answer(name: str, text: str, parts: Read) -> None:
    if name == "special reasoning":  # where such tokens are no text anywhere
        parts = [
            (kind, text.replace("<tool_call>", "").replace("</tool_call>", ""))
            if kind == "reasoning"
            else (kind, text, *more)
            for kind, text, *more in parts
        ]
    assert read_any_way(name, text) == parts


def test_an_answer_whose_prompt_has_begun_the_reasoning_begins_in_it() -> None:
    text = "Hm.\n</think>\n\nYes."
    parts = [("reasoning", "Hm."), ("text", "Yes.")]
    assert read_any_way("begun", text, request(), has_begun=True) == parts
    assert read_any_way("begun", f"<think>\n{text}", request(), has_begun=True) == parts
    assert read_any_way("begun", "cut </thi", request(), has_begun=True) == [("reasoning", "cut </thi")]


@pytest.mark.parametrize(
    ("template", "has_begun"),
    [
        (templates.R1, True),
        (templates.QWEN3_THINKING, True),
        (templates.QWEN3, False),
        (templates.QWEN2, False),
        (templates.QWEN2.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}"), False),
        (templates.QWEN3 + "<think>\n\n</think>\n\n", False),
    ],
)
def test_whether_reasoning_has_begun_is_seen_at_the_prompts_end(template: str, has_begun: bool) -> None:
    tokenizer = byte_tokenizer(template)
    prompt = tokenizer.render_chat([{"role": "user", "content": "x"}])
    assert begins_in_reasoning(tokenizer, tokenizer.encode(prompt, add_special_tokens=False)) == has_begun


def test_without_tools_or_reasoning_text_passes_as_it_comes() -> None:
    for asked in (request(), request("f", tool_choice="none")):
        assert is_only_text(TOKENIZERS["hermes"], asked)
        parser = make_parser(TOKENIZERS["hermes"], asked)
        assert parser.push(f" {CALL} ") == [TextPart(f" {CALL} ")]
        assert parser.push("") == parser.finish() == []
    assert not is_only_text(TOKENIZERS["reasoning"], request())
    assert not is_only_text(TOKENIZERS["hermes"], ASKED)


def test_text_is_held_back_only_as_long_as_it_may_be_a_marker() -> None:
    parser = make_parser(TOKENIZERS["hermes"], ASKED)
    assert parser.push("Hello") == [TextPart("Hello")]
    assert parser.push(" <") == []
    assert parser.push("b>") == [TextPart(" <b>")]
    assert parser.push("\n<tool_call") == []
    assert parser.push('>{"name": "f", "argum') == []
    [call, arguments] = parser.push('ents": {"a"')
    assert isinstance(call, ToolCallPart)
    assert arguments == ToolArgumentsPart(0, '{"a"')
    assert parser.push(": 1") == [ToolArgumentsPart(0, ": 1")]


def test_json_that_is_no_call_is_not_held_back_to_its_end() -> None:
    parser = make_parser(TOKENIZERS["llama"], ASKED)
    assert parser.push('{"city"') == [TextPart('{"city"')]


def test_of_two_calls_only_one_is_taken_where_one_is_asked_for() -> None:
    text = f"A.{CALL}\n{CALL.replace('f', 'g')} B."
    one = [("text", "A."), ("call", "f", "{}")]
    named = {"type": "function", "function": {"name": "f"}}
    assert read_any_way("hermes", text, request("f", "g", parallel_tool_calls=False)) == one
    assert read_any_way("hermes", text.replace("g", "f"), request("f", "g", tool_choice=named)) == one
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [named]}}
    [*_, last] = read_any_way("hermes", text, request("f", "g", tool_choice=allowed))
    assert last[0] == "text", "a tool that may not be called"
    assert '"g"' in last[1]


def test_ids_have_the_form_of_their_family() -> None:
    def id_of(name: str, text: str) -> str:
        [call] = [part for part in make_parser(TOKENIZERS[name], ASKED).push(text) if isinstance(part, ToolCallPart)]
        return call.id

    assert id_of("hermes", CALL).startswith("call_")
    assert len(id_of("hermes", CALL)) == 29
    assert len(id_of("mistral", "[TOOL_CALLS]f[ARGS]{}")) == 9
    assert id_of("mistral", "[TOOL_CALLS]f[ARGS]{}").isalnum()


FRAGMENTS = {
    "hermes": ["<tool_call>", "</tool_call>", "\n", " "],
    "special hermes": ["<tool_call>", "</tool_call>", "\n", "<"],
    "llama": ["<|python_tag|>", ";", " ", "<|"],
    "mistral": ["[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "[", "]", ",", "f"],
    "special reasoning": ["<think>", "</think>", "\n\n", "<tool_call>", "</tool_call>"],
}
OBJECTS = [
    '{"name": "f", "arguments": {"a": [1, "}"]}}',
    '{"name": "g", "parameters": {}}',
    '{"name": "h", "arguments": {}}',
    '{"arguments": {"b": "\\u00e9\\""}, "name": "f"}',
    '{"name": "f"',
    '"arguments": {"a": "\\',
    "}",
    "{",
    '"',
    "text",
    "é🌊",
]


@pytest.mark.parametrize("name", FRAGMENTS)
@settings(max_examples=150, derandomize=True, deadline=None)
@given(st.data())
def test_any_answer_cut_anywhere_comes_to_the_same_parts(name: str, data: st.DataObject) -> None:
    text = "".join(data.draw(st.lists(st.sampled_from(FRAGMENTS[name] * 2 + OBJECTS), max_size=12)))
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=12)))
    whole = read(name, [text])
    assert read(name, [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]) == whole
    if not name.startswith("special") and not any(kind == "call" for kind, *_ in whole) and name != "mistral":
        assert "".join(part[1] for part in whole) == text
    for kind, *rest in whole:
        if kind == "call":
            assert rest[0] in ("f", "g")
        elif name.startswith("special"):
            assert not any(marker in rest[0] for marker in HERMES_TOKENS)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
)


@settings(max_examples=100, derandomize=True, deadline=None)
@given(VALUES, st.integers(1, 7))
def test_arguments_come_out_as_the_json_that_was_written(value: Any, length: int) -> None:
    arguments = json.dumps({"value": value}, ensure_ascii=False)
    text = f'<tool_call>\n{{"name": "f", "arguments": {arguments}}}\n</tool_call>'
    pieces = [text[at : at + length] for at in range(0, len(text), length)]
    assert read("hermes", pieces) == [("call", "f", arguments)]


@pytest.mark.parametrize(
    ("name", "kept"),
    [("hermes", 0), ("special hermes", 2), ("special llama", 1), ("mistral", 3), ("special reasoning", 4)],
)
def test_special_tokens_that_are_markers_reach_the_parser(name: str, kept: int) -> None:
    tokenizer = TOKENIZERS[name]
    token_ids = kept_token_ids(tokenizer, ASKED)
    assert len(token_ids) == kept
    detokenizer = Detokenizer(tokenizer, (), kept_token_ids=token_ids)
    text = "é<|end|>".join(tokenizer.decode([token_id], skip_special_tokens=False) for token_id in token_ids)
    pieces = map(detokenizer.push, tokenizer.encode(text, add_special_tokens=False))
    assert "".join([*pieces, detokenizer.flush()]) == text.replace("<|end|>", "")
