"""The example with Gradio, run as its reader would and used in a real browser, before a server on the fake model."""

import os
import re
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from playwright.sync_api import Browser, expect

from fake_engine import expected_text
from live_server import live_server
from requirements import long, need
from waiting import until

EXAMPLE = Path(__file__).parents[2] / "examples" / "gradio_chat.py"
PYTHON = Path(__file__).parent / "clients" / ".venvs" / "gradio" / "bin" / "python"
TIMEOUT_MS = 60_000

pytestmark = long


@contextmanager
def example(server_url: str) -> Iterator[str]:
    """The example's address, once it answers."""
    need(PYTHON.exists(), "what `make setup-clients` installs")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    env = {**os.environ, "GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_SERVER_PORT": str(port)}
    env.pop("PYTHONPATH", None)
    process = subprocess.Popen([PYTHON, EXAMPLE, server_url], env=env)

    def answers() -> bool:
        assert process.poll() is None, "the example has ended"
        try:
            return httpx.get(f"http://127.0.0.1:{port}/").status_code == 200
        except httpx.TransportError:
            return False

    try:
        until(answers, "the example answers", 60)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


def test_answers_stream_go_on_with_the_chat_and_end_where_they_are_stopped(browser: Browser) -> None:
    with live_server() as server, example(server.url) as url:

        def cancelled() -> float:
            metrics = httpx.get(f"{server.url}/metrics").text
            [count] = re.findall(
                r'^headrace_requests_finished_total{finished_reason="cancelled"} (\S+)$', metrics, re.M
            )
            return float(count)

        page = browser.new_context().new_page()
        page.goto(url, wait_until="commit")
        box = page.get_by_role("textbox").last
        prompt = ""
        for number, (question, num_tokens) in enumerate({"hi": 20, "more": 30}.items(), start=1):
            prompt += f"[user]{question}\n[assistant]"
            with server.runner.held():
                box.fill(question, timeout=TIMEOUT_MS)
                box.press("Enter")
                server.runner.allow(num_tokens)
                bot = page.get_by_test_id("bot").nth(number - 1)
                expect(bot).to_have_text(expected_text(prompt, num_tokens), timeout=TIMEOUT_MS)
                page.get_by_test_id("stop-button").click()
                server.runner.allow(1)
                until(lambda number=number: cancelled() == number, "the answer is cancelled")  # type: ignore[misc]
            # The stream can be closed between two pieces of it only.
            expect(page.get_by_test_id("stop-button")).to_be_hidden()
            prompt += f"{bot.inner_text()}\n"
        page.context.close()
