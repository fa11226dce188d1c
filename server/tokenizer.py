"""Text to token ids and back, and the chat template, for a model of either form.

Loaded once; used by worker threads (templates, encoding) and the event loop (decoding, which is cheap). Hugging Face's
`tokenizers` does the work. Its wrapper's encode keeps truncation state that threads would share, so the wrapper only
renders templates, and the bare tokenizer encodes.

Control tokens in a user's text (`<|im_start|>`) become control tokens, as with Hugging Face's own default.
"""

import json
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError
from tokenizers import Tokenizer as BackendTokenizer, models
from tokenizers.decoders import DecodeStream

from headrace.scheduler.errors import HeadraceError, ModelSourceError, UnsupportedModelError
from headrace.scheduler.gguf_file import GGUFFile, open_gguf
from headrace.scheduler.model_source import ModelSource
from headrace.server.errors import BadRequestError
from headrace.server.gguf_tokenizer import read_tokenizer


class Tokenizer:
    """A model's tokenizer. `eos_token_ids` are the tokens that end an answer."""

    def __init__(self, wrapper: Any, eos_token_ids: frozenset[int], backend: BackendTokenizer | None = None) -> None:
        self._wrapper = wrapper
        self._backend: BackendTokenizer = wrapper.backend_tokenizer if backend is None else backend
        self._backend.no_truncation()
        self._backend.no_padding()
        self.eos_token_ids = eos_token_ids
        # No text of more characters than this per token fits; a normalizer may shorten text, so then there is no bound.
        has_bound = self._backend.normalizer is None
        self.max_chars_per_token = max(map(len, self._backend.get_vocab())) if has_bound else None

    @property
    def has_chat_template(self) -> bool:
        return bool(self._wrapper.chat_template)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of `text`. Releases the interpreter lock, so worker threads run beside the loop."""
        [encoding] = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return encoding.ids

    def render_chat(self, messages: list[dict[str, Any]]) -> str:
        """The prompt text of a conversation, ready for the assistant's answer.

        Raises: BadRequestError where the template refuses the messages or the model has none.
        """
        if not self.has_chat_template:
            raise BadRequestError("this model has no chat template; use /v1/completions", param="messages")
        try:
            return self._wrapper.apply_chat_template(  # type: ignore[no-any-return]
                messages, tokenize=False, add_generation_prompt=True
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise BadRequestError(f"the chat template refuses these messages: {error}", param="messages") from error

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = True) -> str:
        return self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def decode_step(self, stream: DecodeStream, token_id: int) -> str:
        """The text that `token_id` completes; empty while a character is unfinished.

        Raises: a bare Exception, from the library, where bytes that are no text follow text.
        """
        return stream.step(self._backend, token_id) or ""


def load_tokenizer(source: ModelSource) -> Tokenizer:
    """Read a model's tokenizer. Raises: ModelSourceError, UnsupportedModelError."""
    try:
        return _from_gguf(open_gguf(source.path)) if source.is_gguf else _from_directory(source.path)
    except HeadraceError:
        raise
    except Exception as error:  # the libraries that parse it raise anything, a bare Exception too
        raise ModelSourceError(f"{source.path}: the tokenizer cannot be read: {error}") from error


def _from_directory(folder: Path) -> Tokenizer:
    # transformers imports torch, which the server's start must not wait for.
    from transformers import AutoTokenizer

    wrapper = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if not hasattr(wrapper, "backend_tokenizer"):
        raise UnsupportedModelError(f"{folder}: the model has no fast tokenizer")
    # As `generate()` has it: the generation config's ids, else the model config's, else the tokenizer's.
    eos = wrapper.eos_token_id
    for name in ("config.json", "generation_config.json"):
        if (folder / name).is_file():
            stated = json.loads((folder / name).read_text()).get("eos_token_id")
            eos = eos if stated is None else stated
    return Tokenizer(wrapper, _as_set(eos))


def _from_gguf(file: GGUFFile) -> Tokenizer:
    from transformers import PreTrainedTokenizerFast

    described = read_tokenizer(file)
    # The wrapper would copy the backend, which takes longer than all else here; it only renders the template.
    wrapper = PreTrainedTokenizerFast(
        tokenizer_object=BackendTokenizer(models.BPE()),
        chat_template=file.get("tokenizer.chat_template"),
        **described.special_tokens,
    )
    return Tokenizer(wrapper, described.eos_token_ids, described.backend)


def _as_set(eos: int | list[int] | None) -> frozenset[int]:
    if eos is None:
        return frozenset()
    return frozenset(eos) if isinstance(eos, list) else frozenset({eos})
