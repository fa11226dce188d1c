"""What a request, a token and a replica cost those who stand in front of a fleet, measured here, and where each ends.

`measure` takes the costs of one of each: a router's decision by a policy of `routing`, a replica's gauges rendered
and read, an event relayed, an open stream, a piece of a prompt that a router remembers, a token in the journal.
`breaking_points` multiplies them with the rates of a replica and finds how many replicas fill a bound. CPU times are
the measuring thread's own.
"""

import asyncio
import math
import os
import random
import socket
import tempfile
import threading
import time
import tracemalloc
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import uvloop
from prometheus_client.parser import text_string_to_metric_families

from headrace.benchmarks.routing import POLICIES, Gauges
from headrace.benchmarks.simulated_server import CostModel, Job, ServerSettings, SimulatedServer
from headrace.scheduler.messages import FinishReason, SamplingParams, SequenceOutput
from headrace.server.generation import Recipe
from headrace.server.journal import Journal
from headrace.server.journal_rows import StreamRecord
from headrace.server.replica_routing import PIECE_BYTES, PIECE_TOKENS, PromptKey, ReplicaLoad, ReplicaRouting

_NUM_DECISIONS = 2000
_PIECES_PER_REPLICA = 1024
_REQUESTS_PER_REPLICA = 10
_PIECES_PER_PROMPT = 8
_NUM_RELAYED = 200
_NUM_BEATS = 200
_EVENT = b"x" * 220
_NUM_JOURNALED = 64
_NUM_JOURNAL_STEPS = 40
_GIGABIT_BYTES = 125e6
_GIBI = 2.0**30


@dataclass(frozen=True, slots=True)
class UnitCosts:
    """`decision_s` by policy, then by how many replicas there are. Of /metrics: rendering it, its size, how many series
    it has, and reading it. An event that is passed on, memory of a stream that is, and of a prompt's piece; what of a
    token is written to a journal."""

    decision_s: Mapping[str, Mapping[int, float]]
    render_s: float
    metrics_bytes: int
    num_series: int
    parse_s: float
    relay_s: float
    relay_bytes: float
    piece_bytes: float
    journal_bytes: float


@dataclass(frozen=True, slots=True)
class Rates:
    """Of a replica: turns and tokens per second, open streams, pieces of prompts that it may hold, and the seconds
    between two scrapes."""

    turns_per_s: float
    tokens_per_s: float
    num_streams: float
    num_pieces: float
    interval_s: float


@dataclass(frozen=True, slots=True)
class BreakingPoint:
    """`used` is the share of the bound that so many replicas use; `num_replicas` use all of it."""

    what: str
    unit: str
    bound: str
    used: Mapping[int, float]
    num_replicas: float


def measure(counts: Sequence[int]) -> UnitCosts:
    """Take half a minute; `counts` are of replicas."""
    render_s, body = _rendering()
    parse_s = _median_s(lambda: list(text_string_to_metric_families(body.decode())), 9)
    relay_s, relay_bytes = _relaying()
    return UnitCosts(
        {policy: {count: _decision_s(policy, count) for count in counts} for policy in POLICIES},
        render_s,
        len(body),
        sum(not line.startswith(b"#") for line in body.splitlines()),
        parse_s,
        relay_s,
        relay_bytes,
        _piece_bytes(),
        _journal_bytes(),
    )


