"""What a token costs on its way out, and what streams cost the engine: `python -m headrace.benchmarks.http_bench`.

The whole server but for the model: a fake engine gives every stream a token per step, at a fixed rate of steps, and
the real event loop detokenizes, encodes and writes them to real sockets. The measured figure is the CPU time of the
server's process (both its threads) per token. With `--engine model` the demo model computes as fast as it can. Of both
are shown how late the event loop is, how long the engine computes nothing between two steps, and how long it waits for
the interpreter's lock. Clients are one process that only reads and counts. Prints a table, and as the last line of
stdout one JSON object.
"""

import argparse
import itertools
import json
import selectors
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from headrace.kernels.step_times import StepTimes
from headrace.scheduler.block_pool import BlockPool
from headrace.scheduler.engine_core import ComputedStep
from headrace.scheduler.messages import RowResult
from headrace.scheduler.model_source import resolve_model
from headrace.scheduler.scheduler import Scheduler, SchedulerOutput
from headrace.scheduler.step_time import StepShape
from headrace.scheduler.step_tracer import StepTracer
from headrace.server.serve import serve
from headrace.server.settings import load_settings
from headrace.server.tokenizer import load_tokenizer

_GOAL_US = 20.0
_TOKENS = "headrace_generation_tokens_total"
_WAITS = ("event_loop_lag", "engine_step_gap", "engine_lock_wait")
_SETTLING_S = 1.0
_READ_INTERVAL_S = 0.004
_BLOCK_SIZE = 16
_PROMPT_TOKENS = 64  # more than there are
_VOCAB_SIZE, _MODEL_TOKENS = 49_152, 8_000  # the demo model's; what fits its context behind the prompt


class PacedRunner:
    """A fake model: each step ends on the beat, and every row's next token is one of a fixed round of words."""

    description = "no model, a token per stream and beat"
    gpu_uuid: str | None = None
    is_asynchronous = False

    def __init__(self, token_ids: Sequence[int], vocab_size: int, max_context_tokens: int, step_s: float) -> None:
        self.vocab_size = vocab_size
        self.max_context_tokens = max_context_tokens
        self.tracer = StepTracer()
        self._results = itertools.cycle([RowResult(token_id) for token_id in token_ids])
        self._step_s = step_s
        self._due_s = 0.0

    def warm_up(self) -> list[tuple[StepShape, float]]:
        return []

    def use_idle_time(self) -> bool:
        return False

    def watch(self, on_loss: Callable[[], None]) -> None:
        pass

    def recover(self) -> None:
        pass

    def launch(self, output: SchedulerOutput) -> ComputedStep:
        now = time.monotonic()
        self._due_s = max(self._due_s + self._step_s, now)  # a late step delays those behind it
        time.sleep(self._due_s - now)
        times = StepTimes(now, self._due_s, time.monotonic() - self._due_s)  # with what the sleep was too long
        return ComputedStep([next(self._results) if row.is_sampled else RowResult() for row in output.rows], times)


@dataclass(frozen=True, slots=True)
class Reading:
    """One stretch of steady streaming. CPU in seconds, by thread; `num_tokens` by the server's own counter.

    Of each wait, by the server's own histograms, the mean and the upper end of the bucket that the p99 falls into.
    """

    wall_s: float
    num_tokens: int
    num_events: int
    num_bytes: int
    cpu_s: dict[str, float]
    mean_s: dict[str, float]
    p99_s: dict[str, float]

    @property
    def us_per_token(self) -> float:
        return 1e6 * sum(self.cpu_s.values()) / self.num_tokens


