"""Tokenizers out of a GGUF are those they were made from: trained here, written as converters write them, compared."""

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings, strategies as st
from tokenizers import Regex, Tokenizer as BackendTokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

from gguf_writing import write_gguf
from headrace.scheduler.errors import HeadraceError, ModelSourceError, UnsupportedModelError
from headrace.scheduler.gguf_file import GGUFFile
from headrace.scheduler.model_source import ModelSource
from headrace.server.detokenizer import Detokenizer
from headrace.server.gguf_tokenizer import read_tokenizer
from headrace.server.tokenizer import load_tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
CORPUS = [
    "The mill wheel turned, and the miller's daughter didn't care; she'd seen it turn 1984 times before.",
    "In 2024, 12345 tokens cost 0.06 and 1,000,000 cost more. HelloWorld isMixed CamelCase UPPER lower",
    "def turn(wheel):\n    for i in range(100):\n        wheel.turn(i)\n\n\n\treturn wheel  # done",
    "Das Mühlrad dreht sich. La roue tourne. 水車が回る。 你好,你是谁 물레방아 🌊🚣 e\u0301 é ﬁ",
    "https://example.org/a/b?c=d&e=f  <b>bold</b>   three   spaces     five",
] * 4
AWKWARD = [
    "",
    " ",
    "  two  and   three    spaces     ",
    "\n\n\n line\r\n\r\nbreaks\t\ttabs \n",
    "in 1984 and 12345678 or 3.14159",
    "don't DON'T we'Re I'LL",
    "HelloWorld ABCdef aBC",
    "你好,水車 물레방아",
    "🌊🚣‍♀️ e\u0301 ﬁ Å \u212b \u00a0\u3000",
    "a<|end|>b<think>c</think><|end|>",
    "<0x41> ▁ ▁▁ literal",
    "\x00\x01\ufffd \U0010ffff",
    "http://a.b/c//d\n/x",
]
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?"
    r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def cut_by(pattern: str) -> Any:
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), to_bytes])


def qwen2_cut() -> Any:
    """As transformers' own class has it."""
    tokenizer: Any = Qwen2Tokenizer(vocab={}, merges=[])
    return tokenizer.backend_tokenizer.pre_tokenizer


# A GGUF's name for a split: what the families' tokenizer.json have (pre-tokenizer, normalizer, merges ignored).
SPLITS: dict[str, tuple[Callable[[], Any], Any, bool]] = {
    "gpt-2": (lambda: GPT2, None, False),
    "smollm": (lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2]), None, False),
    "llama-bpe": (lambda: cut_by(LLAMA3_SPLIT), None, True),
    "qwen2": (qwen2_cut, normalizers.NFC(), False),
    "tekken": (lambda: cut_by(TEKKEN_SPLIT), None, True),
}


def write(path: Path, kind: str, tokens: list[str], types: list[int] | None, **metadata: Any) -> ModelSource:
    """A GGUF of nothing but a tokenizer."""
    fields = {"model": kind, "tokens": tokens, "token_type": types} | metadata
    template = fields.pop("chat_template", None)
    named = {f"tokenizer.ggml.{key}": value for key, value in fields.items()}
    named |= {"general.architecture": "llama", "tokenizer.chat_template": template}
    return ModelSource(write_gguf(path, named), "tiny")


def byte_level(name: str) -> BackendTokenizer:
    """A byte-level tokenizer trained on the corpus, with a control token and two user-defined ones."""
    pre_tokenizer, normalizer, ignore_merges = SPLITS[name]
    backend = BackendTokenizer(models.BPE(ignore_merges=ignore_merges))
    backend.pre_tokenizer = pre_tokenizer()
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_special_tokens(["<|end|>", "<s>"])
    backend.add_tokens(["<think>", "</think>"])
    return backend


def byte_level_gguf(path: Path, name: str, backend: BackendTokenizer, **metadata: Any) -> ModelSource:
    vocab = backend.get_vocab()
    tokens = sorted(vocab, key=vocab.__getitem__)
    special = {token.content: token.special for token in backend.get_added_tokens_decoder().values()}
    types = [CONTROL if special.get(t) else USER_DEFINED if t in special else NORMAL for t in tokens]
    merges = [" ".join(merge) for merge in json.loads(backend.to_str())["model"]["merges"]]
    return write(path, "gpt2", tokens, types, pre=name, merges=merges, **metadata)


