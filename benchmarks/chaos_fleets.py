"""Two replicas of the demo model and what stands before them: how they are started, killed, ended and looked into.

Runs on the event loop of `chaos`. Replicas are known by their names, clients know the front's address alone. Blocks,
requests and tasks are read off a replica's /metrics, descriptors off Linux's /proc.
"""

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from headrace.benchmarks.faulty_clients import OpenRequest, get, post
from headrace.benchmarks.http_client import Target
from headrace.benchmarks.process_session import ProcessSession

NAMES: Final = ("alpha", "beta")
# Whoever is ready no more is asked to serve for so long, in which the router looks three times.
_DRAIN_DELAY_S: Final = 3
DRAIN_GRACE_S: Final = 60
_FLAGS: Final = (
    *("--batch-invariant", "--kv-cache-bytes", "256MiB", "--stream-ttl-s", "10", "--keep-alive-s", "5"),
    *("--drain-grace-s", str(DRAIN_GRACE_S), "--log-level", "warning"),
)
_START_LIMIT_S: Final = 180.0
_FINISHED: Final = "headrace_requests_finished_total"
_ITL_BUCKET: Final = "headrace_inter_token_latency_seconds_bucket"


class FleetError(Exception):
    """A process that is needed has ended, or did not start; the text says which."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a replica holds; of one that has nothing to do the same before and after."""

    blocks: float
    requests: float
    tasks: float
    descriptors: int


class Fleet(ABC):
    """`front` is where clients ask."""

    front: Target

    @property
    @abstractmethod
    def names(self) -> Sequence[str]:
        """The replicas that live."""

    @abstractmethod
    async def start(self) -> None:
        """Raises: FleetError."""

    @abstractmethod
    async def end(self) -> None: ...

    @abstractmethod
    async def kill(self, name: str) -> None:
        """SIGKILL."""

    @abstractmethod
    async def recover(self) -> None:
        """Wait until there are two again that the front sends requests to."""

    @abstractmethod
    async def drain(self, name: str) -> None:
        """Have a replica end in order, and wait until it has. Raises: FleetError where it does not."""

    @abstractmethod
    def pid(self, name: str) -> int: ...

    @abstractmethod
    async def _metrics_text(self, name: str) -> str: ...

    async def metrics(self, name: str) -> dict[str, float]:
        text = await self._metrics_text(name)
        pairs = (line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#"))
        return {sample: float(value) for sample, value in pairs}

    async def footprint(self, name: str) -> Footprint:
        metrics = await self.metrics(name)
        held = metrics["headrace_kv_cache_total_blocks"] - metrics["headrace_kv_cache_free_blocks"]
        requests = metrics["headrace_num_requests_running"] + metrics["headrace_num_requests_waiting"]
        descriptors = len(os.listdir(f"/proc/{self.pid(name)}/fd"))
        return Footprint(held, requests, metrics["headrace_event_loop_tasks"], descriptors)

    async def gaps(self, name: str) -> dict[float, float]:
        """How many of a replica's gaps between tokens so far are not above so many seconds."""
        counts: dict[float, float] = {}
        for sample, value in (await self.metrics(name)).items():
            if sample.startswith(_ITL_BUCKET):
                bound = float(sample.partition('le="')[2].partition('"')[0])
                counts[bound] = counts.get(bound, 0.0) + value
        return dict(sorted(counts.items()))


async def ask(address: Target, path: str, headers: str = "", limit_s: float = 10) -> tuple[int, str]:
    """GET; status 0 where no answer comes."""
    with contextlib.suppress(OSError):
        opened = await OpenRequest.send(address, get(address, path, headers))
        end = await opened.end(limit_s)
        return (end.status if end is not None and end.is_whole else 0), opened.body.decode(errors="replace")
    return 0, ""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def local(port: int) -> Target:
    return Target("127.0.0.1", port, is_tls=False, prefix="")


@dataclass(slots=True)
class Process:
    """A process in a session of its own, whose output goes into a file."""

    name: str
    process: asyncio.subprocess.Process
    log: Path

    @classmethod
    async def start(cls, name: str, command: Sequence[str], log: Path, **environment: str) -> "Process":
        with log.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **environment},
                start_new_session=True,
            )
        return cls(name, process, log)

    @property
    def is_alive(self) -> bool:
        return self.process.returncode is None

    async def until(self, is_there: Callable[[], Awaitable[bool]], limit_s: float = _START_LIMIT_S) -> None:
        """Ask an awaitable again and again until it says so. Raises: FleetError where the process ends or is late."""
        deadline_s = time.monotonic() + limit_s
        while not await is_there():
            if not self.is_alive or time.monotonic() > deadline_s:
                told = "ended" if not self.is_alive else "was not ready in time"
                raise FleetError(f"{self.name} {told}; the end of {self.log}: {self.log.read_text()[-2000:]}")
            await asyncio.sleep(0.1)

    async def end(self, limit_s: float = 30) -> int:
        """By request, then by force, and what it has started with it; returns its exit code."""
        session = ProcessSession(self.process.pid)
        if self.is_alive:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(limit_s):
                    await self.process.wait()
        session.signal(signal.SIGKILL)
        return await self.process.wait()


