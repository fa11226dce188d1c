"""`python -m headrace.benchmarks.resilience`: what clients, networks and signals can do to a server, in numbers.

held     a thousand streams at once, of which most wait: whether all of them end whole, and their memory
cancel   from a client's close until its sequence is gone, in milliseconds and engine steps
drain    SIGTERM with a hundred streams, without a grace time and with one that suffices
restart  kill -9 with native streams under way and a journal: from the new process to the first new token of each
journal  the gaps of native streams that are recorded, and of OpenAI's beside them, over those without a journal
inputs   the worst inputs, one after the other, each beside a stream
peers    with --peers FOLDER (see `compare`): clients that leave or read nothing, and the worst inputs, on Headrace,
         llama.cpp and vLLM in turn

Each prints a table; the last line of stdout is one JSON object. Servers run beside the client on the same cores.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import re
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from headrace.benchmarks.compared_target import TargetError
from headrace.benchmarks.faulty_clients import OpenRequest, get, post
from headrace.benchmarks.measurement import percentile
from headrace.benchmarks.peer_faults import (
    PEERS,
    PeerFaults,
    RunningServer,
    measure_peer,
    resident_bytes,
    running,
    table,
    try_inputs,
)
from headrace.benchmarks.peers import Installation, InstallError

_LIMIT_S: Final = 300.0
# Nobody waits for how long a step takes; that all are let in is the recipe's.
_ANY_STEP: Final = ("--itl-targets-ms", "[1e6,1e6,1e6]")
_RUNNING: Final = "headrace_num_requests_running"
_STEPS: Final = "headrace_engine_steps_total"


async def held(installation: Installation, num_streams: int) -> dict[str, Any]:
    """Half of them native, half OpenAI's; memory is looked at while all are accepted and few have ended."""
    flags = (*_ANY_STEP, "--max-queue-size", str(num_streams))
    async with running(installation, "headrace", 32, *flags) as server:
        await asyncio.sleep(8)  # what it does in idle time, it has done
        before = resident_bytes(server.process)
        opened = await asyncio.gather(*(_open_stream(server, i, 16) for i in range(num_streams)))
        most, most_waiting = before, 0.0
        while any(stream.ended_s is None for stream in opened):
            await asyncio.sleep(0.5)
            most = max(most, resident_bytes(server.process))
            most_waiting = max(most_waiting, (await _metrics(server))["headrace_num_requests_waiting"])
        ends = [await stream.end(_LIMIT_S) for stream in opened]
        num_whole = sum(_is_whole(stream.body, 16) for stream in opened)
        assert all(end is not None for end in ends)
    return {
        "streams": num_streams,
        "whole": num_whole,
        "most_waiting": round(most_waiting),
        "kib_per_stream": round((most - before) / num_streams / 1024, 1),
        "seconds": round(max(stream.ended_s or 0.0 for stream in opened) - opened[0].sent_s, 1),
    }


async def _open_stream(server: RunningServer, i: int, max_tokens: int) -> OpenRequest:
    if i % 2:
        return await server.ask(max_tokens, f"Story number {i}:")
    path = await _create_native(server, f"Story number {i}:", max_tokens)
    return await OpenRequest.send(server.address, get(server.address, path))


async def _create_native(server: RunningServer, prompt: str, max_tokens: int) -> str:
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    created = await OpenRequest.send(server.address, post(server.address, "/v1/streams", body))
    await created.end(_LIMIT_S)
    return str(json.loads(created.body)["events_url"])


def _is_whole(body: bytes | bytearray, num_tokens: int) -> bool:
    """Whether a stream ended once, as it should, with all its tokens."""
    if b"event: done" in body:
        return body.count(b"event: done") == 1 and b'"completion_tokens":%d' % num_tokens in body
    return body.count(b"data: [DONE]") == 1 and b'"finish_reason":"length"' in body


