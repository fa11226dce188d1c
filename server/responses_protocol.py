"""The request bodies and items of /v1/responses, and what they are as a chat completion's.

An item is kept as input_items answers it: whole, and with an id of this server's. A conversation is a list of items,
and its messages are made of the list each time, so that one that is continued reads as one that is sent at once.
All that a conversation is checked for, and every default, is the chat completion's. Null means absent, unknown fields
are ignored, and a known one that cannot be honoured is refused by name unless its value asks for nothing.
Source: OpenAI's API reference (responses).
"""

import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from headrace.server.protocol import (
    MAX_MESSAGES,
    MAX_TOOLS,
    STREAM_OPTIONS_RULE,
    TOOL_CHOICE_RULE,
    ChatCompletionRequest,
    Count,
    Effort,
    FieldNames,
    Flag,
    FunctionName,
    Name,
    NumLogprobs,
    OneOf,
    ToolFunction,
    ToolName,
    parse_request,
    refuse_unsupported,
)

_MAX_METADATA_PAIRS = 16
_LOGPROBS = "message.output_text.logprobs"
# What JSON Schema can say of the checks of a whole body.
_RULES: list[Any] = [
    STREAM_OPTIONS_RULE,
    TOOL_CHOICE_RULE,
    {
        "anyOf": [
            {"properties": {"background": {"enum": [False, None]}}},
            {"properties": {"store": {"enum": [True, None]}}},
        ]
    },
]

# What fields of a chat completion are called in these bodies.
FIELD_NAMES: FieldNames = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"(tools\[\d+\])\.function", r"\1"),
        (r"tool_choice\.function", "tool_choice"),
        (r"tool_choice\.allowed_tools\.tools(\[\d+\])\.function", r"tool_choice.tools\1"),
        (r"response_format(\.json_schema)?", "text.format"),
        (r"messages.*", "input"),
        (r"logprobs", "include"),
    )
)


class MessageText(BaseModel):
    """A part of a message. Which of the two it is follows from the message's role."""

    type: Literal["input_text", "output_text"]
    text: str


Content = str | Annotated[list[MessageText], Field(fail_fast=True)]


class MessageItem(BaseModel):
    type: Literal["message", None] = None  # which is left out often
    role: Literal["user", "assistant", "system", "developer"]
    content: Content

    def as_item(self, id: str) -> dict[str, Any]:
        is_output = self.role == "assistant"
        content = [output_text(text) if is_output else _input_text(text) for text in _texts(self.content)]
        return message(f"msg_{id}", self.role, content, "completed")


class FunctionCallItem(BaseModel):
    type: Literal["function_call"]
    call_id: Name
    name: ToolName
    arguments: str

    def as_item(self, id: str) -> dict[str, Any]:
        return function_call(f"fc_{id}", self.call_id, self.name, self.arguments, "completed")


class FunctionCallOutputItem(BaseModel):
    type: Literal["function_call_output"]
    call_id: Name
    output: Content

    def as_item(self, id: str) -> dict[str, Any]:
        output = self.output if isinstance(self.output, str) else [_input_text(text) for text in _texts(self.output)]
        item = {"id": f"fco_{id}", "type": "function_call_output", "call_id": self.call_id}
        return {**item, "output": output, "status": "completed"}


class ReasoningText(BaseModel):
    type: Literal["reasoning_text"]
    text: str


class SummaryText(BaseModel):
    type: Literal["summary_text"]
    text: str


class ReasoningItem(BaseModel):
    """What a model thought before it spoke. What other servers have encrypted says nothing here."""

    type: Literal["reasoning"]
    summary: Annotated[list[SummaryText], Field(fail_fast=True)] | None = None
    content: Annotated[list[ReasoningText], Field(fail_fast=True)] | None = None

    def as_item(self, id: str) -> dict[str, Any]:
        text = "".join(part.text for part in self.content or ())
        summary = [part.model_dump() for part in self.summary or ()]
        return reasoning(f"rs_{id}", text, "completed") | {"summary": summary}


class ItemReference(BaseModel):
    """An item of a response that is kept."""

    type: Literal["item_reference"]
    id: Name


Item = Annotated[MessageItem | FunctionCallItem | FunctionCallOutputItem | ReasoningItem | ItemReference, OneOf("type")]


class _Function(BaseModel):
    """What comes first in the client's own functions. Tools that a server runs have other types."""

    type: Literal["function"]


class FunctionTool(ToolFunction, _Function):
    def as_chat(self) -> dict[str, Any]:
        return {"type": self.type, "function": self.model_dump(exclude={"type"})}


class NamedFunction(FunctionName, _Function):
    def as_chat(self) -> dict[str, Any]:
        return {"type": self.type, "function": {"name": self.name}}


