"""`headrace.benchmarks.chaos`, a short run through each of its fronts: all that it finds but the times."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from requirements import long, need

VENVS = Path(__file__).parent / "clients" / ".venvs"
LOAD = ("--seconds", "3", "--rate", "4", "--tokens", "150", "--streams", "1")
SERVERS = ("--server-flags", "--kv-cache-bytes 256MiB")

pytestmark = long


def chaos(python: str | Path, *args: str | Path) -> dict[str, Any]:
    command = [python, "-m", "headrace.benchmarks.chaos", *args, *LOAD, *SERVERS]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    print(ended.stdout)
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


def check(found: dict[str, Any]) -> None:
    whole, openai, native = (found["requests"][kind] for kind in ("whole", "openai", "native"))
    for tally in (whole, openai, native):
        assert (tally["lost"], tally["wrong"], tally["hung"]) == (0, 0, 0), tally
        assert tally["completed"] == tally["sent"] - (tally["cut"] - tally["resumed"]), tally
    assert whole["sent"] > 0
    assert native["cut"] == native["resumed"] > 0
    for name, (before, after) in found["left"].items():
        # Ray's own connections come and go; one for each request would be a hundred.
        assert after <= before + 3 * (name == "descriptors"), f"{name} on the survivor: {found['left']}"


def test_through_a_router_a_killed_and_a_drained_replica_lose_no_answer_and_leave_nothing(slow_model: Path) -> None:
    python = VENVS / "router" / "bin" / "python"
    need(python.exists(), "what `make setup-clients` installs")
    check(chaos(sys.executable, slow_model, "--through", "router", "--router-python", python))


def test_through_ray_a_killed_and_an_ended_replica_lose_no_answer_and_leave_nothing(slow_model: Path) -> None:
    python = VENVS / "ray" / "bin" / "python"
    need(python.exists(), "what `make setup-clients` installs")
    check(chaos(python, slow_model, "--through", "ray"))
