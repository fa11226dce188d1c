"""`python -m headrace.benchmarks.lanes`: what batching one-shot models brings, and what streams notice of it.

streams     four chat streams, alone and beside users who saturate the picture lane
embeddings  32 users, one text a request: batches against a batch size of 1
pictures    16 users likewise
rare        one user now and then: the wait against none
proxy       32 users, one text a request, at a server that computes one request at a time: directly, and through
            `headrace proxy`

Locust sends the load (`--locust` names its program, which wants an environment of its own); servers and load share the
cores. The sides of a comparison take turns, and ratios are medians over the rounds. The last line is one JSON object.
"""

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

_START_LIMIT_S = 180.0
_LOCUSTFILE = Path(__file__).with_name("locustfile.py")
_TEXT_MODEL, _PICTURE_MODEL = "all-minilm-l6-v2", "resnet-50"


class Load(NamedTuple):
    """Locust's users: whom, how many of each, and what they leave between requests."""

    users: tuple[str, ...]
    num_users: int
    pause_s: float = 0.0


class Side(NamedTuple):
    """One side of a comparison, and the name of its figures' column."""

    name: str
    url: str
    load: Load


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("lanes", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["streams", "embeddings", "pictures", "rare", "proxy"])
    parser.add_argument("--locust", default="locust", help="its program")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=10, help="of each side in each round")
    options = parser.parse_args(args)
    results: dict[str, Any] = {}
    for part in options.parts:
        with ExitStack() as servers:
            sides = _sides(part, servers)
            rounds = [
                {side.name: _measure(options.locust, side, options.seconds) for side in sides}
                for _ in range(options.rounds)
            ]
        results[part] = rounds
        _print_table(part, rounds)
    print(json.dumps(results))
    return 0


def _sides(part: str, servers: ExitStack) -> list[Side]:
    """Start a part's servers; returns its sides, the one to compare with first."""

    def serve(*models: dict[str, Any]) -> str:
        return servers.enter_context(_serving("serve", "--one-shot-models", json.dumps(models)))

    text = {"model": _TEXT_MODEL, "task": "embed"}
    picture = {"model": _PICTURE_MODEL, "task": "classify"}
    match part:
        case "streams":
            url = serve(picture)
            return [
                Side("alone", url, Load(("ChatUser",), 4, 0.2)),
                Side("beside pictures", url, Load(("ChatUser", "PictureUser"), 4, 0.2)),
            ]
        case "embeddings" | "pictures":
            load = Load(("EmbeddingUser",), 32) if part == "embeddings" else Load(("PictureUser",), 16)
            model = text if part == "embeddings" else picture
            return [
                Side("size 1", serve(model | {"max_batch_size": 1}), load),
                Side("batches", serve(model), load),
            ]
        case "rare":
            load = Load(("EmbeddingUser",), 1, 0.1)
            return [Side("no wait", serve(text | {"max_wait_ms": 0}), load), Side("wait", serve(text), load)]
        case "proxy":
            upstream = servers.enter_context(_unbatched())
            proxy = servers.enter_context(_serving("proxy", "--upstream", upstream))
            load = Load(("EmbeddingUser",), 32)
            return [Side("upstream", upstream, load), Side("through the proxy", proxy, load)]
    raise SystemExit(f"lanes: there is no part {part!r}")


