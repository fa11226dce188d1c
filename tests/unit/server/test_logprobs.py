"""Log probabilities that are no number in JSON, and tokens that are no text."""

import json
import math

import pytest
from tokenizers import Tokenizer as BackendTokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from fake_engine import byte_tokenizer
from headrace.scheduler.messages import TokenLogprobs
from headrace.server.logprobs import chat_logprobs, completion_logprobs
from headrace.server.tokenizer import Tokenizer


@pytest.mark.parametrize("logprob", [-math.inf, math.nan, -1e30])
def test_what_is_impossible_or_no_number_is_the_least_that_json_can_say(logprob: float) -> None:
    item = TokenLogprobs(97, logprob, ((98, logprob),))
    chat = chat_logprobs(byte_tokenizer(), [item])
    completion, _ = completion_logprobs(byte_tokenizer(), [item], 0, skip_special_tokens=True)
    json.dumps([chat, completion], allow_nan=False)
    assert chat["content"][0]["logprob"] == chat["content"][0]["top_logprobs"][0]["logprob"] == -9999.0
    assert completion["token_logprobs"] == [-9999.0]


def test_a_token_outside_the_byte_alphabet_stands_for_itself_as_in_decoding() -> None:
    backend = BackendTokenizer(models.BPE(vocab={"a b": 0, "\u4e2d": 1, "\u0120x": 2}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend), frozenset())
    assert [tokenizer.token_bytes(i).decode() for i in range(4)] == ["a b", "\u4e2d", " x", ""]
    assert [tokenizer.decode([i]) for i in range(3)] == ["a b", "\u4e2d", " x"]


def test_tokens_that_look_alike_tell_the_likeliest_and_the_one_that_is_there() -> None:
    half, other = 0xC3, 0xE2  # either is a part of a character
    item = TokenLogprobs(half, -5.0, ((other, -1.0), (97, -2.0), (0xF0, -3.0)))
    completion, offset = completion_logprobs(byte_tokenizer(), [item], 7, skip_special_tokens=True)
    assert completion["top_logprobs"] == [{"\N{REPLACEMENT CHARACTER}": -5.0, "a": -2.0}]
    assert (completion["text_offset"], offset) == ([7], 8)
