"""What clients that do not behave, and the worst inputs, do to a server: Headrace, llama.cpp's and vLLM's alike.

Whether a server goes on computing for a client that has left is told from outside, by when the next request is served:
the server runs one request at a time. All seconds are `time.monotonic`'s. A server whose memory grows without bound is
ended before the machine is.
"""

import asyncio
import contextlib
import json
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from headrace.benchmarks.compared_target import HttpTarget
from headrace.benchmarks.faulty_clients import OpenRequest, StoppedReader, get, post
from headrace.benchmarks.http_client import Target
from headrace.benchmarks.peers import Installation
from headrace.benchmarks.worst_inputs import worst_inputs

PEERS: Final = ("headrace", "llama.cpp", "vllm")
_COMPLETIONS: Final = "/v1/completions"
_CONTEXT_TOKENS: Final = 2048
_ANSWER_TOKENS: Final = 300
_LONG_ANSWER_TOKENS: Final = 1900
_STOPPED_FOR_S: Final = 90.0  # over the minute after which Headrace cuts a client that reads nothing
_INPUT_LIMIT_S: Final = 10.0
_NEIGHBOUR_LIMIT_S: Final = 40.0
_START_LIMIT_S: Final = 300.0
_MOST_RESIDENT_BYTES: Final = 12 * 2**30


@dataclass(slots=True)
class PeerFaults:
    """One server's figures; seconds, None where it took longer than was waited for. `answer_s` is what a whole answer
    takes alone, `first_token_s` a first token."""

    name: str
    version: str | None
    first_token_s: float = 0.0
    answer_s: float = 0.0
    queued_left_s: float | None = (
        None  # from the running answer's end to the next one's first token, the one between left
    )
    stream_left_s: float | None = None  # from a client's leaving in mid-stream to the next one's first token
    stopped_held_s: float | None = None  # from a reader's stop to the next one's first token
    stopped_cut_s: float | None = None
    stopped_neighbour_s: float | None = None  # a whole answer beside a stopped reader, two at once
    inputs: dict[str, "InputOutcome"] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {name: round(value, 3) if isinstance(value, float) else value for name, value in asdict(self).items()}


@dataclass(frozen=True, slots=True)
class InputOutcome:
    """`status` 0: no answer within the limit. `neighbour` is what became of a stream beside it."""

    status: int
    seconds: float
    is_alive: bool
    neighbour: str  # same, other text, broken

    def __str__(self) -> str:
        parts = [f"{self.status or 'none'}, {self.seconds:.2g} s"]
        parts += [] if self.neighbour == "same" else [f"neighbour {self.neighbour}"]
        return ", ".join(parts if self.is_alive else [*parts, "SERVER GONE"])


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A server that has answered its first request."""

    process: HttpTarget
    address: Target
    model: str | None

    async def ask(self, max_tokens: int, prompt: str = "Once upon a time", **fields: Any) -> OpenRequest:
        """Send a greedy streaming request."""
        return await OpenRequest.send(self.address, self.request(max_tokens, prompt, **fields))

    def request(self, max_tokens: int, prompt: str = "Once upon a time", **fields: Any) -> bytes:
        body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
        body |= {} if self.model is None else {"model": self.model}
        return post(self.address, _COMPLETIONS, body | fields)

    def stop_reading(self) -> StoppedReader:
        """Ask for more than the kernel's buffers hold, and read none of it."""
        return StoppedReader(self.address, self.request(_LONG_ANSWER_TOKENS, logprobs=20))

    async def is_alive(self) -> bool:
        with contextlib.suppress(OSError):
            end = await (await OpenRequest.send(self.address, get(self.address, "/v1/models"))).end(10)
            return end is not None and end.status == 200
        return False


