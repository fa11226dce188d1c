"""A real server in a process of its own, as a user starts it, on a free port."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx


class ServerProcess:
    """The process and its address. `wait_for` waits for a line of its output."""

    python: str | Path = sys.executable
    command: tuple[str, ...] = ("-m", "headrace.server")
    port_flags: tuple[str, ...] = ("--port", "0")
    ready = r"chat page: (https?://\S+)/"

    def __init__(self, args: list[str], env: dict[str, str] | None = None) -> None:
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self.process = subprocess.Popen(
            [self.python, *self.command, *self.port_flags, *args],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **(env or {})},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def wait_for(self, pattern: str, timeout_s: float = 120) -> re.Match[str]:
        """The first match of `pattern` in the output; fails if the process ends or time runs out first."""
        with self._changed:
            found = self._changed.wait_for(
                lambda: re.search(pattern, self.output) or not self._reader.is_alive(), timeout_s
            )
            match = re.search(pattern, self.output)
        assert match is not None, f"{'no' if found else 'waited in vain for'} {pattern!r} in:\n{self.output}"
        return match

    def url(self) -> str:
        """The server's address, once it is ready."""
        return self.wait_for(self.ready)[1]

    def stop(self, sig: int = signal.SIGTERM, timeout_s: float = 60) -> int:
        """Signal the process and wait for its end; returns its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(sig)
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise
        self._reader.join(timeout_s)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code

    def metrics(self) -> dict[str, float]:
        """Every sample of /metrics without its help, keyed by name and labels as written."""
        lines = httpx.get(f"{self.url()}/metrics").text.splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def resident_bytes(self) -> int:
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
        raise AssertionError("no VmRSS")

    def num_descriptors(self) -> int:
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    def num_threads(self) -> int:
        return len(list(Path(f"/proc/{self.pid}/task").iterdir()))

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._changed:
                self.lines.append(line)
                self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()


class ProxyProcess(ServerProcess):
    """`headrace proxy`, likewise; it is ready as soon as it listens."""

    command = ("-c", "import sys; from headrace.server.cli import main; sys.exit(main())", "proxy")
    ready = r"listening on (\S+)"


class ScriptedServer(ServerProcess):
    """The server of scripted_server.py."""

    command = (str(Path(__file__).parent / "scripted_server.py"),)


@contextmanager
def serving(*args: str, env: dict[str, str] | None = None) -> Iterator[ServerProcess]:
    """A server that is ready, stopped afterwards."""
    server = ServerProcess(list(args), env)
    try:
        server.url()
        yield server
    finally:
        server.stop()


@contextmanager
def serving_script(*args: str, **env: str) -> Iterator[ScriptedServer]:
    """A server on the fake model whose steps do what prompts say; killed afterwards, if it has not ended."""
    server = ScriptedServer(list(args), env)
    try:
        server.url()
        yield server
    finally:
        server.process.kill()
        server.stop()


@contextmanager
def proxying(upstream: str, *args: str) -> Iterator[ProxyProcess]:
    """A proxy before a server, stopped afterwards."""
    proxy = ProxyProcess(["--upstream", upstream, *args])
    try:
        proxy.url()
        yield proxy
    finally:
        proxy.stop()
