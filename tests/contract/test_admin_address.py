"""The operator's own address answers probes and metrics without a key, and nothing else; clients lose metrics by it."""

from pathlib import Path
from typing import Any

import pytest

from asgi_client import Exchange, exchange
from headrace.scheduler.messages import Tier
from headrace.server.admin import ByPort
from headrace.server.api_keys import append_key, create_key
from live_app import LiveApp, live_app

pytestmark = pytest.mark.anyio

CLIENTS_PORT, ADMIN_PORT = 8000, 9000


async def ask(
    app: LiveApp, port: int, path: str, method: str = "GET", headers: dict[str, str] | None = None
) -> Exchange:
    request = exchange(ByPort(app.asgi, app.admin, ADMIN_PORT), method, path, headers=headers)
    request.scope["server"] = ("127.0.0.1", port)
    request.send_body(b"")
    await request.run()
    return request


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, Any]:
    secret, key = create_key("alice", Tier.STANDARD)
    append_key(tmp_path / "keys.toml", key)
    return {"file": tmp_path / "keys.toml", "headers": {"authorization": f"Bearer {secret}"}}


async def test_metrics_and_probes_need_no_key_there(keys: dict[str, Any]) -> None:
    async with live_app(admin_port=ADMIN_PORT, api_keys_file=keys["file"]) as app:
        metrics = await ask(app, ADMIN_PORT, "/metrics")
        assert metrics.status == 200
        assert b"headrace_" in metrics.body
        for path in ("/health", "/ready"):
            assert (await ask(app, ADMIN_PORT, path)).status == 200
            assert (await ask(app, CLIENTS_PORT, path)).status == 200


async def test_clients_have_no_metrics_then_whatever_they_present(keys: dict[str, Any]) -> None:
    async with live_app(admin_port=ADMIN_PORT, api_keys_file=keys["file"], open_metrics=True) as app:
        assert (await ask(app, CLIENTS_PORT, "/metrics", headers=keys["headers"])).status == 404
        host = {"host": f"127.0.0.1:{ADMIN_PORT}"}
        assert (await ask(app, CLIENTS_PORT, "/metrics", headers=keys["headers"] | host)).status == 404


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/"),
        ("GET", "/v1/models"),
        ("POST", "/v1/completions"),
        ("GET", "/v1/stream"),
        ("GET", "/static/chat.js"),
        ("POST", "/metrics"),
    ],
)
async def test_nothing_else_is_there(method: str, path: str) -> None:
    async with live_app(admin_port=ADMIN_PORT) as app:
        answer = await ask(app, ADMIN_PORT, path, method)
        assert answer.status in (404, 405)
        assert answer.json()["error"]["type"] == "invalid_request_error"
        rejected = (await ask(app, ADMIN_PORT, "/metrics")).body.decode()
        assert f'headrace_requests_rejected_total{{status="{answer.status}"}} 1.0' in rejected


async def test_on_loopback_a_page_elsewhere_cannot_read_it_by_rebinding_its_name() -> None:
    async with live_app(admin_port=ADMIN_PORT) as app:
        assert (await ask(app, ADMIN_PORT, "/metrics", headers={"host": "evil.example"})).status == 403
    async with live_app(admin_port=ADMIN_PORT, admin_host="0.0.0.0") as app:
        assert (await ask(app, ADMIN_PORT, "/metrics", headers={"host": "headrace.internal:9000"})).status == 200
