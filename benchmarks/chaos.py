"""`python -m headrace.benchmarks.chaos --through router|ray`: two replicas under load; one is killed, one is ended.

Through a router (vLLM's, from PyPI; `--router-python` has it) or Ray Serve (with the extra `ray`). Whole answers,
OpenAI's streams and native streams arrive at random, within what one replica can carry. After a while one replica gets
SIGKILL and is replaced; later the other one gets SIGTERM. Streams can be resumed because the replicas share a folder of
journals; every text is held against the undisturbed one (`--batch-invariant`). Prints tables; the last line of stdout
is one JSON object. All run beside the clients on the same cores.
"""

import argparse
import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from headrace.benchmarks.chaos_clients import Clients
from headrace.benchmarks.faulty_clients import OpenRequest, get
from headrace.benchmarks.http_client import HttpClient, Target
from headrace.benchmarks.measurement import percentile

_START_LIMIT_S: Final = 240.0
_END_LIMIT_S: Final = 120.0
# Streams that are over are forgotten after it, and a journal that was taken over is closed when it is empty.
_STREAM_TTL_S: Final = 5
_DRAIN_GRACE_S: Final = 60
_POLL_S: Final = 0.05
# The default target of a CPU between two tokens, in every tier.
_ITL_TARGET_MS: Final = 150
_REPLICA_HEADER: Final = "x-headrace-replica"
_READY: Final = re.compile(r"\(ServeReplica:headrace:Replica pid=(\d+)\).*headrace: replica (\w+) is ready")


class ChaosError(Exception):
    """Something did not start or end as it should; the text says what."""


@dataclass(frozen=True, slots=True)
class Process:
    """One that this started, its output in a file."""

    popen: "subprocess.Popen[bytes]"
    log: Path

    @classmethod
    def start(cls, command: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> "Process":
        with log.open("ab") as output:
            popen = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=None if env is None else dict(env),
            )
        return cls(popen, log)

    async def wait_for(self, pattern: str) -> None:
        """Raises: ChaosError where its output does not come to hold it."""
        await _until(lambda: re.search(pattern, self.output()) is not None or not self.is_running, pattern)
        if not self.is_running:
            raise ChaosError(f"it has ended: {self.output()[-2000:]}")

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def is_running(self) -> bool:
        return self.popen.poll() is None

    async def end(self) -> None:
        """Raises: ChaosError where it does not."""
        if self.is_running:
            self.popen.terminate()
        try:
            await asyncio.to_thread(self.popen.wait, _END_LIMIT_S)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            raise ChaosError(f"it does not end: {self.output()[-2000:]}") from None


class Replicas(Protocol):
    """Two replicas behind one address. Native streams are read from the addresses in `read_from`."""

    address: Target
    read_from: Sequence[Target]

    def pids(self) -> dict[str, int]:
        """Of those that run, by their names."""

    async def replace(self, name: str) -> None:
        """Returns once another one is in the place of one that was killed."""

    async def metrics(self, name: str) -> dict[str, float]:
        """Of one of them."""


class Routed:
    """Two servers behind vLLM's router, which keeps a reader's headers and query to itself on paths that it does not
    know: streams are read around it."""

    def __init__(self, stack: AsyncExitStack, folder: Path, flags: Sequence[str], router_python: str) -> None:
        self._stack = stack
        self._folder = folder
        self._flags = flags
        self._router_python = router_python
        *self._ports, self._port, self._metrics_port = _free_ports(4)
        self._servers: dict[str, Process] = {}
        self._ports_of = dict(zip(("alpha", "beta"), self._ports, strict=True))
        self.address = _local(self._port)
        self.read_from: Sequence[Target] = [*map(_local, self._ports)]

    async def start(self) -> None:
        await asyncio.gather(*map(self._start_server, self._ports_of))
        options = {
            "host": "127.0.0.1",
            "port": self._port,
            "prometheus-host": "127.0.0.1",
            "prometheus-port": self._metrics_port,
            "policy": "round_robin",
            "health-check-endpoint": "/ready",
            "health-check-interval-secs": 1,
            "health-failure-threshold": 1,
            "health-success-threshold": 1,
            "worker-startup-check-interval": 1,
            # As it is by itself, a replica that comes back gets nothing for a minute.
            "cb-timeout-duration-secs": 2,
        }
        urls = [f"http://127.0.0.1:{port}" for port in self._ports]
        command = [self._router_python, "-m", "vllm_router.launch_router", "--worker-urls", *urls]
        command += [f"--{name}={value}" for name, value in options.items()]
        env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        router = Process.start(command, self._folder / "router.log", env)
        self._stack.push_async_callback(router.end)
        await _until_served(self.address, router)

    async def _start_server(self, name: str) -> None:
        log = self._folder / f"{name}-{len(list(self._folder.glob(f'{name}-*')))}.log"
        flags = ["--port", str(self._ports_of[name]), "--replica-name", name, "--drain-delay-s", "3", *self._flags]
        server = self._servers[name] = Process.start([sys.executable, "-m", "headrace.server", *flags], log)
        self._stack.push_async_callback(server.end)
        await server.wait_for("chat page:")

    def pids(self) -> dict[str, int]:
        return {name: server.popen.pid for name, server in self._servers.items() if server.is_running}

    async def replace(self, name: str) -> None:
        await self._start_server(name)

    async def metrics(self, name: str) -> dict[str, float]:
        return await _metrics(_local(self._ports_of[name]), "")


