"""Random schemas and the real model: what it says to the end fulfils them, what is cut off begins what would.

Two hundred of them, with a model that says anything, are in tests/contract/test_structured_outputs.py.
"""

import asyncio
import random
from typing import Any

import httpx
import pytest

from json_schemas import UNSUPPORTED, Schema, random_schema, validate, with_unsupported
from server_process import ServerProcess

NUM_SCHEMAS = 8
NUM_AT_ONCE = 4
SHORT, LONG = 48, 200


def body(schema: Schema, max_tokens: int) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": "Make up an example."}],
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "example", "schema": schema, "strict": True},
        },
        "temperature": 0,
        "max_tokens": max_tokens,
    }


@pytest.mark.anyio
async def test_what_ends_by_itself_fulfils_its_schema_and_what_is_cut_is_the_beginning_of_what_does(
    server: ServerProcess,
) -> None:
    """Schemas go in as clients send them, many at a time. With more tokens the same is said for longer: the likeliest
    token stays that in float32 whatever is computed beside it, while a drawn one now and then does not."""
    at_once = asyncio.Semaphore(NUM_AT_ONCE)
    ends: dict[str, int] = {"stop": 0, "length": 0}

    async with httpx.AsyncClient(base_url=server.url(), timeout=300) as client:

        async def answer(seed: int, schema: Schema, max_tokens: int) -> tuple[str, str]:
            async with at_once:
                while True:
                    response = await client.post("/v1/chat/completions", json=body(schema, max_tokens))
                    if response.status_code != 429:  # on a busy machine it predicts longer waits than it likes
                        break
                    await asyncio.sleep(float(response.headers["retry-after"]))
            assert response.status_code == 200, (seed, response.text)
            [choice] = response.json()["choices"]
            return choice["message"]["content"], choice["finish_reason"]

        async def check(seed: int) -> None:
            schema = random_schema(random.Random(seed))
            text, reason = await answer(seed, schema, SHORT)
            ends[reason] += 1
            if reason == "length":
                whole, reason = await answer(seed, schema, LONG)
                assert whole.startswith(text.rstrip("\ufffd")), seed
                text = whole
            if reason == "stop":
                validate(schema, text)

        await asyncio.gather(*(check(seed) for seed in range(NUM_SCHEMAS)))
    assert min(ends.values()) > 0


def test_a_keyword_that_is_not_supported_is_refused_by_its_name(server: ServerProcess) -> None:
    with httpx.Client(base_url=server.url(), timeout=60) as client:
        for seed, keyword in enumerate(UNSUPPORTED):
            schema = with_unsupported(random.Random(seed), keyword)
            response = client.post("/v1/chat/completions", json=body(schema, SHORT))
            error = response.json()["error"]
            assert (response.status_code, error["param"]) == (400, "response_format.json_schema.schema")
            assert f'"{keyword}"' in error["message"]
