"""The shapes of what the routes answer: bodies, the error envelope, the events of streams.

For the OpenAPI document alone: answers are written where they are made, field by field, and a test compares them with
these. Fields may be added to any of them.
Source: OpenAI's API reference; Anthropic's and Ollama's for their routes; Jina's and vLLM's for the one-shot routes;
vLLM's for tokens.
"""

from typing import Any, Literal, NotRequired

# typing's own is not for pydantic before Python 3.12.
from typing_extensions import TypedDict


class Error(TypedDict):
    """`param` names the field at fault. An overload also says for which tier, and what was predicted and allowed. What
    another replica has comes with that one's name and its `url`, or null."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEnvelope(TypedDict):
    error: Error


class AnthropicError(TypedDict):
    """`message` names the field at fault."""

    type: Literal[
        "invalid_request_error",
        "authentication_error",
        "permission_error",
        "not_found_error",
        "request_too_large",
        "rate_limit_error",
        "api_error",
        "overloaded_error",
        "timeout_error",
    ]
    message: str


class AnthropicErrorEnvelope(TypedDict):
    type: Literal["error"]
    error: AnthropicError
    request_id: str


class OllamaError(TypedDict):
    """The message, which names the field at fault."""

    error: str


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


class RankLoad(TypedDict):
    """`num_tokens` and `num_total_tokens` are the same: those in the KV cache, and those of prompts that wait."""

    dp_rank: Literal[0]
    num_reqs: int
    num_running_reqs: int
    num_waiting_reqs: int
    num_tokens: int
    num_total_tokens: int
    token_usage: float


class RankLoads(TypedDict):
    loads: list[RankLoad]


class ServerInfo(TypedDict):
    """`max_total_tokens` are what the KV cache holds. Both numbers are null until the model is loaded."""

    served_model_name: str
    version: str
    dp_size: Literal[1]
    max_total_tokens: int | None
    max_running_requests: int | None


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


ChatEnded = Literal[Ended, "tool_calls"]


class CalledFunction(TypedDict):
    """`arguments` are JSON as the model wrote it, which a limit on tokens may have cut."""

    name: str
    arguments: str


class ToolCall(TypedDict):
    id: str
    type: Literal["function"]
    function: CalledFunction


class Message(TypedDict):
    """`content` is null where there is nothing but calls; `reasoning_content` only of models that reason."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCall]]


class _TokenIds(TypedDict):
    """Only with `return_token_ids`."""

    token_ids: NotRequired[list[int]]


class _PromptTokenIds(TypedDict):
    """Only with `return_token_ids`, and in a stream once."""

    prompt_token_ids: NotRequired[list[int]]


class ChatChoice(_TokenIds):
    index: int
    message: Message
    logprobs: ChatLogprobs | None
    finish_reason: ChatEnded


class CalledFunctionDelta(TypedDict):
    name: NotRequired[str]
    arguments: str


class ToolCallDelta(TypedDict):
    """The first one of a call has all fields and no arguments, each later one more of those."""

    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: CalledFunctionDelta


class Delta(TypedDict):
    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str | None]
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCallDelta]]


class ChatChunkChoice(_TokenIds):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: ChatEnded | None


class CompletionChoice(_TokenIds, _PromptTokenIds):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Ended


class CompletionChunkChoice(_TokenIds, _PromptTokenIds):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Ended | None


class _Head(TypedDict):
    id: str
    created: int
    model: str
    system_fingerprint: str


class ChatCompletion(_Head, _PromptTokenIds):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class _Padded(TypedDict):
    """`obfuscation` is random characters, which hide how long the text is."""

    obfuscation: NotRequired[str]


class ChatCompletionChunk(_Head, _Padded, _PromptTokenIds):
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
    root: str
    parent: str | None


class Version(TypedDict):
    version: str


class ModelList(TypedDict):
    object: Literal["list"]
    data: list[Model]


