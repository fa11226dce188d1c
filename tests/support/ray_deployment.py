"""Replicas on Ray Serve, by `headrace deploy` or by Serve's own commands, in Ray's environment."""

import json
import re
import secrets
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from requirements import need
from server_process import ServerProcess

BIN = Path(__file__).parents[1] / "e2e" / "clients" / ".venvs" / "ray" / "bin"
REPLICA = "x-headrace-replica"
FLAGS = ("--dtype", "float32", "--cpu-kernel", "torch", "--kv-cache-bytes", "256MiB")


class RayProcess(ServerProcess):
    """One that has to do with Ray, and its output with that of all that it starts."""

    python = BIN / "python"

    def __init__(self, args: list[str], env: dict[str, str] | None = None) -> None:
        need(self.python.exists(), "what `make setup-clients` installs")
        super().__init__(args, {"RAY_DEDUP_LOGS": "0", **(env or {})})

    def pids(self) -> dict[str, int]:
        """Of the replicas that were ever ready, by their names."""
        found = re.findall(
            r"\(ServeReplica:headrace:Replica pid=(\d+)\).*headrace: replica (\w+) is ready", self.output
        )
        return {name: int(pid) for pid, name in found}

    def metric(self, replica: str, name: str) -> float:
        text = httpx.get(f"{self.url()}/metrics", headers={REPLICA: replica}).text
        return float(re.findall(rf"^headrace_{name} (\S+)$", text, re.M)[0])


class Deployment(RayProcess):
    """`headrace deploy`."""

    command = ("-c", "import sys; from headrace.server.cli import main; sys.exit(main())", "deploy")


class Cluster(RayProcess):
    """A cluster of this machine alone, with two GPUs that it has not; it is ready when it has an `address`."""

    python = BIN / "ray"
    command = ("start", "--head", "--block", "--num-cpus=4", "--num-gpus=2", "--include-dashboard=false")
    ready = r"--address='(\S+)'"

    def __init__(self, env: dict[str, str]) -> None:
        self.env = env
        super().__init__([], env)

    @property
    def address(self) -> str:
        return self.wait_for(self.ready)[1]


class ServeRun(RayProcess):
    """`serve run` of a config that says at which `port`."""

    python = BIN / "serve"
    command = ("run",)
    port_flags = ()

    def __init__(self, config: Path, port: int, env: dict[str, str], *flags: str) -> None:
        self.port = port
        super().__init__([*flags, str(config)], env)

    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def ray_of_its_own() -> Iterator[dict[str, str]]:
    """The environment of processes that find each other's Ray, and no other."""
    # Ray's sockets are in the folder, and a socket's path has a hundred characters.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        # Ray would else take a token that it finds on this machine.
        yield {"RAY_TMPDIR": folder, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


@contextmanager
def deployed(model: Path, *args: str, cluster: Cluster | None = None) -> Iterator[Deployment]:
    """A deployment that is ready, drained afterwards; on a Ray of its own where there is no `cluster`."""
    flags = [str(model), *FLAGS, "--replica-cpus", "0.5", *args]
    if cluster is not None:
        flags += ["--ray-address", cluster.address]
    deployment = Deployment(flags, None if cluster is None else cluster.env)
    try:
        deployment.wait_for(deployment.ready, 180)
        yield deployment
    finally:
        deployment.stop(timeout_s=120)


@contextmanager
def clustered() -> Iterator[Cluster]:
    """A cluster, ended afterwards."""
    with ray_of_its_own() as env:
        cluster = Cluster(env)
        try:
            cluster.wait_for("will now block")
            yield cluster
        finally:
            cluster.stop()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def complete(deployment: RayProcess, prompt: str, **fields: Any) -> httpx.Response:
    body = {"prompt": prompt, "max_tokens": 4, "ignore_eos": True} | fields
    answer = httpx.post(f"{deployment.url()}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer


@contextmanager
def stream(deployment: ServerProcess, headers: dict[str, str] | None = None, **fields: Any) -> Iterator[httpx.Response]:
    body = {"prompt": "The mill", "max_tokens": 4000, "ignore_eos": True, "stream": True, "return_token_ids": True}
    url = f"{deployment.url()}/v1/completions"
    with httpx.stream("POST", url, json=body | fields, headers=headers, timeout=60) as response:
        assert response.status_code == 200
        yield response


def frames(response: httpx.Response) -> Iterator[Any]:
    for line in response.iter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


def is_running(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def children(pid: int) -> list[int]:
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for each in lists for child in each.read_text().split()]


def environment(pid: int) -> dict[str, str]:
    pairs = (line.partition("=") for line in Path(f"/proc/{pid}/environ").read_text().split("\0"))
    return {name: value for name, _, value in pairs}
