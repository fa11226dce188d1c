"""From a validated request to an accepted generation: template, tokens, limits, sampling settings.

Shared by the OpenAI-shaped routes and the native streams. Templates and tokenizing run on worker threads, limited in
number; everything that could hurt the engine is checked here, before it.
"""

import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import TypeVar

import anyio
import anyio.lowlevel
import anyio.to_thread

from headrace.scheduler.grammar import Grammar
from headrace.scheduler.messages import EngineReady, GenerationRequest, SamplingParams, Tier, TokenLogprobs
from headrace.server.admission import Demand
from headrace.server.answer_parser import begins_in_reasoning, kept_token_ids
from headrace.server.api_keys import ApiKeys
from headrace.server.detokenizer import Detokenizer
from headrace.server.engine_client import EngineClient
from headrace.server.errors import (
    BadRequestError,
    ContextLengthError,
    ModelNotFoundError,
    UnavailableError,
)
from headrace.server.generation import Generation, Recipe, Stages
from headrace.server.grammars import Grammars, GrammarSource
from headrace.server.protocol import ChatCompletionRequest, CompletionRequest, GenerationParams
from headrace.server.settings import Settings
from headrace.server.standing import NO_HINTS, Hints, standing_of
from headrace.server.tenant_limits import TenantLimits
from headrace.server.tokenizer import Tokenizer
from headrace.server.tool_calls import answer_schemas, call_grammar, parameter_schemas, template_input

# Below this a temperature is greedy: dividing by it would overflow.
_MIN_TEMPERATURE = 1e-5
# Log probabilities in one answer, alternatives and choices counted: some 20 MB of JSON.
_MAX_LOGPROBS = 2**18

_T = TypeVar("_T")


