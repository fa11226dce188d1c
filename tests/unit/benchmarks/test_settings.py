"""Settings: defaults per load, and every contradiction named in one line."""

from pathlib import Path

import pytest

from headrace.benchmarks.completion_client import Endpoint
from headrace.benchmarks.settings import ClosedLoop, PoissonLoad, TraceReplay, UsageError, parse


def test_without_flags_the_load_is_a_closed_loop_of_three_widths() -> None:
    settings = parse([])
    assert settings.load == ClosedLoop(
        concurrency=(1, 8, 32), requests_per_stream=5, exclude_first_wave=False, prompt_tokens=154, output_tokens=128
    )
    assert settings.endpoint is Endpoint.COMPLETIONS
    assert settings.ignore_eos
    assert settings.model == "auto"


def test_a_rate_makes_an_open_loop() -> None:
    assert parse(["--rate", "2.5", "--duration-s", "40", "--output-tokens", "7"]).load == PoissonLoad(
        rate=2.5, duration_s=40.0, output_tokens=7
    )


def test_a_trace_makes_an_open_loop_with_its_own_lengths() -> None:
    assert parse(["--trace", "t.csv", "--trace-rate", "3", "--trace-scale", "0.5"]).load == TraceReplay(
        trace=Path("t.csv"), trace_rate=3.0, trace_scale=0.5
    )


def test_every_invocation_has_a_seed_of_its_own_unless_it_is_given_one() -> None:
    assert parse([]).seed != parse([]).seed
    assert parse(["--seed", "7"]).seed == 7


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--url", "gpu:8000"], "--url: 'gpu:8000': expected http"),
        (["--endpoint", "responses"], "--endpoint"),
        (["--concurrency", "1,0"], "--concurrency: expected 1 or more"),
        (["--concurrency", "1,"], "--concurrency: expected a whole number"),
        (["--concurrency", "1", "--rate", "2"], "--rate: not allowed with argument --concurrency"),
        (["--rate", "nan"], "--rate: expected a number over 0"),
        (["--rate", "0"], "--rate: expected a number over 0"),
        (["--rate", "1", "--requests-per-stream", "2"], "--requests-per-stream has no effect"),
        (["--rate", "1", "--exclude-first-wave"], "--exclude-first-wave has no effect"),
        (["--rate", "1", "--trace-scale", "2"], "--trace-scale has no effect"),
        (["--trace", "t.csv", "--prompt-tokens", "9"], "--prompt-tokens has no effect"),
        (["--duration-s", "5"], "--duration-s has no effect"),
        (["--exclude-first-wave", "--requests-per-stream", "1"], "leaves nothing"),
        (["--max-requests", "10"], "205 requests are over --max-requests 10"),
        (["--api-key", "a\r\nb"], "--api-key: a key is printable ASCII"),
        (["--time-limit-s", "inf"], "--time-limit-s"),
        (["--seed", "-1"], "--seed"),
        (["--no-such-flag"], "--no-such-flag"),
    ],
)
def test_wrong_use_is_one_line_that_names_the_flag(argv: list[str], complaint: str) -> None:
    with pytest.raises(UsageError) as raised:
        parse(argv)
    assert complaint in str(raised.value)
    assert "\n" not in str(raised.value)
