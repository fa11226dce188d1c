"""The request bodies of Ollama's routes, and what they are as a chat completion's or a completion's.

Everything that they are checked for and every default is the completions'; here is what Ollama says otherwise: sampling
in `options`, a `format`, arguments as objects, results of tools without ids. Null means absent, unknown fields are
ignored, and a known one that cannot be honoured is refused by name unless its value asks for nothing.
Source: Ollama's API reference.
"""

import re
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from headrace.server.protocol import (
    MAX_MESSAGES,
    MAX_STOP_STRINGS,
    MAX_TOOLS,
    ChatCompletionRequest,
    CompletionRequest,
    Count,
    FieldNames,
    Flag,
    Name,
    Number,
    Penalty,
    StopString,
    ToolFunction,
    ToolName,
    parse_request,
    refuse_unsupported,
    thinking_variables,
)
from headrace.server.sse import to_json

# What fields of the completions are called in these bodies.
FIELD_NAMES: FieldNames = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"max_tokens", "options.num_predict"),
        (r"repetition_penalty", "options.repeat_penalty"),
        (r"(temperature|top_k|top_p|min_p|seed|stop|presence_penalty|frequency_penalty)", r"options.\1"),
        (r"response_format.*", "format"),
        (r"continue_final_message", "messages"),
    )
)
# The same where the conversation is made of a prompt.
PROMPT_FIELD_NAMES: FieldNames = ((re.compile("messages.*"), "prompt"), *FIELD_NAMES)


class _RawRequest(CompletionRequest):
    default_max_tokens: ClassVar[int | None] = None


class _PromptRequest(ChatCompletionRequest):
    """A conversation made of one prompt."""

    prompt_field: ClassVar[str] = "prompt"


class Options(BaseModel):
    """Those that concern how a model is loaded, and how much of it is used, are ignored."""

    temperature: Number | None = Field(None, ge=0, le=100)
    top_k: Count | None = Field(None, ge=-1, lt=2**31)
    top_p: Number | None = Field(None, gt=0, le=1)
    min_p: Number | None = Field(None, ge=0, le=1)
    seed: Count | None = Field(None, ge=-(2**63), lt=2**64)
    num_predict: Count | None = Field(None, ge=-2, lt=2**31, json_schema_extra={"not": {"const": 0}})
    stop: StopString | Annotated[list[StopString], Field(fail_fast=True, max_length=MAX_STOP_STRINGS)] | None = None
    repeat_penalty: Number | None = Field(None, ge=0.01, le=100)
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "mirostat": (0,),
        "penalize_newline": (True,),
        "repeat_last_n": (-1,),
        "tfs_z": (1,),
        "typical_p": (1,),
    }

    @model_validator(mode="before")
    @classmethod
    def _check_supported(cls, fields: dict[str, Any]) -> dict[str, Any]:
        if isinstance(fields, dict):
            refuse_unsupported(fields, cls.unsupported, "options.")
        return fields

    @model_validator(mode="after")
    def _check_length(self) -> Self:
        if self.num_predict == 0:
            raise ValueError("num_predict: must be at least 1, or -1 for what the context holds")
        return self

    def as_sampling(self) -> dict[str, Any]:
        """The fields of a completion."""
        fields = self.model_dump(exclude={"num_predict", "repeat_penalty"})
        num_predict = self.num_predict if self.num_predict is not None and self.num_predict > 0 else None
        return fields | {"max_tokens": num_predict, "repetition_penalty": self.repeat_penalty}


class OllamaParams(BaseModel):
    """What both generation routes share. An answer is streamed unless `stream` says no."""

    model_config = ConfigDict(extra="ignore")

    model: Name | None = None
    stream: Flag | None = None
    think: Literal["low", "medium", "high"] | Flag | None = None
    options: Options | None = None
    format: Literal["", "json"] | dict[str, Any] | None = None

    # With the values that ask for what is done anyway.
    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "logprobs": (False,),
        "top_logprobs": (0,),
        "shift": (False,),
        "truncate": (False,),
    }

    @model_validator(mode="before")
    @classmethod
    def _check_supported(cls, fields: dict[str, Any]) -> dict[str, Any]:
        refuse_unsupported(fields, cls.unsupported)
        return fields

    @property
    def is_streamed(self) -> bool:
        return self.stream is not False

    def _chat_fields(self, model: str) -> dict[str, Any]:
        fields = self._completion_fields(model)
        if self.think is not None:
            depth = {"reasoning_effort": self.think} if isinstance(self.think, str) else {}
            fields["chat_template_kwargs"] = thinking_variables(bool(self.think)) | depth
        return fields

    def _completion_fields(self, model: str) -> dict[str, Any]:
        fields: dict[str, Any] = {"model": model}
        if self.format == "json":
            fields["response_format"] = {"type": "json_object"}
        elif self.format:
            schema = {"name": "answer", "schema": self.format, "strict": True}
            fields["response_format"] = {"type": "json_schema", "json_schema": schema}
        return fields | ({} if self.options is None else self.options.as_sampling())


