"""The OpenAPI document: that it is one, that it has every route, and that answers look as it says.

What the routes make of requests that are made from it is tried in tests/e2e/test_openapi.py.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from starlette.routing import Route

from asgi_client import call
from headrace.server.api_keys import append_key, create_key
from headrace.server.app import App
from headrace.server.endpoint import Endpoint
from headrace.server.protocol import UNSUPPORTED
from live_app import live_app

pytestmark = pytest.mark.anyio

# Pages for people, which are no interface.
PAGES = {"/", "/classify", "/dashboard", "/docs"}


async def document_of(app: App, headers: dict[str, str] | None = None) -> dict[str, Any]:
    answer = await call(app.asgi, "GET", "/openapi.json", headers=headers)
    assert answer.status == 200
    document: dict[str, Any] = answer.json()
    return document


def operations(document: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """By (method, path)."""
    return {(method, path): operation for path, item in document["paths"].items() for method, operation in item.items()}


@pytest.mark.parametrize(
    "settings",
    [{}, {"admin_port": 1}, {"host": "0.0.0.0"}],
    ids=["one_address", "operators_elsewhere", "beyond_this_machine"],
)
async def test_every_route_is_in_the_document_and_nothing_else(settings: dict[str, Any]) -> None:
    async with live_app(**settings) as app:
        routes = {
            (method.lower(), route.path_format)
            for route in app.asgi.routes
            if isinstance(route, Route) and route.path not in PAGES
            for method in (route.methods or set()) - {"HEAD"}
        }
        assert operations(await document_of(app)).keys() == routes


async def test_who_may_repeat_a_request_is_told_so() -> None:
    async with live_app() as app:
        repeatable = {
            ("post", route.path_format)
            for route in app.asgi.routes
            if isinstance(route, Route) and isinstance(route.endpoint, Endpoint) and route.endpoint.is_repeatable
        }
        told = {
            place
            for place, operation in operations(await document_of(app)).items()
            if any(parameter["name"] == "Idempotency-Key" for parameter in operation["parameters"])
        }
    assert told == repeatable


async def test_the_document_is_openapi_3_1(tmp_path: Path) -> None:
    secret, key = create_key("someone")
    append_key(tmp_path / "keys.toml", key)
    async with live_app() as app:
        schemathesis.openapi.from_dict(await document_of(app)).validate()
    async with live_app(api_keys_file=tmp_path / "keys.toml") as app:
        schemathesis.openapi.from_dict(await document_of(app, {"x-api-key": secret})).validate()


async def test_with_keys_the_document_needs_one_and_says_what_else_does(tmp_path: Path) -> None:
    secret, key = create_key("someone")
    append_key(tmp_path / "keys.toml", key)
    async with live_app(api_keys_file=tmp_path / "keys.toml") as app:
        assert (await call(app.asgi, "GET", "/openapi.json")).status == 401
        document = await document_of(app, {"x-api-key": secret})
        for (method, path), operation in operations(document).items():
            answer = await call(app.asgi, method.upper(), path.replace("{id}", "0" * 32), {})
            needs_key = operation["security"] != []
            assert (answer.status == 401) == needs_key or path == "/v1/stream", path
            assert "401" in operation["responses"]
    async with live_app() as app:
        assert not any("security" in operation for operation in operations(await document_of(app)).values())


async def test_the_document_is_made_once() -> None:
    async with live_app() as app:
        first, second = [await call(app.asgi, "GET", "/openapi.json") for _ in range(2)]
        assert first.messages[1]["body"] is second.messages[1]["body"]


async def test_what_is_not_supported_appears_with_the_values_that_ask_for_nothing() -> None:
    async with live_app() as app:
        schemas = (await document_of(app))["components"]["schemas"]
    for name in ("ChatCompletionRequest", "CompletionRequest", "StreamChatRequest", "StreamCompletionRequest"):
        for field, neutral in UNSUPPORTED.items():
            assert schemas[name]["properties"][field] == json.loads(json.dumps({"enum": [*neutral, None]}))
    assert schemas["EmbeddingRequest"]["properties"]["endianness"]["enum"] == ["native", "little", None]


async def test_every_example_is_answered_as_the_document_says() -> None:
    async with live_app() as app:
        document = await document_of(app)
        for (method, path), operation in operations(document).items():
            body = operation.get("requestBody", {"content": {}})["content"].get("application/json", {})
            if "example" not in body:
                continue
            answer = await call(app.asgi, method.upper(), path, body["example"])
            # Of one-shot models there are none here, and nothing to be traced.
            codes = {"model_not_found", "deadline_exceeded"}
            assert answer.status in (200, 201) or answer.json()["error"]["code"] in codes, path
