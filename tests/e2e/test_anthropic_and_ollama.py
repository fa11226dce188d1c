"""Anthropic's and Ollama's own clients over real sockets: they read of a real model what raw HTTP reads."""

import re
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import ollama
import pytest
from anthropic import Anthropic

from server_process import ServerProcess
from waiting import until

MODEL = "SmolLM2-135M-Instruct"
QUESTION: Any = [{"role": "user", "content": "Name a river and what it drives."}]


@pytest.fixture(scope="module")
def expected(server: ServerProcess) -> str:
    """What OpenAI's route answers, greedily."""
    body = {"messages": QUESTION, "max_tokens": 12, "temperature": 0}
    answer = httpx.post(f"{server.url()}/v1/chat/completions", json=body, timeout=60).json()
    return str(answer["choices"][0]["message"]["content"])


@pytest.fixture(scope="module")
def claude(server: ServerProcess) -> Iterator[Anthropic]:
    with Anthropic(base_url=server.url(), api_key="none", max_retries=0, _strict_response_validation=True) as client:
        yield client


@pytest.fixture(scope="module")
def llama(server: ServerProcess) -> Iterator[ollama.Client]:
    with ollama.Client(server.url()) as client:
        yield client


def num_cancelled(server: ServerProcess) -> float:
    metrics = httpx.get(f"{server.url()}/metrics").text
    return sum(map(float, re.findall(r"^headrace_requests_cancelled_total{.*} (\S+)$", metrics, re.MULTILINE)))


def test_anthropics_client_reads_the_same_text(claude: Anthropic, expected: str) -> None:
    asked: Any = {"model": MODEL, "messages": QUESTION, "max_tokens": 12, "extra_body": {"temperature": 0}}
    whole = claude.messages.create(**asked)
    with claude.messages.stream(**asked) as stream:
        pieces = list(stream.text_stream)
        final = stream.get_final_message()
    assert len(pieces) > 1
    assert "".join(pieces) == final.content[0].text == whole.content[0].text == expected  # type: ignore[union-attr]
    counted = claude.messages.count_tokens(model=MODEL, messages=QUESTION).input_tokens
    assert counted == whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0)
    stopped = claude.messages.create(**asked, stop_sequences=[expected[8:14]])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", expected[8:14])
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.create(**asked | {"model": "other"})


def test_ollamas_client_reads_the_same_text(llama: ollama.Client, expected: str) -> None:
    options = {"num_predict": 12, "temperature": 0}
    [model] = [model.model for model in llama.list().models]
    assert model == f"{MODEL}:latest"
    whole = llama.chat(model, QUESTION, options=options)
    pieces = [part.message.content or "" for part in llama.chat(model, QUESTION, options=options, stream=True)]
    generated = llama.generate(MODEL, QUESTION[0]["content"], options=options)
    assert len(pieces) > 2
    assert "".join(pieces) == whole.message.content == generated.response == expected
    shown = llama.show(MODEL)
    assert shown.details is not None
    assert (shown.details.family, shown.details.parameter_size) == ("llama", "134.52M")
    with pytest.raises(ollama.ResponseError) as refused:
        llama.chat("other", QUESTION)
    assert refused.value.status_code == 404


def test_what_their_users_leave_half_way_ends(server: ServerProcess, claude: Anthropic, llama: ollama.Client) -> None:
    before = num_cancelled(server)
    with claude.messages.stream(model=MODEL, messages=QUESTION, max_tokens=4000) as stream:
        next(iter(stream.text_stream))
    parts: Any = llama.chat(MODEL, QUESTION, options={"num_predict": 4000}, stream=True)
    next(parts)
    parts.close()
    until(lambda: num_cancelled(server) == before + 2, "both are cancelled")
