"""`headrace bench` whole, against a scripted server: what it counts, prints and returns."""

import asyncio
import importlib.util
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from headrace.benchmarks.bench import main

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"
DONE = b"data: [DONE]\n\n"
QUICK = ("--concurrency", "2", "--requests-per-stream", "3", "--num-warmup", "0", "--output-tokens", "8")
NUM_CALIBRATING = 2  # requests before the first that a run counts


@dataclass(frozen=True, slots=True)
class Asked:
    """One request as the server read it; `number` counts the POSTs from 0."""

    method: str
    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    number: int
    connection: int


@dataclass(frozen=True, slots=True)
class Answer:
    """What to write, piece by piece, and what to do after: close, keep the connection, or hold it for ever."""

    pieces: list[bytes]
    is_closing: bool = True
    on_hold: Callable[[], object] | None = None  # called once the pieces are out; then nothing more comes
    gate: asyncio.Event | None = None  # nothing is written before it is set


Script = Callable[[Asked], Answer]


@dataclass(slots=True)
class FakeServer:
    """Answers by a script; remembers what it was asked."""

    script: Script
    url: str = ""
    asked: list[Asked] = field(default_factory=list)
    num_connections: int = 0

    @property
    def posts(self) -> list[Asked]:
        return [asked for asked in self.asked if asked.method == "POST"]

    async def converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = self.num_connections
        self.num_connections += 1
        try:
            while asked := await self._next_request(reader, connection):
                self.asked.append(asked)
                answer = self.script(asked)
                if answer.gate is not None:
                    await answer.gate.wait()
                for piece in answer.pieces:
                    writer.write(piece)
                    await writer.drain()
                if answer.on_hold is not None:
                    answer.on_hold()
                    await reader.read()
                if answer.is_closing:
                    break
        except ConnectionError:
            pass
        finally:
            writer.close()

    async def _next_request(self, reader: asyncio.StreamReader, connection: int) -> Asked | None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
        except asyncio.IncompleteReadError:
            return None
        request_line, *header_lines = head.strip().split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in header_lines)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        method, path, _ = request_line.split(" ")
        return Asked(method, path, headers, json.loads(body or b"{}"), len(self.posts), connection)


@contextmanager
def running(server: FakeServer) -> Iterator[FakeServer]:
    """Serve on a free port of the loopback until the block ends."""
    is_listening = threading.Event()
    stops: list[Callable[[], object]] = []

    async def serve() -> None:
        stopped = asyncio.Event()
        loop = asyncio.get_running_loop()
        stops.append(lambda: loop.call_soon_threadsafe(stopped.set))
        listener = await asyncio.start_server(server.converse, "127.0.0.1", 0)
        server.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        is_listening.set()
        await stopped.wait()
        listener.close()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    is_listening.wait()
    try:
        yield server
    finally:
        stops[0]()
        thread.join()


@pytest.fixture
def serve() -> Iterator[Callable[[Script], FakeServer]]:
    """Start a server that answers by the script; it stops with the test."""
    with ExitStack() as servers:
        yield lambda script: servers.enter_context(running(FakeServer(script)))


Serve = Callable[[Script], FakeServer]
Result = tuple[int, dict[str, Any], str]
Bench = Callable[..., Result]


@pytest.fixture
def run_bench(capsys: pytest.CaptureFixture[str]) -> Bench:
    """Run it in this process: exit code, the JSON of the last line of stdout, and all of stdout."""

    def run(*argv: str) -> Result:
        code = main(list(argv))
        out = capsys.readouterr().out
        return code, json.loads(out.splitlines()[-1]), out

    return run


def event(chunk: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n".encode()


def chunked(body: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(body), body)


def with_length(status: int, content: dict[str, Any]) -> Answer:
    body = json.dumps(content).encode()
    return Answer([b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body)])


def events_for(asked: Asked) -> list[bytes]:
    """Give the events of a healthy stream: two tokens in each, then usage, then the end marker."""
    num_tokens = asked.body["max_tokens"]
    messages = asked.body.get("messages")
    prompt = messages[0]["content"] if messages else asked.body["prompt"]
    events = [event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})] if messages else []
    for begin in range(0, num_tokens, 2):
        text = " é" * min(2, num_tokens - begin)
        events.append(event({"choices": [{"delta": {"content": text}} if messages else {"text": text}]}))
    template_tokens = 20 if messages else 1
    usage = {"prompt_tokens": template_tokens + len(prompt.split()), "completion_tokens": num_tokens}
    return [*events, event({"choices": [], "usage": usage}), DONE]


