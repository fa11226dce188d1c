"""What Ray Serve between client and server costs: `python -m headrace.benchmarks.ray_overhead`.

A server, and a deployment of one replica beside it, each on an engine that computes nothing and gives every stream a
token on the beat. A token says when it was made (its number is the time, as far as a vocabulary goes), and clocks of
one machine agree, so an event's delay is known when it arrives. The sides take turns. The figures are of one event: its
delay, and the CPU time of all processes of a side beyond what they take while nothing streams; and how long a request
takes that needs no model. Prints a table, and as the last line of stdout one JSON object.
"""

import argparse
import json
import re
import selectors
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from headrace.benchmarks.http_bench import PacedRunner
from headrace.scheduler.block_pool import BlockPool
from headrace.scheduler.engine_core import ComputedStep
from headrace.scheduler.messages import RowResult
from headrace.scheduler.model_source import resolve_model
from headrace.scheduler.scheduler import Scheduler, SchedulerOutput
from headrace.server.deployment_settings import load_deployment_settings
from headrace.server.serve import serve
from headrace.server.tokenizer import load_tokenizer

_STEP_S = 0.02
_TICK_S = 1e-4  # what two tokens that follow each other are apart
_MAX_STREAMS = 256
_MAX_TOKENS = 4000
_VOCAB_SIZE = 49_152  # the demo model's
_SETTLING_S = 1.0
_NUM_REQUESTS = 100
_TOKEN_IDS = re.compile(rb'"token_ids":\[([\d,]+)\]')
_READY = {"serve": "try: curl", "deploy": "replicas are ready"}


@cache
def words() -> tuple[int, ...]:
    """The tokens that tell time: those that are words, of which no text is held back."""
    tokenizer = load_tokenizer(resolve_model(None))
    texts = ((id, tokenizer.decode([id])) for id in range(_VOCAB_SIZE))
    return tuple(id for id, text in texts if text.isascii() and text.strip().isalpha())


class StampingRunner(PacedRunner):
    """Every row's next token is the time at the end of the step."""

    def launch(self, output: SchedulerOutput) -> ComputedStep:
        times = super().launch(output).times
        token_id = words()[int(time.monotonic() / _TICK_S) % len(words())]
        return ComputedStep([RowResult(token_id) if row.is_sampled else RowResult() for row in output.rows], times)


