"""The messages that cross between the event loop and the engine thread.

All of them are frozen: the thread that made one hands it over and never touches it again. The loop sends
GenerationRequest and request ids to cancel; the engine answers with one StepOutput per step. What an operator asks is
answered once.
Times are seconds on the process's monotonic clock. What there is one of per row and step is a named tuple, which takes
a third of the time to make.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from headrace.scheduler.grammar import Grammar

from headrace.scheduler.step_tracer import StepTrace

_NEVER = float("inf")


class Tier(StrEnum):
    """A class of service, from the API key, or what a trusted gateway makes of it. The order is that of rank: the first
    goes first where two are equal."""

    PREMIUM = "premium"
    STANDARD = "standard"
    BATCH = "batch"


class GrammarKind(StrEnum):
    """In what form a grammar is written: a JSON schema, a regular expression, or rules in Lark's form or GBNF."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    LARK = "lark"


class FinishReason(StrEnum):
    """Why a sequence ended. Every accepted request ends with exactly one of them."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    DEADLINE = "deadline_exceeded"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to pick tokens for one sequence. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 switch these off.

    `choice` numbers the sequences that share a seed. `logit_bias` holds (token id, bias). `num_logprobs` asks for each
    new token's log probability and those of so many likeliest ones, `num_prompt_logprobs` for the prompt's from its
    second token on; None for neither. With `max_tokens` 0 the prompt is computed and nothing sampled.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    choice: int = 0
    max_tokens: int = 16
    min_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A prompt to continue. `request_id` is the server's own and never reused within a process. Where the answer was
    begun before, `output_token_ids` is what there is of it. The answer is kept within the `grammar`.

    `leader_id` names an earlier request with the same prompt: this one waits until that prompt is computed, and then
    finds it in the prefix cache. `adapter` is the name of one, None for the model as it is. Only requests with equal
    `cache_salt` and the same adapter share cached blocks. A tenant's `weight` is its share among those of its tier;
    `tenant` may be one of its flows. The first token should come by `target_s`; the request ends where the engine has
    not begun it by `queue_deadline_s`, has no token by `first_token_deadline_s`, none in `stall_timeout_s` after the
    last, or has not finished by `deadline_s`.
    """

    request_id: int
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    arrival_s: float
    deadline_s: float = _NEVER
    queue_deadline_s: float = _NEVER
    first_token_deadline_s: float = _NEVER
    stall_timeout_s: float = _NEVER
    target_s: float = _NEVER
    tier: Tier = Tier.STANDARD
    tenant: str = ""
    weight: float = 1.0
    leader_id: int | None = None
    cache_salt: bytes = b""
    output_token_ids: tuple[int, ...] = ()
    grammar: "Grammar | None" = None
    adapter: str | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The model's own log probabilities at one position: of the token that is there, and `top`, the likeliest ones as
    (token id, log probability), best first. A prompt's first token, which nothing predicts, has none."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class RowResult(NamedTuple):
    """What a step computed for one row. `token_id` is None where the row stops short of its sequence's last token, and
    where `is_nan`: the model came to no numbers. With `is_late` it was not known which tokens the row's grammar allows,
    and its last token is still to be computed. Where some of the row's draft came true, `more_token_ids` follow."""

    token_id: int | None = None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    is_nan: bool = False
    is_late: bool = False
    more_token_ids: tuple[int, ...] = ()


class SequenceOutput(NamedTuple):
    """What one step did for one sequence.

    `scheduled_s` is set once, on the step that first ran the sequence, and so is `num_cached_tokens`. `token_ids` can
    be empty: a chunk of prefill produces none, nor does a cancellation. `logprobs` has an item per token where asked.
    With `is_refused` the `error` is the request's own doing: what its grammar asks for is too much.
    """

    request_id: int
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    scheduled_s: float | None = None
    num_cached_tokens: int = 0
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    error: str | None = None
    is_refused: bool = False


@dataclass(frozen=True, slots=True)
class OneShotBatch:
    """Inputs for a model that answers in one pass, computed together; of what kind they are is the model's affair. Its
    id is cancelled like a request's, and is none of theirs."""

    batch_id: int
    model: str
    inputs: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class OneShotOutput:
    """A batch's outputs, one per input, or the `error`. `busy_s` is what computing it took, pauses left out."""

    batch_id: int
    outputs: tuple[Any, ...]
    busy_s: float
    error: str | None = None


