"""A network at its worst between clients and a server, and what must hold for what the clients saw all the same.

`Nemesis` draws for each connection what goes wrong with it; `exchange` records every byte that a client gets and when;
what reads these records holds them to the protocol, and the test compares the text with the one the request has when
nothing goes wrong. h11 parses the answers, so that broken framing or a second answer is an error of its own. Clients
are anyio tasks, the relay has its threads.
"""

import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import anyio
import h11
import httpx

from asgi_client import parse_events
from tcp_relay import Ending, Passage, TcpRelay

# A request of these tests has some 400 bytes, its answer some thousand.
_UP_BYTES, _DOWN_BYTES = 500, 6000
_LONGEST_FREEZE_S = 2.5
_SPEEDS = ("plain", "delay", "throttle", "tiny segments")
_ENDS = ("none", "freeze", *(f"{ending} {way}" for ending in Ending for way in ("up", "down")))
FAULTS = frozenset({*_SPEEDS, *_ENDS} - {"plain", "none"})
# Of a client: shorter than the longest freeze, so that some give up.
PATIENCE_S = 2.0
_BACK_OFF_S = 0.2
# What a server may answer that is full, going, or did not get all of a request.
REFUSALS = frozenset({408, 429, 503})


class Nemesis(TcpRelay):
    """A relay whose every connection has a speed and an end, dealt from decks that a seed shuffles: in a short storm
    each has its turn. `faults` counts them."""

    def __init__(self, upstream: str, seed: int) -> None:
        super().__init__(upstream)
        self.faults: Counter[str] = Counter()
        self._rng = random.Random(seed)
        self._speeds: list[str] = []
        self._ends: list[str] = []

    def passages(self, request: bytes) -> tuple[Passage, Passage]:
        rng = self._rng
        self._speeds = self._speeds or rng.sample(_SPEEDS, len(_SPEEDS))
        self._ends = self._ends or rng.sample(_ENDS, len(_ENDS))
        speed, end = self._speeds.pop(), self._ends.pop()
        self.faults.update(FAULTS & {speed, end})
        pace: dict[str, Any] = {}
        match speed:
            case "delay":
                pace = {"pauses_s": tuple(rng.uniform(0, 0.1) for _ in range(7))}
            case "throttle":
                segment_bytes = rng.randint(20, 200)
                pace = {"segment_bytes": segment_bytes, "pauses_s": (segment_bytes / rng.uniform(1e4, 1e5),)}
            case "tiny segments":
                pace = {"segment_bytes": 1}
        up, down = dict(pace), dict(pace)
        way, most = (up, _UP_BYTES) if end.endswith("up") else (down, _DOWN_BYTES)
        if end == "freeze":
            way |= {"freeze_after_bytes": rng.randint(1, most), "freeze_s": rng.uniform(0, _LONGEST_FREEZE_S)}
        elif end != "none":
            way |= {"end_after_bytes": rng.randint(1, most), "ending": Ending(end.split()[0])}
        return Passage(**up), Passage(**down)


@dataclass
class Exchange:
    """One connection as its client saw it: the request, every piece of the answer with its time, and how it ended."""

    method: str
    path: str
    sent: bytes
    began_s: float
    pieces: list[tuple[float, bytes]] = field(default_factory=list)
    end: str = ""

    @property
    def received(self) -> bytes:
        return b"".join(piece for _, piece in self.pieces)


@dataclass(frozen=True)
class Answer:
    """What HTTP makes of an exchange's bytes; status 0 where no whole head came."""

    status: int
    body: bytes
    is_whole: bool

    @property
    def events(self) -> list[dict[str, str]]:
        """The whole ones of a stream."""
        return list(parse_events(self.body[: self.body.rfind(b"\n\n") + 2])) if b"\n\n" in self.body else []


async def exchange(
    url: str, method: str, path: str, body: Any = None, *, last_event_id: str = "", patience_s: float = PATIENCE_S
) -> Exchange:
    """Send a request and read until its connection ends, or nothing has come for `patience_s`."""
    address = httpx.URL(url)
    payload = b"" if body is None else json.dumps(body).encode()
    headers = {"host": address.netloc.decode(), "accept": "text/event-stream", "connection": "close"}
    headers |= {"content-type": "application/json", "content-length": str(len(payload))} if payload else {}
    headers |= {"last-event-id": last_event_id} if last_event_id else {}
    writer = h11.Connection(h11.CLIENT)
    request = h11.Request(method=method, target=path, headers=list(headers.items()))
    sent = b"".join(writer.send(event) or b"" for event in (request, h11.Data(payload), h11.EndOfMessage()))
    record = Exchange(method, path, sent, time.monotonic())
    assert address.port is not None
    try:
        async with await anyio.connect_tcp(address.host, address.port) as stream:
            await stream.send(sent)
            while True:
                with anyio.fail_after(patience_s):
                    record.pieces.append((time.monotonic(), await stream.receive()))
    except anyio.EndOfStream:
        record.end = "closed"
    except (anyio.BrokenResourceError, OSError) as error:
        record.end = "given up" if isinstance(error, TimeoutError) else "reset"
    return record


