"""What the fuzzer calls with any bytes, and the tests with a kept corpus: each returns, or fails by whatever it raises.

A target turns its bytes into one input of a part that reads what others wrote, and checks what must hold whatever that
is. Knows neither atheris nor pytest. Format of event streams: WHATWG HTML, "Server-sent events".
"""

import functools
import json
import logging
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from starlette.requests import Request
from tokenizers import AddedToken, Tokenizer as BackendTokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from headrace.scheduler.errors import HeadraceError
from headrace.scheduler.gguf_config import gguf_config
from headrace.scheduler.gguf_file import GGUFFile, open_gguf
from headrace.scheduler.model_source import ModelSource
from headrace.server.answer_parser import make_parser
from headrace.server.answer_parts import ReasoningPart, TextPart, ToolArgumentsPart, ToolCallPart
from headrace.server.detokenizer import Detokenizer
from headrace.server.errors import ApiError
from headrace.server.native_api import StreamChatRequest, StreamCompletionRequest, _params_from_query
from headrace.server.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    GenerationParams,
    parse_json_object,
    parse_request,
)
from headrace.server.sse import HEARTBEAT, data_frame, event_frame, padded, retry_frame, to_json
from headrace.server.tokenizer import _BYTE_OF, Tokenizer, load_tokenizer

_BODIES: tuple[type[GenerationParams], ...] = (
    ChatCompletionRequest,
    CompletionRequest,
    StreamChatRequest,
    StreamCompletionRequest,
)
# A message names what is wrong and may quote a part of it, but is no echo of what was sent.
_MOST_MESSAGE_CHARS = 1000
_NAME = "fuzzed.gguf"
# In memory, where there is such a place.
_FOLDER = "/dev/shm" if Path("/dev/shm").is_dir() else None
# What reading a GGUF may take beside a multiple of its size: a tokenizer's and a config's objects.
_FREE_BYTES = 32 * 2**20
_BYTES_PER_BYTE = 100


def request_parser(data: bytes) -> None:
    """The first byte picks the route, the others are its body or query: a validated request, or ApiError 400."""
    if not data:
        return
    route, body = data[0] % (len(_BODIES) + 1), data[1:]
    if (error := _refusal(route, body)) is not None:
        assert error.status == 400
        assert 0 < len(error.message) <= _MOST_MESSAGE_CHARS, "the message echoes what was sent"
        json.dumps(error.envelope(), ensure_ascii=False).encode()


def _refusal(route: int, body: bytes) -> ApiError | None:
    try:
        if route < len(_BODIES):
            parse_request(_BODIES[route], parse_json_object(body))
        else:
            _params_from_query(Request({"type": "http", "query_string": body, "headers": []}))
    except ApiError as error:
        return error
    return None


def sse_encoder(data: bytes) -> None:
    """The first byte is what kinds of frames there are, the rest is texts with NUL between them: what a browser's
    parser reads is what was written."""
    if not data:
        return
    texts = [_any_text(part) for part in data[1:].split(b"\0")[:50]]
    stream, expected = b"", list[tuple[str, str, str]]()
    last_id = ""
    for i, text in enumerate(texts):
        value: Any = {"text": text, "num_tokens": i}
        kind = (data[0] + i) % 5
        if kind == 0:
            stream += HEARTBEAT + retry_frame(i)
        elif kind == 1:
            stream += data_frame(value)
            expected.append(("message", to_json(value), last_id))
        elif kind == 2:
            frame = padded(data_frame(value), text, 16)
            assert len(frame) < len(data_frame(value)) + 40
            stream += frame
            expected.append(("message", frame[6:-2].decode(), last_id))
        elif kind == 3:
            last_id = f"{i:032x}:{i}"
            stream += event_frame("token", value, id=last_id)
            expected.append(("token", to_json(value), last_id))
        else:
            stream += event_frame("queued", value, id=None)
            expected.append(("queued", to_json(value), last_id))
    events = list(read_events(stream))
    assert events == expected
    assert [json.loads(event[1])["text"] for event in events] == [
        text for i, text in enumerate(texts) if (data[0] + i) % 5
    ]


