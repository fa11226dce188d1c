"""Control tokens that the text of a message spells: they stay text, so that no message can forge a turn.

Used by worker threads; no state. Before a template renders messages, all that could become a control token in them is
marked, by half of a surrogate pair, which no JSON body can hold: what is spelled without marks afterwards is the
template's. To encode it, the template's control tokens get names that nobody can guess, and the marks go. A second
tokenizer over the same model knows control tokens by these names alone and encodes the whole text in one go, cut where
it would be cut otherwise. It does not know templates.
"""

import secrets
from collections.abc import Iterable
from typing import Any

from tokenizers import AddedToken, Tokenizer as BackendTokenizer, models

MARK = "\ud800"
# Stands for a mark where text must be valid, as no part of a token and no space.
_VALID_MARK = "\ufffe"


class ControlTokens:
    """The tokens with `ids`, of those that were added to the vocabulary of `backend`."""

    def __init__(self, backend: BackendTokenizer, ids: Iterable[int]) -> None:
        added = backend.get_added_tokens_decoder()
        # One of a single character would be all text's.
        self._texts = {i: added[i].content for i in ids if len(added[i].content) > 1}
        self._first_chars = {text[0] for text in self._texts.values()}
        self._beginnings = frozenset(text[:n] for text in self._texts.values() for n in range(1, len(text)))
        self._longest = max(map(len, self._texts.values()), default=0)

        # Of a model without a vocabulary nothing is left but added tokens.
        self._finder = BackendTokenizer(models.BPE())
        self._named = BackendTokenizer(backend.model)
        if backend.normalizer is not None:
            self._finder.normalizer = self._named.normalizer = backend.normalizer
        for part in ("pre_tokenizer", "post_processor"):
            if (value := getattr(backend, part)) is not None:
                setattr(self._named, part, value)
        self._finder.add_tokens(list(added.values()))
        self._found = {self._finder.token_to_id(text): i for i, text in self._texts.items()}
        nonce = secrets.token_hex(16)
        self._names = {i: f"<{nonce}:{i}>" for i in self._texts}
        # New tokens are numbered behind all that there are: filled up, so that no number means two tokens.
        num_missing = max(0, max(added, default=0) + 1 - self._named.get_vocab_size())
        tokens = [AddedToken(f"<{nonce}:filler {n}>") for n in range(num_missing)]
        tokens += [AddedToken(name, special=True, normalized=False) for name in self._names.values()]
        others = {i: token for i, token in added.items() if i not in self._texts}
        self._named.add_tokens(tokens + list(others.values()))
        spelled = self._names | {i: token.content for i, token in others.items()}
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
        valid = text.replace(MARK, _VALID_MARK)
        [encoding] = self._finder.encode_batch([valid], add_special_tokens=False)
        pieces: list[str] = []
        end = 0
        for found_id, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
            if found_id in self._found:
                pieces += (text[end:start], self._names[self._found[found_id]])
                end = stop
        pieces.append(text[end:])
        named = "".join(pieces).replace(MARK, "")
        [encoding] = self._named.encode_batch_fast([named], add_special_tokens=add_special_tokens)
        return [self._ids.get(token_id, token_id) for token_id in encoding.ids]

    def _mark_text(self, text: str) -> str:
        if not any(char in text for char in self._first_chars):
            return text
        for token in self._texts.values():
            if token in text:
                text = text.replace(token, token[0] + MARK + token[1:] + MARK)
        # Another text may follow at once, and templates cut spaces off.
        stem = text.rstrip()
        ending = stem[-self._longest :]
        if any(ending[-n:] in self._beginnings for n in range(1, len(ending) + 1)):
            text = stem + MARK + text[len(stem) :]
        return text
