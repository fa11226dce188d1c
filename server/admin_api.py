"""What an operator asks of a server that is too slow: a trace of its next steps, what every thread and task is at, and
how every request stands.

Lives on the event loop. The engine answers for its own part through its inbox and its publications, and where it
hangs the rest is told without it. No answer holds a prompt, a text or a key.
"""

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import anyio.lowlevel
import anyio.to_thread
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response

from headrace.scheduler.messages import SequenceState
from headrace.server.engine_client import EngineClient
from headrace.server.errors import BadRequestError, DeadlineError
from headrace.server.generation import Generation
from headrace.server.one_shot_models import OneShot
from headrace.server.protocol import Count, Number, parse_json_object, validate
from headrace.server.sse import to_json
from headrace.server.stacks import as_text, task_stacks, thread_stacks
from headrace.server.watchdog import Watchdog

logger = logging.getLogger(__name__)

_MAX_STEPS = 200
_MAX_TIMEOUT_S = 60
_MAX_TRACE_BYTES = 64 * 2**20
# A step takes well under a second.
_DESCRIBE_S = 1.0
_REQUESTS_AT_ONCE = 100


class ProfileRequest(BaseModel):
    """How many steps to record, and for how many seconds to wait for them."""

    model_config = ConfigDict(extra="ignore")

    steps: Count | None = Field(None, ge=1, le=_MAX_STEPS)
    timeout: Number | None = Field(None, gt=0, le=_MAX_TIMEOUT_S)


class AdminApi:
    """The routes under /admin."""

    def __init__(self, client: EngineClient, one_shots: Sequence[OneShot], watchdog: Watchdog) -> None:
        self._client = client
        self._one_shots = one_shots
        self._watchdog = watchdog

    async def profile(self, request: Request, body: bytes) -> Response:
        """Answer with a trace of the next steps, once they are over."""
        params = validate(ProfileRequest, parse_json_object(body))
        num_steps, timeout_s = params.steps or 20, params.timeout or 10.0
        traced = await self._client.trace(num_steps, timeout_s)
        if traced.trace is None:
            raise DeadlineError(f"the engine had nothing to compute for {timeout_s:g} s")
        folder = request.state.cleanup.enter_context(tempfile.TemporaryDirectory(prefix="headrace-trace-"))
        path = Path(folder) / f"headrace-{traced.num_steps}-steps.json.gz"
        await anyio.to_thread.run_sync(traced.trace.save, path)
        num_bytes = path.stat().st_size
        if num_bytes > _MAX_TRACE_BYTES:
            raise BadRequestError(
                f"the trace of {traced.num_steps} steps has {num_bytes} bytes, more than {_MAX_TRACE_BYTES}: "
                "ask for fewer steps",
                param="steps",
            )
        logger.info("traced %d steps, %d bytes", traced.num_steps, num_bytes)
        return FileResponse(path, media_type="application/gzip", filename=path.name)

    async def stacks(self, request: Request, body: bytes) -> Response:
        """Answer with the stacks of all threads and of the loop's tasks."""
        threads, tasks = thread_stacks(), await task_stacks()
        return PlainTextResponse(await anyio.to_thread.run_sync(as_text, threads, tasks))

    async def requests(self, request: Request, body: bytes) -> Response:
        """Answer with how every request stands, on the loop and in the engine."""
        client = self._client
        states = None if client.stopped.is_set() else await client.describe(_DESCRIBE_S)
        now = client.clock()
        described = []
        for i, generation in enumerate(client.unfinished):
            state = None if states is None else states.get(generation.request_id)
            described.append(_describe(generation, state, now))
            if i % _REQUESTS_AT_ONCE == 0:
                await anyio.lowlevel.checkpoint()
        content = {
            "step_age_s": round(self._watchdog.step_age_s, 3),
            "engine_answers": states is not None,
            "load": asdict(client.load),
            "num_tokenizing": client.num_tokenizing,
            "requests": described,
            "one_shot_models": [
                {"model": one_shot.name, "waiting": one_shot.lane.num_waiting, "computing": one_shot.lane.num_computing}
                for one_shot in self._one_shots
            ],
        }
        return Response(await anyio.to_thread.run_sync(to_json, content), media_type="application/json")


def _describe(generation: Generation, state: SequenceState | None, now: float) -> dict[str, Any]:
    stages = generation.stages
    last_token_s = stages.last_token_s
    return {
        "id": generation.id,
        "choice": generation.choice,
        "tenant": generation.tenant,
        "tier": generation.tier,
        "phase": generation.phase,
        "age_s": round(now - stages.received_s, 3),
        "since_last_token_s": None if last_token_s is None else round(now - last_token_s, 3),
        "prompt_tokens": generation.num_prompt_tokens,
        "cached_tokens": generation.num_cached_tokens,
        "completion_tokens": generation.num_output_tokens,
        "engine": None if state is None else state._asdict(),
    }