def healthy(asked: Asked) -> Answer:
    if asked.method == "GET":
        return with_length(200, {"data": [{"id": "first"}, {"id": "second"}]})
    return Answer([HEAD, *map(chunked, events_for(asked)), END], is_closing=asked.headers["connection"] == "close")


def going_wrong(faults: dict[int, Callable[[Asked], Answer]]) -> Script:
    """Answer well, but for the requests of a run with these numbers."""

    def script(asked: Asked) -> Answer:
        number = asked.number - NUM_CALIBRATING
        return faults.get(number, healthy)(asked) if asked.method == "POST" else healthy(asked)

    return script


def test_a_closed_loop_counts_every_request_of_every_width(serve: Serve, run_bench: Bench) -> None:
    server = serve(healthy)
    code, report, out = run_bench("--url", server.url, *QUICK, "--concurrency", "1,3", "--num-warmup", "2")
    assert code == 0
    assert report["schema"] == "headrace-bench/1"
    assert [(run["label"], run["width"], run["num_ok"]) for run in report["runs"]] == [
        ("1 stream", 1, 3),
        ("3 streams", 3, 9),
    ]
    assert len(server.posts) == NUM_CALIBRATING + 2 * 2 + 3 + 9
    for run in report["runs"]:
        assert (run["num_shed"], run["num_failed"], run["num_unfinished"], run["failures"]) == (0, 0, 0, {})
        assert run["output_tokens_mean"] == 8
        assert run["itl_ms"]["num_samples"] == run["num_ok"] * 3
        assert run["ttft_ms"]["num_samples"] == run["num_ok"]
        assert run["output_tokens_per_s"] > 0
        assert run["is_first_wave_counted"]
    assert "the first wave (3 prompts at once) is counted" in out


def test_requests_force_their_length_and_never_repeat_a_prompt(serve: Serve, run_bench: Bench) -> None:
    server = serve(healthy)
    run_bench("--url", server.url, *QUICK)
    prompts = [asked.body["prompt"] for asked in server.posts]
    assert len(set(prompts)) == len(prompts)
    measured = server.posts[NUM_CALIBRATING:]
    assert {asked.body["max_tokens"] for asked in measured} == {8}
    assert all(asked.body["ignore_eos"] is True and asked.body["temperature"] == 0 for asked in measured)
    assert all(asked.body["stream_options"] == {"include_usage": True} for asked in measured)


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_prompts_are_corrected_to_the_length_the_server_counts(serve: Serve, run_bench: Bench, endpoint: str) -> None:
    server = serve(healthy)
    _, report, _ = run_bench("--url", f"{server.url}/v1", *QUICK, "--endpoint", endpoint, "--prompt-tokens", "100")
    assert report["runs"][0]["prompt_tokens_mean"] == 100
    assert report["token_fit"]["overhead_tokens"] == (20 if endpoint == "chat" else 1)
    path = "/v1/chat/completions" if endpoint == "chat" else "/v1/completions"
    assert {asked.path for asked in server.posts} == {path}


def test_the_model_is_the_first_the_server_lists(serve: Serve, run_bench: Bench) -> None:
    server = serve(healthy)
    _, report, _ = run_bench("--url", server.url, *QUICK)
    assert report["model"] == "first"
    assert {asked.body["model"] for asked in server.posts} == {"first"}


@pytest.mark.parametrize("listing", [(404, {}), (200, {"data": []}), (200, {"models": 1})])
def test_where_the_server_lists_no_model_none_is_sent(
    serve: Serve, run_bench: Bench, listing: tuple[int, dict[str, Any]]
) -> None:
    server = serve(lambda asked: with_length(*listing) if asked.method == "GET" else healthy(asked))
    _, report, _ = run_bench("--url", server.url, *QUICK)
    assert report["model"] is None
    assert not any("model" in asked.body for asked in server.posts)


def test_a_named_model_and_a_key_are_sent_and_the_key_is_never_printed(serve: Serve, run_bench: Bench) -> None:
    server = serve(healthy)
    _, report, out = run_bench("--url", server.url, *QUICK, "--model", "mine", "--api-key", "sk-secret")
    assert {asked.body["model"] for asked in server.asked} == {"mine"}
    assert {asked.headers["authorization"] for asked in server.asked} == {"Bearer sk-secret"}
    assert "sk-secret" not in out
    assert report["settings"]["seed"] >= 0


