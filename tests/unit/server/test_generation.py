"""A generation's text, tokens, times and its one end."""

import json
import logging
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from fake_engine import EOS, byte_tokenizer
from headrace.scheduler.messages import FinishReason, SequenceOutput, TokenLogprobs
from headrace.server.detokenizer import Detokenizer
from headrace.server.errors import ApiError, DeadlineError, EngineFailedError, UnavailableError
from headrace.server.generation import Generation, Stages, usage
from headrace.server.request_log import log_request

TOKENIZER = byte_tokenizer()


def make(stop: tuple[str, ...] = (), *, ends: list[Generation] | None = None) -> Generation:
    calls: list[Generation] = [] if ends is None else ends
    return Generation(
        id="gen",
        request_id=7,
        num_prompt_tokens=5,
        stages=Stages(received_s=10.0, submitted_s=10.5),
        detokenizer=Detokenizer(TOKENIZER, stop),
        on_end=[calls.append],
    )


def step(text: str = "", **fields: Any) -> SequenceOutput:
    return SequenceOutput(7, tuple(text.encode()), **fields)


@pytest.mark.parametrize(
    ("reason", "error"),
    [
        (FinishReason.LENGTH, None),
        (FinishReason.CANCELLED, None),
        (FinishReason.DEADLINE, DeadlineError),
        (FinishReason.ERROR, EngineFailedError),
    ],
)
def test_it_ends_once_with_the_engines_reason_and_tells_who_wants_to_know(
    reason: FinishReason, error: type[ApiError] | None
) -> None:
    ends: list[Generation] = []
    generation = make(ends=ends)
    generation.receive(step("hi", scheduled_s=11.0), 12.0)
    assert not generation.is_over
    generation.receive(step(finish_reason=reason, error="broken" if error is EngineFailedError else None), 13.0)
    assert generation.is_over
    assert ends == [generation]
    generation.end(FinishReason.CANCELLED, 14.0)
    assert ends == [generation], "a second end has no effect"
    terminal = generation.log.terminal
    assert terminal is not None
    assert terminal.finish_reason is reason
    assert type(terminal.error) is (error or type(None))
    assert generation.stages.end_s == 13.0
    assert generation.log.read().text == "hi"
    if isinstance(terminal.error, EngineFailedError):
        assert terminal.error.message == "broken"


def test_an_end_from_outside_carries_its_own_error() -> None:
    generation = make()
    error = UnavailableError("going down", "draining")
    generation.end(FinishReason.CANCELLED, 11.0, error)
    assert generation.log.terminal is not None
    assert generation.log.terminal.error is error
    assert generation.phase == "queued"


def test_the_log_is_closed_when_on_end_is_called() -> None:
    seen: list[bool] = []
    generation = make()
    generation.on_end.append(lambda ended: seen.append(ended.is_over))
    generation.end(FinishReason.CANCELLED, 11.0)
    assert seen == [True]


@pytest.mark.parametrize("end_token", [EOS, ord("x")])
def test_the_token_that_ends_it_counts_but_is_no_text(end_token: int) -> None:
    generation = make()
    generation.receive(SequenceOutput(7, (ord("a"), end_token), FinishReason.STOP, 11.0), 12.0)
    assert generation.log.read().text == "a"
    assert generation.num_output_tokens == 2
    counts = {"prompt_tokens": 5, "prompt_tokens_details": {"cached_tokens": 0}}
    assert usage([generation]) == counts | {"completion_tokens": 2, "total_tokens": 7}
    assert usage([generation], 1) == counts | {"completion_tokens": 1, "total_tokens": 6}


def test_choices_of_one_prompt_count_it_once_and_its_cached_tokens_too() -> None:
    generations = [make(), make(), make(), make()]
    for i, generation in enumerate(generations):
        generation.choice = i % 2
        generation.receive(step("abc"[:i], scheduled_s=11.0, num_cached_tokens=4), 12.0)
    assert usage(generations) == {
        "prompt_tokens": 10,
        "completion_tokens": 6,
        "total_tokens": 16,
        "prompt_tokens_details": {"cached_tokens": 8},
    }


def scored(text: str) -> tuple[TokenLogprobs, ...]:
    return tuple(TokenLogprobs(byte, -1.0) for byte in text.encode())


def test_log_probabilities_travel_with_the_text_of_their_tokens() -> None:
    generation = make(("END",))
    for text, out in (("a", "a"), ("E", ""), ("x", "Ex")):
        before = generation.log.end
        generation.receive(step(text, logprobs=scored(text), scheduled_s=11.0), 12.0)
        piece = generation.log.read(before)
        assert (piece.text, "".join(chr(item.token_id) for item in piece.logprobs)) == (out, out)


def test_log_probabilities_of_tokens_without_text_come_at_the_end_and_of_the_one_that_ends_it_never() -> None:
    generation = make()
    half = "é".encode()[:1]
    output = SequenceOutput(7, (ord("a"), *half), scheduled_s=11.0, logprobs=(*scored("a"), TokenLogprobs(half[0])))
    generation.receive(output, 12.0)
    end = SequenceOutput(7, (EOS,), FinishReason.STOP, logprobs=(TokenLogprobs(EOS),))
    generation.receive(end, 13.0)
    piece = generation.log.read()
    assert piece.text == "a\N{REPLACEMENT CHARACTER}"
    assert [item.token_id for item in piece.logprobs] == [ord("a"), half[0]]


