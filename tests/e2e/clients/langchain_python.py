"""LangChain: ChatOpenAI's invoke, stream and their asynchronous forms, and OpenAI for completions."""

import gc
import json
import sys
from typing import Any

from langchain_core.messages import AIMessage
from langchain_openai import ChatOpenAI, OpenAI

from driver import Call, Seen, serve


def _fields(call: Call) -> dict[str, Any]:
    """The model's settings: everything of a body but what is asked."""
    settings = {name: value for name, value in call.body.items() if name not in ("messages", "prompt")}
    return {
        **settings,
        "base_url": sys.argv[1],
        "api_key": "none",
        "timeout": call.timeout_s,
        "max_retries": call.max_retries,
        "extra_body": call.extra,
    }


def _chat_model(call: Call) -> Any:
    settings = _fields(call)
    is_usage_asked = settings.pop("stream_options", None) is not None
    tools, choice = settings.pop("tools", None), settings.pop("tool_choice", None)
    is_parallel = settings.pop("parallel_tool_calls", None)
    model = ChatOpenAI(**settings, stream_usage=is_usage_asked)
    return model.bind_tools(tools, tool_choice=choice, parallel_tool_calls=is_parallel) if tools else model


def _see(seen: Seen, message: AIMessage) -> None:
    """Add a whole message, or the sum of a stream's chunks."""
    logprobs = (message.response_metadata.get("logprobs") or {}).get("content") or []
    tokens = [(item["token"], item["logprob"]) for item in logprobs]
    seen.add(0, message.text, message.response_metadata.get("finish_reason"), tokens)
    seen.calls = [[call["name"], json.dumps(call["args"])] for call in message.tool_calls]
    if (usage := message.usage_metadata) is not None:
        prompt_tokens, completion_tokens = usage["input_tokens"], usage["output_tokens"]
        seen.usage = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": usage["total_tokens"],
        }


async def chat(call: Call, seen: Seen) -> None:
    _see(seen, _chat_model(call).invoke(call.body["messages"]))


async def async_chat(call: Call, seen: Seen) -> None:
    _see(seen, await _chat_model(call).ainvoke(call.body["messages"]))


async def chat_stream(call: Call, seen: Seen) -> None:
    message: Any = None
    stream = _chat_model(call).stream(call.body["messages"])
    for chunk in stream:
        message = chunk if message is None else message + chunk
        seen.num_chunks += 1
        if seen.num_chunks == call.leave_after:
            stream.close()
            break
    _see(seen, message)


async def async_chat_stream(call: Call, seen: Seen) -> None:
    message: Any = None
    stream = _chat_model(call).astream(call.body["messages"])
    async for chunk in stream:
        message = chunk if message is None else message + chunk
        seen.num_chunks += 1
        if seen.num_chunks == call.leave_after:
            await stream.aclose()
            break
    _see(seen, message)


async def completion(call: Call, seen: Seen) -> None:
    result = OpenAI(**_fields(call)).generate([call.body["prompt"]])
    for index, generation in enumerate(result.generations[0]):
        assert generation.generation_info is not None
        info = generation.generation_info
        logprobs = info["logprobs"] or {"tokens": [], "token_logprobs": []}
        tokens = zip(logprobs["tokens"], logprobs["token_logprobs"], strict=True)
        seen.add(index, generation.text, info["finish_reason"], tokens)
    assert result.llm_output is not None
    seen.usage = result.llm_output["token_usage"]


async def completion_stream(call: Call, seen: Seen) -> None:
    fields = _fields(call)
    fields.pop("stream_options", None)
    stream = OpenAI(**fields).stream(call.body["prompt"])
    for text in stream:
        seen.add(0, text, None)
        seen.num_chunks += 1
        if seen.num_chunks == call.leave_after:
            stream.close()
            gc.collect()  # LangChain closes no completion stream; its garbage does
            break


serve(
    {
        "chat": chat,
        "async_chat": async_chat,
        "chat_stream": chat_stream,
        "async_chat_stream": async_chat_stream,
        "completion": completion,
        "completion_stream": completion_stream,
    }
)