@pytest.mark.parametrize(("flags", "num_connections"), [([], 1 + NUM_CALIBRATING + 3), (["--keep-alive"], 2)])
def test_connections_are_reused_only_when_asked_to(
    serve: Serve, run_bench: Bench, flags: list[str], num_connections: int
) -> None:
    server = serve(healthy)  # its answer to the one GET, the list of models, always closes
    code, report, _ = run_bench("--url", server.url, *QUICK, "--concurrency", "1", *flags)
    assert (code, report["runs"][0]["num_ok"]) == (0, 3)
    assert server.num_connections == num_connections


def test_an_idle_connection_that_the_server_closed_is_no_failure(serve: Serve, run_bench: Bench) -> None:
    answered: set[int] = set()

    def once_a_connection(asked: Asked) -> Answer:
        if asked.connection in answered:
            return Answer([])  # closes at the second request, as a server does whose idle time has just run out
        answered.add(asked.connection)
        return healthy(asked)

    server = serve(once_a_connection)
    code, report, _ = run_bench("--url", server.url, *QUICK, "--keep-alive")
    assert (code, report["runs"][0]["num_ok"], report["runs"][0]["num_failed"]) == (0, 6, 0)


def test_a_response_written_byte_by_byte_is_read_the_same(serve: Serve, run_bench: Bench) -> None:
    def dribbling(asked: Asked) -> Answer:
        whole = b"".join(healthy(asked).pieces)
        return Answer([whole[at : at + 1] for at in range(len(whole))])

    server = serve(dribbling)
    _, report, _ = run_bench("--url", server.url, *QUICK)
    assert report["runs"][0]["num_ok"] == 6
    assert report["runs"][0]["itl_ms"]["num_samples"] == 18


def test_failures_are_counted_by_kind_and_the_other_requests_go_on(serve: Serve, run_bench: Bench) -> None:
    def broken_off(num_events: int, *rest: bytes) -> Callable[[Asked], Answer]:
        return lambda asked: Answer([HEAD, *map(chunked, events_for(asked)[:num_events]), *rest])

    error = chunked(event({"error": {"message": "out of blocks", "type": "server_error"}}))
    server = serve(
        going_wrong(
            {
                0: lambda _: with_length(429, {"error": {"message": "overloaded"}}),
                1: lambda _: with_length(503, {"error": {"message": "draining"}}),
                2: lambda _: with_length(500, {"error": {"message": "bug"}}),
                3: broken_off(2),
                4: broken_off(2, error, END),
                5: broken_off(4, END),
                6: lambda _: Answer([b"what?\r\n\r\n"]),
                7: lambda _: Answer([HEAD, chunked(b"data: {\n\n"), chunked(DONE), END]),
                8: lambda _: Answer([HEAD, chunked(DONE), END]),
                9: lambda _: Answer([]),
            }
        )
    )
    code, report, out = run_bench("--url", server.url, *QUICK, "--concurrency", "2", "--requests-per-stream", "6")
    run = report["runs"][0]
    assert code == 0
    assert (run["num_counted"], run["num_ok"], run["num_shed"], run["num_failed"]) == (12, 2, 2, 8)
    assert run["failures"] == {
        "http_429": 1,
        "http_503": 1,
        "http_500": 1,
        "cut": 2,
        "error_event": 1,
        "no_done": 1,
        "bad_http": 1,
        "bad_event": 1,
        "no_text": 1,
    }
    assert "out of blocks" in run["failure_examples"]["error_event"]
    assert run["ttft_ms"]["num_samples"] == 2
    assert (run["goodput"]["share_of_answered"], run["goodput"]["share_of_all"]) == (0.2, round(2 / 12, 4))
    assert "1 x http_500, the first: " in out


def test_no_success_is_exit_code_one_and_still_a_report(serve: Serve, run_bench: Bench) -> None:
    faults = dict.fromkeys(range(6), lambda _: with_length(500, {"error": {"message": "bug"}}))
    server = serve(going_wrong(faults))
    code, report, _ = run_bench("--url", server.url, *QUICK)
    assert code == 1
    assert report["runs"][0]["num_failed"] == 6
    assert report["runs"][0]["ttft_ms"] is None