class AllowedFunctions(BaseModel):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedFunction], Field(fail_fast=True, min_length=1, max_length=MAX_TOOLS)]

    def as_chat(self) -> dict[str, Any]:
        return {"type": self.type, self.type: {"mode": self.mode, "tools": [tool.as_chat() for tool in self.tools]}}


# A word, or which of the tools.
ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("kind[word]")]
    | Annotated[Annotated[NamedFunction | AllowedFunctions, OneOf("type")], Tag("kind[tools]")],
    Discriminator(lambda value: "kind[word]" if isinstance(value, str) else "kind[tools]"),
]


class PlainFormat(BaseModel):
    type: Literal["text", "json_object"]

    def as_chat(self) -> dict[str, Any]:
        return self.model_dump()


class SchemaFormat(BaseModel):
    model_config = ConfigDict(serialize_by_alias=True)

    type: Literal["json_schema"]
    name: Name
    description: str | None = None
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: Flag | None = None

    def as_chat(self) -> dict[str, Any]:
        return {"type": self.type, "json_schema": self.model_dump(exclude={"type"}, exclude_none=True)}


class TextConfig(BaseModel):
    format: Annotated[PlainFormat | SchemaFormat, OneOf("type")] | None = None
    verbosity: Literal["medium"] | None = None


class ReasoningConfig(BaseModel):
    """What was thought is shown as it was: a summary that is asked for stays empty."""

    effort: Effort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class ResponsesRequest(BaseModel):
    """What a response's body has beside a chat completion's: its own fields, and those that it writes otherwise."""

    model_config = ConfigDict(extra="ignore", json_schema_extra={"allOf": _RULES})

    # With the values that ask for what is done anyway. Some of them are a chat's fields, which are written otherwise.
    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "access_programs": (),
        "add_generation_prompt": (True,),
        "background_options": (),
        "context_management": ([],),
        "continue_final_message": (False,),
        "conversation": (),
        "image": (),
        "logprobs": (False,),
        "max_completion_tokens": (),
        "max_tokens": (),
        "messages": (),
        "moderation": (),
        "n": (1,),
        "prompt": (),
        "prompt_cache_options": (),
        "prompt_cache_retention": ("in_memory",),
        "response_format": ({"type": "text"},),
        "return_token_ids": (False,),
        "service_tier": ("auto", "default"),
        "truncation": ("disabled",),
    }

    input: str | Annotated[list[Item], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]
    instructions: str | None = None
    previous_response_id: Name | None = None
    background: Flag | None = None
    store: Flag | None = None
    max_output_tokens: Count | None = Field(None, ge=1, lt=2**31)
    max_tool_calls: Count | None = Field(None, ge=1, lt=2**31)
    top_logprobs: NumLogprobs | None = None
    include: (
        Annotated[
            list[
                Literal[
                    "code_interpreter_call.outputs",
                    "computer_call_output.output.image_url",
                    "file_search_call.results",
                    "message.input_image.image_url",
                    "message.output_text.logprobs",
                    "reasoning.encrypted_content",
                    "web_search_call.action.sources",
                    "web_search_call.results",
                ]
            ],
            Field(fail_fast=True, max_length=100),
        ]
        | None
    ) = None
    text: TextConfig | None = None
    tools: Annotated[list[FunctionTool], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: Flag | None = None
    reasoning: ReasoningConfig | None = None
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
            Field(max_length=_MAX_METADATA_PAIRS),
        ]
        | None
    ) = None
    prompt_cache_key: Name | None = None
    safety_identifier: Name | None = None

    @model_validator(mode="before")
    @classmethod
    def _check_supported(cls, fields: dict[str, Any]) -> dict[str, Any]:
        refuse_unsupported(fields, cls.unsupported)
        return fields

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.background and self.store is False:
            raise ValueError("background: needs store")
        if self.top_logprobs and not self.has_logprobs:
            raise ValueError(f"top_logprobs: needs {_LOGPROBS} in include")
        return self

    @property
    def has_logprobs(self) -> bool:
        return _LOGPROBS in (self.include or ())

    @property
    def own_items(self) -> list[Any]:
        return [MessageItem(role="user", content=self.input)] if isinstance(self.input, str) else self.input

    def as_chat(self, fields: Mapping[str, Any], items: Iterable[dict[str, Any]]) -> "ResponseParams":
        """The chat completion that answers this conversation, with those of the body's `fields` that are only its own.

        Raises: ApiError, in the words of a chat completion: see `FIELD_NAMES`.
        """
        others = {name: value for name, value in fields.items() if name not in type(self).model_fields}
        own = {name: value for name, value in self._chat_fields().items() if value is not None}
        return parse_request(ResponseParams, others | own | {"messages": messages_of(self.instructions, items)})

    def _chat_fields(self) -> dict[str, Any]:
        return {
            "max_completion_tokens": self.max_output_tokens,
            "reasoning_effort": self.reasoning and self.reasoning.effort,
            "logprobs": self.has_logprobs,
            "top_logprobs": self.top_logprobs,
            "tools": self.tools and [tool.as_chat() for tool in self.tools],
            "tool_choice": self.tool_choice.as_chat() if isinstance(self.tool_choice, BaseModel) else self.tool_choice,
            "parallel_tool_calls": self.parallel_tool_calls,
            "response_format": self.text and self.text.format and self.text.format.as_chat(),
        }

    def settings(self) -> dict[str, Any]:
        """What a response's object says of its body."""
        text, tool_choice = self.text or TextConfig(), self.tool_choice or "auto"
        return {
            "background": bool(self.background),
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "max_tool_calls": self.max_tool_calls,
            "metadata": self.metadata or {},
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "previous_response_id": self.previous_response_id,
            "prompt_cache_key": self.prompt_cache_key,
            "reasoning": {
                "effort": self.reasoning and self.reasoning.effort,
                "summary": self.reasoning and self.reasoning.summary,
            },
            "safety_identifier": self.safety_identifier,
            "service_tier": "default",
            "store": self.store is not False,
            "text": {
                "format": (text.format or PlainFormat(type="text")).model_dump(),
                "verbosity": "medium",
            },
            "tool_choice": tool_choice.model_dump() if isinstance(tool_choice, BaseModel) else tool_choice,
            "tools": [tool.model_dump() for tool in self.tools or ()],
            "top_logprobs": self.top_logprobs or 0,
            "truncation": "disabled",
        }


