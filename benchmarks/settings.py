"""The flags of `headrace bench`: read, checked against one another, frozen.

A flag that the chosen loop would not use is an error that names it, so that nobody reports a figure under a setting
that had no effect. Wrong use is one line, without argparse's usage text.
"""

import argparse
import importlib.util
import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final, NoReturn

from headrace.benchmarks.completion_client import Endpoint
from headrace.benchmarks.http_client import Target
from headrace.benchmarks.measurement import Targets


class UsageError(Exception):
    """The flags ask for something that cannot be done; the text is the one line to print."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClosedLoop:
    """A fixed number of streams, for one run per number."""

    concurrency: tuple[int, ...] = (1, 8, 32)
    requests_per_stream: int = 5
    exclude_first_wave: bool = False
    prompt_tokens: int = 154
    output_tokens: int = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class PoissonLoad:
    """Random arrivals at a mean rate per second."""

    rate: float
    duration_s: float = 60.0
    prompt_tokens: int = 154
    output_tokens: int = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceReplay:
    """Recorded arrivals and lengths."""

    trace: Path
    trace_rate: float | None = None
    trace_scale: float = 1.0
    duration_s: float | None = None


Load = ClosedLoop | PoissonLoad | TraceReplay
_LOAD_FLAGS: Final = frozenset(part.name for kind in (ClosedLoop, PoissonLoad, TraceReplay) for part in fields(kind))


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One field per flag; those of the load are together."""

    url: Target
    endpoint: Endpoint
    model: str
    api_key: str | None
    keep_alive: bool
    continuous_usage: bool
    load: Load
    ignore_eos: bool
    num_warmup: int
    seed: int
    max_requests: int
    time_limit_s: float
    slo_ttft_ms: float
    slo_itl_ms: float
    plot: Path | None


def parse(argv: Sequence[str] | None) -> Settings:
    """Read the flags; None means the process's own.

    Raises:
        UsageError: they make no sense; the text names the flag.
    """
    flags = vars(_parser().parse_args(argv))
    given = {name: value for name in sorted(_LOAD_FLAGS) if (value := flags.pop(name)) is not None}
    kind: type[Load] = TraceReplay if "trace" in given else PoissonLoad if "rate" in given else ClosedLoop
    for name in given:
        if name not in kind.__dataclass_fields__:
            raise UsageError(f"--{name.replace('_', '-')} has no effect on this load ({kind.__name__})")
    if flags["seed"] is None:
        flags["seed"] = secrets.randbits(32)
    settings = Settings(load=kind(**given), **flags)
    if isinstance(settings.load, ClosedLoop):
        _check_closed_loop(settings.load, settings.max_requests)
    return settings


def _check_closed_loop(load: ClosedLoop, max_requests: int) -> None:
    if load.exclude_first_wave and load.requests_per_stream < 2:
        raise UsageError("--exclude-first-wave leaves nothing of --requests-per-stream 1")
    num_requests = sum(load.concurrency) * load.requests_per_stream
    if num_requests > max_requests:
        raise UsageError(f"{num_requests} requests are over --max-requests {max_requests}")


