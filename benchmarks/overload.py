"""`python -m headrace.benchmarks.overload`: the scheduling policy on the real engine, over HTTP.

flood    one tenant sends 1,000 requests at once; what the others' first tokens then take, beside the same load spread
         evenly over ten tenants
context  eight streams run, and a prompt that fills the context arrives: the gaps between their tokens
trace    the Azure conversation trace at 1x and 2x of what the server does, in tiers, beside a server without keys and
         without admission (first come, first served)

A server of each kind is started, measured and ended; it runs beside the client on the same cores.
"""

import argparse
import asyncio
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from headrace.benchmarks.arrivals import read_trace
from headrace.benchmarks.completion_client import CompletionClient, Endpoint
from headrace.benchmarks.http_client import HttpClient, Target
from headrace.benchmarks.measurement import Outcome, Timeline, percentile
from headrace.benchmarks.prompts import PromptMaker
from headrace.server.api_keys import append_key, create_key

_TRACE = Path(__file__).parent / "traces" / "azure_2023_conversation.csv"
_LENGTH_SCALE = 0.25
_START_LIMIT_S = 120.0
# Of the default settings on a CPU.
_ITL_TARGET_S = 0.15
_TTFT_TARGETS_S = {"premium": 2.0, "standard": 8.0, "batch": 60.0}
_TRACE_TENANTS = (("p1", 0.15), ("s1", 0.35), ("s2", 0.25), ("b1", 0.25))
_TIERS = {"p": "premium", "s": "standard", "b": "batch"}
_ADMIT_ALL = ("--ttft-targets-s", "[1e6,1e6,1e6]", "--max-queue-size", "100000")


class _Server:
    """A server and a client for each of its tenants; without tenants, one."""

    def __init__(self, port: int, keys: dict[str, str]) -> None:
        self._target = Target("127.0.0.1", port, is_tls=False, prefix="")
        self._keys = keys
        self._prompts = PromptMaker(seed=1)

    async def ask(self, tenant: str, prompt_tokens: int, output_tokens: int, due_s: float = 0.0) -> Timeline:
        """Send a request at a time of the loop's clock; returns it when it is over."""
        http = HttpClient(self._target, self._keys.get(tenant))
        client = CompletionClient(http, Endpoint.COMPLETIONS)
        timeline = Timeline(prompt_tokens, output_tokens)
        body = client.request_body(self._prompts.prompt(prompt_tokens), output_tokens)
        await asyncio.sleep(max(0.0, due_s - time.monotonic()))
        timeline.launched_s = time.monotonic()
        await client.stream(body, timeline)
        return timeline


@asynccontextmanager
async def _serving(model: str | None, tenants: Sequence[str], *flags: str) -> AsyncIterator[_Server]:
    with tempfile.TemporaryDirectory() as folder:
        keys: dict[str, str] = {}
        key_file = Path(folder) / "keys.toml"
        for tenant in tenants:
            keys[tenant], key = create_key(tenant, _TIERS[tenant[0]])  # type: ignore[arg-type]
            append_key(key_file, key)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        command = [sys.executable, "-m", "headrace.server", *([model] if model else []), "--port", str(port), *flags]
        command += ["--api-keys-file", str(key_file)] if tenants else []
        with (Path(folder) / "log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log, env=os.environ)
        server = _Server(port, keys)
        try:
            async with asyncio.timeout(_START_LIMIT_S):
                first = tenants[0] if tenants else ""
                while (await server.ask(first, 20, 4)).outcome is not Outcome.OK:  # noqa: ASYNC110 - it loads
                    await asyncio.sleep(0.2)
            await asyncio.sleep(8)  # what it does in idle time, it has done
            yield server
        finally:
            process.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.2)
            process.send_signal(signal.SIGTERM)  # what still runs is not waited for
            await process.wait()


async def flood(model: str | None, *flags: str) -> list[str]:
    """The probes are four tenants' that send a request every second, one of them at any quarter of it."""
    probes = ["s1", "s2", "s3", "s4"]
    crowd = [f"sc{i}" for i in range(10)]
    medians: dict[str, float] = {}
    lines = ["| load beside four tenants that send little | their TTFT p50 | of the 1,000 shed |", "|---|---|---|"]
    for name, senders in (("nobody else", []), ("flood", ["sf"]), ("spread evenly", crowd)):
        async with _serving(model, [*probes, "sf", *crowd], *flags) as server:
            begin_s = time.monotonic()
            background = [
                asyncio.create_task(server.ask(senders[i % len(senders)], 100, 40, begin_s))
                for i in range(1000 if senders else 0)
            ]
            asked = [server.ask(probes[i % 4], 100, 40, begin_s + 0.5 + 0.25 * i) for i in range(48)]
            timelines = await asyncio.gather(*asked)
            shed = sum(task.done() and task.result().outcome is Outcome.SHED for task in background)
            for task in background:
                task.cancel()
            await asyncio.gather(*background, return_exceptions=True)
        ok = [timeline.ttft_s for timeline in timelines if timeline.outcome is Outcome.OK]
        if len(ok) < len(timelines):
            lines.append(f"only {len(ok)} of {len(timelines)} were answered:")
        medians[name] = percentile(ok, 50)
        lines.append(f"| {name} | {1e3 * medians[name]:.0f} ms | {shed} |")
    ratio = medians["flood"] / medians["spread evenly"]
    return [*lines, f"flood / spread evenly: {ratio:.2f} (target below 1.2)"]


