"""Ollama's bodies as completions: which result is of which call, and what options become."""

from typing import Any

from headrace.server.ollama_protocol import OllamaChatRequest, OllamaGenerateRequest
from headrace.server.protocol import ChatCompletionRequest, CompletionRequest, validate


def call_of(name: str, **fields: Any) -> dict[str, Any]:
    return {"function": {"name": name, "arguments": {}}} | fields


def chat_of(*messages: dict[str, Any], **fields: Any) -> ChatCompletionRequest:
    return validate(OllamaChatRequest, {"messages": [*messages]} | fields).as_chat("m")


def result(**fields: Any) -> dict[str, Any]:
    return {"role": "tool", "content": "x"} | fields


def test_results_are_of_the_first_call_of_their_tool_that_has_none() -> None:
    calls = [call_of("a"), call_of("b"), call_of("a"), call_of("c", id="mine")]
    request = chat_of(
        {"role": "assistant", "content": "", "tool_calls": calls},
        result(tool_name="b"),
        result(tool_name="a"),
        result(),
        result(tool_call_id="mine"),
        result(tool_name="nothing"),
    )
    assistant, *results = request.messages
    assert [call.id for call in assistant.tool_calls or ()] == ["call_1", "call_2", "call_3", "mine"]
    assert [message.tool_call_id for message in results] == ["call_2", "call_1", "call_3", "mine", ""]


def test_options_are_sampling_fields() -> None:
    options = {
        "temperature": 0.5,
        "top_k": 5,
        "top_p": 0.9,
        "min_p": 0.1,
        "seed": 7,
        "num_predict": 9,
        "stop": ["x"],
        "repeat_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
    }
    fields = chat_of({"role": "user", "content": "hi"}, options=options).model_dump(exclude_none=True)
    expected = options | {"max_tokens": 9, "repetition_penalty": 1.1}
    assert {name: fields[name] for name in expected if name not in ("num_predict", "repeat_penalty")} == {
        name: value for name, value in expected.items() if name not in ("num_predict", "repeat_penalty")
    }


def test_without_a_limit_a_raw_answer_is_limited_by_the_context_alone() -> None:
    for options in (None, {"num_predict": -1}, {"num_predict": -2}):
        request = validate(OllamaGenerateRequest, {"prompt": "hi", "raw": True, "options": options})
        completion = request.as_completion("m", has_chat_template=True)
        assert isinstance(completion, CompletionRequest)
        assert (completion.max_tokens, completion.default_max_tokens) == (None, None)