@dataclass(slots=True)
class Generator:
    """Starts generations of one model and its adapters, of which it has the fingerprints by name. `tokenizer` is set
    before the server is ready."""

    client: EngineClient
    settings: Settings
    model_name: str
    limiter: anyio.CapacityLimiter
    keys: ApiKeys | None
    limits: TenantLimits
    grammars: Grammars
    adapters: Mapping[str, str] = field(default_factory=dict)
    tokenizer: Tokenizer | None = None

    async def start(
        self,
        request: GenerationParams,
        id: str,
        stages: Stages,
        on_end: Callable[[Generation], None] | None = None,
        on_accept: Callable[[Generation, Recipe], None] | None = None,
        tenant: str = "",
        hints: Hints = NO_HINTS,
        num_bytes: int = 0,
    ) -> list[Generation]:
        """Tokenize and submit: one generation per prompt and choice, in the order of OpenAI's indices.

        The caller cancels them when its client leaves; `on_end` hears of each one's end, and `on_accept` of each before
        the engine does. Only requests of one tenant share cached prefixes, whatever `hints` say. `num_bytes` is what
        the request's body holds until then.

        Raises: ApiError. A cancellation while tokenizing is counted as a client that left.
        """
        place = self._place(request.model, tenant, request.num_sequences, num_bytes, hints)
        with place as (demand, tokenizer, ready):
            prompts = await self._on_worker(lambda: tokenize(tokenizer, request, ready.max_context_tokens))
            source, grammar = request.grammar_source, None
            if isinstance(request, ChatCompletionRequest) and request.has_call_grammar:
                compile = partial(_compile_calls, self.grammars, tokenizer, request, prompts[0], ready)
                source, grammar = await self._on_worker(compile)
            elif source is not None:
                grammar = await self._compile(source, tokenizer, ready)
            stages.tokenized_s = self.client.clock()
            samplings = [_sampling_params(request, prompt.token_ids, tokenizer, ready) for prompt in prompts]
            num_tokens = sum(len(prompt.token_ids) for prompt in prompts)
            demand = replace(demand, num_tokens=num_tokens)
            prediction = self.client.admit(demand)
            salt = f"{tenant}\0{request.cache_salt or ''}".encode("utf-8", "surrogatepass")
            generations: list[Generation] = []
            for prompt, sampling in zip(prompts, samplings, strict=True):
                leader: Generation | None = None
                for choice in range(request.num_choices):
                    # The prompt's own log probabilities are computed once.
                    is_scored = leader is None and prompt.echo is not None
                    num_prompt_logprobs = sampling.num_logprobs if is_scored else None
                    own = replace(sampling, choice=choice, num_prompt_logprobs=num_prompt_logprobs)
                    recipe = self._recipe(request, prompt, own, salt, source)
                    generation = self.make(recipe, id, replace(stages), demand.tier)
                    if leader is None:
                        generation.predicted_ttft_s = prediction.raw_s
                    else:
                        generation.prompt_logprobs = leader.prompt_logprobs
                    self.client.check_accepting()  # so that what is accepted is submitted
                    if on_accept is not None:
                        on_accept(generation, recipe)
                    self._submit(
                        recipe,
                        generation,
                        demand,
                        arrival_s=stages.received_s,
                        tenant=tenant,
                        target_s=prediction.target_s,
                        leader=leader,
                        grammar=grammar,
                    )
                    if on_end is not None:
                        generation.on_end.append(on_end)
                    generations.append(generation)
                    leader = leader or generation
            self.limits.charge(tenant, num_tokens)
            return generations

    async def read(
        self, work: Callable[[Tokenizer, EngineReady], _T], model: str | None, tenant: str = "", num_bytes: int = 0
    ) -> _T:
        """Have a worker do what needs the tokenizer alone, under the limits of a request that generates.

        Raises: ApiError, what `work` raises.
        """
        with self._place(model, tenant, 1, num_bytes) as (_, tokenizer, ready):
            return await self._on_worker(lambda: work(tokenizer, ready))

    @contextmanager
    def _place(
        self, model: str | None, tenant: str, num_sequences: int, num_bytes: int, hints: Hints = NO_HINTS
    ) -> Iterator[tuple[Demand, Tokenizer, EngineReady]]:
        """Hold a request's places while it is read. Raises: ApiError. A cancellation inside is counted as a client that
        left."""
        if model is not None and model != self.model_name and model not in self.adapters:
            raise ModelNotFoundError(f"the model `{model}` does not exist", param="model")
        standing = standing_of(self.keys, tenant, hints)
        demand = Demand(
            standing.tier, standing.tenant, standing.weight, 0, num_sequences, ttft_target_s=standing.ttft_target_s
        )
        with self.client.reserve(demand, num_bytes), self._within_limits(tenant, demand):
            if self.client.ready is None or self.tokenizer is None:
                raise UnavailableError("the model is still loading", "loading")
            try:
                yield demand, self.tokenizer, self.client.ready
            except anyio.get_cancelled_exc_class():
                self.client.metrics.count_cancelled("tokenizing")
                raise

    async def _on_worker(self, work: Callable[[], _T]) -> _T:
        """Raises: what `work` raises."""
        # Not abandoned when the client leaves: the limiter would count the thread as free while it runs on.
        done = await anyio.to_thread.run_sync(work, limiter=self.limiter)
        await anyio.lowlevel.checkpoint_if_cancelled()
        return done

    def make(self, recipe: Recipe, id: str, stages: Stages, tier: Tier) -> Generation:
        """A generation of nothing so far, which the engine does not know yet."""
        assert self.tokenizer is not None
        sampling = recipe.sampling
        detokenizer = Detokenizer(
            self.tokenizer,
            recipe.stop_strings,
            min_tokens=sampling.min_tokens,
            skip_special_tokens=recipe.skips_special_tokens,
            kept_token_ids=recipe.kept_token_ids,
        )
        generation = Generation(
            id,
            self.client.next_request_id(),
            len(recipe.prompt_token_ids),
            stages,
            detokenizer,
            choice=sampling.choice,
            echo=recipe.echo,
            tier=tier,
            prompt_token_ids=recipe.prompt_token_ids if recipe.tells_token_ids else None,
            grammar_field=None if recipe.grammar is None else recipe.grammar.field,
            begins_in_reasoning=begins_in_reasoning(self.tokenizer, recipe.prompt_token_ids),
            model=recipe.adapter or self.model_name,
        )
        if sampling.num_prompt_logprobs is not None:
            generation.prompt_logprobs.append(TokenLogprobs(recipe.prompt_token_ids[0]))
        return generation

    async def resume(
        self,
        recipe: Recipe,
        generation: Generation,
        output_token_ids: tuple[int, ...],
        tenant: str,
        hints: Hints,
    ) -> None:
        """Have the engine go on with a generation that was accepted by an earlier process. Its time limits start anew.

        Raises: UnavailableError where the server has begun to drain, or the engine has ended; BadRequestError,
        ContextLengthError where that process could do what this one cannot.
        """
        assert len(output_token_ids) == generation.num_output_tokens
        self.client.check_accepting()
        assert self.client.ready is not None
        assert self.tokenizer is not None
        self.check_fits(recipe, output_token_ids)
        grammar = None
        if recipe.grammar is not None:
            grammar = await self._compile(recipe.grammar, self.tokenizer, self.client.ready)
            self.client.check_accepting()
        if output_token_ids:  # of whose first the prompt's log probabilities came before
            recipe = replace(recipe, sampling=replace(recipe.sampling, num_prompt_logprobs=None))
        standing = standing_of(self.keys, tenant, hints)
        demand = Demand(standing.tier, standing.tenant, standing.weight, generation.num_prompt_tokens)
        target_s = standing.ttft_target_s or self.client.admission.targets_s[standing.tier]
        now = self.client.clock()
        self._submit(
            recipe,
            generation,
            demand,
            arrival_s=now,
            tenant=tenant,
            target_s=target_s,
            grammar=grammar,
            output_token_ids=output_token_ids,
        )

    def check_fits(self, recipe: Recipe, output_token_ids: tuple[int, ...]) -> None:
        """Check a recipe that an earlier process, or another server's, has made. Raises: BadRequestError,
        ContextLengthError."""
        ready = self.client.ready
        assert ready is not None
        if recipe.adapter is not None and self.adapters.get(recipe.adapter) != recipe.adapter_fingerprint:
            raise BadRequestError(f"the server has no adapter {recipe.adapter} since its restart, or another one")
        num_prompt, sampling = len(recipe.prompt_token_ids), recipe.sampling
        if num_prompt + sampling.max_tokens > ready.max_context_tokens:
            raise ContextLengthError(
                f"{num_prompt} prompt tokens and {sampling.max_tokens} of the answer exceed the context of "
                f"{ready.max_context_tokens} tokens that the server has since its restart"
            )
        biased = (token_id for token_id, _ in sampling.logit_bias)
        for token_id in chain(recipe.prompt_token_ids, output_token_ids, sampling.stop_token_ids, biased):
            if not 0 <= token_id < ready.vocab_size:
                raise BadRequestError(f"the server has no token {token_id} since its restart")

    async def _compile(self, source: GrammarSource, tokenizer: Tokenizer, ready: EngineReady) -> Grammar:
        """Raises: BadRequestError, naming the grammar's field."""
        return await self._on_worker(lambda: self.grammars.get(source, tokenizer, ready.vocab_size))

    @contextmanager
    def _within_limits(self, tenant: str, demand: Demand) -> Iterator[None]:
        """Raises: RateLimitError, which is counted; BadRequestError."""
        with self.client.metrics.counting_shed(demand.tier), self.limits.within(tenant, demand.num_sequences):
            yield

    def _release(self, tenant: str, generation: Generation) -> None:
        self.limits.end(tenant)
        self.limits.charge(tenant, generation.num_output_tokens)

    def _recipe(
        self,
        request: GenerationParams,
        prompt: "Prompt",
        sampling: SamplingParams,
        salt: bytes,
        grammar: GrammarSource | None,
    ) -> Recipe:
        assert self.tokenizer is not None
        adapter = request.model if request.model in self.adapters else None
        return Recipe(
            prompt.token_ids,
            sampling,
            request.stop_strings,
            request.skips_special_tokens,
            prompt.echo,
            salt,
            timeout_s=_shorter(request.timeout, self.settings.request_timeout_s),
            queue_timeout_s=_shorter(request.queue_timeout, self.settings.queue_timeout_s),
            ttft_timeout_s=_shorter(request.ttft_timeout, self.settings.ttft_timeout_s),
            stall_timeout_s=_shorter(request.stall_timeout, self.settings.stall_timeout_s),
            grammar=grammar,
            kept_token_ids=kept_token_ids(self.tokenizer, request),
            adapter=adapter,
            adapter_fingerprint="" if adapter is None else self.adapters[adapter],
            tells_token_ids=bool(request.return_token_ids),
        )

    def _submit(
        self,
        recipe: Recipe,
        generation: Generation,
        demand: Demand,
        *,
        arrival_s: float,
        tenant: str,
        target_s: float,
        leader: Generation | None = None,
        grammar: Grammar | None = None,
        output_token_ids: tuple[int, ...] = (),
    ) -> None:
        """Submit one sequence, whose first token should come in `target_s`. Its `tenant` pays for it, the one of the
        `demand` may be one of its flows. With a `leader` it waits for that one's prompt, which is its own too."""
        self.client.submit(
            GenerationRequest(
                generation.request_id,
                recipe.prompt_token_ids,
                recipe.sampling,
                arrival_s=arrival_s,
                deadline_s=arrival_s + recipe.timeout_s,
                queue_deadline_s=arrival_s + recipe.queue_timeout_s,
                first_token_deadline_s=arrival_s + recipe.ttft_timeout_s,
                stall_timeout_s=recipe.stall_timeout_s,
                target_s=self.client.clock() + target_s,
                tier=demand.tier,
                tenant=demand.tenant,
                weight=demand.weight,
                leader_id=None if leader is None else leader.request_id,
                cache_salt=recipe.cache_salt,
                output_token_ids=output_token_ids,
                grammar=grammar,
                adapter=recipe.adapter,
            ),
            generation,
        )
        self.limits.begin(tenant)
        generation.on_end.append(partial(self._release, tenant))


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt's tokens, and its text where the answer shall begin with it."""

    token_ids: tuple[int, ...]
    echo: str | None = None


