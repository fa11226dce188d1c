"""One request as the engine sees it: its tokens, how many of them are computed, and the blocks that hold them.

Owned by the engine thread. There is no prefill state and no decode state: a sequence has tokens, and its computed
tokens catch up with them (the idea of vLLM v1). A step that is launched before the one before it has been read counts
tokens as scheduled that are not computed yet, among them one that is not even known.
"""

import hashlib
from array import array
from enum import Enum, auto
from typing import TYPE_CHECKING

import numpy as np

from headrace.scheduler.grammar import advance
from headrace.scheduler.messages import GenerationRequest, Tier
from headrace.scheduler.prompt_lookup import PromptLookup

if TYPE_CHECKING:
    from headrace.scheduler.fair_queue import TenantAccount


class SequenceStatus(Enum):
    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


class Sequence:
    """A request's growing token list and its place in the KV cache.

    `biases` (token ids, values) and `stop_token_ids` are the request's, as arrays that no step need make anew.
    It will have `num_total_tokens` at most; with `is_scored` its prompt's log probabilities are wanted.
    `num_cached_tokens` is how many tokens its first run found in the prefix cache, `num_prompt_logprobs` how many log
    probabilities of its prompt it has been given, `sampling_record` its sampling settings as the runner packs them.
    Of its tokens `num_scheduled_tokens` are in some step, and `num_computed_tokens` of them in one that is recorded.
    Times are None until then: `scheduled_s` of the first run, `last_token_s` where the step's times are
    known. `account` is its tenant's in the fair queue, and tokens up to `num_charged_tokens` cost it nothing more.
    `num_shared_blocks` of its blocks it found in the cache. `block_ids` is one list for as long as it keeps its blocks,
    and only ever appended to: backends keep copies. `grammar` is where its answer is in the request's. With
    `needs_last_token` the runner has to know all its tokens to sample the next one. One that `is_draftable` can do
    without, and asks for no log probabilities; its `lookup` is made when it is first looked at. `is_long` where its
    prompt took more than two steps when it came.
    """

    __slots__ = (
        "_block_hashes",
        "account",
        "biases",
        "block_ids",
        "end_token_ids",
        "grammar",
        "is_draftable",
        "is_long",
        "is_scored",
        "last_token_s",
        "lookup",
        "needs_last_token",
        "num_cached_tokens",
        "num_charged_tokens",
        "num_computed_tokens",
        "num_preemptions",
        "num_prompt_logprobs",
        "num_prompt_tokens",
        "num_scheduled_tokens",
        "num_shared_blocks",
        "num_total_tokens",
        "request",
        "request_id",
        "sampling_record",
        "scheduled_s",
        "status",
        "stop_token_ids",
        "token_ids",
    )

    def __init__(self, request: GenerationRequest) -> None:
        self.request = request
        self.request_id = request.request_id
        self.end_token_ids = request.sampling.stop_token_ids
        self.token_ids = array("q", request.prompt_token_ids + request.output_token_ids)
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.num_total_tokens = self.num_prompt_tokens + request.sampling.max_tokens
        self.is_scored = request.sampling.num_prompt_logprobs is not None
        self.num_scheduled_tokens = 0
        self.num_computed_tokens = 0
        self.num_cached_tokens = 0
        self.num_prompt_logprobs = 0
        self.block_ids: list[int] = []
        self.status = SequenceStatus.WAITING
        self.num_preemptions = 0
        self.num_charged_tokens = 0
        self.num_shared_blocks = 0
        self.is_long = False
        self.account: TenantAccount[Sequence] | None = None
        self.scheduled_s: float | None = None
        self.last_token_s: float | None = None
        bias = request.sampling.logit_bias
        self.biases = np.array([i for i, _ in bias], np.int64), np.array([value for _, value in bias], np.float32)
        self.stop_token_ids = np.array(sorted(request.sampling.stop_token_ids), np.int64)
        self.sampling_record = b""
        self.grammar = None if request.grammar is None else request.grammar.begin()
        if self.grammar is not None and request.output_token_ids:
            advance([(self.grammar, request.output_token_ids)])
        self.needs_last_token = request.sampling.has_penalties or self.grammar is not None
        self.is_draftable = not self.needs_last_token and request.sampling.num_logprobs is None
        self.lookup: PromptLookup | None = None
        self._block_hashes: list[bytes] = []

    @property
    def tier(self) -> Tier:
        return self.request.tier

    @property
    def tenant(self) -> str:
        return self.request.tenant

    @property
    def weight(self) -> float:
        return self.request.weight

    @property
    def bucket(self) -> bool:
        """In the fair queue: prompts that end within two steps, and longer ones."""
        return self.is_long

    @property
    def is_fresh(self) -> bool:
        """Whether no step has yet computed any of it."""
        return self.num_computed_tokens == self.num_cached_tokens and self.num_preemptions == 0

    @property
    def num_own_blocks(self) -> int:
        """Of its blocks, those that it did not find in the cache."""
        return len(self.block_ids) - self.num_shared_blocks

    @property
    def first_token_due_s(self) -> float:
        return min(self.request.deadline_s, self.request.first_token_deadline_s)

    @property
    def next_deadline_s(self) -> float:
        """When it is out of time if nothing happens to it."""
        request = self.request
        if self.last_token_s is None:
            at_s = self.first_token_due_s
            return min(at_s, request.queue_deadline_s) if self.scheduled_s is None else at_s
        if self.status is SequenceStatus.RUNNING:
            return min(request.deadline_s, self.last_token_s + request.stall_timeout_s)
        return request.deadline_s  # one that was preempted does not stall

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def num_schedulable_tokens(self) -> int:
        """How many tokens the next step could compute. A pending one, sampled by a step in flight and not yet known,
        counts if another is wanted behind it and can be sampled without knowing it."""
        num_unscheduled = len(self.token_ids) - self.num_scheduled_tokens
        if num_unscheduled > 0:
            return num_unscheduled
        assert num_unscheduled == 0, "scheduled two steps ahead of what is known"
        return int(len(self.token_ids) + 1 < self.num_total_tokens and not self.needs_last_token)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    def block_hash(self, index: int, block_size: int) -> bytes:
        """The SHA-256 of a full block's tokens chained to all before them, and to the request's cache salt and
        adapter."""
        hashes = self._block_hashes
        while len(hashes) <= index:
            start = len(hashes) * block_size
            tokens = self.token_ids[start : start + block_size]
            assert len(tokens) == block_size, "the hash of a block that is not full"
            parent = hashes[-1] if hashes else self._root_hash()
            hashes.append(hashlib.sha256(parent + tokens.tobytes()).digest())
        return hashes[index]

    def _root_hash(self) -> bytes:
        """What all that it can share with others hangs from."""
        root, adapter = hashlib.sha256(self.request.cache_salt).digest(), self.request.adapter
        return root if adapter is None else hashlib.sha256(root + adapter.encode()).digest()
