"""LiteLLM: completion and acompletion, streaming and not, stream_chunk_builder, and text_completion."""

import os
import sys
from typing import Any

# Otherwise the import asks the network for a price list.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import litellm

from driver import Call, Seen, pairs, serve


def _asked(call: Call, provider: str) -> dict[str, Any]:
    return {
        **call.body,
        "model": f"{provider}/{call.body['model']}",
        "api_base": sys.argv[1],
        "api_key": "none",
        "timeout": call.timeout_s,
        "max_retries": call.max_retries,
        "extra_body": call.extra,
    }


def _see(seen: Seen, answer: Any) -> None:
    """Add a whole answer or a chunk of one, of either route."""
    for choice in answer.choices:
        if (part := getattr(choice, "delta", None) or getattr(choice, "message", None)) is not None:
            text = part.content
            seen.add_calls(part.tool_calls)
        else:
            text = choice.text
        seen.add(choice.index, text, choice.finish_reason, pairs(getattr(choice, "logprobs", None)))
    if (usage := getattr(answer, "usage", None)) is not None:
        seen.usage = {name: usage[name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")}


async def chat(call: Call, seen: Seen) -> None:
    _see(seen, litellm.completion(**_asked(call, "openai")))


async def async_chat(call: Call, seen: Seen) -> None:
    _see(seen, await litellm.acompletion(**_asked(call, "openai")))


async def chat_stream(call: Call, seen: Seen) -> None:
    with litellm.completion(**_asked(call, "openai"), stream=True) as stream:
        for chunk in stream:
            _see(seen, chunk)
            seen.num_chunks += 1
            if seen.num_chunks == call.leave_after:
                break


async def async_chat_stream(call: Call, seen: Seen) -> None:
    async with await litellm.acompletion(**_asked(call, "openai"), stream=True) as stream:
        async for chunk in stream:
            _see(seen, chunk)
            seen.num_chunks += 1
            if seen.num_chunks == call.leave_after:
                break


async def chat_builder(call: Call, seen: Seen) -> None:
    chunks = list(litellm.completion(**_asked(call, "openai"), stream=True))
    seen.num_chunks = len(chunks)
    _see(seen, litellm.stream_chunk_builder(chunks, messages=call.body["messages"]))


async def completion(call: Call, seen: Seen) -> None:
    _see(seen, litellm.text_completion(**_asked(call, "text-completion-openai")))


async def completion_stream(call: Call, seen: Seen) -> None:
    stream = litellm.text_completion(**_asked(call, "text-completion-openai"), stream=True)
    for chunk in stream:
        _see(seen, chunk)
        seen.num_chunks += 1
        if seen.num_chunks == call.leave_after:
            break


serve(
    {
        "chat": chat,
        "async_chat": async_chat,
        "chat_stream": chat_stream,
        "async_chat_stream": async_chat_stream,
        "chat_builder": chat_builder,
        "completion": completion,
        "completion_stream": completion_stream,
    }
)