def _measure(locust: str, side: Side, seconds: int) -> dict[str, float]:
    """Figures of one side: requests per second, and milliseconds by name."""
    num_users = side.load.num_users
    if side.load.users == ("ChatUser", "PictureUser"):
        num_users *= 3  # weights are equal: as many streams as alone, and the others' lane is full
    users = [*side.load.users]
    command = [locust, "-f", str(_LOCUSTFILE), "--host", side.url, "--headless", "--json", "--skip-log"]
    command += ["-u", str(num_users), "-r", str(num_users), "-t", f"{seconds}s", *users]
    environment = os.environ | {"LANES_PAUSE_S": str(side.load.pause_s), "LANES_NUM_STREAMS": str(side.load.num_users)}
    with _probing(side.url) as probed_ms:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if not done.stdout.strip().startswith("["):
        raise SystemExit(f"lanes: locust failed:\n{done.stderr}")
    figures: dict[str, float] = {}
    for entry in json.loads(done.stdout):
        name = entry["name"]
        if entry["num_failures"]:
            figures[f"{name} failed"] = entry["num_failures"]
        if name.startswith("/v1/") and "chat" not in name:
            figures["requests/s"] = entry["num_requests"] / (entry["last_request_timestamp"] - entry["start_time"])
            name = "answer"
        if name in ("answer", "first token", "between tokens"):
            for share, label in ((0.5, "p50"), (0.99, "p99")):
                figures[f"{name} {label} ms"] = _percentile(entry["response_times"], share)
    if probed_ms:
        figures["/health p99 ms"] = sorted(probed_ms)[int(0.99 * len(probed_ms))]
    return figures


def _percentile(counts: dict[str, int], share: float) -> float:
    """Of Locust's table of milliseconds and how often each came."""
    left = share * sum(counts.values())
    for value, count in sorted((float(value), count) for value, count in counts.items()):
        left -= count
        if left <= 0:
            return value
    return float("nan")


@contextmanager
def _probing(url: str) -> Iterator[list[float]]:
    """Ask /health twenty times a second meanwhile, where there is one; yields the milliseconds."""
    found: list[float] = []
    is_over = threading.Event()

    def probe() -> None:
        while not is_over.wait(0.05):
            began_s = time.perf_counter()
            try:
                urllib.request.urlopen(f"{url}/health", timeout=10).close()
            except OSError:
                return
            found.append(1000 * (time.perf_counter() - began_s))

    thread = threading.Thread(target=probe)
    thread.start()
    try:
        yield found
    finally:
        is_over.set()
        thread.join()


@contextmanager
def _serving(command: str, *flags: str) -> Iterator[str]:
    """A Headrace server, from its start to its end; yields its URL."""
    code = "from headrace.server.cli import main; raise SystemExit(main())"
    arguments = [sys.executable, "-c", code, command, "--port", "0", *flags]
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(arguments, stdout=output, stderr=subprocess.STDOUT)
        try:
            pattern = r"chat page: (\S+)/\n" if command == "serve" else r"listening on (http\S+)"
            yield _until_found(process, output, pattern)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def _until_found(process: "subprocess.Popen[bytes]", output: Any, pattern: str) -> str:
    deadline_s = time.monotonic() + _START_LIMIT_S
    while time.monotonic() < deadline_s and process.poll() is None:
        output.seek(0)
        if found := re.search(pattern, output.read()):
            return found[1]
        time.sleep(0.1)
    output.seek(0)
    raise SystemExit(f"lanes: a server did not start:\n{output.read()}")


@contextmanager
def _unbatched() -> Iterator[str]:
    from headrace.scheduler.model_source import resolve_model

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    path = resolve_model(_TEXT_MODEL).path
    command = [sys.executable, "-m", "headrace.benchmarks.unbatched_server", str(path), "--port", str(port)]
    process = subprocess.Popen(command)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline_s = time.monotonic() + _START_LIMIT_S
        while True:
            try:
                urllib.request.urlopen(f"{url}/v1/models", timeout=5).close()
                break
            except OSError:
                if time.monotonic() > deadline_s or process.poll() is not None:
                    raise SystemExit("lanes: the unbatched server did not start") from None
                time.sleep(0.2)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def _print_table(part: str, rounds: list[dict[str, dict[str, float]]]) -> None:
    first, second = rounds[0]
    names = [name for name in rounds[0][second] if name in rounds[0][first]]
    print(f"\n| {part} | {first} | {second} | ratio |\n|---|---|---|---|")
    for name in names:
        values = [[figures[side].get(name, float("nan")) for figures in rounds] for side in (first, second)]
        ratio = median(after / before for before, after in zip(*values, strict=True) if before)
        print(f"| {name} | {median(values[0]):.1f} | {median(values[1]):.1f} | {ratio:.2f} |")
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())
