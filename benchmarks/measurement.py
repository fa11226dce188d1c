"""From what a client saw of each request to the figures of a run. Pure: no clock, no socket.

Seconds are of one monotonic clock. Percentiles are numpy's `linear` method on every exact sample, no histogram.
Latencies are of requests that ended well; the others are counted beside them, because survivors say nothing about those
who were turned away. Lengths in tokens are the server's `usage`; where it sends none, content events stand in.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise

import numpy as np


class Outcome(StrEnum):
    """How a request ended; UNFINISHED until it did (time limit, Ctrl-C)."""

    UNFINISHED = "unfinished"
    OK = "ok"
    SHED = "shed"
    FAILED = "failed"


@dataclass(slots=True)
class Timeline:
    """One request as its client saw it; filled while it streams.

    `content_usage` runs beside `content_s`: the server's completion_tokens so far, where the event said so.
    """

    asked_prompt_tokens: int
    asked_output_tokens: int
    wave: int = 0
    due_s: float | None = None  # open loop: when the schedule wanted it
    launched_s: float = 0.0
    written_s: float = 0.0
    content_s: list[float] = field(default_factory=list)
    content_usage: list[int | None] = field(default_factory=list)
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    outcome: Outcome = Outcome.UNFINISHED
    failure: str = ""
    detail: str = ""

    def end(self, outcome: Outcome, failure: str = "", detail: str = "") -> None:
        """Name how it ended."""
        self.outcome, self.failure, self.detail = outcome, failure, detail

    @property
    def num_output_tokens(self) -> int:
        """Output tokens by usage, else by content events."""
        return len(self.content_s) if self.output_tokens is None else self.output_tokens

    @property
    def ttft_s(self) -> float:
        """From the request's write to the first event that holds text."""
        return self.content_s[0] - self.written_s

    @property
    def itls_s(self) -> list[float]:
        """Every gap between content events; events of one read share their time, so their gap is 0."""
        return [later - earlier for earlier, later in pairwise(self.content_s)]

    @property
    def itls_per_token_s(self) -> list[float]:
        """The same gaps, each spread over the tokens of the event that ended it.

        With usage on every content event a gap before n tokens gives n samples of gap / n. Without, n is the request's
        mean tokens per event, and each gap gives one sample.
        """
        gaps = self.itls_s
        known = [count for count in self.content_usage if count is not None]
        sizes = [later - earlier for earlier, later in pairwise(known)]
        if len(known) == len(self.content_s) and all(size > 0 for size in sizes):
            return [gap / size for gap, size in zip(gaps, sizes, strict=True) for _ in range(size)]
        mean_size = max(1.0, self.num_output_tokens / max(1, len(self.content_s)))
        return [gap / mean_size for gap in gaps]

    @property
    def tpot_s(self) -> float | None:
        """(last - first) / (tokens - 1); None for a single token or a single event."""
        if self.num_output_tokens < 2 or len(self.content_s) < 2:
            return None
        return (self.content_s[-1] - self.content_s[0]) / (self.num_output_tokens - 1)

    @property
    def max_stall_s(self) -> float | None:
        """The largest gap."""
        return max(self.itls_s, default=None)

    def tokens_between(self, begin_s: float, end_s: float) -> float:
        """Its output tokens that came inside a window, by the share of its content events that did."""
        if not self.content_s:
            return 0.0
        num_inside = sum(begin_s <= at_s <= end_s for at_s in self.content_s)
        return self.num_output_tokens * num_inside / len(self.content_s)


@dataclass(slots=True)
class Run:
    """One width of a closed loop, or one open loop, as it was driven."""

    label: str
    num_planned: int
    width: int | None = None
    is_first_wave_counted: bool = True
    timelines: list[Timeline] = field(default_factory=list)
    started_s: float = 0.0
    ended_s: float = 0.0
    cpu_s: float = 0.0

    @property
    def counted(self) -> list[Timeline]:
        """The requests that the figures are about."""
        return [timeline for timeline in self.timelines if self.is_first_wave_counted or timeline.wave > 0]


@dataclass(frozen=True, slots=True)
class Targets:
    """What a request must keep to be good: its TTFT, and the p99 of its own gaps."""

    ttft_ms: float = 2000.0
    itl_ms: float = 100.0

    def are_met_by(self, timeline: Timeline) -> bool:
        """Whether a request that ended well was in time; one content event has no gap to be late with."""
        if timeline.outcome is not Outcome.OK or timeline.ttft_s * 1e3 > self.ttft_ms:
            return False
        gaps = timeline.itls_s
        return not gaps or percentile(gaps, 99) * 1e3 <= self.itl_ms


@dataclass(frozen=True, slots=True)
class Distribution:
    """Milliseconds."""

    num_samples: int
    mean: float
    p50: float
    p95: float
    p99: float
    max: float

    @classmethod
    def of_seconds(cls, samples_s: Iterable[float]) -> "Distribution | None":
        """Describe the samples; None where there are none."""
        samples_ms = np.fromiter(samples_s, dtype=np.float64) * 1e3
        if samples_ms.size == 0:
            return None
        p50, p95, p99 = np.percentile(samples_ms, (50, 95, 99), method="linear")
        figures = (samples_ms.mean(), p50, p95, p99, samples_ms.max())
        return cls(samples_ms.size, *(round(float(figure), 4) for figure in figures))


@dataclass(frozen=True, slots=True)
class Goodput:
    """`share_of_answered` leaves shed requests out; `share_of_all` takes them as failures.

    The rate is one for both: a shed request met no target in either reading.
    """

    slo_ttft_ms: float
    slo_itl_ms: float
    num_good: int
    requests_per_s: float | None
    share_of_answered: float | None
    share_of_all: float | None


