"""How models are told of tools and write calls of them: the families' formats, and a grammar of calls in each.

A model's format is read off its chat template. A template that knows no tools, or writes calls in a way that is not
known here, gets Hermes' way in messages that it does know. Runs on worker threads, and knows nothing of answers: what
comes back is read in `answer_parser`.
Source: the chat templates of Hermes 2, Qwen2.5, Qwen3, SmolLM3, Llama 3.1 and 3.2, and Mistral (v3, v11, v13); the
grammars' language is llguidance's dialect of Lark.
"""

import hashlib
import json
import re
import secrets
from collections.abc import Iterator
from enum import Enum, auto
from functools import lru_cache
from typing import Any, NamedTuple

from headrace.scheduler.grammar import GrammarError, check_schema, json_escapes
from headrace.scheduler.messages import GrammarKind
from headrace.server.errors import BadRequestError
from headrace.server.grammars import GrammarSource
from headrace.server.protocol import MAX_GRAMMAR_CHARS, ChatCompletionRequest
from headrace.server.tokenizer import REASONING_MARKERS, ReasoningMarkers, Tokenizer, text_of


class CallStyle(Enum):
    HERMES = auto()  # <tool_call>{"name": ..., "arguments": ...}</tool_call> for each call
    LLAMA = auto()  # {"name": ..., "parameters": ...}; {...} at an answer's start, perhaps behind <|python_tag|>
    MISTRAL_LIST = auto()  # [TOOL_CALLS][{"name": ..., "arguments": ...}, {...}]
    MISTRAL_NAMED = auto()  # [TOOL_CALLS]name[ARGS]{...} for each call

    @property
    def markers(self) -> tuple[str, ...]:
        """What is no text in such calls."""
        match self:
            case CallStyle.HERMES:
                return "<tool_call>", "</tool_call>"
            case CallStyle.LLAMA:
                return ("<|python_tag|>",)
        return "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"

    @property
    def is_mistral(self) -> bool:
        return self in (CallStyle.MISTRAL_LIST, CallStyle.MISTRAL_NAMED)


class ToolFormat(NamedTuple):
    """`is_native` where the chat template itself writes it."""

    style: CallStyle
    is_native: bool


# Qwen3-Coder and GLM have Hermes' tags around calls that are no JSON.
_NO_JSON = re.compile("<function=|<arg_key>")
# The ids that Mistral's templates take.
_MISTRAL_ID = re.compile("[a-zA-Z0-9]{9}")
# Templates write JSON so, and models after them.
_JSON_STYLE = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "coerce_one_of": False,
    "lenient": False,
}

_TOOLS_TEXT = """\
You can call functions. Each line here is one: its name, what it does, and the JSON schema of its arguments.
<tools>
{tools}
</tools>
To call one, write its name and its arguments as JSON between these tags, and nothing behind them:
<tool_call>
{{"name": "the function's name", "arguments": {{"an argument's name": "its value"}}}}
</tool_call>
The result comes back between <tool_response> and </tool_response>. Call a function only where it helps."""


@lru_cache(maxsize=8)
def find_format(template: str) -> ToolFormat:
    """The format in which a model with this chat template makes calls."""
    if re.search(r"\b(xml_)?tools\b", template):
        if "[TOOL_CALLS]" in template:
            return ToolFormat(CallStyle.MISTRAL_NAMED if "[ARGS]" in template else CallStyle.MISTRAL_LIST, True)
        if "<tool_call>" in template and not _NO_JSON.search(template):
            return ToolFormat(CallStyle.HERMES, True)
        if '"parameters": ' in template and "ipython" in template:
            return ToolFormat(CallStyle.LLAMA, True)
    return ToolFormat(CallStyle.HERMES, False)


@lru_cache(maxsize=8)
def find_reasoning(template: str) -> ReasoningMarkers | None:
    """What a model with this chat template has around its reasoning, None for one that does not reason."""
    return next((markers for markers in REASONING_MARKERS if markers.closing in template), None)


def make_call_id(style: CallStyle) -> str:
    return secrets.token_hex(5)[:9] if style.is_mistral else f"call_{secrets.token_hex(12)}"