@dataclass(frozen=True, slots=True)
class TraceSteps:
    """Asks for a trace of the next steps. Its id is cancelled like a request's, and is none of theirs: the trace then
    ends with the steps that it has."""

    question_id: int
    num_steps: int


@dataclass(frozen=True, slots=True)
class StepsTraced:
    """The answer. `trace` is None where there was no step until the end, or an `error`."""

    question_id: int
    num_steps: int
    trace: StepTrace | None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class DescribeSequences:
    """Asks how all sequences stand, once the step under way is over."""

    question_id: int


class SequenceState(NamedTuple):
    """A sequence as the scheduler has it. Its computed tokens, of prompt and output, are in the KV cache. One that
    `is_following` waits for another's prompt, which is its own too."""

    is_running: bool
    is_following: bool
    num_tokens: int
    num_computed_tokens: int
    num_blocks: int
    num_shared_blocks: int
    num_preemptions: int


@dataclass(frozen=True, slots=True)
class SequencesDescribed:
    """The answer, by request id."""

    question_id: int
    states: Mapping[int, SequenceState]


Submission = GenerationRequest | OneShotBatch | TraceSteps | DescribeSequences


@dataclass(frozen=True, slots=True)
class LoadSnapshot:
    """The engine's load after a step: all that admission and /metrics may know of the engine.

    `num_received` counts the submissions drained so far, so that the loop can add those still in the inbox. Of the
    free blocks `num_cached_blocks` hold a reusable prefix. Of `num_prefix_queries` prompt tokens that were looked up in
    the prefix cache, `num_prefix_hits` were found. Of `num_drafted_tokens` that were tried ahead of their turn,
    `num_accepted_tokens` came true.

    As steps go now, prompts get `prefill_tokens_per_s`, a step takes `step_s`, and `completions_per_s` sequences end
    (idle, a prompt would get `idle_tokens_per_s`); 0 where nothing is known yet. `num_prefill_tokens` of running
    sequences are still to be computed; `num_startable` more sequences could run at once, and for premium ones
    `num_preemptable` would give way.
    """

    num_waiting: int = 0
    num_running: int = 0
    num_received: int = 0
    num_free_blocks: int = 0
    num_cached_blocks: int = 0
    num_total_blocks: int = 0
    num_prefix_queries: int = 0
    num_prefix_hits: int = 0
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0
    num_preemptions: int = 0
    num_steps: int = 0
    busy_s: float = 0.0
    num_prefill_tokens: int = 0
    num_startable: float = 0.0
    num_preemptable: int = 0
    prefill_tokens_per_s: float = 0.0
    idle_tokens_per_s: float = 0.0
    completions_per_s: float = 0.0
    step_s: float = 0.0

    @property
    def kv_usage(self) -> float:
        """The share of KV blocks that are held."""
        num_held = self.num_total_blocks - self.num_free_blocks
        return num_held / self.num_total_blocks if self.num_total_blocks else 0.0


@dataclass(frozen=True, slots=True)
class StepPauses:
    """When the engine did not compute although there was work: `gap_s` between the step before and this one, None where
    this is the first of a busy time; `lock_wait_s` for the interpreter's lock whenever this one's computing paused or
    ended, None where nobody can tell."""

    gap_s: float | None
    lock_wait_s: float | None


@dataclass(frozen=True, slots=True)
class StepOutput:
    """One step's publication: every sequence it advanced or ended, and the load it left. Without `pauses` where it
    computed nothing."""

    outputs: tuple[SequenceOutput, ...]
    load: LoadSnapshot
    pauses: StepPauses | None = None


@dataclass(frozen=True, slots=True)
class OneShotReady:
    """A one-shot model that is loaded; `num_bytes` are its weights'."""

    name: str
    num_bytes: int
    description: str


@dataclass(frozen=True, slots=True)
class EngineReady:
    """The model is loaded and warm. `max_context_tokens` is the longest prompt + output one request can have,
    `gpu_uuid` the driver's name of the GPU that computes, None on a CPU."""

    max_context_tokens: int
    max_num_seqs: int
    vocab_size: int
    description: str
    gpu_uuid: str | None
    load: LoadSnapshot
    one_shots: tuple[OneShotReady, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineStopped:
    """The engine thread has ended; nothing follows. `error` is None where it was asked to stop."""

    error: Exception | None = None
