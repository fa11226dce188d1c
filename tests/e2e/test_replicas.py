"""A server that is killed, and another one that goes on; a browser that asks one server for what another one has."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
from playwright.sync_api import Browser

from chat_page import open_chat_page
from fake_engine import FakeRunner, expected_text
from live_server import live_server
from resuming_readers import Reader, ResponseReader
from server_process import serving_script
from tcp_relay import TcpRelay
from waiting import until

NUM_SLOW_TOKENS = 150
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


def test_streams_of_a_server_that_is_killed_go_on_at_the_one_beside_it(tmp_path: Path) -> None:
    flags = ["--journal-dir", str(tmp_path / "journals"), "--replica-name"]
    prompts = [f"slow {i}" for i in range(4)]
    body = {"max_tokens": NUM_SLOW_TOKENS, "temperature": 0}
    with (
        ThreadPoolExecutor(8) as threads,
        serving_script(*flags, "alpha") as alpha,
        serving_script(*flags, "beta") as beta,
    ):
        first, second = alpha.url(), beta.url()
        asked = {"input": "hi", "max_output_tokens": NUM_SLOW_TOKENS, "temperature": 0, "background": True}
        response = ResponseReader(httpx.post(f"{first}/v1/responses", json=asked).json())
        streams = [Reader(httpx.post(f"{first}/v1/streams", json=body | {"prompt": each}).json()) for each in prompts]
        places = {reader: second if reader in streams[:2] else first for reader in (response, *streams)}
        following = [threads.submit(reader.follow, url) for reader, url in places.items()]
        until(lambda: all(len(reader.events) > 5 for reader in places), "all are under way")
        alpha.process.kill()
        for future in following:
            future.result()
        assert {reader.events[-1]["event"] for reader in streams[:2]} == {"done"}, "those at beta saw nothing of it"
        assert {reader.events[-1]["event"] for reader in streams[2:]} == {"token"}, "those at alpha were cut off"
        for reader in (response, *streams[2:]):
            reader.follow(second)
        for prompt, reader in zip(prompts, streams, strict=True):
            assert [each["event"] for each in reader.events if each["event"] not in ("token", "queued")] == ["done"]
            assert reader.text == expected_text(prompt, NUM_SLOW_TOKENS)
        assert [int(event["id"]) for event in response.events] == list(range(len(response.events)))
        assert response.text == expected_text("[user]hi\n[assistant]", NUM_SLOW_TOKENS)
        assert beta.stop() == 0
        assert "Traceback" not in beta.output


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
