"""Clients that are kept busy while servers die under them, and what became of each of their requests.

Runs on the event loop of `chaos`. Three kinds: whole answers and OpenAI's streams, which are asked for again as
OpenAI's libraries do (whole answers until they are whole, streams until they begin), and native streams, whose readers
come back as EventSource does, from behind the last event that they have. Prompts are few and greedy, and each answer is
held against the one that its prompt had before the load.
"""

import asyncio
import json
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any, Final

from headrace.benchmarks.faulty_clients import get, post
from headrace.benchmarks.http_client import BodySink, Connection, HttpEnd, Target
from headrace.benchmarks.measurement import percentile
from headrace.benchmarks.sse_parser import SseEvent, SseParser

# As openai-python has them.
_NUM_TRIES: Final = 3
_LEAST_PAUSE_S: Final = 0.5
_LONGEST_WAIT_S: Final = 60.0
_RETRIED: Final = frozenset({408, 409, 429})
# An EventSource that the servers tell nothing else waits as long, in some browsers longer.
_RECONNECT_S: Final = 1.0
_NUM_CONNECTIONS: Final = 60
# What takes longer hangs: some twenty times as long as an answer.
_LIMIT_S: Final = 60.0
_NUM_LEARNING: Final = 4

_PLACES: Final = ("The mill", "A wheel", "The river", "Below the dam")
_THINGS: Final = ("turns because", "was built when", "stands where", "is known for")
PROMPTS: Final = tuple(f"{place} {thing}" for place in _PLACES for thing in _THINGS)
KINDS: Final = ("whole", "openai", "native")


@dataclass(slots=True)
class Tally:
    """What became of the requests of a kind. `completed` are those with the right text up to its end."""

    sent: int = 0
    completed: int = 0
    retried: int = 0
    lost: int = 0  # no answer, after all tries
    cut: int = 0  # a stream's connection ended before the stream did, or with an error in its place
    resumed: int = 0  # those of them that were read on to their end
    wrong: int = 0  # another text, an event too many or too few
    hung: int = 0
    pauses_s: list[float] = field(default_factory=list)  # from a cut to the next token
    faults: list[str] = field(default_factory=list)  # what was said to those that were lost, or wrong

    def as_json(self) -> dict[str, Any]:
        longest_s = round(max(self.pauses_s), 2) if self.pauses_s else None
        pauses = {"pause_p50_s": round(percentile(self.pauses_s, 50), 2) if self.pauses_s else None}
        counts = {name: value for name, value in asdict(self).items() if name not in ("pauses_s", "faults")}
        return {**counts, **pauses, "pause_max_s": longest_s, "faults": self.faults[:5]}


