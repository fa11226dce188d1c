"""`headrace bench`: measures a streaming OpenAI-compatible server (Headrace, vLLM, llama.cpp) over HTTP.

Runs one closed loop per width, or one open loop, and prints a table, remarks, and as the last line of stdout one JSON
object (schema: `report.json_line`). How each figure is computed, percentiles included, is said in `measurement`.
Exit codes: 0; 1 no request succeeded; 2 wrong use, or a server that cannot be measured; 130 Ctrl-C, after printing what
had finished. Progress and errors go to stderr.
"""

import asyncio
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from headrace.benchmarks.arrivals import Arrival, TraceError, poisson_arrivals, read_trace
from headrace.benchmarks.completion_client import CompletionClient
from headrace.benchmarks.http_client import HttpClient
from headrace.benchmarks.load import CalibrationError, LoadGenerator
from headrace.benchmarks.measurement import Run, Targets, summarize
from headrace.benchmarks.prompts import PromptMaker, TokenFit
from headrace.benchmarks.report import Report, json_line, remarks, table
from headrace.benchmarks.settings import (
    ClosedLoop,
    Load,
    PoissonLoad,
    Settings,
    TraceReplay,
    UsageError,
    check_plot,
    parse,
)

_MODES: Final = {ClosedLoop: "closed", PoissonLoad: "poisson", TraceReplay: "trace"}


class UnmeasurableError(Exception):
    """The server cannot be measured; the text is the one line to print."""


@dataclass(slots=True)
class Session:
    """What one invocation has so far; filled while it runs, so that an interrupted one can still be told."""

    runs: list[Run] = field(default_factory=list)
    model: str | None = None
    token_fit: TokenFit | None = None
    is_interrupted: bool = False
    is_time_limited: bool = False


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and return the exit code."""
    started_at_utc = datetime.now(UTC).isoformat(timespec="seconds")
    session = Session()
    try:
        settings = parse(argv)
        if settings.plot is not None:
            check_plot(settings.plot)
        arrivals = _arrivals(settings.load, settings.max_requests, settings.seed)
        loop_name, loop_factory = event_loop()
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            runner.run(_measure(settings, arrivals, session))
    except (UsageError, UnmeasurableError) as error:
        print(f"headrace bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # a second one: the first is handled in _measure
        print("headrace bench: interrupted", file=sys.stderr)
        return 130
    report = Report(
        settings=_reported(settings),
        environment={
            "python": platform.python_version(),
            "event_loop": loop_name,
            "platform": platform.platform(),
            "started_at_utc": started_at_utc,
        },
        model=session.model,
        token_fit=session.token_fit,
        is_interrupted=session.is_interrupted,
        is_time_limited=session.is_time_limited,
        summaries=[summarize(run, Targets(settings.slo_ttft_ms, settings.slo_itl_ms)) for run in session.runs],
    )
    exit_code = 0 if any(summary.num_ok for summary in report.summaries) else 1
    print(table(report.summaries))
    for remark in remarks(report):
        print(remark)
    if settings.plot is not None and session.runs:
        from headrace.benchmarks.charts import draw

        title = f"{session.model or settings.url.authority}, {_MODES[type(settings.load)]} load"
        try:
            draw(settings.plot, title, session.runs, report.summaries)
        except OSError as error:
            print(f"headrace bench: cannot write the plot: {error}", file=sys.stderr)
            exit_code = 2
    print(json_line(report), flush=True)
    return 130 if session.is_interrupted else exit_code


async def _measure(settings: Settings, arrivals: Sequence[Arrival], session: Session) -> None:
    """Run everything into the session.

    Raises:
        UnmeasurableError: the server did not get as far as the first run.
    """
    http = HttpClient(settings.url, settings.api_key, settings.keep_alive)
    try:
        async with asyncio.timeout(settings.time_limit_s):
            generator = await _prepare(settings, arrivals, http, session)
            if isinstance(settings.load, ClosedLoop):
                await _run_closed_loop(settings.load, settings.num_warmup, generator, session)
            else:
                await _run_open_loop(settings.load, settings.num_warmup, arrivals, generator, session)
    except TimeoutError:
        if not session.runs:
            raise UnmeasurableError(f"{settings.url.authority} did not answer within --time-limit-s") from None
        session.is_time_limited = True
    except asyncio.CancelledError:
        session.is_interrupted = True  # the first Ctrl-C; what has finished is told
    finally:
        http.close()


async def _prepare(
    settings: Settings, arrivals: Sequence[Arrival], http: HttpClient, session: Session
) -> LoadGenerator:
    """Find the model and calibrate the prompts' lengths."""
    client = CompletionClient(
        http, settings.endpoint, settings.model or None, settings.ignore_eos, settings.continuous_usage
    )
    if settings.model == "auto":
        try:
            client = replace(client, model=await client.first_model())
        except OSError as error:
            raise UnmeasurableError(f"cannot reach {settings.url.authority}: {error}") from error
    session.model = client.model
    generator = LoadGenerator(client, PromptMaker(settings.seed))
    if isinstance(settings.load, ClosedLoop):
        longest_tokens = settings.load.prompt_tokens
    else:
        longest_tokens = max(arrival.prompt_tokens for arrival in arrivals)
    try:
        session.token_fit = await generator.calibrate(longest_tokens)
    except CalibrationError as error:
        raise UnmeasurableError(f"{settings.url.authority} failed the first request: {error}") from error
    return generator


