"""The request bodies of the generation routes: what is read, what is refused, what is ignored.

Pydantic at the wire only. Null means absent everywhere, since clients send it freely; unknown fields are ignored; a
known field that this server cannot honour is refused by name unless its value asks for nothing.
Source: OpenAI's API reference (chat completions, completions), and the extensions vLLM's clients use.
"""

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    ValidationError,
    model_validator,
)
from pydantic_core import CoreSchema, core_schema, from_json, to_json

from headrace.scheduler.messages import GrammarKind
from headrace.server.errors import ApiError, BadRequestError, UnsupportedParameterError
from headrace.server.grammars import GrammarSource

MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1000
MAX_MESSAGES = 2048
MAX_NAME_CHARS = 512
MAX_TOOLS = 128  # and calls of them in one message
MAX_TOOL_NAME_CHARS = 128
MAX_SEQUENCES = 128  # prompts times choices of one request
MAX_LOGIT_BIASES = 1024
MAX_TEMPLATE_VARIABLES = 64
MAX_TEMPLATE_CHARS = 2**14  # of all the variables, as JSON
MAX_GRAMMAR_CHARS = 2**17
MAX_GRAMMAR_CHOICES = 4096
_MAX_PATH_CHARS = 200  # of what an error names: a key may be as long as a body
# What a number has to have that is read as infinity. Its text may be in a string too.
_HUGE_NUMBER = re.compile(rb"[eE]\+?[0-9]{3}|[0-9]{200}")

# Where an answer is one text and nothing is made of it.
WITHOUT_TOOLS: dict[str, tuple[Any, ...]] = {"tools": ([],), "tool_choice": ("none", "auto")}

# Fields that exist elsewhere and ask for what this server does not do, with the values that ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "suffix": ("",),
    "prompt_logprobs": (),
    "length_penalty": (1,),
    "use_beam_search": (False,),
    "typical_p": (1,),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "chat_template": (),
    "documents": ([],),
    "truncate_prompt_tokens": (),
    "include_stop_str_in_output": (False,),
    "return_tokens_as_token_ids": (False,),
    "prompt_embeds": (),
    "audio": (),
    "modalities": (["text"],),
    "prediction": (),
    "web_search_options": (),
    "verbosity": ("medium",),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "priority": (0,),
    "detokenize": (True,),
    "grammar": (),
    "json_schema": (),
    "structural_tag": (),
    "guided_whitespace_pattern": (),
    "logits_processors": ([],),
    "no_repeat_ngram_size": (0,),
    "spaces_between_special_tokens": (True,),
    "num_beams": (1,),
    "early_stopping": (False,),
    # Other servers' names of fields that change an answer.
    "max_new_tokens": (),
    "max_output_tokens": (),
    "n_predict": (),
    "min_new_tokens": (0,),
    "stop_sequences": ([],),
    "repeat_penalty": (1,),
    "mirostat": (0,),
    "thinking": (),
    "reasoning": (),
}

# What does as much.
_INSTEAD = {
    "best_of": "ask for `n` answers with `logprobs`, and keep the likeliest",
    "prompt_logprobs": "/v1/completions scores a prompt with `echo` and `logprobs`",
}

# What a template is given by the server, and what the library that renders it would take for itself.
NO_TEMPLATE_VARIABLES = frozenset(
    [
        *("messages", "tools", "xml_tools", "documents", "add_generation_prompt", "continue_final_message"),
        *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"),
        *("self", "conversation", "conversations", "chat_template", "tokenize", "tokenizer_kwargs", "return_tensors"),
        *("return_dict", "return_assistant_tokens_mask", "sanitize_control_tokens", "padding", "truncation"),
        "max_length",
    ]
)

Flag = Annotated[bool, Field(strict=True)]
Count = Annotated[int, Field(strict=True)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Name = Annotated[str, Field(strict=True, max_length=MAX_NAME_CHARS)]
TokenId = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
# Fail fast: a list of millions of wrong items must not cost an error each.
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
Penalty = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=-2, le=2)]
Bias = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=-100, le=100)]
NumLogprobs = Annotated[int, Field(strict=True, ge=0, le=20)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
ToolName = Annotated[str, Field(strict=True, max_length=MAX_TOOL_NAME_CHARS, pattern="^[a-zA-Z0-9_-]+$")]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]