@dataclass(frozen=True, slots=True)
class Summary:
    """The figures of one run; the report prints it field by field."""

    label: str
    width: int | None
    num_planned: int
    num_launched: int
    is_first_wave_counted: bool
    num_counted: int
    num_ok: int
    num_shed: int
    num_failed: int
    num_unfinished: int
    failures: dict[str, int]
    failure_examples: dict[str, str]
    wall_s: float
    ttft_ms: Distribution | None
    itl_ms: Distribution | None
    itl_per_token_ms: Distribution | None
    tpot_ms: Distribution | None
    max_stall_ms: Distribution | None
    connect_ms: Distribution | None
    lateness_ms: Distribution | None
    offered_requests_per_s: float | None
    requests_per_s: float | None
    output_tokens_per_s: float | None
    goodput: Goodput
    prompt_tokens_asked_mean: float | None
    prompt_tokens_mean: float | None
    output_tokens_asked_mean: float | None
    output_tokens_mean: float | None
    num_ok_without_usage: int
    generator_cpu_s: float
    generator_cpu_share: float | None


def percentile(samples: Sequence[float], percent: float) -> float:
    """Interpolate linearly between the two nearest exact samples."""
    return float(np.percentile(samples, percent, method="linear"))


def summarize(run: Run, targets: Targets) -> Summary:
    """Compute a run's figures over its counted requests.

    The wall runs from the first counted launch to the end of the run. Where the first wave is not counted, the tokens
    it still streams inside that wall are part of the throughput (they used the same steps), and of nothing else.
    """
    counted = run.counted
    ok = [timeline for timeline in counted if timeline.outcome is Outcome.OK]
    outcomes = Counter(timeline.outcome for timeline in counted)
    faulty = [timeline for timeline in counted if timeline.failure]
    begin_s = min((timeline.launched_s for timeline in counted), default=run.ended_s)
    wall_s = run.ended_s - begin_s
    tokens = sum(
        timeline.tokens_between(begin_s, run.ended_s) for timeline in run.timelines if timeline.outcome is Outcome.OK
    )
    num_good = sum(map(targets.are_met_by, ok))
    num_shed = outcomes[Outcome.SHED]
    return Summary(
        label=run.label,
        width=run.width,
        num_planned=run.num_planned,
        num_launched=len(run.timelines),
        is_first_wave_counted=run.is_first_wave_counted,
        num_counted=len(counted),
        num_ok=len(ok),
        num_shed=num_shed,
        num_failed=outcomes[Outcome.FAILED],
        num_unfinished=outcomes[Outcome.UNFINISHED],
        failures=dict(Counter(timeline.failure for timeline in faulty)),
        failure_examples={timeline.failure: timeline.detail for timeline in reversed(faulty)},
        wall_s=round(wall_s, 4),
        ttft_ms=Distribution.of_seconds(timeline.ttft_s for timeline in ok),
        itl_ms=Distribution.of_seconds(gap for timeline in ok for gap in timeline.itls_s),
        itl_per_token_ms=Distribution.of_seconds(gap for timeline in ok for gap in timeline.itls_per_token_s),
        tpot_ms=Distribution.of_seconds(timeline.tpot_s for timeline in ok if timeline.tpot_s is not None),
        max_stall_ms=Distribution.of_seconds(
            timeline.max_stall_s for timeline in ok if timeline.max_stall_s is not None
        ),
        connect_ms=Distribution.of_seconds(timeline.written_s - timeline.launched_s for timeline in ok),
        lateness_ms=Distribution.of_seconds(
            timeline.launched_s - timeline.due_s for timeline in counted if timeline.due_s is not None
        ),
        offered_requests_per_s=_offered_per_s(counted),
        requests_per_s=_ratio(len(ok), wall_s),
        output_tokens_per_s=_ratio(tokens, wall_s),
        goodput=Goodput(
            slo_ttft_ms=targets.ttft_ms,
            slo_itl_ms=targets.itl_ms,
            num_good=num_good,
            requests_per_s=_ratio(num_good, wall_s),
            share_of_answered=_ratio(num_good, len(counted) - num_shed),
            share_of_all=_ratio(num_good, len(counted)),
        ),
        prompt_tokens_asked_mean=_mean(timeline.asked_prompt_tokens for timeline in ok),
        prompt_tokens_mean=_mean(timeline.prompt_tokens for timeline in ok if timeline.prompt_tokens is not None),
        output_tokens_asked_mean=_mean(timeline.asked_output_tokens for timeline in ok),
        output_tokens_mean=_mean(timeline.output_tokens for timeline in ok if timeline.output_tokens is not None),
        num_ok_without_usage=sum(timeline.output_tokens is None for timeline in ok),
        generator_cpu_s=round(run.cpu_s, 4),
        generator_cpu_share=_ratio(run.cpu_s, run.ended_s - run.started_s),
    )


def _offered_per_s(counted: Sequence[Timeline]) -> float | None:
    """The mean rate of an open loop's launches; a closed loop offers nothing on its own."""
    launches_s = [timeline.launched_s for timeline in counted if timeline.due_s is not None]
    return _ratio(len(launches_s) - 1, max(launches_s) - min(launches_s)) if launches_s else None


def _ratio(numerator: float, denominator: float) -> float | None:
    return round(numerator / denominator, 4) if denominator > 0 else None


def _mean(values: Iterable[float]) -> float | None:
    listed = list(values)
    return _ratio(sum(listed), len(listed))
