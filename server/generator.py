"""From a validated request to an accepted generation: template, tokens, limits, sampling settings.

Shared by the OpenAI-shaped routes and the native streams. Templates and tokenizing run on worker threads, limited in
number; everything that could hurt the engine is checked here, before it.
"""

import secrets
from collections.abc import Callable
from dataclasses import dataclass

import anyio
import anyio.lowlevel
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
            ready = self.client.ready
            if ready is None or self.tokenizer is None:
                raise UnavailableError("the model is still loading", "loading")
            context = ready.max_context_tokens
            try:
                # Not abandoned when the client leaves: the limiter would count the thread as free while it runs on.
                token_ids = await anyio.to_thread.run_sync(
                    _tokenize, self.tokenizer, request, context, limiter=self.limiter
                )
                await anyio.lowlevel.checkpoint_if_cancelled()
            except anyio.get_cancelled_exc_class():
                self.client.metrics.count_cancelled("tokenizing")
                raise
            stages.tokenized_s = self.client.clock()
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


def _tokenize(tokenizer: Tokenizer, request: GenerationParams, context: int) -> list[int]:
    """Runs on a worker thread. Raises: BadRequestError, ContextLengthError for a text too long to be tokenized."""
    if isinstance(request, CompletionRequest):
        if isinstance(request.prompt, list):
            return request.prompt
        text = request.prompt
    else:
        assert isinstance(request, ChatCompletionRequest)
        text = tokenizer.render_chat([message.as_template_input() for message in request.messages])
    limit = tokenizer.max_chars_per_token
    if limit is not None and len(text) > limit * context:
        raise ContextLengthError(
            f"{len(text)} characters exceed the context of {context} tokens", param=request.prompt_field
        )
    # A chat template writes the special tokens itself.
    return tokenizer.encode(text, add_special_tokens=isinstance(request, CompletionRequest))


def _sampling_params(
    request: GenerationParams, token_ids: list[int], tokenizer: Tokenizer, ready: EngineReady
) -> SamplingParams:
    """Settle defaults and check all that depends on the model. Raises: BadRequestError, ContextLengthError."""
    context, vocab_size, prompt_field = ready.max_context_tokens, ready.vocab_size, request.prompt_field
    num_prompt = len(token_ids)
    if num_prompt == 0:
        raise BadRequestError(f"{prompt_field}: the prompt is empty", param=prompt_field)
    if max(token_ids) >= vocab_size:
        raise BadRequestError(f"{prompt_field}: token ids must be below {vocab_size}", param=prompt_field)
    if num_prompt >= context:
        raise ContextLengthError(
            f"the prompt has {num_prompt} tokens, and the context of {context} must hold the answer too",
            param=prompt_field,
        )
    max_tokens_field, max_tokens = request.asked_max_tokens
    if max_tokens is None:
        max_tokens = min(request.default_max_tokens or context, context - num_prompt)
    if num_prompt + max_tokens > context:
        raise ContextLengthError(
            f"{num_prompt} prompt tokens and {max_tokens_field} {max_tokens} exceed the context of {context} tokens",
            param=max_tokens_field,
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
