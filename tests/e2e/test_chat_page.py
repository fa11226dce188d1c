"""The chat page in a real browser: it streams through EventSource, stops, and says what went wrong."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright

from requirements import need_program
from server_process import ServerProcess, serving

ARTIFACTS = Path(__file__).parent / "artifacts"
CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def server(demo_model: Path) -> Iterator[ServerProcess]:
    """A short context bounds the answers, which are drawn at random."""
    with serving("--max-model-len", "400", "--kv-cache-bytes", "256MiB") as process:
        yield process


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = need_program("chromium", "chromium-browser", "google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, server: ServerProcess) -> Iterator[Page]:
    page = browser.new_page(viewport={"width": 1100, "height": 800})
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.goto(server.url())
    yield page
    page.close()
    assert problems == []


def _answer(page: Page, state: str) -> str:
    answer = page.locator(f'article.message[data-role="assistant"][data-state="{state}"]').last
    expect(answer).to_be_visible(timeout=60_000)
    return answer.locator(".text").inner_text()


def test_the_page_streams_an_answer_and_shows_its_speed(page: Page, server: ServerProcess) -> None:
    with page.expect_response("**/v1/streams") as created:
        page.fill("#prompt", "Name three rivers.")
        page.press("#prompt", "Enter")
    answer = _answer(page, "done")
    sent = httpx.get(server.url() + created.value.json()["url"]).json()["text"]
    assert answer.split() == sent.split() != []
    meta = page.locator('article.message[data-role="assistant"] .meta').last.inner_text()
    assert re.search(r"\d+ tokens", meta)
    assert "SmolLM2" in page.locator("#model").inner_text()
    ARTIFACTS.mkdir(exist_ok=True)
    page.screenshot(path=ARTIFACTS / "chat.png")


def _shorten(route: Route) -> None:
    """Bound an answer, so that the context has room for another."""
    body = route.request.post_data_json or {}
    route.continue_(post_data=json.dumps(body | {"max_tokens": 24}))


def test_a_second_turn_sends_the_first_along(page: Page) -> None:
    page.route("**/v1/streams", _shorten)
    page.fill("#prompt", "My name is Ada.")
    page.click("#send")
    _answer(page, "done")
    with page.expect_request("**/v1/streams") as sent:
        page.fill("#prompt", "What is my name?")
        page.click("#send")
    body = sent.value.post_data_json
    assert body is not None
    roles = [message["role"] for message in body["messages"]]
    assert roles == ["user", "assistant", "user"]
    expect(page.locator('article.message[data-role="assistant"][data-state="done"]')).to_have_count(2, timeout=60_000)


def test_stop_cancels_the_stream_on_the_server(page: Page, server: ServerProcess) -> None:
    with page.expect_response("**/v1/streams") as created:
        page.fill("#prompt", "Write a very long story about a river, in many chapters.")
        page.click("#send")
    url = created.value.json()["url"]
    expect(page.locator('article.message[data-role="assistant"] .text').last).not_to_be_empty(timeout=30_000)
    page.click("#stop")
    _answer(page, "done")
    assert httpx.get(server.url() + url).json()["finish_reason"] == "cancelled"
    expect(page.locator("#stop")).to_be_hidden()


def test_the_page_fits_a_phone_in_the_dark(browser: Browser, server: ServerProcess) -> None:
    page = browser.new_page(viewport={"width": 375, "height": 700}, color_scheme="dark")
    page.goto(server.url())
    page.fill("#prompt", "Name three rivers.")
    page.press("#prompt", "Enter")
    _answer(page, "done")
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    ARTIFACTS.mkdir(exist_ok=True)
    page.screenshot(path=ARTIFACTS / "chat-phone.png")
    page.close()