def _none_if_false(value: Any) -> Any:
    return None if value is False else value


def _only_with(field: str, needed: str, *neutral: Any) -> dict[str, Any]:
    """In JSON Schema: but for the neutral values a field is allowed only where the needed one is true."""
    return {
        "anyOf": [
            {"properties": {field: {"enum": [None, *neutral]}}},
            {"properties": {needed: {"const": True}}, "required": [needed]},
        ]
    }


# Parts of messages elsewhere.
_OTHER_PARTS = (
    "image_url",
    "input_image",
    "image",
    "input_audio",
    "audio_url",
    "video_url",
    "video",
    "file",
    "input_file",
)

STREAM_OPTIONS_RULE = _only_with("stream_options", "stream")
TOOL_CHOICE_RULE: dict[str, Any] = {
    "anyOf": [
        {"properties": {"tool_choice": {"enum": [None, "none", "auto"]}}},
        {"properties": {"tools": {"type": "array", "minItems": 1}}, "required": ["tools"]},
    ]
}


def _say_rules(schema: dict[str, Any], cls: type[Any]) -> None:
    schema["allOf"] = [*cls.rules]


class StreamOptions(BaseModel):
    include_usage: Flag | None = None
    continuous_usage_stats: Flag | None = None
    include_obfuscation: Flag | None = None


GrammarText = Annotated[str, Field(min_length=1, max_length=MAX_GRAMMAR_CHARS)]
GrammarChoices = Annotated[
    list[Annotated[str, Field(min_length=1)]], Field(fail_fast=True, min_length=1, max_length=MAX_GRAMMAR_CHOICES)
]
# An object, or its text: clients send both.
JsonSchema = dict[str, Any] | GrammarText


class NamedSchema(BaseModel):
    """A JSON schema as OpenAI has it. It is kept to whether it is `strict` or not."""

    model_config = ConfigDict(serialize_by_alias=True)

    name: Name | None = None
    json_schema: dict[str, Any] | None = Field(None, alias="schema")
    strict: Flag | None = None


class ResponseFormat(BaseModel):
    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                {"properties": {"type": {"enum": ["text", "json_object"]}}},
                {"properties": {"json_schema": {"type": "object"}}, "required": ["json_schema"]},
            ]
        }
    )

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None
    json_object_schema: None = Field(None, alias="schema")  # other servers' place of it

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("json_schema: is missing")
        return self

    @property
    def grammar_source(self) -> GrammarSource | None:
        if self.type == "text":
            return None
        asked = self.json_schema.json_schema if self.type == "json_schema" and self.json_schema else None
        field = "response_format.json_schema.schema" if asked is not None else "response_format"
        return _schema_source(field, {"type": "object"} if asked is None else asked)


class StructuredOutputs(BaseModel):
    """vLLM's form: one of them."""

    json_schema: JsonSchema | None = Field(None, alias="json")
    regex: GrammarText | None = None
    choice: GrammarChoices | None = None
    grammar: GrammarText | None = None
    json_object: Flag | None = None
    structural_tag: None = None


def _schema_source(field: str, schema: dict[str, Any] | str) -> GrammarSource:
    """Raises: ValueError."""
    text = schema if isinstance(schema, str) else json.dumps(schema, ensure_ascii=False, separators=(",", ":"))
    if len(text) > MAX_GRAMMAR_CHARS:
        raise ValueError(f"{field}: must have at most {MAX_GRAMMAR_CHARS} characters")
    return GrammarSource(GrammarKind.JSON_SCHEMA, text, field)


def _choice_source(field: str, choices: list[str]) -> GrammarSource:
    """Raises: ValueError."""
    if sum(map(len, choices)) > MAX_GRAMMAR_CHARS:
        raise ValueError(f"{field}: must have at most {MAX_GRAMMAR_CHARS} characters in all")
    # A terminal: alternatives of a rule would be too many for the parser.
    return GrammarSource(GrammarKind.LARK, "start: CHOICE\nCHOICE: " + " | ".join(map(json.dumps, choices)), field)


