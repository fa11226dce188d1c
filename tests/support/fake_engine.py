"""A fake model for tests without torch: bytes are tokens, and the next one is a fixed function of those before it."""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Tokenizer as BackendTokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from headrace.kernels.step_times import StepTimes
from headrace.scheduler.block_pool import BlockPool
from headrace.scheduler.config import SchedulingPolicy
from headrace.scheduler.engine_core import ComputedStep, LaunchedStep
from headrace.scheduler.errors import DeviceLostError
from headrace.scheduler.grammar import wait
from headrace.scheduler.messages import RowResult, TokenLogprobs
from headrace.scheduler.prompt_lookup import verified
from headrace.scheduler.scheduler import ScheduledRow, Scheduler, SchedulerOutput
from headrace.scheduler.sequence import Sequence
from headrace.scheduler.step_time import StepShape
from headrace.scheduler.step_tracer import StepTracer
from headrace.server.tokenizer import Tokenizer

EOS = 256
VOCAB_SIZE = 257
FORGETFUL = 200
CHAT_TEMPLATE = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}[assistant]"


def next_token(token_ids: Iterable[int]) -> int:
    """The fake model: a lower-case letter that depends on every token before it; behind a prompt that begins with
    FORGETFUL one of the first five, and on the last two alone, so that answers soon repeat themselves."""
    state, num_letters, token_ids = 17, 26, [*token_ids]
    if token_ids[0] == FORGETFUL:
        num_letters, token_ids = 5, token_ids[-2:]
    for token_id in token_ids:
        state = (state * 31 + token_id) % 1_000_003
    return ord("a") + state % num_letters


def adapter_token_ids(adapter: str | None) -> list[int]:
    """What makes an adapter's answers other ones: the fake model computes as if these came before a prompt."""
    return [] if adapter is None else [*adapter.encode()]


def computed_tokens(row: ScheduledRow, pending: Mapping[int, int]) -> list[int]:
    """A row's tokens and all before them. The last can be one that the step before drew for its request, or a draft."""
    token_ids = [*row.sequence.token_ids[: row.start + row.num_tokens - len(row.draft)], *row.draft]
    if len(token_ids) < row.start + row.num_tokens:
        assert not row.sequence.request.sampling.has_penalties, "sampled from tokens that are not known"
        token_ids.append(pending[row.sequence.request.request_id])
    assert len(token_ids) == row.start + row.num_tokens, "two tokens are not known"
    return token_ids


def run(output: SchedulerOutput, pending: Mapping[int, int] = MappingProxyType({})) -> list[RowResult]:
    """Compute a step's rows with `next_token`; `pending` is what the step before drew for each request."""
    results = []
    for row in output.rows:
        sampling, token_ids = row.sequence.request.sampling, computed_tokens(row, pending)
        num_prompt_logprobs = sampling.num_prompt_logprobs or 0
        prompt_ids = row.sequence.request.prompt_token_ids
        prompt = tuple(fake_logprobs(prompt_ids[i], num_prompt_logprobs) for i in row.scored_positions)
        token_ids = [*adapter_token_ids(row.sequence.request.adapter), *token_ids]
        token_ids = [sampling.choice, *token_ids] if sampling.choice else token_ids
        num_known = len(token_ids) - len(row.draft)
        token_id, *others = (next_token(token_ids[: num_known + i]) for i in range(1 + len(row.draft)))
        more = verified(row.draft, [token_id, *others])[1:]
        grammar = row.sequence.grammar
        if grammar is not None and row.is_sampled:
            wait([grammar])
            if not grammar.is_ready or grammar.error is not None:
                results.append(RowResult(prompt_logprobs=prompt, is_late=True))
                continue
            token_id = next_allowed(grammar.mask, token_id)
        logprobs = None if sampling.num_logprobs is None else fake_logprobs(token_id, sampling.num_logprobs)
        if row.is_sampled:
            results.append(RowResult(token_id, logprobs, prompt, more_token_ids=more))
        else:
            results.append(RowResult(prompt_logprobs=prompt))
    return results


def next_allowed(mask: npt.NDArray[np.uint32], token_id: int) -> int:
    """The first allowed token from one on, round to its predecessor; no white space where there is something else."""
    allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
    visible = allowed[allowed > ord(" ")]
    allowed = visible if len(visible) else allowed
    return int(allowed[np.searchsorted(allowed, token_id) % len(allowed)])


def drawn_tokens(output: SchedulerOutput, results: Iterable[RowResult]) -> dict[int, int]:
    """The token that a step drew for each request; any will do where there were no numbers to draw from."""
    rows = zip(output.rows, results, strict=True)
    return {row.sequence.request.request_id: result.token_id or 0 for row, result in rows if row.is_sampled}


def fake_logprobs(token_id: int, num_top: int) -> TokenLogprobs:
    """Made of the token alone: it is the second likeliest after the next letter."""
    top = [((token_id + 1) % VOCAB_SIZE, -0.5), (token_id, -1.0 - token_id / 1000), ((token_id + 2) % VOCAB_SIZE, -9.0)]
    return TokenLogprobs(token_id, top[1][1], tuple(top[:num_top]))


