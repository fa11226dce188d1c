"""The completion client: which events count as text, and what each end is called."""

import json
from dataclasses import replace
from typing import Any

import pytest

from headrace.benchmarks.completion_client import CompletionClient, Endpoint, StreamReading
from headrace.benchmarks.http_client import HttpClient, HttpEnd, Target
from headrace.benchmarks.measurement import Outcome, Timeline

ROLE = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}
FINISH = {"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]}
USAGE = {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 4}}
DONE = b"data: [DONE]\n\n"
WHOLE = HttpEnd(200, is_whole=True, has_answer_bytes=True, written_s=0.0)
CUT = HttpEnd(200, is_whole=False, has_answer_bytes=True, written_s=0.0)


def chat(text: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}}]}


def event(chunk: object) -> bytes:
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n".encode()


def read(*reads: bytes, status: int = 200, end: HttpEnd = WHOLE) -> Timeline:
    """Feed reads, one per second, and conclude."""
    timeline = Timeline(9, 4)
    reading = StreamReading(timeline)
    for second, piece in enumerate(reads, start=1):
        reading.read(status, piece, float(second))
    reading.conclude(end)
    return timeline


def test_a_role_only_chunk_holds_no_text() -> None:
    timeline = read(event(ROLE), event(chat("a")), event(chat("b")), event(FINISH), event(USAGE), DONE)
    assert timeline.outcome is Outcome.OK
    assert timeline.content_s == [2.0, 3.0]
    assert (timeline.prompt_tokens, timeline.output_tokens) == (9, 4)


@pytest.mark.parametrize(
    "chunk",
    [
        {"choices": [{"text": " word"}]},
        chat(" word"),
        {"choices": [{"delta": {"reasoning_content": "hm"}}]},
        {"choices": [{"delta": {"tool_calls": [{"index": 0}]}}]},
        {"choices": [{"text": ""}, {"text": "x"}]},
    ],
)
def test_generated_text_counts_wherever_the_chunk_holds_it(chunk: object) -> None:
    assert read(event(chunk), DONE).content_s == [1.0]


@pytest.mark.parametrize(
    "chunk",
    [ROLE, FINISH, USAGE, {}, {"choices": None}, {"choices": [None, {"delta": None}]}, {"choices": [{"text": ""}]}],
)
def test_a_chunk_without_generated_text_does_not_count(chunk: object) -> None:
    timeline = read(event(chunk), DONE)
    assert timeline.content_s == []
    assert (timeline.outcome, timeline.failure) == (Outcome.FAILED, "no_text")


def test_several_events_in_one_read_share_its_time() -> None:
    assert read(event(ROLE) + event(chat("a")) + event(chat("b")), event(chat("c")) + DONE).content_s == [1.0, 1.0, 2.0]


def test_a_stream_split_inside_its_characters_reads_the_same() -> None:
    stream = event(chat("é水🙂")) + event(USAGE) + DONE
    for cut in range(len(stream)):
        timeline = read(stream[:cut], stream[cut:])
        assert (timeline.outcome, len(timeline.content_s), timeline.output_tokens) == (Outcome.OK, 1, 4)


def test_usage_on_chunks_is_kept_beside_each_content_event() -> None:
    def chunk(text: str, num_tokens: int) -> bytes:
        return event(chat(text) | {"usage": {"prompt_tokens": 9, "completion_tokens": num_tokens}})

    timeline = read(chunk("a", 1), chunk("b c", 3), event(FINISH | {"usage": None}), DONE)
    assert timeline.content_usage == [1, 3]
    assert timeline.output_tokens == 3


@pytest.mark.parametrize(
    ("reads", "end", "failure"),
    [
        pytest.param([event(chat("a"))], WHOLE, "no_done", id="ends without [DONE]"),
        pytest.param([event(chat("a"))], CUT, "cut", id="is cut"),
        pytest.param([], CUT, "cut", id="is cut before its first byte"),
        pytest.param(
            [event(chat("a")), event({"error": {"message": "out"}})], WHOLE, "error_event", id="error, then end"
        ),
        pytest.param([event({"error": {"message": "out"}})], CUT, "error_event", id="error, then cut"),
        pytest.param([event({"error": "out"}) + DONE], WHOLE, "error_event", id="error, then [DONE]"),
        pytest.param([b"event: error\ndata: out\n\n"], WHOLE, "error_event", id="error by name"),
        pytest.param([b"data: {nope\n\n" + DONE], WHOLE, "bad_event", id="no JSON"),
        pytest.param([b"data: 7\n\n" + DONE], WHOLE, "bad_event", id="no object"),
        pytest.param([b"data: " + b"[" * 100_000 + b"\n\n" + DONE], WHOLE, "bad_event", id="nested without end"),
        pytest.param([b'data: {"a": "\xff"}\n\n' + DONE], WHOLE, "bad_event", id="no UTF-8"),
    ],
)
def test_a_stream_that_goes_wrong_is_named_by_its_first_cause(reads: list[bytes], end: HttpEnd, failure: str) -> None:
    timeline = read(*reads, end=end)
    assert (timeline.outcome, timeline.failure) == (Outcome.FAILED, failure)


def test_what_is_no_http_is_a_failure_of_its_own() -> None:
    end = HttpEnd(0, is_whole=False, has_answer_bytes=True, written_s=0.0, fault="Expected HTTP/")
    assert read(end=end).failure == "bad_http"


def test_a_connection_lost_after_done_changes_nothing() -> None:
    assert read(event(chat("a")), DONE, end=CUT).outcome is Outcome.OK


def test_events_after_done_are_not_read() -> None:
    assert len(read(event(chat("a")) + DONE + event(chat("b"))).content_s) == 1


@pytest.mark.parametrize(
    ("status", "outcome"),
    [(429, Outcome.SHED), (503, Outcome.SHED), (400, Outcome.FAILED), (500, Outcome.FAILED), (307, Outcome.FAILED)],
)
def test_a_refusal_is_named_by_its_status_and_keeps_what_the_server_said(status: int, outcome: Outcome) -> None:
    end = HttpEnd(status, is_whole=True, has_answer_bytes=True, written_s=0.0)
    timeline = read(b'{"error":\n {"message": "no"}}', status=status, end=end)
    assert (timeline.outcome, timeline.failure) == (outcome, f"http_{status}")
    assert timeline.detail == '{"error": {"message": "no"}}'


def client(endpoint: Endpoint) -> CompletionClient:
    return CompletionClient(HttpClient(Target("gpu", 80, False, "")), endpoint)


def test_a_request_forces_its_length_and_asks_for_usage() -> None:
    assert json.loads(client(Endpoint.COMPLETIONS).request_body("a b", 7)) == {
        "prompt": "a b",
        "max_tokens": 7,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }


def test_a_chat_request_holds_the_prompt_as_one_user_message() -> None:
    body = json.loads(replace(client(Endpoint.CHAT), model="m").request_body("a b", 7))
    assert body["messages"] == [{"role": "user", "content": "a b"}]
    assert body["model"] == "m"
    assert "prompt" not in body
