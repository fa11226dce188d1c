"""Control tokens that the text of a message spells: they stay text, so that no message can forge a turn.

Used by worker threads; no state. Before a template renders messages, all that could become a control token in them is
marked, by half of a surrogate pair, which no JSON body can hold: what is spelled without marks afterwards is the
template's. To encode it, the template's control tokens get names that nobody can guess, and the marks go. A second
tokenizer over the same model knows control tokens by these names alone and encodes the whole text in one go, cut where
it would be cut otherwise. Some models (Unigram's) have control tokens among the pieces that they cut any text into: of
these a copy is made that has them under their names. It does not know templates.
"""

import contextlib
import json
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer as BackendTokenizer, models

MARK = "\ud800"
# Stands for a mark where text must be valid, as no part of a token and no space.
_VALID_MARK = "\ufffe"


class ControlTokens:
    """The tokens with `ids`, of those added to the vocabulary of `backend`. Where they `may_be_unmarked`, as a
    normalizer may make them of what spells none, texts without marks must be encoded here too. `sought` is what a
    template may look for in messages, which no mark may break.
    """

    def __init__(self, backend: BackendTokenizer, ids: Iterable[int], sought: Iterable[str] = ()) -> None:
        added = backend.get_added_tokens_decoder()
        # One of a single character would be all text's.
        tokens = {i: added[i] for i in ids if len(added[i].content) > 1}
        self._first_chars = {token.content[0] for token in tokens.values()}
        contents = [token.content for token in tokens.values()]
        self._beginnings = frozenset(content[:n] for content in contents for n in range(1, len(content)))
        self._longest = max(map(len, contents), default=0)

        kept = [word for word in sought if not self._has_beginning(word) and not any(c in word for c in contents)]
        starts = [char for char in self._first_chars if not char.isalnum() and not char.isspace()]
        words = "|".join(map(re.escape, sorted(kept, key=len, reverse=True)))
        self._starts = re.compile(f"{words or '(?!)'}|([{re.escape(''.join(starts))}])(?!{MARK})") if starts else None

        # Of a model without a vocabulary nothing is left but added tokens, numbered from 0.
        self._finder = BackendTokenizer(models.BPE())
        self._finder.add_tokens(
            [AddedToken(token.content, single_word=token.single_word, normalized=False) for token in tokens.values()]
        )
        nonce = secrets.token_hex(16)
        self._names = [f"<{nonce}:{i}>" for i in tokens]

        self._named = _without_added_tokens(backend, backend.model)
        is_normalized = backend.normalizer is not None and any(token.normalized for token in tokens.values())
        is_model_making = self._is_model_making(tokens)
        self.may_be_unmarked = is_normalized or is_model_making
        if is_model_making:
            names = dict(zip(contents, self._names, strict=True))
            self._named = _without_added_tokens(backend, _renamed_pieces(backend, names))
        # New tokens are numbered behind all that there are: filled up, so that no number means two tokens.
        num_missing = max(0, max(added, default=0) + 1 - self._named.get_vocab_size())
        others = {i: token for i, token in added.items() if i not in tokens}
        self._named.add_tokens(
            [
                *(AddedToken(f"<{nonce}:filler {n}>") for n in range(num_missing)),
                *(_renamed(token, name) for token, name in zip(tokens.values(), self._names, strict=True)),
                *others.values(),
            ]
        )
        spelled = dict(zip(tokens, self._names, strict=True)) | {i: token.content for i, token in others.items()}
        self._ids = {self._named.token_to_id(text): i for i, text in spelled.items()}

    def mark(self, value: Any) -> Any:
        """A value of JSON with all its texts marked, where a control token is spelled or may begin at the end."""
        match value:
            case str():
                return self._mark_text(value)
            case list():
                return [self.mark(item) for item in value]
            case dict():
                return {self.mark(key): self.mark(item) for key, item in value.items()}
        return value

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a marked text, as of one without marks whose marked parts are no control tokens."""
        pieces: list[str] = []
        end = 0
        for index, start, stop in self._find(text.replace(MARK, _VALID_MARK)):
            pieces += (text[end:start], self._names[index])
            end = stop
        named = "".join([*pieces, text[end:]]).replace(MARK, "")
        [encoding] = self._named.encode_batch_fast([named], add_special_tokens=add_special_tokens)
        return [self._ids.get(token_id, token_id) for token_id in encoding.ids]

    def _is_model_making(self, tokens: Mapping[int, AddedToken]) -> bool:
        """Whether the model cuts text into pieces some of which are control tokens."""
        unknown: set[int] = set()
        with contextlib.suppress(Exception):  # of a model that cannot say so
            unknown = {*self._named.encode(_VALID_MARK, add_special_tokens=False).ids}
        for before in ("", "a", "\n"):  # alone a text may begin with a space
            texts = [before + token.content for token in tokens.values()]
            encodings = self._named.encode_batch_fast(texts, add_special_tokens=False)
            if any(i in {*encoding.ids} - unknown for i, encoding in zip(tokens, encodings, strict=True)):
                return True
        return False

    def _find(self, text: str) -> Iterator[tuple[int, int, int]]:
        """Where control tokens are spelled: (which of them, from where, to where). Releases the interpreter lock."""
        [encoding] = self._finder.encode_batch([text], add_special_tokens=False)
        for index, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
            yield index, start, stop

    def _mark_text(self, text: str) -> str:
        if not any(char in text for char in self._first_chars):
            return text
        pieces: list[str] = []
        end = 0
        for _, start, stop in self._find(text):
            # Behind each character, so that no shorter one is left inside.
            pieces += (text[end:start], *(char + MARK for char in text[start:stop]))
            end = stop
        text = "".join([*pieces, text[end:]])
        # A template may take something out of the middle, or make other letters of it.
        if self._starts is not None:
            text = self._starts.sub(lambda found: found[0] + MARK if found[1] else found[0], text)
        # Another text may follow at once, and templates cut spaces off.
        stem = text.rstrip()
        if self._has_beginning(stem):
            text = stem + MARK + text[len(stem) :]
        return text

    def _has_beginning(self, text: str) -> bool:
        """Whether it ends with the beginning of a control token."""
        ending = text[-self._longest :]
        return any(ending[-n:] in self._beginnings for n in range(1, len(ending) + 1))


def _without_added_tokens(backend: BackendTokenizer, model: Any) -> BackendTokenizer:
    """A tokenizer that treats text as `backend` does, and then leaves it to `model`."""
    bare = BackendTokenizer(model)
    for part in ("normalizer", "pre_tokenizer", "post_processor"):
        if (value := getattr(backend, part)) is not None:
            setattr(bare, part, value)
    return bare


def _renamed_pieces(backend: BackendTokenizer, names: Mapping[str, str]) -> Any:
    """The model of `backend` with other names for some of its pieces, which no merge makes any more."""
    described = json.loads(backend.to_str())
    model = described["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(piece, piece): i for piece, i in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
        model["merges"] = [pair for pair in pairs if names.keys().isdisjoint({*pair, "".join(pair)})]
    parts = ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    return BackendTokenizer.from_str(json.dumps(described | dict.fromkeys(parts) | {"added_tokens": []})).model


def _renamed(token: AddedToken, name: str) -> AddedToken:
    flags = {"single_word": token.single_word, "lstrip": token.lstrip, "rstrip": token.rstrip}
    return AddedToken(name, normalized=False, special=True, **flags)
