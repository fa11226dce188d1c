"""What computes a step: the interface between the model runner and the ways to run a model.

`TorchBackend` runs any decoder on any device torch knows, `CpuBackend` the compact families in one C++ call per step.
A backend can be asynchronous: what it returns is then still to be computed on its device, in the order of the calls,
and is known on the host when it has been read, which each step does once.
Dimension letters as in `ops`; R rows whose logits are wanted, V tokens in the vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from headrace.kernels.sampling import SamplingBatch
from headrace.kernels.step_times import StepTimes


@dataclass(frozen=True, slots=True)
class StepBatch:
    """The packed batch of one step: B sequences, T tokens in all. Backends read it before their call returns.

    - token_ids: T ints, one sequence's after the other's. For an asynchronous backend -1 - r stands for a token that
      may be unknown yet: the one drawn for row r of the step before, which is what its last `argmax` or `sample`
      returned at r (where that is -1, any token will do)
    - query_lens: B ints, how many of them each sequence has
    - context_lens: B ints, the tokens of each up to its last one here; they lie in order in its blocks
    - block_tables: B lists of block numbers, each at least ceil(context_lens[b] / S) long: a sequence's is the same
      object for as long as it keeps its blocks, and only ever appended to, and one that lost them has a new one
    - logit_rows: R indices into token_ids, whose next token's logits are wanted
    - adapters: B ints, 0 for a sequence without an adapter, else 1 + the index of its own; or none, if no one has one
    - argmax_only: bool [R], of which rows `forward` may leave the logits out, since `sample` is told the same; or None
    """

    token_ids: list[int]
    query_lens: list[int]
    context_lens: list[int]
    block_tables: list[list[int]]
    logit_rows: list[int]
    adapters: list[int] = field(default_factory=list)
    argmax_only: npt.NDArray[np.bool_] | None = None


class PendingRead(Protocol):
    """Tensors on their way to the host. `times` are those of the step that made them, known once it has been waited
    for, None where only the caller could tell."""

    @property
    def times(self) -> StepTimes | None: ...

    def wait(self) -> list[torch.Tensor]:
        """Block until all are computed and on the host. Raises: what computing them raised."""


@dataclass(frozen=True, slots=True)
class HostRead:
    """Tensors that are computed and on the host."""

    tensors: list[torch.Tensor]
    times: StepTimes | None = None

    def wait(self) -> list[torch.Tensor]:
        return self.tensors


class Backend(Protocol):
    """A model with its KV cache, ready to run; used by one thread. A step is one `argmax`, or one `forward` and one
    `sample`, and then one `read`. Tensors are on the backend's device.

    A row of logits that has a NaN or +inf has no likeliest token, and none is drawn from it: its token is -1, whatever
    is masked. What a NaN in the cache reaches becomes one.
    """

    @property
    def is_asynchronous(self) -> bool: ...

    def forward(self, batch: StepBatch) -> torch.Tensor:
        """Compute the batch, write its keys and values to the cache, return float32 logits [R, V].

        They may be overwritten by the caller, and are by the next call.
        """

    def argmax(self, batch: StepBatch) -> torch.Tensor:
        """Compute the batch; return only the likeliest token of each row, the lowest of equal ones: int64 [R]."""

    def sample(self, logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
        """Draw a token per row of logits, the first of the step's, as `sampling.sample` does: int64 [rows]."""

    def read(self, tensors: Sequence[torch.Tensor]) -> PendingRead:
        """Begin to copy a step's results, all that is wanted of them, to the host."""

    def use_idle_time(self) -> bool:
        """Do a few milliseconds of what later steps are quicker for; returns whether there was something to do."""

    def profile(self) -> dict[str, float]:
        """Seconds that the calling thread has spent in each kind of phase so far; empty where nobody counts them."""

    def recover(self) -> None:
        """Make ready for the next step after one that raised. Raises: RuntimeError where the device is lost."""