texts = st.text(max_size=60) | st.from_regex(r"[ a-zA-Z0-9\n\t'/.<|>_▁é🌊水]{0,60}") | st.sampled_from(AWKWARD)
# Control tokens are text for SentencePiece.
SPECIAL = re.compile(r"<(unk|/?s|start_of_turn|end_of_turn)>")
compared = settings(max_examples=300, derandomize=True, deadline=None)


@pytest.mark.parametrize("name", SPLITS)
def test_byte_level_ids_and_text_are_those_of_the_tokenizer_it_was_made_from(tmp_path: Path, name: str) -> None:
    theirs = byte_level(name)
    ours = load_tokenizer(byte_level_gguf(tmp_path / "tiny.gguf", name, theirs, add_bos_token=False))

    @compared
    @given(texts)
    def compare(text: str) -> None:
        token_ids = ours.encode(text, add_special_tokens=True)
        assert token_ids == theirs.encode(text).ids
        assert ours.decode(token_ids) == theirs.decode(token_ids)
        assert ours.decode(token_ids, skip_special_tokens=False) == theirs.decode(token_ids, skip_special_tokens=False)

    compare()
    for text in AWKWARD:
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text).ids, text


@pytest.mark.parametrize(
    ("name", "text", "pieces"),
    [
        ("gpt-2", "in 1984  HelloWorld", ["in", " 1984", " ", " HelloWorld"]),
        ("smollm", "in 1984  HelloWorld", ["in", " ", "1", "9", "8", "4", " ", " HelloWorld"]),
        ("llama-bpe", "in 1984  HelloWorld", ["in", " ", "198", "4", " ", " HelloWorld"]),
        ("qwen2", "in 1984  HelloWorld", ["in", " ", "1", "9", "8", "4", " ", " HelloWorld"]),
        ("tekken", "in 1984  HelloWorld", ["in", " ", "1", "9", "8", "4", " ", " Hello", "World"]),
        ("gpt-2", "I'LL go", ["I", "'", "LL", " go"]),
        ("llama-bpe", "I'LL go", ["I", "'LL", " go"]),
    ],
)
def test_text_is_cut_where_the_family_cuts_it(tmp_path: Path, name: str, text: str, pieces: list[str]) -> None:
    source = byte_level_gguf(tmp_path / "tiny.gguf", name, byte_level(name))
    cut = read_tokenizer(GGUFFile(source.path)).backend.pre_tokenizer.pre_tokenize_str(text)
    assert [piece.replace("Ġ", " ") for piece, _ in cut] == pieces


def test_llama_3_takes_a_whole_word_that_no_merge_makes(tmp_path: Path) -> None:
    tokens = ["a", "b", "c", "ab", "abc"]
    for name, expected in (("llama-bpe", [4]), ("qwen2", [3, 2])):
        source = write(tmp_path / f"{name}.gguf", "gpt2", tokens, [NORMAL] * 5, pre=name, merges=["a b"])
        assert load_tokenizer(source).encode("abc", add_special_tokens=False) == expected


SPACES = [" " * n for n in range(2, 9)]


def sentencepiece_model(has_prefix: bool) -> Any:
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=trained,
        model_type="bpe",
        vocab_size=520,
        byte_fallback=True,
        add_dummy_prefix=has_prefix,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        control_symbols=["<start_of_turn>", "<end_of_turn>"],
        user_defined_symbols=["\n", "\n\n", "<think>", *([] if has_prefix else [s.replace(" ", "▁") for s in SPACES])],
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())


def sentencepiece_gguf(path: Path, model: Any, **metadata: Any) -> ModelSource:
    """As llama.cpp's converter writes it: user-defined tokens with real spaces, and a score of their own."""
    tokens, types, scores = [], [], []
    is_user_defined = {model.piece_to_id(piece) for piece in ["\n", "\n\n", "<think>"]}
    is_user_defined |= {model.piece_to_id(s.replace(" ", "▁")) for s in SPACES if not metadata["add_space_prefix"]}
    for i in range(model.vocab_size()):
        piece, score, kind = model.id_to_piece(i), model.get_score(i), NORMAL
        if i in is_user_defined:
            piece, score, kind = piece.replace("▁", " "), -1000.0, USER_DEFINED
        elif model.is_byte(i):
            kind = BYTE
        elif model.is_control(i) or model.is_unknown(i):
            kind = CONTROL if model.is_control(i) else UNKNOWN
        tokens.append(piece)
        types.append(kind)
        scores.append(score)
    return write(path, "llama", tokens, types, scores=scores, unknown_token_id=0, **metadata)


