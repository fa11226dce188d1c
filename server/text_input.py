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
        self.vocab_size = int(config.get("vocab_size") or self._backend.get_vocab_size(with_added_tokens=True))
        self.max_tokens = _max_tokens(path, config, wrapper)

    def read(self, texts: Sequence[str] | Sequence[Sequence[int]], field: str, *, max_tokens: int | None) -> list[Any]:
        """int64 [L] for each text; token ids are taken as they are. What is longer than `max_tokens` is cut to it,
        with None it is refused.

        Raises: ContextLengthError; BadRequestError for token ids that are none.
        """
        rows = []
        for begin in range(0, len(texts), _NUM_AT_ONCE):
            part = texts[begin : begin + _NUM_AT_ONCE]
            strings = [text for text in part if isinstance(text, str)]
            for i, text in enumerate(part):
                if isinstance(text, str):
                    self._check_length(text, f"{field}[{begin + i}]")
            encodings = iter(self._backend.encode_batch_fast(strings, add_special_tokens=True)) if strings else iter(())
            rows += [next(encodings).ids if isinstance(text, str) else list(text) for text in part]
        arrays = []
        for i, row in enumerate(rows):
            ids = np.array(self._cut(row, f"{field}[{i}]", max_tokens), np.int64)
            if not len(ids):
                raise BadRequestError(f"{field}[{i}]: is empty", param=field)
            if ids.max() >= self.vocab_size:
                raise BadRequestError(f"{field}[{i}]: token ids must be below {self.vocab_size}", param=field)
            arrays.append(ids)
        return arrays

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
                ids, types = list(encoding.ids), list(encoding.type_ids)
                limit = min(self.max_tokens, max_tokens or self.max_tokens)
                num_over = len(ids) - limit
                if num_over > 0:
                    # Its last tokens are special ones, and before them come the second text's.
                    places = [at for at, sequence in enumerate(encoding.sequence_ids) if sequence == 1]
                    if max_tokens is None or len(places) <= num_over:
                        raise self._too_long(f"{field}[{begin + i}]", len(ids), limit)
                    dropped = set(places[-num_over:])
                    ids = [token_id for at, token_id in enumerate(ids) if at not in dropped]
                    types = [type_id for at, type_id in enumerate(types) if at not in dropped]
                arrays.append(np.array([ids, types], np.int64))
        return arrays

    def _cut(self, ids: list[int], place: str, max_tokens: int | None) -> list[int]:
        limit = min(self.max_tokens, max_tokens or self.max_tokens)
        if len(ids) <= limit:
            return ids
        if max_tokens is None:
            raise self._too_long(place, len(ids), limit)
        num_closing = 0
        special = {token_id for token_id, token in self._backend.get_added_tokens_decoder().items() if token.special}
        while num_closing < limit - 1 and ids[-1 - num_closing] in special:
            num_closing += 1
        return ids[: limit - num_closing] + ids[len(ids) - num_closing :]

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
    limits = [wrapper.model_max_length, config.get("max_position_embeddings")]
    if (card := path / "sentence_bert_config.json").is_file():
        limits.append(json.loads(card.read_text()).get("max_seq_length"))
    known = [int(limit) for limit in limits if limit is not None and 0 < limit < 2**31]
    if not known:
        raise ModelSourceError(f"{path}: no file says how many tokens the model takes")
    return min(known)
