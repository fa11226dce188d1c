"""Traces of steps, recorded by torch's profiler and saved in the form that Perfetto and chrome://tracing read.

Owned by the engine thread, whose named ranges and operators they hold, and its GPU's kernels; a trace that has ended
is saved by whoever has it. Where nobody traces, a range costs a comparison, and torch is not imported for it. What a
kernel in C++ spends in its phases torch cannot see: the backend's own account stands on a track of its own, each
call's phases end to end, added up over layers.
Source: Google, "Trace Event Format".
"""

import gzip
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

_NO_RANGE = nullcontext()
# Above every thread's id.
_PHASES_TRACK = 2**22 + 1
# The head of a trace: its events begin there.
_HEAD_BYTES = 2**20
_FIRST_EVENT = b'"traceEvents": ['


class StepTracer:
    """Records while it `is_on`. `phases` are the seconds that a backend has spent in each kind of phase so far."""

    def __init__(self, phases: Callable[[], Mapping[str, float]] = dict) -> None:
        self._phases = phases
        self._profiler: Any = None
        self._record_function: Any = None
        self._known: Mapping[str, float] = {}
        self._slices: list[tuple[str, float, float]] = []

    @property
    def is_on(self) -> bool:
        return self._profiler is not None

    def range(self, name: str) -> AbstractContextManager[object]:
        """A named range of the trace, where there is one."""
        return _NO_RANGE if self._profiler is None else self._record_function(name)

    def begin(self) -> None:
        """Record what this thread does from here on. Raises: RuntimeError where the profiler cannot."""
        import torch
        from torch.autograd.profiler import profile, record_function

        # Of torch.profiler's two faces this one does not import a compiler first, which takes seconds.
        profiler = profile(use_device="cuda" if torch.cuda.is_initialized() else None, use_kineto=True)
        profiler.__enter__()
        self._profiler, self._record_function = profiler, record_function
        self._known, self._slices = self._phases(), []

    def note_phases(self, began_s: float) -> None:
        """Lay out what has been spent in phases since this was called before, from then on."""
        if self._profiler is None:
            return
        before, self._known = self._known, self._phases()
        for name, seconds in self._known.items():
            spent_s = seconds - before[name]
            self._slices.append((name, began_s, spent_s))
            began_s += spent_s

    def end(self) -> "StepTrace":
        """Record no more; what the device has been given is waited for. Raises: RuntimeError."""
        profiler, self._profiler = self._profiler, None
        slices, self._slices = self._slices, []
        profiler.__exit__(None, None, None)
        return StepTrace(profiler, slices)


class StepTrace:
    """What was recorded."""

    def __init__(self, profiler: Any, slices: list[tuple[str, float, float]]) -> None:
        self._profiler = profiler
        self._slices = slices
        self._epoch_ns = time.time_ns() - time.monotonic_ns()

    def save(self, path: Path) -> None:
        """Write it, gzipped."""
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            plain = os.path.join(folder, "trace.json")
            self._profiler.export_chrome_trace(plain)
            with open(plain, "rb") as source, gzip.open(path, "wb", compresslevel=1) as target:
                head, opening, tail = source.read(_HEAD_BYTES).partition(_FIRST_EVENT)
                target.write(head + opening + self._events(head) + tail)
                shutil.copyfileobj(source, target)

    def _events(self, head: bytes) -> bytes:
        """The phases, as events that others follow."""
        if not self._slices:
            return b""
        base = re.search(rb'"baseTimeNanoseconds": (\d+)', head)
        offset_ns = self._epoch_ns - (int(base[1]) if base else 0)
        track = {"pid": os.getpid(), "tid": _PHASES_TRACK}
        name = {"name": "CPU kernel: its phases, added up over layers"}
        events: list[dict[str, Any]] = [{"ph": "M", "name": "thread_name", **track, "args": name}]
        for phase, began_s, spent_s in self._slices:
            events.append(
                {"ph": "X", "cat": "cpu_op", "name": phase, **track}
                | {"ts": (began_s * 1e9 + offset_ns) / 1000, "dur": spent_s * 1e6}
            )
        return b"".join(json.dumps(event).encode() + b",\n" for event in events)