class ResponseParams(ChatCompletionRequest):
    """The chat completion that a response is, whose errors name the response's fields."""

    prompt_field: ClassVar[str] = "input"

    @property
    def asked_max_tokens(self) -> tuple[str, int | None]:
        return "max_output_tokens", self.max_completion_tokens

    def settings(self) -> dict[str, Any]:
        """What a response's object says of these fields."""
        return {
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "user": self.user,
        }


def messages_of(instructions: str | None, items: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """A conversation as a chat's messages. One of the assistant's is what it thought, then said, then called."""
    messages: list[dict[str, Any]] = []
    if instructions is not None:
        messages.append({"role": "system", "content": instructions})
    for item in items:
        role = {"message": item.get("role"), "function_call_output": "tool"}.get(item["type"], "assistant")
        last = messages[-1] if messages else {}
        has_spoken = "content" in last or "tool_calls" in last
        if role != "assistant" or last.get("role") != role or (has_spoken and item["type"] != "function_call"):
            messages.append({"role": role})
        said = messages[-1]
        match item["type"]:
            case "message":
                said["content"] = [{"type": "text", "text": part["text"]} for part in item["content"]]
            case "function_call":
                function = {"name": item["name"], "arguments": item["arguments"]}
                call = {"id": item["call_id"], "type": "function", "function": function}
                said.setdefault("tool_calls", []).append(call)
            case "function_call_output":
                output = item["output"]
                text = output if isinstance(output, str) else "".join(part["text"] for part in output)
                said |= {"tool_call_id": item["call_id"], "content": text}
            case "reasoning":
                text = "".join(part["text"] for part in item["content"])
                said["reasoning_content"] = said.get("reasoning_content", "") + text
    return messages


def as_input(item: dict[str, Any]) -> dict[str, Any]:
    """An output item as part of a later conversation: without its log probabilities."""
    if item["type"] != "message":
        return item
    return item | {"content": [part | {"logprobs": []} for part in item["content"]]}


def message(id: str, role: str, content: list[dict[str, Any]], status: str) -> dict[str, Any]:
    return {"id": id, "type": "message", "role": role, "content": content, "status": status}


def output_text(text: str, logprobs: list[Any] | None = None) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs or []}


def function_call(id: str, call_id: str, name: str, arguments: str, status: str) -> dict[str, Any]:
    item = {"id": id, "type": "function_call", "call_id": call_id, "name": name, "arguments": arguments}
    return {**item, "status": status}


def reasoning(id: str, text: str, status: str) -> dict[str, Any]:
    content = [{"type": "reasoning_text", "text": text}] if text else []
    return {"id": id, "type": "reasoning", "summary": [], "content": content, "status": status}


def _input_text(text: str) -> dict[str, Any]:
    return {"type": "input_text", "text": text}


def _texts(content: Content) -> list[str]:
    return [content] if isinstance(content, str) else [part.text for part in content]