async def _run_closed_loop(load: ClosedLoop, num_warmup: int, generator: LoadGenerator, session: Session) -> None:
    for width in load.concurrency:
        await generator.warm_up(num_warmup, width, load.prompt_tokens, load.output_tokens)
        run = Run(
            label=f"{width} stream{'s' if width > 1 else ''}",
            num_planned=width * load.requests_per_stream,
            width=width,
            is_first_wave_counted=not load.exclude_first_wave,
        )
        _begin(run, session)
        await generator.closed_loop(run, load.requests_per_stream, width, load.prompt_tokens, load.output_tokens)


async def _run_open_loop(
    load: PoissonLoad | TraceReplay,
    num_warmup: int,
    arrivals: Sequence[Arrival],
    generator: LoadGenerator,
    session: Session,
) -> None:
    await generator.warm_up(num_warmup, 1, arrivals[0].prompt_tokens, arrivals[0].output_tokens)
    label = "trace" if isinstance(load, TraceReplay) else f"{load.rate:g} req/s"
    run = Run(label=label, num_planned=len(arrivals))
    _begin(run, session)
    await generator.open_loop(run, arrivals)


def _begin(run: Run, session: Session) -> None:
    session.runs.append(run)
    print(f"{run.label}: {run.num_planned} requests", file=sys.stderr, flush=True)


def _arrivals(load: Load, max_requests: int, seed: int) -> list[Arrival]:
    """Draw or read an open loop's arrivals, one at least; a closed loop has none."""
    if isinstance(load, ClosedLoop):
        return []
    if isinstance(load, PoissonLoad):
        arrivals = poisson_arrivals(
            load.rate, load.duration_s, max_requests, load.prompt_tokens, load.output_tokens, seed
        )
        if not arrivals:
            raise UsageError("no request arrives: --rate times --duration-s is too small")
        return arrivals
    try:
        arrivals = read_trace(load.trace, max_requests, load.trace_scale, load.trace_rate)
    except (TraceError, OSError) as error:
        raise UsageError(f"--trace: {error}") from error
    if load.duration_s is None:
        return arrivals
    return [arrival for arrival in arrivals if arrival.at_s < load.duration_s]


def event_loop() -> tuple[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Choose the fastest event loop there is: its name and what makes one."""
    try:
        import uvloop
    except ImportError:
        return "asyncio", asyncio.new_event_loop
    return "uvloop", uvloop.new_event_loop


def _reported(settings: Settings) -> dict[str, Any]:
    values = asdict(settings)
    del values["api_key"]
    values |= {"url": settings.url.url, "mode": _MODES[type(settings.load)], **values.pop("load")}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


if __name__ == "__main__":
    sys.exit(main())