def breaking_points(costs: UnitCosts, rates: Rates, counts: Sequence[int]) -> list[BreakingPoint]:
    """What fills its bound as replicas are added, the first of them first."""
    scrapes_per_s = 1 / rates.interval_s
    points = []

    def add(what: str, unit: str, bound: str, used: Callable[[float], float]) -> None:
        points.append(BreakingPoint(what, unit, bound, {count: used(count) for count in counts}, _fills(used)))

    for policy in ("round robin", "prefix-aware", "headrace"):
        constant_s, replica_s = _line(costs.decision_s[policy])

        def decide(count: float, constant_s: float = constant_s, replica_s: float = replica_s) -> float:
            return rates.turns_per_s * count * (constant_s + replica_s * count)

        most = max(costs.decision_s[policy])
        unit = f"{costs.decision_s[policy][most] * 1e6:.2g} us at {most:,}"
        add(f"a router's decisions, {policy}", unit, "a core", decide)
    add(
        "tokens passed on by a router",
        f"{costs.relay_s * 1e6:.1f} us",
        "a core",
        lambda count: rates.tokens_per_s * count * costs.relay_s,
    )
    add(
        "gauges read by a router",
        f"{costs.parse_s * 1e3:.1f} ms",
        "a core",
        lambda count: scrapes_per_s * count * costs.parse_s,
    )
    add(
        "a replica's gauges, a router per 100 replicas",
        f"{costs.render_s * 1e3:.1f} ms",
        "a tenth of its event loop",
        lambda count: 10 * scrapes_per_s * costs.render_s * math.ceil(count / 100),
    )
    add(
        "gauges on the network",
        f"{costs.metrics_bytes / 1e3:.0f} kB, {costs.num_series} series",
        "1 Gbit/s",
        lambda count: scrapes_per_s * count * costs.metrics_bytes / _GIGABIT_BYTES,
    )
    add(
        "open streams in a router",
        f"{costs.relay_bytes / 1e3:.1f} kB",
        "1 GiB",
        lambda count: rates.num_streams * count * costs.relay_bytes / _GIBI,
    )
    add(
        "the prompts that a router remembers",
        f"{costs.piece_bytes:.0f} bytes a piece",
        "1 GiB",
        lambda count: rates.num_pieces * count * costs.piece_bytes / _GIBI,
    )
    add(
        "a journal on one shared disk",
        f"{costs.journal_bytes:.0f} bytes a token",
        "500 MB/s",
        lambda count: rates.tokens_per_s * count * costs.journal_bytes / 500e6,
    )
    return sorted(points, key=lambda point: point.num_replicas)


def _fills(used: Callable[[float], float]) -> float:
    """How many replicas use all of a bound, by bisection; infinite where a million do not."""
    low, high = 0.0, 1e6
    if used(high) < 1:
        return math.inf
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if used(middle) < 1 else (low, middle)
    return high


def _line(points: Mapping[int, float]) -> tuple[float, float]:
    """(At none, for each more), through the least and the most."""
    least, most = min(points), max(points)
    slope = max(0.0, (points[most] - points[least]) / max(1, most - least))
    return points[least] - slope * least, slope


