"""Headrace beside its peers on one machine: `python -m headrace.benchmarks.compare`.

Starts every target, leaves all of them up, and measures one after the other, width by width, round by round: A B C,
then B C A. All targets of a round get the same prompts, no two rounds or widths do. Whoever does not rest while another
is measured is stopped meanwhile. Prints tables and ratios, and as the last line of stdout one JSON object
(`compare_report.json_line`); --out keeps every measurement. Exit codes: 0; 1 nothing was measured; 2 wrong use; 130
Ctrl-C, after printing what had finished. Progress and errors go to stderr.
"""

import asyncio
import os
import platform
import secrets
import signal
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from headrace.benchmarks.bench import event_loop
from headrace.benchmarks.compare_report import json_line, markdown, remarks
from headrace.benchmarks.compared_target import ComparedTarget, HttpTarget, TargetError
from headrace.benchmarks.comparison import Comparison, Figure, Measurement, StartUp, merge, spread, streams
from headrace.benchmarks.measurement import Targets, summarize
from headrace.benchmarks.peers import TARGETS, Installation, InstallError
from headrace.benchmarks.process_session import ProcessSession
from headrace.benchmarks.prompts import PromptMaker, TokenFit
from headrace.benchmarks.settings import (
    ClosedLoop,
    OneLineParser,
    UsageError,
    check_plot,
    count,
    natural,
    positive,
    widths,
)