def load_engine() -> tuple[Scheduler, StampingRunner]:
    pool = BlockPool(_MAX_STREAMS * _MAX_TOKENS // 16 * 2)
    scheduler = Scheduler(pool, block_size=16, max_num_batched_tokens=1024, max_num_seqs=_MAX_STREAMS)
    return scheduler, StampingRunner(words()[:1], _VOCAB_SIZE, 2 * _MAX_TOKENS, _STEP_S)


@dataclass(frozen=True, slots=True)
class Reading:
    """One stretch of steady streaming on one side. Delays are of events, in milliseconds."""

    side: str
    num_streams: int
    num_tokens: int
    num_events: int
    delay_ms: float
    delay_p99_ms: float
    cpu_us_per_event: float


@dataclass(frozen=True, slots=True)
class Side:
    """A server, or a deployment with all its processes."""

    name: str
    process: "subprocess.Popen[str]"
    port: int

    def cpu_s(self) -> float:
        """Seconds of CPU so far, by the scheduler's own books, of all its processes."""
        seconds = 0.0
        for pid in _descendants(self.process.pid):
            with suppress(FileNotFoundError, ProcessLookupError):  # it has ended
                for task in Path(f"/proc/{pid}/task").iterdir():
                    with suppress(FileNotFoundError, ProcessLookupError):
                        seconds += int((task / "schedstat").read_text().split()[0]) / 1e9
        return seconds

    def idle_cpu_share(self, seconds: float) -> float:
        """What it takes of a core while nothing streams."""
        before_s = self.cpu_s()
        time.sleep(seconds)
        return (self.cpu_s() - before_s) / seconds

    def request_ms(self) -> float:
        """How long a request takes that needs no model."""
        times = []
        for _ in range(_NUM_REQUESTS):
            began_s = time.monotonic()
            urllib.request.urlopen(f"http://127.0.0.1:{self.port}/version", timeout=30).read()
            times.append(time.monotonic() - began_s)
        return 1e3 * statistics.median(times)

    def read(self, num_streams: int, seconds: float, idle_share: float) -> Reading:
        """Open streams, let them settle, and read them for a while."""
        with selectors.DefaultSelector() as selector, ExitStack() as stack:
            body = json.dumps(
                {
                    "prompt": "The mill",
                    "max_tokens": _MAX_TOKENS,
                    "ignore_eos": True,
                    "stream": True,
                    "return_token_ids": True,
                }
            ).encode()
            head = "POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
            for _ in range(num_streams):
                connection = stack.enter_context(socket.create_connection(("127.0.0.1", self.port)))
                connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
                selector.register(connection, selectors.EVENT_READ)
            _delays(selector, _SETTLING_S)
            before_s = self.cpu_s()
            num_events, delays = _delays(selector, seconds)
            cpu_s = self.cpu_s() - before_s - idle_share * seconds
        if not delays:
            raise SystemExit(f"ray_overhead: {self.name} streams nothing")
        p99 = sorted(delays)[int(0.99 * len(delays))]
        cpu_us = 1e6 * cpu_s / num_events
        return Reading(self.name, num_streams, len(delays), num_events, statistics.median(delays), p99, cpu_us)


def _delays(selector: selectors.BaseSelector, seconds: float) -> tuple[int, list[float]]:
    """Read for so long: how many events came, and in milliseconds how long ago each of their tokens was made."""
    places = {id: place for place, id in enumerate(words())}
    num_events, delays, end_s = 0, list[float](), time.monotonic() + seconds
    while (left_s := end_s - time.monotonic()) > 0:
        for key, _ in selector.select(left_s):
            assert isinstance(key.fileobj, socket.socket)
            received = key.fileobj.recv(1 << 16)
            now = int(time.monotonic() / _TICK_S)
            if not received:
                raise SystemExit("ray_overhead: a stream has ended")
            for found in _TOKEN_IDS.findall(received):
                num_events += 1
                made = [places[int(token_id)] for token_id in found.split(b",")]
                delays += [(now - tick) % len(places) * _TICK_S * 1e3 for tick in made]
    return num_events, delays


def _descendants(pid: int) -> list[int]:
    """A process, and all that it has started, theirs too."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    found = [pid]
    for each in found:
        found += children.get(each, [])
    return found


@contextmanager
def _running(name: str) -> Iterator[Side]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "headrace.benchmarks.ray_overhead", "--run", name, "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            assert process.stdout is not None
            output = []
            for line in process.stdout:
                output.append(line)
                if _READY[name] in line:
                    break
            else:
                raise SystemExit(f"ray_overhead: {name} did not start\n{''.join(output)}")
            yield Side(name, process, port)
        finally:
            process.terminate()
            process.communicate(timeout=120)


def _run(name: str, port: int) -> int:
    flags = ["--port", str(port), "--log-level", "warning", "--ttft-targets-s", "[1e6,1e6,1e6]", "--drain-grace-s", "0"]
    settings = load_deployment_settings(flags, {})
    if name == "serve":
        words()  # before there are threads: two of them cannot load from transformers at once
        return serve(settings, load_engine)
    from headrace.benchmarks.ray_replica import StampingReplica
    from headrace.server.ray_serve import deploy

    return deploy(settings, StampingReplica)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="ray_overhead", description=__doc__.partition("\n")[0])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=5, help="of each reading")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--run", choices=list(_READY), help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.run is not None:
        return _run(options.run, options.port)
    readings: list[Reading] = []
    with ExitStack() as stack:
        sides = [stack.enter_context(_running(name)) for name in _READY]
        idle = {side.name: side.idle_cpu_share(options.seconds) for side in sides}
        request_ms = {side.name: side.request_ms() for side in sides}
        for _ in range(options.rounds):
            for num_streams in options.streams:
                readings += [side.read(num_streams, options.seconds, idle[side.name]) for side in sides]
    for name in _READY:
        print(f"{name}: a request without a model {request_ms[name]:.1f} ms, idle {100 * idle[name]:.1f} % of a core")
    print("streams  side     tokens/s  events/s  delay ms     p99  CPU us/event")
    for num_streams in options.streams:
        for name in _READY:
            found = [each for each in readings if (each.num_streams, each.side) == (num_streams, name)]
            rates = [
                statistics.median(counts) / options.seconds
                for counts in zip(*((e.num_tokens, e.num_events) for e in found), strict=True)
            ]
            medians = [
                statistics.median(values)
                for values in zip(*((e.delay_ms, e.delay_p99_ms, e.cpu_us_per_event) for e in found), strict=True)
            ]
            print(f"{num_streams:7} {name:7} {rates[0]:9.0f} {rates[1]:9.0f}", end="")
            print(f" {medians[0]:9.2f} {medians[1]:7.2f} {medians[2]:13.0f}")
    print(json.dumps({"idle_share": idle, "request_ms": request_ms, "readings": [asdict(each) for each in readings]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