def _median_s(call: Callable[[], object], num_times: int) -> float:
    seconds = []
    for _ in range(num_times):
        began_s = time.thread_time()
        call()
        seconds.append(time.thread_time() - began_s)
    return sorted(seconds)[num_times // 2]


def _prompt(number: int) -> PromptKey:
    first = number * _PIECES_PER_PROMPT
    pieces = tuple((first + i).to_bytes(8) for i in range(_PIECES_PER_PROMPT))
    return PromptKey(PIECE_BYTES * _PIECES_PER_PROMPT, pieces)


def _decision_s(policy: str, num_replicas: int) -> float:
    """With what replicas can hold, half of the prompts known, and up to ten requests each."""
    draws = random.Random(1)
    gauges = Gauges(num_replicas, counts_sent=True)
    num_tokens = _PIECES_PER_REPLICA * PIECE_TOKENS
    for replica in range(num_replicas):
        gauges.hear(replica, draws.randrange(20), ReplicaLoad(1, draws.random(), 1000.0, num_tokens))
    router = POLICIES[policy](gauges, draws)
    num_known = num_replicas * _PIECES_PER_REPLICA // _PIECES_PER_PROMPT
    for number in range(num_known):
        router.note_cached(number % num_replicas, _prompt(number))
    prompts = [_prompt(draws.randrange(2 * num_known)) for _ in range(_NUM_DECISIONS)]
    sent: deque[tuple[int, int]] = deque()
    began_s = time.thread_time()
    for number, prompt in enumerate(prompts):
        sent.append((number, router.choose(number, prompt)))
        if len(sent) > _REQUESTS_PER_REPLICA * num_replicas:
            router.note_over(*sent.popleft())
    return (time.thread_time() - began_s) / len(prompts)


def _rendering() -> tuple[float, bytes]:
    """(Seconds, the text) of a replica's /metrics."""
    server = SimulatedServer(ServerSettings(), CostModel())
    server.play(Job(i, i / 10, 100, 50, 100) for i in range(50))
    metrics = server.client.metrics
    return _median_s(metrics.expose, 9), metrics.expose()


def _piece_bytes() -> float:
    num_prompts = 10_000
    tracemalloc.start()
    try:
        routing = ReplicaRouting()
        routing.hear("", ReplicaLoad(1, kv_cache_tokens=num_prompts * _PIECES_PER_PROMPT * PIECE_TOKENS))
        for number in range(num_prompts):
            routing.send("", _prompt(2**40 + number), "")
        return tracemalloc.get_traced_memory()[0] / (num_prompts * _PIECES_PER_PROMPT)
    finally:
        tracemalloc.stop()


class _Relay(asyncio.Protocol):
    """Passes on what comes."""

    def __init__(self) -> None:
        self.other: asyncio.WriteTransport | None = None

    def data_received(self, data: bytes) -> None:
        assert self.other is not None
        self.other.write(data)


def _relaying() -> tuple[float, float]:
    """(Seconds of CPU per event, bytes of memory per stream) of an event loop that passes streams on over TCP, without
    looking into them: what no router in Python can do without."""
    with ExitStack() as stack:
        sources, upstream = _connect(_NUM_RELAYED, stack)
        downstream, sinks = _connect(_NUM_RELAYED, stack)
        spent: list[float] = []
        memory: list[int] = []

        async def relay() -> None:
            loop = asyncio.get_running_loop()
            before = _resident_bytes()
            transports = []
            for source, sink in zip(upstream, downstream, strict=True):
                upper, reading = await loop.create_connection(_Relay, sock=source)
                reading.other, _ = await loop.create_connection(asyncio.Protocol, sock=sink)
                transports += [upper, reading.other]
            began_s = time.thread_time()
            await asyncio.to_thread(_feed, sources, sinks)
            spent.append(time.thread_time() - began_s)
            memory.append(_resident_bytes() - before)
            for transport in transports:
                transport.close()

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(relay())
        return spent[0] / (_NUM_RELAYED * _NUM_BEATS), memory[0] / _NUM_RELAYED


def _feed(sources: Sequence[socket.socket], sinks: Sequence[socket.socket]) -> None:
    """Send an event to each stream on every beat, and read them all before the next."""
    for _ in range(_NUM_BEATS):
        for source in sources:
            source.sendall(_EVENT)
        for sink in sinks:
            missing = len(_EVENT)
            while missing:
                missing -= len(sink.recv(missing))


def _connect(count: int, stack: ExitStack) -> tuple[list[socket.socket], list[socket.socket]]:
    near, far = [], []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        for _ in range(count):
            near.append(stack.enter_context(socket.create_connection(listener.getsockname())))
            far.append(stack.enter_context(listener.accept()[0]))
    return near, far


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _journal_bytes() -> float:
    """What a token of 64 streams has written to the journal's file."""
    recipe = Recipe(tuple(range(100)), SamplingParams(), (), True, None, b"", 600.0, 600.0, 600.0, 600.0)
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(Path(folder) / "streams.db", "never", "model")
        for i in range(_NUM_JOURNALED):
            journal.accept(i, StreamRecord(f"stream-{i}", "", "", 0, False, None, 0.0, 0.0, recipe), lambda: None)
        _wait_for(journal)
        before = _written_bytes()
        for _ in range(_NUM_JOURNAL_STEPS):
            journal.record([SequenceOutput(i, (1000 + i,)) for i in range(_NUM_JOURNALED)], lambda: None)
            _wait_for(journal)
        num_bytes = _written_bytes() - before
        journal.record(
            [SequenceOutput(i, finish_reason=FinishReason.LENGTH) for i in range(_NUM_JOURNALED)], lambda: None
        )
        journal.close()
    return num_bytes / (_NUM_JOURNALED * _NUM_JOURNAL_STEPS)


def _wait_for(journal: Journal) -> None:
    written = threading.Event()
    journal.record([], written.set)
    written.wait()


def _written_bytes() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("wchar")).split()[1])
