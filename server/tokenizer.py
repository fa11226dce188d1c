"""Text to token ids and back, and the chat template, for a model of either form.

Loaded once; used by worker threads (templates, encoding) and the event loop (decoding, which is cheap). Hugging Face's
`tokenizers` does the work. Its wrapper's encode keeps truncation state that threads would share, so the wrapper only
renders templates, and the bare tokenizer encodes.

Control tokens that a text spells (`<|im_start|>`) become control tokens, as with Hugging Face's own default, but inside
of messages they stay text unless asked otherwise.
"""

import contextlib
import json
import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from tokenizers import Tokenizer as BackendTokenizer, models
from tokenizers.decoders import DecodeStream

from headrace.scheduler.errors import HeadraceError, ModelSourceError, UnsupportedModelError
from headrace.scheduler.gguf_file import GGUFFile, open_gguf
from headrace.scheduler.grammar import GrammarCompiler
from headrace.scheduler.model_source import ModelSource
from headrace.server.control_tokens import MARK, ControlTokens
from headrace.server.errors import BadRequestError
from headrace.server.gguf_tokenizer import read_tokenizer

# SentencePiece's sign for a space, and how it spells a byte that is no piece of its own.
_METASPACE = "\u2581"
_BYTE_FALLBACK = re.compile("<0x([0-9A-F]{2})>")
# Byte-level vocabularies write bytes as characters: those that are visible as they stand, the others from 256 on.
_VISIBLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
_BYTE_OF = {chr(byte): byte for byte in _VISIBLE}
_BYTE_OF |= {chr(256 + i): byte for i, byte in enumerate(b for b in range(256) if b not in _VISIBLE)}
_MAX_REFUSAL_CHARS = 500  # of a template's, which may quote the whole conversation
_USER, _ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
# Where a message of each role can stand: before it and after it.
_AROUND: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {
    "system": ([], [_USER]),
    "user": ([], []),
    "assistant": ([_USER], [_USER]),
}


class ReasoningMarkers(NamedTuple):
    opening: str
    closing: str


REASONING_MARKERS = (ReasoningMarkers("<think>", "</think>"), ReasoningMarkers("[THINK]", "[/THINK]"))


