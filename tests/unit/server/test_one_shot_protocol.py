"""The bodies of the one-shot routes: every form that clients send, and each refusal by the name of its field."""

import base64
from typing import Any

import pytest
from hypothesis import given, strategies as st
from pydantic import BaseModel

from headrace.server.errors import BadRequestError, UnsupportedParameterError
from headrace.server.one_shot_protocol import (
    MAX_INPUTS,
    ClassifyForm,
    ClassifyRequest,
    EmbeddingRequest,
    RerankRequest,
    ScoreRequest,
)
from headrace.server.protocol import validate

RERANK = {"query": "q", "documents": ["a", "b"]}
MINIMAL: dict[type[BaseModel], dict[str, Any]] = {
    EmbeddingRequest: {"input": "a"},
    RerankRequest: RERANK,
    ScoreRequest: {"text_1": "a", "text_2": "b"},
    ClassifyRequest: {"image": "YQ=="},
    ClassifyForm: {},
}


@pytest.mark.parametrize(
    ("input", "inputs"),
    [
        ("a", ["a"]),
        ("", [""]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        ([1] * 5000, [[1] * 5000]),
        (["a"] * MAX_INPUTS, ["a"] * MAX_INPUTS),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_an_input_is_a_text_or_token_ids_or_a_list_of_either(input: Any, inputs: list[Any]) -> None:
    assert validate(EmbeddingRequest, {"input": input}).inputs == inputs


@pytest.mark.parametrize(
    ("first", "second", "pairs"),
    [
        ("a", "b", [("a", "b")]),
        ("a", ["b", "c"], [("a", "b"), ("a", "c")]),
        (["a"], ["b", "c"], [("a", "b"), ("a", "c")]),
        (["a", "d"], ["b", "c"], [("a", "b"), ("d", "c")]),
        (["a"], "b", [("a", "b")]),
    ],
)
def test_scores_are_of_one_text_with_each_or_of_pairs(first: Any, second: Any, pairs: list[Any]) -> None:
    assert validate(ScoreRequest, {"text_1": first, "text_2": second}).pairs == pairs


def test_documents_are_texts_or_objects_with_one() -> None:
    documents = ["a", {"text": "b"}, {"text": "c", "title": "more"}]
    assert validate(RerankRequest, RERANK | {"documents": documents}).documents == ["a", "b", "c"]


@pytest.mark.parametrize("cls", MINIMAL)
def test_null_is_absent_and_unknown_fields_are_ignored(cls: type[BaseModel]) -> None:
    required = MINIMAL[cls]
    nulls = dict.fromkeys(cls.model_fields.keys() - required.keys())
    unsupported = dict.fromkeys(getattr(cls, "unsupported", ()))
    assert validate(cls, required | nulls | unsupported | {"surprise": [1]}) == validate(cls, required)


@pytest.mark.parametrize(("truncate", "max_tokens"), [(None, None), (1, 1), (300, 300)])
def test_texts_are_cut_only_where_that_is_asked_for(truncate: int | None, max_tokens: int | None) -> None:
    assert validate(EmbeddingRequest, {"input": "a", "truncate_prompt_tokens": truncate}).max_tokens == max_tokens


def test_minus_one_cuts_to_what_the_model_takes() -> None:
    cut = validate(RerankRequest, RERANK | {"truncate_prompt_tokens": -1}).max_tokens
    assert cut is not None
    assert cut > 10**9


@pytest.mark.parametrize(
    ("cls", "fields", "param"),
    [
        (EmbeddingRequest, {"input": None}, "input"),
        (EmbeddingRequest, {"input": 5}, "input"),
        (EmbeddingRequest, {"input": {"text": "a"}}, "input"),
        (EmbeddingRequest, {"input": []}, "input"),
        (EmbeddingRequest, {"input": [[]]}, "input[0]"),
        (EmbeddingRequest, {"input": [[1], []]}, "input[1]"),
        (EmbeddingRequest, {"input": ["a", 1]}, "input[1]"),
        (EmbeddingRequest, {"input": [1, "a"]}, "input[1]"),
        (EmbeddingRequest, {"input": [[1], "a"]}, "input[1]"),
        (EmbeddingRequest, {"input": [True]}, "input[0]"),
        (EmbeddingRequest, {"input": [1.5]}, "input[0]"),
        (EmbeddingRequest, {"input": [-1]}, "input[0]"),
        (EmbeddingRequest, {"input": [2**31]}, "input[0]"),
        (EmbeddingRequest, {"input": [[1], [2, None]]}, "input[1][1]"),
        (EmbeddingRequest, {"input": ["a"] * (MAX_INPUTS + 1)}, "input"),
        (EmbeddingRequest, {"input": [[1]] * (MAX_INPUTS + 1)}, "input"),
        (EmbeddingRequest, {"encoding_format": "int8"}, "encoding_format"),
        (EmbeddingRequest, {"dimensions": 0}, "dimensions"),
        (EmbeddingRequest, {"dimensions": "8"}, "dimensions"),
        (EmbeddingRequest, {"dimensions": 8.0}, "dimensions"),
        (EmbeddingRequest, {"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        (EmbeddingRequest, {"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        (EmbeddingRequest, {"truncate_prompt_tokens": 2**31}, "truncate_prompt_tokens"),
        (EmbeddingRequest, {"truncate_prompt_tokens": True}, "truncate_prompt_tokens"),
        (EmbeddingRequest, {"model": 5}, "model"),
        (EmbeddingRequest, {"model": "m" * 1000}, "model"),
        (EmbeddingRequest, {"user": {}}, "user"),
        (EmbeddingRequest, {"timeout": 0}, "timeout"),
        (EmbeddingRequest, {"timeout": "5"}, "timeout"),
        (RerankRequest, {"query": None}, "query"),
        (RerankRequest, {"query": ["a"]}, "query"),
        (RerankRequest, {"documents": None}, "documents"),
        (RerankRequest, {"documents": "a"}, "documents"),
        (RerankRequest, {"documents": []}, "documents"),
        (RerankRequest, {"documents": ["a", 5]}, "documents[1]"),
        (RerankRequest, {"documents": ["a", {"title": "b"}]}, "documents[1]"),
        (RerankRequest, {"documents": [{"text": ["a"]}]}, "documents[0]"),
        (RerankRequest, {"documents": ["a"] * (MAX_INPUTS + 1)}, "documents"),
        (RerankRequest, {"top_n": 0}, "top_n"),
        (RerankRequest, {"return_documents": "yes"}, "return_documents"),
        (ScoreRequest, {"text_1": None}, "text_1"),
        (ScoreRequest, {"text_1": []}, "text_1"),
        (ScoreRequest, {"text_1": ["a", "b"]}, "text_1"),
        (ScoreRequest, {"text_1": ["a", "b"], "text_2": ["a"] * 3}, "text_1"),
        (ScoreRequest, {"text_2": []}, "text_2"),
        (ScoreRequest, {"text_2": [["a"]]}, "text_2[0]"),
        (ScoreRequest, {"text_2": 5}, "text_2"),
        (ScoreRequest, {"text_2": ["a"] * (MAX_INPUTS + 1)}, "text_2"),
        (ClassifyRequest, {"image": None}, "image"),
        (ClassifyRequest, {"image": ["YQ=="]}, "image"),
        (ClassifyRequest, {"top_k": 0}, "top_k"),
        (ClassifyRequest, {"top_k": "3"}, "top_k"),
        (ClassifyForm, {"top_k": "0"}, "top_k"),
        (ClassifyForm, {"top_k": "three"}, "top_k"),
        (ClassifyForm, {"timeout": "inf"}, "timeout"),
        (ClassifyForm, {"timeout": "-1"}, "timeout"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_wrong_value_is_refused_by_name(cls: type[BaseModel], fields: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        validate(cls, MINIMAL[cls] | fields)
    assert caught.value.param == param
    assert caught.value.message.startswith(f"{param}: ")


@pytest.mark.parametrize(
    ("cls", "field", "neutral", "value"),
    [
        (EmbeddingRequest, "add_special_tokens", [True], False),
        (EmbeddingRequest, "messages", [], [{"role": "user", "content": "a"}]),
        (EmbeddingRequest, "normalize", [], False),
        (EmbeddingRequest, "embed_dtype", ["float32"], "float16"),
        (EmbeddingRequest, "endianness", ["native", "little"], "big"),
        (RerankRequest, "use_activation", [True], False),
        (ScoreRequest, "activation", [True], False),
        (ScoreRequest, "activation", [True], 1),
    ],
)
def test_what_would_change_an_answer_and_cannot_be_done_is_refused(
    cls: type[BaseModel], field: str, neutral: list[Any], value: Any
) -> None:
    for asks_for_nothing in neutral:
        assert validate(cls, MINIMAL[cls] | {field: asks_for_nothing}) == validate(cls, MINIMAL[cls])
    with pytest.raises(UnsupportedParameterError) as caught:
        validate(cls, MINIMAL[cls] | {field: value})
    assert caught.value.param == field


@given(
    st.binary(max_size=200), st.sampled_from(["", "data:image/png;base64,", "DATA:;BASE64,", "data:a/b;c=d;base64,"])
)
def test_an_image_is_base64_bare_or_as_a_data_url_in_one_line_or_many(data: bytes, head: str) -> None:
    for encoded in (base64.b64encode(data), base64.encodebytes(data)):
        assert validate(ClassifyRequest, {"image": head + encoded.decode()}).image_bytes() == data


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("http://127.0.0.1/x.png", "URLs are not fetched"),
        ("HTTPS://example.org/a,b.png", "URLs are not fetched"),
        ("file:///etc/passwd", "URLs are not fetched"),
        ("//example.org/x", "not valid base64"),
        ("data:image/png,abc", "must be base64, or a data URL of base64"),
        ("data:text/plain;charset=x,abc", "must be base64, or a data URL of base64"),
        ("YQ==,YQ==", "must be base64, or a data URL of base64"),
        ("YQ", "not valid base64"),
        ("Y*==", "not valid base64"),
        ("é", "not valid base64"),
    ],
)
def test_any_other_image_is_refused_and_no_url_is_opened(image: str, message: str) -> None:
    with pytest.raises(BadRequestError, match=message) as caught:
        validate(ClassifyRequest, {"image": image}).image_bytes()
    assert caught.value.param == "image"


def test_the_fields_of_a_form_are_strings_and_empty_ones_absent() -> None:
    form = validate(ClassifyForm, {"model": "m", "top_k": "3", "timeout": "2.5", "user": ""})
    assert (form.model, form.top_k, form.timeout, form.user) == ("m", 3, 2.5, None)
