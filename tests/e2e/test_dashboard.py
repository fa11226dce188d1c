"""The operator's page in a real browser: what it shows is what the server counts, and it asks for a key where there are
some.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import httpx
from playwright.sync_api import Browser, Page, expect

from chat_page import LOW_CONTRASTS
from headrace.server.api_keys import append_key, create_key
from live_server import live_server
from server_process import ServerProcess

TIMEOUT_MS = 20_000


@contextmanager
def opened(browser: Browser, url: str) -> Iterator[Page]:
    context = browser.new_context()
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(f"{url}/dashboard")
    yield page
    context.close()
    assert problems == []


def live(page: Page) -> None:
    expect(page.locator("#status-text")).to_have_text("live", timeout=TIMEOUT_MS)


def test_it_shows_what_the_server_counts(browser: Browser, server: ServerProcess) -> None:
    body = {"prompt": "The mill wheel", "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    with opened(browser, server.url()) as page:
        live(page)
        assert httpx.post(f"{server.url()}/v1/completions", json=body, timeout=60).status_code == 200
        row = page.locator("#latency tbody tr")
        cells = row.locator("td")
        expect(cells.nth(1)).to_have_text(re.compile(r"^[\d.]+ m?s$"), timeout=TIMEOUT_MS)
        expect(row.locator("th")).to_have_text("standard")
        assert all(re.fullmatch(r"[\d.]+ m?s", text) for text in cells.all_inner_texts()[1:])
        finished = server.metrics()['headrace_requests_finished_total{finished_reason="length"}']
        expect(page.locator("#finished tr", has_text="length").locator("td").nth(1)).to_have_text(f"{finished:,.0f}")
        expect(page.locator("#model")).to_have_text("SmolLM2-135M-Instruct")
        for tile in ("running", "waiting", "generated", "prompt", "cache", "preempted"):
            expect(page.locator(f"#{tile} b")).to_have_text(re.compile(r"^[\d,.]+( %)?$"))
        schemes: tuple[Literal["light", "dark"], ...] = ("light", "dark")
        for scheme in schemes:
            page.emulate_media(color_scheme=scheme)
            assert page.evaluate(LOW_CONTRASTS) == []
        page.get_by_role("button", name="Pause").click()
        expect(page.locator("#status-text")).to_have_text("paused")


def test_it_asks_for_a_key_where_there_are_some_and_says_when_the_server_is_gone(
    browser: Browser, tmp_path: Path
) -> None:
    secret, key = create_key("alice")
    append_key(tmp_path / "keys.toml", key)
    with live_server(api_keys_file=tmp_path / "keys.toml") as server, opened(browser, server.url) as page:
        expect(page.locator("#status-text")).to_have_text("a key is needed")
        page.get_by_label("to those who have a key").fill("hr-wrong")
        page.get_by_role("button", name="Use this key").click()
        expect(page.locator("#status-text")).to_have_text("the server did not accept this key")
        page.get_by_label("to those who have a key").fill(secret)
        page.get_by_role("button", name="Use this key").click()
        live(page)
        expect(page.locator("#key")).to_be_hidden()
        expect(page.locator("#running b")).to_have_text("0")
        server.stop()
        expect(page.locator("#status-text")).to_have_text("no connection", timeout=TIMEOUT_MS)