async def context(model: str | None, *flags: str) -> list[str]:
    """The largest prompt that fits the demo model's context beside its answer."""
    async with _serving(model, [], *flags) as server:
        async with asyncio.TaskGroup() as tasks:
            begin_s = time.monotonic()
            streams = [tasks.create_task(server.ask("", 60, 1200, begin_s)) for _ in range(8)]
            long = tasks.create_task(server.ask("", 8000, 8, begin_s + 2))
        done = long.result()
        if done.outcome is not Outcome.OK:
            return [f"the long prompt failed: {done.failure} {done.detail}"]
        window = done.launched_s, done.content_s[0]
        gaps = [
            later - earlier
            for task in streams
            for earlier, later in zip(task.result().content_s, task.result().content_s[1:], strict=False)
            if window[0] <= later <= window[1]
        ]
    p99_s = percentile(gaps, 99)
    return [
        f"while a prompt of {done.prompt_tokens} tokens is computed ({window[1] - window[0]:.1f} s) beside 8 streams: "
        f"ITL p50 {1e3 * percentile(gaps, 50):.0f} ms, p99 {1e3 * p99_s:.0f} ms, "
        f"{p99_s / _ITL_TARGET_S:.2f} of the target (at most 1.25), longest {1e3 * max(gaps):.0f} ms"
    ]


async def trace(model: str | None, num_requests: int) -> list[str]:
    """What the server does in a second is measured first, with all requests there at once."""
    arrivals = read_trace(_TRACE, num_requests, _LENGTH_SCALE, 1.0)
    tenants = [name for name, _ in _TRACE_TENANTS]

    async def play(server: _Server, rate: float) -> list[tuple[str, Timeline]]:
        draw = random.Random(1)
        begin_s = time.monotonic() + 0.1
        async with asyncio.TaskGroup() as tasks:
            asked = []
            for arrival in arrivals:
                tenant = draw.choices(tenants, [share for _, share in _TRACE_TENANTS])[0]
                due_s = begin_s + arrival.at_s / rate
                asked.append(
                    (
                        tenant,
                        tasks.create_task(server.ask(tenant, arrival.prompt_tokens, arrival.output_tokens, due_s)),
                    )
                )
        return [(tenant, task.result()) for tenant, task in asked]

    async with _serving(model, [], *_ADMIT_ALL) as server:
        begin_s = time.monotonic()
        await play(server, 1e9)
        capacity = num_requests / (time.monotonic() - begin_s)
    lines = [
        f"capacity {capacity:.1f} requests/s",
        "| load | policy | premium TTFT p99 / target | standard | batch | ITL p99 / target | good/s | shed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for factor in (1.0, 2.0):
        for policy, names, flags in (
            ("first come, first served", [], (*_ADMIT_ALL, "--itl-targets-ms", "[1e6,1e6,1e6]")),
            ("the policy", tenants, ()),
        ):
            async with _serving(model, names, *flags) as server:
                begin_s = time.monotonic()
                outcomes = await play(server, factor * capacity)
                span_s = time.monotonic() - begin_s
            lines.append(f"| {factor:g}x | {policy} | {_trace_figures(outcomes, span_s)} |")
            print(lines[-1], flush=True)
    return lines


def _trace_figures(outcomes: list[tuple[str, Timeline]], span_s: float) -> str:
    figures, num_good = [], 0
    for initial, tier in _TIERS.items():
        ratios = [
            timeline.ttft_s / (_TTFT_TARGETS_S[tier] + 2e-4 * timeline.asked_prompt_tokens)
            for tenant, timeline in outcomes
            if tenant[0] == initial and timeline.outcome is Outcome.OK
        ]
        figures.append(f"{percentile(ratios, 99):.2f}" if ratios else "-")
        num_good += sum(ratio <= 1 for ratio in ratios)
    gaps = [gap for _, timeline in outcomes if timeline.outcome is Outcome.OK for gap in timeline.itls_s]
    figures.append(f"{percentile(gaps, 99) / _ITL_TARGET_S:.2f}")
    figures.append(f"{num_good / span_s:.1f}")
    figures.append(f"{sum(timeline.outcome is Outcome.SHED for _, timeline in outcomes)} of {len(outcomes)}")
    return " | ".join(figures)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("headrace.benchmarks.overload", description=__doc__.partition("\n\n")[0])
    parser.add_argument("model", nargs="?", help="as for `headrace serve`")
    parser.add_argument("--experiments", default="flood,context,trace")
    parser.add_argument("--num-requests", type=int, default=400, help="of the trace")
    options = parser.parse_args(arguments)
    for experiment in options.experiments.split(","):
        print(f"\n{experiment}", flush=True)
        match experiment:
            case "flood":
                lines = asyncio.run(flood(options.model))
                lines += ["everything let in:", *asyncio.run(flood(options.model, *_ADMIT_ALL))]
            case "context":
                lines = asyncio.run(context(options.model))
                lines += asyncio.run(context(options.model, "--max-num-batched-tokens", "2048"))
                lines += ["with the target off:"]
                off = ("--itl-targets-ms", "[1e6,1e6,1e6]", "--max-num-batched-tokens", "2048")
                lines += asyncio.run(context(options.model, *off))
            case "trace":
                lines = asyncio.run(trace(options.model, options.num_requests))
            case _:
                parser.error(f"no experiment {experiment}")
        print("\n".join(lines), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
