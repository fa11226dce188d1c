"""A server whose model fails for those who ask for it: `python faulty_server.py FLAGS`, as `headrace serve FLAGS`.

A prompt of token ids that begins with RAISES or MAKES_NAN, and then a number, has a step raise, or its row come out as
no number, as soon as more than that many of its tokens are computed. All else is the model's own.
"""

import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

from headrace.kernels.step_times import StepTimes
from headrace.scheduler.engine_core import LaunchedStep, Runner
from headrace.scheduler.messages import RowResult
from headrace.scheduler.model_source import resolve_model
from headrace.scheduler.scheduler import ScheduledRow, Scheduler, SchedulerOutput
from headrace.server.serve import _load_engine, say, serve
from headrace.server.settings import Settings, load_settings

RAISES, MAKES_NAN = 11, 12


class InjectedFault(Exception):
    pass


class FaultyRunner:
    """Wraps a runner."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def launch(self, output: SchedulerOutput) -> LaunchedStep:
        if any(_is_due(row, RAISES) for row in output.rows):
            raise InjectedFault("a row raises")
        return _FaultyStep(output, self._runner.launch(output))


@dataclass(frozen=True)
class _FaultyStep:
    output: SchedulerOutput
    launched: LaunchedStep

    @property
    def times(self) -> StepTimes | None:
        return self.launched.times

    def wait(self) -> list[RowResult]:
        results = zip(self.output.rows, self.launched.wait(), strict=True)
        return [
            result._replace(token_id=None, is_nan=True) if _is_due(row, MAKES_NAN) else result
            for row, result in results
        ]


def _is_due(row: ScheduledRow, kind: int) -> bool:
    marker, num_tokens, *_ = (*row.sequence.request.prompt_token_ids[:2], 0, 0)
    return marker == kind and row.start + row.num_tokens > num_tokens


def _load(settings: Settings) -> tuple[Scheduler, Runner]:
    scheduler, runner = _load_engine(settings, resolve_model(settings.model, say), ())
    return scheduler, FaultyRunner(runner)


if __name__ == "__main__":
    flags = load_settings(sys.argv[1:])
    sys.exit(serve(flags, load_engine=partial(_load, flags)))
