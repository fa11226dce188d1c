"""A fake model for tests without torch: bytes are tokens, and the next one is a fixed function of those before it."""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from tokenizers import AddedToken, Tokenizer as BackendTokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from headrace.kernels.step_times import StepTimes
from headrace.scheduler.block_pool import BlockPool
from headrace.scheduler.messages import RowResult, TokenLogprobs
from headrace.scheduler.scheduler import Scheduler, SchedulerOutput
from headrace.server.tokenizer import Tokenizer

EOS = 256
VOCAB_SIZE = 257
CHAT_TEMPLATE = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}[assistant]"


def next_token(token_ids: Iterable[int]) -> int:
    """The fake model: a lower-case letter that depends on every token before it."""
    state = 17
    for token_id in token_ids:
        state = (state * 31 + token_id) % 1_000_003
    return ord("a") + state % 26


def run(output: SchedulerOutput) -> list[RowResult]:
    """Compute a step's rows with `next_token`."""
    results = []
    for row in output.rows:
        sampling, token_ids = row.sequence.request.sampling, row.sequence.token_ids
        num_prompt_logprobs = sampling.num_prompt_logprobs or 0
        prompt = tuple(fake_logprobs(token_ids[i], num_prompt_logprobs) for i in row.scored_positions)
        token_id = next_token([sampling.choice, *token_ids] if sampling.choice else token_ids)
        logprobs = None if sampling.num_logprobs is None else fake_logprobs(token_id, sampling.num_logprobs)
        results.append(RowResult(token_id, logprobs, prompt) if row.is_sampled else RowResult(prompt_logprobs=prompt))
    return results


def fake_logprobs(token_id: int, num_top: int) -> TokenLogprobs:
    """Made of the token alone: it is the second likeliest after the next letter."""
    top = [((token_id + 1) % VOCAB_SIZE, -0.5), (token_id, -1.0 - token_id / 1000), ((token_id + 2) % VOCAB_SIZE, -9.0)]
    return TokenLogprobs(token_id, top[1][1], tuple(top[:num_top]))


class FakeRunner:
    """Computes rows with `next_token`.

    Inside `held()` steps wait, but for as many as `allow(n)` lets through; `fail_next` makes one raise.
    """

    description = "fake model"
    vocab_size = VOCAB_SIZE
    times: StepTimes | None = None

    def __init__(self, max_context_tokens: int = 512) -> None:
        self.max_context_tokens = max_context_tokens
        self.num_steps = 0
        self.widths: list[int] = []
        self.stop_token_ids: set[frozenset[int]] = set()
        self.fail_next = False
        self._is_held = False
        self._num_allowed = 0
        self._changed = threading.Condition()

    def warm_up(self) -> None: ...

    def use_idle_time(self) -> bool:
        return False

    def run(self, output: SchedulerOutput) -> list[RowResult]:
        with self._changed:
            assert self._changed.wait_for(lambda: not self._is_held or self._num_allowed > 0, timeout=30)
            self._num_allowed -= self._is_held
        self.num_steps += 1
        self.widths.append(len(output.rows))
        self.stop_token_ids |= {row.sequence.request.sampling.stop_token_ids for row in output.rows}
        if self.fail_next:
            self.fail_next = False
            raise RuntimeError("the fake model fails as told")
        return run(output)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep steps from being computed inside the block."""
        self._is_held, self._num_allowed = True, 0
        try:
            yield
        finally:
            with self._changed:
                self._is_held = False
                self._changed.notify_all()

    def allow(self, num_steps: int) -> None:
        """Let so many steps through, now or when they come."""
        with self._changed:
            self._num_allowed += num_steps
            self._changed.notify_all()


def make_scheduler(
    num_blocks: int = 64,
    block_size: int = 16,
    max_num_batched_tokens: int = 64,
    max_num_seqs: int = 32,
    has_prefix_cache: bool = True,
) -> Scheduler:
    return Scheduler(
        BlockPool(num_blocks),
        block_size=block_size,
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_seqs=max_num_seqs,
        has_prefix_cache=has_prefix_cache,
    )


def byte_tokenizer() -> Tokenizer:
    """A byte-level tokenizer without merges: token i is byte i; token 256 ends a sequence."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    vocab = {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}
    assert sorted(vocab) == alphabet
    backend = BackendTokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|end|>", special=True)])
    wrapper = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHAT_TEMPLATE, eos_token="<|end|>")
    return Tokenizer(wrapper, frozenset({EOS}))


def expected_text(prompt: str, num_tokens: int, choice: int = 0) -> str:
    """What the fake model answers to a completion prompt."""
    token_ids = list(prompt.encode())
    for _ in range(num_tokens):
        token_ids.append(next_token([choice, *token_ids] if choice else token_ids))
    return bytes(token_ids[len(prompt.encode()) :]).decode()
