"""The tokenizer that a GGUF file describes.

A GGUF holds no tokenizer.json but a vocabulary with a type for each token, and one of two kinds: `gpt2`, byte-level BPE
with its merges and a name for how text is split before them, or `llama`, SentencePiece's BPE, where the merges follow
from the tokens' scores. transformers' own conversion is not used: it lacks splits, Llama 3's `ignore_merges` and Qwen's
normal form, and knows only the one end that the file names.
"""

import math
from dataclasses import dataclass
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer as BackendTokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from headrace.scheduler.errors import ModelSourceError, UnsupportedModelError
from headrace.scheduler.gguf_file import GGUFFile

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace("{1,3}", "")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class _Split:
    """What a pre-tokenizer's name stands for: patterns that cut the text one after the other, and what else a
    tokenizer.json would say beside them."""

    patterns: tuple[str, ...]
    is_nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


_SPLITS = {
    "gpt-2": _Split((_GPT2,)),
    "smollm": _Split((r"\p{N}", _GPT2)),
    "llama-bpe": _Split((_LLAMA3,), ignore_merges=True, add_bos=True),
    "qwen2": _Split((_QWEN2,), is_nfc=True),
    "tekken": _Split((_TEKKEN,), ignore_merges=True, add_bos=True),
}
# Names that other converters have for the same.
_SPLITS |= {"llama3": _SPLITS["llama-bpe"], "llama-v3": _SPLITS["llama-bpe"], "deepseek-r1-qwen": _SPLITS["qwen2"]}

# Of SentencePiece's, whose longest are runs of spaces.
_MAX_PIECE_CHARS = 1000

# Token types; type 6, a byte of SentencePiece's, is known by its name.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4

# A file names one end, which may be the text's and not the turn's: these end an answer in whatever model has them.
_ENDS = {"<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>", "<|end_of_text|>"}


@dataclass(frozen=True, slots=True)
class GGUFTokenizer:
    """`special_tokens` are under transformers' names, for templates; `eos_token_ids` end an answer."""

    backend: BackendTokenizer
    special_tokens: dict[str, str]
    eos_token_ids: frozenset[int]


def read_tokenizer(file: GGUFFile) -> GGUFTokenizer:
    """Build what the file describes.

    Raises: UnsupportedModelError for a kind or a split that is not known here; ModelSourceError.
    """
    kind, split_name = file.require("tokenizer.ggml.model"), file.get("tokenizer.ggml.pre")
    if kind != "llama" and (kind != "gpt2" or split_name not in _SPLITS):
        raise UnsupportedModelError(
            f"{file.path}: tokenizer {kind!r} with pre-tokenizer {split_name!r} is not supported out of a GGUF (llama "
            f"is, and gpt2 with {', '.join(_SPLITS)}); use the model's Hugging Face directory"
        )
    tokens: list[str] = file.require("tokenizer.ggml.tokens")
    types: list[int] = file.get("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise ModelSourceError(f"{file.path} has {len(tokens)} tokens but {len(types)} token types")
    named = {
        name: token_id
        for name in ("bos", "eos", "eot", "eom", "unknown", "padding")
        if (token_id := file.get(f"tokenizer.ggml.{name}_token_id")) is not None
    }
    if named.get("padding", 0) >= len(tokens):
        del named["padding"]  # nothing is padded
    if bad := [name for name, token_id in named.items() if token_id >= len(tokens)]:
        raise ModelSourceError(f"{file.path}: the {bad[0]} token is not in the vocabulary")
    ends = {named[name] for name in ("eos", "eot", "eom") if name in named}
    ends |= {i for i, token in enumerate(tokens) if token in _ENDS}

    special_names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    special = {key: tokens[named[name]] for key, name in special_names.items() if name in named}
    if kind == "llama":
        # A run of spaces that is a token is written with real ones, but looked up when they have been replaced.
        tokens = [
            "▁" * len(token) if type_ == _USER_DEFINED and not token.strip(" ") else token
            for token, type_ in zip(tokens, types, strict=True)
        ]
    if len(set(tokens)) < len(tokens):
        raise ModelSourceError(f"{file.path}: the vocabulary has a token twice")
    if kind == "llama":
        backend = _sentencepiece(file, tokens, types, special.get("unk_token"))
    else:
        backend = _byte_level(file, tokens, _SPLITS[split_name])
    # Special tokens vanish from decoded text. User-defined ones are matched whole, too, and stay.
    is_special = [type_ in (_UNKNOWN, _CONTROL) or i in ends for i, type_ in enumerate(types)]
    added = [i for i, type_ in enumerate(types) if is_special[i] or type_ == _USER_DEFINED]
    backend.add_tokens([AddedToken(tokens[i], special=is_special[i], normalized=False) for i in added])
    if "bos" in named and file.get("tokenizer.ggml.add_bos_token", kind == "llama" or _SPLITS[split_name].add_bos):
        bos = special["bos_token"]
        backend.post_processor = processors.TemplateProcessing(single=[bos, "$A"], special_tokens=[(bos, named["bos"])])
    return GGUFTokenizer(backend, special, frozenset(ends))


def _byte_level(file: GGUFFile, tokens: list[str], split: _Split) -> BackendTokenizer:
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ", 1)) for merge in file.require("tokenizer.ggml.merges")]
    backend = BackendTokenizer(models.BPE(vocab, merges, ignore_merges=split.ignore_merges))
    if split.is_nfc:
        backend.normalizer = normalizers.NFC()
    cuts = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in split.patterns]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*cuts, to_bytes])
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(file: GGUFFile, tokens: list[str], types: list[int], unk_token: str | None) -> BackendTokenizer:
    if any(len(token) > _MAX_PIECE_CHARS for token in tokens):  # every cut of each is looked up
        raise ModelSourceError(f"{file.path}: a token of the vocabulary has over {_MAX_PIECE_CHARS} characters")
    merges = _merges(tokens, types, file.require("tokenizer.ggml.scores"))
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = BackendTokenizer(models.BPE(vocab, merges, unk_token=unk_token, fuse_unk=True, byte_fallback=True))
    normalizer: Any = normalizers.Replace(" ", "▁")
    if file.get("tokenizer.ggml.add_space_prefix", True):
        normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizer])
    backend.normalizer = normalizer
    # No Strip of the first space: what is decoded here continues a text.
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


def _merges(tokens: list[str], types: list[int], scores: list[float]) -> list[tuple[str, str]]:
    """All pairs that make a token, the best token first: SentencePiece's order of merging.

    User-defined tokens come before all others, whatever score the file's converter gave them.
    """
    vocab = set(tokens)
    pairs = [
        (math.inf if type_ == _USER_DEFINED else score, token[:cut], token[cut:])
        for token, type_, score in zip(tokens, types, scores, strict=True)
        if type_ in (_NORMAL, _USER_DEFINED)
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    pairs.sort(key=lambda pair: (pair[0], len(pair[1]), len(pair[2])), reverse=True)
    return [(left, right) for _, left, right in pairs]
