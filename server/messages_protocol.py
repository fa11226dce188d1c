"""The request bodies of Anthropic's routes, and what they are as a chat completion's.

Everything that a conversation is checked for and every default is the chat completion's; here is what Anthropic says
otherwise: blocks in place of parts, tool results in a user's turn, the system prompt beside the turns. Null means
absent, unknown fields are ignored, and a known one that cannot be honoured is refused by name unless its value asks for
nothing.
Source: Anthropic's API reference (messages, count tokens).
"""

import re
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from headrace.server.protocol import (
    MAX_MESSAGES,
    MAX_STOP_STRINGS,
    MAX_TOOLS,
    ChatCompletionRequest,
    Count,
    Effort,
    FieldNames,
    Flag,
    Name,
    Number,
    OneOf,
    StopString,
    ToolName,
    parse_request,
    refuse_unsupported,
    thinking_variables,
)
from headrace.server.sse import to_json

_MIN_THINKING_TOKENS = 1024
# Between turns of one role in a row, which are one turn.
_TURN_BREAK = {"type": "text", "text": "\n\n"}

# What fields of a chat completion are called in these bodies.
FIELD_NAMES: FieldNames = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"(tools\[\d+\])\.function\.parameters", r"\1.input_schema"),
        (r"(tools\[\d+\])\.function", r"\1"),
        (r"tool_choice\.function", "tool_choice"),
        (r"parallel_tool_calls", "tool_choice.disable_parallel_tool_use"),
        (r"response_format.*", "output_config.format"),
        (r"messages\[.*|continue_final_message", "messages"),
    )
)


class TextBlock(BaseModel):
    type: Literal["text"]
    text: str


class ThinkingBlock(BaseModel):
    type: Literal["thinking"]
    thinking: str


class RedactedThinkingBlock(BaseModel):
    type: Literal["redacted_thinking"]


class ToolUseBlock(BaseModel):
    type: Literal["tool_use"]
    id: Name
    name: ToolName
    input: dict[str, Any]

    def as_chat(self) -> dict[str, Any]:
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": to_json(self.input)}}


class ToolResultBlock(BaseModel):
    """`is_error` becomes a word before the content, since templates know no such thing."""

    type: Literal["tool_result"]
    tool_use_id: Name
    content: str | Annotated[list[TextBlock], Field(fail_fast=True)] | None = None
    is_error: Flag | None = None

    def as_chat(self) -> dict[str, Any]:
        content = ([{"type": "text", "text": "Error: "}] if self.is_error else []) + _parts(self.content or [])
        return {"role": "tool", "tool_call_id": self.tool_use_id, "content": content}


class SystemMessage(BaseModel):
    role: Literal["system"]
    content: str | Annotated[list[TextBlock], Field(fail_fast=True)]

    def as_chat(self) -> list[dict[str, Any]]:
        return [{"role": "system", "content": _parts(self.content)}]


class UserMessage(BaseModel):
    role: Literal["user"]
    content: str | Annotated[list[Annotated[TextBlock | ToolResultBlock, OneOf("type")]], Field(fail_fast=True)]

    def as_chat(self) -> list[dict[str, Any]]:
        """A message for each result and for the texts between them."""
        if isinstance(self.content, str):
            return [{"role": "user", "content": _parts(self.content)}]
        messages: list[dict[str, Any]] = []
        for block in self.content:
            if isinstance(block, ToolResultBlock):
                messages.append(block.as_chat())
            elif messages and messages[-1]["role"] == "user":
                messages[-1]["content"] += _parts([block])
            else:
                messages.append({"role": "user", "content": _parts([block])})
        return messages or [{"role": "user", "content": []}]


