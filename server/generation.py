"""One accepted sequence on the event loop: its log, its text so far, and when each stage was reached.

Made by the generator, followed by readers through `log`. A request has one, or one for each prompt and choice. Each
ends exactly once, whoever asks first: the engine, a stop string, a deadline, a cancellation.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from headrace.scheduler.messages import FinishReason, SamplingParams, SequenceOutput, Tier, TokenLogprobs
from headrace.server.detokenizer import Detokenizer
from headrace.server.errors import ApiError, DeadlineError, EngineFailedError, GrammarTooComplexError
from headrace.server.grammars import GrammarSource
from headrace.server.stream_log import StreamLog, Terminal

if TYPE_CHECKING:
    from headrace.server.journal import Journal

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that an answer follows from, and the seconds it may take: who has it can begin the answer again, or go on
    with one that was begun. A model's adapter can change as the model itself can, so its fingerprint is a part. `echo`
    is None where the answer does not begin with its prompt. `kept_token_ids` are special tokens that are text all the
    same."""

    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    stop_strings: tuple[str, ...]
    skips_special_tokens: bool
    echo: str | None
    cache_salt: bytes
    timeout_s: float
    queue_timeout_s: float
    ttft_timeout_s: float
    stall_timeout_s: float
    grammar: GrammarSource | None = None
    kept_token_ids: tuple[int, ...] = ()
    adapter: str | None = None
    adapter_fingerprint: str = ""
    tells_token_ids: bool = False


@dataclass(slots=True)
class Stages:
    """When a request passed each stage: seconds on the monotonic clock, None where it has not."""

    received_s: float
    tokenized_s: float | None = None
    submitted_s: float | None = None
    scheduled_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    first_byte_s: float | None = None
    end_s: float | None = None