_SLOW: Final = frozenset({"llama.cpp", "transformers"})  # they would take most of a wide round's time
_START_LIMIT_S: Final = 300.0
_MEASUREMENT_LIMIT_S: Final = 600.0
_LOOK_S: Final = 1.0
_LOOKS: Final = 3  # vLLM's worker spins for a second after its last step
_RESTING_SHARE: Final = 0.02  # of a core
_SPARE_CONTEXT_TOKENS: Final = 64  # over prompt and output
_LOAD: Final = ClosedLoop(concurrency=(1, 8, 32, 64))  # unless flags say otherwise


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One field per flag; those of the load are together."""

    targets: tuple[str, ...]
    load: ClosedLoop
    slow_widths: tuple[int, ...]
    rounds: int
    starts: int
    seed: int
    time_limit_s: float
    model: str | None
    peers: Path | None
    install: bool
    out: Path | None
    plot: Path | None
    report: tuple[Path, ...]

    def widths_of(self, target: str) -> list[int]:
        """Those at which it is measured."""
        asked = self.load.concurrency
        return [width for width in asked if target not in _SLOW or width in self.slow_widths]


def main(argv: list[str] | None = None) -> int:
    """Compare, print, and return the exit code."""
    try:
        settings = parse(argv)
        if settings.plot is not None:
            check_plot(settings.plot)
        if settings.report:
            return _print(_read(settings.report), settings)
        installation = Installation.of(settings.peers, settings.model, _say)
        if settings.install:
            installation.install(settings.targets, _say)
            return 0
        _check_out(settings.out)
        comparison = Comparison(_reported(settings, installation), _environment(settings, installation))
        _run(settings, installation, comparison)
    except (UsageError, InstallError) as error:
        _say(str(error))
        return 2
    code = _print(comparison, settings)
    return 130 if comparison.is_interrupted else code


def parse(argv: Sequence[str] | None) -> Settings:
    """Read the flags; None means the process's own.

    Raises:
        UsageError: they make no sense; the text names the flag.
    """
    flags = vars(_parser().parse_args(argv))
    load = ClosedLoop(
        concurrency=flags.pop("widths"),
        requests_per_stream=flags.pop("requests_per_stream"),
        prompt_tokens=flags.pop("prompt_tokens"),
        output_tokens=flags.pop("max_tokens"),
    )
    seed = flags.pop("seed")
    return Settings(load=load, seed=secrets.randbits(32) if seed is None else seed, **flags)


def rotated(names: Sequence[str], round_number: int) -> list[str]:
    """Order the targets of a round: each round begins with the next one."""
    first = round_number % max(1, len(names))
    return [*names[first:], *names[:first]]


def _run(settings: Settings, installation: Installation, comparison: Comparison) -> None:
    """Fill the comparison; whatever happens, no process is left behind."""
    started: list[ComparedTarget] = []
    try:
        with asyncio.Runner(loop_factory=event_loop()[1]) as runner:
            runner.run(_Comparing(settings, installation, comparison, started).run())
    except KeyboardInterrupt:  # a second one: the first is handled in run()
        comparison.is_interrupted = True
    finally:
        for target in started:
            if target.session is not None:
                target.session.signal(signal.SIGKILL)


class _Comparing:
    """One comparison under way."""

    def __init__(
        self, settings: Settings, installation: Installation, comparison: Comparison, started: list[ComparedTarget]
    ) -> None:
        self._settings = settings
        self._installation = installation
        self._comparison = comparison
        self._started = started  # whoever may have a process
        self._up: dict[str, ComparedTarget] = {}  # by name, in the order of the flag
        self._fit = TokenFit()

    async def run(self) -> None:
        """Start, measure, end."""
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        try:
            async with asyncio.timeout(self._settings.time_limit_s), AsyncExitStack() as ends:
                for name in self._settings.targets:
                    await self._bring_up(name, ends)
                await self._calibrate()
                await self._measure_all()
        except TimeoutError:
            self._comparison.is_time_limited = True
        except asyncio.CancelledError:
            self._comparison.is_interrupted = True  # the first Ctrl-C, or SIGTERM; what has finished is told

    async def _bring_up(self, name: str, ends: AsyncExitStack) -> None:
        """Start a target as often as is asked; the last start stays up. One that fails is left out."""
        settings = self._settings
        num_slots = max(settings.widths_of(name), default=0)
        if not num_slots:
            return
        context_tokens = settings.load.prompt_tokens + settings.load.output_tokens + _SPARE_CONTEXT_TOKENS
        try:
            recipe = self._installation.recipe(name, num_slots, context_tokens)
            target = ComparedTarget.of(recipe, self._installation.log(name))
        except InstallError as error:
            self._leave_out(name, str(error))
            return
        self._comparison.environment["commands"][name] = [*recipe.command]
        self._started.append(target)
        ends.push_async_callback(target.end)
        prompts = PromptMaker(settings.seed)
        for start in range(settings.starts):
            await target.end()
            async with self._rest_of(name):
                try:
                    async with asyncio.timeout(_START_LIMIT_S):
                        first_token_s = await target.start(prompts.prompt(settings.load.prompt_tokens))
                except (TargetError, TimeoutError) as error:
                    self._leave_out(name, str(error) or f"no first token within {_START_LIMIT_S:.0f} s of its start")
                    await target.end()
                    return
            is_counted = start > 0 or settings.starts == 1
            self._comparison.start_ups.append(StartUp(name, round(first_token_s, 3), is_counted))
            _say(f"{name}: first token after {first_token_s:.1f} s{'' if is_counted else ' (not counted)'}")
            self._save()
        self._up[name] = target

    async def _calibrate(self) -> None:
        """Fit the prompts' words by the first server's count: all have one tokenizer, so all get the same prompts."""
        for target in self._up.values():
            if isinstance(target, HttpTarget):
                prompts = PromptMaker(self._settings.seed + 1)
                self._fit = await target.calibrate(self._settings.load.prompt_tokens, prompts) or self._fit
                return

    async def _measure_all(self) -> None:
        for round_number in range(self._settings.rounds):
            for width in self._settings.load.concurrency:
                for name in rotated(self._settings.targets, round_number):
                    if name in self._up and width in self._settings.widths_of(name):
                        await self._measure(name, round_number, width)

    async def _measure(self, name: str, round_number: int, width: int) -> None:
        prompts = PromptMaker(prompts_seed(self._settings.seed, round_number, width))
        prompts.fit = self._fit
        async with self._rest_of(name) as paused:
            try:
                async with asyncio.timeout(_MEASUREMENT_LIMIT_S):
                    run, server_cores = await self._up[name].measure(self._settings.load, width, prompts)
            except (TargetError, TimeoutError) as error:
                self._leave_out(name, str(error) or f"{streams(width)} took over {_MEASUREMENT_LIMIT_S:.0f} s")
                await self._up.pop(name).end()
                return
        summary = asdict(summarize(run, Targets()))
        measurement = Measurement(name, round_number, width, summary, round(server_cores, 3), paused)
        self._comparison.measurements.append(measurement)
        self._save()
        speed = measurement.figure(Figure.TOKENS_PER_S)
        _say(f"round {round_number + 1}, {streams(width)}, {name}: {speed or 0:.0f} tok/s")

    @asynccontextmanager
    async def _rest_of(self, name: str) -> AsyncIterator[dict[str, float]]:
        """Wait for all other targets to rest, and stop until the end of the block whoever does not."""
        others = {other: target.session for other, target in self._up.items() if other != name and target.session}
        paused: dict[str, float] = {}
        for _ in range(_LOOKS if others else 0):
            shares = await _idle_shares(others)
            paused = {other: round(share, 3) for other, share in shares.items() if share > _RESTING_SHARE}
            if not paused:
                break
        for other in paused:
            others[other].signal(signal.SIGSTOP)
        try:
            yield paused
        finally:
            for other in paused:
                others[other].signal(signal.SIGCONT)

    def _leave_out(self, name: str, why: str) -> None:
        self._comparison.left_out[name] = why
        _say(f"{name} is left out: {why}")

    def _save(self) -> None:
        if self._settings.out is not None:
            unfinished = self._settings.out.with_name(f"{self._settings.out.name}.tmp")
            unfinished.write_text(self._comparison.encode())
            unfinished.replace(self._settings.out)


async def _idle_shares(sessions: dict[str, ProcessSession]) -> dict[str, float]:
    """Look for a second at what share of a core each one uses."""
    begin_s, before = time.monotonic(), {name: session.cpu_s() for name, session in sessions.items()}
    await asyncio.sleep(_LOOK_S)
    wall_s = time.monotonic() - begin_s
    return {name: (session.cpu_s() - before[name]) / wall_s for name, session in sessions.items()}


def prompts_seed(seed: int, round_number: int, width: int) -> int:
    """Make one number of three, so that no round or width has another's prompts."""
    return (seed << 40) | (round_number << 20) | width