def _grammar_sources(fields: "GenerationParams") -> list[GrammarSource]:
    """All that a request wants its answers to keep to. Raises: ValueError."""
    other = fields.structured_outputs or StructuredOutputs()
    sources: list[GrammarSource | None] = []
    if fields.response_format is not None:
        sources.append(fields.response_format.grammar_source)
    for prefix, schema, regex, choice, grammar in (
        ("guided_", fields.guided_json, fields.guided_regex, fields.guided_choice, fields.guided_grammar),
        ("structured_outputs.", other.json_schema, other.regex, other.choice, other.grammar),
    ):
        sources += [
            None if schema is None else _schema_source(f"{prefix}json", schema),
            None if regex is None else GrammarSource(GrammarKind.REGEX, regex, f"{prefix}regex"),
            None if choice is None else _choice_source(f"{prefix}choice", choice),
            None if grammar is None else GrammarSource(GrammarKind.LARK, grammar, f"{prefix}grammar"),
        ]
    if other.json_object:
        sources.append(_schema_source("structured_outputs.json_object", {"type": "object"}))
    return [source for source in sources if source is not None]


class GenerationParams(BaseModel):
    """What all generation routes share. Ranges that depend on the model are checked where the model is known."""

    model_config = ConfigDict(extra="ignore", json_schema_extra=_say_rules)

    # What JSON Schema can say of the checks of a whole object.
    rules: ClassVar[list[dict[str, Any]]] = [
        STREAM_OPTIONS_RULE,
        {
            "anyOf": [
                {"properties": {name: {"not": {"const": 0}} for name in ("max_tokens", "max_completion_tokens")}},
                {"properties": {"echo": {"const": True}}, "required": ["echo"]},
            ]
        },
    ]
    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {}
    prompt_field: ClassVar[str]
    default_max_tokens: ClassVar[int | None]

    model: Name | None = None
    stream: Flag | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = Field(None, ge=0, lt=2**31)
    max_completion_tokens: Count | None = Field(None, ge=0, lt=2**31)
    min_tokens: Count | None = Field(None, ge=0, lt=2**31)
    temperature: Number | None = Field(None, ge=0, le=100)
    top_p: Number | None = Field(None, gt=0, le=1)
    top_k: Count | None = Field(None, ge=-1, lt=2**31)
    min_p: Number | None = Field(None, ge=0, le=1)
    n: Count | None = Field(None, ge=1, le=MAX_SEQUENCES)
    repetition_penalty: Number | None = Field(None, ge=0.01, le=100)
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Bias] | None = Field(
        None, json_schema_extra={"maxProperties": MAX_LOGIT_BIASES, "propertyNames": {"pattern": "^[0-9]{1,10}$"}}
    )
    seed: Count | None = Field(None, ge=-(2**63), lt=2**64)
    stop: StopString | Annotated[list[StopString], Field(fail_fast=True, max_length=MAX_STOP_STRINGS)] | None = None
    stop_token_ids: TokenIds | None = Field(None, max_length=1024)
    ignore_eos: Flag | None = None
    add_special_tokens: Flag | None = None
    skip_special_tokens: Flag | None = None
    return_token_ids: Flag | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: JsonSchema | None = None
    guided_regex: GrammarText | None = None
    guided_choice: GrammarChoices | None = None
    guided_grammar: GrammarText | None = None
    timeout: Number | None = Field(None, gt=0, le=1e6)
    queue_timeout: Number | None = Field(None, gt=0, le=1e6)
    ttft_timeout: Number | None = Field(None, gt=0, le=1e6)
    stall_timeout: Number | None = Field(None, gt=0, le=1e6)
    user: Name | None = None
    cache_salt: Name | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only allowed with stream")
        if None not in (limits := {self.max_tokens, self.max_completion_tokens}) and len(limits) == 2:
            raise ValueError("max_tokens: differs from max_completion_tokens")
        max_tokens_field, max_tokens = self.asked_max_tokens
        if max_tokens == 0 and not self.is_echoed:
            raise ValueError(f"{max_tokens_field}: must be at least 1, for there is no echo")
        if not all(key.isascii() and key.isdigit() and len(key) < 11 for key in self.logit_bias or ()):
            raise ValueError("logit_bias: its keys must be token ids")
        sources = _grammar_sources(self)
        if len(sources) > 1:
            raise ValueError(f"{sources[1].field}: an answer keeps to one grammar, and there is {sources[0].field}")
        if sources and self.ignore_eos:
            raise ValueError(f"ignore_eos: an answer that keeps to {sources[0].field} ends with it")
        return self

    @model_validator(mode="before")
    @classmethod
    def _check_size(cls, fields: dict[str, Any]) -> dict[str, Any]:
        # A field's own limit is looked at when all its items have been validated.
        if isinstance(biases := fields.get("logit_bias"), dict) and len(biases) > MAX_LOGIT_BIASES:
            raise ValueError(f"logit_bias: must have at most {MAX_LOGIT_BIASES} items")
        return fields

    @property
    def skips_special_tokens(self) -> bool:
        return self.skip_special_tokens is not False

    @property
    def is_echoed(self) -> bool:
        """Whether an answer begins with its prompt."""
        return False

    @cached_property
    def grammar_source(self) -> GrammarSource | None:
        """What the answers are to keep to."""
        return next(iter(_grammar_sources(self)), None)

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def num_sequences(self) -> int:
        """How many answers are asked for in all."""
        return self.num_choices

    @property
    def num_logprobs(self) -> int | None:
        """How many of the likeliest tokens are wanted at each position, None where no log probability is."""
        raise NotImplementedError

    @property
    def asked_max_tokens(self) -> tuple[str, int | None]:
        """(The field that limits the answer, its value)."""
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return "max_tokens", self.max_tokens

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class TextPart(BaseModel):
    """A piece of a message's text. One whose type is `refusal` has it in the field of that name."""

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                {"properties": {"type": {"const": "refusal"}, "refusal": {"type": "string"}}, "required": ["refusal"]},
                {
                    "properties": {"type": {"not": {"const": "refusal"}}, "text": {"type": "string"}},
                    "required": ["text"],
                },
            ]
        }
    )

    type: Literal["text", "input_text", "output_text", "refusal"]
    text: str | None = None
    refusal: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _check_type(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and fields.get("type") in _OTHER_PARTS:
            raise ValueError(f"type: `{fields['type']}` is not supported, for the model reads text alone")
        return fields

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.written is None:
            raise ValueError(f"{'refusal' if self.type == 'refusal' else 'text'}: must be text")
        return self

    @property
    def written(self) -> str | None:
        return self.refusal if self.type == "refusal" else self.text


class ToolFunction(BaseModel):
    """`parameters` is the JSON schema of an object; without it there are none."""

    name: ToolName
    description: Annotated[str, Field(strict=True)] | None = None
    parameters: dict[str, Any] | None = Field(None, json_schema_extra={"properties": {"type": {"const": "object"}}})
    strict: Flag | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.parameters or {}).get("type", "object") != "object":
            raise ValueError("parameters: must be the JSON schema of an object")
        return self


