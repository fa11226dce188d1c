"""The one-shot models of a server, as the event loop sees them: a lane each, and what reads their inputs.

Lives on the event loop; readers are used on worker threads, at most `preprocess_threads` at a time, and answers are
made on others, at most `postprocess_threads`.
"""

import asyncio
import json
import os
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import anyio
import anyio.to_thread
import numpy as np

from headrace.scheduler.config import OneShotTask
from headrace.scheduler.dynamic_batcher import BatchPolicy
from headrace.scheduler.messages import Tier
from headrace.server.api_keys import ApiKeys
from headrace.server.batch_lane import Asker, BatchLane, Computed, LaneInput
from headrace.server.engine_client import EngineClient
from headrace.server.errors import (
    EngineFailedError,
    ModelNotFoundError,
    OverloadedError,
    UnavailableError,
)
from headrace.server.image_input import ImageReader
from headrace.server.settings import OneShotModelSettings, Settings
from headrace.server.standing import Hints, standing_of
from headrace.server.text_input import TextReader

_T = TypeVar("_T")

_WARM_UP_SIZES = (1, 1, 4, 8, 2, 1)
_WARM_UP_S = 600
_NICENESS = 10


@dataclass(frozen=True, slots=True)
class OneShotSource:
    """A model of the settings that has been found on this machine."""

    name: str
    path: Path
    settings: OneShotModelSettings


@dataclass(slots=True)
class OneShot:
    """One model. Its reader, a TextReader or for images an ImageReader, is there before the server is ready."""

    source: OneShotSource
    lane: BatchLane
    reader: Any = None
    labels: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def task(self) -> OneShotTask:
        return self.source.settings.task

    def example(self) -> Any:
        """An input of middle length."""
        text = " ".join(["example"] * 16)
        if self.task is OneShotTask.CLASSIFY:
            return self.reader.example
        if self.task is OneShotTask.SCORE:
            return self.reader.read_pairs([(text, text)], "", max_tokens=self.reader.max_tokens)[0]
        return self.reader.read([text], "", max_tokens=self.reader.max_tokens)[0]

    def as_input(self, array: np.ndarray) -> LaneInput:
        """What its lane gets: texts cost their tokens; images are of one size."""
        return LaneInput(array, 1.0 if self.task is OneShotTask.CLASSIFY else float(array.shape[-1]))

    def load_reader(self, max_image_pixels: int) -> None:
        """Runs on a worker. Raises: ModelSourceError."""
        if self.task is OneShotTask.CLASSIFY:
            self.reader = ImageReader(self.source.path, max_image_pixels)
            labels = json.loads((self.source.path / "config.json").read_text()).get("id2label", {})
            self.labels = tuple(labels[key] for key in sorted(labels, key=int))
        else:
            self.reader = TextReader(self.source.path)


