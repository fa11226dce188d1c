"""Whatever a client sends or however it leaves: it gets a clear answer, its neighbour gets the same tokens as ever, and
nothing is left over."""

import contextlib
import hashlib
import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from bad_inputs import BAD_INPUTS, CANARY, WITHOUT_KEYS, BadInput, raw_request
from raw_answers import Answer, connect, exchange
from server_process import ServerProcess, serving
from waiting import until

PROMPT = {"prompt": "Once upon a time", "temperature": 0, "ignore_eos": True}
KEY = f"hr-{CANARY}"
AUTHORIZATION = f"authorization: Bearer {KEY}"


def completion(*lines: str, **fields: Any) -> bytes:
    return raw_request("POST", "/v1/completions", json.dumps(PROMPT | fields).encode(), *lines)


class Client:
    """A connection that has sent `request`, and reads when it is told to."""

    def __init__(self, url: str, request: bytes) -> None:
        self.socket = connect(url)
        self.socket.sendall(request)
        self.received = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.socket.close()

    def read_until(self, marker: bytes, count: int = 1) -> None:
        while self.received.count(marker) < count:
            chunk = self.socket.recv(2**16)
            assert chunk, f"closed before {marker!r}: {self.received[-500:]!r}"
            self.received += chunk

    def text(self) -> str:
        """All of a stream's text."""
        self.read_until(b"[DONE]")
        frames = re.findall(rb"^data: (\{.*\})$", self.received, re.MULTILINE)
        return "".join(choice["text"] for frame in frames for choice in json.loads(frame)["choices"])


class Watched:
    """A server, its quiet state, and what a neighbour's stream of `num_tokens` says when it is alone."""

    def __init__(self, server: ServerProcess, num_tokens: int, *lines: str) -> None:
        self.server = server
        self.url = server.url()
        self._http = httpx.Client(base_url=self.url, headers=dict(line.split(": ", 1) for line in lines))
        self._neighbour = completion(*lines, stream=True, max_tokens=num_tokens)
        with Client(self.url, completion(*lines, ignore_eos=False, stream=True, guided_regex="a")) as first:
            assert first.text() == "a"  # what compiles grammars is made for the first one, and kept
        with Client(self.url, self._neighbour) as alone:
            self.reference = alone.text()
        self._quiet = self._state()
        self._resident_kib = 0
        until(self._has_settled, "what an idle server prepares is prepared")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._http.close()

    @contextlib.contextmanager
    def beside_a_neighbour(self) -> Iterator[None]:
        """Run the block while a neighbour's stream is in flight; after it all must be as before."""
        with Client(self.url, self._neighbour) as neighbour:
            neighbour.read_until(b"data: ")
            yield
            assert neighbour.text() == self.reference
        until(lambda: all(now <= then for now, then in zip(self._state(), self._quiet, strict=True)), "all is quiet")

    def metrics(self) -> str:
        return self._http.get("/metrics").text

    def sample(self, name: str) -> float:
        """A metric's value, all labels together."""
        found = re.findall(rf"^headrace_{name}(?:{{.*}})? (\S+)$", self.metrics(), re.MULTILINE)
        return sum(map(float, found))

    def growth_mib(self) -> float:
        """How far the process's memory has grown, at most, since `forget_growth`."""
        return (self._status("VmHWM") - self._resident_kib) / 1024

    def _has_settled(self) -> bool:
        """Whether no memory was taken for a while."""
        before = self._status("VmRSS")
        time.sleep(0.5)
        return self._status("VmRSS") <= before + 256

    def forget_growth(self) -> None:
        Path(f"/proc/{self.server.pid}/clear_refs").write_text("5")
        self._resident_kib = self._status("VmRSS")

    def _status(self, name: str) -> int:
        found = re.search(rf"{name}:\s+(\d+) kB", Path(f"/proc/{self.server.pid}/status").read_text())
        assert found is not None
        return int(found[1])

    def _state(self) -> tuple[float, ...]:
        """(Running, waiting, held blocks, tasks, descriptors)."""
        samples = dict(re.findall(r"^headrace_(\w+) (\S+)$", self.metrics(), re.MULTILINE))
        num_held = float(samples["kv_cache_total_blocks"]) - float(samples["kv_cache_free_blocks"])
        running, waiting = float(samples["num_requests_running"]), float(samples["num_requests_waiting"])
        return running, waiting, num_held, float(samples["event_loop_tasks"]), self.server.num_descriptors()


@pytest.fixture(scope="module")
def watched(server: ServerProcess) -> Iterator[Watched]:
    with Watched(server, 2) as watched:
        yield watched


