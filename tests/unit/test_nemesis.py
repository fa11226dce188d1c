"""What holds clients' records to the protocol notices what a broken server would do."""

import json

import h11
import pytest

from nemesis import Exchange, NativeReading, check_native_stream, read_answer, read_openai_stream

HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


def _record(*pieces: bytes) -> Exchange:
    return Exchange("POST", "/v1/completions", b"", 0.0, [(0.0, piece) for piece in pieces], "closed")


def _chunked(data: str) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data.encode())


def _chunk(text: str, finish_reason: str | None = None, id: str = "a") -> str:
    choice = {"text": text, "finish_reason": finish_reason}
    return f"data: {json.dumps({'id': id, 'choices': [choice]})}\n\n"


WHOLE = _chunked(_chunk("one")) + _chunked(_chunk(" two", "length")) + _chunked("data: [DONE]\n\n")


def test_a_whole_stream_is_whole_however_it_was_cut_into_pieces() -> None:
    received = HEAD + WHOLE + b"0\r\n\r\n"
    pieces = [received[i : i + 1] for i in range(len(received))]
    assert read_openai_stream(_record(*pieces)) == ("whole", "one two")


@pytest.mark.parametrize("num_bytes", range(0, len(WHOLE), 7))
def test_a_torn_stream_is_never_whole_and_has_a_part_of_the_text(num_bytes: int) -> None:
    outcome, text = read_openai_stream(_record(HEAD + WHOLE[:num_bytes]))
    assert "one two".startswith(text)
    assert outcome == "torn" or WHOLE[:num_bytes].rstrip().endswith(b"[DONE]")


@pytest.mark.parametrize(
    "body",
    [
        _chunked(_chunk("one")) + b"0\r\n\r\n",  # ended as if it were whole
        _chunked(_chunk("one")) + _chunked("data: [DONE]\n\n"),  # without a finish reason
        _chunked(_chunk("one", "length")) + _chunked(_chunk(" two", "length")),
        _chunked(_chunk("one")) + _chunked(_chunk("two", id="b")),
    ],
)
def test_a_stream_that_breaks_the_protocol_is_noticed(body: bytes) -> None:
    with pytest.raises(AssertionError):
        read_openai_stream(_record(HEAD + body))


def test_a_second_answer_is_noticed() -> None:
    with pytest.raises(AssertionError, match="second answer"):
        read_answer(_record(HEAD + WHOLE + b"0\r\n\r\n" + HEAD))


def test_broken_framing_is_noticed() -> None:
    with pytest.raises(h11.RemoteProtocolError):
        read_answer(_record(HEAD + b"no size\r\n"))


def test_a_refusal_without_a_real_status_is_noticed() -> None:
    with pytest.raises(AssertionError):
        read_openai_stream(_record(b"HTTP/1.1 500 Oh\r\ncontent-length: 0\r\n\r\n"))


def _token(cursor: int, num_tokens: int = 1) -> dict[str, str]:
    return {"event": "token", "id": f"s:{cursor}", "data": json.dumps({"text": "a", "num_tokens": num_tokens})}


def _done(cursor: int, num_tokens: int) -> dict[str, str]:
    content = {"finish_reason": "length", "usage": {"completion_tokens": num_tokens}}
    return {"event": "done", "id": f"s:{cursor}", "data": json.dumps(content)}


def test_a_native_stream_without_gap_or_repeat_passes() -> None:
    # An entry of the log can be more than one token, where these are parts of a character.
    reading = NativeReading(events=[_token(1), _token(3, 3), _done(4, 4)])
    check_native_stream(reading)
    assert reading.text == "aa"


@pytest.mark.parametrize(
    "events",
    [
        [_token(1), _token(1), _done(2, 2)],  # a repeat
        [_token(1), _token(2), _token(2), _done(3, 2)],
        [_token(1), _token(3), _done(4, 3)],  # a gap
        [_token(1), _done(2, 1), _done(3, 1)],  # two ends
        [_token(2), _token(1), _done(3, 2)],
        [_token(1)],
    ],
)
def test_a_native_stream_with_a_gap_a_repeat_or_two_ends_is_noticed(events: list[dict[str, str]]) -> None:
    with pytest.raises(AssertionError):
        check_native_stream(NativeReading(events=events))
