"""One request's tokens to text: whole characters only, and never past a stop string.

Lives on the event loop; one per request. Text that could be the beginning of a stop string is held back until the next
tokens decide.
"""

from tokenizers.decoders import DecodeStream

from headrace.server.tokenizer import Tokenizer


class Detokenizer:
    """Feed it token ids with `push`, then `flush` once the sequence has ended.

    A token that ends the sequence (end of sequence, a stop token) is no part of its text and is not pushed. Where
    special tokens are skipped, those of `kept_token_ids` are not.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: tuple[str, ...],
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
        kept_token_ids: tuple[int, ...] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped: frozenset[int] = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        if kept_token_ids:
            self._skipped = self._skipped.difference(kept_token_ids)
        self._stream = DecodeStream(skip_special_tokens=False)
        self._pending: list[int] = []  # tokens whose text has not come out yet
        self._stop = stop
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self.num_chars = 0  # of all that came out of the tokens, held back or not
        self._held = ""
        self.stop_string: str | None = None  # the one that is complete

    @property
    def is_stopped(self) -> bool:
        return self.stop_string is not None

    def push(self, token_id: int) -> str:
        """The text that may go out now. `is_stopped` is set once a stop string is complete: nothing follows it."""
        assert not self.is_stopped, "push after a stop string"
        self._num_tokens += 1
        if token_id in self._skipped:
            return self._pass_on("")
        self._pending.append(token_id)
        try:
            text = self._tokenizer.decode_step(self._stream, token_id)
        except Exception:
            # Where a whole decode writes U+FFFD for stray bytes, the stream gives up: write it and begin anew.
            text = self._tokenizer.decode(self._pending, skip_special_tokens=False)
            self._stream = DecodeStream(skip_special_tokens=False)
        if text:
            self._pending.clear()
        return self._pass_on(text)

    def flush(self) -> str:
        """What is left at the end: an unfinished character, as U+FFFD, and text held back for a stop string."""
        if self.is_stopped:
            return ""
        pending, self._pending = self._pending, []
        text = self._pass_on(self._tokenizer.decode(pending, skip_special_tokens=False))
        if self.is_stopped:
            return text
        held, self._held = self._held, ""
        return text + held

    def _pass_on(self, text: str) -> str:
        self.num_chars += len(text)
        if not self._stop:
            return text
        num_old, text = len(self._held), self._held + text
        if self._num_tokens >= self._min_tokens:
            # One that was complete before `min_tokens` is text for good: what ends in the held part is no stop string.
            starts = ((text.find(stop, max(num_old - len(stop) + 1, 0)), stop) for stop in self._stop)
            found = [start for start in starts if start[0] >= 0]
            if found:
                at, self.stop_string = min(found, key=lambda start: start[0])
                return text[:at]
        num_held = max(overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]


def overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that a longer `stop` begins with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[len(text) - length :]):
            return length
    return 0
