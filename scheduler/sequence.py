"""One request as the engine sees it: its tokens, how many of them are computed, and the blocks that hold them.

Owned by the engine thread. There is no prefill state and no decode state: a sequence has tokens, and its computed
tokens catch up with them (the idea of vLLM v1).
"""

import hashlib
from array import array
from enum import Enum, auto

from headrace.scheduler.messages import GenerationRequest


class SequenceStatus(Enum):
    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


class Sequence:
    """A request's growing token list and its place in the KV cache.

    `num_cached_tokens` is how many tokens its first run found in the prefix cache, `num_prompt_logprobs` how many
    log probabilities of its prompt it has been given.
    """

    __slots__ = (
        "_block_hashes",
        "block_ids",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_preemptions",
        "num_prompt_logprobs",
        "num_prompt_tokens",
        "request",
        "scheduled_s",
        "status",
        "token_ids",
    )

    def __init__(self, request: GenerationRequest) -> None:
        self.request = request
        self.token_ids = array("q", request.prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.num_computed_tokens = 0
        self.num_cached_tokens = 0
        self.num_prompt_logprobs = 0
        self.block_ids: list[int] = []
        self.status = SequenceStatus.WAITING
        self.num_preemptions = 0
        self.scheduled_s: float | None = None
        self._block_hashes: list[bytes] = []

    @property
    def is_fresh(self) -> bool:
        """Whether no step has yet computed any of it."""
        return self.num_computed_tokens == self.num_cached_tokens and self.num_preemptions == 0

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    def block_hash(self, index: int, block_size: int) -> bytes:
        """The SHA-256 of a full block's tokens chained to all before them, and to the request's cache salt."""
        hashes = self._block_hashes
        while len(hashes) <= index:
            start = len(hashes) * block_size
            tokens = self.token_ids[start : start + block_size]
            assert len(tokens) == block_size, "the hash of a block that is not full"
            parent = hashes[-1] if hashes else hashlib.sha256(self.request.cache_salt).digest()
            hashes.append(hashlib.sha256(parent + tokens.tobytes()).digest())
        return hashes[index]
