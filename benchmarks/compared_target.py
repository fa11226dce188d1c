"""One target of a comparison: started, measured, ended. Runs on the event loop of `compare`.

A server is measured by the same client and load generator as `headrace bench`. A library that serves no HTTP is driven
inside its own process by `peer_worker`, which keeps the same closed loop and says when each token came; its figures
hold no socket, no HTTP and no detokenizing, which is to its favour.
"""

import asyncio
import contextlib
import json
import os
import signal
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from headrace.benchmarks.completion_client import CompletionClient, Endpoint
from headrace.benchmarks.http_client import HttpClient, Target as Address
from headrace.benchmarks.load import CalibrationError, LoadGenerator
from headrace.benchmarks.measurement import Outcome, Run, Timeline
from headrace.benchmarks.peers import Recipe
from headrace.benchmarks.process_session import ProcessSession
from headrace.benchmarks.prompts import PromptMaker, TokenFit
from headrace.benchmarks.settings import ClosedLoop

_FIRST_OUTPUT_TOKENS: Final = 16  # of the first request: one token need not be text
_POLL_S: Final = 0.02
_END_LIMIT_S: Final = 20.0
_LONGEST_ANSWER_BYTES: Final = 2**28
_LOG_TAIL_BYTES: Final = 600


class TargetError(Exception):
    """The target cannot be started or measured; the text says how."""


class ComparedTarget(ABC):
    """A target's process; `log` takes what it prints."""

    def __init__(self, recipe: Recipe, log: Path) -> None:
        self.name = recipe.name
        self._recipe = recipe
        self._log = log
        self._process: asyncio.subprocess.Process | None = None
        self.session: ProcessSession | None = None

    @staticmethod
    def of(recipe: Recipe, log: Path) -> "ComparedTarget":
        """Choose how the target is driven."""
        return HttpTarget(recipe, log) if recipe.speaks_http else WorkerTarget(recipe, log)

    async def start(self, prompt: str) -> float:
        """Start it; returns the seconds from making the process to the first token of its first request.

        Raises:
            TargetError: it ended, or answered wrongly.
        """
        spawned_s = time.monotonic()
        await self._spawn()
        return await self._first_token_s(prompt) - spawned_s

    async def measure(
        self, load: ClosedLoop, width: int, prompts: PromptMaker, begin: Callable[[], None] = lambda: None
    ) -> tuple[Run, float]:
        """Send one uncounted request, call `begin`, then send the load at one width; returns the run and the target's
        cores in use.

        Raises:
            TargetError: it has ended.
        """
        assert self.session is not None
        run = Run(label=f"{width}", num_planned=width * load.requests_per_stream, width=width)
        await self._warm_up(load, prompts)
        begin()
        begin_cpu_s = self.session.cpu_s()
        await self._drive(run, load, width, prompts)
        cpu_s = self.session.cpu_s() - begin_cpu_s
        if self._process is None or self._process.returncode is not None:
            raise TargetError(self._end_told())
        return run, cpu_s / max(run.ended_s - run.started_s, 1e-9)

    async def end(self) -> None:
        """End it and all it started: by request, then by force."""
        if self._process is None or self.session is None:
            return
        self.session.signal(signal.SIGCONT)
        self.session.signal(signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_END_LIMIT_S):
                await self._process.wait()
        self.session.signal(signal.SIGKILL)
        await self._process.wait()
        self._process = self.session = None

    @abstractmethod
    async def _spawn(self) -> None: ...

    @abstractmethod
    async def _first_token_s(self, prompt: str) -> float: ...

    @abstractmethod
    async def _warm_up(self, load: ClosedLoop, prompts: PromptMaker) -> None: ...

    @abstractmethod
    async def _drive(self, run: Run, load: ClosedLoop, width: int, prompts: PromptMaker) -> None: ...

    async def _spawn_process(self, command: list[str], stdin: int, stdout: int | None) -> asyncio.subprocess.Process:
        with self._log.open("ab") as log:
            try:
                self._process = await asyncio.create_subprocess_exec(
                    *command,
                    stdin=stdin,
                    stdout=log if stdout is None else stdout,
                    stderr=log,
                    env={**os.environ, **self._recipe.environment},
                    start_new_session=True,
                    limit=_LONGEST_ANSWER_BYTES,
                )
            except OSError as error:
                raise TargetError(f"cannot be started: {error}") from error
        self.session = ProcessSession(self._process.pid)
        return self._process

    def _end_told(self) -> str:
        tail = " ".join(self._log.read_bytes()[-_LOG_TAIL_BYTES:].decode("utf-8", "replace").split())
        code = None if self._process is None else self._process.returncode
        return f"it ended with exit code {code}; the end of {self._log}: {tail}"