@asynccontextmanager
async def running(
    installation: Installation, name: str, num_slots: int, *flags: str, log: str | None = None
) -> AsyncIterator[RunningServer]:
    """A server of this kind that runs so many requests at once; ended afterwards.

    Raises: TargetError, TimeoutError, InstallError.
    """
    recipe = installation.recipe(name, num_slots, _CONTEXT_TOKENS)
    if name != "llama.cpp":
        recipe = replace(recipe, command=(*recipe.command, "--max-num-seqs", str(num_slots), *flags))
    target = HttpTarget(recipe, installation.log(log or name))
    guard = asyncio.create_task(_guard_memory(target))
    try:
        async with asyncio.timeout(_START_LIMIT_S):
            await target.start("Hello")
        address = Target.parse(target.url)
        yield RunningServer(target, address, await _first_model(address))
    finally:
        guard.cancel()
        await target.end()


async def _first_model(address: Target) -> str | None:
    opened = await OpenRequest.send(address, get(address, "/v1/models"))
    await opened.end(10)
    with contextlib.suppress(ValueError, LookupError):
        return str(json.loads(opened.body)["data"][0]["id"])
    return None


async def _guard_memory(target: HttpTarget) -> None:
    while True:
        await asyncio.sleep(0.2)
        if target.session is not None and resident_bytes(target) > _MOST_RESIDENT_BYTES:
            target.session.signal(signal.SIGKILL)


def resident_bytes(target: HttpTarget) -> int:
    """Of all the server's processes."""
    total = 0
    for stat in target.session.members() if target.session is not None else ():
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{stat.pid}/status").read_text().splitlines():
                if line.startswith("VmRSS:"):
                    total += int(line.split()[1]) * 1024
    return total


async def measure_peer(installation: Installation, name: str, say: Callable[[str], None]) -> PeerFaults:
    """All of it for one server. Raises: TargetError, TimeoutError, InstallError."""
    faults = PeerFaults(name, installation.version(name))
    async with running(installation, name, 1) as server:
        await _measure_leavers(server, faults)
        say(f"{name}: {faults}")
        await _measure_stopped_reader(server, faults)
    async with running(installation, name, 2) as server:
        stopped = server.stop_reading()
        neighbour = await server.ask(_ANSWER_TOKENS, "The mill wheel")
        if await neighbour.end(_STOPPED_FOR_S) is not None:
            faults.stopped_neighbour_s = neighbour.piece_s[-1] - neighbour.sent_s
        stopped.close()
    say(f"{name}: {faults}")
    await try_inputs(installation, name, faults, say)
    return faults


async def _measure_leavers(server: RunningServer, faults: PeerFaults) -> None:
    first = await server.ask(_ANSWER_TOKENS)
    await first.end(_STOPPED_FOR_S)
    faults.first_token_s, faults.answer_s = first.piece_s[0] - first.sent_s, first.piece_s[-1] - first.sent_s

    runs = await server.ask(_ANSWER_TOKENS)
    await runs.until(b"data:", 3)
    waits = await server.ask(_ANSWER_TOKENS, "The mill wheel")
    await asyncio.sleep(0.3)  # until it is in the server's queue, which nothing tells a client
    await waits.leave()
    follows = await server.ask(1, "1, 2, 3,")
    await runs.end(_STOPPED_FOR_S)
    if await follows.end(_STOPPED_FOR_S) is not None:
        faults.queued_left_s = follows.piece_s[0] - runs.piece_s[-1]

    leaves = await server.ask(_LONG_ANSWER_TOKENS)
    await leaves.until(b"data:", 10)
    await leaves.leave()
    follows = await server.ask(1, "1, 2, 3,")
    if await follows.end(_STOPPED_FOR_S) is not None:
        faults.stream_left_s = follows.piece_s[0] - follows.sent_s


