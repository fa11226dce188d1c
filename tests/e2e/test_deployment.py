"""The files that deploy a server: what checks them, and what they promise about settings and times."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from headrace.server.settings import Settings
from requirements import lack, long, need_program

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
# After the drain: connections, the engine and traces, five seconds each.
CLOSING_S = 15


def test_systemd_accepts_the_unit_and_finds_it_well_confined(tmp_path: Path) -> None:
    analyze = need_program("systemd-analyze")
    unit = tmp_path / "headrace.service"
    # It looks for the program where the unit has it, and for every page of documentation.
    text = (CONFIGS / "headrace.service").read_text().replace("/opt/headrace/bin/headrace", sys.executable)
    unit.write_text(text)
    result = subprocess.run([analyze, "verify", "--man=no", str(unit)], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout + result.stderr) == (0, "")
    # 100 is no confinement at all, and a web server as Debian ships it has more than 90.
    command = [analyze, "security", "--offline=yes", "--threshold=20", "--no-pager", str(unit)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def test_the_unit_leaves_time_to_drain() -> None:
    text = (CONFIGS / "headrace.service").read_text()
    [timeout_s] = re.findall(r"^TimeoutStopSec=(\d+)$", text, flags=re.MULTILINE)
    assert int(timeout_s) > Settings().drain_grace_s + CLOSING_S


@dataclass
class _Image:
    """An image as a folder: the Dockerfile's steps are run in it, as far as a folder can hold them.

    Every absolute path of the Dockerfile lies below `root`; the base image's Python is a fresh virtual environment.
    """

    root: Path
    env: dict[str, str] = field(default_factory=dict)
    folder: Path = Path()
    user: tuple[int, int] = (0, 0)
    entrypoint: list[str] = field(default_factory=list)
    healthcheck: list[str] = field(default_factory=list)

    def step(self, instruction: str, rest: str) -> None:
        rest = re.sub(r"(?<=[\s=])/(usr|var)/(?=src/|lib/)", rf"{self.root}/\1/", f" {rest}").strip()
        match instruction:
            case "FROM" | "VOLUME" | "EXPOSE":
                pass
            case "ARG" if "=" not in rest:
                pass
            case "ARG" | "ENV":
                self.env |= dict(pair.split("=", 1) for pair in shlex.split(rest))
            case "WORKDIR":
                self.folder = Path(rest)
                self.folder.mkdir(parents=True, exist_ok=True)
            case "COPY":
                *sources, target = rest.split()
                if sources[0].startswith("--from="):  # another stage: all lie in the same root
                    shutil.copytree(sources[1], self.folder / target)
                    sources = []
                for source in sources:
                    if (ROOT / source).is_dir():
                        ignore = shutil.ignore_patterns("__pycache__")
                        shutil.copytree(ROOT / source, self.folder / target, dirs_exist_ok=True, ignore=ignore)
                    else:
                        shutil.copy(ROOT / source, self.folder / target)
            case "RUN":
                subprocess.run(["/bin/sh", "-ec", rest], cwd=self.folder, env=self.environ(), check=True)
            case "USER":
                user, group = rest.split(":")
                self.user = int(user), int(group)
            case "HEALTHCHECK":
                self.healthcheck = json.loads(rest.partition(" CMD ")[2])
            case "ENTRYPOINT":
                self.entrypoint = json.loads(rest)
            case _:
                pytest.fail(f"the test knows no {instruction}")

    def environ(self) -> dict[str, str]:
        """What a container has, and how this machine reaches its package index."""
        pip = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
        return {"PATH": f"{self.root}/venv/bin:/usr/bin:/bin", "HOME": os.environ["HOME"]} | pip | self.env

    @contextmanager
    def run(self, command: list[str], *args: str) -> Iterator[subprocess.Popen[str]]:
        """Run a command as the image's user, by its PATH."""
        program = shutil.which(command[0], path=self.environ()["PATH"])
        assert program is not None, f"no {command[0]} in the image"
        user, group = self.user
        with subprocess.Popen(
            [program, *command[1:], *args],
            cwd=self.folder,
            env=self.environ(),
            user=user,
            group=group,
            extra_groups=[],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            try:
                yield process
            finally:
                process.kill()


def _instructions(dockerfile: str) -> Iterator[tuple[str, str]]:
    lines = [line for line in dockerfile.splitlines() if not line.startswith("#")]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if line.strip():
            instruction, _, rest = line.partition(" ")
            yield instruction, rest.strip()


@pytest.fixture
def image() -> Iterator[_Image]:
    """An empty image, in a folder that users other than root can see."""
    if os.geteuid() != 0:
        lack("an image's folder can be made by root only")
    root = Path(tempfile.mkdtemp(prefix="headrace-image-"))
    root.chmod(0o755)
    try:
        yield _Image(root)
    finally:
        shutil.rmtree(root)


def test_only_what_the_dockerfile_copies_is_sent_to_docker() -> None:
    copied = {
        source
        for instruction, rest in _instructions((CONFIGS / "Dockerfile").read_text())
        if instruction == "COPY" and not rest.startswith("--from=")
        for source in rest.split()[:-1]
    }
    ignore = (CONFIGS / "Dockerfile.dockerignore").read_text().splitlines()
    assert {line.removeprefix("!") for line in ignore if line.startswith("!")} == copied
    assert all((ROOT / source).exists() for source in copied)


@pytest.mark.timeout(1800)
@long
def test_the_dockerfiles_steps_make_a_server_that_runs_without_root(image: _Image) -> None:
    python = need_program("/usr/bin/python3")
    subprocess.run([python, "-m", "venv", str(image.root / "venv")], check=True)
    for instruction, rest in _instructions((CONFIGS / "Dockerfile").read_text()):
        image.step(instruction, rest)
    shutil.rmtree(image.root / "usr")  # what is installed needs no source

    with image.run(image.entrypoint, "--port", "0", "--kv-cache-bytes", "128MiB") as server:
        assert server.stdout is not None
        for line in server.stdout:
            if "try: curl" in line:
                break
        address = re.search(r"http://\S+?(?=/v1)", line)
        assert address is not None, f"the server ended: {line}"
        port = address[0].rpartition(":")[2]
        assert Path(f"/proc/{server.pid}").stat().st_uid == image.user[0] > 0
        checked = [part.replace("8000", port) for part in image.healthcheck]
        with image.run(checked) as check:
            assert check.wait(30) == 0
        body = {"prompt": "The mill", "max_tokens": 4}
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60)
        assert answer.json()["usage"]["completion_tokens"] == 4
        assert httpx.get(f"http://127.0.0.1:{port}/").status_code == 200
        assert list((image.root / "var/lib/headrace").rglob("*.gguf")), "the model is kept in the volume"
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
        with image.run(checked) as check:
            assert check.wait(30) != 0