class Tokens(TypedDict):
    """`token_strs` are the tokens as the vocabulary spells them, null unless asked for."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Text(TypedDict):
    prompt: str


class TextContent(TypedDict):
    type: Literal["text"]
    text: str


class ThinkingContent(TypedDict):
    type: Literal["thinking"]
    thinking: str
    signature: str


class ToolUseContent(TypedDict):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class AnthropicUsage(TypedDict):
    """`input_tokens` are those that were not found in the cache."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class AnthropicMessage(TypedDict):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[TextContent | ThinkingContent | ToolUseContent]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"] | None
    stop_sequence: str | None
    usage: AnthropicUsage


class MessageStart(TypedDict):
    type: Literal["message_start"]
    message: AnthropicMessage


class ContentBlockStart(TypedDict):
    type: Literal["content_block_start"]
    index: int
    content_block: TextContent | ThinkingContent | ToolUseContent


class TextDelta(TypedDict):
    type: Literal["text_delta"]
    text: str


class ThinkingDelta(TypedDict):
    type: Literal["thinking_delta"]
    thinking: str


class InputJsonDelta(TypedDict):
    type: Literal["input_json_delta"]
    partial_json: str


class ContentBlockDelta(_Padded):
    type: Literal["content_block_delta"]
    index: int
    delta: TextDelta | ThinkingDelta | InputJsonDelta


class ContentBlockStop(TypedDict):
    type: Literal["content_block_stop"]
    index: int


class MessageEnd(TypedDict):
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None


class MessageDelta(TypedDict):
    type: Literal["message_delta"]
    delta: MessageEnd
    usage: AnthropicUsage


class MessageStop(TypedDict):
    type: Literal["message_stop"]


class Ping(TypedDict):
    type: Literal["ping"]


class TokenCount(TypedDict):
    input_tokens: int


class _OllamaAnswer(_Padded):
    """A part of an answer, or where it is `done` the end or all of it; durations are nanoseconds."""

    model: str
    created_at: str
    done: bool
    done_reason: NotRequired[Literal["stop", "length", "load"]]
    total_duration: NotRequired[int]
    load_duration: NotRequired[int]
    prompt_eval_count: NotRequired[int]
    prompt_eval_duration: NotRequired[int]
    eval_count: NotRequired[int]
    eval_duration: NotRequired[int]


class OllamaCalledFunction(TypedDict):
    name: str
    arguments: dict[str, Any]


class OllamaToolCall(TypedDict):
    id: str
    function: OllamaCalledFunction


class OllamaAnswerMessage(TypedDict):
    role: Literal["assistant"]
    content: str
    thinking: NotRequired[str]
    tool_calls: NotRequired[list[OllamaToolCall]]


class OllamaChatAnswer(_OllamaAnswer):
    message: OllamaAnswerMessage


class OllamaGenerateAnswer(_OllamaAnswer):
    response: str
    thinking: NotRequired[str]


class OllamaModelDetails(TypedDict):
    parent_model: str
    format: str
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str


class OllamaModel(TypedDict):
    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: OllamaModelDetails


class OllamaModels(TypedDict):
    models: list[OllamaModel]


class OllamaRunningModel(OllamaModel):
    expires_at: str
    size_vram: int
    context_length: int


class OllamaRunningModels(TypedDict):
    models: list[OllamaRunningModel]


class OllamaShownModel(TypedDict):
    modelfile: str
    parameters: str
    template: str
    details: OllamaModelDetails
    model_info: dict[str, Any]
    capabilities: list[str]
    modified_at: str


class OllamaVersion(TypedDict):
    """`version` is that of the API, `headrace` the server's."""

    version: str
    headrace: str


ItemStatus = Literal["in_progress", "completed", "incomplete"]


class ResponseInputText(TypedDict):
    type: Literal["input_text"]
    text: str


class ResponseOutputText(TypedDict):
    """`logprobs` is empty unless they were asked for."""

    type: Literal["output_text"]
    text: str
    annotations: list[None]
    logprobs: list[ChatTokenLogprob]


class ResponseReasoningText(TypedDict):
    type: Literal["reasoning_text"]
    text: str


class ResponseSummaryText(TypedDict):
    type: Literal["summary_text"]
    text: str


class ResponseMessage(TypedDict):
    id: str
    type: Literal["message"]
    role: Literal["user", "assistant", "system", "developer"]
    content: list[ResponseInputText | ResponseOutputText]
    status: ItemStatus


