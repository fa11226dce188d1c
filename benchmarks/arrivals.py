"""When requests arrive in an open loop, and how long they are: a Poisson process, or a recorded trace.

Pure: seconds count from the start of the run, nothing here sleeps or knows a server. A trace is the CSV of the Azure
LLM inference trace 2023 (Splitwise, ISCA 2024): columns TIMESTAMP, ContextTokens, GeneratedTokens. Its lengths are
scaled by one factor and never clipped: a clipped tail would flatter the server that is measured.
"""

import csv
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path


class TraceError(ValueError):
    """The trace file cannot be replayed; the text says which line, and why."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of an open loop."""

    at_s: float
    prompt_tokens: int
    output_tokens: int


def poisson_arrivals(
    rate_per_s: float, duration_s: float, max_requests: int, prompt_tokens: int, output_tokens: int, seed: int
) -> list[Arrival]:
    """Draw the arrivals of `duration_s` seconds; at most `max_requests`."""
    gaps = random.Random(seed)
    arrivals: list[Arrival] = []
    at_s = gaps.expovariate(rate_per_s)
    while at_s < duration_s and len(arrivals) < max_requests:
        arrivals.append(Arrival(at_s, prompt_tokens, output_tokens))
        at_s += gaps.expovariate(rate_per_s)
    return arrivals


def read_trace(
    path: Path, max_requests: int, length_scale: float = 1.0, rate_per_s: float | None = None
) -> list[Arrival]:
    """Read the first `max_requests` arrivals of a trace, the first of them at second 0.

    `rate_per_s` stretches the gaps by one factor, so that what was read arrives at this mean rate and keeps its bursts.

    Raises:
        TraceError: a column is missing, a row is no arrival, or the rows are not in order of time.
        OSError: the file cannot be read.
    """
    with path.open(newline="", encoding="utf-8-sig") as lines:
        try:
            rows = list(itertools.islice(_read_rows(lines, path), max_requests))
        except (csv.Error, UnicodeDecodeError) as error:
            raise TraceError(f"{path} is not a CSV file: {error}") from error
    if not rows:
        raise TraceError(f"{path} holds no arrivals")
    begin = rows[0][0]
    span_s = (rows[-1][0] - begin).total_seconds()
    stretch = 1.0
    if rate_per_s is not None:
        if span_s == 0:
            raise TraceError(f"{path}: a rate needs at least two different times among the arrivals that are replayed")
        stretch = (len(rows) - 1) / span_s / rate_per_s
    return [
        Arrival((time - begin).total_seconds() * stretch, _scaled(context, length_scale), _scaled(output, length_scale))
        for time, context, output in rows
    ]


def _read_rows(lines: Iterator[str], path: Path) -> Iterator[tuple[datetime, int, int]]:
    table = csv.DictReader(lines)
    for column in ("TIMESTAMP", "ContextTokens", "GeneratedTokens"):
        if column not in (table.fieldnames or ()):
            raise TraceError(f"{path} has no column {column}")
    previous: datetime | None = None
    for row in table:
        try:
            time = datetime.fromisoformat(row["TIMESTAMP"])
            context, output = int(row["ContextTokens"]), int(row["GeneratedTokens"])
            is_in_order = previous is None or previous <= time
        except (TypeError, ValueError) as error:
            raise TraceError(f"{path} line {table.line_num} is no arrival: {error}") from error
        if context < 0 or output < 0:
            raise TraceError(f"{path} line {table.line_num} is no arrival: a length is negative")
        if not is_in_order:
            raise TraceError(f"{path} line {table.line_num} is earlier than the line before it")
        yield time, context, output
        previous = time


def _scaled(num_tokens: int, length_scale: float) -> int:
    return max(1, round(num_tokens * length_scale))  # a request of no tokens cannot be sent