class RoutedFleet(Fleet):
    """Servers with names, peers and one folder of journals, behind a router; each is started again where it was."""

    def __init__(self, folder: Path, python: str, module: str, model: str | None) -> None:
        self._folder = folder
        self._python = python
        self._module = module
        self._model = () if model is None else (model,)
        self._addresses = {name: local(free_port()) for name in NAMES}
        self._servers: dict[str, Process] = {}
        self._router: Process | None = None
        self.front = local(free_port())

    @property
    def names(self) -> Sequence[str]:
        return [name for name, server in self._servers.items() if server.is_alive]

    def pid(self, name: str) -> int:
        return self._servers[name].process.pid

    async def start(self) -> None:
        """Raises: FleetError."""
        await asyncio.gather(*map(self._start_server, NAMES))
        flags = {
            "host": self.front.host,
            "port": self.front.port,
            "prometheus-host": "127.0.0.1",
            "prometheus-port": free_port(),
            "policy": "round_robin",
            "health-check-endpoint": "/ready",
            "health-check-interval-secs": 1,
            "health-failure-threshold": 1,
            "health-success-threshold": 1,
            "worker-startup-check-interval": 1,
        }
        words = [*(f"--{name}={flag}" for name, flag in flags.items()), "--worker-urls"]
        command = [self._python, "-m", self._module, *words, *(each.url for each in self._addresses.values())]
        self._router = await Process.start("the router", command, self._folder / "router.log", PYTHONPATH="")
        await self.recover()

    async def _start_server(self, name: str) -> None:
        address = self._addresses[name]
        peers = json.dumps({name: each.url for name, each in self._addresses.items()})
        shared = ("--journal-dir", str(self._folder / "journals"), "--replica-name", name, "--peers", peers)
        place = ("--port", str(address.port), "--drain-delay-s", str(_DRAIN_DELAY_S))
        command = [sys.executable, "-m", "headrace.server", *self._model, *place, *shared, *_FLAGS]
        log = self._folder / f"{name}.log"
        server = self._servers[name] = await Process.start(name, command, log, OMP_NUM_THREADS="1")

        async def is_ready() -> bool:
            return (await ask(address, "/ready"))[0] == 200

        await server.until(is_ready)

    async def kill(self, name: str) -> None:
        self._servers[name].process.kill()
        await self._servers[name].process.wait()

    async def recover(self) -> None:
        for name in NAMES:
            if not self._servers[name].is_alive:
                await self._start_server(name)
        assert self._router is not None
        await self._router.until(self._serves_all)

    async def _serves_all(self) -> bool:
        """Whether each server has finished requests, which all come from the router."""
        for _ in NAMES:
            with contextlib.suppress(OSError):
                body = {"prompt": "The mill", "max_tokens": 1}
                await (await OpenRequest.send(self.front, post(self.front, "/v1/completions", body))).end(10)
        return all([await self._num_finished(name) > 0 for name in NAMES])

    async def _num_finished(self, name: str) -> float:
        return sum(value for sample, value in (await self.metrics(name)).items() if sample.startswith(_FINISHED))

    async def drain(self, name: str) -> None:
        server = self._servers[name]
        server.process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(_DRAIN_DELAY_S + DRAIN_GRACE_S + 20):
                code = await server.process.wait()
        except TimeoutError:
            raise FleetError(f"{name} did not end") from None
        if code != 0:
            raise FleetError(f"{name} ended with exit code {code}: {server.log.read_text()[-2000:]}")

    async def _metrics_text(self, name: str) -> str:
        return (await ask(self._addresses[name], "/metrics"))[1]

    async def end(self) -> None:
        processes = [*self._servers.values(), *([self._router] if self._router else [])]
        await asyncio.gather(*(each.end() for each in processes))