class Deployed:
    """Two replicas on Ray Serve, which replaces by itself what has died."""

    def __init__(self, stack: AsyncExitStack, folder: Path, flags: Sequence[str]) -> None:
        self._stack = stack
        self._flags = flags
        self._log = folder / "deploy.log"
        [self._port] = _free_ports(1)
        self.address = _local(self._port)
        self.read_from: Sequence[Target] = [self.address]
        self._process: Process

    async def start(self) -> None:
        run = "import sys; from headrace.server.cli import main; sys.exit(main())"
        flags = ["--port", str(self._port), "--replicas", "2", "--replica-cpus", "0.5", *self._flags]
        env = {**os.environ, "RAY_DEDUP_LOGS": "0"}
        self._process = Process.start([sys.executable, "-c", run, "deploy", *flags], self._log, env)
        self._stack.push_async_callback(self._process.end)
        await self._process.wait_for("replicas are ready")

    def pids(self) -> dict[str, int]:
        found = {name: int(pid) for pid, name in _READY.findall(self._process.output())}
        return {name: pid for name, pid in found.items() if Path(f"/proc/{pid}").exists()}

    async def replace(self, name: str) -> None:
        await _until(lambda: len(self.pids()) == 2, "another replica")

    async def metrics(self, name: str) -> dict[str, float]:
        return await _metrics(self.address, f"{_REPLICA_HEADER}: {name}\r\n")


@dataclass(frozen=True, slots=True)
class Holding:
    """What a replica holds when it has nothing to do."""

    blocks: float
    requests: float
    tasks: float
    descriptors: int

    @classmethod
    async def of(cls, replicas: Replicas, name: str) -> "Holding":
        found = await replicas.metrics(name)
        blocks = found["headrace_kv_cache_total_blocks"] - found["headrace_kv_cache_free_blocks"]
        requests = found["headrace_num_requests_running"] + found["headrace_num_requests_waiting"]
        descriptors = len(os.listdir(f"/proc/{replicas.pids()[name]}/fd"))
        return cls(blocks, requests, found["headrace_event_loop_tasks"], descriptors)