def read_events(stream: bytes) -> Iterator[tuple[str, str, str]]:
    """(Type, data, last event id) of each event, by the standard's algorithm."""
    text = stream.decode("utf-8", "replace").removeprefix("\ufeff")
    event_type, lines, last_id, pending_id = "", list[str](), "", ""
    for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")[:-1]:
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not line:
            last_id = pending_id
            if lines:
                yield event_type or "message", "\n".join(lines), last_id
            event_type, lines = "", []
        elif field == "event":
            event_type = value
        elif field == "data":
            lines.append(value)
        elif field == "id" and "\0" not in value:
            pending_id = value


def gguf_reader(data: bytes) -> None:
    """A file: what the model's loader and the server read of it, or HeadraceError."""
    with tempfile.TemporaryDirectory(prefix="headrace-fuzz-", dir=_FOLDER) as folder:
        path = Path(folder) / _NAME
        path.write_bytes(data)
        tracemalloc.start()
        try:
            _read_gguf(path)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
            open_gguf.cache_clear()
    assert peak < _FREE_BYTES + _BYTES_PER_BYTE * len(data), f"{peak} bytes for a file of {len(data)}"


def _read_gguf(path: Path) -> None:
    for read in (_read_tensors, lambda path: gguf_config(open_gguf(path)), _read_tokenizer):
        with _refusing():
            read(path)


@contextmanager
def _refusing() -> Iterator[None]:
    """What is refused is refused with the file's name."""
    try:
        yield
    except HeadraceError as error:
        if _NAME not in str(error):
            raise


def _read_tensors(path: Path) -> None:
    file = GGUFFile(path)
    for name in file.names:
        with _refusing(), np.errstate(all="ignore"):  # numbers that are none
            file.num_rows(name)
            file.read_quantised(name)
            file.read(name)


def _read_tokenizer(path: Path) -> None:
    tokenizer = load_tokenizer(ModelSource(path, "fuzzed"))
    for text in ("", " the mill<|im_end|>\n1984 é€😀\0"):
        token_ids = tokenizer.encode(text, add_special_tokens=True)
        tokenizer.decode(token_ids)
        for token_id in token_ids:
            tokenizer.token_bytes(token_id)


def stop_strings(data: bytes) -> None:
    """The first bytes are a vocabulary, `min_tokens` and stop strings, the rest are tokens: what goes out is what a
    search in the whole text finds."""
    if len(data) < 3:
        return
    tokenizer, min_tokens, at = TOKENIZERS[data[0] % 2](), data[1] % 16, 3
    stops = []
    for _ in range(data[2] % 4):
        length = 1 + data[at] % 8 if at < len(data) else 0
        if stop := data[at + 1 : at + 1 + length].decode("utf-8", "replace"):
            stops.append(stop)
        at += 1 + length
    token_ids = [byte % 264 for byte in data[at : at + 100]]
    plain = Detokenizer(tokenizer, ())
    pieces = [*map(plain.push, token_ids), plain.flush()]
    expected, is_stopped = search(pieces, stops, min_tokens)
    assert plain.num_chars == len("".join(pieces))
    detokenizer, out = Detokenizer(tokenizer, tuple(stops), min_tokens), ""
    for token_id in token_ids:
        out += detokenizer.push(token_id)
        assert expected.startswith(out), "what went out is taken back"
        if detokenizer.is_stopped:
            break
    out += detokenizer.flush()
    assert (out, detokenizer.is_stopped) == (expected, is_stopped)
    if data[0] % 2 == 0:
        assert "".join(pieces) == tokenizer.decode(token_ids)


def answer_parser(data: bytes) -> None:
    """The first bytes are a model's format and the length of pieces, the rest is an answer in which bytes from 128 on
    stand for what formats are made of: its parts do not depend on where it is cut, and calls are of given tools."""
    if len(data) < 2:
        return
    tokenizer = _answering(data[0] % len(_ANSWERING), has_special_tokens=bool(data[0] & 64))
    text = "".join(chr(byte) if byte < 128 else _FRAGMENTS[byte % len(_FRAGMENTS)] for byte in data[2:])
    has_begun, length = bool(data[0] & 128), 1 + data[1]
    whole = _parts(tokenizer, [text], has_begun)
    assert _parts(tokenizer, [text[at : at + length] for at in range(0, len(text), length)], has_begun) == whole
    assert all(name in ("f", "g") for kind, name, _ in whole if kind == "call")