async def _measure_stopped_reader(server: RunningServer, faults: PeerFaults) -> None:
    began_s = time.monotonic()
    stopped = server.stop_reading()
    await asyncio.sleep(0.3)
    follows = await server.ask(1, "1, 2, 3,")
    while time.monotonic() - began_s < _STOPPED_FOR_S and faults.stopped_cut_s is None:
        await asyncio.sleep(0.05)
        if faults.stopped_held_s is None and follows.piece_s:
            faults.stopped_held_s = follows.piece_s[0] - began_s
        if stopped.is_cut:
            faults.stopped_cut_s = time.monotonic() - began_s
    stopped.close()
    await follows.leave()


async def try_inputs(installation: Installation, name: str, faults: PeerFaults, say: Callable[[str], None]) -> None:
    """Send one after the other, each beside a neighbour. A server that did not come through one well is started again,
    so that the next one meets it as the first one did."""
    todo = list(worst_inputs())
    while todo:
        async with running(installation, name, 2, log=f"{name}-inputs") as server:
            reference = await _text(server)
            todo = list(worst_inputs(server.model))[len(faults.inputs) :]
            while todo:
                case = todo.pop(0)
                outcome = await _try_input(server, case.request(server.address.authority), reference)
                faults.inputs[case.name] = outcome
                say(f"{name}: {case.name}: {outcome}")
                if not (outcome.is_alive and outcome.status and outcome.neighbour == "same"):
                    break


async def _try_input(server: RunningServer, request: bytes, reference: str) -> InputOutcome:
    neighbour = asyncio.create_task(_text(server))
    await asyncio.sleep(0.05)
    began_s = time.monotonic()
    try:
        end = await (await OpenRequest.send(server.address, request)).end(_INPUT_LIMIT_S)
    except OSError:
        end = None
    seconds = time.monotonic() - began_s
    try:
        text = await neighbour
    except OSError:
        text = ""
    is_same = "same" if text == reference else "other text" if text else "broken"
    return InputOutcome(end.status if end is not None else 0, seconds, await server.is_alive(), is_same)


async def _text(server: RunningServer) -> str:
    """A neighbour's whole text; empty where its stream was broken."""
    opened = await server.ask(48, "The mill wheel")
    await opened.end(_NEIGHBOUR_LIMIT_S)
    lines = [line[6:] for line in opened.body.split(b"\n") if line.startswith(b"data: ")]
    if not lines or lines[-1].strip() != b"[DONE]":
        return ""
    choices = [choice for line in lines[:-1] for choice in json.loads(line)["choices"]]
    return "".join(choice["text"] for choice in choices)


def table(all_faults: list[PeerFaults]) -> str:
    """Side by side, in Markdown."""

    def seconds(value: float | None) -> str:
        return f"not in {_STOPPED_FOR_S:.0f} s" if value is None else f"{value:.2f} s"

    rows: list[tuple[str, Callable[[PeerFaults], str]]] = [
        ("a first token alone", lambda faults: seconds(faults.first_token_s)),
        (f"an answer of {_ANSWER_TOKENS} tokens alone", lambda faults: seconds(faults.answer_s)),
        ("left while queued: the next one's first token", lambda faults: seconds(faults.queued_left_s)),
        ("left in mid-stream: the next one's first token", lambda faults: seconds(faults.stream_left_s)),
        ("reads nothing: the next one's first token", lambda faults: seconds(faults.stopped_held_s)),
        ("reads nothing: cut after", lambda faults: seconds(faults.stopped_cut_s)),
        (f"{_ANSWER_TOKENS} tokens beside one that reads nothing", lambda faults: seconds(faults.stopped_neighbour_s)),
    ]
    names = list(dict.fromkeys(name for faults in all_faults for name in faults.inputs))
    lines = [
        f"| | {' | '.join(f'{faults.name} {faults.version}' for faults in all_faults)} |",
        f"|---|{'---|' * len(all_faults)}",
        *(f"| {label} | {' | '.join(tell(faults) for faults in all_faults)} |" for label, tell in rows),
        *(f"| {name} | {' | '.join(str(faults.inputs.get(name, '-')) for faults in all_faults)} |" for name in names),
    ]
    return "\n".join(lines)