class Tokenizer:
    """A model's tokenizer. `eos_token_ids` are the tokens that end an answer, `special_token_ids` those that decoding
    can skip. Control tokens that messages spell are text unless it `keeps_control_tokens`."""

    def __init__(
        self,
        wrapper: Any,
        eos_token_ids: frozenset[int],
        backend: BackendTokenizer | None = None,
        *,
        keeps_control_tokens: bool = False,
    ) -> None:
        self._wrapper = wrapper
        self._keeps_control_tokens = keeps_control_tokens
        self._backend: BackendTokenizer = wrapper.backend_tokenizer if backend is None else backend
        self._backend.no_truncation()
        self._backend.no_padding()
        added_tokens = self._backend.get_added_tokens_decoder()
        self._added_tokens = frozenset(added_tokens)
        self._special_tokens = {token.content: i for i, token in added_tokens.items() if token.special}
        self.special_token_ids = frozenset(self._special_tokens.values())
        self._is_byte_level = "ByteLevel" in repr(self._backend.decoder)
        self.eos_token_ids = eos_token_ids
        # No text of more characters than this per token fits; a normalizer may shorten text, so then there is no bound.
        has_bound = self._backend.normalizer is None
        self.max_chars_per_token = max(map(len, self._backend.get_vocab())) if has_bound else None

    @property
    def has_chat_template(self) -> bool:
        return bool(self._wrapper.chat_template)

    def chat_template(self, *, has_tools: bool = False) -> str:
        """The template of a chat, which may be another with tools; "" where there is none."""
        templates = self._wrapper.chat_template or ""
        if isinstance(templates, dict):
            return str(templates.get("tool_use" if has_tools else "default") or templates.get("default", ""))
        return str(templates)

    def special_token_id(self, text: str) -> int | None:
        """The special token that is written so, None where there is none."""
        return self._special_tokens.get(text)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of `text`, which may be a chat's. Releases the interpreter lock, so worker threads run beside the
        loop."""
        if MARK in text:
            return self._control_tokens.encode(text, add_special_tokens=add_special_tokens)
        [encoding] = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return encoding.ids

    def render_chat(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        *,
        variables: Mapping[str, Any] = MappingProxyType({}),
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> str:
        """The prompt text of a conversation, for `encode`: ready for the assistant's answer, or, without a generation
        prompt, as it is; a final message that is continued is left open. It tells of `tools` if there are any;
        `variables` are the template's own.

        Control tokens that messages, tools and variables spell are marked, unless they are kept. A message's content, a
        text or a list of parts, becomes what the template takes.

        Raises: BadRequestError where the template refuses the messages or the model has none.
        """
        if not self.has_chat_template:
            raise BadRequestError("this model has no chat template; use /v1/completions", param="messages")
        try:
            messages = [message | {"content": self._content(message)} for message in messages]
            if not self._keeps_control_tokens:
                mark = self._control_tokens.mark
                messages, variables, tools = mark(messages), mark(dict(variables)), mark(tools)
            # SmolLM3's template has a name of its own for them.
            told = {"tools": tools, "xml_tools": tools} if tools else {}
            text = self._render(
                messages,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **variables,
                **told,
            )
            is_unmarked = not self._keeps_control_tokens and self._control_tokens.may_be_unmarked
            return text + MARK if is_unmarked else text
        except Exception as error:  # a template is a program, and fails as it likes
            reason = str(error).replace(MARK, "")[:_MAX_REFUSAL_CHARS]
            raise BadRequestError(f"the chat template refuses these messages: {reason}", param="messages") from error

    def _render(self, messages: list[dict[str, Any]], **options: Any) -> str:
        """Raises: anything."""
        return self._wrapper.apply_chat_template(messages, tokenize=False, **options)  # type: ignore[no-any-return]

    def _content(self, message: Mapping[str, Any]) -> Any:
        """A message's content in a form that the template takes, its own if possible. HF leaves that to the caller."""
        content, forms = message["content"], self._content_forms.get(message["role"], frozenset())
        if isinstance(content, list) and list not in forms:
            return text_of(content)
        if isinstance(content, str) and forms == {list}:
            return [{"type": "text", "text": content}]
        return content

    @cached_property
    def _content_forms(self) -> dict[str, frozenset[type]]:
        """As what the template takes the content of each role's messages: whose text comes out whole, and nothing else
        of it."""
        key = "not text"
        parts = [{"type": "text", "text": word, key: 1} for word in ("first", "second")]
        forms: dict[str, set[type]] = {}
        for role, (before, after) in _AROUND.items():
            forms[role] = set()
            for content in (parts, "first second"):
                with contextlib.suppress(Exception):
                    text = self._render([*before, {"role": role, "content": content}, *after])
                    if "first" in text and "second" in text and key not in text:
                        forms[role].add(type(content))
        return {role: frozenset(found) for role, found in forms.items()}

    @cached_property
    def _control_tokens(self) -> ControlTokens:
        """The special tokens, and others that the template writes around the turns of any conversation."""
        chat = [{"role": "system", "content": "c"}, _USER, _ASSISTANT, _USER]
        text = ""
        for messages in (chat, chat[1:]):  # of models without system messages too
            with contextlib.suppress(Exception):
                text = text or self._render(messages)
        added = self._backend.get_added_tokens_decoder()
        # Templates write some around turns without reasoning too, and look for them in answers.
        not_turns = {"", *chain.from_iterable(REASONING_MARKERS)}
        ids = self.encode(text, add_special_tokens=False)
        written = {i for i in ids if i in added and added[i].content.strip() not in not_turns}
        return ControlTokens(self._backend, self.special_token_ids | written, self._template_words())

    def _template_words(self) -> set[str]:
        """The texts that stand in quotes in the template's code."""
        from jinja2 import Environment

        templates = self._wrapper.chat_template or ""
        words: set[str] = set()
        for source in templates.values() if isinstance(templates, dict) else [templates]:
            with contextlib.suppress(Exception):  # of what is no template, which is said elsewhere
                words |= {
                    token.value
                    for token in Environment(autoescape=True).lexer.tokenize(source)
                    if token.type == "string"
                }
        return {word for word in words if len(word) > 1}

    def compile_chat_template(self) -> None:
        """Compile the template and try it, so that the first chat need not. Raises: ValueError where it is no
        template."""
        try:
            self.render_chat([{"role": "user", "content": ""}])
        except BadRequestError as error:  # which may be what a template thinks of this chat
            from jinja2 import TemplateSyntaxError  # not at the server's start, which needs no template

            if isinstance(cause := error.__cause__, TemplateSyntaxError):
                raise ValueError(f"the chat template's line {cause.lineno}: {cause.message}") from None

    def token_texts(self, token_ids: Iterable[int]) -> list[str]:
        """Each token as the vocabulary spells it; "" for an id that has no token."""
        return [self._backend.id_to_token(token_id) or "" for token_id in token_ids]

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = True) -> str:
        return self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for, which may be a part of a character; none for an id that has no token."""
        piece = self._backend.id_to_token(token_id) or ""
        if self._is_byte_level:
            # A token with any other character stands for itself, as one that was added does.
            is_bytes = token_id not in self._added_tokens and all(c in _BYTE_OF for c in piece)
            return bytes(_BYTE_OF[c] for c in piece) if is_bytes else piece.encode()
        if (byte := _BYTE_FALLBACK.fullmatch(piece)) is not None:
            return bytes.fromhex(byte[1])
        return piece.replace(_METASPACE, " ").encode()

    def grammar_compiler(self, vocab_size: int) -> GrammarCompiler:
        """What compiles grammars for a model of so many tokens. Raises: GrammarError where nothing ends an answer."""
        eos_token_ids = frozenset(token_id for token_id in self.eos_token_ids if 0 <= token_id < vocab_size)
        return GrammarCompiler(self._backend.to_str(), vocab_size, eos_token_ids)

    def decode_step(self, stream: DecodeStream, token_id: int) -> str:
        """The text that `token_id` completes; empty while a character is unfinished.

        Raises: a bare Exception, from the library, where bytes that are no text follow text.
        """
        return stream.step(self._backend, token_id) or ""


def text_of(content: str | list[dict[str, Any]]) -> str:
    """A message's content as one text."""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def load_tokenizer(source: ModelSource, *, keeps_control_tokens: bool = False) -> Tokenizer:
    """Read a model's tokenizer. Raises: ModelSourceError, UnsupportedModelError."""
    try:
        if source.is_gguf:
            tokenizer = _from_gguf(open_gguf(source.path), keeps_control_tokens)
        else:
            tokenizer = _from_directory(source.path, keeps_control_tokens)
        tokenizer.compile_chat_template()
        return tokenizer
    except HeadraceError:
        raise
    except Exception as error:  # the libraries that parse it raise anything, a bare Exception too
        hint = "; code that comes with a model is never run" if "custom code" in str(error) else ""
        raise ModelSourceError(f"{source.path}: the tokenizer cannot be read{hint}: {error}") from error