class ResponseReasoning(TypedDict):
    id: str
    type: Literal["reasoning"]
    summary: list[ResponseSummaryText]
    content: list[ResponseReasoningText]
    status: ItemStatus


class ResponseFunctionCall(TypedDict):
    """`arguments` are JSON as the model wrote it, which need not be sound."""

    id: str
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    status: ItemStatus


class ResponseFunctionCallOutput(TypedDict):
    id: str
    type: Literal["function_call_output"]
    call_id: str
    output: str | list[ResponseInputText]
    status: ItemStatus


class ResponseError(TypedDict):
    code: Literal["server_error"]
    message: str


class ResponseIncompleteDetails(TypedDict):
    reason: Literal["max_output_tokens"]


class ResponseInputDetails(TypedDict):
    cached_tokens: int
    cache_write_tokens: int


class ResponseOutputDetails(TypedDict):
    reasoning_tokens: int


class ResponseUsage(TypedDict):
    input_tokens: int
    input_tokens_details: ResponseInputDetails
    output_tokens: int
    output_tokens_details: ResponseOutputDetails
    total_tokens: int


ResponseOutput = ResponseMessage | ResponseReasoning | ResponseFunctionCall


class ModelResponse(TypedDict):
    """How a response stands: its output so far, and what it was asked for."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
    completed_at: int | None
    error: ResponseError | None
    incomplete_details: ResponseIncompleteDetails | None
    usage: ResponseUsage | None
    output: list[ResponseOutput]
    model: str
    background: bool
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: dict[str, str | None]
    safety_identifier: str | None
    service_tier: Literal["default"]
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    user: str | None


class DeletedResponse(TypedDict):
    id: str
    object: Literal["response"]
    deleted: bool


class ResponseItems(TypedDict):
    """A page of the items that a response answers, those of earlier responses included."""

    object: Literal["list"]
    data: list[ResponseOutput | ResponseFunctionCallOutput]
    first_id: str | None
    last_id: str | None
    has_more: bool


class ResponseStateEvent(TypedDict):
    type: Literal[
        "response.created",
        "response.queued",
        "response.in_progress",
        "response.completed",
        "response.incomplete",
        "response.failed",
    ]
    response: ModelResponse
    sequence_number: int


class ResponseItemEvent(TypedDict):
    type: Literal["response.output_item.added", "response.output_item.done"]
    output_index: int
    item: ResponseOutput
    sequence_number: int


class _ResponsePlace(TypedDict):
    item_id: str
    output_index: int
    sequence_number: int


class ResponsePartEvent(_ResponsePlace):
    type: Literal["response.content_part.added", "response.content_part.done"]
    content_index: int
    part: ResponseOutputText | ResponseReasoningText


class ResponseTextDelta(_ResponsePlace, _Padded):
    type: Literal["response.output_text.delta"]
    content_index: int
    delta: str
    logprobs: list[ChatTokenLogprob]


class ResponseTextDone(_ResponsePlace):
    type: Literal["response.output_text.done"]
    content_index: int
    text: str
    logprobs: list[ChatTokenLogprob]


class ResponseReasoningDelta(_ResponsePlace, _Padded):
    type: Literal["response.reasoning_text.delta"]
    content_index: int
    delta: str


class ResponseReasoningDone(_ResponsePlace):
    type: Literal["response.reasoning_text.done"]
    content_index: int
    text: str


class ResponseArgumentsDelta(_ResponsePlace, _Padded):
    type: Literal["response.function_call_arguments.delta"]
    delta: str


class ResponseArgumentsDone(_ResponsePlace):
    type: Literal["response.function_call_arguments.done"]
    name: str
    arguments: str


class ResponseStreamError(TypedDict):
    """The stream cannot go on. Its number is that of the event before it, behind which a reader comes back."""

    type: Literal["error"]
    code: str | None
    message: str
    param: str | None
    sequence_number: int


class Ticket(TypedDict):
    ticket: str
    expires_in_s: float


class StreamCreated(_PromptTokenIds):
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


class Token(_Padded, _TokenIds):
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
