"""Texts to token ids: what Hugging Face's own tokenizer gives, cut where it cuts, and refused where it does not fit."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from transformers import AutoTokenizer

from fake_one_shots import CLS, MAX_TOKENS, SEP, WORDS, token_ids, write_text_model
from headrace.scheduler.errors import ModelSourceError
from headrace.server.errors import BadRequestError, ContextLengthError
from headrace.server.text_input import TextReader

# Special tokens are also words that a text can hold.
TEXTS = st.lists(st.sampled_from([*WORDS, "unknown"]), max_size=MAX_TOKENS + 20).map(" ".join)
LIMITS = st.integers(2, MAX_TOKENS + 10)  # as many as a text's special tokens, or more
BOTH_SIDES = pytest.mark.parametrize("side", ["right", "left"])


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[TextReader, Any]]:
    """By the side that is cut: a reader, and Hugging Face's tokenizer of the same directory."""
    found = {}
    for side in ("right", "left"):
        path = write_text_model(tmp_path_factory.mktemp(side), truncation_side=side)
        found[side] = TextReader(path), AutoTokenizer.from_pretrained(path)
    return found


@pytest.fixture(scope="module")
def reader(sides: dict[str, tuple[TextReader, Any]]) -> TextReader:
    return sides["right"][0]


@BOTH_SIDES
@given(text=TEXTS, limit=LIMITS)
@settings(deadline=None)
def test_a_text_is_cut_where_hugging_face_cuts_it(
    sides: dict[str, tuple[TextReader, Any]], side: str, text: str, limit: int
) -> None:
    reader, tokenizer = sides[side]
    [ids] = reader.read([text], "input", max_tokens=limit)
    assert ids.tolist() == tokenizer(text, truncation=True, max_length=min(limit, MAX_TOKENS)).input_ids
    assert ids.dtype == np.int64


@BOTH_SIDES
@given(first=TEXTS, second=TEXTS, limit=LIMITS)
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_of_a_pair_the_second_text_is_cut_where_hugging_face_cuts_it(
    sides: dict[str, tuple[TextReader, Any]], side: str, first: str, second: str, limit: int
) -> None:
    reader, tokenizer = sides[side]
    limit = min(limit, MAX_TOKENS)
    num_over = len(tokenizer([first], [second]).input_ids[0]) - limit
    if 0 < num_over >= len(second.split()):  # nothing of it would be left
        with pytest.raises(ContextLengthError):
            reader.read_pairs([(first, second)], "text_2", max_tokens=limit)
        return
    [row] = reader.read_pairs([(first, second)], "text_2", max_tokens=limit)
    # In lists: an empty second text alone is none to it.
    expected = tokenizer([first], [second], truncation="only_second", max_length=limit, return_token_type_ids=True)
    assert row.tolist() == [expected.input_ids[0], expected.token_type_ids[0]]
    assert row.dtype == np.int64


def test_a_limit_that_not_even_the_special_tokens_keep_is_refused(reader: TextReader) -> None:
    with pytest.raises(ContextLengthError):
        reader.read(["river"], "input", max_tokens=1)


def test_many_texts_and_token_ids_keep_their_order(reader: TextReader) -> None:
    texts = [" ".join(["river", "mill", "stone"][: i % 4]) for i in range(150)]
    assert [ids.tolist() for ids in reader.read(texts, "input", max_tokens=None)] == [token_ids(text) for text in texts]
    ids = [token_ids(text) for text in texts]
    assert [row.tolist() for row in reader.read(ids, "input", max_tokens=None)] == ids
    pairs = reader.read_pairs([("river", text) for text in texts], "documents", max_tokens=None)
    assert [row[0].tolist() for row in pairs] == [token_ids("river") + row[1:] for row in ids]


def test_token_ids_are_cut_before_the_special_ones_they_end_with(reader: TextReader) -> None:
    [ids] = reader.read([[CLS, 5, 6, 7, SEP]], "input", max_tokens=3)
    assert ids.tolist() == [CLS, 5, SEP]
    [ids] = reader.read([[5, 6, 7, 8]], "input", max_tokens=3)
    assert ids.tolist() == [5, 6, 7]
    [ids] = reader.read([[SEP] * 9], "input", max_tokens=3)
    assert ids.tolist() == [SEP] * 3
    [ids] = reader.read([[5] * 60], "input", max_tokens=2**31)
    assert ids.tolist() == [5] * MAX_TOKENS