def _check_out(path: Path | None) -> None:
    if path is not None and (path.is_dir() or not os.access(path.parent, os.W_OK)):
        raise UsageError(f"--out {path}: cannot be written")


def _read(paths: Sequence[Path]) -> Comparison:
    try:
        return merge([Comparison.decode(path.read_text()) for path in paths])
    except (OSError, ValueError) as error:
        raise UsageError(f"--report: {error}") from error


def _print(comparison: Comparison, settings: Settings) -> int:
    print(markdown(comparison), end="\n\n")
    for remark in remarks(comparison):
        print(f"- {remark}")
    if settings.plot is not None and comparison.measurements:
        from headrace.benchmarks.charts import draw_comparison

        try:
            draw_comparison(settings.plot, comparison.settings["model"], _curves(comparison))
        except OSError as error:
            _say(f"cannot write the plot: {error}")
    print(json_line(comparison), flush=True)
    return 0 if comparison.measurements else 1


def _curves(comparison: Comparison) -> dict[str, list[tuple[float, float, int]]]:
    curves: dict[str, list[tuple[float, float, int]]] = {}
    for name in comparison.targets:
        for width in comparison.widths:
            itl_ms = spread(comparison, name, width, Figure.ITL_P50)
            tokens_per_s = spread(comparison, name, width, Figure.TOKENS_PER_S)
            if itl_ms is not None and tokens_per_s is not None:
                curves.setdefault(name, []).append((itl_ms.median, tokens_per_s.median, width))
    return curves


def _reported(settings: Settings, installation: Installation) -> dict[str, Any]:
    return {
        "model": installation.gguf.stem,
        "targets": list(settings.targets),
        "widths": list(settings.load.concurrency),
        "slow_widths": list(settings.slow_widths),
        "rounds": settings.rounds,
        "starts": settings.starts,
        "requests_per_stream": settings.load.requests_per_stream,
        "prompt_tokens": settings.load.prompt_tokens,
        "max_tokens": settings.load.output_tokens,
        "seed": settings.seed,
    }


def _environment(settings: Settings, installation: Installation) -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "event_loop": event_loop()[0],
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "started_at_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: installation.version(name) for name in settings.targets},
        "commands": {},
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog="python -m headrace.benchmarks.compare",
        description="Measure Headrace beside its peers. The last line of stdout is one JSON object.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--targets", type=_targets, default=TARGETS, metavar="NAME,...", help=f"default {','.join(TARGETS)}"
    )
    parser.add_argument("--widths", type=widths, default=_LOAD.concurrency, metavar="N,...", help="default 1,8,32,64")
    parser.add_argument(
        "--slow-widths",
        type=widths,
        default=(1, 8),
        metavar="N,...",
        help=f"those of the widths at which {' and '.join(sorted(_SLOW))} are measured (default 1,8)",
    )
    parser.add_argument("--rounds", type=count, default=3, help="default %(default)s")
    parser.add_argument(
        "--starts", type=count, default=2, help="of each target; the first of several is not counted (default 2)"
    )
    parser.add_argument(
        "--requests-per-stream", type=count, default=_LOAD.requests_per_stream, help="default %(default)s"
    )
    parser.add_argument("--prompt-tokens", type=count, default=_LOAD.prompt_tokens, help="default %(default)s")
    parser.add_argument(
        "--max-tokens", type=count, default=_LOAD.output_tokens, help="output tokens (default %(default)s)"
    )
    parser.add_argument("--seed", type=natural, help="of the prompts (default: a new one, reported)")
    parser.add_argument(
        "--time-limit-s", type=positive, default=7200.0, help="bound on the whole invocation (default %(default)g)"
    )
    parser.add_argument("--model", metavar="GGUF", help="a .gguf file or a packaged model (default: the demo model)")
    parser.add_argument("--peers", type=Path, metavar="DIR", help="where peers are installed (default: in the cache)")
    parser.add_argument("--install", action="store_true", help="install what the targets lack, and measure nothing")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write every measurement here, as it is made")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a chart, .png or .svg (needs matplotlib)")
    parser.add_argument(
        "--report",
        type=Path,
        nargs="+",
        default=(),
        metavar="FILE",
        help="print what --out has kept, and measure nothing",
    )
    return parser


def _targets(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in TARGETS:
            raise UsageError(f"--targets {name}: expected some of {', '.join(TARGETS)}")
    return names


def _say(line: str) -> None:
    print(f"compare: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