def _shorter(asked_s: float | None, most_s: float) -> float:
    return most_s if asked_s is None else min(asked_s, most_s)


def tokenize(tokenizer: Tokenizer, request: GenerationParams, context: int) -> list[Prompt]:
    """A request's prompts; runs on a worker thread.

    Raises: BadRequestError, ContextLengthError for a text too long to be tokenized.
    """
    if isinstance(request, ChatCompletionRequest):
        messages, tools = template_input(tokenizer, request)
        rendered = tokenizer.render_chat(
            messages,
            tools,
            variables=request.template_variables,
            add_generation_prompt=request.has_generation_prompt,
            continue_final_message=request.is_continued,
        )
        # A chat template writes the special tokens itself.
        has_special_tokens = bool(request.add_special_tokens)
        return [Prompt(_encode(tokenizer, rendered, request, context, add_special_tokens=has_special_tokens))]
    assert isinstance(request, CompletionRequest)
    prompts = []
    has_special_tokens = request.add_special_tokens is not False
    for prompt in request.prompts:
        if isinstance(prompt, str):
            token_ids = _encode(tokenizer, prompt, request, context, add_special_tokens=has_special_tokens)
            prompts.append(Prompt(token_ids, prompt if request.echo else None))
        else:
            has_echo = request.echo and len(prompt) < context  # a longer one is refused
            text = tokenizer.decode(prompt, skip_special_tokens=request.skips_special_tokens) if has_echo else None
            prompts.append(Prompt(tuple(prompt), text))
    return prompts