@pytest.fixture(scope="module")
def guarded(demo_model: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """A server with keys that runs four sequences at a time, so that others queue, and has little patience."""
    keys = tmp_path_factory.mktemp("keys") / "keys.toml"
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    keys.write_text(f'[[keys]]\nname = "alice"\nsha256 = "{digest}"\n')
    flags = ["--max-num-seqs", "4", "--max-num-batched-tokens", "36", "--receive-timeout-s", "2"]
    # Four, however long a step takes on a busy machine.
    flags += ["--itl-targets-ms=1e6,1e6,1e6", "--ttft-targets-s=1e6,1e6,1e6", "--kv-cache-bytes", "512MiB"]
    with (
        serving("--batch-invariant", "--api-keys-file", str(keys), *flags) as server,
        Watched(server, 12, AUTHORIZATION) as watched,
    ):
        yield watched


def assert_answered(case: BadInput, answers: list[Answer]) -> None:
    assert tuple(answer.status for answer in answers) == case.statuses, answers
    for answer in answers:
        if answer.status >= 400 and answer.body:
            assert 0 < len(message_of(answer)) < 1000
    if case.param is not None or case.code is not None:
        error = answers[-1].json()["error"]
        if "code" in error:
            assert error["param"] == case.param
            assert case.code in (None, error["code"])
        else:
            assert case.param is None or case.param in message_of(answers[-1])


def message_of(answer: Answer) -> str:
    """What an error says, in one of the forms that there are."""
    content = answer.json()
    error = content["error"]
    if isinstance(error, str):  # Ollama's
        assert set(content) == {"error"}
        return error
    if "type" in content:  # Anthropic's
        assert set(content) == {"type", "error", "request_id"}
        assert set(error) == {"type", "message"}
    else:
        assert set(content) == {"error"}
        assert set(error) == {"message", "type", "param", "code"}
    return str(error["message"])


@pytest.mark.parametrize("case", BAD_INPUTS, ids=lambda case: case.name)
def test_bad_input_gets_its_answer_and_touches_nothing_else(watched: Watched, case: BadInput) -> None:
    request = case.request()
    watched.forget_growth()
    with watched.beside_a_neighbour():
        answers = exchange(watched.url, request, len(case.statuses))
    growth_mib = watched.growth_mib()
    assert_answered(case, answers)
    assert growth_mib <= case.most_mib


def test_who_has_no_key_is_refused_whatever_is_asked_for(guarded: Watched) -> None:
    with guarded.beside_a_neighbour():
        for case in WITHOUT_KEYS:
            assert_answered(case, exchange(guarded.url, case.request(), len(case.statuses)))


def close(client: Client) -> None:
    client.socket.close()


def reset(client: Client) -> None:
    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    client.socket.close()


def half_close(client: Client) -> None:
    client.socket.shutdown(socket.SHUT_WR)
    while client.socket.recv(2**16):
        pass


HANG_UPS: tuple[Callable[[Client], None], ...] = (close, reset, half_close)


def leave(guarded: Watched, request: bytes, reach: Callable[[Client], object] = lambda client: None) -> None:
    """A client for each way of hanging up, all at once, each of which leaves when it is where the test wants it."""
    with contextlib.ExitStack() as clients:
        leaving = [clients.enter_context(Client(guarded.url, request)) for _ in HANG_UPS]
        for client in leaving:
            reach(client)
        for client, hang_up in zip(leaving, HANG_UPS, strict=True):
            hang_up(client)


def test_a_client_that_leaves_in_its_head_costs_nothing(guarded: Watched) -> None:
    before = guarded.sample("requests_cancelled_total"), guarded.sample("requests_rejected_total")
    with guarded.beside_a_neighbour():
        leave(guarded, completion(AUTHORIZATION)[:60])
    assert (guarded.sample("requests_cancelled_total"), guarded.sample("requests_rejected_total")) == before


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("phase", ["body", "tokenizing", "queued", "prefill", "first token", "middle", "last token"])
def test_clients_that_leave_in_each_phase_leave_nothing(guarded: Watched, phase: str, stream: bool) -> None:
    num_leaving = len(HANG_UPS)
    before = guarded.sample("requests_cancelled_total")
    long = completion(AUTHORIZATION, stream=stream, max_tokens=2000)
    prompt = completion(AUTHORIZATION, stream=stream, prompt=f"{CANARY} " + "word " * 2000)
    with guarded.beside_a_neighbour():
        if phase == "body":
            leave(guarded, long[:-20])
        elif phase == "tokenizing":  # begun at least: nobody waits for it
            leave(guarded, prompt)
        elif phase == "queued":
            with Client(guarded.url, long), Client(guarded.url, long), Client(guarded.url, long):
                until(lambda: guarded.sample("num_requests_running") >= 3, "the others run")
                leave(guarded, long, lambda _: until(lambda: guarded.sample("num_requests_waiting") > 0, "it waits"))
            num_leaving += 3
        elif phase == "prefill":
            leave(guarded, prompt, lambda _: until(lambda: guarded.sample("num_requests_running") > 1, "it runs"))
        elif phase == "last token":
            leave(guarded, completion(AUTHORIZATION, stream=stream), lambda client: client.read_until(b'"length"'))
            num_leaving = 0
        elif stream:
            num_frames = 1 if phase == "first token" else 5
            leave(guarded, long, lambda client: client.read_until(b"data: ", num_frames))
        else:
            num_tokens = guarded.sample("generation_tokens_total") + (13 if phase == "first token" else 40)
            leave(guarded, long, lambda _: until(lambda: guarded.sample("generation_tokens_total") > num_tokens, phase))
    until(lambda: guarded.sample("requests_cancelled_total") == before + num_leaving, "each is counted")


def test_a_request_that_trickles_or_never_comes_is_cut_off_in_time(guarded: Watched) -> None:
    late = [completion(AUTHORIZATION)[:60], completion(AUTHORIZATION)[:-20], b""]
    with guarded.beside_a_neighbour(), contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(guarded.url, part)) for part in late]
        for client in clients:
            while chunk := client.socket.recv(2**16):
                client.received += chunk
    assert [client.received[9:12] for client in clients] == [b"408", b"408", b""]


