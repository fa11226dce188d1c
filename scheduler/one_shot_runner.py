"""Batches of models that answer in one pass, computed by the engine thread beside the streams' steps.

Owned by the engine thread. A batch is computed layer by layer: between two layers `pause` makes the steps that are due.
With nobody generating a batch has the machine to itself, and whoever comes waits for one layer. Beside streams all
batches together get a share of the time: each step earns them credit, their layers use it up. Nothing is saved up while
there is no batch, and while a prompt waits for its first token the layers wait too, as long as the credit is below its
most.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence as Seq
from typing import Any, Protocol

from headrace.scheduler.messages import OneShotBatch, OneShotOutput, OneShotReady

logger = logging.getLogger(__name__)

_MAX_CREDIT_S = 0.05


class OneShotModel(Protocol):
    """A loaded model, or a fake. `pause` is called between layers; what it raises ends the pass, and the model stays
    usable."""

    @property
    def num_bytes(self) -> int: ...

    @property
    def description(self) -> str: ...

    def run(self, inputs: Seq[Any], pause: Callable[[], None]) -> Seq[Any]:
        """One output per input."""


class AbandonedError(Exception):
    """Raised through a pass that nobody wants the outcome of any more."""


class OneShotRunner:
    """Owns the models and the batches that wait for them. Beside streams they have `share` of the time."""

    def __init__(
        self, models: Mapping[str, OneShotModel], clock: Callable[[], float] = time.monotonic, share: float = 0.25
    ) -> None:
        self._models = models
        self._clock = clock
        self.share = share
        self._batches: dict[int, OneShotBatch] = {}  # the oldest, which is the one being computed, first
        self._is_cancelled = False  # that one
        self._credit_s = 0.0

    @property
    def ready(self) -> tuple[OneShotReady, ...]:
        return tuple(OneShotReady(name, model.num_bytes, model.description) for name, model in self._models.items())

    @property
    def has_work(self) -> bool:
        return bool(self._batches)

    def add(self, batch: OneShotBatch) -> None:
        self._batches[batch.batch_id] = batch

    def cancel(self, ids: Iterable[int]) -> None:
        """Drop these batches, the one being computed at its next pause; others' ids are ignored."""
        if not self._batches:
            return
        first = next(iter(self._batches))
        for batch_id in ids:
            if batch_id == first:
                self._is_cancelled = True
            else:
                self._batches.pop(batch_id, None)

    def may_go_on(self, *, has_streams: bool, is_prompt_waiting: bool) -> bool:
        """Whether layers are computed now, rather than a step."""
        if not has_streams:
            self._credit_s = 0.0
            return True
        return self._credit_s >= _MAX_CREDIT_S or (self._credit_s > 0 and not is_prompt_waiting)

    def earn(self, step_s: float) -> None:
        """Count a step that streams have had."""
        if self._batches:
            self._credit_s = min(_MAX_CREDIT_S, self._credit_s + self.share / (1 - self.share) * step_s)

    def run(self, serve_streams: Callable[[], None]) -> OneShotOutput:
        """Compute the oldest batch there is; `serve_streams` makes the steps that are due between two layers.

        Raises: what `serve_streams` does, but for AbandonedError, which ends the batch alone.
        """
        batch = next(iter(self._batches.values()))
        outputs: tuple[Any, ...] = ()
        error = None
        busy_s = 0.0
        resumed_s = self._clock()
        is_serving = False

        def use_credit() -> None:
            nonlocal busy_s
            layer_s = self._clock() - resumed_s
            busy_s += layer_s
            self._credit_s -= layer_s

        def pause() -> None:
            nonlocal is_serving, resumed_s
            use_credit()
            is_serving = True
            serve_streams()
            is_serving = False
            if self._is_cancelled:
                raise AbandonedError
            resumed_s = self._clock()

        try:
            pause()
            outputs = tuple(self._models[batch.model].run(batch.inputs, pause))
            use_credit()
        except AbandonedError:
            error = "abandoned"
        except Exception:
            if is_serving:
                raise  # it is the streams', and ends the engine
            logger.exception("a batch of %d for %s raised", len(batch.inputs), batch.model)
            error = "the model failed while computing this request"
        del self._batches[batch.batch_id]
        self._is_cancelled = False
        if not self._batches:
            self._credit_s = 0.0
        return OneShotOutput(batch.batch_id, outputs, busy_s, error)