def test_a_first_wave_that_is_not_counted_is_told(serve: Serve, run_bench: Bench) -> None:
    server = serve(healthy)
    _, report, out = run_bench("--url", server.url, *QUICK, "--exclude-first-wave")
    run = report["runs"][0]
    assert (run["num_launched"], run["num_counted"], run["is_first_wave_counted"]) == (6, 4, False)
    assert "the first wave (2 prompts at once) is not counted" in out


def test_an_output_shorter_than_asked_is_told(serve: Serve, run_bench: Bench) -> None:
    def lazy(asked: Asked) -> Answer:
        if asked.method == "GET":
            return healthy(asked)
        asked.body["max_tokens"] = 2
        return healthy(asked)

    server = serve(lazy)
    _, report, out = run_bench("--url", server.url, *QUICK, "--no-ignore-eos")
    assert not any("ignore_eos" in asked.body for asked in server.posts)
    assert report["runs"][0]["output_tokens_mean"] == 2
    assert "SHORTER than the 8.00 asked" in out


def test_without_usage_lengths_are_words_and_events_and_it_is_told(serve: Serve, run_bench: Bench) -> None:
    def silent(asked: Asked) -> Answer:
        events = [each for each in events_for(asked) if b"usage" not in each]
        return Answer([HEAD, *map(chunked, events), END])

    server = serve(lambda asked: healthy(asked) if asked.method == "GET" else silent(asked))
    code, report, out = run_bench("--url", server.url, *QUICK)
    assert code == 0
    assert report["token_fit"] is None
    assert report["runs"][0]["num_ok_without_usage"] == 6
    assert "the server sends no usage" in out


def test_usage_on_every_chunk_gives_exact_gaps_per_token(serve: Serve, run_bench: Bench) -> None:
    def continuous(asked: Asked) -> Answer:
        def chunk(num_tokens: int) -> bytes:
            usage = {"prompt_tokens": 9, "completion_tokens": num_tokens}
            return chunked(event({"choices": [{"text": " a"}], "usage": usage}))

        return Answer([HEAD, *map(chunk, (1, 4, 8)), chunked(DONE), END])

    server = serve(lambda asked: healthy(asked) if asked.method == "GET" else continuous(asked))
    _, report, _ = run_bench("--url", server.url, *QUICK, "--continuous-usage")
    assert server.posts[-1].body["stream_options"]["continuous_usage_stats"] is True
    assert report["runs"][0]["itl_ms"]["num_samples"] == 6 * 2
    assert report["runs"][0]["itl_per_token_ms"]["num_samples"] == 6 * 7


def test_a_poisson_load_launches_every_arrival_without_waiting_for_another(serve: Serve, run_bench: Bench) -> None:
    num_arrivals = 20
    all_have_arrived = asyncio.Event()

    def all_at_once(asked: Asked) -> Answer:
        if asked.number == NUM_CALIBRATING + num_arrivals - 1:
            all_have_arrived.set()
        is_measured = asked.method == "POST" and asked.number >= NUM_CALIBRATING
        return replace(healthy(asked), gate=all_have_arrived if is_measured else None)

    server = serve(all_at_once)
    flags = ["--rate", "1000", "--duration-s", "5", "--max-requests", str(num_arrivals), "--num-warmup", "0"]
    code, report, out = run_bench("--url", server.url, *flags, "--output-tokens", "8", "--seed", "7")
    run = report["runs"][0]
    assert code == 0
    assert (run["label"], run["width"], run["num_planned"], run["num_ok"]) == ("1000 req/s", None, 20, 20)
    assert run["lateness_ms"]["num_samples"] == 20
    assert run["offered_requests_per_s"] > 0
    assert "generator lateness p99" in out
    assert (report["settings"]["mode"], report["settings"]["seed"]) == ("poisson", 7)


def test_a_trace_is_replayed_with_its_own_lengths(serve: Serve, run_bench: Bench, tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:00:00.0,40,4\n2023-11-16 18:00:10.0,900,2\n2023-11-16 18:00:30.0,60,12\n"
    )
    server = serve(healthy)
    flags = ["--trace", str(trace), "--trace-rate", "100", "--trace-scale", "2", "--num-warmup", "0"]
    code, report, _ = run_bench("--url", server.url, *flags)
    measured = server.posts[NUM_CALIBRATING:]
    assert code == 0
    assert [asked.body["max_tokens"] for asked in measured] == [8, 4, 24]
    assert [len(asked.body["prompt"].split()) + 1 for asked in measured] == [80, 1800, 120]
    assert report["settings"] | {"trace": str(trace), "trace_rate": 100.0, "trace_scale": 2.0} == report["settings"]


