"""The shapes of what the routes answer: bodies, the error envelope, the events of streams.

For the OpenAPI document alone: answers are written where they are made, field by field, and a test compares them with
these. Fields may be added to any of them.
Source: OpenAI's API reference; Jina's and vLLM's for the one-shot routes.
"""

from typing import Literal, NotRequired

# typing's own is not for pydantic before Python 3.12.
from typing_extensions import TypedDict


class Error(TypedDict):
    """`param` names the field at fault. An overload also says for which tier, and what was predicted and allowed."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEnvelope(TypedDict):
    error: Error


class Status(TypedDict):
    status: str


class Health(Status):
    """`step_age_s` is how long the engine has been at its present step, 0 where it has nothing to do."""

    step_age_s: float


class SequenceState(TypedDict):
    """As the scheduler has it: of `num_tokens`, prompt and answer, `num_computed_tokens` are in the KV cache."""

    is_running: bool
    is_following: bool
    num_tokens: int
    num_computed_tokens: int
    num_blocks: int
    num_shared_blocks: int
    num_preemptions: int


class RequestState(TypedDict):
    """An answer that is not over. `engine` is null where the engine does not say, or knows it no more."""

    id: str
    choice: int
    tenant: str
    tier: Literal["premium", "standard", "batch"]
    phase: Literal["queued", "prefill", "decode"]
    age_s: float
    since_last_token_s: float | None
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    engine: SequenceState | None


class LaneState(TypedDict):
    """How many items of a one-shot model wait, and are computed."""

    model: str
    waiting: int
    computing: int


class RequestStates(TypedDict):
    """`load` is the engine's, after its last step."""

    step_age_s: float
    engine_answers: bool
    load: dict[str, float]
    num_tokenizing: int
    requests: list[RequestState]
    one_shot_models: list[LaneState]


class PromptTokensDetails(TypedDict):
    cached_tokens: int


class Timings(TypedDict):
    """Seconds spent in each part, null for parts that were never reached."""

    queue_s: float | None
    prefill_s: float | None
    ttft_s: float | None
    decode_s: float | None
    total_s: float | None


class Usage(TypedDict):
    """`timings` only once the request is over."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    timings: NotRequired[Timings]


class TokenLogprob(TypedDict):
    token: str
    logprob: float | None
    bytes: list[int]


class ChatTokenLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(TypedDict):
    content: list[ChatTokenLogprob]
    refusal: None


class CompletionLogprobs(TypedDict):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float | None] | None]
    text_offset: list[int]


Ended = Literal["stop", "length", "cancelled", "deadline_exceeded", "error"]


class Message(TypedDict):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(TypedDict):
    index: int
    message: Message
    logprobs: ChatLogprobs | None
    finish_reason: Ended


class Delta(TypedDict):
    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]


class ChatChunkChoice(TypedDict):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: Ended | None


class CompletionChoice(TypedDict):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Ended


class CompletionChunkChoice(TypedDict):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Ended | None


class _Head(TypedDict):
    id: str
    created: int
    model: str
    system_fingerprint: str


class ChatCompletion(_Head):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class _Padded(TypedDict):
    """`obfuscation` is random characters, which hide how long the text is."""

    obfuscation: NotRequired[str]


class ChatCompletionChunk(_Head, _Padded):
    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: NotRequired[Usage | None]


class Completion(_Head):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunk(_Head, _Padded):
    object: Literal["text_completion"]
    choices: list[CompletionChunkChoice]
    usage: NotRequired[Usage | None]


class Model(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    task: Literal["generate", "embed", "score", "classify"]
    max_model_len: int | None


class ModelList(TypedDict):
    object: Literal["list"]
    data: list[Model]


class Ticket(TypedDict):
    ticket: str
    expires_in_s: float


class StreamCreated(TypedDict):
    id: str
    created: int
    model: str
    url: str
    events_url: str


class StreamSnapshot(StreamCreated):
    """All that a stream has produced so far; `cursor` is where a reader would go on."""

    object: Literal["stream"]
    status: Literal["waiting", "running", "finished", "interrupted"]
    text: str
    cursor: int
    last_event_id: str
    finish_reason: Ended | None
    error: Error | None
    usage: Usage
    timings: Timings


class Queued(TypedDict):
    """How many requests are served before this one, and when its first token is expected."""

    position: int
    eta_s: float | None


class Token(_Padded):
    """What is new: the text of one token or, for a reader that was behind, of several."""

    text: str
    num_tokens: int
    logprobs: NotRequired[list[ChatTokenLogprob]]


class Done(TypedDict):
    finish_reason: Ended
    usage: Usage
    timings: Timings


class Interrupted(Error):
    """The server ends; a stream that is resumable goes on when it is back, behind this event's id."""

    resumable: bool


class OneShotUsage(TypedDict):
    prompt_tokens: int
    total_tokens: int


class Embedding(TypedDict):
    """`embedding` is a list of numbers, or with `encoding_format` base64 little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingList(TypedDict):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: OneShotUsage


class RankedText(TypedDict):
    text: str


class Ranked(TypedDict):
    index: int
    relevance_score: float
    document: NotRequired[RankedText]


class Ranking(TypedDict):
    """The documents, most relevant first."""

    id: str
    model: str
    results: list[Ranked]
    usage: OneShotUsage


class Score(TypedDict):
    index: int
    object: Literal["score"]
    score: float


class ScoreList(TypedDict):
    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Score]
    usage: OneShotUsage


class Prediction(TypedDict):
    label: str
    index: int
    score: float


class Classification(TypedDict):
    """The labels, likeliest first."""

    id: str
    object: Literal["classification"]
    created: int
    model: str
    predictions: list[Prediction]
