"""What computes a step: the interface between the model runner and the ways to run a model.

`TorchBackend` runs any decoder on any device torch knows, `CpuBackend` the compact families in one C++ call per step.
Dimension letters as in `ops`; R rows whose logits are wanted, V tokens in the vocabulary.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from headrace.kernels.sampling import SamplingBatch
from headrace.kernels.step_times import StepTimes


@dataclass(frozen=True, slots=True)
class StepBatch:
    """The packed batch of one step: B sequences, T tokens in all.

    - token_ids: T ints, one sequence's after the other's
    - query_lens: B ints, how many of them each sequence has
    - context_lens: B ints, the tokens of each up to its last one here; they lie in order in its blocks
    - block_tables: B lists of block numbers, each at least ceil(context_lens[b] / S) long
    - logit_rows: R indices into token_ids, whose next token's logits are wanted
    """

    token_ids: list[int]
    query_lens: list[int]
    context_lens: list[int]
    block_tables: list[list[int]]
    logit_rows: list[int]


class Backend(Protocol):
    """A model with its KV cache, ready to run; used by one thread. `times` are the last step's, None where only the
    caller could tell."""

    times: StepTimes | None

    def forward(self, batch: StepBatch) -> torch.Tensor:
        """Compute the batch, write its keys and values to the cache, return float32 logits [R, V].

        They may be overwritten by the caller, and are by the next call.
        """

    def argmax(self, batch: StepBatch) -> list[int]:
        """Compute the batch; return only the likeliest token of each of the R rows, the lowest of equal ones."""

    def sample(self, logits: torch.Tensor, batch: SamplingBatch) -> list[int]:
        """Draw a token per row of logits, as `sampling.sample` does."""

    def use_idle_time(self) -> bool:
        """Do a few milliseconds of what later steps are quicker for; returns whether there was something to do."""