class AssistantMessage(BaseModel):
    role: Literal["assistant"]
    content: (
        str
        | Annotated[
            list[Annotated[TextBlock | ToolUseBlock | ThinkingBlock | RedactedThinkingBlock, OneOf("type")]],
            Field(fail_fast=True),
        ]
    )

    def as_chat(self) -> list[dict[str, Any]]:
        blocks = [TextBlock(type="text", text=self.content)] if isinstance(self.content, str) else self.content
        message: dict[str, Any] = {"role": "assistant"}
        message["content"] = _parts([block for block in blocks if isinstance(block, TextBlock)])
        if thoughts := [block.thinking for block in blocks if isinstance(block, ThinkingBlock)]:
            message["reasoning_content"] = "".join(thoughts)
        if calls := [block.as_chat() for block in blocks if isinstance(block, ToolUseBlock)]:
            message["tool_calls"] = calls
        return [message]


Message = Annotated[UserMessage | AssistantMessage | SystemMessage, OneOf("role")]


class ClientTool(BaseModel):
    """A tool that the client runs. Those that a server runs have other types."""

    type: Literal["custom"] | None = None
    name: ToolName
    description: str | None = None
    input_schema: dict[str, Any] = Field(json_schema_extra={"properties": {"type": {"const": "object"}}})
    strict: Flag | None = None
    defer_loading: Flag | None = Field(None, json_schema_extra={"not": {"const": True}})
    allowed_callers: Annotated[list[Literal["direct"]], Field(fail_fast=True)] | None = None
    input_examples: list[Any] | None = Field(None, max_length=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.defer_loading:
            raise ValueError("defer_loading: is not supported")
        return self

    def as_chat(self) -> dict[str, Any]:
        function = {"name": self.name, "description": self.description, "parameters": self.input_schema}
        return {"type": "function", "function": {**function, "strict": self.strict}}


class ToolMode(BaseModel):
    type: Literal["auto", "any", "none"]
    disable_parallel_tool_use: Flag | None = None

    def as_chat(self) -> Any:
        return "required" if self.type == "any" else self.type


class NamedToolChoice(BaseModel):
    type: Literal["tool"]
    name: ToolName
    disable_parallel_tool_use: Flag | None = None

    def as_chat(self) -> Any:
        return {"type": "function", "function": {"name": self.name}}


class Thinking(BaseModel):
    """`budget_tokens` is how long to think at most, which no model here can be held to."""

    type: Literal["enabled"]
    budget_tokens: Count = Field(ge=_MIN_THINKING_TOKENS)
    display: Literal["summarized"] | None = None


class AdaptiveThinking(BaseModel):
    type: Literal["adaptive"]
    display: Literal["summarized"] | None = None


class NoThinking(BaseModel):
    type: Literal["disabled"]


class JsonFormat(BaseModel):
    type: Literal["json_schema"]
    json_schema: dict[str, Any] = Field(alias="schema")


class OutputConfig(BaseModel):
    effort: Effort | None = None
    format: JsonFormat | None = None


class Metadata(BaseModel):
    user_id: Name | None = None


class CountTokensRequest(BaseModel):
    """A conversation, and what else is part of its prompt."""

    model_config = ConfigDict(
        extra="ignore",
        json_schema_extra={
            "anyOf": [
                {"properties": {"tool_choice": {"properties": {"type": {"enum": ["auto", "none"]}}}}},
                {"properties": {"tools": {"type": "array", "minItems": 1}}, "required": ["tools"]},
            ]
        },
    )

    model: Name | None = None
    messages: Annotated[list[Message], Field(fail_fast=True)] = Field(min_length=1, max_length=MAX_MESSAGES)
    system: str | Annotated[list[TextBlock], Field(fail_fast=True)] | None = None
    tools: Annotated[list[ClientTool], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    tool_choice: Annotated[ToolMode | NamedToolChoice, OneOf("type")] | None = None
    thinking: Annotated[Thinking | AdaptiveThinking | NoThinking, OneOf("type")] | None = None
    output_config: OutputConfig | None = None
    output_format: JsonFormat | None = None

    # With the values that ask for what is done anyway.
    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "compaction": (),
        "container": (),
        "context_management": (
            {},
            {"edits": []},
            {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        ),
        "diagnostics": (),
        "fallbacks": (),
        "inference_geo": (),
        "mcp_servers": ([],),
        "speed": ("standard",),
        "thread": (),
    }

    @property
    def has_thinking(self) -> bool:
        """Whether the model shall think before it answers."""
        return isinstance(self.thinking, Thinking | AdaptiveThinking)

    @model_validator(mode="before")
    @classmethod
    def _check_supported(cls, fields: dict[str, Any]) -> dict[str, Any]:
        refuse_unsupported(fields, cls.unsupported)
        return fields

    def as_chat(self) -> ChatCompletionRequest:
        """Raises: ApiError, in the words of a chat completion: see `FIELD_NAMES`."""
        return parse_request(ChatCompletionRequest, self._chat_fields())

    def _chat_fields(self) -> dict[str, Any]:
        messages = _merged([message for each in self.messages for message in each.as_chat()])
        if self.system:
            messages.insert(0, {"role": "system", "content": _parts(self.system)})
        for message in messages:
            if len(message["content"]) < 2:  # templates are made for texts before all
                message["content"] = "".join(part["text"] for part in message["content"])
        fields: dict[str, Any] = {"model": self.model, "messages": messages}
        if messages[-1]["role"] == "assistant":
            fields["continue_final_message"] = True
        if self.thinking is not None:
            fields["chat_template_kwargs"] = thinking_variables(self.has_thinking)
        if self.output_config is not None and self.output_config.effort is not None:
            fields["reasoning_effort"] = self.output_config.effort
        if self.tools:
            fields["tools"] = [tool.as_chat() for tool in self.tools]
        if self.tool_choice is not None:
            fields["tool_choice"] = self.tool_choice.as_chat()
            if self.tool_choice.disable_parallel_tool_use:
                fields["parallel_tool_calls"] = False
        if (format := (self.output_config and self.output_config.format) or self.output_format) is not None:
            schema = {"name": "answer", "schema": format.json_schema, "strict": True}
            fields["response_format"] = {"type": "json_schema", "json_schema": schema}
        return fields


class MessagesRequest(CountTokensRequest):
    max_tokens: Count = Field(ge=1, lt=2**31)
    stop_sequences: Annotated[list[StopString], Field(fail_fast=True, max_length=MAX_STOP_STRINGS)] | None = None
    stream: Flag | None = None
    temperature: Number | None = Field(None, ge=0, le=1)
    top_k: Count | None = Field(None, ge=0, lt=2**31)
    top_p: Number | None = Field(None, gt=0, le=1)
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None

    @model_validator(mode="after")
    def _check_thinking(self) -> Self:
        if isinstance(self.thinking, Thinking) and self.thinking.budget_tokens >= self.max_tokens:
            raise ValueError("thinking.budget_tokens: must be below max_tokens")
        return self

    def _chat_fields(self) -> dict[str, Any]:
        return super()._chat_fields() | {
            "max_tokens": self.max_tokens,
            "stop": self.stop_sequences,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "user": self.metadata and self.metadata.user_id,
        }


def _parts(content: str | Sequence[TextBlock]) -> list[dict[str, Any]]:
    texts = [content] if isinstance(content, str) else [block.text for block in content]
    return [{"type": "text", "text": text} for text in texts]


def _merged(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages, of which those of one role in a row are one: many templates want turns."""
    merged: list[dict[str, Any]] = []
    for message in messages:
        if merged and message["role"] == merged[-1]["role"] != "tool":
            has_two = merged[-1]["content"] and message["content"]
            merged[-1]["content"] += [*([_TURN_BREAK] if has_two else []), *message["content"]]
            if "reasoning_content" in message:
                thought = merged[-1].get("reasoning_content", "")
                merged[-1]["reasoning_content"] = thought + message["reasoning_content"]
            if "tool_calls" in message:
                merged[-1].setdefault("tool_calls", []).extend(message["tool_calls"])
        else:
            merged.append(message)
    return merged
