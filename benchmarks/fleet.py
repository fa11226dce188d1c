"""`python -m headrace.benchmarks.fleet`: how cost grows from 1 to 1,000 replicas and a million users.

Plays `simulated_fleet` with each routing policy at each number of replicas, then with gauges of several ages, measures
what one of everything costs those in front (`fleet_costs`), and prints what breaks first. It prints Markdown tables,
and as the last line of stdout one JSON object. A cost model's time is no machine's: the ratios are what counts.
"""

import argparse
import json
import math
import multiprocessing
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from headrace.benchmarks.fleet_costs import BreakingPoint, Rates, breaking_points, measure
from headrace.benchmarks.simulated_fleet import PIECES_PER_REPLICA, WARM_UP_S, WINDOW_S, Figures, Setting, play

_COUNTS = (1, 10, 100, 1000)
# (Policy, whether routers count what they have sent, with how many replicas at most).
_GROWTH_KINDS = (
    ("round robin", True, 1000),
    ("least queue", True, 1000),
    ("prefix-aware", True, 1000),
    ("predicted TTFT", True, 1000),
    ("headrace", True, 1000),
    ("least queue", False, 1000),
    ("predicted TTFT", False, 100),
)
# (Policy, whether routers count what they have sent, how many there are).
_STALENESS_KINDS = (
    ("least queue", False, 1),
    ("least queue", True, 1),
    ("two choices", False, 1),
    ("prefix-aware", True, 1),
    ("prefix-aware", True, 8),
    ("predicted TTFT", False, 1),
    ("predicted TTFT", True, 1),
    ("predicted TTFT", True, 8),
    ("headrace", True, 1),
    ("headrace", True, 8),
)
_STALENESS_REPLICAS = 20
_INTERVALS_S = (0.1, 1.0, 5.0)
_STALENESS_WARM_UP_S, _STALENESS_WINDOW_S = 7.0, 10.0
# Of fewer than so many replicas several fleets are counted as one, which see the same warm-up and window.
_ENOUGH_REPLICAS, _MOST_FLEETS = 60, 30


