"""The fuzzer's targets with the inputs that are kept, and with inputs that know the formats better than it does."""

import json
from typing import Any
from urllib.parse import urlencode

import pytest
from hypothesis import given, settings, strategies as st

from fuzz_targets import CORPUS, TARGETS, answer_parser, gguf_reader, request_parser, sse_encoder, stop_strings
from headrace.server.protocol import UNSUPPORTED, ChatCompletionRequest, CompletionRequest

_MOST_CORPUS_BYTES = 300_000

VALUES: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(sorted({*ChatCompletionRequest.model_fields, *CompletionRequest.model_fields, *UNSUPPORTED}))


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_what_the_fuzzer_has_found_is_read_or_refused(name: str) -> None:
    inputs = sorted((CORPUS / name).iterdir())
    assert inputs
    for path in inputs:
        try:
            TARGETS[name](path.read_bytes())
        except Exception as error:
            error.add_note(f"the input is {path}")
            raise


def test_the_corpus_stays_small() -> None:
    assert sum(path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()) < _MOST_CORPUS_BYTES
    assert {path.name for path in CORPUS.iterdir()} == set(TARGETS)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(route=st.integers(0, 3), fields=st.dictionaries(FIELDS, VALUES, max_size=5))
def test_a_body_of_any_fields_is_validated_or_refused(route: int, fields: dict[str, Any]) -> None:
    request_parser(bytes([route]) + json.dumps(fields).encode())


@settings(max_examples=200, derandomize=True, deadline=None)
@given(fields=st.dictionaries(FIELDS, st.text() | VALUES.map(json.dumps), max_size=5), rest=st.binary(max_size=20))
def test_a_query_of_any_fields_is_validated_or_refused(fields: dict[str, str], rest: bytes) -> None:
    request_parser(b"\4" + urlencode(fields, errors="replace").encode() + b"&" + rest)


@settings(max_examples=150, derandomize=True, deadline=None)
@given(
    kind=st.integers(0, 255), texts=st.lists(st.text(st.characters(codec=None, exclude_characters="\0")), max_size=8)
)
def test_any_texts_come_out_of_a_stream_of_events_as_they_went_in(kind: int, texts: list[str]) -> None:
    sse_encoder(bytes([kind]) + b"\0".join(text.encode("utf-8", "surrogatepass") for text in texts))


@settings(max_examples=200, derandomize=True, deadline=None)
@given(
    vocabulary=st.integers(0, 1),
    min_tokens=st.integers(0, 15),
    stops=st.lists(st.text("ab€s", min_size=1, max_size=2), max_size=3),
    tokens=st.lists(st.sampled_from(b"abs\xe2\x82\xac") | st.integers(0, 255), max_size=40),
)
def test_text_ends_where_a_search_in_the_whole_of_it_finds_a_stop_string(
    vocabulary: int, min_tokens: int, stops: list[str], tokens: list[int]
) -> None:
    encoded = [stop.encode() for stop in stops]
    head = bytes([vocabulary, min_tokens, len(stops)]) + b"".join(bytes([len(stop) - 1]) + stop for stop in encoded)
    stop_strings(head + bytes(tokens))


@settings(max_examples=300, derandomize=True, deadline=None)
@given(head=st.binary(min_size=2, max_size=2), answer=st.lists(st.integers(128, 255) | st.sampled_from(b'{}":; a')))
def test_an_answer_comes_to_the_same_parts_wherever_it_is_cut(head: bytes, answer: list[int]) -> None:
    answer_parser(head + bytes(answer))


SEEDS = sorted(path.read_bytes() for path in (CORPUS / "gguf_reader").iterdir() if path.stat().st_size > 500)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.data())
def test_a_damaged_gguf_is_read_or_refused_within_a_multiple_of_its_size(data: st.DataObject) -> None:
    damaged = bytearray(data.draw(st.sampled_from(SEEDS)))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        patch = data.draw(
            st.binary(min_size=1, max_size=8) | st.sampled_from([b"\xff" * 8, b"\0" * 8, b"\xff\xff\xff\x7f"])
        )
        damaged[at : at + len(patch)] = patch
    gguf_reader(bytes(damaged))
