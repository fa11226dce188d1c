"""The worst that a client can send to a completion server in one request: what has stopped or slowed servers before.

A closed list; each is an HTTP/1.1 request as bytes. Every one must be answered, soon, by a 4xx or, where it makes sense
after all, by a short answer; nobody else may notice. It knows no server.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

_COMPLETIONS: Final = "/v1/completions"
_CHAT: Final = "/v1/chat/completions"


@dataclass(frozen=True, slots=True)
class WorstInput:
    """`body` is sent with its true length; `headers` are further ones, as they go out."""

    name: str
    path: str
    body: bytes
    headers: bytes = b""

    def request(self, authority: str) -> bytes:
        """All of it, for the server at this host and port."""
        head = (
            f"POST {self.path} HTTP/1.1\r\nhost: {authority}\r\nconnection: close\r\n"
            f"content-type: application/json\r\ncontent-length: {len(self.body)}\r\n"
        )
        return head.encode() + self.headers + b"\r\n" + self.body


def worst_inputs(model: str | None = None) -> Iterator[WorstInput]:
    """All of them; `model` None leaves the field out."""
    common: dict[str, Any] = {"max_tokens": 1} | ({} if model is None else {"model": model})

    def completion(name: str, **fields: Any) -> WorstInput:
        return WorstInput(name, _COMPLETIONS, json.dumps({"prompt": "a"} | common | fields).encode())

    def chat(name: str, **fields: Any) -> WorstInput:
        messages = [{"role": "user", "content": "a"}]
        return WorstInput(name, _CHAT, json.dumps({"messages": messages} | common | fields).encode())

    def raw(name: str, body: bytes, headers: bytes = b"") -> WorstInput:
        return WorstInput(name, _COMPLETIONS, body, headers)

    plain = completion("").body
    yield completion("n 1e9", n=10**9)
    yield completion("best_of 1e6", best_of=10**6)
    yield completion("max_tokens 1e18", max_tokens=10**18)
    yield completion("max_tokens -1", max_tokens=-1)
    yield completion("min_tokens 1e9", min_tokens=10**9)
    yield completion("logit_bias beyond the vocabulary", logit_bias={str(10**9): 5})
    yield completion("logit_bias of token -1", logit_bias={"-1": 5})
    yield completion("logit_bias NaN", logit_bias={"5": float("nan")})
    yield completion("100,000 logit biases", logit_bias={str(i): 1 for i in range(100_000)})
    yield completion("prompt token 1e9", prompt=[1, 2, 10**9])
    yield completion("prompt token -1", prompt=[1, 2, -1])
    yield completion("prompt token 2^70", prompt=[1, 2**70])
    yield completion("stop_token_ids beyond the vocabulary", stop_token_ids=[10**9, -1])
    yield completion("temperature NaN", temperature=float("nan"))
    yield completion("temperature 1e-320", temperature=1e-320)
    yield completion("top_k -5", top_k=-5)
    yield completion("top_p 0", top_p=0)
    yield completion("repetition_penalty 0", repetition_penalty=0)
    yield completion("seed 2^70", seed=2**70)
    yield completion("logprobs 1e6", logprobs=10**6)
    yield completion("empty stop string", stop=[""])
    yield completion("10,000 stop strings", stop=[f"stop {i}" for i in range(10_000)])
    yield completion("empty prompt", prompt="")
    yield completion("100,000 prompts", prompt=["a"] * 100_000)
    yield completion("lone surrogate", prompt="a \ud800 b")
    yield completion("a prompt of 10^7 letters", prompt="a" * 10**7)
    yield completion("a million token ids", prompt=[1] * 10**6)
    yield chat("no messages", messages=[])
    yield chat("an image's URL", messages=[{"role": "user", "content": [_IMAGE]}])
    yield chat("a chat template", chat_template="{% for i in range(10**9) %}a{% endfor %}")
    yield chat("a regex bomb", structured_outputs={"regex": "(a?){4000}a{4000}"}, grammar='root ::= ("a"?){4000}')
    yield chat("a recursive schema", response_format={"type": "json_schema", "json_schema": _RECURSIVE})
    yield raw("nesting 100,000 deep", plain[:-1] + b', "metadata": ' + b"[" * 100_000 + b"]" * 100_000 + b"}")
    yield raw("a million keys", b"{" + b", ".join(b'"%d": 1' % i for i in range(10**6)) + b", " + plain[1:])
    yield raw("1e400 and 5,000 digits", plain[:-1] + b', "temperature": 1e400, "seed": ' + b"9" * 5000 + b"}")
    yield raw("half a body's JSON", plain[: len(plain) // 2])
    yield raw("bytes that are no UTF-8", plain.replace(b'"a"', b'"\xff\xfe\x80"'))
    yield raw("10,000 headers", plain, b"".join(b"x-%d: y\r\n" % i for i in range(10_000)))


_IMAGE: Final = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/a.png"}}
_RECURSIVE: Final = {
    "name": "a",
    "schema": {"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}]}}},
}