@dataclass(slots=True, eq=False)
class Generation:
    """`id` is what the log calls it, `request_id` what the engine calls it. `model` is the name of the model, or of the
    adapter, that answers. The prompt is kept only where token ids are told, as `prompt_token_ids`.

    `choice` numbers the answers to one prompt. `echo` is text that comes before the answer, with `prompt_logprobs`, a
    list that all choices of a prompt share and the first one fills. `grammar_field` is the request's, where its grammar
    is. `tenant` is known from when it is submitted on, `predicted_ttft_s` is the bare prediction that it was admitted
    with, until it can be compared. `begins_in_reasoning` tells that its prompt has begun the model's reasoning.
    `on_end` is called once the log has closed. What has a `journal` passes through that, and a later process can go on
    with it. What `is_cancelled` is over, or will be soon.
    """

    id: str
    request_id: int
    num_prompt_tokens: int
    stages: Stages
    detokenizer: Detokenizer
    on_end: list[Callable[["Generation"], None]] = field(default_factory=list)
    choice: int = 0
    echo: str | None = None
    tier: Tier = Tier.STANDARD
    model: str = ""
    tenant: str = ""
    predicted_ttft_s: float | None = None
    begins_in_reasoning: bool = False
    journal: "Journal | None" = None
    is_cancelled: bool = False
    grammar_field: str | None = None
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_token_ids: tuple[int, ...] | None = None
    log: StreamLog = field(default_factory=StreamLog)
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    _num_silent_tokens: int = 0
    _num_chars: int = 0
    # Of tokens since the last text: (the character that it begins at, its log probabilities).
    _silent_logprobs: list[tuple[int, TokenLogprobs]] = field(default_factory=list)
    _silent_token_ids: list[int] = field(default_factory=list)

    @property
    def is_over(self) -> bool:
        return self.log.terminal is not None

    @property
    def is_interrupted(self) -> bool:
        """Whether it is over for this process alone: the next one's log has no end here."""
        terminal = self.log.terminal
        return terminal is not None and terminal.error is not None and terminal.error.is_resumable

    @property
    def phase(self) -> str:
        """Where the engine is with it: queued, prefill or decode."""
        if self.stages.scheduled_s is None:
            return "queued"
        return "prefill" if self.stages.first_token_s is None else "decode"

    def begin_again(self) -> None:
        """Forget what came of it before its first token: the prompt is computed from its beginning, and scored."""
        assert self.num_output_tokens == 0
        self.stages.scheduled_s = None
        self.num_cached_tokens = 0
        del self.prompt_logprobs[1:]  # of which the first is no result: see `Generator.make`

    def receive(self, output: SequenceOutput, now: float) -> None:
        """Take one step's output. Afterwards `is_over` tells whether it ended, perhaps by a stop string, or because its
        text could not be made: that must not cost others theirs."""
        try:
            self._receive(output, now)
        except Exception:
            logger.exception("request %s failed while its text was made", self.id)
            self.end(FinishReason.ERROR, now, EngineFailedError("the text could not be decoded"))

    def _receive(self, output: SequenceOutput, now: float) -> None:
        if output.scheduled_s is not None and self.num_output_tokens == 0:  # else an earlier process began it
            self.stages.scheduled_s = output.scheduled_s
            self.num_cached_tokens = output.num_cached_tokens
        if output.prompt_logprobs:
            self.prompt_logprobs += output.prompt_logprobs
        if self.echo is not None and self.num_output_tokens == 0:
            is_prompt_done = output.token_ids or output.finish_reason is FinishReason.LENGTH
            if is_prompt_done and (self.echo or self.prompt_logprobs):
                self.log.append(self.echo, 0, tuple(self.prompt_logprobs))
        if output.token_ids:
            self.stages.last_token_s = now
            if self.stages.first_token_s is None:
                self.stages.first_token_s = now
        for i, token_id in enumerate(output.token_ids, start=1):
            self.num_output_tokens += 1
            self._num_silent_tokens += 1
            if self.prompt_token_ids is not None:
                self._silent_token_ids.append(token_id)
            is_end = output.finish_reason is FinishReason.STOP and i == len(output.token_ids)
            # Who has a prompt scored drops the entries of all tokens behind it, which must be as many as those are.
            if output.logprobs and (not is_end or self.echo is not None):
                self._silent_logprobs.append((self.detokenizer.num_chars, output.logprobs[i - 1]))
            if is_end:
                break  # the token that ends a sequence is no part of its text
            if text := self.detokenizer.push(token_id):
                self._append(text)
            if self.detokenizer.is_stopped:
                self.end(FinishReason.STOP, now)
                return
        if output.finish_reason is not None:
            error: ApiError | None = None
            if output.finish_reason is FinishReason.DEADLINE:
                error = DeadlineError("the request's time was over before it finished")
            elif output.is_refused:
                error = GrammarTooComplexError(f"{self.grammar_field}: {output.error}", param=self.grammar_field)
            elif output.finish_reason is FinishReason.ERROR:
                error = EngineFailedError(output.error or "the engine failed")
            self.end(output.finish_reason, now, error)

    def end(self, reason: FinishReason, now: float, error: ApiError | None = None) -> None:
        """Close the log; without effect on one that is already over."""
        if self.is_over:
            return
        # What is held back when another process goes on is that one's to decide on.
        if reason is not FinishReason.ERROR and not (error is not None and error.is_resumable):
            if text := self.detokenizer.flush():
                self._append(text)
            if self.detokenizer.is_stopped:
                reason, error = FinishReason.STOP, None
                self._silent_logprobs.clear()  # of a stop string's tokens
            if self._silent_logprobs or self._silent_token_ids:  # of tokens without text, at the very end
                self._append("", is_last=True)
        self.stages.end_s = now
        self.log.close(Terminal(reason, error))
        for callback in self.on_end:
            callback(self)

    def timings(self) -> dict[str, float | None]:
        """Seconds spent in each part, None for parts it never reached."""
        stages = self.stages
        return {
            "queue_s": _difference(stages.scheduled_s, stages.submitted_s),
            "prefill_s": _difference(stages.first_token_s, stages.scheduled_s),
            "ttft_s": _difference(stages.first_token_s, stages.received_s),
            "decode_s": _difference(stages.last_token_s, stages.first_token_s),
            "total_s": _difference(stages.end_s, stages.received_s),
        }

    def _append(self, text: str, *, is_last: bool = False) -> None:
        self._num_chars += len(text)
        logprobs: tuple[TokenLogprobs, ...] = ()
        if self._silent_logprobs:
            # A token's log probability goes out when its text begins to, and with a stop string's text it never does.
            num_due = sum(is_last or begin < self._num_chars for begin, _ in self._silent_logprobs)
            logprobs = tuple(item for _, item in self._silent_logprobs[:num_due])
            del self._silent_logprobs[:num_due]
        token_ids: tuple[int, ...] = ()
        if self._silent_token_ids:
            token_ids = tuple(self._silent_token_ids)
            self._silent_token_ids.clear()
        self.log.append(text, self._num_silent_tokens, logprobs, token_ids)
        self._num_silent_tokens = 0


def usage(generations: Sequence[Generation], num_output_tokens: int | None = None) -> dict[str, Any]:
    """OpenAI's usage of one request, for all output tokens or the first so many. A prompt counts once."""
    prompts = [generation for generation in generations if generation.choice == 0]
    num_prompt = sum(generation.num_prompt_tokens for generation in prompts)
    num_output = sum(generation.num_output_tokens for generation in generations)
    num_output = num_output if num_output_tokens is None else num_output_tokens
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
        "prompt_tokens_details": {"cached_tokens": sum(generation.num_cached_tokens for generation in prompts)},
    }


def final_usage(generations: Sequence[Generation]) -> dict[str, Any]:
    """The same of a request that is over, and the seconds that its first answer spent in each part."""
    return usage(generations) | {"timings": generations[0].timings()}


def _difference(later: float | None, earlier: float | None) -> float | None:
    return None if later is None or earlier is None else round(later - earlier, 6)
