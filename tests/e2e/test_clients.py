"""Third-party clients, over real sockets, are satisfied with what they read."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from openai import OpenAI

from requirements import need_program
from server_process import ServerProcess
from tcp_relay import TcpRelay

NODE_CLIENT = Path(__file__).parent / "eventsource_client.mjs"


@pytest.fixture
def client(server: ServerProcess) -> Iterator[OpenAI]:
    with OpenAI(
        base_url=f"{server.url()}/v1", api_key="none", max_retries=0, _strict_response_validation=True
    ) as client:
        yield client


def _model(client: OpenAI) -> str:
    return client.models.list().data[0].id


def test_openai_lists_the_model(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["SmolLM2-135M-Instruct"]


def test_openai_chat_streams_the_text_it_gets_whole(client: OpenAI) -> None:
    question = [{"role": "user", "content": "Name three colours 🌈."}]
    asked = {"model": _model(client), "messages": question, "temperature": 0, "max_tokens": 40}
    whole = client.chat.completions.create(**asked)  # type: ignore[call-overload]
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})  # type: ignore[call-overload]
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert len(text) > 10
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_openai_completion_streams_the_text_it_gets_whole(client: OpenAI) -> None:
    asked = {"model": _model(client), "prompt": "The river", "temperature": 0, "max_tokens": 24}
    whole = client.completions.create(**asked)  # type: ignore[call-overload]
    # The SDK's type has no null finish_reason, which OpenAI's own completion chunks carry: strict mode refuses both.
    lenient = client.with_options(_extra_kwargs={"_strict_response_validation": False})
    text = "".join(chunk.choices[0].text for chunk in lenient.completions.create(**asked, stream=True))  # type: ignore[call-overload]
    assert text == whole.choices[0].text
    assert whole.usage.completion_tokens == 24


def test_openai_stream_helper_builds_the_same_completion(client: OpenAI) -> None:
    with client.chat.completions.stream(
        model=_model(client), messages=[{"role": "user", "content": "Say hello."}], temperature=0
    ) as stream:
        deltas = "".join(event.delta for event in stream if event.type == "content.delta")
        final = stream.get_final_completion()
    assert deltas == final.choices[0].message.content


def test_openai_sees_errors_as_its_own_exceptions(client: OpenAI) -> None:
    messages = [{"role": "user", "content": "hi"}]
    with pytest.raises(openai.NotFoundError, match="no-such-model"):
        client.chat.completions.create(model="no-such-model", messages=messages)  # type: ignore[arg-type]
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=_model(client), messages=messages, n=2)  # type: ignore[arg-type]
    assert refused.value.param == "n"
    with pytest.raises(openai.BadRequestError) as too_long:
        client.completions.create(model=_model(client), prompt="word " * 9000)
    assert too_long.value.code == "context_length_exceeded"


def test_a_seed_repeats_and_another_differs(client: OpenAI) -> None:
    def draw(seed: int) -> str:
        completion = client.completions.create(
            model=_model(client), prompt="Once", seed=seed, max_tokens=24, temperature=1.0, top_p=0.95
        )
        return completion.choices[0].text

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_a_stop_string_ends_the_text_before_it(client: OpenAI) -> None:
    completion = client.completions.create(
        model=_model(client), prompt="1, 2, 3, 4,", temperature=0, max_tokens=40, stop=[" 9"]
    )
    assert completion.choices[0].finish_reason == "stop"
    assert completion.choices[0].text == " 5, 6, 7, 8,"


def test_npm_eventsource_resumes_a_cut_stream_without_gap_or_repeat(server: ServerProcess) -> None:
    node = need_program("node")
    if not (NODE_CLIENT.parent / "node_modules" / "eventsource").is_dir():
        need_program("npm-clients-installed-by-make-setup-test")
    body = {"prompt": "The history of water mills", "max_tokens": 60, "temperature": 0, "ignore_eos": True}
    whole = httpx.post(f"{server.url()}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]
    with TcpRelay(server.url(), cut_after_bytes=[1500, 1200]) as relay:
        stream = httpx.post(f"{relay.url}/v1/streams", json=body).json()
        result = subprocess.run(
            [node, str(NODE_CLIENT), relay.url + stream["events_url"]],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
            cwd=NODE_CLIENT.parent,
        )
    seen = json.loads(result.stdout)
    assert seen["text"] == whole
    assert seen["num_opens"] >= 3, "the relay cut the connection twice"
    assert seen["done"]["finish_reason"] == "length"
    assert seen["num_tokens"] == seen["done"]["usage"]["completion_tokens"] == 60
