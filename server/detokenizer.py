"""One request's tokens to text: whole characters only, and never past a stop string.

Lives on the event loop; one per request. Text that could be the beginning of a stop string is held back until the next
tokens decide.
"""

from tokenizers.decoders import DecodeStream

from headrace.server.tokenizer import Tokenizer


class Detokenizer:
    """Feed it token ids with `push`, then `flush` once the sequence has ended.

    A token that ends the sequence (end of sequence, a stop token) is no part of its text and is not pushed.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: tuple[str, ...], min_tokens: int = 0, skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._skip_special_tokens = skip_special_tokens
        self._stop = stop
        self._min_tokens = min_tokens
        self._token_ids: list[int] = []
        self._num_decoded_chars = 0
        self._held = ""
        self.is_stopped = False

    def push(self, token_id: int) -> str:
        """The text that may go out now. `is_stopped` is set once a stop string is complete: nothing follows it."""
        assert not self.is_stopped, "push after a stop string"
        self._token_ids.append(token_id)
        text = self._tokenizer.decode_step(self._stream, token_id)
        self._num_decoded_chars += len(text)
        return self._pass_on(text)

    def flush(self) -> str:
        """What is left at the end: an unfinished character, as U+FFFD, and text held back for a stop string."""
        if self.is_stopped:
            return ""
        whole = self._tokenizer.decode(self._token_ids, skip_special_tokens=self._skip_special_tokens)
        text = self._pass_on(whole[self._num_decoded_chars :])
        if self.is_stopped:
            return text
        held, self._held = self._held, ""
        return text + held

    def _pass_on(self, text: str) -> str:
        if not self._stop:
            return text
        text = self._held + text
        if len(self._token_ids) >= self._min_tokens:
            found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
            if found:
                self.is_stopped = True
                return text[: min(found)]
        num_held = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that a longer `stop` begins with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[len(text) - length :]):
            return length
    return 0
