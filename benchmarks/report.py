"""Prints what was measured: a table for people, remarks on what the table cannot show, one JSON line for programs.

Knows the figures, not how they were made. A figure without samples is `-` in the table and null in the JSON.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from headrace.benchmarks.measurement import Distribution, Summary
from headrace.benchmarks.prompts import TokenFit

SCHEMA: Final = "headrace-bench/1"
_HEADER: Final = (
    "run requests ok shed failed unfinished TTFT_p50 p95 p99 ITL_p50 p95 p99 TPOT_p50 stall_p99 tok/s req/s good/s"
)
_BUSY_GENERATOR: Final = 0.5  # cores; above it the generator may be what was measured
_LATE_MS: Final = 20.0
_LENGTH_TOLERANCE: Final = 0.05


@dataclass(frozen=True, slots=True)
class Report:
    """Everything one invocation has to tell."""

    settings: dict[str, Any]
    environment: dict[str, str]
    model: str | None
    token_fit: TokenFit | None
    is_interrupted: bool
    is_time_limited: bool
    summaries: Sequence[Summary]


def json_line(report: Report) -> str:
    """Encode the whole report on one line.

    Top level: `schema`; `settings` (every flag but the key; `mode`: closed, poisson or trace; the seed in use);
    `environment` (python, event_loop, platform, started_at_utc); `model` (as sent, or null); `token_fit`
    (overhead_tokens, tokens_per_word; null: the server sent no usage); `is_interrupted`; `is_time_limited`; `runs`.

    Each of `runs` is one `measurement.Summary`:
    - label; width (null in an open loop); num_planned; num_launched; is_first_wave_counted; wall_s;
    - of the counted requests: num_counted = num_ok + num_shed (HTTP 429, 503) + num_failed + num_unfinished;
    - failures: kind -> number, of http_N (shed ones too), connect, cut, no_done, no_text, error_event, bad_event,
      bad_http; failure_examples: kind -> what the server said the first time;
    - ttft_ms, itl_ms, itl_per_token_ms, tpot_ms, max_stall_ms, connect_ms, lateness_ms (null in a closed loop): each
      null or {num_samples, mean, p50, p95, p99, max};
    - offered_requests_per_s (null in a closed loop), requests_per_s, output_tokens_per_s;
    - goodput: {slo_ttft_ms, slo_itl_ms, num_good, requests_per_s, share_of_answered, share_of_all};
    - prompt_tokens_asked_mean, prompt_tokens_mean, output_tokens_asked_mean, output_tokens_mean (of num_ok; asked, and
      by usage), num_ok_without_usage;
    - generator_cpu_s, generator_cpu_share (of one core, over the whole run).
    """
    fields = asdict(report)
    runs = fields.pop("summaries")
    return json.dumps({"schema": SCHEMA, **fields, "runs": runs}, allow_nan=False)


def table(summaries: Sequence[Summary]) -> str:
    """Lay out one row per run; milliseconds, but for the last three columns."""
    header = _HEADER.split()
    rows = [header, *(_row(summary) for summary in summaries)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).replace("_", " ") for row in rows
    )


def remarks(report: Report) -> list[str]:
    """Say what a reader must know before believing the table."""
    lines: list[str] = []
    if report.summaries and report.token_fit is None:
        lines.append("the server sends no usage: prompt lengths are words, output lengths are content events")
    for summary in report.summaries:
        lines += [f"{summary.label}: {remark}" for remark in _remarks_on(summary)]
    if report.is_time_limited:
        lines.append("the time limit ended the measurement; what had not finished is unfinished")
    if report.is_interrupted:
        lines.append("interrupted; what had not finished is unfinished")
    return lines


def _row(summary: Summary) -> list[str]:
    return [
        summary.label.replace(" ", "_"),
        str(summary.num_counted),
        str(summary.num_ok),
        str(summary.num_shed),
        str(summary.num_failed),
        str(summary.num_unfinished),
        *_percentiles(summary.ttft_ms),
        *_percentiles(summary.itl_ms),
        _number(summary.tpot_ms.p50 if summary.tpot_ms else None),
        _number(summary.max_stall_ms.p99 if summary.max_stall_ms else None),
        _number(summary.output_tokens_per_s),
        _number(summary.requests_per_s),
        _number(summary.goodput.requests_per_s),
    ]


def _remarks_on(summary: Summary) -> list[str]:
    lines: list[str] = []
    if summary.width is not None:
        counted = "counted" if summary.is_first_wave_counted else "not counted"
        lines.append(f"the first wave ({summary.width} prompts at once) is {counted}")
    if summary.prompt_tokens_mean is not None:
        asked = _number(summary.prompt_tokens_asked_mean)
        lines.append(f"mean prompt {_number(summary.prompt_tokens_mean)} tokens by usage (asked {asked})")
    if summary.output_tokens_mean is not None and summary.output_tokens_asked_mean is not None:
        text = f"mean output {_number(summary.output_tokens_mean)} tokens by usage"
        if summary.output_tokens_mean < summary.output_tokens_asked_mean * (1 - _LENGTH_TOLERANCE):
            text += f", SHORTER than the {_number(summary.output_tokens_asked_mean)} asked"
        lines.append(text)
    if summary.num_ok_without_usage:
        lines.append(f"{summary.num_ok_without_usage} requests without usage: their tokens are content events")
    goodput = summary.goodput
    answered, everyone = _share(goodput.share_of_answered), _share(goodput.share_of_all)
    lines.append(
        f"within TTFT {goodput.slo_ttft_ms:g} ms and own ITL p99 {goodput.slo_itl_ms:g} ms: "
        f"{answered} of answered requests, {everyone} with shed as failures"
    )
    for kind, number in sorted(summary.failures.items()):
        example = summary.failure_examples[kind]
        lines.append(f"{number} x {kind}" + (f", the first: {example}" if example else ""))
    if summary.num_launched < summary.num_planned:
        lines.append(f"{summary.num_launched} of {summary.num_planned} planned requests were launched")
    if summary.lateness_ms is not None:
        text = (
            f"generator lateness p99 {_number(summary.lateness_ms.p99)} ms, max {_number(summary.lateness_ms.max)} ms"
        )
        lines.append(text + (" (TOO LATE to trust)" if summary.lateness_ms.p99 > _LATE_MS else ""))
    share = summary.generator_cpu_share
    text = f"generator used {summary.generator_cpu_s:.2f} CPU s, {_share(share)} of one core"
    lines.append(text + (" (it may be the bottleneck)" if share is not None and share > _BUSY_GENERATOR else ""))
    return lines


def _percentiles(distribution: Distribution | None) -> list[str]:
    if distribution is None:
        return ["-"] * 3
    return [_number(distribution.p50), _number(distribution.p95), _number(distribution.p99)]


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
