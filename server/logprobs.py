"""Log probabilities as OpenAI's routes write them: one form for chat, an older one for completions.

Source: OpenAI's API reference.
"""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import anyio.to_thread

from headrace.scheduler.messages import TokenLogprobs
from headrace.server.tokenizer import Tokenizer

_T = TypeVar("_T")

# What OpenAI writes for a token that is all but impossible; minus infinity is no JSON.
_LEAST = -9999.0
# Encoded on the loop they take a millisecond or two, at most.
_MAX_INLINE = 16
# How many token ids are written in the time that one token's take.
IDS_PER_LOGPROB = 64


async def make_off_loop(make: Callable[[], _T], num_tokens: int) -> _T:
    """`make()`, which writes the log probabilities of so many tokens: on a worker thread where they are many."""
    return await anyio.to_thread.run_sync(make) if num_tokens > _MAX_INLINE else make()


def chat_logprobs(tokenizer: Tokenizer, items: Iterable[TokenLogprobs]) -> dict[str, Any]:
    """The `logprobs` of a chat choice or delta. `bytes` are a token's own, which may be no text by themselves."""

    def entry(token_id: int, logprob: float | None) -> dict[str, Any]:
        token = tokenizer.token_bytes(token_id)
        return {"token": _text(token), "logprob": _finite(logprob), "bytes": list(token)}

    content = [
        {**entry(item.token_id, item.logprob), "top_logprobs": [entry(*alternative) for alternative in item.top]}
        for item in items
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokenizer: Tokenizer, items: Iterable[TokenLogprobs], offset: int, *, skip_special_tokens: bool
) -> tuple[dict[str, Any], int]:
    """The `logprobs` of a completion's choice whose first token begins at character `offset`, and the next offset."""
    tokens: list[str] = []
    own: list[float | None] = []
    top: list[dict[str, float | None] | None] = []
    offsets: list[int] = []
    for item in items:
        token = tokenizer.token_bytes(item.token_id)
        tokens.append(_text(token))
        own.append(_finite(item.logprob))
        likeliest: dict[str, float | None] = {}
        for token_id, logprob in item.top:  # of tokens that look alike, as parts of characters do, the likeliest
            likeliest.setdefault(_text(tokenizer.token_bytes(token_id)), _finite(logprob))
        # The token that is there is always told, so that there may be one more than asked for.
        top.append(None if item.logprob is None else likeliest | {tokens[-1]: own[-1]})
        offsets.append(offset)
        if not (skip_special_tokens and item.token_id in tokenizer.special_token_ids):
            # A character counts where it begins, in whichever token that is.
            offset += sum(byte & 0xC0 != 0x80 for byte in token)
    return {"tokens": tokens, "token_logprobs": own, "top_logprobs": top, "text_offset": offsets}, offset


def _text(token: bytes) -> str:
    return token.decode("utf-8", errors="replace")


def _finite(logprob: float | None) -> float | None:
    # Of a row that overflowed it is no number, which is no JSON either.
    return logprob if logprob is None or logprob > _LEAST else _LEAST