class Tool(BaseModel):
    type: Literal["function"]
    function: ToolFunction

    def as_template_input(self) -> dict[str, Any]:
        """The tool as chat templates read it."""
        function: dict[str, Any] = {"name": self.function.name}
        if self.function.description is not None:
            function["description"] = self.function.description
        # Some templates look into the parameters without asking whether there are any.
        function["parameters"] = self.function.parameters or {"type": "object", "properties": {}}
        return {"type": "function", "function": function}


class FunctionName(BaseModel):
    name: ToolName


class NamedTool(BaseModel):
    type: Literal["function"]
    function: FunctionName


class AllowedTools(BaseModel):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(fail_fast=True)] = Field(min_length=1, max_length=MAX_TOOLS)


_PRESENT: dict[str, Any] = {"not": {"type": "null"}}


def _named_by(field: str) -> dict[str, Any]:
    return {"properties": {"type": {"const": field}, field: _PRESENT}, "required": [field]}


class ToolChoice(BaseModel):
    """One tool that must be called, or the tools that may be called of those that the model is told of."""

    model_config = ConfigDict(json_schema_extra={"anyOf": [_named_by("function"), _named_by("allowed_tools")]})

    type: Literal["function", "allowed_tools"]
    function: FunctionName | None = None
    allowed_tools: AllowedTools | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if getattr(self, self.type) is None:
            raise ValueError(f"{self.type}: is required")
        return self

    @property
    def names(self) -> dict[str, str]:
        """The tools by where they are named."""
        if self.type == "function":
            assert self.function is not None
            return {"function.name": self.function.name}
        assert self.allowed_tools is not None
        return {
            f"allowed_tools.tools[{i}].function.name": t.function.name for i, t in enumerate(self.allowed_tools.tools)
        }