async def measure(replicas: Replicas, options: argparse.Namespace) -> dict[str, Any]:
    """The whole run."""
    seconds, share = options.seconds, options.rate / 4
    num_tokens = {"whole": options.tokens // 2, "openai": options.tokens, "native": options.tokens}
    clients = Clients(replicas.address, replicas.read_from, num_tokens, options.seed)
    await clients.learn()
    killed, drained = replicas.pids()
    await asyncio.sleep(2 * _STREAM_TTL_S)
    before = {name: await Holding.of(replicas, name) for name in (killed, drained)}
    is_over = asyncio.Event()
    load = asyncio.create_task(clients.run({"whole": 2 * share, "openai": share, "native": share}, is_over))
    began_s = time.monotonic()
    await asyncio.sleep(seconds)
    await _until(lambda: clients.num_reading_from(killed) >= options.streams, "streams to cut")
    pids = replicas.pids()
    os.kill(pids[killed], signal.SIGKILL)
    killed_s = time.monotonic()
    await _until(lambda: killed not in replicas.pids(), "its end")
    await asyncio.sleep(seconds)
    replacing_s = time.monotonic()
    await replicas.replace(killed)
    replaced_s = time.monotonic()
    await asyncio.sleep(seconds)
    [survivor] = set(replicas.pids()) - {drained}
    await _until(lambda: clients.num_reading_from(drained) >= options.streams, "streams to drain")
    os.kill(pids[drained], signal.SIGTERM)
    drained_s = time.monotonic()
    await _until(lambda: drained not in replicas.pids(), "its end")
    ended_s = time.monotonic()
    await asyncio.sleep(seconds)
    is_over.set()
    await load
    over_s = time.monotonic()
    after = await _settled(replicas, survivor, before[killed])
    stretches = {
        "two replicas": (began_s, killed_s),
        "one killed": (killed_s, replacing_s),
        "another starts": (replacing_s, replaced_s),
        "two again": (replaced_s, drained_s),
        "one drains": (drained_s, ended_s),
        "one drained": (ended_s, over_s),
    }
    return {
        "requests": {kind: tally.as_json() for kind, tally in clients.tallies.items()},
        "itl": {name: _itl(clients, *between) for name, between in stretches.items()},
        "itl_target_ms": _ITL_TARGET_MS,
        "drain_s": round(ended_s - drained_s, 1),
        "left": {name: [getattr(before[killed], name), getattr(after, name)] for name in Holding.__slots__},
    }


def _itl(clients: Clients, begin_s: float, end_s: float) -> dict[str, Any]:
    gaps_ms = [1e3 * gap for at_s, gap in clients.gaps if begin_s <= at_s - gap and at_s <= end_s]
    figures = {f"p{percent}_ms": round(percentile(gaps_ms, percent), 1) if gaps_ms else None for percent in (50, 99)}
    return {"seconds": round(end_s - begin_s, 1), "gaps": len(gaps_ms), **figures}


async def _settled(replicas: Replicas, name: str, wanted: Holding) -> Holding:
    """What it holds once that is no more than is wanted, or time is up."""
    deadline_s = time.monotonic() + 60
    while (found := await Holding.of(replicas, name)) != wanted and time.monotonic() < deadline_s:  # noqa: ASYNC110 - another process's state
        await asyncio.sleep(1)
    return found


async def _metrics(address: Target, headers: str) -> dict[str, float]:
    opened = await OpenRequest.send(address, get(address, "/metrics", headers))
    await opened.end(30)
    pairs = (line.rsplit(" ", 1) for line in opened.body.decode().splitlines() if line and not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


async def _until_served(address: Target, process: Process) -> None:
    """Raises: ChaosError."""
    deadline_s = time.monotonic() + _START_LIMIT_S
    while process.is_running and time.monotonic() < deadline_s:
        with suppress(OSError):
            end = await HttpClient(address).exchange("GET", "/v1/models", b"", lambda *_: None)
            if end.status == 200:
                return
        await asyncio.sleep(_POLL_S)
    raise ChaosError(f"it does not serve: {process.output()[-2000:]}")


async def _until(holds: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + _START_LIMIT_S
    while not holds():
        if time.monotonic() > deadline_s:
            raise ChaosError(f"waited in vain for {what}")
        await asyncio.sleep(_POLL_S)


def _local(port: int) -> Target:
    return Target("127.0.0.1", port, is_tls=False, prefix="")


def _free_ports(num: int) -> list[int]:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(num)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


def _print(found: Mapping[str, Any]) -> None:
    for title, rows in (("requests", found["requests"]), ("ITL, ms", found["itl"])):
        columns = [name for name in next(iter(rows.values())) if name != "faults"]
        print(f"\n| {title} | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
        for name, row in rows.items():
            print(f"| {name} | {' | '.join(str(row[column]) for column in columns)} |")
    print(f"\nITL target {found['itl_target_ms']} ms; the drain took {found['drain_s']} s")
    print("left on the survivor (before, after):", found["left"], flush=True)


async def _run(options: argparse.Namespace) -> dict[str, Any]:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)  # no server is left behind
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        flags = ["--batch-invariant", "--journal-dir", str(folder / "journals"), "--stream-ttl-s", str(_STREAM_TTL_S)]
        flags += ["--drain-grace-s", str(_DRAIN_GRACE_S), *options.server_flags.split()]
        flags += [] if options.model is None else [options.model]
        async with AsyncExitStack() as stack:
            replicas: Routed | Deployed
            if options.through == "router":
                replicas = Routed(stack, folder, flags, options.router_python)
            else:
                replicas = Deployed(stack, folder, flags)
            await replicas.start()
            return await measure(replicas, options)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="chaos", description=__doc__.partition("\n\n")[0])
    parser.add_argument("model", nargs="?", help="as for `headrace serve`")
    parser.add_argument("--through", choices=["router", "ray"], required=True)
    parser.add_argument("--router-python", default=sys.executable, help="the Python that has vllm-router")
    parser.add_argument("--seconds", type=float, default=12, help="of each stretch (default %(default)s)")
    parser.add_argument("--rate", type=float, default=5.0, help="requests a second (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=128, help="of a streamed answer (default %(default)s)")
    parser.add_argument("--streams", type=int, default=3, help="native ones that a fault has to meet (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--server-flags", default="", help="more flags of the servers")
    options = parser.parse_args(argv)
    try:
        found = asyncio.run(_run(options))
    except ChaosError as error:
        print(f"chaos: {error}", file=sys.stderr)
        return 1
    _print(found)
    print(json.dumps({"through": options.through, **found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