class OneShots:
    """All of a server's one-shot models, and the threads that read and write for them."""

    def __init__(
        self, sources: Sequence[OneShotSource], client: EngineClient, settings: Settings, keys: ApiKeys | None
    ) -> None:
        self._client = client
        self._settings = settings
        self._keys = keys
        self._readers = ThreadPoolExecutor(settings.preprocess_threads, "headrace-read", _step_back)
        self._writers = ThreadPoolExecutor(settings.postprocess_threads, "headrace-write", _step_back)
        self._num_reading_bytes = 0
        self._num_busy = 0
        weights = dict(zip(Tier, settings.tier_weights, strict=True))
        self.models = [OneShot(source, self._open_lane(source, weights)) for source in sources]

    @property
    def num_unfinished(self) -> int:
        """Items in lanes, and requests that are read or written."""
        return self._num_busy + sum(model.lane.num_unfinished for model in self.models)

    @property
    def is_ready(self) -> bool:
        return all(model.reader is not None for model in self.models)

    def load_readers(self) -> None:
        """Runs on a worker. Raises: ModelSourceError."""
        for model in self.models:
            model.load_reader(self._settings.max_image_pixels)

    async def warm_up(self) -> None:
        """Have each model compute batches of some sizes, so that its first request pays for no first use, and its lane
        knows what a batch costs. Raises: ApiError where a model fails."""
        for model in self.models:
            example = model.as_input(await anyio.to_thread.run_sync(model.example))
            for size in _WARM_UP_SIZES:
                await model.lane.submit(
                    [example] * min(size, model.source.settings.max_batch_size), Asker(), _WARM_UP_S
                )

    def find(self, task: OneShotTask, name: str | None) -> OneShot:
        """The model of a task that a request names; it need name none where there is but one.

        Raises: ModelNotFoundError; UnavailableError while loading or draining.
        """
        self._client.check_accepting()
        found = [model for model in self.models if model.task is task and name in (None, model.name)]
        if not found:
            what = f"the model `{name}`" if name is not None else "a model"
            raise ModelNotFoundError(f"{what} for the task `{task}` does not exist", param="model")
        if len(found) > 1:
            names = ", ".join(f"`{model.name}`" for model in found)
            raise ModelNotFoundError(f"there are several models for the task `{task}`: {names}", param="model")
        [model] = found
        if model.reader is None:
            raise UnavailableError("the model is still loading", "loading")
        return model

    def asker(self, tenant: str, hints: Hints) -> Asker:
        tier, tenant, weight, _ = standing_of(self._keys, tenant, hints)
        return Asker(tier, tenant, weight)

    async def read(self, read: Callable[[], _T], num_bytes: int, asker: Asker) -> _T:
        """Run what reads inputs of so many bytes on a worker.

        Raises: OverloadedError where too many bytes are being read; what `read` does. A cancellation is counted as a
        client that left.
        """
        if self._num_reading_bytes and self._num_reading_bytes + num_bytes > self._settings.max_queue_bytes:
            message = f"{self._num_reading_bytes} bytes of requests are being read already"
            raise OverloadedError(message, 1.0, code="queue_full", tier=asker.tier)
        self._num_reading_bytes += num_bytes
        try:
            return await self._run(self._readers, read)
        except anyio.get_cancelled_exc_class():
            self._client.metrics.count_cancelled("tokenizing")
            raise
        finally:
            self._num_reading_bytes -= num_bytes

    async def write(self, write: Callable[[], _T]) -> _T:
        """Run what makes an answer on a worker."""
        return await self._run(self._writers, write)

    async def _run(self, pool: ThreadPoolExecutor, work: Callable[[], _T]) -> _T:
        """Who leaves is not held up: what a worker has not begun it never does, what it has begun it ends alone."""
        self._num_busy += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(pool, work)
        finally:
            self._num_busy -= 1

    def close(self) -> None:
        for pool in (self._readers, self._writers):
            pool.shutdown(wait=False, cancel_futures=True)

    def _open_lane(self, source: OneShotSource, weights: dict[Tier, float]) -> BatchLane:
        settings = source.settings

        async def compute(inputs: Sequence[np.ndarray]) -> Computed:
            output = await self._client.compute(source.name, inputs)
            return Computed([_checked(answer) for answer in output.outputs], output.busy_s)

        is_text = settings.task is not OneShotTask.CLASSIFY
        return BatchLane(
            source.name,
            BatchPolicy(
                max_size=settings.max_batch_size,
                max_wait_s=settings.max_wait_ms / 1000,
                max_cost=settings.max_batch_tokens if is_text else float("inf"),
                max_padding=settings.max_padding,
            ),
            compute,
            tier_weights=weights,
            max_queue_size=settings.max_queue_size,
            metrics=self._client.metrics,
            clock=self._client.clock,
        )


def _checked(answer: np.ndarray) -> Any:
    return answer if np.isfinite(answer).all() else EngineFailedError("the model's answer is not a number")


def _step_back() -> None:
    """Have this thread leave the cores to the engine's and the loop's where they are wanted."""
    if sys.platform == "linux":  # elsewhere a thread has no priority of its own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