def test_log_probabilities_of_a_stop_string_that_is_cut_off_are_cut_off_too() -> None:
    generation = make(("END",))
    generation.receive(step("ab", logprobs=scored("ab"), scheduled_s=11.0), 12.0)
    generation.receive(step("END", logprobs=scored("END")), 13.0)
    assert [item.token_id for item in generation.log.read().logprobs] == [ord("a"), ord("b")]


def test_tokens_of_a_stop_string_are_cut_off_where_text_comes_before_it_too() -> None:
    generation = make(("abab c",))
    for token in ("ab", "ab", "ab", " c"):
        generation.receive(step(token, logprobs=scored(token), scheduled_s=11.0), 12.0)
    piece = generation.log.read()
    assert (piece.text, "".join(chr(item.token_id) for item in piece.logprobs)) == ("ab", "ab")


def test_an_echo_comes_with_the_first_token_and_with_the_prompts_log_probabilities() -> None:
    generation = make()
    generation.echo = "hey"
    generation.receive(step(scheduled_s=11.0, prompt_logprobs=scored("he")), 12.0)
    assert generation.log.end == 0
    generation.receive(step("x", prompt_logprobs=scored("y"), logprobs=scored("x")), 13.0)
    piece = generation.log.read()
    assert (piece.text, piece.num_tokens) == ("heyx", 1)
    assert "".join(chr(item.token_id) for item in piece.logprobs) == "heyx"
    assert usage([generation])["completion_tokens"] == 1


@pytest.mark.parametrize("reason", [None, FinishReason.LENGTH])
def test_a_stop_string_ends_it_whatever_the_engine_says(reason: FinishReason | None) -> None:
    ends: list[Generation] = []
    generation = make(("END",), ends=ends)
    generation.receive(step("xEN", scheduled_s=11.0), 12.0)
    assert generation.log.read().text == "x"
    generation.receive(step("Dyz", finish_reason=reason), 13.0)
    assert generation.log.read().text == "x"
    assert generation.log.terminal is not None
    assert generation.log.terminal.finish_reason is FinishReason.STOP
    assert generation.log.terminal.error is None
    assert generation.num_output_tokens == 4, "nothing after the token that completed it counts"
    assert len(ends) == 1


@pytest.mark.parametrize("reason", [FinishReason.LENGTH, FinishReason.CANCELLED, FinishReason.DEADLINE])
def test_text_held_back_for_a_stop_string_comes_out_at_the_end(reason: FinishReason) -> None:
    generation = make(("</stop>",))
    generation.receive(step("a</st", scheduled_s=11.0), 12.0)
    assert generation.log.read().text == "a"
    generation.receive(step(finish_reason=reason), 13.0)
    assert generation.log.read().text == "a</st"
    assert generation.log.terminal is not None
    assert generation.log.terminal.finish_reason is reason


@settings(max_examples=150, derandomize=True, deadline=None)
@given(text=st.text("ab€😀", max_size=12), data=st.data())
def test_every_token_is_counted_with_the_text_it_made(text: str, data: st.DataObject) -> None:
    generation = make()
    left, now = text.encode(), 11.0
    while left:
        size = data.draw(st.integers(1, len(left)))
        generation.receive(SequenceOutput(7, tuple(left[:size]), scheduled_s=10.75), now)
        left, now = left[size:], now + 1
        counted = generation.log.read(0)
        assert counted.text.encode() == text.encode()[: counted.num_tokens], "with a token a byte"
    generation.receive(step(finish_reason=FinishReason.LENGTH), now)
    assert generation.log.read().text == text
    assert generation.log.read(0).num_tokens == generation.num_output_tokens == len(text.encode())


def test_stages_follow_the_first_and_the_last_token() -> None:
    generation = make()
    assert generation.phase == "queued"
    parts = ("queue_s", "prefill_s", "ttft_s", "decode_s", "total_s")
    assert generation.timings() == dict.fromkeys(parts)
    generation.receive(step(scheduled_s=11.0), 11.5)
    assert generation.phase == "prefill"
    generation.receive(step("a"), 12.0)
    assert generation.phase == "decode"
    generation.receive(step("b"), 13.0)
    generation.receive(step("c", finish_reason=FinishReason.LENGTH), 14.25)
    stages = generation.stages
    assert (stages.scheduled_s, stages.first_token_s, stages.last_token_s, stages.end_s) == (11.0, 12.0, 14.25, 14.25)
    assert generation.timings() == dict(zip(parts, (0.5, 1.0, 2.0, 2.25, 4.25), strict=True))


def test_the_log_line_has_every_stage_and_no_text(caplog: pytest.LogCaptureFixture) -> None:
    generation = make()
    generation.receive(step("secret", finish_reason=FinishReason.LENGTH, scheduled_s=11.0), 12.0)
    with caplog.at_level(logging.INFO, "headrace.requests"):
        log_request([generation], "/v1/completions")
    [record] = caplog.records
    line = json.loads(record.getMessage())
    assert "secret" not in record.getMessage()
    assert (line["id"], line["route"], line["finish_reason"]) == ("gen", "/v1/completions", "length")
    assert (line["prompt_tokens"], line["cached_tokens"], line["completion_tokens"]) == (5, 0, 6)
    assert line["stages_ms"] == {
        "tokenized": None,
        "submitted": 500.0,
        "scheduled": 1000.0,
        "first_token": 2000.0,
        "last_token": 2000.0,
        "first_byte": None,
        "end": 2000.0,
    }