def test_no_log_line_holds_what_a_client_sent_or_whom_it_claimed_to_be(watched: Watched, guarded: Watched) -> None:
    key = f"authorization: Bearer {CANARY}"
    own = (f"x-request-id: {CANARY} {CANARY}", f"user-agent: {CANARY}", f"cookie: {CANARY}", f"traceparent: {CANARY}")
    for each, lines in ((watched, (key, *own)), (guarded, (AUTHORIZATION, *own))):
        for request in (
            completion(*lines, prompt=CANARY, max_tokens=1, user=CANARY, stop=[CANARY], cache_salt=CANARY),
            completion(*lines, prompt=CANARY, max_tokens=-1),
            completion(*lines, model=CANARY),
            completion(*lines)[:-1] + CANARY.encode(),
            raw_request("GET", f"/{CANARY}/{CANARY}?{CANARY}", b"", *lines),
            raw_request("GET", f"/v1/streams/{CANARY}", b"", *lines),
            raw_request(
                "GET", f"/v1/stream?prompt={CANARY}&max_tokens={CANARY}", b"", "accept: text/event-stream", *lines
            ),
            raw_request("GET", "/health", b"", *lines, host=f"{CANARY}.example"),
            raw_request(CANARY, "/v1/models", b"", *lines),
            raw_request("GET", f"/v1/models?key={CANARY}", b"", key),
            f"{CANARY} {CANARY}\r\n{CANARY}\r\n\r\n".encode(),
        ):
            assert len(exchange(each.url, request, 1)) == 1
        until(lambda each=each: "refused: 400" in each.server.output, "it is logged")  # type: ignore[misc]
        assert CANARY not in each.server.output
        assert "Traceback" not in each.server.output


# Every label and what it may say, whatever clients ask for.
LABELS: dict[str, frozenset[str]] = {
    "status": frozenset(map(str, [400, 401, 403, 404, 405, 406, 408, 413, 415, 422, 429, 431, 501, 503, 505])),
    "phase": frozenset({"body", "tokenizing", "queued", "prefill", "decode"}),
    "tier": frozenset({"premium", "standard", "batch"}),
    "reason": frozenset({"queue_full", "predicted_too_late", "rate_limit"}),
    "finished_reason": frozenset({"stop", "length", "cancelled", "deadline_exceeded", "error", "abort"}),
    "model_name": frozenset({"SmolLM2-135M-Instruct"}),
}


def test_no_label_of_a_metric_holds_what_a_client_sent(watched: Watched, guarded: Watched) -> None:
    for each in (watched, guarded):
        exchange(each.url, raw_request("GET", f"/{CANARY}"), 1)
        metrics = each.metrics()
        assert CANARY not in metrics
        for family in text_string_to_metric_families(metrics):
            for sample in family.samples:
                for label, value in sample.labels.items():
                    if label in ("le", "block_size", "num_gpu_blocks"):
                        float(value)
                    else:
                        assert value in LABELS[label], sample
