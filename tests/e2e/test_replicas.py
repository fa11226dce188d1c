"""A browser that asks one server for what another one has."""

import json
import socket
from typing import Any

import httpx
from playwright.sync_api import Browser

from chat_page import open_chat_page
from fake_engine import FakeRunner, expected_text
from live_server import live_server
from tcp_relay import TcpRelay

NUM_TOKENS = 30
TEXT = expected_text("river", NUM_TOKENS)
# Reads a stream as a page does, until its end or until the browser gives up.
READ = """
(url) => {
  window.tokens = [];
  window.end = null;
  const source = new EventSource(url);
  source.addEventListener('token', (event) => tokens.push([event.lastEventId, JSON.parse(event.data).text]));
  source.addEventListener('done', () => { source.close(); window.end = 'done'; });
  source.addEventListener('error', () => {
    if (source.readyState === EventSource.CLOSED) window.end = 'closed';
  });
}
"""
SAID = "(length) => window.end === 'closed' || tokens.map(([, text]) => text).join('').length >= length"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def test_a_page_is_led_to_the_replica_that_has_a_stream_and_back_to_where_it_was(browser: Browser) -> None:
    port, runner = free_port(), FakeRunner()
    settings: dict[str, Any] = {"stream_retry_ms": 50, "cors_origins": f"http://127.0.0.1:{port}"}
    body = {"prompt": "river", "max_tokens": NUM_TOKENS, "temperature": 0, "on_disconnect": "continue"}
    with (
        runner.held(),
        live_server(runner=runner, replica_name="beta", **settings) as beta,
        TcpRelay(beta.url) as relay,
        live_server(port=port, replica_name="alpha", peers=json.dumps({"beta": relay.url})) as alpha,
        open_chat_page(browser, alpha.url) as chat,
    ):
        page = chat.page
        created = httpx.post(f"{beta.url}/v1/streams", json=body).json()
        page.evaluate(READ, created["events_url"])
        runner.allow(10)
        page.wait_for_function(SAID, arg=10)
        relay.cut()
        relay.mend()
        runner.allow(NUM_TOKENS)
        page.wait_for_function("() => window.end !== null")
        assert page.evaluate("window.end") == "done"
        tokens = page.evaluate("tokens")
        assert "".join(text for _, text in tokens) == TEXT
        assert all(id.startswith(f"{created['id']}:") for id, _ in tokens)
        snapshot = page.evaluate("(url) => fetch(url).then((answer) => answer.json())", created["url"])
        assert snapshot["text"] == TEXT
        status, told = page.evaluate(
            "(url) => fetch(url, { method: 'DELETE' }).then((answer) => Promise.all([answer.status, answer.json()]))",
            created["url"],
        )
        assert (status, told["error"]["replica"], told["error"]["url"]) == (421, "beta", relay.url)