class Clients:
    """All of them, of one address. `num_tokens` is the length of an answer of each kind."""

    def __init__(self, address: Target, num_tokens: Mapping[str, int], seed: int) -> None:
        self._address = address
        self._num_tokens = num_tokens
        self._rng = random.Random(seed)
        self._texts: dict[tuple[str, int], str] = {}
        self.tallies = {kind: Tally() for kind in KINDS}
        # Of OpenAI's streams: when each event came, and the seconds from the one before.
        self.gaps: list[tuple[float, float]] = []
        self._readers: set[_NativeReader] = set()

    def are_reading_from(self, name: str) -> bool:
        """Whether a native stream that a replica makes is half-way at its reader."""
        return any(reader.id.startswith(f"{name}-") and reader.text for reader in self._readers)

    async def learn(self) -> None:
        """Ask for every answer once, before anything is disturbed. Raises: ValueError where one does not come."""
        places = asyncio.Semaphore(_NUM_LEARNING)

        async def ask(prompt: str, num_tokens: int) -> None:
            async with places:
                status, body = await self._whole(prompt, num_tokens)
            if status != 200:
                raise ValueError(f"{status}: {body.decode(errors='replace')}")
            self._texts[prompt, num_tokens] = _text_of(json.loads(body))

        lengths = sorted(set(self._num_tokens.values()))
        await asyncio.gather(*(ask(prompt, num_tokens) for num_tokens in lengths for prompt in PROMPTS))

    async def run(self, rates: Mapping[str, float], is_over: asyncio.Event) -> None:
        """Send requests at these rates until told otherwise, whatever becomes of them, and wait for their ends."""
        total = sum(rates.values())
        due_s = time.monotonic()
        async with asyncio.TaskGroup() as requests:
            while not is_over.is_set():
                due_s += self._rng.expovariate(total)
                [kind] = self._rng.choices(list(rates), list(rates.values()))
                await asyncio.sleep(max(0.0, due_s - time.monotonic()))
                requests.create_task(self._send(kind, self._rng.choice(PROMPTS)))

    async def _send(self, kind: str, prompt: str) -> None:
        tally = self.tallies[kind]
        tally.sent += 1
        try:
            async with asyncio.timeout(_LIMIT_S * (_NUM_TRIES if kind == "whole" else 1)):
                match kind:
                    case "whole":
                        await self._ask_whole(prompt, tally)
                    case "openai":
                        await self._read_openai(prompt, tally)
                    case _:
                        await self._read_native(prompt, tally)
        except TimeoutError:
            tally.hung += 1

    async def _ask_whole(self, prompt: str, tally: Tally) -> None:
        num_tokens = self._num_tokens["whole"]
        status, body = await self._whole(prompt, num_tokens, tally)
        if status != 200:
            tally.lost += 1
            tally.faults.append(f"{status} {body.decode(errors='replace')[:200]}")
        elif (text := _text_of(json.loads(body))) != self._texts[prompt, num_tokens]:
            tally.wrong += 1
            tally.faults.append(f"{text!r}, not {self._texts[prompt, num_tokens]!r}")
        else:
            tally.completed += 1

    async def _whole(self, prompt: str, num_tokens: int, tally: Tally | None = None) -> tuple[int, bytes]:
        """Status 0 where no answer came whole."""
        body = bytearray()
        request = self._post("/v1/completions", prompt, num_tokens)
        end = await self._try(request, body, lambda end: end.is_whole and end.status == 200, tally)
        return (end.status if end.is_whole else 0), bytes(body)

    async def _read_openai(self, prompt: str, tally: Tally) -> None:
        body = bytearray()
        num_tokens = self._num_tokens["openai"]
        request = self._post("/v1/completions", prompt, num_tokens, stream=True)
        read_s: list[float] = []
        end = await self._try(request, body, lambda end: end.status == 200, tally, read_s)
        self.gaps += [(later, later - earlier) for earlier, later in pairwise(read_s)]
        if end.status != 200:
            tally.lost += 1
            tally.faults.append(f"{end.status} {body.decode(errors='replace')[:200]}")
            return
        text, wanted, is_done = "", self._texts[prompt, num_tokens], False
        for event in SseParser().feed(bytes(body)):
            is_done = event.data == b"[DONE]"
            chunk = {} if is_done else json.loads(event.data)
            if "error" not in chunk:
                text += "".join(choice["text"] for choice in chunk.get("choices", ()))
        if text != wanted[: len(text)] or (is_done and text != wanted):
            tally.wrong += 1
            tally.faults.append(f"{text!r}, not {wanted!r}")
        elif is_done:
            tally.completed += 1
        else:
            tally.cut += 1

    async def _read_native(self, prompt: str, tally: Tally) -> None:
        body = bytearray()
        num_tokens = self._num_tokens["native"]
        request = self._post("/v1/streams", prompt, num_tokens)
        end = await self._try(request, body, lambda end: end.is_whole and end.status == 201, tally)
        if not end.is_whole or end.status != 201:
            tally.lost += 1
            tally.faults.append(f"{end.status} {body.decode(errors='replace')[:200]}")
            return
        created = json.loads(body)
        reader = _NativeReader(created["id"], self._texts[prompt, num_tokens])
        self._readers.add(reader)
        try:
            await self._follow(reader, created["events_url"], tally)
        finally:
            self._readers.remove(reader)

    async def _follow(self, reader: "_NativeReader", events_url: str, tally: Tally) -> None:
        cut_s: float | None = None
        is_cut = False
        for _ in range(_NUM_CONNECTIONS):
            num_before = len(reader.token_s)
            end = await self._exchange(get(self._address, events_url, reader.last_event_id()), reader.read)
            if cut_s is not None and len(reader.token_s) > num_before:
                tally.pauses_s.append(reader.token_s[num_before] - cut_s)
                cut_s = None
            if reader.end or reader.fault or end.status == 204:
                break
            is_cut = True
            cut_s = cut_s or time.monotonic()
            reader.begin_again()
            await asyncio.sleep(_RECONNECT_S)
        tally.cut += is_cut
        if reader.is_right:
            tally.completed += 1
            tally.resumed += is_cut
        else:
            is_lost = not reader.fault and reader.end != "done"
            tally.lost += is_lost
            tally.wrong += not is_lost
            tally.faults.append(f"{reader.fault or reader.end or end.status} {reader.text!r}, not {reader.wanted!r}")

    def _post(self, path: str, prompt: str, num_tokens: int, **fields: Any) -> bytes:
        body = {"prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
        return post(self._address, path, body | fields)

    async def _try(
        self,
        request: bytes,
        body: bytearray,
        is_enough: Callable[[HttpEnd], bool],
        tally: Tally | None,
        read_s: list[float] | None = None,
    ) -> HttpEnd:
        """Send a request until its answer is enough, or one that no further try would mend, or there were three.
        `body` and the times of its reads are those of the last try."""

        def take(_: int, piece: bytes, now_s: float) -> None:
            body.extend(piece)
            if read_s is not None:
                read_s.append(now_s)

        for number in range(_NUM_TRIES):
            if number == 1 and tally is not None:
                tally.retried += 1
            body.clear()
            if read_s is not None:
                read_s.clear()
            end = await self._exchange(request, take)
            is_final = end.is_whole and 400 <= end.status < 500 and end.status not in _RETRIED
            if is_enough(end) or is_final or number == _NUM_TRIES - 1:
                break
            pause_s = _LEAST_PAUSE_S * 2**number * (1 - 0.25 * self._rng.random())
            if end.retry_after_s is not None and 0 < end.retry_after_s <= _LONGEST_WAIT_S:
                pause_s = end.retry_after_s
            await asyncio.sleep(pause_s)
        return end

    async def _exchange(self, request: bytes, on_body: BodySink) -> HttpEnd:
        """On a connection of its own; status 0 where there is none."""
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_connection(Connection, self._address.host, self._address.port)
        except OSError:
            return HttpEnd(0, is_whole=False, has_answer_bytes=False, written_s=time.monotonic())
        try:
            return await connection.exchange(request, on_body)
        finally:
            connection.close()


class _NativeReader:
    """What a reader has of one stream, over any number of connections."""

    def __init__(self, id: str, wanted: str) -> None:
        self.id = id
        self.wanted = wanted
        self.text = ""
        self.token_s: list[float] = []
        self.end = ""
        self.fault = ""
        self._place = 0
        self._last_event_id = ""
        self._parser = SseParser()

    @property
    def is_right(self) -> bool:
        return self.end == "done" and not self.fault and self.text == self.wanted

    def last_event_id(self) -> str:
        """The header that it comes back with."""
        return f"last-event-id: {self._last_event_id}\r\n" if self._last_event_id else ""

    def begin_again(self) -> None:
        self._parser = SseParser()  # what was torn off does not count

    def read(self, status: int, piece: bytes, read_s: float) -> None:
        if status == 200:
            for event in self._parser.feed(piece):
                self._take(event, read_s)

    def _take(self, event: SseEvent, read_s: float) -> None:
        if self.end:
            self.fault = f"{event.name.decode()} after {self.end}"
        elif event.name == b"token":
            event_id = event.id.decode()
            stream, _, place = event_id.rpartition(":")
            cursor = int(place.partition("-")[0])  # behind it is how often the stream was taken up again
            if stream != self.id or cursor <= self._place:
                self.fault = f"event {event_id} after {self._last_event_id}"
            self._place, self._last_event_id = cursor, event_id
            self.text += json.loads(event.data)["text"]
            self.token_s.append(read_s)
        elif event.name in (b"done", b"error"):
            self.end = event.name.decode() if event.name == b"done" else event.data.decode()


def _text_of(answer: dict[str, Any]) -> str:
    [choice] = answer["choices"]
    return str(choice["text"])