class CalledFunction(BaseModel):
    """`arguments` are JSON as the model wrote it, which need not be sound."""

    name: ToolName
    arguments: Annotated[str, Field(strict=True)]


class MessageToolCall(BaseModel):
    id: Name
    type: Literal["function"] | None = None
    function: CalledFunction

    def as_template_input(self) -> dict[str, Any]:
        """The call as chat templates read it: with its arguments as an object, where they are one."""
        try:
            arguments = from_json(self.function.arguments or "{}", allow_inf_nan=False)
        except ValueError:
            arguments = None
        if not isinstance(arguments, dict):
            arguments = self.function.arguments
        return {"id": self.id, "type": "function", "function": {"name": self.function.name, "arguments": arguments}}


class ChatMessage(BaseModel):
    """A message whose content is text, whole or in parts. What asks for more may be there if it is empty."""

    model_config = ConfigDict(
        json_schema_extra={
            "allOf": [
                {
                    "anyOf": [
                        {"properties": {"role": {"const": "assistant"}}},
                        {
                            "properties": {"content": _PRESENT, "tool_calls": {"maxItems": 0}},
                            "required": ["content"],
                        },
                    ]
                },
                {
                    "anyOf": [
                        {"properties": {"role": {"not": {"const": "tool"}}}},
                        {"properties": {"tool_call_id": _PRESENT}, "required": ["tool_call_id"]},
                    ]
                },
            ]
        }
    )

    role: Literal["system", "developer", "user", "assistant", "tool"]
    name: Name | None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[MessageToolCall], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    tool_call_id: Name | None = None
    function_call: dict[str, Any] | None = Field(None, json_schema_extra={"maxProperties": 0})
    refusal: str | None = None
    audio: dict[str, Any] | None = Field(None, json_schema_extra={"maxProperties": 0})
    prefix: Flag | None = None
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        for field in ("function_call", "audio"):
            if getattr(self, field):
                raise ValueError(f"{field}: is not supported")
        if self.content is None and self.role != "assistant":
            raise ValueError("content: must be text")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("tool_calls: are an assistant's only")
        if self.tool_call_id is None and self.role == "tool":
            raise ValueError("tool_call_id: must name the call that this is the result of")
        return self

    def as_template_input(self) -> dict[str, Any]:
        """The message as chat templates read it. `developer` is OpenAI's newer name of `system`, and a refusal is what
        the assistant said in place of anything else."""
        content: Any = self.refusal or "" if self.content is None else self.content
        if isinstance(self.content, list):
            content = [{"type": "text", "text": part.written} for part in self.content]
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": content}
        if self.name is not None:
            message["name"] = self.name
        if self.reasoning_content is not None:
            message["reasoning_content"] = self.reasoning_content
        if self.tool_calls:
            message["tool_calls"] = [call.as_template_input() for call in self.tool_calls]
        if self.role == "tool":
            message["tool_call_id"] = self.tool_call_id
        return message


