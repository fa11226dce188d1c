"""What SGLang's gateway and vLLM's router ask of a worker: how much it has to do, and what it is.

Lives on the event loop. Their policies compare workers by tokens: those in the KV cache, and those of prompts that
wait. Source: SGLang's HTTP API, in the fields that routers read; a server here is one rank.
"""

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from headrace.server.generator import Generator
from headrace.server.version import VERSION


class RouterApi:
    """The routes of one engine."""

    def __init__(self, generator: Generator) -> None:
        self._generator = generator
        self._client = generator.client
        self._block_size = generator.settings.block_size

    async def ranks(self, request: Request) -> Response:
        """GET /get_load."""
        return JSONResponse([self._load()])

    async def loads(self, request: Request) -> Response:
        """GET /v1/loads, which took its place."""
        return JSONResponse({"loads": [self._load()]})

    async def server_info(self, request: Request) -> Response:
        """GET /server_info, and /get_server_info as it was called before."""
        ready = self._client.ready
        content = {
            "served_model_name": self._generator.model_name,
            "version": VERSION,
            "dp_size": 1,
            "max_total_tokens": None if ready is None else self._num_tokens(self._client.load.num_total_blocks),
            "max_running_requests": None if ready is None else ready.max_num_seqs,
        }
        return JSONResponse(content)

    def _load(self) -> dict[str, Any]:
        load, num_waiting = self._client.load, self._client.num_waiting
        num_tokens = self._num_tokens(load.num_total_blocks - load.num_free_blocks)
        num_tokens += self._client.admission.num_queued_tokens
        return {
            "dp_rank": 0,
            "num_reqs": load.num_running + num_waiting,
            "num_running_reqs": load.num_running,
            "num_waiting_reqs": num_waiting,
            "num_tokens": num_tokens,
            "num_total_tokens": num_tokens,
            "token_usage": round(load.kv_usage, 4),
        }

    def _num_tokens(self, num_blocks: int) -> int:
        return num_blocks * self._block_size
