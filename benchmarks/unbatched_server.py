"""A model server as many are written: /v1/embeddings by transformers, one request at a time, its list in one pass.

    python -m headrace.benchmarks.unbatched_server DIRECTORY [--port 8100]

It is what `headrace proxy` is measured in front of, and knows no batch but the one it is sent.
"""

import argparse
import threading
from pathlib import Path
from typing import Any

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from transformers import AutoModel, AutoTokenizer


class Embedder:
    """Mean-pooled, normalised vectors."""

    def __init__(self, path: Path) -> None:
        self._tokenizer: Any = AutoTokenizer.from_pretrained(path)
        self._model: Any = AutoModel.from_pretrained(path).eval()
        self._lock = threading.Lock()

    @torch.inference_mode()
    def embed(self, texts: list[str]) -> tuple[list[list[float]], int]:
        """(Vectors, tokens)."""
        with self._lock:
            encoded = self._tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
            hidden = self._model(**encoded).last_hidden_state
            mask = encoded["attention_mask"][:, :, None]
            vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
            return vectors.tolist(), int(mask.sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("--port", type=int, default=8100)
    options = parser.parse_args()
    embedder = Embedder(options.path)
    embedder.embed(["warm"])

    async def embeddings(request: Request) -> JSONResponse:
        given = (await request.json())["input"]
        vectors, num_tokens = await run_in_threadpool(embedder.embed, [given] if isinstance(given, str) else given)
        items = [{"object": "embedding", "index": i, "embedding": vector} for i, vector in enumerate(vectors)]
        usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
        return JSONResponse({"object": "list", "data": items, "model": "unbatched", "usage": usage})

    async def models(request: Request) -> JSONResponse:
        return JSONResponse({"object": "list", "data": [{"id": "unbatched", "object": "model", "task": "embed"}]})

    routes = [Route("/v1/embeddings", embeddings, methods=["POST"]), Route("/v1/models", models)]
    uvicorn.run(Starlette(routes=routes), host="127.0.0.1", port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