def thinking_variables(is_thinking: bool) -> dict[str, bool]:
    """Whether the model shall think before it answers, as chat templates know it, in either name."""
    return {"enable_thinking": is_thinking, "thinking": is_thinking}


def effort_variables(effort: Effort) -> dict[str, Any]:
    """How long the model shall think, as those chat templates know it whose models were trained for that. Others are
    told no more than whether."""
    return thinking_variables(False) if effort == "none" else {"reasoning_effort": effort}


class ChatCompletionRequest(GenerationParams):
    messages: Annotated[list[ChatMessage], Field(fail_fast=True)] = Field(min_length=1, max_length=MAX_MESSAGES)
    add_generation_prompt: Flag | None = None
    continue_final_message: Flag | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(
        None,
        json_schema_extra={
            "maxProperties": MAX_TEMPLATE_VARIABLES,
            "propertyNames": {"not": {"enum": [*sorted(NO_TEMPLATE_VARIABLES)]}},
        },
    )

    logprobs: Flag | None = None
    top_logprobs: NumLogprobs | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: Flag | None = None
    reasoning_effort: Effort | None = None

    rules: ClassVar[list[dict[str, Any]]] = [
        *GenerationParams.rules,
        _only_with("top_logprobs", "logprobs", 0),
        TOOL_CHOICE_RULE,
    ]
    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {"echo": (False,)}
    prompt_field: ClassVar[str] = "messages"
    # Without a limit an answer may fill the context.
    default_max_tokens: ClassVar[int | None] = None

    @model_validator(mode="after")
    def _check_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: needs logprobs to be true")
        return self

    @model_validator(mode="after")
    def _check_tools(self) -> Self:
        names: set[str] = set()
        for i, tool in enumerate(self.tools or ()):
            if tool.function.name in names:
                raise ValueError(f"tools[{i}].function.name: is there twice")
            names.add(tool.function.name)
        if not self.tools and self.tool_choice not in (None, "none", "auto"):
            raise ValueError("tool_choice: needs tools")
        source = self.grammar_source if self.has_call_grammar else None
        if source is not None and source.kind is not GrammarKind.JSON_SCHEMA:
            raise ValueError(f"{source.field}: beside tools an answer can keep to a JSON schema and nothing else")
        if self.must_call and self.ignore_eos:
            raise ValueError("ignore_eos: an answer that must be a call ends with it")
        if isinstance(self.tool_choice, ToolChoice):
            for place, name in self.tool_choice.names.items():
                if name not in names:
                    raise ValueError(f"tool_choice.{place}: is no tool's name")
        return self

    @model_validator(mode="after")
    def _check_continuation(self) -> Self:
        last = self.messages[-1]
        for i, message in enumerate(self.messages):
            if message.prefix and (message is not last or message.role != "assistant"):
                raise ValueError(f"messages[{i}].prefix: is only for the last message, and only the assistant's")
        if self.continue_final_message and last.role != "assistant":
            raise ValueError("continue_final_message: the last message is not the assistant's")
        if self.is_continued and self.add_generation_prompt:
            raise ValueError("add_generation_prompt: cannot be true where the last message is continued")
        return self

    @model_validator(mode="after")
    def _check_template_variables(self) -> Self:
        variables = self.chat_template_kwargs or {}
        if len(variables) > MAX_TEMPLATE_VARIABLES or len(to_json(variables)) > MAX_TEMPLATE_CHARS:
            raise ValueError(
                f"chat_template_kwargs: has more than {MAX_TEMPLATE_VARIABLES} names or {MAX_TEMPLATE_CHARS} characters"
            )
        for name in NO_TEMPLATE_VARIABLES.intersection(variables):
            raise ValueError(f"chat_template_kwargs.{name}: is not a request's to set")
        return self

    @property
    def template_variables(self) -> dict[str, Any]:
        """The chat template's own; what is said of them by name counts."""
        told = {} if self.reasoning_effort is None else effort_variables(self.reasoning_effort)
        return {**told, **(self.chat_template_kwargs or {})}

    @property
    def is_continued(self) -> bool:
        """Whether the answer goes on with the last message."""
        return bool(self.continue_final_message or self.messages[-1].prefix)

    @property
    def has_generation_prompt(self) -> bool:
        """Whether the prompt ends with the beginning of the assistant's turn."""
        return not self.is_continued and self.add_generation_prompt is not False

    @property
    def num_logprobs(self) -> int | None:
        return self.top_logprobs or 0 if self.logprobs else None

    @property
    def has_parts(self) -> bool:
        """Whether the answer is taken apart into text, reasoning and tool calls."""
        return True

    @property
    def offered_tools(self) -> list[Tool]:
        """The tools that the model is told of."""
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def callable_tools(self) -> dict[int, Tool]:
        """The tools of which calls are taken, by their places in `tools`."""
        tools = dict(enumerate(self.offered_tools))
        if not isinstance(self.tool_choice, ToolChoice):
            return tools
        names = self.tool_choice.names.values()
        return {i: tool for i, tool in tools.items() if tool.function.name in names}

    @property
    def must_call(self) -> bool:
        """Whether the answer must be a call."""
        if isinstance(self.tool_choice, ToolChoice) and self.tool_choice.allowed_tools is not None:
            return self.tool_choice.allowed_tools.mode == "required"
        return self.tool_choice not in (None, "none", "auto")

    @property
    def has_call_grammar(self) -> bool:
        """Whether what may be in the answer is a matter of its tools' schemas."""
        return bool(self.offered_tools) and (self.must_call or self.grammar_source is not None)

    @property
    def may_call_several(self) -> bool:
        is_named = isinstance(self.tool_choice, ToolChoice) and self.tool_choice.type == "function"
        return self.parallel_tool_calls is not False and not is_named