def read_answer(record: Exchange) -> Answer:
    """Parse it as HTTP/1.1: one answer, correctly framed as far as it goes, and nothing behind it."""
    reader = h11.Connection(h11.CLIENT)
    reader.send(h11.Request(method=record.method, target=record.path, headers=[("host", "h"), ("connection", "close")]))
    reader.send(h11.EndOfMessage())
    if record.received:  # nothing would be the end to h11
        reader.receive_data(record.received)
    status, body = 0, b""
    while True:
        match reader.next_event():
            case h11.Response(status_code=code):
                status = code
            case h11.Data(data=data):
                body += data
            case h11.EndOfMessage():
                assert reader.trailing_data == (b"", False), "a second answer"
                return Answer(status, body, is_whole=True)
            case _:
                return Answer(status, body, is_whole=False)


def check_refusal(answer: Answer) -> None:
    """A status that says why, and the envelope as far as it came."""
    assert answer.status in REFUSALS, answer
    if answer.is_whole:
        error = json.loads(answer.body)["error"]
        assert error["message"], answer
        assert error["type"], answer


def read_openai_stream(record: Exchange) -> tuple[str, str]:
    """What became of a stream of one choice (whole, torn, refused, unanswered), and its text. Torn, it is a part that
    its client can tell from the whole."""
    answer = read_answer(record)
    if answer.status == 0:
        return "unanswered", ""
    if answer.status != 200:
        check_refusal(answer)
        return "refused", ""
    data = [event["data"] for event in answer.events]
    is_done = data[-1:] == ["[DONE]"]
    chunks = [json.loads(item) for item in (data[:-1] if is_done else data)]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    finish_reasons = [choice["finish_reason"] for choice in choices if choice["finish_reason"]]
    assert len({chunk["id"] for chunk in chunks}) <= 1, "one answer"
    assert finish_reasons in ([["length"]] if is_done else [[], ["length"]])
    assert is_done or not answer.is_whole, "an end without [DONE] is no end"
    return ("whole" if is_done else "torn"), "".join(choice["text"] for choice in choices)


@dataclass
class NativeReading:
    """A native stream, read over as many connections as it takes; `events` are all of them, in the order they came.
    It `is_gone` where its reader came too late for the rest."""

    is_gone: bool = False
    records: list[Exchange] = field(default_factory=list)
    events: list[dict[str, str]] = field(default_factory=list)

    @property
    def is_over(self) -> bool:
        return bool(self.events) and self.events[-1]["event"] in ("done", "error")

    @property
    def text(self) -> str:
        return "".join(json.loads(event["data"]).get("text", "") for event in self.events)


async def create_native(url: str, body: dict[str, Any], num_tries: int) -> str | None:
    """Ask for a stream until an answer that is no refusal comes whole; returns its path, None where none did."""
    for _ in range(num_tries):
        answer = read_answer(await exchange(url, "POST", "/v1/streams", body))
        if answer.status not in (0, 201):
            check_refusal(answer)
            await anyio.sleep(_BACK_OFF_S)
        elif answer.is_whole:
            return str(json.loads(answer.body)["events_url"])
    return None


async def read_native(url: str, path: str, num_tries: int) -> NativeReading:
    """Read a stream to its end as EventSource does, from the last whole event on, or until it is gone."""
    reading = NativeReading()
    last_event_id = ""
    while not (reading.is_over or reading.is_gone):
        assert len(reading.records) < num_tries, f"no end after {num_tries} connections"
        record = await exchange(url, "GET", path, last_event_id=last_event_id)
        reading.records.append(record)
        answer = read_answer(record)
        if answer.status not in (0, 200):
            check_refusal(answer)
            reading.is_gone = answer.status == 410
            await anyio.sleep(_BACK_OFF_S)
            continue
        events = [event for event in answer.events if "id" in event]
        reading.events += events
        last_event_id = events[-1]["id"] if events else last_event_id
    return reading


def check_native_stream(reading: NativeReading) -> None:
    """Gapless, without repeats, with one terminal event."""
    assert not reading.is_gone
    events = [event for event in reading.events if event["event"] != "queued"]
    kinds = [event["event"] for event in events]
    assert kinds == ["token"] * (len(events) - 1) + ["done"]
    *tokens, done = [json.loads(event["data"]) for event in events]
    assert done["finish_reason"] == "length"
    streams, places = zip(*(event["id"].split(":") for event in events), strict=True)
    assert len(set(streams)) == 1
    cursors = [0, *map(int, places)]
    # A cursor counts pieces of text, each of a token or more.
    for token, (earlier, later) in zip([*tokens, {"num_tokens": 1}], pairwise(cursors), strict=True):
        assert earlier < later <= earlier + token["num_tokens"]
    num_textless = done["usage"]["completion_tokens"] - sum(token["num_tokens"] for token in tokens)
    assert 0 <= num_textless <= 2, "those at the very end, which no text follows"