class FakeRunner:
    """Computes rows with `next_token`.

    Inside `held()` steps wait, but for as many as `allow(n)` lets through: of those `num_begun` that were asked for,
    `num_steps` have been computed. Steps raise that have a row of one of the `failing_prompts`, or more rows than
    `most_rows`; with `fail_next` the requests of the next one raise in whatever step they are. After any of these the
    device can be lost. Rows of `nan_prompts` come to no numbers. `times` are said to be those of the steps launched
    next.
    """

    description = "fake model"
    gpu_uuid: str | None = None
    is_asynchronous = False
    vocab_size = VOCAB_SIZE
    times: StepTimes | None = None

    def __init__(self, max_context_tokens: int = 512) -> None:
        self.max_context_tokens = max_context_tokens
        self.tracer = StepTracer()
        self.num_begun = 0
        self.num_steps = 0
        self.widths: list[int] = []
        self.stop_token_ids: set[frozenset[int]] = set()
        self.fail_next = False
        self.failing_prompts: set[tuple[int, ...]] = set()
        self.nan_prompts: set[tuple[int, ...]] = set()
        self.most_rows = 1000
        self.is_lost = False
        self._failing: set[Sequence] = set()
        self._is_held = False
        self._num_allowed = 0
        self._changed = threading.Condition()
        self.on_loss: Callable[[], None] = lambda: None

    def watch(self, on_loss: Callable[[], None]) -> None:
        self.on_loss = on_loss

    def warm_up(self) -> list[tuple[StepShape, float]]:
        return []

    def use_idle_time(self) -> bool:
        return False

    def recover(self) -> None:
        if self.is_lost:
            raise DeviceLostError("the fake device is lost as told")

    def launch(self, output: SchedulerOutput) -> LaunchedStep:
        return ComputedStep(self._compute(output), self.times)

    def _compute(self, output: SchedulerOutput, pending: Mapping[int, int] = MappingProxyType({})) -> list[RowResult]:
        self.num_begun += 1
        with self._changed:
            assert self._changed.wait_for(lambda: not self._is_held or self._num_allowed > 0, timeout=30)
            self._num_allowed -= self._is_held
        self.num_steps += 1
        self.widths.append(len(output.rows))
        self.stop_token_ids |= {row.sequence.request.sampling.stop_token_ids for row in output.rows}
        sequences = [row.sequence for row in output.rows]
        if self.fail_next:
            self.fail_next = False
            self._failing |= set(sequences)
        if any(s in self._failing or s.request.prompt_token_ids in self.failing_prompts for s in sequences):
            raise RuntimeError("the fake model fails as told")
        if len(sequences) > self.most_rows:
            raise MemoryError("of the fake model")
        return [
            RowResult(is_nan=True)
            if row.sequence.request.prompt_token_ids in self.nan_prompts and (row.is_sampled or row.scored_positions)
            else result
            for row, result in zip(output.rows, run(output, pending), strict=True)
        ]

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


class AsynchronousFakeRunner(FakeRunner):
    """Hands out what a step drew when it is waited for, and remembers it for the next one, as a device does.

    `fail_next_wait` makes the step that is launched next raise when it is waited for.
    """

    is_asynchronous = True

    def __init__(self, max_context_tokens: int = 512) -> None:
        super().__init__(max_context_tokens)
        self.fail_next_wait = False
        self._drawn: dict[int, int] = {}
        self._in_flight: list[_FakeStep] = []

    def launch(self, output: SchedulerOutput) -> LaunchedStep:
        assert len(self._in_flight) <= 1, "two steps ahead"
        results = self._compute(output, self._drawn)
        self._drawn = drawn_tokens(output, results)
        step = _FakeStep(results, self.times, self._in_flight, is_raising=self.fail_next_wait)
        self.fail_next_wait = False
        self._in_flight.append(step)
        return step


class _FakeStep:
    def __init__(
        self,
        results: list[RowResult],
        times: StepTimes | None,
        in_flight: "list[_FakeStep]",
        *,
        is_raising: bool,
    ) -> None:
        self.times: StepTimes | None = None
        self._results, self._known_times, self._is_raising = results, times, is_raising
        self._in_flight = in_flight

    def wait(self) -> list[RowResult]:
        assert self._in_flight.pop(0) is self, "waited for in another order"
        if self._is_raising:
            raise RuntimeError("the fake device fails as told")
        self.times = self._known_times
        return self._results


def make_scheduler(
    num_blocks: int = 64,
    block_size: int = 16,
    max_num_batched_tokens: int = 64,
    max_num_seqs: int = 32,
    has_prefix_cache: bool = True,
    policy: SchedulingPolicy | None = None,
) -> Scheduler:
    return Scheduler(
        BlockPool(num_blocks),
        block_size=block_size,
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_seqs=max_num_seqs,
        has_prefix_cache=has_prefix_cache,
        policy=policy,
    )


def byte_tokenizer(
    chat_template: str | dict[str, str] = CHAT_TEMPLATE,
    special_tokens: tuple[str, ...] = (),
    *,
    keeps_control_tokens: bool = False,
) -> Tokenizer:
    """A byte-level tokenizer without merges: token i is byte i; token 256 ends a sequence, and others may follow."""
    wrapper = byte_wrapper(chat_template, special_tokens)
    return Tokenizer(wrapper, frozenset({EOS}), keeps_control_tokens=keeps_control_tokens)


def byte_wrapper(
    chat_template: str | dict[str, str] = CHAT_TEMPLATE, special_tokens: tuple[str, ...] = ()
) -> PreTrainedTokenizerFast:
    """The same in transformers' form."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    vocab = {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}
    assert sorted(vocab) == alphabet
    backend = BackendTokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<|end|>", *special_tokens)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=chat_template, eos_token="<|end|>")


def expected_text(prompt: str, num_tokens: int, choice: int = 0, adapter: str | None = None) -> str:
    """What the fake model answers to a completion prompt."""
    before = [*adapter_token_ids(adapter), *prompt.encode()]
    token_ids = list(before)
    for _ in range(num_tokens):
        token_ids.append(next_token([choice, *token_ids] if choice else token_ids))
    return bytes(token_ids[len(before) :]).decode()
