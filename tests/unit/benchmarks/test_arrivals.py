"""Arrivals: a seeded Poisson process, and traces that are scaled and never clipped."""

from pathlib import Path

import pytest

from headrace.benchmarks.arrivals import Arrival, TraceError, poisson_arrivals, read_trace

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"
ROWS = (
    "2023-11-16 18:15:46.6805900,374,44",
    "2023-11-16 18:15:47.6805900,4142,1",
    "2023-11-16 18:15:47.6805900,7,601",
    "2023-11-16 18:15:50.6805900,100,10",
)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return written(tmp_path, HEADER, *ROWS)


def written(folder: Path, *lines: str, line_end: str = "\r\n") -> Path:
    path = folder / "trace.csv"
    path.write_text(line_end.join(lines), encoding="utf-8", newline="")
    return path


def test_a_trace_starts_at_second_zero_and_keeps_its_gaps_and_lengths(trace: Path) -> None:
    assert read_trace(trace, 100) == [
        Arrival(0.0, 374, 44),
        Arrival(1.0, 4142, 1),
        Arrival(1.0, 7, 601),
        Arrival(4.0, 100, 10),
    ]


def test_only_the_first_arrivals_are_replayed_when_fewer_are_asked_for(trace: Path) -> None:
    assert read_trace(trace, 2) == [Arrival(0.0, 374, 44), Arrival(1.0, 4142, 1)]


def test_a_rate_stretches_the_gaps_of_what_is_replayed(trace: Path) -> None:
    assert [arrival.at_s for arrival in read_trace(trace, 100, rate_per_s=1.5)] == pytest.approx([0, 0.5, 0.5, 2.0])
    assert [arrival.at_s for arrival in read_trace(trace, 2, rate_per_s=0.25)] == pytest.approx([0, 4.0])


def test_lengths_are_scaled_by_one_factor_and_never_clipped(trace: Path) -> None:
    arrivals = read_trace(trace, 100, length_scale=10.0)
    assert [arrival.prompt_tokens for arrival in arrivals] == [3740, 41420, 70, 1000]
    assert [arrival.output_tokens for arrival in arrivals] == [440, 10, 6010, 100]


def test_a_length_scaled_below_one_token_is_one_token(trace: Path) -> None:
    arrivals = read_trace(trace, 100, length_scale=0.01)
    assert [arrival.prompt_tokens for arrival in arrivals] == [4, 41, 1, 1]
    assert [arrival.output_tokens for arrival in arrivals] == [1, 1, 6, 1]


def test_time_zones_a_byte_order_mark_and_other_columns_are_read(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(
        "ContextTokens,note,GeneratedTokens,TIMESTAMP\n5,x,6,2024-05-10 00:00:00.009930+00:00\n", encoding="utf-8-sig"
    )
    assert read_trace(path, 1) == [Arrival(0.0, 5, 6)]


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        ([], "no column TIMESTAMP"),
        (["TIMESTAMP,ContextTokens", "2023-11-16 18:15:46,1"], "no column GeneratedTokens"),
        ([HEADER], "holds no arrivals"),
        ([HEADER, "soon,1,1"], "line 2 is no arrival"),
        ([HEADER, ROWS[0], "2023-11-16 18:15:47,1"], "line 3 is no arrival"),
        ([HEADER, "2023-11-16 18:15:46,1.5,1"], "line 2 is no arrival"),
        ([HEADER, "2023-11-16 18:15:46,-1,1"], "a length is negative"),
        ([HEADER, ROWS[0], "2023-11-16 18:15:46+00:00,1,1"], "line 3 is no arrival"),
        ([HEADER, ROWS[1], ROWS[0]], "line 3 is earlier"),
    ],
)
def test_a_row_that_cannot_be_replayed_is_named(tmp_path: Path, lines: list[str], complaint: str) -> None:
    with pytest.raises(TraceError, match=complaint):
        read_trace(written(tmp_path, *lines), 100)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(TraceError, match="not a CSV file"):
        read_trace(path, 100)


def test_a_rate_for_arrivals_at_one_instant_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="two different times"):
        read_trace(written(tmp_path, HEADER, ROWS[1], ROWS[2]), 100, rate_per_s=1.0)


def test_the_same_seed_draws_the_same_arrivals() -> None:
    first, again, other = (poisson_arrivals(5.0, 60.0, 1000, 10, 20, seed) for seed in (1, 1, 2))
    assert first == again != other


def test_poisson_arrivals_keep_order_length_duration_and_rate() -> None:
    arrivals = poisson_arrivals(50.0, 100.0, 10_000, 10, 20, seed=3)
    times_s = [arrival.at_s for arrival in arrivals]
    assert times_s == sorted(times_s)
    assert all(0 < at_s < 100 for at_s in times_s)
    assert len(arrivals) == pytest.approx(5000, rel=0.05)  # three standard deviations of a Poisson count are 4.2 %
    assert {(arrival.prompt_tokens, arrival.output_tokens) for arrival in arrivals} == {(10, 20)}


def test_poisson_arrivals_are_bounded_in_number() -> None:
    assert len(poisson_arrivals(50.0, 100.0, 7, 10, 20, seed=3)) == 7
