"""Texts to the token ids that a one-shot model takes: a text alone, or a pair of texts.

Loaded once; used by worker threads. The tokenizer is the model directory's own, with the special tokens and the limits
that its files state. It does not know the model.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from headrace.scheduler.errors import ModelSourceError
from headrace.server.errors import BadRequestError, ContextLengthError

# Families that number positions from the padding token's id on, and have none for tokens before it.
_COUNT_FROM_PADDING = frozenset({"camembert", "mpnet", "roberta", "xlm-roberta", "xlm-roberta-xl"})
# Texts tokenized in one call, between which other threads have their turn.
_NUM_AT_ONCE = 64


class TextReader:
    """Reads texts for the model in `path`, of `max_tokens` tokens each at most.

    Raises: ModelSourceError where the directory has no tokenizer that can be used.
    """

    def __init__(self, path: Path) -> None:
        from transformers import AutoTokenizer  # not at the server's start, which needs none

        try:
            wrapper = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
            self._backend = wrapper.backend_tokenizer
            config = json.loads((path / "config.json").read_text())
        except Exception as error:  # a tokenizer's files fail wherever transformers first looks
            raise ModelSourceError(f"{path}: the tokenizer cannot be loaded: {error}") from error
        self._backend.no_truncation()
        self._backend.no_padding()
        self._is_cut_left = wrapper.truncation_side == "left"
        self._special_ids = frozenset(wrapper.all_special_ids)
        self.vocab_size = int(config.get("vocab_size") or self._backend.get_vocab_size(with_added_tokens=True))
        self.max_tokens = _max_tokens(path, config, wrapper)

    def read(self, texts: Sequence[str] | Sequence[Sequence[int]], field: str, *, max_tokens: int | None) -> list[Any]:
        """int64 [L] for each text; token ids are taken as they are. What is longer than `max_tokens` is cut to it,
        with None it is refused.

        Raises: ContextLengthError, also where not even the special tokens fit; BadRequestError for token ids that are
        none.
        """
        rows = []
        for begin in range(0, len(texts), _NUM_AT_ONCE):
            part: Sequence[Any] = texts[begin : begin + _NUM_AT_ONCE]
            strings = [text for text in part if isinstance(text, str)]
            for i, text in enumerate(part):
                if isinstance(text, str):
                    self._check_length(text, f"{field}[{begin + i}]")
            encodings = iter(self._backend.encode_batch_fast(strings, add_special_tokens=True)) if strings else iter(())
            for i, text in enumerate(part):
                place = f"{field}[{begin + i}]"
                if isinstance(text, str):
                    encoding = next(encodings)
                    ids = np.array(encoding.ids, np.int64)[self._kept(encoding, 0, place, max_tokens)]
                else:
                    ids = np.array(self._cut_ids(text, place, max_tokens), np.int64)
                if not len(ids):
                    raise BadRequestError(f"{place}: is empty", param=field)
                if ids.max() >= self.vocab_size:
                    raise BadRequestError(f"{place}: token ids must be below {self.vocab_size}", param=field)
                rows.append(ids)
        return rows

    def read_pairs(self, pairs: Sequence[tuple[str, str]], field: str, *, max_tokens: int | None) -> list[Any]:
        """int64 [2, L] for each pair: token ids and token type ids. What is longer than `max_tokens` has its second
        text cut, with None it is refused.

        Raises: ContextLengthError, also where the first text alone is too long.
        """
        arrays = []
        for begin in range(0, len(pairs), _NUM_AT_ONCE):
            part = pairs[begin : begin + _NUM_AT_ONCE]
            for i, (first, second) in enumerate(part):
                self._check_length(first, f"{field}[{begin + i}]")
                self._check_length(second, f"{field}[{begin + i}]")
            for i, encoding in enumerate(self._backend.encode_batch(part, add_special_tokens=True)):
                kept = self._kept(encoding, 1, f"{field}[{begin + i}]", max_tokens)
                arrays.append(np.array([encoding.ids, encoding.type_ids], np.int64)[:, kept])
        return arrays

    def _kept(self, encoding: Any, sequence: int, place: str, max_tokens: int | None) -> list[int] | slice:
        """Which of a text's tokens, or of a pair's, stay when the text numbered `sequence` is cut: never a special one,
        and of a pair's second text at least one."""
        limit = min(self.max_tokens, max_tokens or self.max_tokens)
        num_over = len(encoding.ids) - limit
        if num_over <= 0:
            return slice(None)
        places = [at for at, of in enumerate(encoding.sequence_ids) if of == sequence]
        if max_tokens is None or len(places) < num_over + sequence:
            raise self._too_long(place, len(encoding.ids), limit)
        dropped = set(places[:num_over] if self._is_cut_left else places[-num_over:])
        return [at for at in range(len(encoding.ids)) if at not in dropped]

    def _cut_ids(self, ids: Sequence[int], place: str, max_tokens: int | None) -> Sequence[int]:
        """Token ids with what special ones they end with, cut before these."""
        limit = min(self.max_tokens, max_tokens or self.max_tokens)
        if len(ids) <= limit:
            return ids
        if max_tokens is None:
            raise self._too_long(place, len(ids), limit)
        num_closing = 0
        while num_closing < limit - 1 and ids[-1 - num_closing] in self._special_ids:
            num_closing += 1
        return [*ids[: limit - num_closing], *ids[len(ids) - num_closing :]]

    def _check_length(self, text: str, place: str) -> None:
        """A text that cannot fit, however it is tokenized and cut, is not tokenized."""
        limit = 64 * self.max_tokens
        if len(text) > max(limit, 2**20):
            raise ContextLengthError(f"{place}: {len(text)} characters are too many", param=place.partition("[")[0])

    def _too_long(self, place: str, num_tokens: int, limit: int) -> ContextLengthError:
        return ContextLengthError(
            f"{place}: {num_tokens} tokens are more than the model's {limit}; see truncate_prompt_tokens",
            param=place.partition("[")[0],
        )


def _max_tokens(path: Path, config: dict[str, Any], wrapper: Any) -> int:
    """The shortest of what the directory's files allow."""
    num_positions = config.get("max_position_embeddings")
    if num_positions is not None and config.get("model_type") in _COUNT_FROM_PADDING:
        num_positions -= config.get("pad_token_id", 1) + 1
    limits = [wrapper.model_max_length, num_positions]
    if (card := path / "sentence_bert_config.json").is_file():
        limits.append(json.loads(card.read_text()).get("max_seq_length"))
    known = [int(limit) for limit in limits if limit is not None and 0 < limit < 2**31]
    if not known:
        raise ModelSourceError(f"{path}: no file says how many tokens the model takes")
    return min(known)
