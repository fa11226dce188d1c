"""Medians over rounds, ratios within rounds, floors; what is written is read again."""

from dataclasses import replace

import pytest

from comparisons import comparison, measurement
from headrace.benchmarks.comparison import (
    BEST_PEER,
    Comparison,
    Figure,
    Spread,
    StartUp,
    Verdict,
    merge,
    ratio,
    spread,
    start_up,
    verdicts,
)


def verdict(found: Comparison, what: str) -> Verdict:
    [verdict] = [verdict for verdict in verdicts(found) if verdict.what == what]
    return verdict


def test_a_figure_is_the_median_over_rounds_with_its_range() -> None:
    found = comparison(*(measurement("vllm", speed, round_number=i) for i, speed in enumerate((300, 100, 250))))
    assert spread(found, "vllm", 8, Figure.TOKENS_PER_S) == Spread(250, 100, 300, 3)
    assert spread(found, "vllm", 1, Figure.TOKENS_PER_S) is None


def test_a_ratio_is_the_median_of_the_rounds_ratios() -> None:
    # The machine was at half its speed in the second round.
    rounds = [(300, 100), (150, 50), (200, 100)]
    found = comparison(
        *(measurement("headrace", ours, round_number=i) for i, (ours, _) in enumerate(rounds)),
        *(measurement("vllm", theirs, round_number=i) for i, (_, theirs) in enumerate(rounds)),
    )
    assert ratio(found, "headrace", "vllm", 8, Figure.TOKENS_PER_S) == Spread(3.0, 2.0, 3.0, 3)


def test_a_round_without_one_of_the_two_has_no_ratio() -> None:
    found = comparison(measurement("headrace", 300), measurement("vllm", 100, round_number=1))
    assert ratio(found, "headrace", "vllm", 8, Figure.TOKENS_PER_S) is None
    assert ratio(found, "headrace", BEST_PEER, 8, Figure.TOKENS_PER_S) is None


def test_the_best_peer_is_the_fastest_or_the_one_with_the_least_latency_and_never_ours() -> None:
    found = comparison(
        measurement("headrace", 400, ttft_ms=10),
        measurement("headrace-int8kv", 900, ttft_ms=1),
        measurement("vllm", 100, ttft_ms=20),
        measurement("openvino", 200, ttft_ms=40),
    )
    assert ratio(found, "headrace", BEST_PEER, 8, Figure.TOKENS_PER_S) == Spread(2.0, 2.0, 2.0, 1)
    assert ratio(found, "headrace", BEST_PEER, 8, Figure.TTFT_P50) == Spread(0.5, 0.5, 0.5, 1)


def test_a_floor_is_met_by_more_tokens_or_by_less_latency() -> None:
    found = comparison(measurement("headrace", 179, width=32, itl_ms=4), measurement("vllm", 100, width=32, itl_ms=10))
    assert verdict(found, "headrace, 32 streams: tok/s over that of vllm").is_met is False
    assert verdict(found, "headrace, 32 streams: ITL p99 over that of vllm").is_met is True
    assert verdict(found, "headrace, 64 streams: tok/s over that of vllm").is_met is None


def test_other_lengths_are_held_to_the_floors_within_20_percent() -> None:
    found = comparison(
        measurement("headrace", 145, width=32, itl_ms=6),
        measurement("vllm", 100, width=32, itl_ms=10),
        prompt_tokens=1000,
    )
    assert verdict(found, "headrace, 32 streams: tok/s over that of vllm") == Verdict(
        "headrace, 32 streams: tok/s over that of vllm", 1.44, False, Spread(1.45, 1.45, 1.45, 1)
    )
    assert verdict(found, "headrace, 32 streams: ITL p99 over that of vllm").bound == 0.625


def test_the_first_of_several_starts_is_not_counted() -> None:
    found = comparison()
    found.start_ups += [StartUp("headrace", 9.0, False), StartUp("headrace", 3.0, True)]
    assert start_up(found, "headrace") == Spread(3.0, 3.0, 3.0, 1)
    assert verdict(found, "headrace: start to first token, s").is_met is True


def test_what_is_written_is_read_again() -> None:
    found = comparison(measurement("headrace", 400), measurement("vllm", 100, paused={"headrace": 0.5}))
    found.start_ups.append(StartUp("vllm", 60.0, True))
    found.left_out["openvino"] = "not installed"
    assert Comparison.decode(found.encode()) == found


@pytest.mark.parametrize("text", ["[]", "{", '{"schema": "other"}', '{"schema": "headrace-compare/1"}'])
def test_another_file_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"schema|Expecting"):
        Comparison.decode(text)


def test_the_rounds_of_a_second_file_follow_those_of_the_first() -> None:
    first = comparison(measurement("headrace", 100), measurement("headrace", 200, round_number=1))
    second = comparison(measurement("headrace", 300), measurement("vllm", 100))
    merged = merge([first, second])
    assert [found.round_number for found in merged.measurements] == [0, 1, 2, 2]
    assert merged.targets == ["headrace", "vllm"]
    assert ratio(merged, "headrace", "vllm", 8, Figure.TOKENS_PER_S) == Spread(3.0, 3.0, 3.0, 1)


def test_files_of_different_loads_are_not_merged() -> None:
    found = comparison(measurement("headrace", 100))
    other = replace(found, settings={**found.settings, "prompt_tokens": 1000})
    with pytest.raises(ValueError, match="prompt_tokens differ: 154, 1000"):
        merge([found, other])


@pytest.mark.parametrize(("key", "value"), [("cpu", "another"), ("versions", {"vllm": "another"})])
def test_files_of_another_machine_or_version_are_not_merged(key: str, value: object) -> None:
    found = comparison(measurement("headrace", 100))
    with pytest.raises(ValueError, match="differ"):
        merge([found, replace(found, environment={**found.environment, key: value})])