class OllamaFunction(BaseModel):
    name: ToolName
    arguments: dict[str, Any]


class OllamaCall(BaseModel):
    id: Name | None = None
    function: OllamaFunction

    def as_chat(self, id: str) -> dict[str, Any]:
        function = {"name": self.function.name, "arguments": to_json(self.function.arguments)}
        return {"id": id, "type": "function", "function": function}


class OllamaMessage(BaseModel):
    """`tool_name` says which tool a result is of, where `tool_call_id` does not say of which call."""

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                {"properties": {"role": {"const": "assistant"}}},
                {"properties": {"tool_calls": {"maxItems": 0}}},
            ]
        }
    )

    role: Literal["system", "user", "assistant", "tool"]
    content: Annotated[str, Field(strict=True)] | None = None
    thinking: Annotated[str, Field(strict=True)] | None = None
    tool_calls: Annotated[list[OllamaCall], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    tool_name: Name | None = None
    tool_call_id: Name | None = None
    images: list[Any] | None = Field(None, max_length=0)


class OllamaTool(BaseModel):
    type: Literal["function"] | None = None
    function: ToolFunction

    def as_chat(self) -> dict[str, Any]:
        return {"type": "function", "function": self.function.model_dump(exclude_none=True)}


class OllamaChatRequest(OllamaParams):
    """Without messages it asks for nothing but that the model be there."""

    messages: Annotated[list[OllamaMessage], Field(fail_fast=True)] | None = Field(None, max_length=MAX_MESSAGES)
    tools: Annotated[list[OllamaTool], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None

    def as_chat(self, model: str) -> ChatCompletionRequest:
        """For a model by the name that it is served under. Raises: ApiError, in the words of a chat completion: see
        `FIELD_NAMES`."""
        fields = self._chat_fields(model) | {"messages": self._chat_messages()}
        if fields["messages"][-1]["role"] == "assistant":
            fields["continue_final_message"] = True
        if self.tools:
            fields["tools"] = [tool.as_chat() for tool in self.tools]
        return parse_request(ChatCompletionRequest, fields)

    def _chat_messages(self) -> list[dict[str, Any]]:
        """The messages, with an id for every call; a result without one is of the first call of its tool that has
        none."""
        messages = []
        num_calls = 0
        unanswered: list[tuple[str, str]] = []  # (a tool's name, the call's id)
        for each in self.messages or ():
            message: dict[str, Any] = {"role": each.role, "content": each.content or ""}
            if each.thinking:
                message["reasoning_content"] = each.thinking
            for call in each.tool_calls or ():
                num_calls += 1
                id = call.id or f"call_{num_calls}"
                message.setdefault("tool_calls", []).append(call.as_chat(id))
                unanswered.append((call.function.name, id))
            if each.role == "tool":
                message["tool_call_id"] = each.tool_call_id or _take_id(unanswered, each.tool_name)
            messages.append(message)
        return messages


class OllamaGenerateRequest(OllamaParams):
    """Without a prompt it asks for nothing but that the model be there."""

    prompt: Annotated[str, Field(strict=True)] | None = None
    system: Annotated[str, Field(strict=True)] | None = None
    raw: Flag | None = None

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        **OllamaParams.unsupported,
        "context": ([],),
        "images": ([],),
        "suffix": ("",),
        "template": ("",),
        "width": (),
        "height": (),
        "steps": (),
    }

    @model_validator(mode="after")
    def _check_raw(self) -> Self:
        if self.raw and self.system:
            raise ValueError("system: has no place in a raw prompt")
        return self

    def as_completion(self, model: str, *, has_chat_template: bool) -> CompletionRequest | ChatCompletionRequest:
        """A conversation of one prompt, or the bare prompt where that is asked for or the model knows nothing else.

        Raises: ApiError, in the words of a completion: see `PROMPT_FIELD_NAMES`.
        """
        if self.raw or not (has_chat_template or self.system):
            return parse_request(_RawRequest, self._completion_fields(model) | {"prompt": self.prompt})
        messages = [{"role": "user", "content": self.prompt}]
        if self.system:
            messages.insert(0, {"role": "system", "content": self.system})
        return parse_request(_PromptRequest, self._chat_fields(model) | {"messages": messages})


class ShowRequest(BaseModel):
    """`name` is what older clients call the model."""

    model: Name | None = None
    name: Name | None = None


def _take_id(unanswered: list[tuple[str, str]], tool_name: str | None) -> str:
    """The id of the first of these calls, of that tool if it is named, which is answered then; "" where there is
    none."""
    for call in unanswered:
        if tool_name in (None, call[0]):
            unanswered.remove(call)
            return call[1]
    return ""