class OneLineParser(argparse.ArgumentParser):
    """Raises UsageError for wrong use."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="headrace bench",
        description="Measure a streaming OpenAI-compatible server. The last line of stdout is one JSON object.",
        allow_abbrev=False,
    )
    server = parser.add_argument_group("server")
    server.add_argument(
        "--url",
        type=_target,
        default="http://127.0.0.1:8000",
        help="base URL, with or without /v1 (default %(default)s)",
    )
    server.add_argument(
        "--endpoint", type=Endpoint, choices=list(Endpoint), default=Endpoint.COMPLETIONS, help="default completions"
    )
    server.add_argument(
        "--model", default="auto", help="sent as it is; '' sends none; auto (default): the first of /v1/models, if any"
    )
    server.add_argument("--api-key", type=_api_key, help="sent as a bearer token, never printed")
    server.add_argument("--keep-alive", action="store_true", help="reuse connections (default: one per request)")
    server.add_argument(
        "--continuous-usage", action="store_true", help="ask for usage on every chunk, for exact gaps per token"
    )

    load = parser.add_argument_group("load: one of --concurrency, --rate, --trace (default --concurrency 1,8,32)")
    loop = load.add_mutually_exclusive_group()
    loop.add_argument("--concurrency", type=widths, metavar="N,...", help="closed loop: one run per number of streams")
    loop.add_argument("--rate", type=positive, metavar="PER_S", help="open loop: Poisson arrivals")
    loop.add_argument(
        "--trace", type=Path, metavar="CSV", help="open loop: TIMESTAMP, ContextTokens, GeneratedTokens (Azure 2023)"
    )
    load.add_argument("--requests-per-stream", type=count, help="closed loop (default 5)")
    load.add_argument(
        "--exclude-first-wave",
        action="store_true",
        default=None,
        help="closed loop: leave each stream's first request, all at once, out of the figures",
    )
    load.add_argument(
        "--duration-s", type=positive, help="open loop: no arrivals after it (default 60; a trace: its end)"
    )
    load.add_argument("--trace-rate", type=positive, metavar="PER_S", help="stretch the trace to this mean rate")
    load.add_argument("--trace-scale", type=positive, help="multiply all the trace's lengths by one factor")
    load.add_argument("--prompt-tokens", type=count, help="default 154; a trace has its own")
    load.add_argument("--output-tokens", type=count, help="default 128; a trace has its own")
    load.add_argument(
        "--no-ignore-eos", dest="ignore_eos", action="store_false", help="let the model end before its output length"
    )
    load.add_argument("--num-warmup", type=natural, default=1, help="uncounted requests before each run (default 1)")
    load.add_argument(
        "--seed",
        type=natural,
        help="of prompts and arrivals (default: a new one, reported). The same seed sends the same prompts again: "
        "take a new one for every repetition against one server process",
    )
    load.add_argument(
        "--max-requests",
        type=count,
        default=10_000,
        help="bound on the requests of all runs, warm-up aside (default %(default)s)",
    )
    load.add_argument(
        "--time-limit-s", type=positive, default=600.0, help="bound on the whole invocation (default %(default)g)"
    )

    report = parser.add_argument_group("report")
    goodput = Targets()
    report.add_argument(
        "--slo-ttft-ms", type=positive, default=goodput.ttft_ms, help="goodput's bound (default %(default)g)"
    )
    report.add_argument(
        "--slo-itl-ms",
        type=positive,
        default=goodput.itl_ms,
        help="bound on the p99 of a request's own gaps (default %(default)g)",
    )
    report.add_argument("--plot", type=Path, metavar="FILE", help="write a chart, .png or .svg (needs matplotlib)")
    return parser


def _target(text: str) -> Target:
    try:
        return Target.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error


def _api_key(text: str) -> str:
    if not text.isascii() or not text.isprintable():
        raise argparse.ArgumentTypeError("a key is printable ASCII")
    return text


def check_plot(path: Path) -> None:
    """Refuse a plot before anything is measured, so that a run is never lost for want of it.

    Raises:
        UsageError: the name, its folder or matplotlib's absence forbids it.
    """
    if path.suffix not in (".png", ".svg"):
        raise UsageError(f"--plot {path}: expected a name that ends in .png or .svg")
    if not path.parent.is_dir():
        raise UsageError(f"--plot {path}: no such folder")
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib: pip install 'headrace[bench]'")


def widths(text: str) -> tuple[int, ...]:
    """Read numbers of streams, separated by commas."""
    return tuple(count(part) for part in text.split(","))


def count(text: str) -> int:
    """Read a whole number over 0."""
    number = natural(text)
    if number == 0:
        raise argparse.ArgumentTypeError("expected 1 or more, not 0")
    return number


def natural(text: str) -> int:
    """Read a whole number."""
    if not (text.strip().isascii() and text.strip().isdigit()):
        raise argparse.ArgumentTypeError(f"expected a whole number, not {text!r}")
    return int(text)


def positive(text: str) -> float:
    """Read a finite number over 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number over 0, not {text!r}")
    return number