def template_input(
    tokenizer: Tokenizer, request: ChatCompletionRequest
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The messages and the tools of a request as the model's chat template takes them."""
    messages = [message.as_template_input() for message in request.messages]
    tools = [tool.as_template_input() for tool in request.offered_tools]
    style, is_native = find_format(tokenizer.chat_template(has_tools=bool(tools)))
    if not is_native:
        return _in_plain_messages(messages, tools), []
    if style.is_mistral:
        for message in messages:
            for call in message.get("tool_calls", ()):
                call["id"] = _mistral_id(call["id"])
            if "tool_call_id" in message:
                message["tool_call_id"] = _mistral_id(message["tool_call_id"])
    return messages, tools


def _mistral_id(id: str) -> str:
    """A call's id; one that was made elsewhere becomes another that is the same for the call and its result."""
    return id if _MISTRAL_ID.fullmatch(id) else hashlib.sha256(id.encode()).hexdigest()[:9]


def _in_plain_messages(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tools, calls and results as Hermes' text in messages of system, assistant and user.

    Results are the user's, in one message with what the user says next, for templates whose turns alternate.
    """
    if not tools and not any(message["role"] == "tool" or "tool_calls" in message for message in messages):
        return messages
    plain: list[dict[str, Any]] = []
    is_after_result = False
    for message in messages:
        content, is_result = text_of(message["content"]), message["role"] == "tool"
        message = message | {"content": content}
        if is_result:
            message = {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
        elif "tool_calls" in message:
            calls = (f"<tool_call>\n{_to_json(call['function'])}\n</tool_call>" for call in message["tool_calls"])
            message = message | {"content": "\n".join(filter(None, (content, *calls)))}
            del message["tool_calls"]
        if is_after_result and message["role"] == "user":
            plain[-1]["content"] += f"\n{message['content']}"
        else:
            plain.append(message)
        is_after_result = is_result
    if tools:
        text = _TOOLS_TEXT.format(tools="\n".join(_to_json(tool["function"]) for tool in tools))
        if plain[0]["role"] == "system":
            text = f"{plain.pop(0)['content']}\n\n{text}".lstrip()
        plain.insert(0, {"role": "system", "content": text})
    return plain


def _to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def parameter_schemas(request: ChatCompletionRequest) -> list[GrammarSource]:
    """The JSON schemas of the arguments of each tool that may be called."""
    no_parameters = {"properties": {}, "additionalProperties": False}
    sources = []
    for i, tool in request.callable_tools.items():
        text = _styled({"type": "object", **(tool.function.parameters or no_parameters)})
        sources.append(GrammarSource(GrammarKind.JSON_SCHEMA, text, f"tools[{i}].function.parameters"))
    return sources


def answer_schemas(request: ChatCompletionRequest) -> list[GrammarSource]:
    """The JSON schema of an answer that is no call, none where it must be one. Raises: BadRequestError."""
    source = request.grammar_source
    if source is None or request.must_call:
        return []
    try:
        schema = json.loads(source.text)
        return [source._replace(text=_styled({**schema}))]
    except (ValueError, TypeError, RecursionError):
        raise BadRequestError(f"{source.field}: is no JSON schema", param=source.field) from None


def _styled(schema: dict[str, Any]) -> str:
    style = {**_JSON_STYLE, "json_allowed_escapes": json_escapes(json.dumps(schema))}
    return json.dumps({**schema, "x-guidance": style})


def call_grammar(tokenizer: Tokenizer, request: ChatCompletionRequest, *, begins_in_reasoning: bool) -> GrammarSource:
    """A grammar of answers that are calls of the callable tools: one, or several where the request lets them be. Where
    none must be, an answer may keep to the request's JSON schema instead.

    A model that reasons may do so before, and must come to an end of it where the prompt has begun it.

    Raises: BadRequestError where it would be too large, or a schema cannot be held to.
    """
    for schema in (*parameter_schemas(request), *answer_schemas(request)):
        try:
            check_schema(schema.text)
        except GrammarError as error:
            raise BadRequestError(f"{schema.field}: {error}", param=schema.field) from None
    text = "\n".join(_rules(tokenizer, request, begins_in_reasoning))
    if len(text) > MAX_GRAMMAR_CHARS:
        raise BadRequestError(f"tools: their schemas must have at most {MAX_GRAMMAR_CHARS} characters", param="tools")
    # The compiler would take this for the sign of another language.
    return GrammarSource(GrammarKind.LARK, text.replace("::=", r"\u003a:="), "tools")


def _rules(tokenizer: Tokenizer, request: ChatCompletionRequest, begins_in_reasoning: bool) -> Iterator[str]:
    def literal(text: str) -> str:
        """A special token is no text to a grammar."""
        token_id = tokenizer.special_token_id(text)
        return json.dumps(text) if token_id is None else f"<[{token_id}]>"

    template = tokenizer.chat_template(has_tools=True)
    style = find_format(template).style
    yield "answer: " + " | ".join(["calls", *(f"%json {schema.text}" for schema in answer_schemas(request))])
    if (reasoning := find_reasoning(template)) is None:
        yield "start: answer"
    else:
        opening = literal(reasoning.opening)
        before = r"thought /\s*/" if begins_in_reasoning else rf"(/\s*/ {opening} thought /\s*/)?"
        yield f"start: {before} answer"
        if tokenizer.special_token_id(reasoning.closing) is None:
            closing = re.escape(reasoning.closing).replace("/", r"\/")
            yield f"thought[lazy]: /(?s:.*){closing}/"
        else:
            yield f"thought: /(?s:.*)/ {literal(reasoning.closing)}"
    separators = {CallStyle.HERMES: r'"\n"', CallStyle.LLAMA: '"; "', CallStyle.MISTRAL_LIST: '", "'}
    calls = f"call ({separators.get(style, '')} call)*" if request.may_call_several else "call"
    if style is CallStyle.MISTRAL_LIST:
        calls = f'{literal("[TOOL_CALLS]")} " "? "[" {calls} "]"'
    yield f"calls: {calls}"
    yield "call: " + " | ".join(f"call_{i}" for i in request.callable_tools)
    for (i, tool), schema in zip(request.callable_tools.items(), parameter_schemas(request), strict=True):
        name, arguments = tool.function.name, f"%json {schema.text}"
        if style is CallStyle.MISTRAL_NAMED:
            yield f"call_{i}: {literal('[TOOL_CALLS]')} {json.dumps(name)} {literal('[ARGS]')} {arguments}"
            continue
        key = "parameters" if style is CallStyle.LLAMA else "arguments"
        # Lexemes as a JSON schema has them, since an answer may be of one, and the longest lexeme is taken.
        lexemes = "{", '"name"', ": ", f'"{name}"', ", ", f'"{key}"', ": "
        written = f'{" ".join(map(json.dumps, lexemes))} {arguments} "}}"'
        if style is CallStyle.HERMES:
            opening, closing = map(literal, style.markers)
            written = rf'{opening} "\n" {written} "\n" {closing}'
        yield f"call_{i}: {written}"
