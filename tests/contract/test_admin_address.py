"""The operator's own address answers probes, metrics and dashboard without a key, and nothing else; clients lose the
latter two by it."""

import re
from pathlib import Path
from typing import Any

import pytest

from asgi_client import Exchange, call, exchange
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
        page = await ask(app, ADMIN_PORT, "/dashboard")
        assert "default-src 'self'" in page.headers["content-security-policy"]
        for part in re.findall(r'(?:src|href)="(/[^"]+)"', page.body.decode()):
            assert (await ask(app, ADMIN_PORT, part)).status == 200, part
        for path in ("/health", "/ready"):
            assert (await ask(app, ADMIN_PORT, path)).status == 200
            assert (await ask(app, CLIENTS_PORT, path)).status == 200


@pytest.mark.parametrize("path", ["/metrics", "/metrics/load", "/get_load", "/v1/loads", "/dashboard"])
async def test_clients_have_none_of_it_then_whatever_they_present(keys: dict[str, Any], path: str) -> None:
    async with live_app(admin_port=ADMIN_PORT, api_keys_file=keys["file"], open_metrics=True) as app:
        assert (await ask(app, CLIENTS_PORT, path, headers=keys["headers"])).status == 404
        host = {"host": f"127.0.0.1:{ADMIN_PORT}"}
        assert (await ask(app, CLIENTS_PORT, path, headers=keys["headers"] | host)).status == 404


@pytest.mark.parametrize("settings", [{"admin_port": ADMIN_PORT}, {}, {"open_metrics": True}])
async def test_tenants_are_told_by_name_there_and_to_nobody_else(
    keys: dict[str, Any], settings: dict[str, Any]
) -> None:
    async with live_app(api_keys_file=keys["file"], **settings) as app:
        body = {"prompt": "abc", "max_tokens": 5}
        assert (await call(app.asgi, "POST", "/v1/completions", body, headers=keys["headers"])).status == 200
        port = settings.get("admin_port", CLIENTS_PORT)
        metrics = (await ask(app, port, "/metrics", headers=keys["headers"])).body.decode()
    told = re.findall(r'^headrace_tenant_tokens_total{kind="(\w+)",tenant="(\w+)"} (\S+)$', metrics, re.MULTILINE)
    assert told == ([("prompt", "alice", "3.0"), ("generated", "alice", "5.0")] if "admin_port" in settings else [])
    assert ("alice" in metrics) == bool(told)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/"),
        ("GET", "/v1/models"),
        ("POST", "/v1/completions"),
        ("GET", "/v1/stream"),
        ("GET", "/classify"),
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
