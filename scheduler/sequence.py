"""One request as the engine sees it: its tokens, how many of them are computed, and the blocks that hold them.

Owned by the engine thread. There is no prefill state and no decode state: a sequence has tokens, and its computed
tokens catch up with them (the idea of vLLM v1).
"""

from enum import Enum, auto

from headrace.scheduler.messages import GenerationRequest


class SequenceStatus(Enum):
    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


class Sequence:
    """A request's growing token list and its place in the KV cache."""

    __slots__ = (
        "block_ids",
        "num_computed_tokens",
        "num_preemptions",
        "num_prompt_tokens",
        "request",
        "scheduled_s",
        "status",
        "token_ids",
    )

    def __init__(self, request: GenerationRequest) -> None:
        self.request = request
        self.token_ids = list(request.prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.num_computed_tokens = 0
        self.block_ids: list[int] = []
        self.status = SequenceStatus.WAITING
        self.num_preemptions = 0
        self.scheduled_s: float | None = None

    @property
    def is_fresh(self) -> bool:
        """Whether no step has yet computed any of it."""
        return self.num_computed_tokens == 0 and self.num_preemptions == 0

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens
