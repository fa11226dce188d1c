"""Measurement: every figure against timelines made by hand."""

import pytest

from headrace.benchmarks.measurement import (
    Distribution,
    Outcome,
    Run,
    Summary,
    Targets,
    Timeline,
    percentile,
    summarize,
)

EASY = Targets(ttft_ms=1e6, itl_ms=1e6)


def ended_well(*content_s: float, written_s: float = 0.0, tokens: int | None = None, wave: int = 0) -> Timeline:
    timeline = Timeline(10, 4, wave=wave, launched_s=written_s, written_s=written_s, content_s=list(content_s))
    timeline.content_usage = [None] * len(content_s)
    timeline.output_tokens = len(content_s) if tokens is None else tokens
    timeline.prompt_tokens = 11
    timeline.end(Outcome.OK)
    return timeline


def ended_badly(outcome: Outcome, failure: str, detail: str = "") -> Timeline:
    timeline = Timeline(10, 4)
    timeline.end(outcome, failure, detail)
    return timeline


def summary_of(*timelines: Timeline, ended_s: float = 10.0, targets: Targets = EASY) -> Summary:
    return summarize(Run("r", len(timelines), timelines=list(timelines), ended_s=ended_s), targets)


def test_ttft_runs_from_the_write_to_the_first_text() -> None:
    timeline = ended_well(3.5, 4.0, written_s=3.0)
    timeline.launched_s = 1.0  # connecting is reported on its own
    summary = summary_of(timeline)
    assert summary.ttft_ms == Distribution(1, 500.0, 500.0, 500.0, 500.0, 500.0)
    assert summary.connect_ms == Distribution(1, 2000.0, 2000.0, 2000.0, 2000.0, 2000.0)


def test_itl_pools_every_gap_of_every_request() -> None:
    summary = summary_of(ended_well(1.0, 2.0, 4.0), ended_well(1.0, 1.0))
    assert summary.itl_ms is not None
    assert summary.itl_ms == Distribution.of_seconds([1.0, 2.0, 0.0])
    assert (summary.itl_ms.num_samples, summary.itl_ms.mean, summary.itl_ms.p50) == (3, 1000.0, 1000.0)