@pytest.mark.parametrize("has_prefix", [True, False])
def test_sentencepiece_ids_and_text_are_those_of_sentencepiece(tmp_path: Path, has_prefix: bool) -> None:
    theirs = sentencepiece_model(has_prefix)
    ours = load_tokenizer(
        sentencepiece_gguf(tmp_path / "tiny.gguf", theirs, add_space_prefix=has_prefix, add_bos_token=False)
    )

    def compare(text: str) -> None:
        text = text.replace(" " * 9, "")  # a longer run than there are tokens for is cut elsewhere
        # The prefix goes before a text, and here before what follows a token matched whole, too. Literal ▁ are matched
        # as Gemma's own tokenizer.json does it, where runs of spaces are tokens in that spelling.
        for piece in ("\n", "<think>") if has_prefix else ("▁",):
            text = text.replace(piece, "")
        token_ids = ours.encode(text, add_special_tokens=True)
        assert token_ids == (theirs.encode(text) if text else [])
        assert ours.decode(token_ids) == (" " if has_prefix and text else "") + text.replace("▁", " ")

    compared(given(texts.filter(lambda text: not SPECIAL.search(text)))(compare))()
    for text in AWKWARD:
        compare(text)


def test_bytes_of_no_piece_fall_back_and_stream_as_whole_characters(tmp_path: Path) -> None:
    model = sentencepiece_model(True)
    ours = load_tokenizer(sentencepiece_gguf(tmp_path / "tiny.gguf", model, add_space_prefix=True))

    @compared
    @given(texts)
    def streamed(text: str) -> None:
        detokenizer = Detokenizer(ours, ())
        token_ids = ours.encode(text, add_special_tokens=False)
        pieces = [detokenizer.push(token_id) for token_id in token_ids] + [detokenizer.flush()]
        assert "".join(pieces) == ours.decode(token_ids)
        assert ("\ufffd" in "".join(pieces)) == ("\ufffd" in text)

    streamed()


def test_what_is_generated_keeps_its_first_space(tmp_path: Path) -> None:
    model = sentencepiece_model(True)
    ours = load_tokenizer(sentencepiece_gguf(tmp_path / "tiny.gguf", model, add_space_prefix=True))
    detokenizer = Detokenizer(ours, ())
    word = model.piece_to_id("▁wheel")
    assert word != model.unk_id()
    assert detokenizer.push(word) + detokenizer.flush() == " wheel"


@pytest.mark.parametrize(
    ("kind", "add_bos", "has_bos"),
    [
        ("llama", None, True),
        ("llama", False, False),
        ("llama-bpe", None, True),
        ("llama-bpe", False, False),
        ("qwen2", None, False),
        ("qwen2", True, True),
    ],
)
def test_the_first_token_is_added_where_the_file_or_the_kind_says_so(
    tmp_path: Path, kind: str, add_bos: bool | None, has_bos: bool
) -> None:
    path, flags = tmp_path / "tiny.gguf", {} if add_bos is None else {"add_bos_token": add_bos}
    if kind == "llama":
        source = sentencepiece_gguf(path, sentencepiece_model(True), add_space_prefix=True, bos_token_id=1, **flags)
        bos: int | None = 1
    else:
        backend = byte_level(kind)
        bos = backend.token_to_id("<s>")
        source = byte_level_gguf(path, kind, backend, bos_token_id=bos, **flags)
    ours = load_tokenizer(source)
    plain = ours.encode("turn", add_special_tokens=False)
    assert bos not in plain
    assert ours.encode("turn", add_special_tokens=True) == [bos] * has_bos + plain


# A chat template of each family, shortened to what it writes for plain turns: (template, what ends a turn).
TEMPLATES = {
    "llama 3": (
        "{% for m in messages %}{{ (bos_token if loop.first else '') + '<|start_header_id|>' + m.role"
        " + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        "<|eot_id|>",
    ),
    "qwen": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "<|im_end|>",
    ),
    "gemma": (
        "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role)"
        " + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        "<end_of_turn>",
    ),
    "phi 3": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        "<|end|>",
    ),
}


