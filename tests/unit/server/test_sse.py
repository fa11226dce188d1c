"""Frames against the event stream grammar of the HTML standard, and the response that sends them."""

import json
from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest
from hypothesis import given, settings, strategies as st
from starlette.types import Message

from headrace.server.errors import InternalError
from headrace.server.sse import (
    HEARTBEAT,
    WRITE_CHUNK,
    EventStream,
    data_frame,
    event_frame,
    padded,
    retry_frame,
    to_json,
)

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec=None), max_size=12)
    | st.text("\r\n\u2028\u2029\x0b\x0c\x1c\x85\0: {}data", max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


def parse(stream: bytes) -> list[dict[str, str]]:
    """The events of a stream, by the standard's algorithm: lines, fields, dispatch at an empty line."""
    events = []
    event: dict[str, str] = {}
    text = stream.decode()
    assert "\r" not in text
    assert text.endswith("\n\n")
    for line in text.split("\n")[:-1]:
        if line == "":
            if event:
                events.append(event)
            event = {}
            continue
        name, colon, value = line.partition(":")
        if name:
            assert colon
            assert value.startswith(" "), "clients want exactly one space"
            assert name not in event, "data is one line"
            event[name] = value[1:]
    return events


@settings(max_examples=150, derandomize=True, deadline=None)
@given(st.lists(JSON, min_size=1, max_size=4))
def test_whatever_the_data_a_frame_is_one_event_of_one_ascii_line(values: list[Any]) -> None:
    plain = b"".join(data_frame(value) for value in values)
    named = b"".join(event_frame("token", value, id=f"abc:{i}") for i, value in enumerate(values))
    assert plain.isascii()
    assert named.isascii()
    assert parse(plain) == [{"data": to_json(value)} for value in values]
    assert parse(named) == [
        {"id": f"abc:{i}", "event": "token", "data": to_json(value)} for i, value in enumerate(values)
    ]
    assert [json.loads(event["data"]) for event in parse(plain)] == values


def test_comments_and_retries_are_no_events_with_data() -> None:
    assert parse(HEARTBEAT) == []
    assert parse(retry_frame(1500)) == [{"retry": "1500"}]
    assert parse(data_frame(1) + HEARTBEAT + data_frame(2)) == [{"data": "1"}, {"data": "2"}]


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_what_json_has_no_number_for_is_a_bug(number: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        to_json(number)


async def no_message() -> Message:
    raise AssertionError("the endpoint listens, not the response")


class Frames:
    """An async generator of frames that notes when it is closed."""

    def __init__(self, *frames: bytes) -> None:
        self.frames = frames
        self.is_closed = False

    async def __call__(self) -> AsyncIterator[bytes]:
        try:
            for frame in self.frames:
                yield frame
        finally:
            self.is_closed = True


@pytest.mark.anyio
async def test_each_frame_is_one_message_between_the_head_and_the_end() -> None:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    frames = Frames(data_frame("a"), data_frame("b"))
    await EventStream(frames())({"type": "http"}, no_message, send)
    head, *bodies = sent
    assert head["type"] == "http.response.start"
    assert head["status"] == 200
    headers = {name.decode().lower(): value.decode() for name, value in head["headers"]}
    assert headers["content-type"] == "text/event-stream; charset=utf-8"
    assert headers["cache-control"] == "no-cache, no-transform"
    assert headers["x-accel-buffering"] == "no"
    assert "content-length" not in headers
    assert [body["body"] for body in bodies] == [b'data: "a"\n\n', b'data: "b"\n\n', b""]
    assert [body["more_body"] for body in bodies] == [True, True, False]
    assert frames.is_closed


@pytest.mark.anyio
async def test_the_head_goes_out_before_there_is_a_first_frame() -> None:
    sent: list[Message] = []
    first = anyio.Event()

    async def send(message: Message) -> None:
        sent.append(message)

    async def frames() -> AsyncIterator[bytes]:
        await first.wait()
        yield data_frame("a")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(EventStream(frames()), {"type": "http"}, no_message, send)
        await anyio.wait_all_tasks_blocked()
        assert [message["type"] for message in sent] == ["http.response.start"]
        first.set()


@pytest.mark.anyio
async def test_the_frames_clean_up_runs_at_once_when_sending_fails() -> None:
    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            raise OSError("gone")

    frames = Frames(data_frame("a"), data_frame("b"))
    with pytest.RaisesGroup(pytest.RaisesExc(OSError, match="gone")):
        await EventStream(frames())({"type": "http"}, no_message, send)
    assert frames.is_closed


@pytest.mark.anyio
@pytest.mark.parametrize("is_taken", [True, False])
async def test_frames_go_straight_to_the_connection_where_it_takes_them(is_taken: bool) -> None:
    written: list[bytes] = []
    sent: list[bytes] = []

    async def send(message: Message) -> None:
        sent.append(message.get("body", b""))

    def write_chunk(chunk: bytes) -> bool:
        written.append(chunk)
        return is_taken

    frames = [data_frame("a"), data_frame("b")]
    scope = {"type": "http", "extensions": {WRITE_CHUNK: write_chunk}}
    await EventStream(Frames(*frames)())(scope, no_message, send)
    assert written == frames
    assert sent == [b"", *([] if is_taken else frames), b""]  # head, what was not taken, end


@pytest.mark.anyio
async def test_the_frames_clean_up_runs_at_once_when_the_response_is_cancelled() -> None:
    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            await anyio.sleep_forever()

    frames = Frames(data_frame("a"), data_frame("b"))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(EventStream(frames()), {"type": "http"}, no_message, send)
        await anyio.wait_all_tasks_blocked()
        assert not frames.is_closed
        tasks.cancel_scope.cancel()
    assert frames.is_closed


@pytest.mark.anyio
@pytest.mark.parametrize("failure", [None, b"event: error\ndata: {}\n\n"])
async def test_a_stream_whose_next_frame_cannot_be_made_ends_with_an_error_and_is_whole_http(
    failure: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def frames() -> AsyncIterator[bytes]:
        yield data_frame("a")
        raise ValueError("what a client sent")

    await EventStream(frames(), failure)({"type": "http"}, no_message, send)
    _, first, last, end = sent
    assert first["body"] == data_frame("a")
    assert last["body"] == (data_frame(InternalError().envelope()) if failure is None else failure)
    assert b"what a client sent" not in last["body"]
    assert end == {"type": "http.response.body", "body": b"", "more_body": False}
    assert [record.name for record in caplog.records] == ["headrace.server.sse"]


@settings(max_examples=100, derandomize=True, deadline=None)
@given(text=st.text(max_size=40), other=st.text(max_size=40), multiple=st.integers(1, 64))
def test_padded_frames_are_as_long_as_each_other_and_say_what_they_said(text: str, other: str, multiple: int) -> None:
    def frame(said: str) -> bytes:
        return padded(event_frame("token", {"text": said}, id="x:1"), said, multiple)

    [event] = parse(frame(text))
    content = json.loads(event["data"])
    assert content.pop("obfuscation").isascii()
    assert content == {"text": text}
    assert (event["id"], event["event"]) == ("x:1", "token")
    num_units = [-(-len(to_json(said)) // multiple) for said in (text, other)]
    assert (len(frame(text)) - len(frame(other))) == (num_units[0] - num_units[1]) * multiple