def test_ctrl_c_prints_what_has_finished(serve: Serve, run_bench: Bench) -> None:
    # A shell's background job is started with the signal ignored, and its children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def press_ctrl_c() -> None:
        os.kill(os.getpid(), signal.SIGINT)

    server = serve(going_wrong({2: lambda _: Answer([HEAD], on_hold=press_ctrl_c)}))
    code, report, out = run_bench("--url", server.url, *QUICK, "--concurrency", "1")
    run = report["runs"][0]
    assert code == 130
    assert report["is_interrupted"]
    assert (run["num_ok"], run["num_unfinished"]) == (2, 1)
    assert "interrupted" in out


def test_the_time_limit_ends_a_run_and_prints_what_has_finished(
    serve: Serve, run_bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    expire: list[Callable[[], object]] = []

    def limited(_limit_s: float) -> asyncio.Timeout:
        loop = asyncio.get_running_loop()
        limit = asyncio.Timeout(None)
        expire.append(lambda: loop.call_soon_threadsafe(limit.reschedule, 0.0))
        return limit

    monkeypatch.setattr(asyncio, "timeout", limited)
    server = serve(going_wrong({1: lambda _: Answer([HEAD], on_hold=lambda: expire[0]())}))
    code, report, _ = run_bench("--url", server.url, *QUICK, "--concurrency", "1,2")
    assert code == 0
    assert report["is_time_limited"]
    assert [run["label"] for run in report["runs"]] == ["1 stream"]
    run = report["runs"][0]
    assert (run["num_planned"], run["num_launched"], run["num_ok"], run["num_unfinished"]) == (3, 2, 1, 1)


def complaint(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Run it to exit code 2 with nothing on stdout; the one line of stderr."""
    assert main(list(argv)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("headrace bench: ")
    return line


def test_an_unreachable_server_is_one_line_and_exit_code_two(capsys: pytest.CaptureFixture[str]) -> None:
    with running(FakeServer(healthy)) as stopped:
        pass
    assert "cannot reach 127.0.0.1:" in complaint(capsys, "--url", stopped.url)
    assert "connect" in complaint(capsys, "--url", stopped.url, "--model", "mine")


def test_a_server_that_refuses_the_first_request_is_told_by_its_own_words(
    serve: Serve, capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve(lambda _: with_length(401, {"error": {"message": "no key"}}))
    line = complaint(capsys, "--url", server.url)
    assert "http_401" in line
    assert "no key" in line


def test_a_server_that_never_answers_is_told_when_the_time_limit_is_over(
    serve: Serve, capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve(lambda _: Answer([], on_hold=lambda: None))
    assert "did not answer within --time-limit-s" in complaint(capsys, "--url", server.url, "--time-limit-s", "0.01")


@pytest.mark.parametrize(
    "argv",
    [
        ["--concurrency", "x"],
        ["--trace", "no/such/file.csv"],
        ["--rate", "0.001", "--duration-s", "0.001"],
        ["--plot", "chart.pdf"],
        ["--plot", "no/such/folder/chart.svg"],
    ],
)
def test_wrong_use_is_one_line_and_exit_code_two(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert argv[0] in complaint(capsys, *argv)


def test_a_plot_without_matplotlib_is_refused_before_anything_is_sent(
    serve: Serve, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    server = serve(healthy)
    assert "needs matplotlib" in complaint(capsys, "--url", server.url, "--plot", "chart.svg")
    assert server.asked == []


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is optional")
@pytest.mark.parametrize("flags", [QUICK, ("--rate", "1000", "--max-requests", "9", "--output-tokens", "8")])
@pytest.mark.parametrize("name", ["chart.svg", "chart.png"])
def test_a_plot_is_written_in_the_format_of_its_name(
    serve: Serve, run_bench: Bench, tmp_path: Path, flags: tuple[str, ...], name: str
) -> None:
    server = serve(going_wrong({0: lambda _: with_length(429, {})}))
    code, _, _ = run_bench("--url", server.url, *flags, "--num-warmup", "0", "--plot", str(tmp_path / name))
    assert code == 0
    assert (tmp_path / name).read_bytes().startswith(b"\x89PNG" if name.endswith("png") else b"<?xml")