class HttpTarget(ComparedTarget):
    """A server, measured over a socket."""

    _client: CompletionClient
    url: str

    async def calibrate(self, prompt_tokens: int, prompts: PromptMaker) -> TokenFit | None:
        """Fit the words of a prompt to this server's count.

        Raises:
            TargetError: it failed a request.
        """
        try:
            return await LoadGenerator(self._client, prompts).calibrate(prompt_tokens)
        except CalibrationError as error:
            raise TargetError(f"it failed a request: {error}") from error

    async def _spawn(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        command = [part.replace("{port}", str(port)) for part in self._recipe.command]
        await self._spawn_process(command, asyncio.subprocess.DEVNULL, None)
        self.url = f"http://127.0.0.1:{port}"
        http = HttpClient(Address("127.0.0.1", port, is_tls=False, prefix=""))
        self._client = CompletionClient(http, Endpoint.COMPLETIONS)

    async def _first_token_s(self, prompt: str) -> float:
        assert self._process is not None
        while self._process.returncode is None:
            with contextlib.suppress(OSError):  # it does not listen yet
                client = replace(self._client, model=await self._client.first_model())
                timeline = Timeline(0, _FIRST_OUTPUT_TOKENS)
                await client.stream(client.request_body(prompt, _FIRST_OUTPUT_TOKENS), timeline)
                if timeline.outcome is Outcome.OK:
                    self._client = client
                    return timeline.content_s[0]
                if timeline.outcome is Outcome.FAILED and timeline.failure != "connect":
                    raise TargetError(f"it failed the first request: {timeline.failure} {timeline.detail}".strip())
            await asyncio.sleep(_POLL_S)  # also where it sheds while it loads
        raise TargetError(self._end_told())

    async def _warm_up(self, load: ClosedLoop, prompts: PromptMaker) -> None:
        await LoadGenerator(self._client, prompts).warm_up(1, 1, load.prompt_tokens, load.output_tokens)

    async def _drive(self, run: Run, load: ClosedLoop, width: int, prompts: PromptMaker) -> None:
        generator = LoadGenerator(self._client, prompts)
        await generator.closed_loop(run, load.requests_per_stream, width, load.prompt_tokens, load.output_tokens)


class WorkerTarget(ComparedTarget):
    """A library, driven by `peer_worker` in its own process."""

    async def _spawn(self) -> None:
        await self._spawn_process(list(self._recipe.command), asyncio.subprocess.PIPE, asyncio.subprocess.PIPE)

    async def _first_token_s(self, prompt: str) -> float:
        [answer] = await self._ask([prompt], 1, _FIRST_OUTPUT_TOKENS)
        if not answer["token_s"]:
            raise TargetError(f"it failed the first request: {answer['error']}")
        return float(answer["token_s"][0])

    async def _warm_up(self, load: ClosedLoop, prompts: PromptMaker) -> None:
        await self._ask([prompts.prompt(load.prompt_tokens)], 1, load.output_tokens)

    async def _drive(self, run: Run, load: ClosedLoop, width: int, prompts: PromptMaker) -> None:
        texts = [prompts.prompt(load.prompt_tokens) for _ in range(run.num_planned)]
        begin_cpu_s = time.process_time()
        run.started_s = time.monotonic()
        answers = await self._ask(texts, width, load.output_tokens)
        run.cpu_s = time.process_time() - begin_cpu_s
        run.timelines += [timeline_of(answer, load) for answer in answers]
        run.ended_s = max((at_s for timeline in run.timelines for at_s in timeline.content_s), default=run.started_s)

    async def _ask(self, prompts: list[str], width: int, max_tokens: int) -> list[dict[str, Any]]:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        job = {"prompts": prompts, "width": width, "max_tokens": max_tokens}
        process.stdin.write(json.dumps(job).encode() + b"\n")
        answer = await process.stdout.readline()
        if not answer:
            await process.wait()
            raise TargetError(self._end_told())
        requests: list[dict[str, Any]] = json.loads(answer)["requests"]
        return requests


def timeline_of(answer: dict[str, Any], load: ClosedLoop) -> Timeline:
    """Read one request of a worker's answer as a client would have seen it."""
    timeline = Timeline(load.prompt_tokens, load.output_tokens, wave=answer["wave"])
    timeline.launched_s = timeline.written_s = answer["launched_s"]
    timeline.content_s = answer["token_s"]
    timeline.content_usage = list(range(1, len(timeline.content_s) + 1))
    timeline.prompt_tokens = answer["prompt_tokens"]
    timeline.output_tokens = len(timeline.content_s)
    if answer["error"] or not timeline.content_s:
        timeline.end(Outcome.FAILED, "worker", answer["error"])
    else:
        timeline.end(Outcome.OK)
    return timeline
