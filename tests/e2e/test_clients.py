"""Third-party clients, over real sockets, are satisfied with what they read; what raw HTTP gets is the oracle.

Each client runs in a process, driven by its script in e2e/clients. `make test` runs those of the main environment; the
others, in environments of their own, join in `make test-all`.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import httpx
import jsonschema
import openai
import pytest
from openai import OpenAI

from client_driver import ClientDriver, Seen
from raw_client import RawRequest
from requirements import IS_LONG, need, need_program
from server_process import ServerProcess, serving
from tcp_relay import Passage, TcpRelay
from waiting import until

HERE = Path(__file__).parent
MODEL = "SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class Client:
    """A client, its ways to ask and the names of its exceptions.

    A way whose name holds `completion` asks /v1/completions, one whose name holds `response` /v1/responses, in whose
    words it puts a chat, any other the chat route.
    """

    name: str
    script: str
    ways: str
    errors: dict[str, str]
    venv: str | None = None
    # What it lets its user ask for besides one text.
    features: str = ""

    @property
    def is_long(self) -> bool:
        return self.venv is not None or self.script.endswith(".mjs")

    def command(self) -> list[str]:
        """How to start it; skips where it is not to be run or not installed."""
        script = HERE / "clients" / self.script
        if self.is_long and not IS_LONG:
            pytest.skip("a client of `make test-all`")
        if script.suffix == ".mjs":
            need((script.parent / "node_modules").is_dir(), "what `make setup-clients` installs with npm")
            return [need_program("node"), str(script)]
        python = script.parent / ".venvs" / self.venv / "bin" / "python" if self.venv else Path(sys.executable)
        need(python.exists(), "what `make setup-clients` installs")
        return [str(python), str(script)]


_OPENAI_ERRORS = {
    "unknown model": "NotFoundError",
    "bad value": "BadRequestError",
    "overload": "RateLimitError",
    "timeout": "APITimeoutError",
    "failure": "APIError",
}
_OPENAI_WAYS = (
    "chat chat_stream chat_helper async_chat async_chat_stream completion completion_stream "
    "response response_events response_resumed"
)
_AI_SDK_ERRORS = {
    "unknown model": "APICallError",
    "bad value": "APICallError",
    "overload": "APICallError",
    "timeout": "DOMException",
    "failure": "Object",
}

CLIENTS = [
    Client("openai-python-3", "openai_python.py", _OPENAI_WAYS, _OPENAI_ERRORS, features="choices logprobs tools"),
    Client("openai-python-2", "openai_python.py", _OPENAI_WAYS, _OPENAI_ERRORS, "openai2", "choices logprobs tools"),
    Client(
        "openai-node",
        "openai_node.mjs",
        "chat chat_stream chat_helper completion completion_stream",
        _OPENAI_ERRORS | {"timeout": "APIConnectionTimeoutError"},
        features="choices logprobs tools",
    ),
    Client(
        "ai-sdk-compatible",
        "ai_sdk.mjs",
        "chat chat_stream completion completion_stream",
        _AI_SDK_ERRORS,
        features="tools",
    ),
    Client(
        "ai-sdk-openai",
        "ai_sdk.mjs",
        "openai_chat openai_chat_stream openai_completion openai_completion_stream",
        # It sends no fields that OpenAI does not know, so no stream of it can be made to fail.
        {kind: name for kind, name in _AI_SDK_ERRORS.items() if kind != "failure"},
        features="tools",
    ),
    Client(
        "langchain",
        "langchain_python.py",
        "chat async_chat chat_stream async_chat_stream completion completion_stream",
        _OPENAI_ERRORS,
        "langchain",
        "logprobs tools",
    ),
    Client(
        "litellm",
        "litellm_python.py",
        "chat async_chat chat_stream async_chat_stream chat_builder completion completion_stream",
        _OPENAI_ERRORS | {"timeout": "Timeout"},
        "litellm",
        "choices logprobs tools",
    ),
    # It knows success and failure only.
    Client("vllm-bench", "vllm_bench.py", "chat_stream completion_stream", {}, "vllm-bench"),
]

# What a client does not show its user, by its own doing: all others see it of the same stream.
HIDDEN: dict[tuple[str, str], set[str]] = {
    ("langchain", "completion_stream"): {"finish_reasons", "usage", "logprobs"},
    ("litellm", "chat_stream"): {"later finish_reasons"},
    ("litellm", "async_chat_stream"): {"later finish_reasons"},
    ("litellm", "chat_builder"): {"later finish_reasons", "logprobs"},
    ("litellm", "completion_stream"): {"logprobs"},
    ("vllm-bench", "chat_stream"): {"finish_reasons"},
    ("vllm-bench", "completion_stream"): {"finish_reasons"},
}
# Its wrapper around the stream closes nothing and is kept alive by others: the answer runs to its end.
NEVER_CLOSES = ("litellm", "completion_stream")

CHAT = {"messages": [{"role": "user", "content": "Name three colours 🌈."}]}
COUNTING = {"messages": [{"role": "user", "content": "Count from 1 to 9, like this: 1, 2, 3, 4, 5, 6, 7, 8, 9"}]}
JOKE = {"messages": [{"role": "user", "content": "Tell me a joke."}]}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of the next days.",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"enum": ["Paris", "Rome"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 7},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city":"Paris","days":1}'},
}
# A call was made, its result goes in, and another one comes out.
ASKING_TWICE = {
    "messages": [
        {"role": "user", "content": "How is the weather in Paris?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": "It rains."},
        {"role": "user", "content": "And in Rome, for three days?"},
    ],
    "tools": [WEATHER],
    "tool_choice": "required",
    "parallel_tool_calls": False,
}
# (Feature it takes, the chat body, the completion body)
ASKED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "length": ("", {**CHAT, "max_tokens": 12}, {"prompt": "The river", "max_tokens": 12}),
    "stop": (
        "",
        {**COUNTING, "max_tokens": 40, "stop": [" 5"]},
        {"prompt": "1, 2, 3, 4,", "max_tokens": 40, "stop": [" 8"]},
    ),
    "choices": (
        "choices",
        {**JOKE, "max_tokens": 8, "n": 2, "temperature": 1.5, "seed": 7},
        {"prompt": "Once", "max_tokens": 8, "n": 2, "temperature": 1.5, "seed": 7},
    ),
    "logprobs": (
        "logprobs",
        {**CHAT, "max_tokens": 6, "logprobs": True, "top_logprobs": 2},
        {"prompt": "The river", "max_tokens": 6, "logprobs": 2},
    ),
    "tools": ("tools", {**ASKING_TWICE, "max_tokens": 60}, {}),
}
LONG_CHAT = {
    "messages": [{"role": "user", "content": "Write a very long story about a mill, in twenty chapters."}],
    "max_tokens": 2000,
}
LONG_COMPLETION = {"prompt": "Once upon a time", "max_tokens": 2000}


def _ways(client: Client, *endings: str) -> list[str]:
    return [way for way in client.ways.split() if way.endswith(endings)]


def _is_streamed(way: str) -> bool:
    return way.endswith(("stream", "helper", "builder"))


def _pick(way: str, chat: dict[str, Any], completion: dict[str, Any]) -> dict[str, Any]:
    """The body for a way, with the usage asked of streams and greedy where nothing else is said."""
    body = {"model": MODEL, "temperature": 0, **(completion if "completion" in way else chat)}
    return body | ({"stream_options": {"include_usage": True}} if _is_streamed(way) else {})


def _raw(server: ServerProcess, client: Client, body: dict[str, Any]) -> Seen:
    """What the server answers without any client in between."""
    body = {name: value for name, value in body.items() if name != "stream_options"}
    if "prompt" in body and client.script == "ai_sdk.mjs":  # which always asks for a chat's next turn
        prompt, stop = f"user:\n{body['prompt']}\n\nassistant:\n", ["\nuser:", *body.get("stop", [])]
        body |= {"prompt": prompt, "stop": stop}
    route = "/v1/completions" if "prompt" in body else "/v1/chat/completions"
    answer = httpx.post(server.url() + route, json=body, timeout=120).raise_for_status().json()
    choices = answer["choices"]
    return Seen(
        texts=[choice["text"] if "text" in choice else choice["message"]["content"] or "" for choice in choices],
        finish_reasons=[choice["finish_reason"] for choice in choices],
        logprobs=[_pairs(choice["logprobs"]) for choice in choices],
        usage=answer["usage"],
        num_chunks=0,
        calls=[
            [call["function"]["name"], call["function"]["arguments"]]
            for call in choices[0].get("message", {}).get("tool_calls", ())
        ],
        error=None,
    )


def _pairs(logprobs: dict[str, Any] | None) -> list[Any]:
    if logprobs is None:
        return []
    if "content" in logprobs:
        return [[item["token"], item["logprob"]] for item in logprobs["content"]]
    return [list(pair) for pair in zip(logprobs["tokens"], logprobs["token_logprobs"], strict=True)]


def _counts(usage: dict[str, Any] | None) -> list[int] | None:
    return usage and [usage[count] for count in ("prompt_tokens", "completion_tokens", "total_tokens")]  # type: ignore[return-value]


@pytest.fixture(scope="module")
def drive() -> Iterator[Callable[[Client, ServerProcess], ClientDriver]]:
    """Starts each client once for each server."""
    drivers: dict[tuple[str, str], ClientDriver] = {}
    with ExitStack() as stack:

        def drive(client: Client, server: ServerProcess) -> ClientDriver:
            key = client.name, server.url()
            if key not in drivers:
                drivers[key] = stack.enter_context(ClientDriver([*client.command(), f"{server.url()}/v1"]))
            return drivers[key]

        yield drive


Drive = Callable[[Client, ServerProcess], ClientDriver]


def _matrix(*endings: str, error: str | None = None) -> pytest.MarkDecorator:
    """One test for each client and each of its ways with these endings; with `error`, of clients that know it."""
    pairs = [
        pytest.param(client, way, id=f"{client.name}-{way}")
        for client in CLIENTS
        if error is None or error in client.errors
        for way in _ways(client, *endings)
    ]
    return pytest.mark.parametrize(("client", "way"), pairs)


@pytest.mark.parametrize(
    ("client", "way", "asked"),
    [
        pytest.param(client, way, asked, id=f"{client.name}-{way}-{asked}")
        for client in CLIENTS
        for way in client.ways.split()
        for asked, (feature, _, _) in ASKED.items()
        if feature in client.features
        and not (asked == "tools" and "completion" in way)
        and not (asked == "choices" and "response" in way)
    ],
)
def test_a_client_gets_what_raw_http_gets(
    server: ServerProcess, drive: Drive, client: Client, way: str, asked: str
) -> None:
    driver = drive(client, server)
    _, chat, completion = ASKED[asked]
    body = _pick(way, chat, completion)
    seen, raw = driver.call(way, body), _raw(server, client, body)
    assert seen.error is None
    assert seen.texts == raw.texts
    assert [(name, json.loads(arguments)) for name, arguments in seen.calls] == [
        (name, json.loads(arguments)) for name, arguments in raw.calls
    ]
    assert all(seen.texts) != bool(seen.calls)
    if asked == "tools":
        [(name, arguments)] = seen.calls
        assert name == "weather"
        jsonschema.validate(json.loads(arguments), WEATHER["function"]["parameters"])  # type: ignore[index]
    hidden = HIDDEN.get((client.name, way), set())
    num_shown = 1 if "later finish_reasons" in hidden else len(raw.texts)
    if "finish_reasons" not in hidden:
        assert seen.finish_reasons[:num_shown] == raw.finish_reasons[:num_shown]
    if "usage" not in hidden:
        assert _counts(seen.usage) == _counts(raw.usage)
    ends = {"stop": "stop", "tools": "tool_calls"}
    assert raw.finish_reasons == [ends.get(asked, "length")] * len(raw.texts)
    if asked == "logprobs" and "logprobs" not in hidden:
        assert [token for token, _ in seen.logprobs[0]] == [token for token, _ in raw.logprobs[0]]
        assert [p for _, p in seen.logprobs[0]] == pytest.approx([p for _, p in raw.logprobs[0]], abs=1e-3)
    if asked == "choices":
        assert len(set(seen.texts)) == 2
    if _is_streamed(way):
        assert seen.num_chunks > 2


@_matrix("", error="bad value")
def test_a_refusal_is_the_clients_own_exception(server: ServerProcess, drive: Drive, client: Client, way: str) -> None:
    driver = drive(client, server)
    body = _pick(way, *ASKED["length"][1:])
    for kind, wrong, status in (("unknown model", {"model": "no-such"}, 404), ("bad value", {"temperature": 500}, 400)):
        error = driver.call(way, body | wrong).error
        assert error is not None
        assert client.errors[kind] in error["types"]
        assert error["status"] == status
        assert ("`no-such` does not exist" if status == 404 else "temperature: ") in error["message"]


@_matrix("stream", "helper", error="bad value")
def test_a_client_that_closes_its_stream_ends_the_generation(
    server: ServerProcess, drive: Drive, client: Client, way: str
) -> None:
    driver = drive(client, server)
    if (client.name, way) == NEVER_CLOSES:
        pytest.skip("the client never closes this stream")
    before = _num_finished(server, "cancelled")
    seen = driver.call(way, _pick(way, LONG_CHAT, LONG_COMPLETION), leave_after=3)
    assert (seen.num_chunks, seen.error) == (3, None)
    until(lambda: _num_finished(server, "cancelled") == before + 1, "the generation is cancelled")
    until(lambda: server.metrics()["headrace_num_requests_running"] == 0, "nothing runs")


@_matrix("stream", "helper", "builder", error="failure")
def test_a_stream_that_fails_midway_is_an_exception(
    server: ServerProcess, drive: Drive, client: Client, way: str
) -> None:
    driver = drive(client, server)
    error = driver.call(way, _pick(way, LONG_CHAT, LONG_COMPLETION), extra={"timeout": 1}).error
    assert error is not None
    assert client.errors["failure"] in error["types"]
    assert "the request's time was over" in error["message"]


@_matrix("chat", error="timeout")
def test_a_client_that_loses_patience_ends_the_generation(
    server: ServerProcess, drive: Drive, client: Client, way: str
) -> None:
    driver = drive(client, server)
    before = _num_finished(server, "cancelled")
    error = driver.call(way, _pick(way, LONG_CHAT, LONG_COMPLETION), timeout_s=1).error
    assert error is not None
    assert client.errors["timeout"] in error["types"]
    until(lambda: _num_finished(server, "cancelled") == before + 1, "the generation is cancelled")


@pytest.fixture(scope="module")
def narrow(demo_model: Path) -> Iterator[ServerProcess]:
    """A server that runs one sequence and lets one wait."""
    # What the long ones are predicted to take is not what is tested here.
    args = (
        "--max-num-seqs",
        "1",
        "--max-queue-size",
        "1",
        "--max-num-batched-tokens",
        "32",
        "--ttft-targets-s",
        "[1e6,1e6,1e6]",
    )
    with serving("--batch-invariant", "--kv-cache-bytes", "256MiB", *args) as process:
        # Who is refused is told to wait as long as answers are used to take.
        with httpx.Client(base_url=process.url()) as http:
            for _ in range(64):
                http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}).raise_for_status()
        yield process


@_matrix("chat", error="overload")
def test_a_client_comes_back_after_an_overload(narrow: ServerProcess, drive: Drive, client: Client, way: str) -> None:
    if way.startswith("async") and not IS_LONG:
        pytest.skip("long: it waits for as long as it is told; runs in make test-all")
    driver = drive(client, narrow)
    body = _pick(way, *ASKED["length"][1:])
    # A refused client is told to wait as long as these would take.
    endless = LONG_COMPLETION | {"stream": True, "ignore_eos": True, "max_tokens": 120}
    with ExitStack() as stack:
        for gauge in ("headrace_num_requests_running", "headrace_num_requests_waiting"):
            stack.enter_context(RawRequest(narrow.url(), "/v1/completions", endless))
            until(lambda gauge=gauge: narrow.metrics()[gauge] == 1, gauge)  # type: ignore[misc]
        error = driver.call(way, body).error
        assert error is not None
        assert client.errors["overload"] in error["types"]
        assert error["status"] == 429
        before = _num_overloads(narrow)
        with ThreadPoolExecutor(1) as pool:
            call = pool.submit(driver.call, way, body, max_retries=5)
            try:
                until(lambda: _num_overloads(narrow) > before, "refused once more")
            finally:
                stack.close()
            seen = call.result()
    assert seen.error is None
    assert seen.texts == _raw(narrow, client, body).texts


def test_vllm_bench_counts_a_refusal_as_failed(server: ServerProcess, drive: Drive) -> None:
    [client] = [client for client in CLIENTS if client.name == "vllm-bench"]
    driver = drive(client, server)
    for way in client.ways.split():
        error = driver.call(way, _pick(way, *ASKED["length"][1:]) | {"model": "no-such"}).error
        assert error is not None
        assert error["message"] == "Not Found"


def _num_finished(server: ServerProcess, reason: str) -> float:
    return server.metrics()[f'headrace_requests_finished_total{{finished_reason="{reason}"}}']


def _num_overloads(server: ServerProcess) -> float:
    return server.metrics().get('headrace_requests_rejected_total{status="429"}', 0)


@pytest.fixture
def client(server: ServerProcess) -> Iterator[OpenAI]:
    """openai-python in this process, for what one client suffices to show."""
    with OpenAI(
        base_url=f"{server.url()}/v1", api_key="none", max_retries=0, _strict_response_validation=True
    ) as client:
        yield client


def test_openai_lists_the_model(client: OpenAI) -> None:
    [model] = client.models.list()
    assert model.id == MODEL
    assert client.models.retrieve(MODEL) == model
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("some/other")


def test_openai_chat_chunks_share_an_id_and_open_with_the_role(client: OpenAI) -> None:
    chunks = list(client.chat.completions.create(model=MODEL, max_tokens=4, stream=True, **CHAT))  # type: ignore[call-overload]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert {chunk.usage for chunk in chunks} == {None}, "none was asked for"
    assert len({chunk.id for chunk in chunks}) == 1


def test_openai_is_told_the_field_and_the_code_of_a_refusal(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=MODEL, n=1000, **CHAT)  # type: ignore[call-overload]
    assert refused.value.param == "n"
    with pytest.raises(openai.BadRequestError) as too_long:
        client.completions.create(model=MODEL, prompt="word " * 9000)
    assert too_long.value.code == "context_length_exceeded"


def test_a_named_tool_is_called_and_one_that_may_be_called_need_not_be(client: OpenAI) -> None:
    now = {"type": "function", "function": {"name": "now"}}
    question = {"model": MODEL, "max_tokens": 60, "temperature": 0, "tools": [now, WEATHER], **CHAT}
    named = {"type": "function", "function": {"name": "weather"}}
    [made] = client.chat.completions.create(**question, tool_choice=named).choices[0].message.tool_calls  # type: ignore[call-overload]
    assert made.function.name == "weather"
    jsonschema.validate(json.loads(made.function.arguments), WEATHER["function"]["parameters"])  # type: ignore[index]
    free = client.chat.completions.create(**question).choices[0].message  # type: ignore[call-overload]
    assert free.content or free.tool_calls


class _CutAnswers(TcpRelay):
    """Cuts the first answers, whatever they are."""

    def passages(self, request: bytes) -> tuple[Passage, Passage]:
        return Passage(), Passage(end_after_bytes=self._cuts.pop(0)) if self._cuts else Passage()


def test_openai_gets_one_answer_to_a_request_that_it_repeats_with_its_key(
    server: ServerProcess, client: OpenAI
) -> None:
    def ask(client: OpenAI, **fields: Any) -> Any:
        asked = {"model": MODEL, "max_tokens": 8, "temperature": 1.5, **JOKE, **fields}
        return client.chat.completions.create(extra_headers={"Idempotency-Key": "one-joke"}, **asked)

    before = _num_finished(server, "length")
    with _CutAnswers(server.url(), cut_after_bytes=[40, 400]) as relay:
        with OpenAI(base_url=f"{relay.url}/v1", api_key="none", max_retries=2, _strict_response_validation=True) as cut:
            answer = ask(cut)
        assert relay._cuts == [], "it came back twice"
    assert ask(client) == answer
    assert _num_finished(server, "length") == before + 1
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        ask(client, max_tokens=9)
    assert (refused.value.param, refused.value.code) == ("Idempotency-Key", "idempotency_key_reused")


def test_a_seed_repeats_and_another_differs(client: OpenAI) -> None:
    def draw(seed: int) -> str:
        completion = client.completions.create(
            model=MODEL, prompt="Once", seed=seed, max_tokens=24, temperature=1.0, top_p=0.95
        )
        return completion.choices[0].text

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def _run_eventsource(url: str) -> subprocess.CompletedProcess[str]:
    script = HERE / "clients" / "eventsource.mjs"
    node = need_program("node")
    need((HERE / "node_modules" / "eventsource").is_dir(), "what `make setup-test` installs with npm")
    return subprocess.run([node, str(script), url], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("is_one_step", [False, True], ids=["two-steps", "one-step"])
def test_npm_eventsource_resumes_a_cut_stream_without_gap_or_repeat(server: ServerProcess, is_one_step: bool) -> None:
    # Reconnecting takes the time of many tokens, which then come as one event: still more than the second cut passes.
    body = {"prompt": "The history of water mills", "max_tokens": 240, "temperature": 0, "ignore_eos": True}
    whole = httpx.post(f"{server.url()}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]
    with TcpRelay(server.url(), cut_after_bytes=[1500, 800]) as relay:
        if is_one_step:
            result = _run_eventsource(f"{relay.url}/v1/stream?{urlencode(body | {'ignore_eos': 'true'})}")
        else:
            stream = httpx.post(f"{relay.url}/v1/streams", json=body).json()
            result = _run_eventsource(relay.url + stream["events_url"])
    assert result.returncode == 0, result.stderr
    seen = json.loads(result.stdout)
    assert seen["text"] == whole
    assert seen["num_opens"] >= 3, "the relay cut the connection twice"
    assert seen["done"]["finish_reason"] == "length"
    assert seen["num_tokens"] == seen["done"]["usage"]["completion_tokens"] == body["max_tokens"]


def test_npm_eventsource_gives_up_on_a_stream_that_never_was(server: ServerProcess) -> None:
    result = _run_eventsource(f"{server.url()}/v1/streams/{'0' * 32}/events")
    assert result.returncode == 1
    assert "closed for good: 404" in result.stderr
