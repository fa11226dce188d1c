"""openai-python, 2.x and 3.x alike: synchronous, asynchronous, and its stream helpers, in strict mode."""

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


def _as_response(call: Call) -> dict[str, Any]:
    """A chat's call as one of /v1/responses."""
    others = {**call.body, **call.extra}
    asked = {
        "model": others.pop("model"),
        "input": [item for message in others.pop("messages") for item in _items(message)],
        "max_output_tokens": others.pop("max_tokens"),
        "temperature": others.pop("temperature"),
    }
    if others.pop("logprobs", False):
        asked |= {"include": ["message.output_text.logprobs"], "top_logprobs": others.pop("top_logprobs")}
    if (tools := others.pop("tools", None)) is not None:
        asked["tools"] = [{"type": "function", **tool["function"]} for tool in tools]
    return {**asked, "extra_body": others}


def _items(message: dict[str, Any]) -> list[dict[str, Any]]:
    """A chat's message as items."""
    if message["role"] == "tool":
        output = {"call_id": message["tool_call_id"], "output": message["content"]}
        return [{"type": "function_call_output", **output}]
    said = [] if message["content"] is None else [{"role": message["role"], "content": message["content"]}]
    calls = message.get("tool_calls", ())
    return said + [{"type": "function_call", "call_id": call["id"], **call["function"]} for call in calls]


def _see_response(seen: Seen, response: Any) -> None:
    ends = {"completed": "stop", "incomplete": "length"}
    seen.add(0, response.output_text, ends[response.status])
    for item in response.output:
        if item.type == "function_call":
            seen.calls.append([item.name, item.arguments])
            seen.finish_reasons = ["tool_calls"]
        else:
            [part] = item.content
            seen.add(0, "", None, [(scored.token, scored.logprob) for scored in part.logprobs or ()])
    counts = zip(("prompt_tokens", "completion_tokens", "total_tokens"), ("input", "output", "total"), strict=True)
    seen.usage = {name: getattr(response.usage, f"{kind}_tokens") for name, kind in counts}


async def response(call: Call, seen: Seen) -> None:
    client: Any = CLIENT.with_options(**_options(call)).responses
    made = client.create(**_as_response(call))
    assert client.retrieve(made.id) == made
    _see_response(seen, made)


async def response_events(call: Call, seen: Seen) -> None:
    """By the helper, which puts the events together."""
    client: Any = CLIENT.with_options(**_options(call)).responses
    snapshot, events = "", []
    with client.stream(**_as_response(call)) as stream:
        for event in stream:
            events.append(event)
            if event.type == "response.output_text.delta":
                snapshot = event.snapshot
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert snapshot == events[-1].response.output_text
    _see_response(seen, events[-1].response)


async def response_resumed(call: Call, seen: Seen) -> None:
    """In the background, read in two parts."""
    client: Any = ASYNC_CLIENT.with_options(**_options(call)).responses
    events = []
    async with await client.create(**_as_response(call), background=True, stream=True) as stream:
        async for event in stream:
            events.append(event)
            if event.type.endswith(".delta"):
                break
    rest = await client.retrieve(events[0].response.id, stream=True, starting_after=events[-1].sequence_number)
    events += [event async for event in rest]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert deltas == events[-1].response.output_text
    assert await client.cancel(events[0].response.id) == events[-1].response
    await client.delete(events[0].response.id)
    _see_response(seen, events[-1].response)


serve(
    {
        "chat": chat,
        "chat_stream": chat_stream,
        "chat_helper": chat_helper,
        "async_chat": async_chat,
        "async_chat_stream": async_chat_stream,
        "completion": completion,
        "completion_stream": completion_stream,
        "response": response,
        "response_events": response_events,
        "response_resumed": response_resumed,
    }
)