@pytest.mark.parametrize("too_long", ["river " * (MAX_TOKENS - 1), [5] * (MAX_TOKENS + 1)], ids=["text", "token ids"])
def test_what_is_too_long_is_refused_unless_it_may_be_cut(reader: TextReader, too_long: Any) -> None:
    with pytest.raises(ContextLengthError) as caught:
        reader.read([too_long, too_long], "input", max_tokens=None)
    assert "input[0]: 49 tokens are more than the model's 48" in caught.value.message
    assert caught.value.param == "input"
    assert len(reader.read([too_long], "input", max_tokens=2**31)[0]) == MAX_TOKENS


def test_the_text_that_is_refused_is_named(reader: TextReader) -> None:
    texts = ["river"] * 70 + ["river " * 60]
    with pytest.raises(ContextLengthError, match=r"input\[70\]"):
        reader.read(texts, "input", max_tokens=None)
    with pytest.raises(ContextLengthError, match=r"documents\[70\]") as caught:
        reader.read_pairs([("mill", text) for text in texts], "documents", max_tokens=None)
    assert caught.value.param == "documents"


def test_a_text_of_millions_of_characters_is_not_tokenized(reader: TextReader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_backend", None)
    text, message = "x" * (2**20 + 1), r"input\[0\]: 1048577 characters"
    with pytest.raises(ContextLengthError, match=message):
        reader.read([text], "input", max_tokens=2**31)
    for pair in ((text, ""), ("", text)):
        with pytest.raises(ContextLengthError, match=message):
            reader.read_pairs([pair], "input", max_tokens=2**31)


@pytest.mark.parametrize(
    ("ids", "message"),
    [([], r"input\[0\]: is empty"), ([len(WORDS)], rf"input\[0\]: token ids must be below {len(WORDS)}")],
)
def test_token_ids_that_are_none_are_refused(reader: TextReader, ids: list[int], message: str) -> None:
    with pytest.raises(BadRequestError, match=message) as caught:
        reader.read([ids], "input", max_tokens=None)
    assert caught.value.param == "input"


@pytest.mark.parametrize(
    ("files", "max_tokens"),
    [
        ({}, MAX_TOKENS),
        ({"sentence_bert_config.json": {"max_seq_length": 20}}, 20),
        ({"sentence_bert_config.json": {"max_seq_length": None}}, MAX_TOKENS),
        ({"tokenizer_config.json": {"model_max_length": 30}}, 30),
        ({"tokenizer_config.json": {"model_max_length": 1e30}}, MAX_TOKENS),
        ({"config.json": {"max_position_embeddings": 12}}, 12),
        ({"config.json": {"model_type": "roberta", "max_position_embeddings": 12, "pad_token_id": 1}}, 10),
    ],
    ids=str,
)
def test_the_shortest_limit_of_the_models_files_holds(
    tmp_path: Path, files: dict[str, dict[str, Any]], max_tokens: int
) -> None:
    write_text_model(tmp_path)
    for name, fields in files.items():
        file = tmp_path / name
        file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | fields))
    assert TextReader(tmp_path).max_tokens == max_tokens


def without_a_limit(path: Path) -> None:
    (path / "config.json").write_text('{"model_type": "bert"}')


def without_a_tokenizer(path: Path) -> None:
    (path / "tokenizer.json").write_text("{")


def without_a_config(path: Path) -> None:
    (path / "config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_a_limit, "no file says how many tokens"),
        (without_a_tokenizer, "the tokenizer cannot be loaded"),
        (without_a_config, "the tokenizer cannot be loaded"),
    ],
)
def test_a_directory_that_cannot_serve_is_refused_at_the_start(tmp_path: Path, damage: Any, message: str) -> None:
    damage(write_text_model(tmp_path))
    with pytest.raises(ModelSourceError, match=message):
        TextReader(tmp_path)
