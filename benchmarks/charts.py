"""Draws what a run's table cannot show. The one module that imports matplotlib: import it only for a plot.

Closed loop: throughput against latency per width (the Pareto curve), and TTFT by width. Open loop: the distributions,
and every request at the second it was launched.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from headrace.benchmarks.measurement import Outcome, Run, Summary

ParetoPoint = tuple[float, float, int]
"""(ITL p50 in ms, output tokens per second, streams)"""


def draw(path: Path, title: str, runs: Sequence[Run], summaries: Sequence[Summary]) -> None:
    """Write the figure in the format of the file's suffix.

    Raises:
        OSError: the file cannot be written.
    """
    is_closed = all(run.width is not None for run in runs)
    figure = Figure(figsize=(11, 4.5) if is_closed else (15, 4.5), layout="constrained")
    figure.suptitle(title)
    if is_closed:
        pareto, ttft = figure.subplots(1, 2)
        points = [
            (summary.itl_ms.p50, summary.output_tokens_per_s, summary.width)
            for summary in summaries
            if summary.itl_ms is not None and summary.output_tokens_per_s is not None and summary.width is not None
        ]
        _draw_pareto(pareto, {"": points})
        _draw_ttft_by_width(ttft, summaries)
    else:
        ttft, itl, launches = figure.subplots(1, 3)
        ok = [timeline for run in runs for timeline in run.counted if timeline.outcome is Outcome.OK]
        _draw_cumulative(ttft, "TTFT (ms)", (timeline.ttft_s for timeline in ok))
        _draw_cumulative(itl, "ITL (ms)", (gap for timeline in ok for gap in timeline.itls_s))
        _draw_launches(launches, runs)
    figure.savefig(path)


def draw_comparison(path: Path, title: str, curves: Mapping[str, Sequence[ParetoPoint]]) -> None:
    """Write the Pareto curves of several targets, by name, in the format of the file's suffix.

    Raises:
        OSError: the file cannot be written.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots()
    _draw_pareto(axes, curves)
    axes.legend()
    figure.savefig(path)


def draw_fleet(
    path: Path,
    growth: Mapping[str, Sequence[tuple[int, float, float]]],
    staleness: Mapping[str, Sequence[tuple[float, float]]],
    bounds: Mapping[str, Sequence[tuple[int, float]]],
) -> None:
    """Write what routing policies do as replicas are added and gauges grow old, and which bounds fill.

    `growth` are (replicas, TTFT p99 in s, percent refused) by policy, `staleness` (seconds between scrapes, percent
    refused), `bounds` (replicas, share of the bound).

    Raises:
        OSError: the file cannot be written.
    """
    figure = Figure(figsize=(13, 10), layout="constrained")
    (ttft, refused), (stale, used) = figure.subplots(2, 2)
    for label, by_count in growth.items():
        counts = [point[0] for point in by_count]
        ttft.plot(counts, [point[1] for point in by_count], marker="o", label=label)
        refused.plot(counts, [point[2] for point in by_count], marker="o", label=label)
    for label, by_interval in staleness.items():
        stale.plot(*zip(*by_interval, strict=True), marker="o", label=label)
    for label, by_bound in bounds.items():
        used.plot(*zip(*by_bound, strict=True), marker="o", label=label)
    used.axhline(1.0, color="black", linestyle="--")
    ttft.set(xlabel="replicas", ylabel="TTFT p99 (s)", title="First tokens, gauges scraped every second")
    refused.set(xlabel="replicas", ylabel="refused (%)", title="Refused")
    stale.set(xlabel="seconds between scrapes", ylabel="refused (%)", title="Refused, by the gauges' age")
    used.set(xlabel="replicas", ylabel="share of its bound", title="What breaks first", yscale="log")
    for axes in (ttft, refused, stale, used):
        axes.set_xscale("log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path)


def _draw_pareto(axes: Axes, curves: Mapping[str, Sequence[ParetoPoint]]) -> None:
    for label, points in curves.items():
        axes.plot([point[0] for point in points], [point[1] for point in points], marker="o", label=label)
        for itl_p50_ms, tokens_per_s, width in points:
            axes.annotate(f"{width}", (itl_p50_ms, tokens_per_s), textcoords="offset points", xytext=(6, -10))
    axes.set(xlabel="ITL p50 (ms)", ylabel="output tokens/s", title="Throughput against latency, by streams")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)


def _draw_ttft_by_width(axes: Axes, summaries: Sequence[Summary]) -> None:
    points = [(summary.width, summary.ttft_ms) for summary in summaries if summary.width and summary.ttft_ms]
    widths = [width for width, _ in points]
    axes.plot(widths, [ttft_ms.p50 for _, ttft_ms in points], marker="o", label="p50")
    axes.plot(widths, [ttft_ms.p99 for _, ttft_ms in points], marker="o", label="p99")
    if widths:
        axes.set_xscale("log", base=2)
        axes.set_xticks(widths, [str(width) for width in widths])
        axes.legend()
    axes.set(xlabel="streams", ylabel="TTFT (ms)", title="Time to first token")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)


def _draw_cumulative(axes: Axes, label: str, samples_s: Iterable[float]) -> None:
    samples_ms = sorted(sample_s * 1e3 for sample_s in samples_s)
    if samples_ms:
        axes.ecdf(samples_ms)
    axes.set(xlabel=label, ylabel="share of samples", title=f"{label.split()[0]} distribution")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)


def _draw_launches(axes: Axes, runs: Sequence[Run]) -> None:
    for outcome, colour in (
        (Outcome.OK, "tab:blue"),
        (Outcome.SHED, "tab:orange"),
        (Outcome.FAILED, "tab:red"),
        (Outcome.UNFINISHED, "tab:grey"),
    ):
        points = [
            (timeline.launched_s - run.started_s, timeline.ttft_s * 1e3 if outcome is Outcome.OK else 0.0)
            for run in runs
            for timeline in run.counted
            if timeline.outcome is outcome
        ]
        if points:
            marker = "." if outcome is Outcome.OK else "x"
            axes.scatter(
                [at_s for at_s, _ in points], [ttft_ms for _, ttft_ms in points], c=colour, marker=marker, label=outcome
            )
    if axes.collections:
        axes.legend()
    axes.set(xlabel="launched (s)", ylabel="TTFT (ms); without one: 0", title="Every request, when it was launched")
    axes.grid(alpha=0.3)