async def _metrics(server: RunningServer) -> dict[str, float]:
    opened = await OpenRequest.send(server.address, get(server.address, "/metrics"))
    await opened.end(_LIMIT_S)
    pairs = (line.rsplit(" ", 1) for line in opened.body.decode().splitlines() if line and not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


async def cancel(installation: Installation, width: int, num_rounds: int) -> dict[str, Any]:
    """One of so many running streams is closed, and /metrics asked until it runs no more; then another takes its place.

    What is measured holds the answer of /metrics that told it, some milliseconds.
    """
    milliseconds: list[float] = []
    steps: list[float] = []
    async with running(installation, "headrace", 32, *_ANY_STEP) as server:
        streams: list[OpenRequest] = []
        for _ in range(num_rounds):
            while len(streams) < width:
                streams.append(await server.ask(1800))
            for stream in streams:
                await stream.until(b"data:", 3)
            before = await _metrics(server)
            assert before[_RUNNING] == width
            closed_s = time.monotonic()
            await streams.pop(0).leave()
            while (now := await _metrics(server))[_RUNNING] == width:
                pass
            milliseconds.append(1e3 * (time.monotonic() - closed_s))
            steps.append(now[_STEPS] - before[_STEPS])
        for stream in streams:
            await stream.leave()
    return {
        "streams": width,
        "ms_p50": round(percentile(milliseconds, 50), 1),
        "ms_p99": round(percentile(milliseconds, 99), 1),
        "steps_p50": percentile(steps, 50),
        "steps_p99": percentile(steps, 99),
    }


async def drain(installation: Installation, num_streams: int, grace_s: float) -> dict[str, Any]:
    """From the signal to the process's end."""
    flags = (*_ANY_STEP, "--drain-grace-s", str(grace_s))
    async with running(installation, "headrace", num_streams, *flags) as server:
        streams = await asyncio.gather(*(_open_stream(server, i, 64) for i in range(num_streams)))
        for stream in streams:
            await stream.until(b'"text"')
        session = server.process.session
        assert session is not None
        signalled_s = time.monotonic()
        session.signal(signal.SIGTERM)
        while session.members():  # noqa: ASYNC110 - another process's end
            await asyncio.sleep(0.01)
        ended_s = time.monotonic()
        ends = [await stream.end(_LIMIT_S) for stream in streams]
    return {
        "streams": num_streams,
        "grace_s": grace_s,
        "seconds": round(ended_s - signalled_s, 2),
        "whole": sum(_is_whole(stream.body, 64) for stream in streams),
        "told": sum(b"draining" in stream.body or b"shutting down" in stream.body for stream in streams),
        "http_whole": sum(end is not None and end.is_whole for end in ends),
    }


async def restart(installation: Installation, num_streams: int) -> dict[str, Any]:
    """The new process is asked for a first token of its own, and then readers come back, each with its last event's
    id."""
    with tempfile.TemporaryDirectory() as folder:
        flags = (*_ANY_STEP, "--journal-file", str(Path(folder) / "journal"))
        async with running(installation, "headrace", num_streams + 1, *flags) as server:
            paths = [await _create_native(server, f"Story number {i}:", 400) for i in range(num_streams)]
            readers = [await OpenRequest.send(server.address, get(server.address, path)) for path in paths]
            for reader in readers:
                await reader.until(b"event: token", 10)
            assert server.process.session is not None
            server.process.session.signal(signal.SIGKILL)
            for reader in readers:
                await reader.end(_LIMIT_S)
        began_s = time.monotonic()
        async with running(installation, "headrace", num_streams + 1, *flags) as server:
            first_token_s = time.monotonic() - began_s
            resumed = [
                await OpenRequest.send(server.address, get(server.address, path, _last_event_id(reader.body)))
                for path, reader in zip(paths, readers, strict=True)
            ]
            for reader in resumed:
                await reader.until(b"event: token")
            resumed_s = time.monotonic() - began_s
            for reader in resumed:
                await reader.end(_LIMIT_S)
            num_whole = sum(
                _is_whole(rest.body, 400) and _num_tokens(reader.body) + _num_tokens(rest.body) == 400
                for reader, rest in zip(readers, resumed, strict=True)
            )
    return {
        "streams": num_streams,
        "first_token_s": round(first_token_s, 2),
        "all_resumed_s": round(resumed_s, 2),
        "whole": num_whole,
    }


def _num_tokens(body: bytes | bytearray) -> int:
    """Of a native stream's whole events: what is lost or repeated between two readings shows in their sum."""
    whole = body[: body.rindex(b"\n\n")]
    return sum(int(num) for num in re.findall(rb'"num_tokens":(\d+)', whole))


def _last_event_id(body: bytes | bytearray) -> str:
    """The header that a reader comes back with."""
    *_, last = re.findall(rb"^id: (.*)$", body[: body.rindex(b"\n\n")], re.MULTILINE)
    return f"last-event-id: {last.decode()}\r\n"


async def journal(installation: Installation, num_streams: int, num_rounds: int) -> list[dict[str, Any]]:
    """Half of the streams are native, which a journal records, half OpenAI's, which it does not.

    One row per way to force it to the disk, "none" without a journal: medians of rounds in turn, in which each is
    divided by the round's "none", whose own are in milliseconds.
    """
    rounds: list[dict[str, dict[str, float]]] = []
    for _ in range(num_rounds):
        figures: dict[str, dict[str, float]] = {}
        for fsync in ("none", "never", "checkpoint", "step"):
            gaps = await _gaps_ms(installation, fsync, num_streams)
            figures[fsync] = {
                f"{kind}_p{percent}": percentile(of_kind, percent)
                for kind, of_kind in gaps.items()
                for percent in (50, 99)
            }
        plain = figures.pop("none")
        rounds.append({"none": plain, **{fsync: _over(row, plain) for fsync, row in figures.items()}})
    return [
        {"fsync": fsync, **{name: round(statistics.median(each[fsync][name] for each in rounds), 2) for name in row}}
        for fsync, row in rounds[0].items()
    ]


def _over(figures: dict[str, float], base: dict[str, float]) -> dict[str, float]:
    return {name: figure / base[name] for name, figure in figures.items()}


async def _gaps_ms(installation: Installation, fsync: str, num_streams: int) -> dict[str, list[float]]:
    """Between the reads of each kind of stream, once all of them run."""
    with tempfile.TemporaryDirectory() as folder:
        recorded = ("--journal-file", str(Path(folder) / "journal"), "--journal-fsync", fsync)
        flags = _ANY_STEP if fsync == "none" else (*_ANY_STEP, *recorded)
        async with running(installation, "headrace", num_streams, *flags) as server:
            streams = await asyncio.gather(*(_open_stream(server, i, 200) for i in range(num_streams)))
            for stream in streams:
                await stream.end(_LIMIT_S)
    all_run_s = max(stream.piece_s[8] for stream in streams)
    return {
        kind: [1e3 * (b - a) for stream in of_kind for a, b in itertools.pairwise(stream.piece_s) if a > all_run_s]
        for kind, of_kind in (("native", streams[::2]), ("openai", streams[1::2]))
    }


async def inputs(installation: Installation) -> dict[str, Any]:
    """Those of the peers' comparison, on this server alone."""
    faults = PeerFaults("headrace", installation.version("headrace"))
    await try_inputs(installation, "headrace", faults, _say)
    outcomes = faults.inputs.values()
    return {
        "tried": len(outcomes),
        "refused": sum(400 <= outcome.status < 500 for outcome in outcomes),
        "answered": sum(outcome.status == 200 for outcome in outcomes),
        "neighbours_same": sum(outcome.neighbour == "same" for outcome in outcomes),
        "slowest_s": round(max(outcome.seconds for outcome in outcomes), 2),
    }


async def peers(installation: Installation, names: Sequence[str]) -> list[dict[str, Any]]:
    """One after the other; one that does not start is left out."""
    measured: list[PeerFaults] = []
    for name in names:
        try:
            measured.append(await measure_peer(installation, name, _say))
        except (TargetError, TimeoutError, InstallError) as error:
            _say(f"{name} is left out: {error or 'it took too long'}")
    if measured:
        print(table(measured), flush=True)
    return [faults.as_json() for faults in measured]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _print_rows(title: str, rows: Sequence[dict[str, Any]]) -> None:
    print(f"\n| {title}: {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
    for row in rows:
        print(f"| {' | '.join(map(str, row.values()))} |", flush=True)


async def _measure(experiment: str, installation: Installation, peer_names: Sequence[str]) -> list[dict[str, Any]]:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)  # no server is left behind
    match experiment:
        case "held":
            return [await held(installation, 1000)]
        case "cancel":
            return [await cancel(installation, width, 50) for width in (1, 16, 32)]
        case "drain":
            return [await drain(installation, 100, grace_s) for grace_s in (0, 60)]
        case "restart":
            return [await restart(installation, 32)]
        case "journal":
            return await journal(installation, 32, 3)
        case "inputs":
            return [await inputs(installation)]
    assert experiment == "peers"
    return await peers(installation, peer_names)


_EXPERIMENTS: Final = ("held", "cancel", "drain", "restart", "journal", "inputs", "peers")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("headrace.benchmarks.resilience", description=__doc__.partition("\n\n")[0])
    parser.add_argument("model", nargs="?", help="as for `headrace serve`; a .gguf file")
    parser.add_argument("--experiments", default=",".join(_EXPERIMENTS[:-1]), help="default %(default)s")
    parser.add_argument(
        "--peers", type=Path, help="the folder of `compare`'s peers: measures beside them, nothing else"
    )
    parser.add_argument("--targets", default=",".join(PEERS), help="of the comparison (default %(default)s)")
    options = parser.parse_args(arguments)
    installation = Installation.of(options.peers, options.model, _say)
    report: dict[str, Any] = {}
    with contextlib.suppress(KeyboardInterrupt, asyncio.CancelledError):
        for experiment in ["peers"] if options.peers else options.experiments.split(","):
            if experiment not in _EXPERIMENTS:
                parser.error(f"no experiment {experiment}")
            _say(experiment)
            report[experiment] = asyncio.run(_measure(experiment, installation, options.targets.split(",")))
            if experiment != "peers":
                _print_rows(experiment, report[experiment])
    print(json.dumps(report), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
