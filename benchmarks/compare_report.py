"""Prints a comparison: Markdown tables for people, what must be known beside them, one JSON line for programs."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, Final

from headrace.benchmarks.comparison import (
    BEST_PEER,
    SCHEMA,
    Comparison,
    Figure,
    Spread,
    ratio,
    spread,
    start_up,
    streams,
    verdicts,
)
from headrace.benchmarks.peers import IN_PROCESS, OURS

_BUSY_GENERATOR: Final = 0.5
_LENGTH_TOLERANCE: Final = 0.05


def markdown(comparison: Comparison) -> str:
    """Lay out figures, ratios, starts and floors; milliseconds where no unit is said, in brackets the range."""
    return "\n\n".join(
        [
            _table(
                ["streams", "target", "rounds", *(figure.heading for figure in Figure), *_CPU], _figures(comparison)
            ),
            "Ratios of each round, their median: tok/s (more is better), TTFT p50, ITL p99 (less is better)",
            _table(["streams", "ours", *_peers(comparison)], _ratios(comparison)),
            _table(["target", "start to first token, s"], _starts(comparison)),
            _table(["floor", "bound", "measured", "met"], _floors(comparison)),
        ]
    )


def remarks(comparison: Comparison) -> list[str]:
    """Say what a reader must know before believing the tables."""
    settings, environment = comparison.settings, comparison.environment
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if name not in OURS)
    lines = [
        f"{environment['cores']} cores of {environment['cpu']}; {versions}",
        f"{settings['model']}; prompts of {settings['prompt_tokens']} tokens, {settings['max_tokens']} output tokens, "
        f"greedy, {settings['requests_per_stream']} requests per stream",
        "the first wave (all prompts at once) is counted",
    ]
    in_process = [name for name in comparison.targets if name in IN_PROCESS]
    if in_process:
        lines.append(f"{', '.join(in_process)}: in-process, without a socket, HTTP or text; to their favour")
    for name in comparison.targets:
        lines += [f"{name}: {remark}" for remark in _remarks_on(comparison, name)]
    lines += [f"{name} is left out: {why}" for name, why in comparison.left_out.items()]
    if comparison.is_time_limited:
        lines.append("the time limit ended the comparison")
    if comparison.is_interrupted:
        lines.append("the comparison was interrupted")
    return lines


def json_line(comparison: Comparison) -> str:
    """Encode the findings on one line.

    Top level: `schema`; `settings`; `environment` (machine, versions, commands); `medians`: {target, width, figure,
    median, low, high, num_rounds}; `ratios`: the same with ours and peer for target; `start_ups`: {target, median, ...}
    in s; `floors`: {what, bound, is_upper, measured, is_met (null: not measured)}; `left_out`; `is_interrupted`;
    `is_time_limited`. The file of --out has each measurement.
    """
    medians = [
        {"target": name, "width": width, "figure": figure, **asdict(found)}
        for name in comparison.targets
        for width in comparison.widths
        for figure in Figure
        if (found := spread(comparison, name, width, figure)) is not None
    ]
    ratios = [
        {"ours": ours, "peer": peer, "width": width, "figure": figure, **asdict(found)}
        for ours in OURS
        for peer in (*_peers(comparison), BEST_PEER)
        for width in comparison.widths
        for figure in Figure
        if (found := ratio(comparison, ours, peer, width, figure)) is not None
    ]
    starts = [
        {"target": name, **asdict(found)}
        for name in comparison.settings["targets"]
        if (found := start_up(comparison, name)) is not None
    ]
    findings: dict[str, Any] = {
        "schema": f"{SCHEMA}/findings",
        "settings": comparison.settings,
        "environment": comparison.environment,
        "medians": medians,
        "ratios": ratios,
        "start_ups": starts,
        "floors": [{**asdict(verdict), "is_met": verdict.is_met} for verdict in verdicts(comparison)],
        "left_out": comparison.left_out,
        "is_interrupted": comparison.is_interrupted,
        "is_time_limited": comparison.is_time_limited,
    }
    return json.dumps(findings, allow_nan=False)


_CPU: Final = ("generator CPU", "server cores")


def _figures(comparison: Comparison) -> Iterable[list[str]]:
    for width in comparison.widths:
        for name in comparison.targets:
            found = [spread(comparison, name, width, figure) for figure in Figure]
            mine = [each for each in comparison.measurements if (each.target, each.width) == (name, width)]
            if not mine:
                continue
            share = Spread.of(each.summary["generator_cpu_share"] for each in mine)
            cores = Spread.of(each.server_cores for each in mine)
            cpu = [
                "-" if share is None or name in IN_PROCESS else f"{share.median:.0%}",
                "-" if cores is None else f"{cores.median:.2f}",
            ]
            yield [str(width), name, str(len(mine)), *map(_with_range, found), *cpu]


def _ratios(comparison: Comparison) -> Iterable[list[str]]:
    figures = (Figure.TOKENS_PER_S, Figure.TTFT_P50, Figure.ITL_P99)
    for width in comparison.widths:
        for ours in OURS:
            if ours in comparison.targets:
                cells = [
                    ", ".join(_ratio(ratio(comparison, ours, peer, width, figure)) for figure in figures)
                    for peer in _peers(comparison)
                ]
                yield [str(width), ours, *cells]


def _starts(comparison: Comparison) -> Iterable[list[str]]:
    for name in comparison.settings["targets"]:
        if (found := start_up(comparison, name)) is not None:
            yield [name, _with_range(found)]


def _floors(comparison: Comparison) -> Iterable[list[str]]:
    words = {True: "yes", False: "NO", None: "not measured"}
    for verdict in verdicts(comparison):
        bound = f"{'<=' if verdict.is_upper else '>='} {verdict.bound:g}"
        yield [verdict.what, bound, _with_range(verdict.measured), words[verdict.is_met]]


def _peers(comparison: Comparison) -> list[str]:
    return [name for name in comparison.targets if name not in OURS]


def _remarks_on(comparison: Comparison, name: str) -> Iterable[str]:
    mine = [measurement for measurement in comparison.measurements if measurement.target == name]
    prompts = [length for each in mine if (length := each.summary["prompt_tokens_mean"]) is not None]
    if prompts:
        yield f"mean prompt {sum(prompts) / len(prompts):.1f} tokens by its own count"
    for each in mine:
        summary, where = each.summary, f"round {each.round_number + 1}, {streams(each.width)}"
        if summary["num_ok"] < summary["num_planned"]:
            yield f"{where}: {summary['num_ok']} of {summary['num_planned']} requests ended well {summary['failures']}"
        asked, sent = summary["output_tokens_asked_mean"], summary["output_tokens_mean"]
        if sent is not None and sent < asked * (1 - _LENGTH_TOLERANCE):
            yield f"{where}: mean output {sent:g} tokens, SHORTER than the {asked:g} asked"
        if (summary["generator_cpu_share"] or 0) > _BUSY_GENERATOR:
            yield f"{where}: the generator used {summary['generator_cpu_share']:.0%} of a core (may be the bottleneck)"
    for other in sorted({other for each in mine for other in each.paused}):
        shares = [each.paused[other] for each in mine if other in each.paused]
        yield f"{other} did not rest beside {len(shares)} measurements (up to {max(shares):.0%} of a core): stopped"


def _table(header: list[str], rows: Iterable[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _with_range(found: Spread | None) -> str:
    if found is None:
        return "-"
    if found.num_rounds == 1:
        return _number(found.median)
    return f"{_number(found.median)} ({_number(found.low)} to {_number(found.high)})"


def _ratio(found: Spread | None) -> str:
    return "-" if found is None else f"{found.median:.2f}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