@dataclass(slots=True)
class Readers:
    """So many streams, read as fast as they come."""

    port: int
    num_streams: int
    num_events: int = 0
    num_bytes: int = 0
    _sockets: list[socket.socket] = field(default_factory=list)
    _selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)

    def open(self, path: str, body: dict[str, object]) -> None:
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        for _ in range(self.num_streams):
            connection = socket.create_connection(("127.0.0.1", self.port))
            connection.sendall(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
            connection.setblocking(False)
            self._sockets.append(connection)
            self._selector.register(connection, selectors.EVENT_READ, "nothing was read yet")

    def read_for(self, seconds: float) -> None:
        """Read and count. Raises: ConnectionError where the server refuses a stream or ends it.

        By the clock: a reader that sleeps until something comes would be woken at the server's expense, as no client
        on another machine is.
        """
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            time.sleep(_READ_INTERVAL_S)
            for key, _ in self._selector.select(0):
                assert isinstance(key.fileobj, socket.socket)
                received = key.fileobj.recv(1 << 16)
                if key.data and not received.startswith(b"HTTP/1.1 200"):
                    raise ConnectionError(f"the server refused a stream: {received[:200]!r}")
                if key.data:
                    self._selector.modify(key.fileobj, selectors.EVENT_READ, None)
                if not received or received.endswith(b"\r\n0\r\n\r\n"):
                    raise ConnectionError("the server ended a stream")
                self.num_bytes += len(received)
                self.num_events += received.count(b"\n\n")

    def close(self) -> None:
        for connection in self._sockets:
            connection.close()
        self._selector.close()


@dataclass(slots=True)
class Server:
    """A server in a process of its own."""

    process: "subprocess.Popen[str]"
    port: int

    def metrics(self) -> dict[str, float]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=30) as response:
            lines = response.read().decode().splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}

    def cpu_s(self) -> dict[str, float]:
        """Seconds of CPU so far, of the event loop's thread and of the engine's (with the idle rest).

        From the scheduler's own books: /proc/PID/stat is sampled by the timer's tick, which steps can be in beat with.
        """
        seconds = {"loop": 0.0, "engine": 0.0}
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            part = "loop" if int(task.name) == self.process.pid else "engine"
            with suppress(FileNotFoundError, ProcessLookupError):  # it has ended
                seconds[part] += int((task / "schedstat").read_text().split()[0]) / 1e9
        return seconds


