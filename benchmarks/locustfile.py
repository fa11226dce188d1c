"""Locust users for every lane of a server, alone or together: chat streams, embeddings, scores, pictures.

    locust -f benchmarks/locustfile.py --host http://127.0.0.1:8000 --headless -u 24 -t 30s [ChatUser EmbeddingUser ...]

Named users only are started, and none whose lane the server has no model for. Of a stream
Locust's table shows two lines of its own: `first token`, and `between tokens` with one entry per gap.
"""

import base64
import io
import os
import random
import time
import zlib
from typing import Any

import requests
from locust import HttpUser, constant, events, task
from locust.env import Environment

_WORDS = ("water", "mill", "wheel", "river", "stone", "grain", "flour", "sluice", "pond", "miller", "gear", "axle")
_MAX_TOKENS = int(os.environ.get("LANES_MAX_TOKENS", "48"))
# What somebody who types and reads leaves between two requests; none for a load that saturates.
_PAUSE_S = float(os.environ.get("LANES_PAUSE_S", "0"))

_HEADERS = {"authorization": f"Bearer {key}"} if (key := os.environ.get("LANES_API_KEY")) else {}


@events.init.add_listener
def _keep_lanes(environment: Environment, **_: Any) -> None:
    """Leave users out whose lane the server has no model for."""
    answer = requests.get(f"{environment.host}/v1/models", headers=_HEADERS, timeout=10)
    answer.raise_for_status()
    tasks = {model.get("task", "generate") for model in answer.json()["data"]}
    environment.user_classes = [user for user in environment.user_classes if user.model_task in tasks]


def _text(num_words: int) -> str:
    return " ".join(random.choices(_WORDS, k=num_words))


def _picture(side: int = 320) -> bytes:
    """A PNG of coloured noise in large squares, which takes no library to make."""
    row = b"".join(bytes(random.randrange(256) for _ in range(3)) * 16 for _ in range(side // 16))
    lines = b"".join((b"\0" + bytes((byte + 8 * (y // 16)) % 256 for byte in row)) for y in range(side))

    def chunk(kind: bytes, content: bytes) -> bytes:
        checked = kind + content
        return len(content).to_bytes(4, "big") + checked + zlib.crc32(checked).to_bytes(4, "big")

    head = side.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


_PICTURES = [_picture() for _ in range(8)]


class _LaneUser(HttpUser):  # type: ignore[misc]  # untyped where Locust is not installed
    abstract = True
    wait_time = constant(_PAUSE_S)
    model_task: str

    def on_start(self) -> None:
        self.client.headers.update(_HEADERS)

    def post(self, path: str, **body: Any) -> None:
        self.client.post(path, **body)


class ChatUser(_LaneUser):
    """One who reads a streamed answer to its end."""

    model_task = "generate"
    fixed_count = int(os.environ.get("LANES_NUM_STREAMS", "0"))

    @task
    def chat(self) -> None:
        body = {
            "messages": [{"role": "user", "content": _text(random.randint(8, 60))}],
            "max_tokens": _MAX_TOKENS,
            "stream": True,
            "ignore_eos": True,
        }
        began_s = time.perf_counter()
        last_s = None
        with self.client.post("/v1/chat/completions", json=body, stream=True, catch_response=True) as response:
            if response.status_code != 200:
                response.failure(f"status {response.status_code}")
                return
            for line in response.iter_lines(chunk_size=None):
                if not line.startswith(b"data: {") or b'"content":"' not in line.replace(b'": "', b'":"'):
                    continue
                now_s = time.perf_counter()
                self._note("first token" if last_s is None else "between tokens", now_s - (last_s or began_s))
                last_s = now_s
            if last_s is None:
                response.failure("no token")

    def _note(self, name: str, seconds: float) -> None:
        self.environment.events.request.fire(
            request_type="SSE", name=name, response_time=1000 * seconds, response_length=0, exception=None, context={}
        )


class EmbeddingUser(_LaneUser):
    """One text at a time, of few words or many."""

    model_task = "embed"

    @task
    def embed(self) -> None:
        self.post("/v1/embeddings", json={"input": _text(random.choice((4, 8, 16, 32))), "encoding_format": "base64"})


class ScoreUser(_LaneUser):
    """A query and eight documents."""

    model_task = "score"

    @task
    def rerank(self) -> None:
        self.post("/v1/rerank", json={"query": _text(6), "documents": [_text(24) for _ in range(8)]})


class PictureUser(_LaneUser):
    """A picture, as a file or in JSON; one after the other."""

    model_task = "classify"
    wait_time = constant(0)

    @task(3)
    def upload(self) -> None:
        self.post("/v1/classify", files={"image": io.BytesIO(random.choice(_PICTURES))})

    @task(1)
    def send_base64(self) -> None:
        self.post("/v1/classify", json={"image": base64.b64encode(random.choice(_PICTURES)).decode()})