def _compile_calls(
    grammars: Grammars, tokenizer: Tokenizer, request: ChatCompletionRequest, prompt: Prompt, ready: EngineReady
) -> tuple[GrammarSource, Grammar]:
    """Runs on a worker thread. Raises: BadRequestError, which names the parameters at fault."""
    has_begun = begins_in_reasoning(tokenizer, prompt.token_ids)
    source = call_grammar(tokenizer, request, begins_in_reasoning=has_begun)
    try:
        return source, grammars.get(source, tokenizer, ready.vocab_size)
    except BadRequestError:
        for schema in (*parameter_schemas(request), *answer_schemas(request)):
            grammars.get(schema, tokenizer, ready.vocab_size)
        raise


def _encode(
    tokenizer: Tokenizer, text: str, request: GenerationParams, context: int, *, add_special_tokens: bool
) -> tuple[int, ...]:
    limit = tokenizer.max_chars_per_token
    if limit is not None and len(text) > limit * context:
        raise ContextLengthError(
            f"{len(text)} characters exceed the context of {context} tokens", param=request.prompt_field
        )
    return tuple(tokenizer.encode(text, add_special_tokens=add_special_tokens))


def _sampling_params(
    request: GenerationParams, token_ids: tuple[int, ...], tokenizer: Tokenizer, ready: EngineReady
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
    room = context
    if request.num_logprobs is not None:
        num_scored = num_prompt if request.is_echoed else 0
        room = _MAX_LOGPROBS // ((1 + request.num_logprobs) * request.num_sequences) - num_scored
        if room < (1 if max_tokens is None else max_tokens):
            raise BadRequestError(
                f"logprobs: more than {_MAX_LOGPROBS} log probabilities are asked for in all", param="logprobs"
            )
    if max_tokens is None:
        max_tokens = min(request.default_max_tokens or context, context - num_prompt, room)
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
    logit_bias = {int(token_id): bias for token_id, bias in (request.logit_bias or {}).items()}
    if any(token_id >= vocab_size for token_id in logit_bias):
        raise BadRequestError(f"logit_bias: ids must be below {vocab_size}", param="logit_bias")
    if not request.ignore_eos:
        stop_token_ids |= frozenset(token_id for token_id in tokenizer.eos_token_ids if 0 <= token_id < vocab_size)
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
        repetition_penalty=1.0 if request.repetition_penalty is None else request.repetition_penalty,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        logit_bias=tuple(logit_bias.items()),
        num_logprobs=request.num_logprobs,
    )