def _from_directory(folder: Path, keeps_control_tokens: bool) -> Tokenizer:
    # transformers imports torch, which the server's start must not wait for.
    from transformers import AutoTokenizer

    wrapper = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if not hasattr(wrapper, "backend_tokenizer"):
        raise UnsupportedModelError(f"{folder}: the model has no fast tokenizer")
    # For some families transformers makes up a tokenizer of special tokens where there is none.
    added_tokens = {token.content for token in wrapper.backend_tokenizer.get_added_tokens_decoder().values()}
    if added_tokens.issuperset(wrapper.backend_tokenizer.get_vocab()):
        raise ModelSourceError(f"{folder} has no tokenizer: tokenizer.json or the files it is made from are missing")
    # As `generate()` has it: the generation config's ids, else the model config's, else the tokenizer's.
    eos = wrapper.eos_token_id
    for name in ("config.json", "generation_config.json"):
        if (folder / name).is_file():
            stated = json.loads((folder / name).read_text()).get("eos_token_id")
            eos = eos if stated is None else stated
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(isinstance(token_id, int) for token_id in ids):
        raise ModelSourceError(f"{folder}: eos_token_id is {eos!r}, which is no token's id")
    tokenizer = Tokenizer(wrapper, frozenset(ids), keeps_control_tokens=keeps_control_tokens)
    # Llama's end of a message that waits for a call's result, which not every copy of its configs has.
    if (eom := tokenizer.special_token_id("<|eom_id|>")) is not None:
        tokenizer.eos_token_ids |= {eom}
    return tokenizer


def _from_gguf(file: GGUFFile, keeps_control_tokens: bool) -> Tokenizer:
    from transformers import PreTrainedTokenizerFast

    described = read_tokenizer(file)
    # The wrapper would copy the backend, which takes longer than all else here; it only renders the template.
    wrapper = PreTrainedTokenizerFast(
        tokenizer_object=BackendTokenizer(models.BPE()),
        chat_template=file.get("tokenizer.chat_template"),
        **described.special_tokens,
    )
    ends, backend = described.eos_token_ids, described.backend
    return Tokenizer(wrapper, ends, backend, keeps_control_tokens=keeps_control_tokens)
