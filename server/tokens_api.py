"""What texts are in tokens: /tokenize and /detokenize.

Lives on the event loop; all work is done on the generator's worker threads, under the limits of a request that
generates. What is tokenized is the body of a generation route, and the tokens are those that it would begin with.
Source: vLLM's routes of these names.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from headrace.scheduler.messages import EngineReady
from headrace.server.errors import BadRequestError
from headrace.server.generator import Generator, tokenize
from headrace.server.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    Flag,
    Name,
    TokenIds,
    parse_json_object,
    parse_request,
    validate,
)
from headrace.server.request_log import log_answered
from headrace.server.sse import to_json
from headrace.server.tokenizer import Tokenizer

# The number of tokens, and the answer, out of the tokenizer.
_Work = Callable[[Tokenizer, EngineReady], tuple[int, str]]

# Items encoded in one call: a JSON encoder holds the interpreter's lock for as long as one takes.
_NUM_AT_ONCE = 4096


class TokenizeChatRequest(ChatCompletionRequest):
    return_token_strs: Flag | None = None


class TokenizeCompletionRequest(CompletionRequest):
    prompt: str
    return_token_strs: Flag | None = None


class DetokenizeRequest(BaseModel):
    model: Name | None = None
    tokens: TokenIds


class TokensApi:
    """Both routes, for the model that generates."""

    def __init__(self, generator: Generator) -> None:
        self._generator = generator

    async def tokenize(self, request: Request, body: bytes) -> Response:
        """POST /tokenize: the tokens of a text or of a conversation."""
        # What a body says of streaming has no meaning here.
        ignored = ("stream", "stream_options")
        fields = {
            name: value for name, value in parse_json_object(body).items() if value is not None and name not in ignored
        }
        if ("messages" in fields) == ("prompt" in fields):
            raise BadRequestError("exactly one of `messages` and `prompt` is required", param="messages")
        params: TokenizeChatRequest | TokenizeCompletionRequest
        if "messages" in fields:
            params = parse_request(TokenizeChatRequest, fields)
        else:
            params = parse_request(TokenizeCompletionRequest, fields)

        def work(tokenizer: Tokenizer, ready: EngineReady) -> tuple[int, str]:
            [prompt] = tokenize(tokenizer, params, ready.max_context_tokens)
            token_ids = prompt.token_ids
            texts = _json_list(tokenizer.token_texts(token_ids)) if params.return_token_strs else "null"
            head = f'"count":{len(token_ids)},"max_model_len":{ready.max_context_tokens}'
            return len(token_ids), f'{{{head},"tokens":{_json_list(token_ids)},"token_strs":{texts}}}'

        return await self._answer(request, body, params.model, work)

    async def detokenize(self, request: Request, body: bytes) -> Response:
        """POST /detokenize: the text of tokens, special ones included."""
        params = validate(DetokenizeRequest, parse_json_object(body))

        def work(tokenizer: Tokenizer, ready: EngineReady) -> tuple[int, str]:
            if max(params.tokens, default=0) >= ready.vocab_size:
                raise BadRequestError(f"tokens: ids must be below {ready.vocab_size}", param="tokens")
            text = tokenizer.decode(params.tokens, skip_special_tokens=False)
            return len(params.tokens), to_json({"prompt": text})

        return await self._answer(request, body, params.model, work)

    async def _answer(self, request: Request, body: bytes, model: str | None, work: _Work) -> Response:
        """Raises: ApiError."""
        state = request.state
        num_tokens, content = await self._generator.read(work, model, state.tenant, len(body))
        state.is_accepted = True
        stages = {"received_s": state.received_s, "end_s": time.monotonic()}
        log_answered(state.id, request.scope["path"], 1, num_tokens, stages)
        return Response(content, media_type="application/json")


def _json_list(items: Sequence[Any]) -> str:
    parts = (to_json(items[begin : begin + _NUM_AT_ONCE])[1:-1] for begin in range(0, len(items), _NUM_AT_ONCE))
    return f"[{','.join(parts)}]"