def growth_settings(counts: Sequence[int], rate_per_s: float, scale: float, seed: int) -> list[Setting]:
    """Each policy at each number of replicas."""
    return [
        Setting(
            policy,
            count,
            rate_per_s,
            counts_sent=counts_sent,
            num_fleets=min(_MOST_FLEETS, -(-_ENOUGH_REPLICAS // count)),
            warm_up_s=WARM_UP_S * scale,
            window_s=WINDOW_S * scale,
            seed=seed,
        )
        for policy, counts_sent, most in _GROWTH_KINDS
        for count in counts
        if count <= most
    ]


def staleness_settings(scale: float, seed: int) -> list[Setting]:
    """How often gauges are asked for, whether what was sent counts, and by how many routers."""
    return [
        Setting(
            policy,
            _STALENESS_REPLICAS,
            interval_s=interval_s,
            counts_sent=counts_sent,
            num_routers=num_routers,
            warm_up_s=_STALENESS_WARM_UP_S * scale,
            window_s=_STALENESS_WINDOW_S * scale,
            seed=seed,
        )
        for policy, counts_sent, num_routers in _STALENESS_KINDS
        for interval_s in _INTERVALS_S
    ]


def name_of(setting: Setting) -> str:
    """The policy, and how it goes by its gauges."""
    name = setting.policy
    if not setting.counts_sent:
        name += ", gauges alone"
    if setting.num_routers > 1:
        name += f", {setting.num_routers} routers"
    return name


def growth_lines(runs: Sequence[Figures]) -> list[str]:
    lines = [
        "| policy | replicas | users seen | turns | refused % | TTFT p50, p99 s | ITL p99 ms | prefix hits % "
        "| tokens/s of a replica | imbalance |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    return [*lines, *map(_growth_line, runs)]


def _growth_line(run: Figures) -> str:
    return (
        f"| {name_of(run.setting)} | {run.setting.num_replicas:,} | {run.num_users_seen:,} | {run.num_turns:,} | "
        f"{100 * run.refused_share:.1f} | {run.ttft_p50_s:.2f}, {run.ttft_p99_s:.2f} | {1e3 * run.itl_p99_s:.0f} | "
        f"{100 * run.hit_share:.0f} | {run.tokens_per_s:.0f} | {run.imbalance:.2f} |"
    )


def staleness_lines(runs: Sequence[Figures]) -> list[str]:
    """TTFT p99 and the share that was refused, by the interval."""
    heads = " | ".join(f"{interval_s:g} s" for interval_s in _INTERVALS_S)
    lines = [f"| TTFT p99 s, refused % | {heads} |", "|---|" + "---|" * len(_INTERVALS_S)]
    for name, row in _by_name(runs).items():
        cells = " | ".join(f"{run.ttft_p99_s:.2f}, {100 * run.refused_share:.1f}" for run in row)
        lines.append(f"| {name} | {cells} |")
    return lines


def breaking_lines(points: Sequence[BreakingPoint]) -> list[str]:
    counts = list(points[0].used)
    heads = " | ".join(f"{count:,}" for count in counts)
    lines = [
        f"| what grows | one costs | its bound | {heads} | full at replicas |",
        "|---|---|---|" + "---|" * len(counts) + "---|",
    ]
    for point in points:
        cells = " | ".join("-" if used < 1e-3 else f"{100 * used:,.1f} %" for used in point.used.values())
        full = f"{point.num_replicas:,.0f}" if math.isfinite(point.num_replicas) else "over a million"
        lines.append(f"| {point.what} | {point.unit} | {point.bound} | {cells} | {full} |")
    return lines


def _play_all(settings: Sequence[Setting], num_processes: int) -> list[Figures]:
    """Play runs, the longest first, and return their figures in the order of their settings."""
    ordered = sorted(settings, key=lambda setting: -setting.num_fleets * setting.num_replicas * setting.end_s)
    figures = {}
    # Not forked: a copy of a process with threads can hang in a lock that one of them held.
    with multiprocessing.get_context("spawn").Pool(num_processes, maxtasksperchild=8) as pool:
        for run in pool.imap_unordered(play, ordered):
            figures[run.setting] = run
            print(f"{_growth_line(run)} {run.setting.interval_s:g} s, {run.cpu_s:.0f} s of CPU", file=sys.stderr)
    return [figures[setting] for setting in settings]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("headrace.benchmarks.fleet", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--replicas", default=",".join(map(str, _COUNTS)), help="how many, one run of each")
    parser.add_argument("--rate", type=float, default=5.0, help="turns per second and replica, as replicas are added")
    parser.add_argument("--scale", type=float, default=1.0, help="of warm-ups and windows: 0.1 for a first look")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--num-processes", type=int, default=2)
    parser.add_argument("--plot", type=Path, help="write a figure, in the format of the file's suffix")
    options = parser.parse_args(arguments)
    counts = [int(count) for count in options.replicas.split(",")]
    growth = growth_settings(counts, options.rate, options.scale, options.seed)
    staleness = staleness_settings(options.scale, options.seed)
    began_s = time.perf_counter()
    runs = _play_all([*growth, *staleness], options.num_processes)
    growth_runs, staleness_runs = runs[: len(growth)], runs[len(growth) :]
    cpu_s, all_s = sum(run.cpu_s for run in runs), time.perf_counter() - began_s
    costs = measure(counts)
    # The largest fleet of those where hardly anybody is refused.
    best = [run for run in growth_runs if run.setting.policy == "headrace"][-1]
    rates = Rates(best.turns_per_s, best.tokens_per_s, best.num_streams, PIECES_PER_REPLICA, best.setting.interval_s)
    points = breaking_points(costs, rates, counts)
    for lines in (growth_lines(growth_runs), staleness_lines(staleness_runs), breaking_lines(points)):
        print("\n".join(lines) + "\n")
    num_turns = sum(run.num_turns for run in runs)
    print(f"{num_turns:,} turns counted; {cpu_s:.0f} s of CPU, {all_s:.0f} s in all\n")
    if options.plot is not None:
        _draw(options.plot, growth_runs, staleness_runs, points)
    print(json.dumps({"runs": [asdict(run) for run in runs], "costs": asdict(costs), "rates": asdict(rates)}))
    return 0


def _draw(path: Path, growth: Sequence[Figures], staleness: Sequence[Figures], points: Sequence[BreakingPoint]) -> None:
    from headrace.benchmarks.charts import draw_fleet

    draw_fleet(
        path,
        {
            name: [(run.setting.num_replicas, run.ttft_p99_s, 100 * run.refused_share) for run in runs]
            for name, runs in _by_name(growth).items()
        },
        {
            name: [(run.setting.interval_s, 100 * run.refused_share) for run in runs]
            for name, runs in _by_name(staleness).items()
        },
        {point.what: list(point.used.items()) for point in points},
    )


def _by_name(runs: Sequence[Figures]) -> dict[str, list[Figures]]:
    groups: dict[str, list[Figures]] = {}
    for run in runs:
        groups.setdefault(name_of(run.setting), []).append(run)
    return groups


if __name__ == "__main__":
    sys.exit(main())
