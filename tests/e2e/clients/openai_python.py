"""openai-python, 2.x and 3.x alike: synchronous, asynchronous, and its stream helper, in strict mode."""

import sys
from typing import Any

from openai import AsyncOpenAI, LengthFinishReasonError, OpenAI

from driver import Call, Seen, pairs, serve

CLIENT = OpenAI(base_url=sys.argv[1], api_key="none", _strict_response_validation=True)
ASYNC_CLIENT = AsyncOpenAI(base_url=sys.argv[1], api_key="none", _strict_response_validation=True)
# The SDK's type has no null finish_reason, which OpenAI's own completion chunks carry: strict mode refuses both.
LENIENT_CLIENT = OpenAI(base_url=sys.argv[1], api_key="none")


def _options(call: Call) -> dict[str, Any]:
    return {"timeout": call.timeout_s, "max_retries": call.max_retries}


def _asked(call: Call) -> dict[str, Any]:
    return {**call.body, "extra_body": call.extra}


def _see(seen: Seen, answer: Any) -> None:
    """Add a whole answer or a chunk of one, of either route."""
    for choice in answer.choices:
        if answer.object == "chat.completion":
            text = choice.message.content
            seen.add_calls(choice.message.tool_calls)
        elif answer.object == "chat.completion.chunk":
            text = choice.delta.content
            seen.add_calls(choice.delta.tool_calls)
        else:
            text = choice.text
        seen.add(choice.index, text, choice.finish_reason, pairs(choice.logprobs))
    if answer.usage is not None:
        seen.usage = answer.usage.to_dict()


def _see_chunk(call: Call, seen: Seen, chunk: Any) -> bool:
    """Add a chunk; returns whether to go on."""
    _see(seen, chunk)
    seen.num_chunks += 1
    return seen.num_chunks != call.leave_after


async def chat(call: Call, seen: Seen) -> None:
    _see(seen, CLIENT.with_options(**_options(call)).chat.completions.create(**_asked(call)))


async def chat_stream(call: Call, seen: Seen) -> None:
    with CLIENT.with_options(**_options(call)).chat.completions.create(**_asked(call), stream=True) as stream:
        for chunk in stream:
            if not _see_chunk(call, seen, chunk):
                break


async def chat_helper(call: Call, seen: Seen) -> None:
    deltas = arguments = ""
    with CLIENT.with_options(**_options(call)).chat.completions.stream(**_asked(call)) as stream:
        for event in stream:
            if event.type == "content.delta":  # of any choice
                deltas += event.delta
            if event.type == "tool_calls.function.arguments.delta":
                arguments += event.arguments_delta
            if event.type == "chunk":
                seen.num_chunks += 1
                if seen.num_chunks == call.leave_after:
                    return
        try:
            _see(seen, stream.get_final_completion())
        except LengthFinishReasonError as error:  # the helper's way of saying `length`
            _see(seen, error.completion)
    assert len(seen.texts) > 1 or deltas == seen.texts[0]
    assert arguments == "".join(call[1] for call in seen.calls)


async def async_chat(call: Call, seen: Seen) -> None:
    _see(seen, await ASYNC_CLIENT.with_options(**_options(call)).chat.completions.create(**_asked(call)))


async def async_chat_stream(call: Call, seen: Seen) -> None:
    client = ASYNC_CLIENT.with_options(**_options(call))
    async with await client.chat.completions.create(**_asked(call), stream=True) as stream:
        async for chunk in stream:
            if not _see_chunk(call, seen, chunk):
                break


async def completion(call: Call, seen: Seen) -> None:
    _see(seen, CLIENT.with_options(**_options(call)).completions.create(**_asked(call)))


async def completion_stream(call: Call, seen: Seen) -> None:
    with LENIENT_CLIENT.with_options(**_options(call)).completions.create(**_asked(call), stream=True) as stream:
        for chunk in stream:
            if not _see_chunk(call, seen, chunk):
                break


serve(
    {
        "chat": chat,
        "chat_stream": chat_stream,
        "chat_helper": chat_helper,
        "async_chat": async_chat,
        "async_chat_stream": async_chat_stream,
        "completion": completion,
        "completion_stream": completion_stream,
    }
)
