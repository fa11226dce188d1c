"""What a trace holds, read as Perfetto reads it."""

import gzip
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from headrace.scheduler.step_tracer import StepTracer


def events(path: Path) -> list[dict[str, Any]]:
    """The trace's events that take time, in order."""
    found = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return sorted((each for each in found if each["ph"] == "X"), key=lambda each: each["ts"])


def test_a_trace_has_the_ranges_and_the_operators_inside_of_them(tmp_path: Path) -> None:
    tracer = StepTracer()
    with tracer.range("before"):
        pass
    tracer.begin()
    with tracer.range("outer"), tracer.range("inner"):
        torch.ones(8).add(1)
    trace = tracer.end()
    with tracer.range("after"):
        pass
    trace.save(tmp_path / "trace.json.gz")
    by_name = {each["name"]: each for each in events(tmp_path / "trace.json.gz")}
    assert {"outer", "inner", "aten::add"} <= set(by_name)
    assert not {"before", "after"} & set(by_name)
    for part, whole in (("inner", "outer"), ("aten::add", "inner")):
        begin = by_name[part]["ts"] - by_name[whole]["ts"]
        assert 0 <= begin <= begin + by_name[part]["dur"] <= by_name[whole]["dur"]
    assert [each.name for each in tmp_path.iterdir()] == ["trace.json.gz"], "what it is made of is gone"


def test_phases_lie_end_to_end_on_a_track_of_their_own_when_they_were(tmp_path: Path) -> None:
    spent = {"attention": 7.0, "down": 5.0}
    tracer = StepTracer(lambda: dict(spent))
    tracer.note_phases(0.0)  # nobody traces
    tracer.begin()
    for seconds in (0.001, 0.002):
        with tracer.range("forward"):
            began_s = time.monotonic()
            spent["attention"] += seconds
            spent["down"] += 2 * seconds
            time.sleep(3 * seconds)
        tracer.note_phases(began_s)
    tracer.end().save(tmp_path / "trace.json.gz")
    found = events(tmp_path / "trace.json.gz")
    phases = [each for each in found if each["name"] in spent]
    assert [each["name"] for each in phases] == ["attention", "down"] * 2
    assert len({each["tid"] for each in phases}) == 1
    forwards = [each for each in found if each["name"] == "forward"]
    for forward, first, second, ms in zip(forwards, phases[::2], phases[1::2], (1, 2), strict=True):
        assert forward["tid"] != first["tid"]
        assert round(first["dur"]) == 1000 * ms
        assert abs(first["ts"] + first["dur"] - second["ts"]) < 0.01
        # The profiler's clock and this one are read one after the other.
        assert abs(forward["ts"] - first["ts"]) < 500


def test_a_tracer_that_nobody_has_asked_does_not_import_torch() -> None:
    code = """
import sys
from headrace.scheduler.step_tracer import StepTracer
with StepTracer().range("step"):
    sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