class CompletionRequest(GenerationParams):
    """`prompt` is a text or a list of token ids, or a list of either."""

    prompt: (
        str | TokenIds | Annotated[list[str], Field(fail_fast=True)] | Annotated[list[TokenIds], Field(fail_fast=True)]
    ) = Field(max_length=2**24)
    echo: Flag | None = None
    logprobs: Annotated[
        NumLogprobs | None,
        BeforeValidator(_none_if_false, json_schema_input_type=NumLogprobs | Literal[False] | None),
    ] = None

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "top_logprobs": (0,),
        "add_generation_prompt": (True,),
        "continue_final_message": (False,),
        "chat_template_kwargs": ({},),
        "reasoning_effort": ("none",),
        **WITHOUT_TOOLS,
    }
    prompt_field: ClassVar[str] = "prompt"
    default_max_tokens: ClassVar[int | None] = 16

    @model_validator(mode="after")
    def _check_prompts(self) -> Self:
        if self.num_sequences > MAX_SEQUENCES:
            raise ValueError(f"prompt: prompts times n must be at most {MAX_SEQUENCES}, not {self.num_sequences}")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        if isinstance(self.prompt, list) and self.prompt and not isinstance(self.prompt[0], int):
            return self.prompt
        return [self.prompt]  # type: ignore[return-value]

    @property
    def is_echoed(self) -> bool:
        return bool(self.echo)

    @property
    def num_sequences(self) -> int:
        return len(self.prompts) * self.num_choices

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs


BodyT = TypeVar("BodyT", bound=GenerationParams)
ModelT = TypeVar("ModelT", bound=BaseModel)
# What fields of one request are called in another that was made into it: (all of a path or its beginning, the name).
FieldNames = tuple[tuple[re.Pattern[str], str], ...]


class OneOf:
    """Annotates a union of models that a field tells apart: an error is that of the one that was meant. Where the field
    is not there it is the model whose literal has None."""

    def __init__(self, field: str) -> None:
        self._field = field

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schemas = {
            kind: handler.generate_schema(model)
            for model in get_args(source)
            for kind in get_args(model.model_fields[self._field].annotation)
        }

        def check(value: Any) -> Any:
            kind = value.get(self._field) if isinstance(value, dict) else value
            if not isinstance(value, dict) or not isinstance(kind, str | None) or kind not in schemas:
                raise ValueError(f"{self._field}: must be {' or '.join(filter(None, schemas))}, not {kind!r:.60}")
            return value

        union = core_schema.tagged_union_schema(
            {f"kind[{kind}]": schema for kind, schema in schemas.items()},
            lambda value: f"kind[{value.get(self._field)}]",
        )
        return core_schema.no_info_before_validator_function(check, union)