def test_a_gap_is_spread_over_the_tokens_that_usage_says_ended_it() -> None:
    timeline = ended_well(1.0, 2.0, 5.0, tokens=6)
    timeline.content_usage = [2, 3, 6]
    assert timeline.itls_per_token_s == [1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("content_usage", [[None, None, None], [2, None, 6], [2, 2, 6]])
def test_without_usage_on_every_event_a_gap_is_spread_over_the_mean(content_usage: list[int | None]) -> None:
    timeline = ended_well(1.0, 2.0, 5.0, tokens=6)
    timeline.content_usage = content_usage
    assert timeline.itls_per_token_s == [0.5, 1.5]


def test_an_event_without_a_token_of_its_own_never_stretches_a_gap() -> None:
    assert ended_well(1.0, 2.0, 3.0, tokens=2).itls_per_token_s == [1.0, 1.0]


def test_tpot_divides_by_tokens_and_not_by_events() -> None:
    assert ended_well(1.0, 2.0, 7.0, tokens=13).tpot_s == 0.5


@pytest.mark.parametrize("timeline", [ended_well(1.0), ended_well(1.0, tokens=5), ended_well(1.0, 2.0, tokens=1)])
def test_a_single_token_or_event_has_no_tpot(timeline: Timeline) -> None:
    assert timeline.tpot_s is None


def test_the_max_stall_is_one_sample_per_request() -> None:
    summary = summary_of(ended_well(1.0, 2.0, 5.0), ended_well(1.0, 1.5), ended_well(1.0))
    assert summary.max_stall_ms == Distribution.of_seconds([3.0, 0.5])


def test_throughput_takes_tokens_from_usage_over_the_wall() -> None:
    summary = summary_of(ended_well(1.0, 2.0, tokens=30), ended_well(1.0, 9.0, tokens=20), ended_s=10.0)
    assert summary.wall_s == 10.0
    assert summary.output_tokens_per_s == 5.0
    assert summary.requests_per_s == 0.2


def test_a_first_wave_that_is_not_counted_gives_only_the_tokens_that_fell_inside_the_wall() -> None:
    run = Run("r", 2, width=1, is_first_wave_counted=False, ended_s=10.0)
    run.timelines = [ended_well(1.0, 2.0, 5.0, 6.0, tokens=40), ended_well(6.0, 7.0, written_s=5.0, tokens=10, wave=1)]
    summary = summarize(run, EASY)
    assert (summary.num_launched, summary.num_counted, summary.num_ok) == (2, 1, 1)
    assert summary.wall_s == 5.0
    assert summary.output_tokens_per_s == (20 + 10) / 5.0
    assert summary.itl_ms == Distribution.of_seconds([1.0])


def test_where_usage_is_missing_content_events_stand_in_and_it_is_told() -> None:
    timeline = ended_well(1.0, 2.0)
    timeline.output_tokens = timeline.prompt_tokens = None
    summary = summary_of(timeline, ended_s=10.0)
    assert summary.output_tokens_per_s == 0.2
    assert summary.num_ok_without_usage == 1
    assert summary.prompt_tokens_mean is None


def test_goodput_needs_both_the_ttft_and_the_requests_own_p99_gap() -> None:
    good = ended_well(0.1, 0.15, 0.2)
    late = ended_well(0.3, 0.35, 0.4)
    stalled = ended_well(0.1, 0.15, 0.9)
    summary = summary_of(good, late, stalled, targets=Targets(ttft_ms=200, itl_ms=100))
    assert summary.goodput.num_good == 1
    assert summary.goodput.requests_per_s == 0.1


def test_one_stall_in_a_long_stream_is_forgiven_by_its_own_p99() -> None:
    steady = [0.05 * step for step in range(1, 301)]
    stalled_once = ended_well(*steady, steady[-1] + 0.5)
    stalled_often = ended_well(*(0.05 * step + 0.5 * (step // 50) for step in range(1, 301)))
    targets = Targets(ttft_ms=100, itl_ms=100)
    assert targets.are_met_by(stalled_once)
    assert not targets.are_met_by(stalled_often)


def test_a_request_of_one_event_has_no_gap_to_be_late_with() -> None:
    assert Targets(ttft_ms=200, itl_ms=1).are_met_by(ended_well(0.1))


def test_goodput_is_told_with_shed_requests_left_out_and_as_failures() -> None:
    shed = [ended_badly(Outcome.SHED, "http_429") for _ in range(2)]
    summary = summary_of(ended_well(0.1), ended_badly(Outcome.FAILED, "cut"), *shed)
    assert (summary.goodput.share_of_answered, summary.goodput.share_of_all) == (0.5, 0.25)


def test_failures_are_counted_by_kind_with_the_first_of_each_quoted() -> None:
    summary = summary_of(
        ended_badly(Outcome.FAILED, "http_500", "first"),
        ended_badly(Outcome.FAILED, "http_500", "second"),
        ended_badly(Outcome.SHED, "http_429", "busy"),
        ended_badly(Outcome.UNFINISHED, ""),
        ended_well(0.1),
    )
    assert (summary.num_ok, summary.num_shed, summary.num_failed, summary.num_unfinished) == (1, 1, 2, 1)
    assert summary.failures == {"http_500": 2, "http_429": 1}
    assert summary.failure_examples == {"http_500": "first", "http_429": "busy"}


def test_latencies_are_of_requests_that_ended_well() -> None:
    failed = ended_well(9.0, 9.9)
    failed.end(Outcome.FAILED, "cut")
    summary = summary_of(ended_well(1.0, 2.0), failed)
    assert summary.ttft_ms == Distribution.of_seconds([1.0])
    assert summary.itl_ms == Distribution.of_seconds([1.0])


def test_lateness_and_the_offered_rate_come_from_the_schedule_of_an_open_loop() -> None:
    timelines = [ended_well(9.0, written_s=launched_s) for launched_s in (0.0, 1.0, 3.0)]
    for timeline, due_s in zip(timelines, (0.0, 0.5, 3.0), strict=True):
        timeline.due_s = due_s
    summary = summary_of(*timelines)
    assert summary.lateness_ms == Distribution.of_seconds([0.0, 0.5, 0.0])
    assert summary.offered_requests_per_s == round(2 / 3, 4)


def test_a_closed_loop_has_neither_lateness_nor_an_offered_rate() -> None:
    summary = summary_of(ended_well(1.0))
    assert summary.lateness_ms is None
    assert summary.offered_requests_per_s is None


def test_the_generators_share_is_of_one_core_over_the_whole_run() -> None:
    run = Run("r", 1, timelines=[ended_well(3.0, written_s=2.0)], started_s=1.0, ended_s=5.0, cpu_s=1.0)
    assert summarize(run, EASY).generator_cpu_share == 0.25


def test_a_run_without_a_success_has_no_latencies() -> None:
    summary = summary_of(ended_badly(Outcome.FAILED, "connect"))
    assert summary.ttft_ms is summary.itl_ms is summary.tpot_ms is summary.max_stall_ms is None
    assert summary.output_tokens_per_s == 0.0


def test_a_run_without_requests_has_no_rates() -> None:
    summary = summary_of(ended_s=3.0)
    assert summary.wall_s == 0.0
    assert summary.requests_per_s is None
    assert summary.goodput.share_of_all is None


def test_percentiles_interpolate_between_exact_samples() -> None:
    assert percentile([1.0, 2.0, 4.0], 50) == 2.0
    assert percentile([1.0, 2.0, 4.0], 75) == 3.0
    assert percentile([7.0], 99) == 7.0
