"""Drives requests at a server: a closed loop of streams, or an open loop that keeps to its schedule.

In a closed loop a stream starts its next request when the previous one ended, however it ended. An open loop never
waits for an earlier request: what comes late is the generator's own lateness, and is measured. A run is filled as it
goes, so that a cancelled one (time limit, Ctrl-C) still holds everything that finished.
"""

import asyncio
import resource
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Final

from headrace.benchmarks.arrivals import Arrival
from headrace.benchmarks.completion_client import CompletionClient
from headrace.benchmarks.measurement import Outcome, Run, Timeline
from headrace.benchmarks.prompts import PromptMaker, TokenFit

_SHORT_WORDS: Final = 8
_LONG_WORDS: Final = (32, 256)  # the least and the most: a long trace prompt may be over a small server's context


class CalibrationError(Exception):
    """The server did not answer the first requests; the text says how."""


class LoadGenerator:
    """Sends the prompts of one invocation through one client."""

    def __init__(self, client: CompletionClient, prompts: PromptMaker) -> None:
        self._client = client
        self._prompts = prompts

    async def calibrate(self, prompt_tokens: int) -> TokenFit | None:
        """Fit the words of a prompt to the server's own count with two requests of one token; None: it sends no usage.

        Raises:
            CalibrationError: a request failed.
        """
        least, most = _LONG_WORDS
        points: list[tuple[int, int]] = []
        for num_words in (_SHORT_WORDS, max(least, min(prompt_tokens, most))):
            timeline = Timeline(prompt_tokens, 1)
            await self._client.stream(self._client.request_body(self._prompts.prompt_of_words(num_words), 1), timeline)
            # One token need not be text: it may be half a character, or the end of the sequence.
            if timeline.outcome is not Outcome.OK and timeline.failure != "no_text":
                raise CalibrationError(f"{timeline.failure} {timeline.detail}".strip())
            if timeline.prompt_tokens is None:
                return None
            points.append((num_words, timeline.prompt_tokens))
        self._prompts.fit = TokenFit.through(*points)
        return self._prompts.fit

    async def warm_up(self, num_requests: int, width: int, prompt_tokens: int, output_tokens: int) -> None:
        """Send requests that no run counts, at most `width` at once."""
        remaining = iter(range(num_requests))

        async def stream() -> None:
            for _ in remaining:
                await self._send(Timeline(prompt_tokens, output_tokens))

        async with asyncio.TaskGroup() as streams:
            for _ in range(min(width, num_requests)):
                streams.create_task(stream())

    async def closed_loop(
        self, run: Run, requests_per_stream: int, width: int, prompt_tokens: int, output_tokens: int
    ) -> None:
        """Keep `width` requests in flight; each stream sends so many, one after the other."""

        async def stream() -> None:
            for wave in range(requests_per_stream):
                timeline = Timeline(prompt_tokens, output_tokens, wave=wave)
                await self._send(timeline, run)

        with _measured(run):
            async with asyncio.TaskGroup() as streams:
                for _ in range(width):
                    streams.create_task(stream())

    async def open_loop(self, run: Run, arrivals: Iterable[Arrival]) -> None:
        """Launch every arrival at its time, then wait for all of them."""
        with _measured(run):
            async with asyncio.TaskGroup() as requests:
                for arrival in arrivals:
                    due_s = run.started_s + arrival.at_s
                    timeline = Timeline(arrival.prompt_tokens, arrival.output_tokens, due_s=due_s)
                    body = self._body(timeline)  # made ahead, so that making it is no lateness
                    await asyncio.sleep(max(0.0, due_s - time.monotonic()))
                    requests.create_task(self._launch(body, timeline, run))

    async def _send(self, timeline: Timeline, run: Run | None = None) -> None:
        await self._launch(self._body(timeline), timeline, run)

    def _body(self, timeline: Timeline) -> bytes:
        prompt = self._prompts.prompt(timeline.asked_prompt_tokens)
        return self._client.request_body(prompt, timeline.asked_output_tokens)

    async def _launch(self, body: bytes, timeline: Timeline, run: Run | None) -> None:
        timeline.launched_s = time.monotonic()
        if run is not None:
            run.timelines.append(timeline)
        await self._client.stream(body, timeline)


@contextmanager
def _measured(run: Run) -> Iterator[None]:
    begin_cpu_s = _cpu_s()
    run.started_s = time.monotonic()
    try:
        yield
    finally:
        run.ended_s = time.monotonic()
        run.cpu_s = _cpu_s() - begin_cpu_s


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