def _parts(tokenizer: Tokenizer, pieces: list[str], has_begun: bool) -> list[tuple[str, str, str]]:
    """(Kind, a call's name, text) of each part, put together where it was cut."""
    parser = make_parser(tokenizer, _ASKED, begins_in_reasoning=has_begun)
    read: list[tuple[str, str, str]] = []
    for part in [*(part for piece in pieces for part in parser.push(piece)), *parser.finish()]:
        match part:
            case ToolCallPart(_, _, name):
                read.append(("call", name, ""))
                continue
            case ToolArgumentsPart():
                kind = "call"
                assert read[-1][0] == kind, "arguments follow their call"
            case TextPart():
                kind = "text"
            case ReasoningPart():
                kind = "reasoning"
        assert part.text, "an empty part"
        if read and read[-1][0] == kind:
            _, name, before = read.pop()
            read.append((kind, name, before + part.text))
        else:
            read.append((kind, "", part.text))
    return read


# Templates that say no more than their format.
_ANSWERING = (
    "{{ tools }}<tool_call></think>",
    "{{ tools }}<tool_call>",
    '{{ tools }}ipython "parameters": ',
    "{{ tools }}[TOOL_CALLS]",
    "{{ tools }}[TOOL_CALLS][ARGS][/THINK]",
)
_MARKERS = (
    *("<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
    *("<think>", "</think>", "[THINK]", "[/THINK]"),
)
_FRAGMENTS = (
    *_MARKERS,
    '{"name": "f", "arguments": ',
    '{"name": "g", "parameters": {',
    '{"arguments": {"a": 1}, "name": "',
    '"name"',
    '{"type": "function", ',
    "\\u00e9",
    "}}",
    "é",
)
_ASKED = parse_request(
    ChatCompletionRequest,
    {
        "messages": [{"role": "user", "content": "x"}],
        "tools": [{"type": "function", "function": {"name": name}} for name in "fg"],
    },
)


@functools.cache
def _answering(number: int, *, has_special_tokens: bool) -> Tokenizer:
    backend = BackendTokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    if has_special_tokens:
        backend.add_special_tokens([AddedToken(marker, special=True) for marker in _MARKERS])
    wrapper = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=_ANSWERING[number])
    return Tokenizer(wrapper, frozenset())


def search(pieces: list[str], stops: list[str], min_tokens: int) -> tuple[str, bool]:
    """(The text up to the stop string that is complete first, whether there is one). The last piece is what the end
    brought; a stop string counts where the piece that completes it is at least number `min_tokens`."""
    whole = ""
    for num_tokens, piece in enumerate(pieces, start=1):
        before, whole = len(whole), whole + piece
        starts = [whole.find(stop, max(0, before - len(stop) + 1)) for stop in stops]
        starts = [start for start in starts if start >= 0]
        if starts and min(num_tokens, len(pieces) - 1) >= min_tokens:
            return whole[: min(starts)], True
    return whole, False


def _byte_level() -> Tokenizer:
    """Token i is byte i; beyond are tokens of several letters, and a special one."""
    names = [char for char, _ in sorted(_BYTE_OF.items(), key=lambda pair: pair[1])]
    words = ["ab", "ba", "aab", "abba", "cab", "the", "stop"]
    backend = BackendTokenizer(models.BPE(vocab={name: i for i, name in enumerate([*names, *words])}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|end|>", special=True)])
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend), frozenset())


def _byte_fallback() -> Tokenizer:
    """Llama 2's kind of decoder, in which bytes that are no text come out otherwise in a stream than in the whole."""
    names = [f"<0x{byte:02X}>" if byte > 127 else chr(byte) for byte in range(256)]
    names[ord(" ")] = "▁"
    words = ["▁the", "ab", "ba", "▁▁", "<unk>", "stop", "€", "s▁"]
    vocab = {name: i for i, name in enumerate([*names, *words])}
    backend = BackendTokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend), frozenset())


TOKENIZERS = (functools.cache(_byte_level), functools.cache(_byte_fallback))


def _any_text(data: bytes) -> str:
    """A text of any code points, lone surrogates too."""
    try:
        return data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return data.decode("latin-1")


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target for target in (request_parser, sse_encoder, gguf_reader, stop_strings, answer_parser)
}
CORPUS = Path(__file__).parent / "corpus"
# transformers warns of configs that contradict themselves, once for each.
logging.getLogger("transformers").setLevel(logging.CRITICAL)
