"""Streamed text is the whole text, cut at the first stop string."""

from collections.abc import Iterator

import pytest
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer as BackendTokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from fake_engine import byte_tokenizer
from headrace.server.detokenizer import Detokenizer
from headrace.server.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return byte_tokenizer()


def stream(tokenizer: Tokenizer, data: bytes, stop: tuple[str, ...] = (), min_tokens: int = 0) -> Iterator[str]:
    detokenizer = Detokenizer(tokenizer, stop, min_tokens)
    for byte in data:
        yield detokenizer.push(byte)
        if detokenizer.is_stopped:
            return
    yield detokenizer.flush()


@settings(max_examples=200, derandomize=True, deadline=None)
@given(text=st.text(max_size=30))
def test_characters_are_never_split(text: str) -> None:
    tokenizer = byte_tokenizer_once()
    pieces = list(stream(tokenizer, text.encode()))
    assert "".join(pieces) == text
    at = 0
    for piece in pieces:
        assert text.startswith(piece, at)
        at += len(piece)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(data=st.binary(max_size=30))
def test_bytes_that_are_no_text_come_out_as_they_decode_whole(data: bytes) -> None:
    tokenizer = byte_tokenizer_once()
    assert "".join(stream(tokenizer, data)) == tokenizer.decode(list(data))


@settings(max_examples=400, derandomize=True, deadline=None)
@given(
    text=st.text("abc", max_size=40),
    stop=st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=3),
)
def test_text_ends_before_the_first_stop_string_to_be_complete(text: str, stop: list[str]) -> None:
    tokenizer = byte_tokenizer_once()
    pieces = list(stream(tokenizer, text.encode(), tuple(stop)))
    # With a token a character, the stop string that is complete first wins, and of those the one that begins first.
    ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    expected = text[: min(ends)[1]] if ends else text
    assert "".join(pieces) == expected


def test_no_piece_could_be_the_beginning_of_a_stop_string(tokenizer: Tokenizer) -> None:
    pieces = list(stream(tokenizer, b"one </s two", ("</stop>",)))
    assert pieces[:4] == ["o", "n", "e", " "]
    assert pieces[4:7] == ["", "", ""], "</s is held back"
    assert pieces[7] == "</s "


def test_a_stop_string_before_min_tokens_is_text(tokenizer: Tokenizer) -> None:
    assert "".join(stream(tokenizer, b"xxEND yyEND zz", ("END",), min_tokens=6)) == "xxEND yy"


def test_special_tokens_are_left_out_unless_asked_for(tokenizer: Tokenizer) -> None:
    for skip, expected in ((True, "ab"), (False, "a<|end|>b")):
        detokenizer = Detokenizer(tokenizer, (), skip_special_tokens=skip)
        assert "".join([*(detokenizer.push(token) for token in (97, 256, 98)), detokenizer.flush()]) == expected


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.lists(st.integers(0, 7), max_size=30))
def test_stray_bytes_of_a_byte_fallback_vocabulary_lose_no_token(token_ids: list[int]) -> None:
    # Llama 2's kind of decoder, for which the library's stream gives up where a stray byte follows text.
    vocab = {"a": 0, "b": 1, "<0x41>": 2, "<0xFF>": 3, "<0xC3>": 4, "<0xA9>": 5, "▁c": 6, "<unk>": 7}
    backend = BackendTokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend), frozenset())
    detokenizer = Detokenizer(tokenizer, ())
    text = "".join([*(detokenizer.push(token_id) for token_id in token_ids), detokenizer.flush()])
    for letter in "abc":
        assert text.count(letter) == tokenizer.decode(token_ids).count(letter)


_tokenizers: list[Tokenizer] = []


def byte_tokenizer_once() -> Tokenizer:
    """Hypothesis does not mix with fixtures; a tokenizer has no state, so one serves."""
    if not _tokenizers:
        _tokenizers.append(byte_tokenizer())
    return _tokenizers[0]
