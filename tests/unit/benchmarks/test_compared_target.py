"""A worker's answer as a client would have seen it."""

from typing import Any

from headrace.benchmarks.compared_target import timeline_of
from headrace.benchmarks.measurement import Outcome
from headrace.benchmarks.settings import ClosedLoop

LOAD = ClosedLoop(prompt_tokens=154, output_tokens=3)


def answer(**fields: Any) -> dict[str, Any]:
    return {"wave": 1, "launched_s": 5.0, "token_s": [5.5, 6.0, 6.25], "prompt_tokens": 150, "error": "", **fields}


def test_times_and_lengths_are_those_of_the_worker() -> None:
    timeline = timeline_of(answer(), LOAD)
    assert timeline.outcome is Outcome.OK
    assert (timeline.wave, timeline.ttft_s, timeline.itls_s) == (1, 0.5, [0.5, 0.25])
    assert timeline.itls_per_token_s == timeline.itls_s
    assert (timeline.prompt_tokens, timeline.num_output_tokens) == (150, 3)


def test_an_error_or_an_answer_without_tokens_is_a_failure() -> None:
    assert timeline_of(answer(error="no room"), LOAD).outcome is Outcome.FAILED
    assert timeline_of(answer(error="no room"), LOAD).detail == "no room"
    assert timeline_of(answer(token_s=[]), LOAD).outcome is Outcome.FAILED