def parse_json_object(body: bytes) -> dict[str, Any]:
    """Parse a request body. Raises: BadRequestError unless it is one JSON object."""
    try:
        parsed = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise BadRequestError(f"the body is not valid JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise BadRequestError("the body must be a JSON object")
    if _HUGE_NUMBER.search(body) and (place := _place_of_infinity(parsed)) is not None:
        place = place.lstrip(".")[:_MAX_PATH_CHARS]
        raise BadRequestError(f"{place}: is a number out of range", param=place)
    return parsed


def _place_of_infinity(value: Any) -> str | None:
    """Where in a value of JSON's types an infinity is."""
    if isinstance(value, float):
        return "" if math.isinf(value) else None
    fields = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, field in fields:
        if (place := _place_of_infinity(field)) is not None:
            return (f"[{key}]" if isinstance(key, int) else f".{key}") + place
    return None


def parse_request(cls: type[BodyT], fields: dict[str, Any]) -> BodyT:
    """Validate a body's fields. Raises: BadRequestError or UnsupportedParameterError, naming the field."""
    refuse_unsupported(fields, UNSUPPORTED | cls.unsupported)
    return validate(cls, fields)


def refuse_unsupported(fields: dict[str, Any], unsupported: dict[str, tuple[Any, ...]], path: str = "") -> None:
    """Raises: UnsupportedParameterError for a field that asks for what is not done; `path` goes before its name."""
    for name, neutral in unsupported.items():
        value = fields.get(name)
        # 0 and False are equal in Python and differ on the wire: `logprobs: 0` asks for something.
        if value is not None and not any(
            value == v and isinstance(value, bool) == isinstance(v, bool) for v in neutral
        ):
            instead = f": {_INSTEAD[name]}" if name in _INSTEAD else ""
            raise UnsupportedParameterError(f"`{path}{name}` is not supported{instead}", param=f"{path}{name}")


def validate(cls: type[ModelT], fields: dict[str, Any]) -> ModelT:
    """Raises: BadRequestError, naming the field."""
    try:
        return cls.model_validate(fields)
    except ValidationError as error:
        raise _bad_request(error) from None


@contextmanager
def renaming(names: FieldNames) -> Iterator[None]:
    """Have errors inside the block name the fields that a client knows."""
    try:
        yield
    except ApiError as error:
        rename(error, names)
        raise


def rename(error: ApiError, names: FieldNames) -> None:
    """Have an error name the field that a client knows."""
    if error.param is None:
        return
    param = error.param
    for pattern, name in names:
        if (found := pattern.match(param)) is not None:
            param = found.expand(name) + param[found.end() :]
            break
    if error.message.lstrip("`").startswith(error.param):
        error.message = error.message.replace(error.param, param, 1)
    error.param = param


def _place_and_message(detail: Any) -> tuple[list[str | int], str]:
    """Where an error is, without the types that were tried, which mean nothing to a client, and what it is."""
    tried = ("str", "constrained-str", "list", "dict", "literal", "function-after", "kind")
    place = [part for part in detail["loc"] if str(part).partition("[")[0] not in tried]
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "value_error":
        # Our own checks of a whole object name the field they refuse.
        field, _, message = message.partition(": ")
        place.append(field)
    return place, message


def _bad_request(error: ValidationError) -> ApiError:
    details = error.errors(include_url=False, include_input=False)
    # A field of several types has an error for each: the one that got furthest is of the type that was meant.
    same_field = [detail for detail in details if detail["loc"][:1] == details[0]["loc"][:1]]
    place, message = max(map(_place_and_message, same_field), key=lambda found: len(found[0]))
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")[:_MAX_PATH_CHARS]
    return BadRequestError(f"{path}: {message}", param=path)
