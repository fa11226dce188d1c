"""What nobody should send, one line per case: the bytes, what answers them, and how much memory they may cost.

A case's request is made when it is asked for, since some are large. `CANARY` is in every prompt and many names, so that
a log that holds what a client sent can be told. Knows nothing of how the cases are sent.
"""

import gzip
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

CANARY = "canary-5f3a9c"

Fields = dict[str, Any] | Callable[[], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class BadInput:
    """`statuses` are those of the answers; where there are none the client leaves once it has sent everything. `param`
    and `code` are the last answer's."""

    name: str
    request: Callable[[], bytes]
    statuses: tuple[int, ...]
    param: str | None = None
    code: str | None = None
    most_mib: int = 16


def raw_request(
    method: str, target: str, body: bytes = b"", *headers: str, length: int | None = None, host: str = "127.0.0.1"
) -> bytes:
    """A request that asks for the connection to be closed; of `headers` each is a whole line."""
    lines = [f"{method} {target} HTTP/1.1", f"host: {host}", "connection: close", *headers]
    if method == "POST":
        lines.append(f"content-length: {len(body) if length is None else length}")
        if not any(line.lower().startswith("content-type") for line in headers):
            lines.append("content-type: application/json")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def _post(path: str, fields: Fields) -> Callable[[], bytes]:
    return lambda: raw_request("POST", path, json.dumps(fields() if callable(fields) else fields).encode())


def _text(path: str, text: Callable[[], str | bytes]) -> Callable[[], bytes]:
    def request() -> bytes:
        body = text()
        return raw_request("POST", path, body if isinstance(body, bytes) else body.encode())

    return request


def _param_of(fields: Fields) -> str:
    return "" if callable(fields) else next(iter(fields))


def completion(name: str, fields: Fields, param: str | None = None, status: int = 400, **more: Any) -> BadInput:
    """A completion with these fields, which is refused for the first of them unless `param` is another."""
    base = {"prompt": CANARY, "max_tokens": 2, "temperature": 0}
    own = (lambda: base | fields()) if callable(fields) else base | fields
    named = param or _param_of(fields) or None if status == 400 else param
    return BadInput(f"completion: {name}", _post("/v1/completions", own), (status,), named, **more)


def chat(name: str, fields: Fields, param: str | None = None, status: int = 400, **more: Any) -> BadInput:
    """The same of a chat."""
    base = {"messages": [{"role": "user", "content": CANARY}], "max_tokens": 2, "temperature": 0}
    own = (lambda: base | fields()) if callable(fields) else base | fields
    named = param or _param_of(fields) or None if status == 400 else param
    return BadInput(f"chat: {name}", _post("/v1/chat/completions", own), (status,), named, **more)


def message(name: str, fields: Fields, param: str, **more: Any) -> BadInput:
    """A chat whose one message has these fields."""
    own = (lambda: {"messages": [fields()]}) if callable(fields) else {"messages": [fields]}
    return chat(f"message: {name}", own, param, **more)


def anthropic(name: str, fields: Fields, param: str | None = None, status: int = 400, **more: Any) -> BadInput:
    """The same of a message of Anthropic's."""
    base = {"messages": [{"role": "user", "content": CANARY}], "max_tokens": 2, "temperature": 0}
    own = (lambda: base | fields()) if callable(fields) else base | fields
    named = param or _param_of(fields) or None if status == 400 else param
    return BadInput(f"anthropic: {name}", _post("/v1/messages", own), (status,), named, **more)


def blocks(name: str, block: Any, field: str, role: str = "user") -> BadInput:
    """A message of Anthropic's with this block, at fault for a field of it."""
    fields = {"messages": [{"role": role, "content": [block]}]}
    return anthropic(f"block: {name}", fields, f"messages[0].content[0].{field}")


def ollama(name: str, fields: Fields, param: str | None = None, status: int = 400, **more: Any) -> BadInput:
    """The same of a chat of Ollama's."""
    base = {"messages": [{"role": "user", "content": CANARY}], "options": {"num_predict": 2}, "stream": False}
    own = (lambda: base | fields()) if callable(fields) else base | fields
    named = param or _param_of(fields) or None if status == 400 else param
    return BadInput(f"ollama: {name}", _post("/api/chat", own), (status,), named, **more)


def native(name: str, fields: Fields, param: str | None = None, status: int = 400, **more: Any) -> BadInput:
    """A native stream with these fields."""
    named = param or _param_of(fields) or None if status == 400 else param
    return BadInput(f"stream: {name}", _post("/v1/streams", fields), (status,), named, **more)


def response(name: str, fields: Fields, param: str | None = None, status: int = 400, **more: Any) -> BadInput:
    """A response with these fields."""
    base = {"input": CANARY, "max_output_tokens": 2, "temperature": 0}
    own = (lambda: base | fields()) if callable(fields) else base | fields
    named = param or _param_of(fields) or None if status == 400 else param
    return BadInput(f"response: {name}", _post("/v1/responses", own), (status,), named, **more)


def query(name: str, text: str, param: str | None, status: int = 400, *headers: str, **more: Any) -> BadInput:
    """GET /v1/stream with this query."""
    head = ("accept: text/event-stream", *headers)
    return BadInput(
        f"query: {name}", lambda: raw_request("GET", f"/v1/stream?{text}", b"", *head), (status,), param, **more
    )


def target(
    name: str, method: str, path: str, status: int, param: str | None = None, code: str | None = None, *headers: str
) -> BadInput:
    """A request for this target, with no body but for a POST's empty object."""
    body = b"{}" if method == "POST" else b""
    return BadInput(f"target: {name}", lambda: raw_request(method, path, body, *headers), (status,), param, code)


def body(name: str, text: Callable[[], str | bytes], status: int = 400, **more: Any) -> BadInput:
    """These bytes as a completion's body."""
    return BadInput(f"body: {name}", _text("/v1/completions", text), (status,), **more)


def headers(name: str, status: int, *lines: str, text: bytes = b'{"prompt": "a", "max_tokens": 1}') -> BadInput:
    """A sound completion under these header lines."""
    return BadInput(f"headers: {name}", lambda: raw_request("POST", "/v1/completions", text, *lines), (status,))


def wire(name: str, request: bytes | Callable[[], bytes], *statuses: int, **more: Any) -> BadInput:
    """Bytes as they stand."""
    return BadInput(f"wire: {name}", request if callable(request) else lambda: request, statuses, **more)


def one_shot(name: str, path: str, fields: Fields, param: str | None, status: int = 400, **more: Any) -> BadInput:
    return BadInput(f"one-shot: {path} {name}", _post(path, fields), (status,), param, **more)


def tokens(name: str, path: str, fields: Fields, param: str | None, status: int = 400, **more: Any) -> BadInput:
    return BadInput(f"tokens: {path} {name}", _post(path, fields), (status,), param, **more)


def _schema(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def _wide_schema(num_properties: int) -> dict[str, Any]:
    names = [f"p{i}" for i in range(num_properties)]
    return {"type": "object", "properties": {name: {"type": "string"} for name in names}, "required": names}


def _chunked(*chunks: bytes) -> bytes:
    head = "POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\nconnection: close\r\n"
    return head.encode() + b"transfer-encoding: chunked\r\n\r\n" + b"".join(chunks)


def _pipe(*requests: bytes) -> bytes:
    """Requests in one write, of which only the last asks for the end of the connection."""
    *first, last = requests
    return b"".join(request.replace(b"connection: close\r\n", b"") for request in first) + last


def _head(*lines: str) -> bytes:
    return "\r\n".join(["GET /health HTTP/1.1", "host: 127.0.0.1", *lines, "", ""]).encode("latin-1")


_OK = b'{"prompt": "a", "max_tokens": 1}'
_GET = raw_request("GET", "/health")
_CALL = {"id": "x", "type": "function", "function": {"name": "f", "arguments": "{}"}}
_STREAM = "/v1/streams/" + "0" * 32
_EVENTS = f"{_STREAM}/events"
_RESPONSE = "/v1/responses/resp_" + "0" * 32
_SSE = "accept: text/event-stream"
_UNSUPPORTED = "unsupported_parameter"
_PART_TYPE = "input[0].content[0].type"
_TOO_LONG = "context_length_exceeded"
_URL = "http://169.254.169.254/latest/meta-data"
_BOMB = "(a+)+$" * 50
_TLS = bytes.fromhex("16030100c6010000c20303") + bytes(range(187))
_HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes.fromhex("000000040000000000")


def _bodies() -> Iterator[BadInput]:
    yield body("empty", lambda: b"")
    yield body("only space", lambda: b" \r\n\t ")
    yield body("truncated", lambda: b'{"prompt": "' + CANARY.encode())
    yield body("an array", lambda: b"[]")
    yield body("null", lambda: b"null")
    yield body("a trailing comma", lambda: b'{"prompt": "a",}')
    yield body("invalid UTF-8", lambda: b'{"prompt": "\xff\xfe"}')
    yield body("an overlong encoding", lambda: b'{"prompt": "\xc0\xaf"}')
    yield body("a surrogate in UTF-8", lambda: b'{"prompt": "\xed\xa0\x80"}')
    yield body("a lone high surrogate", lambda: b'{"prompt": "\\ud800"}')
    yield body("a lone surrogate in a key", lambda: b'{"\\ud800": 1}')
    yield body("a bare line break in a string", lambda: b'{"prompt": "a\nb"}')
    yield body("a NUL byte", lambda: b'{"prompt": "a"}\x00')
    yield body("a byte order mark", lambda: b"\xef\xbb\xbf" + _OK)
    yield body("UTF-16", lambda: _OK.decode().encode("utf-16"))
    yield body("NaN", lambda: b'{"prompt": "a", "temperature": NaN}')
    yield body("Infinity", lambda: b'{"prompt": "a", "temperature": Infinity}')
    yield body("1e400", lambda: b'{"prompt": "a", "temperature": 1e400}')
    yield body("10^5000", lambda: b'{"prompt": "a", "seed": 1' + b"0" * 5000 + b"}")
    yield body("a million digits", lambda: b'{"prompt": "a", "x": ' + b"9" * 10**6 + b"}")
    yield body("100,000 arrays deep", lambda: b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}")
    yield body("100,000 objects deep", lambda: b'{"a": ' * 100_000 + b"1" + b"}" * 100_000)
    yield body("a million arrays never closed", lambda: b"[" * 10**6)
    yield body(
        "a million keys", lambda: b"{" + b"".join(b'"%d":1,' % i for i in range(10**6)), 413, code="body_too_large"
    )
    yield body("200,000 keys", lambda: json.dumps(dict.fromkeys(map(str, range(200_000)))), param="prompt", most_mib=64)
    yield body("a key twice", lambda: b'{"prompt": "a", "prompt": 5}', param="prompt")
    yield body("a million times a", lambda: json.dumps({"prompt": "a" * 10**6}), param="prompt", code=_TOO_LONG)
    yield body("ten million times a", lambda: b"a" * 10**7, 413, code="body_too_large")
    yield body("a key of a million characters", lambda: json.dumps({"k" * 10**6: 1}), param="prompt")
    yield body("4 MiB of space", lambda: b" " * 2**22)
    yield body("a byte over the limit", lambda: b" " * (2**22 + 1), 413, code="body_too_large")
    yield body("500,000 empty strings", lambda: json.dumps({"prompt": [""] * 500_000}), param="prompt", most_mib=128)
    yield body("gzip that does not say so", lambda: gzip.compress(_OK))


def _completions() -> Iterator[BadInput]:
    yield completion("max_tokens 0", {"max_tokens": 0})
    yield completion("max_tokens -1", {"max_tokens": -1})
    yield completion("max_tokens 1e18", {"max_tokens": 10**18})
    yield completion("max_tokens a float", {"max_tokens": 1.5})
    yield completion("max_tokens a bool", {"max_tokens": True})
    yield completion("max_tokens a string", {"max_tokens": "5"})
    yield completion("max_tokens over the context", {"max_tokens": 2**31 - 1}, code=_TOO_LONG)
    yield completion("min_tokens over max_tokens", {"min_tokens": 9, "max_tokens": 8})
    yield completion("temperature negative", {"temperature": -0.1})
    yield completion("temperature 1e308", {"temperature": 1e308})
    yield completion("temperature a string", {"temperature": "hot"})
    yield completion("top_p 0", {"top_p": 0})
    yield completion("top_p over 1", {"top_p": 1.01})
    yield completion("min_p over 1", {"min_p": 2})
    yield completion("top_k -2", {"top_k": -2})
    yield completion("top_k 2^63", {"top_k": 2**63})
    yield completion("repetition_penalty 0", {"repetition_penalty": 0})
    yield completion("repetition_penalty 1e308", {"repetition_penalty": 1e308})
    yield completion("frequency_penalty 1e308", {"frequency_penalty": 1e308})
    yield completion("seed 2^64", {"seed": 2**64})
    yield completion("seed a float", {"seed": 1.5})
    yield completion("n 0", {"n": 0})
    yield completion("n 1e9", {"n": 10**9})
    yield completion("n times prompts", {"prompt": ["a"] * 100, "n": 100})
    yield completion("best_of 1e9", {"best_of": 10**9}, code=_UNSUPPORTED)
    yield completion("logprobs 1e6", {"logprobs": 10**6})
    yield completion("logprobs -1", {"logprobs": -1})
    yield completion("logprobs that fill memory", {"logprobs": 20, "n": 128, "max_tokens": 8000, "prompt": "a"})
    yield completion("an empty stop string", {"stop": [""]}, "stop[0]")
    yield completion("10,000 stop strings", {"stop": ["x"] * 10_000})
    yield completion("a stop string of 1 MB", {"stop": "x" * 10**6})
    yield completion("a stop string that is none", {"stop": [None]}, "stop[0]")
    yield completion("a stop token out of the vocabulary", {"stop_token_ids": [2**30]})
    yield completion("a negative stop token", {"stop_token_ids": [-1]}, "stop_token_ids[0]")
    yield completion("100,000 stop tokens", {"stop_token_ids": [1] * 100_000})
    yield completion("a bias out of the vocabulary", {"logit_bias": {"2147483647": 1}})
    yield completion("a bias of no token", {"logit_bias": {CANARY: 1}})
    yield completion("a bias of a token's text", {"logit_bias": {"٣": 1}})
    yield completion("a bias of 1e308", {"logit_bias": {"5": 1e308}}, "logit_bias.5")
    yield completion("100,000 biases", lambda: {"logit_bias": {str(i): 1 for i in range(100_000)}}, "logit_bias")
    yield completion("a wrong bias of a key of 1 MB", {"logit_bias": {"k" * 10**6: "x"}}, f"logit_bias.{'k' * 189}")
    yield completion("a bias's key of 1 MB", {"logit_bias": {"9" * 10**6: 1}})
    yield completion("prompt ids out of the vocabulary", {"prompt": [10**9]})
    yield completion("prompt ids beyond 32 bits", {"prompt": [2**31]}, "prompt[0]")
    yield completion("negative prompt ids", {"prompt": [-1]}, "prompt[0]")
    yield completion("prompt ids that are floats", {"prompt": [1.5]}, "prompt[0]")
    yield completion("an empty prompt", {"prompt": ""})
    yield completion("an empty list of prompts", {"prompt": []})
    yield completion("prompts of two kinds", {"prompt": ["a", 5]}, "prompt[0]")
    yield completion("a prompt over the context", {"prompt": "word " * 9000}, code=_TOO_LONG)
    yield completion("ids over the context", {"prompt": [1] * 9000}, code=_TOO_LONG)
    yield completion("a million ids", lambda: {"prompt": [1] * 10**6}, "prompt", code=_TOO_LONG, most_mib=64)
    yield completion("10,000 prompts", {"prompt": ["a"] * 10_000})
    yield completion("an object as prompt", {"prompt": {"text": "x"}})
    yield completion("stream a string", {"stream": "yes"})
    yield completion("stream_options without stream", {"stream_options": {"include_usage": True}})
    yield completion("timeout 0", {"timeout": 0})
    yield completion("timeout 1e308", {"timeout": 1e308})
    yield completion("a name of 10,000 characters", {"model": "m" * 10_000})
    yield completion("a user of 10,000 characters", {"user": "u" * 10_000})
    yield completion("an unknown model", {"model": CANARY}, "model", 404, code="model_not_found")
    yield completion("a model that is a path", {"model": "../../etc/passwd"}, "model", 404, code="model_not_found")
    yield completion("a model that is a URL", {"model": _URL}, "model", 404, code="model_not_found")
    yield completion("a model with a NUL", {"model": "a\0b"}, "model", 404, code="model_not_found")
    yield completion("a model with line breaks", {"model": "a\r\nx: y"}, "model", 404, code="model_not_found")
    yield from _grammars()
    yield completion("a template", {"chat_template": "{% for i in range(9**9) %}"}, code=_UNSUPPORTED)
    yield completion("a priority that is claimed", {"priority": -100}, code=_UNSUPPORTED)
    yield completion("a tier that is claimed", {"tier": "premium"}, status=200)
    yield completion("a weight and a tenant that are claimed", {"weight": 1e9, "tenant": CANARY}, status=200)
    yield completion("fields of Python's", {"__class__": "x", "model_config": {}, "__init__": {}}, status=200)
    yield completion("control tokens", {"prompt": "<|im_start|>system\n<|im_end|><|endoftext|>"}, status=200)
    yield completion(
        "control characters", {"prompt": "".join(map(chr, range(160))) + "\u202e\ufffe\U0010ffff"}, status=200
    )


def _grammars() -> Iterator[BadInput]:
    """Each is refused, or costs nobody but who sent it."""
    yield completion("a regex that is none", {"guided_regex": "(" * 1000})
    yield completion("a regex that looks behind", {"guided_regex": "(?<=a)b"})
    yield completion("a regex of 200,000 characters", {"guided_regex": "a" * 200_000})
    yield completion("a regex of too many states", {"guided_regex": "(a{1,99}){1,99}(a{1,99}){1,99}b"}, status=200)
    yield completion("a regex bomb of backtrackers", {"guided_regex": "(a+)+b" * 50}, status=200)
    yield completion("a grammar without an end", {"guided_grammar": "root ::= root root"})
    yield completion("a grammar that names nobody", {"guided_grammar": 'start: "a" nobody'})
    yield completion("a grammar of 50,000 brackets", {"guided_grammar": "start: " + "(" * 50_000})
    yield completion("a schema 80 deep", lambda: {"guided_json": _schema(80)}, "guided_json")
    yield completion("a schema that is a list", {"guided_json": []}, "guided_json")
    yield completion("a schema that is no JSON", {"guided_json": "{"})
    yield completion("a schema of a keyword that is not done", {"guided_json": {"not": {}}})
    yield completion("a schema from elsewhere", {"guided_json": {"$ref": _URL}})
    yield completion("a schema of 3,000 properties", lambda: {"guided_json": _wide_schema(3000)}, status=200)
    yield completion("a schema of 200,000 characters", {"guided_json": {"description": "x" * 200_000}})
    yield completion("no choice", {"guided_choice": []})
    yield completion("an empty choice", {"guided_choice": ["a", ""]}, "guided_choice[1]")
    yield completion("100,000 choices", lambda: {"guided_choice": ["a"] * 100_000}, "guided_choice", most_mib=48)
    yield completion("two grammars", {"guided_json": {}, "guided_regex": "a"}, "guided_regex")
    yield completion("a grammar and no end", {"ignore_eos": True, "guided_regex": "a"})
    structured = "structured_outputs"
    yield completion("a structural tag", {structured: {"structural_tag": "{}"}}, f"{structured}.structural_tag")
    yield completion("two of one", {structured: {"regex": "a", "choice": ["b"]}}, f"{structured}.choice")
    yield completion("outputs that are a string", {structured: "json"})
    yield completion("a format that is none", {"response_format": {"type": "xml"}}, "response_format.type")
    yield completion("a format without a type", {"response_format": {}}, "response_format.type")
    no_schema = {"response_format": {"type": "json_schema"}}
    yield completion("a format without its schema", no_schema, "response_format.json_schema")


def _chats() -> Iterator[BadInput]:
    yield chat("no messages", {"messages": []})
    yield chat("messages a string", {"messages": "hi"})
    yield chat(
        "100,000 messages", lambda: {"messages": [{"role": "user", "content": "x"}] * 100_000}, "messages", most_mib=96
    )
    yield chat("a chat over the context", {"messages": [{"role": "user", "content": "word " * 9000}]}, code=_TOO_LONG)
    yield chat("top_logprobs 1e6", {"top_logprobs": 10**6, "logprobs": True})
    yield chat("top_logprobs without logprobs", {"top_logprobs": 5})
    yield chat("logprobs a number", {"logprobs": 5})
    yield chat("two limits that differ", {"max_tokens": 5, "max_completion_tokens": 6})
    yield from _tools()
    yield chat(
        "a recursive schema",
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}}},
        "response_format.json_schema.schema",
    )
    yield chat("a structural tag", {"structural_tag": {"a": [_BOMB]}}, code=_UNSUPPORTED)
    yield chat("a template", {"chat_template": "{{ ''.__class__.__mro__ }}"}, code=_UNSUPPORTED)
    yield chat("a template in a variable", {"chat_template_kwargs": {"x": "{{ 7*7 }}"}}, status=200)
    yield chat(
        "a variable of the server's", {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"
    )
    yield chat("a variable of Python's", {"chat_template_kwargs": {"self": 1}}, "chat_template_kwargs.self")
    yield chat("a variable of 1 MB", lambda: {"chat_template_kwargs": {"x": "x" * 10**6}}, "chat_template_kwargs")
    yield chat(
        "10,000 variables",
        lambda: {"chat_template_kwargs": {f"x{i}": i for i in range(10_000)}},
        "chat_template_kwargs",
    )
    yield chat("a service tier", {"service_tier": "priority"}, code=_UNSUPPORTED)
    yield chat("logits processors", {"logits_processors": ["os.system"]}, code=_UNSUPPORTED)
    yield chat("a template in a message", {"messages": [{"role": "user", "content": "{{ 7*7 }}{% raw %}"}]}, status=200)
    yield chat("control tokens in a message", {"messages": [{"role": "user", "content": "<|im_end|>"}]}, status=200)
    yield message("no role", {"content": "x"}, "messages[0].role")
    yield message("a role that is none", {"role": "king", "content": "x"}, "messages[0].role")
    yield message("a role with a control token", {"role": "user<|im_end|>", "content": "x"}, "messages[0].role")
    yield message("no content", {"role": "user"}, "messages[0].content")
    yield message("content a number", {"role": "user", "content": 5}, "messages[0].content")
    yield message(
        "100,000 parts that are none", lambda: {"role": "user", "content": [1] * 100_000}, "messages[0].content[0]"
    )
    yield message(
        "an image's URL",
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": _URL}}]},
        "messages[0].content[0].type",
    )
    yield message(
        "a file's URL",
        {"role": "user", "content": [{"type": "file", "file": {"file_id": "file:///etc/passwd"}}]},
        "messages[0].content[0].type",
    )
    yield message(
        "audio",
        {"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]},
        "messages[0].content[0].type",
    )
    yield message("a user's call", {"role": "user", "content": "x", "tool_calls": [_CALL]}, "messages[0].tool_calls")
    yield message("calls a string", {"role": "assistant", "tool_calls": "x"}, "messages[0].tool_calls")
    yield message(
        "30,000 calls", lambda: {"role": "assistant", "tool_calls": [_CALL] * 30_000}, "messages[0].tool_calls"
    )
    for field, wrong in (
        ("id", {"function": _CALL["function"]}),
        ("id", _CALL | {"id": "x" * 1000}),
        ("type", _CALL | {"type": "custom"}),
        ("function", {"id": "x"}),
        ("function.name", {"id": "x", "function": {"arguments": "{}"}}),
        ("function.name", {"id": "x", "function": {"name": "<|im_end|>", "arguments": "{}"}}),
        ("function.arguments", {"id": "x", "function": {"name": "f", "arguments": {}}}),
        ("function.arguments", {"id": "x", "function": {"name": "f"}}),
    ):
        name = f"messages[0].tool_calls[0].{field}"
        yield message(f"a call whose {field} is {wrong!r:.60}", {"role": "assistant", "tool_calls": [wrong]}, name)
    yield message("a result of no call", {"role": "tool", "content": "x"}, "messages[0].tool_call_id")
    yield message("a call without a result", {"role": "tool", "tool_call_id": "x"}, "messages[0].content")
    yield message("an older call", {"role": "assistant", "function_call": {"name": "f"}}, "messages[0].function_call")
    yield message("a user's prefix", {"role": "user", "content": "x", "prefix": True}, "messages[0].prefix")
    yield chat("a user's message to continue", {"continue_final_message": True})
    yield chat(
        "a message to continue and a new one",
        {"add_generation_prompt": True, "messages": [{"role": "assistant", "content": CANARY, "prefix": True}]},
    )
    yield message("a name of 1 MB", lambda: {"role": "user", "content": "x", "name": "n" * 10**6}, "messages[0].name")


def _anthropics() -> Iterator[BadInput]:
    yield BadInput("anthropic: no JSON", _text("/v1/messages", lambda: b"{"), (400,))
    yield anthropic("no limit", {"max_tokens": None})
    yield anthropic("an unknown model", {"model": CANARY}, "model", 404)
    yield anthropic("a role that is a list", {"messages": [{"role": [], "content": "x"}]}, "messages[0].role")
    yield anthropic(
        "100,000 blocks that are none",
        lambda: {"messages": [{"role": "user", "content": [1] * 100_000}]},
        "messages[0]",
    )
    call = b'{"type": "tool_use", "id": "x", "name": "f", "input": {"x": 1e400}}'
    yield BadInput(
        "anthropic: arguments of 1e400",
        _text(
            "/v1/messages", lambda: b'{"max_tokens": 2, "messages": [{"role": "assistant", "content": [%b]}]}' % call
        ),
        (400,),
        "messages[0].content[0].input.x",
    )
    yield blocks("an image's URL", {"type": "image", "source": {"type": "url", "url": _URL}}, "type")
    yield blocks("a kind that is an object", {"type": {"type": "text"}}, "type")
    yield blocks("a result by the assistant", {"type": "tool_result", "tool_use_id": "x"}, "type", "assistant")
    yield anthropic("a server's tool", {"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0].type")
    yield anthropic("a remote server of tools", {"mcp_servers": [{"type": "url", "url": _URL}]})


def _ollamas() -> Iterator[BadInput]:
    yield BadInput("ollama: no JSON", _text("/api/chat", lambda: b"{"), (400,))
    yield ollama("a model that is a path", {"model": "../../etc/passwd:latest"}, "model", 404)
    yield ollama("options that are none", {"options": [1]})
    yield ollama("num_predict 1e18", {"options": {"num_predict": 10**18}}, "options.num_predict")
    yield ollama("a context of 1e18", {"options": {"num_ctx": 10**18, "num_predict": 1}}, status=200)
    yield ollama("an image", {"messages": [{"role": "user", "images": ["A" * 1000]}]}, "messages[0].images")
    call = {"function": {"name": "x", "arguments": "{}"}}
    yield ollama(
        "arguments that are text",
        {"messages": [{"role": "assistant", "tool_calls": [call]}]},
        "messages[0].tool_calls[0].function.arguments",
    )
    yield BadInput(
        "ollama: a schema with 1e400",
        _text("/api/generate", lambda: b'{"prompt": "x", "format": {"type": "number", "maximum": 1e400}}'),
        (400,),
        "format.maximum",
    )
    yield BadInput(
        "ollama: a template", _post("/api/generate", {"prompt": "x", "template": "{{ . }}"}), (400,), "template"
    )
    yield BadInput("ollama: a model to fetch", _post("/api/pull", {"model": _URL}), (404,))


def _tools() -> Iterator[BadInput]:
    named = {"type": "function", "function": {"name": "other"}}
    for name, tool, place in (
        ("that is none", 5, ""),
        ("of no type", {"function": {"name": "f"}}, ".type"),
        ("of another type", {"type": "web_search"}, ".type"),
        ("without its function", {"type": "function"}, ".function"),
        ("without a name", _tool(), ".function.name"),
        ("whose name is a number", _tool(name=5), ".function.name"),
        ("whose name is empty", _tool(name=""), ".function.name"),
        ("whose name has a quote", _tool(name='f"'), ".function.name"),
        ("whose name has a control token", _tool(name="<|im_end|>"), ".function.name"),
        ("whose name ends a line", _tool(name="f\n"), ".function.name"),
        ("whose name has 1,000 characters", _tool(name="f" * 1000), ".function.name"),
        ("whose description is a list", _tool(name="f", description=[]), ".function.description"),
        ("whose parameters are text", _tool(name="f", parameters="{}"), ".function.parameters"),
        ("whose parameters are no object's", _tool(name="f", parameters={"type": "array"}), ".function.parameters"),
        ("that is strict by word", _tool(name="f", strict="yes"), ".function.strict"),
    ):
        yield chat(f"a tool {name}", {"tools": [tool]}, f"tools[0]{place}")
    yield chat("tools an object", {"tools": {"name": "f"}})
    yield chat("a tool twice", {"tools": [_tool(name="f"), _tool(name="f")]}, "tools[1].function.name")
    yield chat("50,000 tools", lambda: {"tools": [_tool(name="f")] * 50_000}, "tools", most_mib=96)
    yield chat("100,000 tools that are none", lambda: {"tools": [1] * 100_000}, "tools[0]", most_mib=48)
    yield chat("a tool choice without tools", {"tool_choice": "required"})
    for name, choice, place in (
        ("that is none", "any", ""),
        ("a number", 5, ""),
        ("of no type", {}, ".type"),
        ("of another type", {"type": "tool"}, ".type"),
        ("without a function", {"type": "function"}, ".function"),
        ("without a name", {"type": "function", "function": {}}, ".function.name"),
        ("of another tool", named, ".function.name"),
        ("without a list", {"type": "allowed_tools"}, ".allowed_tools"),
        ("of no mode", {"type": "allowed_tools", "allowed_tools": {"tools": [named]}}, ".allowed_tools.mode"),
        ("of none", {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}, ".allowed_tools.tools"),
        (
            "of others",
            {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [named]}},
            ".allowed_tools.tools[0].function.name",
        ),
    ):
        yield chat(f"a tool choice {name}", {"tool_choice": choice, "tools": [_tool(name="f")]}, f"tool_choice{place}")
    yield chat("parallel calls by word", {"parallel_tool_calls": "no"})
    tools, required = {"tools": [_tool(name="f")]}, {"tool_choice": "required"}
    yield chat("tools and a regex", {"guided_regex": "a", **tools})
    yield chat("tools and a regex", {"guided_regex": "a", **tools})
    yield chat("a call and no end", {"ignore_eos": True, **tools, **required})
    for name, schema in (
        ("of a keyword that is not done", {"properties": {"a": {"not": {}}}}),
        ("from elsewhere", {"$ref": _URL}),
        ("that is its own", {"$ref": "#"}),
        ("of a regex that looks behind", {"properties": {"a": {"type": "string", "pattern": "(?<=a)b"}}}),
        ("80 deep", _schema(80)),
        ("of properties that are none", {"properties": 5}),
    ):
        asked = {"tools": [_tool(name="g"), _tool(name="f", parameters=schema)], **required}
        yield chat(f"a required call with a schema {name}", asked, "tools[1].function.parameters")
    large = {"tools": [_tool(name="f", parameters={"description": "x" * 200_000})], **required}
    yield chat("a required call with a schema of 200,000 characters", large, most_mib=32)
    yield chat("functions", {"functions": [{"name": "f"}]}, code=_UNSUPPORTED)
    yield chat("a function call", {"function_call": {"name": "f"}}, code=_UNSUPPORTED)


def _tool(**function: Any) -> dict[str, Any]:
    return {"type": "function", "function": function}


def _streams() -> Iterator[BadInput]:
    yield native("nothing", {}, "messages")
    yield native("both", {"prompt": "a", "messages": []}, "messages")
    yield native("null alone", {"prompt": None}, "messages")
    yield native("n 2", {"n": 2, "prompt": "a"})
    yield native("two prompts", {"prompt": ["a", "b"]}, "n")
    yield native("on_disconnect that is none", {"on_disconnect": "explode", "prompt": "a"})
    yield native("a grace time of a year", {"disconnect_grace_s": 3e7, "prompt": "a"})
    yield native("a grace time below none", {"disconnect_grace_s": -1, "prompt": "a"})
    yield native("a prompt over the context", {"prompt": [1] * 9000}, code=_TOO_LONG)
    yield native("an unknown model", {"model": CANARY, "prompt": "a"}, "model", 404, code="model_not_found")
    yield native("tools", {"tools": [1], "messages": []}, code=_UNSUPPORTED)
    yield native("the logits of no token", {"logit_bias": {"99999999": 1}, "prompt": "a"})
    yield query("no prompt", "", "prompt")
    yield query("an empty prompt", "prompt=", "prompt")
    yield query("a number that is none", f"prompt={CANARY}&max_tokens=many", "max_tokens")
    yield query("a number twice as JSON", "prompt=a&max_tokens=1,2", "max_tokens")
    yield query("JSON broken out of", 'prompt=a&max_tokens=1}{"x":2', "max_tokens")
    yield query("1e400", "prompt=a&temperature=1e400", "temperature")
    yield query("10^5000", "prompt=a&seed=1" + "0" * 5000, "seed")
    yield query("1,000 arrays deep", "prompt=a&logit_bias=" + "[" * 1000, "logit_bias")
    yield query("20 stop strings", "prompt=a&" + "stop=x&" * 20, "stop")
    yield query("a field that is not supported", f"prompt=a&grammar={quote(_BOMB)}", "grammar")
    yield query("tools", "prompt=a&tools=[1]", "tools", code=_UNSUPPORTED)
    yield query("a regex that is none", "prompt=a&guided_regex=%28", "guided_regex")
    yield query("an unknown model", f"prompt=a&model={CANARY}", "model", 404, code="model_not_found")
    yield query("bytes that are no UTF-8", "prompt=a&max_tokens=%ff%fe", "max_tokens")
    yield query("a ticket that is none", f"prompt=a&ticket={CANARY}", None, 401, code="invalid_ticket")
    yield query("a ticket with a NUL", "prompt=a&ticket=%00", None, 401, code="invalid_ticket")
    yield query("a key", f"api_key={CANARY}", "prompt")
    yield query("an event id without a stream", "last_event_id=5", "last_event_id")
    yield query("an event id of no stream", f"last_event_id={CANARY}:5", None, 404, code="not_found")
    yield query("an event id with a NUL", "last_event_id=%00:%00", None, 404)
    yield query("an event id with line breaks", "last_event_id=a%0d%0ab:5", None, 404)
    yield query("an event id of 20,000 characters", "last_event_id=" + "a" * 20_000 + ":1", None, 404)
    yield query("an event id in a header", "", None, 404, f"last-event-id: {CANARY}:9", code="not_found")
    yield query("an event id of a path", "", None, 404, "last-event-id: ../../etc/passwd:1")
    yield query("an event id that is no text", "", "last_event_id", 400, "last-event-id: \xff\xfe")
    yield target("a stream that does not ask for one", "GET", "/v1/stream?prompt=a", 406)
    yield target("an unknown stream", "GET", f"/v1/streams/{CANARY}", 404, code="not_found")
    yield target("an unknown stream's events", "GET", _EVENTS, 404, None, "not_found", _SSE)
    yield target("an unknown stream's end", "DELETE", "/v1/streams/" + "f" * 32, 404, code="not_found")
    yield target("a stream whose id is a path", "GET", "/v1/streams/..%2f..%2fetc%2fpasswd", 404)
    yield target("a stream whose id has a NUL", "GET", "/v1/streams/%00", 404)
    yield target("a stream whose id has line breaks", "GET", "/v1/streams/a%0d%0ax:%20y", 404)
    yield target("a stream whose id is no UTF-8", "DELETE", "/v1/streams/%ff%fe", 404)
    yield target("a stream whose id has 20,000 characters", "GET", "/v1/streams/" + "a" * 20_000, 404)
    yield target("an empty stream's id", "GET", "/v1/streams/", 404)
    yield target("an unknown stream from an event id", "GET", _EVENTS, 404, None, None, "last-event-id: -1")
    other = f"/v1/streams/other-{'0' * 32}"
    for method, path in (("GET", other), ("GET", f"{other}/events"), ("DELETE", other)):
        yield target(f"a stream of a replica that is none {method} {path[-6:]}", method, path, 404, code="not_found")
    yield target("a replica whose name is a path", "GET", f"/v1/streams/..%2f..-{'0' * 32}/events", 404)
    yield target("a replica whose name is a host", "GET", f"/v1/streams/evil.example.org-{'0' * 32}/events", 404)
    yield query("an event id of another replica", f"last_event_id=other-{'0' * 32}:5", None, 404, code="not_found")
    yield query("a ticket of another replica", f"prompt=a&ticket=other.{'x' * 43}", None, 401, code="invalid_ticket")


def _responses() -> Iterator[BadInput]:
    yield response("no input", {"input": None})
    yield response("an empty list", {"input": []})
    yield response("input a number", {"input": 5})
    yield response("10,000 items", lambda: {"input": [{"role": "user", "content": "x"}] * 10_000}, "input", most_mib=64)
    yield response("100,000 wrong items", lambda: {"input": [5] * 100_000}, "input[0].type", most_mib=64)
    yield response("an item of no known type", {"input": [{"type": CANARY}]}, "input[0].type")
    yield response("an item's type a list", {"input": [{"type": ["message"]}]}, "input[0].type")
    yield response("a picture's address", {"input": [_user([{"type": "input_image", "image_url": _URL}])]}, _PART_TYPE)
    yield response("a file's address", {"input": [_user([{"type": "input_file", "file_url": _URL}])]}, _PART_TYPE)
    yield response(
        "a text a number", {"input": [_user([{"type": "input_text", "text": 1}])]}, "input[0].content[0].text"
    )
    yield response("a million times a", lambda: {"input": "a" * 10**6}, "input", code=_TOO_LONG)
    yield response("an item of no response", {"input": [_reference(f"msg_{'0' * 32}_o0")]}, "input[0].id", 404)
    yield response("an item's name a path", {"input": [_reference("../../etc/passwd")]}, "input[0].id", 404)
    yield response("2,000 items that are none", lambda: {"input": [_reference("x")] * 2000}, "input[0].id", 404)
    yield response("no such response before", {"previous_response_id": CANARY}, "previous_response_id", 404)
    yield response("a response before of 10 KB", {"previous_response_id": "r" * 10_000})
    yield response("max_output_tokens 0", {"max_output_tokens": 0})
    yield response("max_output_tokens over the context", {"max_output_tokens": 2**31 - 1}, code=_TOO_LONG)
    yield response("max_tokens", {"max_tokens": 5}, code=_UNSUPPORTED)
    yield response("n", {"n": 2}, code=_UNSUPPORTED)
    yield response("a conversation", {"conversation": "conv_1"}, code=_UNSUPPORTED)
    yield response("a prompt template", {"prompt": {"id": "pmpt_1"}}, code=_UNSUPPORTED)
    yield response("truncation", {"truncation": "auto"}, code=_UNSUPPORTED)
    yield response("a tier that is claimed", {"service_tier": "priority"}, code=_UNSUPPORTED)
    yield response("background and no store", {"background": True, "store": False})
    yield response("a tool of a server", {"tools": [{"type": "mcp", "server_url": _URL}]}, "tools[0].type")
    yield BadInput(
        "response: a tool with 1e400",
        _text(
            "/v1/responses",
            lambda: b'{"input": "x", "tools": [{"type": "function", "name": "f", "parameters": {"x": 1e400}}]}',
        ),
        (400,),
        "tools[0].parameters.x",
    )
    yield response("200 tools", lambda: {"tools": [{"type": "function", "name": f"f{i}"} for i in range(200)]}, "tools")
    yield response("metadata of 17 pairs", {"metadata": {str(i): "" for i in range(17)}})
    yield response("metadata nested", {"metadata": {"a": {}}}, "metadata.a")
    unheld = {"type": "json_schema", "name": "answer", "schema": {"type": "array", "uniqueItems": True}}
    yield response("a schema that is not held to", {"text": {"format": unheld}}, "text.format.schema")
    for id in (CANARY, "%00", "..%2f..%2fetc%2fpasswd", "a%0d%0ax:%20y", "a" * 20_000):
        yield target(f"the response {id[:20]}", "GET", f"/v1/responses/{id}", 404)
    yield target("an unknown response", "GET", _RESPONSE, 404, "id", "not_found")
    yield target("an unknown response's end", "DELETE", _RESPONSE, 404, "id", "not_found")
    yield target("an unknown response's cancellation", "POST", f"{_RESPONSE}/cancel", 404, "id", "not_found")
    yield target("a response of another replica", "GET", f"/v1/responses/resp_other-{'0' * 32}", 404, "id", "not_found")
    yield response(
        "an item of another replica", {"input": [_reference(f"msg_other-{'0' * 32}_o0")]}, "input[0].id", 404
    )
    yield target("an unknown response's items", "GET", f"{_RESPONSE}/input_items", 404, "id", "not_found")


def _user(content: list[Any]) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _reference(id: str) -> dict[str, Any]:
    return {"type": "item_reference", "id": id}


def _targets() -> Iterator[BadInput]:
    yield target("no such route", "GET", f"/v1/{CANARY}", 404, code="not_found")
    yield target("a route with a slash", "POST", "/v1/completions/", 404, code="not_found")
    yield target("the wrong method", "GET", "/v1/completions", 405)
    yield target("a method that is none", "EXPLODE", "/v1/completions", 405)
    yield target("a method in small letters", "get", "/health", 405)
    yield target("HEAD of a stream", "HEAD", "/v1/stream?prompt=a", 405)
    yield target("TRACE", "TRACE", "/v1/completions", 405)
    yield target("OPTIONS of everything", "OPTIONS", "*", 404)
    yield target("OPTIONS of a route", "OPTIONS", "/v1/completions", 405)
    yield target("CONNECT", "CONNECT", "example.org:443", 404)
    yield target("an absolute form", "GET", f"http://example.org/{CANARY}", 404)
    yield target("a NUL", "GET", "/%00", 404)
    yield target("line breaks", "GET", "/health%0d%0ax:%20y", 404)
    yield target("dots", "GET", "/static/../../pyproject.toml", 404)
    yield target("dots behind escapes", "GET", "/static/%2e%2e%2f%2e%2e%2fpyproject.toml", 404)
    yield target("dots behind two escapes", "GET", "/static/%252e%252e/pyproject.toml", 404)
    yield target("backslashes", "GET", "/static/..\\..\\pyproject.toml", 404)
    yield target("a static NUL", "GET", "/static/%00", 404)
    yield target("a static name of 5,000 characters", "GET", "/static/" + "a" * 5000, 404)
    yield target("two slashes", "GET", "//health", 404)
    yield target("a query of 10,000 fields", "GET", "/health?" + "a=b&" * 10_000, 200)
    yield target("a foreign host", "GET", "/health", 403, None, None, "x: y", "origin: http://evil.example")
    yield target("a foreign page", "POST", "/v1/completions", 403, None, None, f"origin: http://{CANARY}.example")
    yield target("an origin that is none", "GET", "/health", 403, None, None, "origin: http://[")
    yield BadInput("target: a host that is none", lambda: raw_request("GET", "/health", host="[::"), (403,))
    yield BadInput("target: another host", lambda: raw_request("GET", "/health", host=f"{CANARY}.example"), (403,))


def _headers() -> Iterator[BadInput]:
    yield headers("text", 415, "content-type: text/plain")
    yield headers("no type", 415, "content-type: ")
    yield headers("a form", 415, "content-type: application/x-www-form-urlencoded")
    yield headers("a multipart form", 415, "content-type: multipart/form-data; boundary=x")
    yield headers("a type of 10,000 characters", 415, "content-type: " + "a" * 10_000)
    yield headers("JSON lines", 415, "content-type: application/x-ndjson")
    yield headers("gzip", 415, "content-encoding: gzip", text=gzip.compress(_OK))
    yield headers("two encodings", 415, "content-encoding: identity, gzip")
    yield headers("brotli", 415, "content-encoding: br", text=b"\x00")
    yield headers(
        "another charset", 400, "content-type: application/json; charset=utf-16", text=_OK.decode().encode("utf-16")
    )
    yield headers("a charset that is not true", 200, "content-type: application/json; charset=latin-1")
    yield headers("a trace context that is none", 200, f"traceparent: {CANARY}", f"tracestate: {CANARY}")
    yield headers("a request id", 200, "x-request-id: a-request")
    yield headers("a request id of 10,000 characters", 200, "x-request-id: " + "x" * 10_000)
    yield headers("a request id that is no word", 200, f'x-request-id: "{CANARY}", {{}}')
    yield headers("an idempotency key", 200, f"idempotency-key: {CANARY}")
    yield headers("an idempotency key again", 200, f"idempotency-key: {CANARY}")
    yield headers("another's idempotency key", 422, f"idempotency-key: {CANARY}", text=b'{"prompt": "b"}')
    yield headers("no idempotency key", 400, "idempotency-key: ")
    yield headers("an idempotency key of 10,000 characters", 400, "idempotency-key: " + "k" * 10_000)
    yield headers("an idempotency key that is no text", 400, "idempotency-key: \xff\xfe")
    yield headers("a key where none is needed", 200, f"authorization: Bearer {CANARY}", f"x-api-key: {CANARY}")
    yield headers("cookies", 200, f"cookie: session={CANARY}")
    yield headers("another host by a proxy", 200, f"x-forwarded-host: {CANARY}", "forwarded: for=1.2.3.4;host=evil")
    yield headers("ranges", 200, "range: bytes=0-" + ",0-" * 1000)
    yield headers(
        "an upgrade to a web socket", 200, "connection: upgrade", "upgrade: websocket", "sec-websocket-key: x"
    )


def _wires() -> Iterator[BadInput]:
    yield wire("nothing but line breaks", b"\r\n\r\n\r\n\r\n", 400)
    yield wire("HTTP/0.9", b"GET /health\r\n\r\n", 400)
    yield wire("HTTP/2's preface", _HTTP2, 505)
    yield wire("HTTP/3.7", b"GET /health HTTP/3.7\r\nhost: 127.0.0.1\r\n\r\n", 505)
    yield wire("a TLS hello", _TLS + b"\r\n\r\n", 400)
    yield wire("TLS hellos without an end", lambda: _TLS * 400, 400)
    yield wire("random bytes", bytes(range(256)) * 4 + b"\r\n\r\n", 400)
    yield wire("NUL bytes", b"\0" * 1000 + b"\r\n\r\n", 400)
    yield wire("a line that never ends", b"y" * 200_000, 431)
    yield wire("no host", b"GET /health HTTP/1.1\r\n\r\n", 400)
    yield wire("two hosts", _head("host: other"), 400)
    yield wire("a header without a name", _head(": x"), 400)
    yield wire("a header without a colon", _head("what"), 400)
    yield wire("a space before the colon", _head("x : y"), 400)
    yield wire("a folded header", _head("x: a", " b", "connection: close"), 200)
    yield wire("a folded first header", b"GET /health HTTP/1.1\r\n host: 127.0.0.1\r\n\r\n", 400)
    yield wire("a NUL in a header", _head("x: a\0b"), 400)
    yield wire("a NUL in a header's name", _head("x\0: y"), 400)
    yield wire("a carriage return in a header", _head("x: a\rb"), 400)
    yield wire("bare line feeds", b"GET /health HTTP/1.1\nhost: 127.0.0.1\nconnection: close\n\n", 200)
    yield wire("bytes that are no text in a target", b"GET /\xff\xfe HTTP/1.1\r\nhost: a\r\n\r\n", 400)
    yield wire("a space in a target", b"GET /a b HTTP/1.1\r\nhost: a\r\n\r\n", 400)
    yield wire("10,000 headers", lambda: _head(*(f"x{i}: y" for i in range(10_000))), 431)
    yield wire("101 headers", lambda: _head(*(f"x{i}: y" for i in range(100))), 431)
    yield wire("a header of 100 KB", lambda: _head("x: " + "y" * 100_000), 431)
    yield wire("a name of 100 KB", lambda: _head("x" * 100_000 + ": y"), 431)
    yield wire("a target of 100 KB", lambda: b"GET /" + b"y" * 100_000 + b" HTTP/1.1\r\nhost: a\r\n\r\n", 431)
    yield wire("a cookie of 100 KB and no end", lambda: _head("cookie: " + CANARY * 8000)[:-4], 431)
    yield wire(
        "a length that is no number", raw_request("POST", "/v1/completions", b"{}").replace(b": 2", b": two"), 400
    )
    yield wire("a length below none", raw_request("POST", "/v1/completions", _OK, length=-1), 400)
    yield wire("a length with a sign", raw_request("POST", "/v1/completions", b"{}").replace(b": 2", b": +2"), 400)
    yield wire("a length of many digits", raw_request("POST", "/v1/completions", _OK, length=int("9" * 19)), 413)
    yield wire("a length of a terabyte", raw_request("POST", "/v1/completions", _OK, length=2**40), 413)
    yield wire("a length that is too short", raw_request("POST", "/v1/completions", _OK, length=5), 400)
    yield wire("no length", raw_request("POST", "/v1/completions", _OK).replace(b"content-length: 32\r\n", b""), 400)
    yield wire("two lengths", raw_request("POST", "/v1/completions", _OK, "content-length: 5"), 400)
    yield wire("two lengths in one", raw_request("POST", "/v1/completions", b"{}").replace(b": 2", b": 2, 3"), 400)
    yield wire(
        "a length and chunks", _chunked(b"0\r\n\r\n").replace(b"transfer", b"content-length: 4\r\ntransfer"), 400
    )
    yield wire(
        "chunks and a length", _chunked(b"0\r\n\r\n").replace(b"\r\n\r\n", b"\r\ncontent-length: 4\r\n\r\n", 1), 400
    )
    yield wire("chunks that are no number", _chunked(b"zz\r\n{}\r\n0\r\n\r\n"), 400)
    yield wire("chunks below none", _chunked(b"-1\r\n{}\r\n0\r\n\r\n"), 400)
    yield wire("chunks of 2^80 bytes", _chunked(b"f" * 20 + b"\r\n{}"))
    yield wire("a chunk with 100 digits", _chunked(b"1" * 100 + b"\r\n{}"), 400)
    yield wire("a chunk longer than it says", _chunked(b"1\r\n{}\r\n0\r\n\r\n"), 400)
    yield wire("a chunk's endless extension", lambda: _chunked(b"1;" + b"x" * 200_000), 431)
    yield wire("20,000 chunks of a byte", lambda: _chunked(b"1\r\n \r\n" * 20_000 + b"0\r\n\r\n"), 400)
    yield wire("chunks twice", _chunked(b"0\r\n\r\n").replace(b": chunked", b": chunked, chunked"), 501)
    yield wire("chunks that are gzip", _chunked(b"0\r\n\r\n").replace(b": chunked", b": gzip, chunked"), 501)
    yield wire("chunks with a tab", _chunked(b"0\r\n\r\n").replace(b": chunked", b":\tchunked\t"), 400)
    yield wire("chunks of a client of 1.0", _chunked(b"0\r\n\r\n").replace(b"HTTP/1.1", b"HTTP/1.0"), 400)
    yield wire("trailers", _chunked(b"%x\r\n%b\r\n0\r\nx: y\r\ncontent-length: 5\r\n\r\n" % (len(_OK), _OK)), 200)
    yield wire("trailers of 200 KB", lambda: _chunked(b"0\r\nx: " + b"y" * 200_000 + b"\r\n\r\n"), 431)
    yield wire("a body behind a GET", _GET[:-4] + b"\r\ncontent-length: 4\r\n\r\nabcd", 200)
    yield wire("100-continue", raw_request("POST", "/v1/completions", _OK, "expect: 100-continue"), 100, 200)
    yield wire(
        "100-continue of what is refused",
        raw_request("POST", "/v1/completions", b"{", "expect: 100-continue"),
        100,
        400,
    )
    yield wire("another expectation", raw_request("POST", "/v1/completions", _OK, "expect: the-impossible"), 200)
    yield wire("two requests in one write", _pipe(_GET, _GET), 200, 200)
    yield wire(
        "a refusal and a request in one write", _pipe(raw_request("POST", "/v1/completions", b"{"), _GET), 400, 200
    )
    yield wire("a request and nonsense in one write", _pipe(_GET, b"\0\0\r\n\r\n"), 200, 400)
    yield wire("a request smuggled behind a length", raw_request("POST", "/v1/completions", _OK + _GET, length=32), 200)
    yield wire("a client that leaves in its head", _head()[:20])
    yield wire("a client that leaves in its body", raw_request("POST", "/v1/completions", _OK, length=90))
    yield wire("a client that leaves in a chunk", _chunked(b"ff\r\n{"))
    yield wire("a client that says nothing", b"")


def _one_shots() -> Iterator[BadInput]:
    for path in ("/v1/embeddings", "/v1/rerank", "/v1/score", "/v1/classify"):
        yield BadInput(f"one-shot: {path} no JSON", _text(path, lambda: b"{"), (400,))
        yield BadInput(f"one-shot: {path} no JSON object", _text(path, lambda: b"[1]"), (400,))
        yield BadInput(f"one-shot: {path} 1e400", _text(path, lambda: b'{"timeout": 1e400}'), (400,))
        yield one_shot("a model of 10,000 characters", path, {"model": "m" * 10_000}, None)
    yield one_shot("3,000 inputs", "/v1/embeddings", {"input": ["x"] * 3000}, "input")
    yield one_shot("no input", "/v1/embeddings", {"input": []}, "input")
    yield one_shot("dimensions -1", "/v1/embeddings", {"input": "x", "dimensions": -1}, "dimensions")
    yield one_shot("no such format", "/v1/embeddings", {"input": "x", "encoding_format": "pickle"}, "encoding_format")
    yield one_shot("no model here", "/v1/embeddings", {"input": CANARY}, None, 404)
    yield one_shot("3,000 documents", "/v1/rerank", {"query": "x", "documents": ["x"] * 3000}, "documents")
    yield one_shot("top_n 0", "/v1/rerank", {"query": "x", "documents": ["x"], "top_n": 0}, "top_n")
    yield one_shot("texts that do not pair", "/v1/score", {"text_1": ["a", "b"], "text_2": ["c"]}, "text_1")
    yield one_shot("no image", "/v1/classify", {}, "image")
    yield one_shot("top_k 0", "/v1/classify", {"image": "AAAA", "top_k": 0}, "top_k")


def _tokens() -> Iterator[BadInput]:
    for path, fields in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
        yield BadInput(f"tokens: {path} no JSON", _text(path, lambda: b"{"), (400,))
        yield BadInput(f"tokens: {path} no JSON object", _text(path, lambda: b"[1]"), (400,))
        yield tokens("an unknown model", path, fields | {"model": CANARY}, "model", 404, code="model_not_found")
        yield tokens("a model of 10,000 characters", path, fields | {"model": "m" * 10_000}, "model")
    yield tokens("nothing", "/tokenize", {}, "messages")
    yield tokens("a prompt and messages", "/tokenize", {"prompt": CANARY, "messages": []}, "messages")
    yield tokens("two prompts", "/tokenize", {"prompt": [CANARY, CANARY]}, "prompt")
    yield tokens("a million times a", "/tokenize", lambda: {"prompt": "a" * 10**6}, "prompt", code=_TOO_LONG)
    yield tokens("a template", "/tokenize", {"prompt": CANARY, "chat_template": "{{ 7*7 }}"}, "chat_template")
    yield tokens(
        "a flag that is none", "/tokenize", {"prompt": CANARY, "return_token_strs": "yes"}, "return_token_strs"
    )
    yield tokens("no tokens", "/detokenize", {}, "tokens")
    yield tokens("tokens that are a text", "/detokenize", {"tokens": CANARY}, "tokens")
    yield tokens("a negative token", "/detokenize", {"tokens": [-1]}, "tokens[0]")
    yield tokens("a token out of the vocabulary", "/detokenize", {"tokens": [10**9]}, "tokens")
    yield tokens("a million tokens", "/detokenize", lambda: {"tokens": [1] * 10**6}, None, 200, most_mib=96)
    yield target("an unknown model", "GET", f"/v1/models/{CANARY}", 404, "model", "model_not_found")
    yield target("a model that is a path", "GET", "/v1/models/..%2f..%2fetc%2fpasswd", 404, "model", "model_not_found")
    yield target("a model with a NUL", "GET", "/v1/models/a%00b", 404, "model", "model_not_found")
    yield target("a model of 20,000 characters", "GET", "/v1/models/" + "m" * 20_000, 404, "model", "model_not_found")


def _operators() -> Iterator[BadInput]:
    path = "/admin/profile"
    for name, fields in (
        ("steps 0", {"steps": 0}),
        ("steps 1e9", {"steps": 10**9}),
        ("steps a float", {"steps": 1.5}),
        ("steps a bool", {"steps": True}),
        ("timeout 0", {"timeout": 0}),
        ("timeout an hour", {"timeout": 3600}),
        ("timeout a string", {"timeout": CANARY}),
    ):
        yield BadInput(f"profile: {name}", _post(path, fields), (400,), next(iter(fields)))
    yield BadInput("profile: no JSON", _text(path, lambda: "{"), (400,))
    yield BadInput("profile: an array", _text(path, lambda: "[1]"), (400,))
    yield BadInput("profile: a form", lambda: raw_request("POST", path, b"steps=1", "content-type: text/plain"), (415,))
    yield BadInput("profile: a client that leaves", _post(path, {"steps": 200, "timeout": 60}), ())
    yield target("a profile that is read", "GET", path, 405)
    yield target("stacks that are posted", "POST", "/admin/stacks", 405)
    yield target("requests by HEAD", "HEAD", "/admin/requests", 405)
    yield target("requests with a query", "GET", f"/admin/requests?id={CANARY}", 200)
    yield target("a load that is posted", "POST", "/get_load", 405)
    yield target("a load with a query", "GET", f"/v1/loads?include={CANARY}", 200)
    yield target("no such page of the operator's", "GET", "/admin/", 404, code="not_found")
    yield target("stacks for a foreign page", "GET", "/admin/stacks", 403, None, None, "origin: http://evil.example")


def _without_keys() -> Iterator[BadInput]:
    auths = {
        "no key": (),
        "a wrong key": (f"authorization: Bearer {CANARY}",),
        "another scheme": (f"authorization: Basic {CANARY}",),
        "a key that is no text": ("x-api-key: \xff\xfe",),
        "a key of 50,000 characters": ("authorization: Bearer " + "k" * 50_000,),
    }
    for said, lines in auths.items():
        yield _keyless(said, "POST", "/v1/completions", *lines)
        yield _keyless(said, "GET", "/metrics", *lines)
        yield _keyless(said, "GET", "/get_load", *lines)
    for path in (
        "/v1/chat/completions",
        "/v1/responses",
        "/v1/messages",
        "/api/chat",
        "/v1/streams",
        "/tokenize",
        "/v1/embeddings",
        "/v1/classify",
        "/v1/nothing",
    ):
        yield _keyless("no key", "POST", path)
    for path in (
        "/v1/models",
        "/v1/models/x",
        "/version",
        "/v1/loads",
        "/metrics/load",
        "/server_info",
        "/get_server_info",
        _STREAM,
        "/openapi.json",
        "/docs/",
        "/V1/models",
        "/%76%31/models",
        "/v1//models",
        "/health/",
    ):
        yield _keyless("no key", "GET", path)
    for path in ("/admin/stacks", "/admin/requests", _RESPONSE, f"{_RESPONSE}/input_items"):
        yield _keyless("no key", "GET", path)
    for path in (_STREAM, _RESPONSE):
        yield _keyless("no key", "DELETE", path)
    for path in ("/admin/profile", f"{_RESPONSE}/cancel"):
        yield _keyless("no key", "POST", path)
    yield _keyless("a key in the URL", "GET", f"/v1/models?api_key={CANARY}&key={CANARY}")
    yield _keyless(
        "an open path beside it", "GET", "/v1/models", "x-forwarded-path: /health", "x-original-url: /health"
    )
    yield _keyless("an open path before it", "GET", "http://127.0.0.1/health/../v1/models")
    yield _keyless("a tier that is claimed", "POST", "/v1/completions", "x-tier: premium", "x-tenant: alice")
    yield _keyless("no ticket", "GET", "/v1/stream?prompt=a", _SSE)
    yield _keyless("a ticket that is none", "GET", f"/v1/stream?prompt=a&ticket={CANARY}", _SSE)


def _keyless(said: str, method: str, path: str, *lines: str) -> BadInput:
    text = _OK if method == "POST" else b""
    return BadInput(f"{method} {path[:40]} with {said}", lambda: raw_request(method, path, text, *lines), (401,))


# What a server with API keys answers to who has none.
WITHOUT_KEYS: tuple[BadInput, ...] = tuple(_without_keys())

BAD_INPUTS: tuple[BadInput, ...] = (
    *_bodies(),
    *_completions(),
    *_chats(),
    *_anthropics(),
    *_ollamas(),
    *_streams(),
    *_responses(),
    *_targets(),
    *_headers(),
    *_wires(),
    *_one_shots(),
    *_tokens(),
    *_operators(),
)
