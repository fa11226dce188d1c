"""From a validated request to an accepted generation: template, tokens, limits, sampling settings.

Shared by the OpenAI-shaped routes and the native streams. Templates and tokenizing run on worker threads, limited in
number; everything that could hurt the engine is checked here, before it.
"""

import secrets
from collections.abc import Callable
from dataclasses import dataclass

import anyio
import anyio.to_thread

from headrace.scheduler.messages import EngineReady, SamplingParams
from headrace.server.detokenizer import Detokenizer
from headrace.server.engine_client import EngineClient
from headrace.server.errors import BadRequestError, ContextLengthError, ModelNotFoundError, UnavailableError
from headrace.server.generation import Generation, Stages
from headrace.server.protocol import ChatCompletionRequest, CompletionRequest, GenerationParams
from headrace.server.settings import Settings
from headrace.server.tokenizer import Tokenizer

# Below this a temperature is greedy: dividing by it would overflow.
_MIN_TEMPERATURE = 1e-5
_DEFAULT_COMPLETION_TOKENS = 16


@dataclass(slots=True)
class Generator:
    """Starts generations of one model. `tokenizer` is set before the server is ready."""

    client: EngineClient
    settings: Settings
    model_name: str
    limiter: anyio.CapacityLimiter
    tokenizer: Tokenizer | None = None

    async def start(
        self, request: GenerationParams, id: str, stages: Stages, on_end: Callable[[Generation], None] | None = None
    ) -> Generation:
        """Tokenize and submit. The caller cancels the generation when its client leaves; `on_end` hears of its end.

        Raises: ApiError. A cancellation while tokenizing is counted as a client that left.
        """
        if request.model is not None and request.model != self.model_name:
            raise ModelNotFoundError(f"the model `{request.model}` does not exist", param="model")
        with self.client.reserve():
            if self.tokenizer is None:
                raise UnavailableError("the tokenizer is still loading", "loading")
            try:
                token_ids = await anyio.to_thread.run_sync(
                    _tokenize, self.tokenizer, request, abandon_on_cancel=True, limiter=self.limiter
                )
            except anyio.get_cancelled_exc_class():
                self.client.metrics.count_cancelled("tokenizing")
                raise
            stages.tokenized_s = self.client.clock()
            ready = self.client.ready
            assert ready is not None, "reserve() passed"
            sampling = _sampling_params(request, token_ids, self.tokenizer, ready)
            detokenizer = Detokenizer(
                self.tokenizer,
                request.stop_strings,
                min_tokens=sampling.min_tokens,
                skip_special_tokens=request.skip_special_tokens is not False,
            )
            timeout_s = min(request.timeout or self.settings.request_timeout_s, self.settings.request_timeout_s)
            return self.client.submit(
                id, token_ids, sampling, detokenizer, stages, stages.received_s + timeout_s, on_end
            )


def _tokenize(tokenizer: Tokenizer, request: GenerationParams) -> list[int]:
    """Runs on a worker thread. Raises: BadRequestError."""
    if isinstance(request, ChatCompletionRequest):
        text = tokenizer.render_chat([message.as_template_input() for message in request.messages])
        # The template writes the special tokens itself.
        token_ids = tokenizer.encode(text, add_special_tokens=False)
        param = "messages"
    else:
        assert isinstance(request, CompletionRequest)
        param = "prompt"
        if isinstance(request.prompt, str):
            token_ids = tokenizer.encode(request.prompt, add_special_tokens=True)
        else:
            token_ids = request.prompt
    if not token_ids:
        raise BadRequestError(f"{param}: the prompt is empty", param=param)
    return token_ids


def _sampling_params(
    request: GenerationParams, token_ids: list[int], tokenizer: Tokenizer, ready: EngineReady
) -> SamplingParams:
    """Settle defaults and check all that depends on the model. Raises: BadRequestError, ContextLengthError."""
    context, vocab_size = ready.max_context_tokens, ready.vocab_size
    num_prompt = len(token_ids)
    prompt_name = "messages" if isinstance(request, ChatCompletionRequest) else "prompt"
    if max(token_ids) >= vocab_size:
        raise BadRequestError(f"{prompt_name}: token ids must be below {vocab_size}", param=prompt_name)
    max_tokens_name, max_tokens = "max_tokens", request.max_tokens
    if isinstance(request, ChatCompletionRequest) and request.max_completion_tokens is not None:
        max_tokens_name, max_tokens = "max_completion_tokens", request.max_completion_tokens
    if num_prompt >= context:
        raise ContextLengthError(
            f"the prompt has {num_prompt} tokens, and the context of {context} must hold the answer too",
            param=prompt_name,
        )
    if max_tokens is None:
        is_chat = isinstance(request, ChatCompletionRequest)
        max_tokens = context - num_prompt if is_chat else min(_DEFAULT_COMPLETION_TOKENS, context - num_prompt)
    if num_prompt + max_tokens > context:
        raise ContextLengthError(
            f"{num_prompt} prompt tokens and {max_tokens_name} {max_tokens} exceed the context of {context} tokens",
            param=max_tokens_name,
        )
    min_tokens = request.min_tokens or 0
    if min_tokens > max_tokens:
        raise BadRequestError(f"min_tokens {min_tokens} exceeds max_tokens {max_tokens}", param="min_tokens")
    stop_token_ids = frozenset(request.stop_token_ids or ())
    if any(token_id >= vocab_size for token_id in stop_token_ids):
        raise BadRequestError(f"stop_token_ids: ids must be below {vocab_size}", param="stop_token_ids")
    if not request.ignore_eos:
        stop_token_ids |= tokenizer.eos_token_ids
    temperature = 1.0 if request.temperature is None else request.temperature
    return SamplingParams(
        temperature=0.0 if temperature < _MIN_TEMPERATURE else temperature,
        top_k=max(0, min(request.top_k or 0, vocab_size)),
        top_p=1.0 if request.top_p is None else request.top_p,
        min_p=request.min_p or 0.0,
        seed=secrets.randbits(64) if request.seed is None else request.seed % 2**64,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        stop_token_ids=stop_token_ids,
    )