@contextmanager
def _serving(*flags: str) -> Iterator[Server]:
    command = [sys.executable, "-m", "headrace.benchmarks.http_bench", "serve", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            port = 0
            for line in process.stdout:
                if "listening on" in line:
                    port = int(line.rpartition(":")[2])
                if "try: curl" in line:
                    yield Server(process, port)
                    break
            else:
                raise SystemExit("http_bench: the server did not start")
        finally:
            process.terminate()
            process.communicate(timeout=60)


def _measure(server: Server, readers: Readers, seconds: float) -> Reading:
    began_s, before, cpu_before_s = time.monotonic(), server.metrics(), server.cpu_s()
    num_events, num_bytes = readers.num_events, readers.num_bytes
    readers.read_for(seconds)
    cpu_after_s, after, ended_s = server.cpu_s(), server.metrics(), time.monotonic()
    return Reading(
        wall_s=ended_s - began_s,
        num_tokens=int(after[_TOKENS] - before[_TOKENS]),
        num_events=readers.num_events - num_events,
        num_bytes=readers.num_bytes - num_bytes,
        cpu_s={part: cpu_after_s[part] - cpu_before_s[part] for part in cpu_after_s},
        mean_s={name: _mean(before, after, f"headrace_{name}_seconds") for name in _WAITS},
        p99_s={name: _percentile(before, after, f"headrace_{name}_seconds", 0.99) for name in _WAITS},
    )


def _mean(before: dict[str, float], after: dict[str, float], name: str) -> float:
    return (after[f"{name}_sum"] - before[f"{name}_sum"]) / (after[f"{name}_count"] - before[f"{name}_count"])


def _percentile(before: dict[str, float], after: dict[str, float], name: str, share: float) -> float:
    """The upper end of the bucket that it falls into, of what was observed in between."""
    prefix = f'{name}_bucket{{le="'
    buckets = {key: after[key] - before[key] for key in after if key.startswith(prefix)}
    num_observed = after[f"{name}_count"] - before[f"{name}_count"]
    return min(float(key[len(prefix) : -2]) for key, count in buckets.items() if count >= share * num_observed)


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="http_bench", description=__doc__.partition("\n")[0])
    parser.add_argument("--engine", choices=["fake", "model"], default="fake")
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument(
        "--rate", type=float, default=25_000, help="the fake engine's tokens per second, of all streams"
    )
    parser.add_argument("--seconds", type=float, default=5, help="of each reading")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--route", choices=["completions", "chat/completions"], default="completions")
    if argv[:1] == ["serve"]:
        return _serve(parser.parse_args(argv[1:]))
    options = parser.parse_args(argv)
    max_tokens = _num_tokens(options) if options.engine == "fake" else _MODEL_TOKENS
    body: dict[str, object] = {"max_tokens": max_tokens, "ignore_eos": True, "stream": True}
    if options.route == "completions":
        body["prompt"] = "Once upon a time"
    else:
        body["messages"] = [{"role": "user", "content": "Tell me a story."}]
    with ExitStack() as stack:
        server = stack.enter_context(_serving(*argv))
        readers = Readers(server.port, options.streams)
        stack.callback(readers.close)
        readers.open(f"/v1/{options.route}", body)
        readers.read_for(_SETTLING_S)
        readings = [_measure(server, readers, options.seconds) for _ in range(options.rounds)]
    print(
        " tokens/s  tokens/event  bytes/event  us/token    loop  engine | mean, p99 ms: loop lag, step gap, lock wait"
    )
    for reading in readings:
        parts = [f"{1e6 * cpu_s / reading.num_tokens:7.2f}" for cpu_s in reading.cpu_s.values()]
        print(
            f"{reading.num_tokens / reading.wall_s:9.0f} {reading.num_tokens / reading.num_events:13.2f} "
            f"{reading.num_bytes / reading.num_events:12.0f} {reading.us_per_token:9.2f} {' '.join(parts)} |"
            + "".join(f"{1e3 * reading.mean_s[name]:7.2f}{1e3 * reading.p99_s[name]:6.2f}" for name in _WAITS)
        )
    median_us = statistics.median(reading.us_per_token for reading in readings)
    if options.engine == "fake":
        print(f"median {median_us:.2f} us of CPU per token event (goal {_GOAL_US:g})")
    result = {"settings": vars(options), "readings": [asdict(r) for r in readings], "us_per_token": median_us}
    print(json.dumps(result))
    return 0


def _num_tokens(options: argparse.Namespace) -> int:
    """More than a stream of the fake engine gets while it is measured."""
    return int(options.rate / options.streams * (_SETTLING_S + options.rounds * options.seconds + 30))


def _serve(options: argparse.Namespace) -> int:
    flags = ["--port", "0", "--log-level", "warning", "--ttft-targets-s", "[1e6,1e6,1e6]"]  # every request is let in
    settings = load_settings(flags, {})
    if options.engine == "model":
        return serve(settings)
    text = " The mill stands by the river, and its wheel has not stopped once since the day it was built."
    num_tokens = _PROMPT_TOKENS + _num_tokens(options)
    token_ids = load_tokenizer(resolve_model(None)).encode(text, add_special_tokens=False)

    def load() -> tuple[Scheduler, PacedRunner]:
        scheduler = Scheduler(
            BlockPool(options.streams * -(-num_tokens // _BLOCK_SIZE)),
            block_size=_BLOCK_SIZE,
            max_num_batched_tokens=max(1024, 4 * options.streams),
            max_num_seqs=options.streams,
        )
        return scheduler, PacedRunner(token_ids, _VOCAB_SIZE, num_tokens, options.streams / options.rate)

    return serve(settings, load)


if __name__ == "__main__":
    sys.exit(main())