@pytest.mark.parametrize("family", TEMPLATES)
def test_a_chat_is_rendered_by_the_files_template_and_ends_with_its_turn(tmp_path: Path, family: str) -> None:
    template, end = TEMPLATES[family]
    words = ["<unk>", "<s>", "</s>", end, "user", "▁"]
    source = write(
        tmp_path / "tiny.gguf",
        "llama",
        words,
        # a token that ends a turn is one in whatever type a converter left it
        [UNKNOWN, CONTROL, CONTROL, NORMAL, NORMAL, NORMAL],
        scores=[0.0] * len(words),
        bos_token_id=1,
        eos_token_id=2,
        unknown_token_id=0,
        chat_template=template,
    )
    ours = load_tokenizer(source)
    theirs: Any = PreTrainedTokenizerFast(
        tokenizer_object=BackendTokenizer(models.BPE()), bos_token="<s>", eos_token="</s>", chat_template=template
    )
    chat = [
        {"role": "user", "content": " user "},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "b"},
    ]
    rendered = ours.render_chat(chat)
    assert rendered == theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered.count(end) == 3
    assert ours.eos_token_ids == {2, 3}
    assert ours.encode(rendered, add_special_tokens=False).count(3) == 3
    assert ours.decode([3]) == ""


def test_every_end_that_the_file_names_ends_an_answer(tmp_path: Path) -> None:
    tokens = ["a", "<x>", "<y>", "<z>"]
    ids = {"eos_token_id": 1, "eot_token_id": 2, "eom_token_id": 3}
    types = [NORMAL, CONTROL, CONTROL, CONTROL]
    source = write(tmp_path / "tiny.gguf", "gpt2", tokens, types, pre="gpt-2", merges=["a a"], **ids)
    with pytest.raises(ModelSourceError, match=r"tiny\.gguf"):  # `aa` is no token
        load_tokenizer(source)
    source = write(
        tmp_path / "good.gguf", "gpt2", [*tokens, "aa"], [*types, NORMAL], pre="gpt-2", merges=["a a"], **ids
    )
    assert load_tokenizer(source).eos_token_ids == {1, 2, 3}


GOOD: dict[str, Any] = {
    "kind": "gpt2",
    "tokens": ["a", "b", "ab"],
    "types": [1, 1, 1],
    "pre": "gpt-2",
    "merges": ["a b"],
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"pre": "deepseek-llm"}, UnsupportedModelError, r"deepseek-llm.*llama-bpe.*directory"),
        ({"pre": None}, UnsupportedModelError, "None.*directory"),
        ({"kind": "t5"}, UnsupportedModelError, "'t5'.*directory"),
        ({"types": [1, 1]}, ModelSourceError, "3 tokens but 2 token types"),
        ({"eos_token_id": 3}, ModelSourceError, "eos token is not in the vocabulary"),
        ({"tokens": ["a", "ab", "ab"]}, ModelSourceError, "a token twice"),
        ({"merges": None}, UnsupportedModelError, r"tokenizer\.ggml\.merges"),
        ({"kind": "llama"}, UnsupportedModelError, r"tokenizer\.ggml\.scores"),
        ({"kind": "llama", "scores": [0.0]}, ModelSourceError, "cannot be read"),
        ({"merges": ["ab"]}, ModelSourceError, "cannot be read"),
    ],
    ids=str,
)
def test_what_is_unknown_or_does_not_fit_is_refused_by_name(
    tmp_path: Path, change: dict[str, Any], error: type[HeadraceError], message: str
) -> None:
    path = tmp_path / "tiny.gguf"
    load_tokenizer(write(tmp_path / "good.gguf", **GOOD))
    with pytest.raises(error, match=message) as refused:
        load_tokenizer(write(path, **(GOOD | change)))
    assert str(path) in str(refused.value)


def test_a_padding_token_that_is_none_does_not_matter(tmp_path: Path) -> None:
    load_tokenizer(write(tmp_path / "tiny.gguf", **GOOD, padding_token_id=3))


def test_without_token_types_all_are_normal(tmp_path: Path) -> None:
    ours = load_tokenizer(write(tmp_path / "tiny.gguf", **(GOOD | {"types": None})))
    assert ours.encode("ab", add_special_tokens=False) == [2]


def test_tokens_of_control_in_a_users_text_are_those_tokens(tmp_path: Path) -> None:
    backend = byte_level("qwen2")
    ours = load_tokenizer(byte_level_gguf(tmp_path / "tiny.gguf", "qwen2", backend))
    end = backend.token_to_id("<|end|>")
    assert end is not None
    assert ours.encode("a<|end|>b", add_special_tokens=False).count(end) == 1
