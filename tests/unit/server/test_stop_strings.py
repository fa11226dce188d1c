"""Stop strings against a search of the whole text, for tokens that hold several characters or part of one."""

import pytest
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer as BackendTokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from headrace.server.detokenizer import Detokenizer
from headrace.server.tokenizer import Tokenizer


def make_tokenizer() -> tuple[Tokenizer, dict[str, int]]:
    """A byte-level tokenizer in which token i is byte i, and more tokens of up to four letters: (it, their numbers)."""
    words = ["a", "b", "c", "ab", "ba", "aab", "abba", "cab"]
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    letters = {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}
    assert set(letters.values()) == set(pre_tokenizers.ByteLevel.alphabet())
    names = [letters[byte] for byte in range(256)] + [word for word in words if len(word) > 1]
    vocab = {name: i for i, name in enumerate(names)}
    backend = BackendTokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.decoder = decoders.ByteLevel()
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend), frozenset())
    return tokenizer, {word: vocab[word] for word in words}


TOKENIZER, WORDS = make_tokenizer()

# A piece of text and the tokens that make it: the text is there only once its last token is.
PIECES = st.sampled_from([(word, [token]) for word, token in WORDS.items()]) | st.sampled_from(
    [(char, list(char.encode())) for char in "é€😀"]
)
STOPS = st.lists(st.text("abc", min_size=1, max_size=5) | st.text("ab€😀", min_size=1, max_size=3), max_size=4)


def naive(texts: list[str], stops: list[str], min_tokens: int) -> tuple[list[str], bool]:
    """(What may be out after each token, whether a stop string ended it). `texts[i]` is what token i completed.

    A stop string counts if the token that completes it is at least number `min_tokens`; of those that one token
    completes, the one that begins first. What could still become the beginning of one is not out yet.
    """
    whole, out = "", list[str]()
    for num_tokens, text in enumerate(texts, start=1):
        before, whole = len(whole), whole + text
        starts = [
            at
            for stop in stops
            for at in range(len(whole) - len(stop) + 1)
            if whole.startswith(stop, at) and at + len(stop) > before
        ]
        if starts and num_tokens >= min_tokens:
            return [*out, whole[: min(starts)]], True
        held = max((n for stop in stops for n in range(1, len(stop)) if whole.endswith(stop[:n])), default=0)
        out.append(whole[: len(whole) - held])
    return out, False


def compare(pieces: list[tuple[str, list[int]]], stops: list[str], min_tokens: int) -> None:
    tokens = [token for _, own in pieces for token in own]
    texts = [text if i == len(own) - 1 else "" for text, own in pieces for i in range(len(own))]
    expected, is_stopped = naive(texts, stops, min_tokens)
    detokenizer = Detokenizer(TOKENIZER, tuple(stops), min_tokens)
    out = ""
    for i, token in enumerate(tokens[: len(expected)]):
        out += detokenizer.push(token)
        assert out == expected[i], f"after token {i}"
        assert detokenizer.is_stopped == (is_stopped and i == len(expected) - 1)
    out += detokenizer.flush()
    assert out == (expected[-1] if is_stopped else "".join(texts))


@settings(max_examples=400, derandomize=True, deadline=None)
@given(pieces=st.lists(PIECES, max_size=12), stops=STOPS)
def test_text_goes_out_up_to_what_a_stop_string_could_take_back(
    pieces: list[tuple[str, list[int]]], stops: list[str]
) -> None:
    compare(pieces, stops, min_tokens=0)


@settings(max_examples=600, derandomize=True, deadline=None)
@given(pieces=st.lists(PIECES, max_size=12), stops=STOPS, min_tokens=st.integers(0, 12))
def test_a_stop_string_complete_before_min_tokens_is_text_for_good(
    pieces: list[tuple[str, list[int]]], stops: list[str], min_tokens: int
) -> None:
    compare(pieces, stops, min_tokens)


@pytest.mark.parametrize("stop", ["stop", "s", "😀", "a😀b", "</s>", "€€"])
@pytest.mark.parametrize("before", ["", "x", "sto", "sst", "a😀", "€"])
def test_a_stop_string_is_found_at_every_split(stop: str, before: str) -> None:
    text = f"{before}{stop}after"
    detokenizer = Detokenizer(TOKENIZER, (stop,))
    out, num_pushed = "", 0
    for byte in text.encode():
        out += detokenizer.push(byte)
        num_pushed += 1
        if detokenizer.is_stopped:
            break
    assert out == text[: text.find(stop)]
    assert num_pushed == len(text[: text.find(stop) + len(stop)].encode()), "at its last byte"
    assert detokenizer.flush() == ""


def test_of_two_that_one_token_completes_the_one_that_begins_first_cuts() -> None:
    detokenizer = Detokenizer(TOKENIZER, ("b", "ab"))
    assert detokenizer.push(WORDS["c"]) == "c"
    assert detokenizer.push(WORDS["aab"]) == "a"
    assert detokenizer.is_stopped
    assert detokenizer.stop_string == "ab"


def test_a_character_that_never_got_whole_comes_out_as_a_replacement_and_completes_no_stop_string() -> None:
    for stops in ((), ("😀",)):
        detokenizer = Detokenizer(TOKENIZER, stops)
        out = "".join(detokenizer.push(byte) for byte in "a😀".encode()[:-1])
        assert out == "a"
        assert detokenizer.flush() == "\ufffd"
        assert not detokenizer.is_stopped


def test_an_unfinished_character_completes_a_stop_string_that_ends_with_its_replacement() -> None:
    detokenizer = Detokenizer(TOKENIZER, ("b\ufffd",))
    out = "".join(detokenizer.push(token) for token in [WORDS["a"], WORDS["b"], 0xE2])
    assert out + detokenizer.flush() == "a"
    assert detokenizer.is_stopped


def test_pushing_after_a_stop_string_is_a_bug() -> None:
    detokenizer = Detokenizer(TOKENIZER, ("a",))
    detokenizer.push(WORDS["a"])
    with pytest.raises(AssertionError):
        detokenizer.push(WORDS["b"])
