"""The SSE parser: the same events however the bytes are cut."""

from itertools import combinations

import pytest

from headrace.benchmarks.sse_parser import SseEvent, SseParser


def parsed(*chunks: bytes) -> list[SseEvent]:
    parser = SseParser()
    return [event for chunk in chunks for event in parser.feed(chunk)]


def unnamed(*data: bytes) -> list[SseEvent]:
    return [SseEvent(b"", each) for each in data]


STREAMS = {
    "line feeds": (b"data: a\n\ndata: b\n\n", unnamed(b"a", b"b")),
    "carriage returns and line feeds": (b"data: a\r\n\r\ndata: b\r\n\r\n", unnamed(b"a", b"b")),
    "carriage returns": (b"data: a\r\rdata: b\r\r", unnamed(b"a", b"b")),
    "mixed line ends": (b"data: a\r\n\ndata: b\n\rdata: c\r\r\n", unnamed(b"a", b"b", b"c")),
    "comments": (b": ping\n\n:\ndata: a\n: inside\n\n: last\n\n", unnamed(b"a")),
    "several data lines": (b"data: a\ndata:\ndata: b\n\n", unnamed(b"a\n\nb")),
    "no space after the colon": (b'data:{"k": 1}\n\ndata:  two\n\n', unnamed(b'{"k": 1}', b" two")),
    "the end marker": (b"data: {}\n\ndata: [DONE]\n\n", unnamed(b"{}", b"[DONE]")),
    "names and ids": (
        b"event: token\nid: 7\nretry: 10\ndata: a\n\ndata: b\nid: \0\n\ndata: c\nid\n\nevent:error\ndata: d\n\n",
        [SseEvent(b"token", b"a", b"7"), SseEvent(b"", b"b", b"7"), SseEvent(b"", b"c"), SseEvent(b"error", b"d")],
    ),
    "a name without data": (b"event: ping\n\ndata: a\n\n", unnamed(b"a")),
    "data without a colon": (b"data\n\n", unnamed(b"")),
    "unknown fields": (b"datum: x\nerror: y\nno colon at all\ndata: a\n\n", unnamed(b"a")),
    "characters of many bytes": ("data: éß🙂\n\ndata: 水\r\n\r\n".encode(), unnamed("éß🙂".encode(), "水".encode())),
    "a byte order mark": (b"\xef\xbb\xbfdata: a\n\ndata: \xef\xbb\xbf\n\n", unnamed(b"a", b"\xef\xbb\xbf")),
    "colons in the value": (b"data: a: b:c\n\n", unnamed(b"a: b:c")),
    "an event without its blank line": (b"data: a\n\ndata: lost\n", unnamed(b"a")),
    "nothing": (b"", []),
}
each_stream = pytest.mark.parametrize(("stream", "events"), STREAMS.values(), ids=STREAMS.keys())


@each_stream
def test_a_whole_stream_gives_its_events(stream: bytes, events: list[SseEvent]) -> None:
    assert parsed(stream) == events


@each_stream
def test_a_stream_fed_byte_by_byte_gives_the_same_events(stream: bytes, events: list[SseEvent]) -> None:
    assert parsed(*(stream[at : at + 1] for at in range(len(stream)))) == events


@each_stream
def test_a_stream_cut_at_any_two_places_gives_the_same_events(stream: bytes, events: list[SseEvent]) -> None:
    for first, second in combinations(range(len(stream) + 1), 2):
        assert parsed(stream[:first], stream[first:second], stream[second:]) == events


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"])
def test_an_event_is_given_by_the_read_that_holds_its_blank_line(line_end: bytes) -> None:
    parser = SseParser()
    blank_line = line_end[:1]  # of CRLF the CR is enough: waiting for its LF would delay the event by one read
    assert parser.feed(b"data: a" + line_end) == []
    assert parser.feed(blank_line) == unnamed(b"a")
    assert parser.feed(line_end[1:] + b"data: b" + line_end + line_end) == unnamed(b"b")
