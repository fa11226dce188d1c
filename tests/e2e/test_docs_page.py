"""The page of the API in a real browser: all that the document has is on it, and what it offers to try works."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from fake_engine import expected_text
from headrace.server.api_keys import append_key, create_key
from live_server import LiveServer, live_server

CHAT_PROMPT = "[user]Hello\n[assistant]"


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with live_server() as server:
        yield server


@contextmanager
def docs_page(browser: Browser, url: str) -> Iterator[Page]:
    """The page, open at `url`; what goes wrong inside it, or would be fetched from elsewhere, fails the test."""
    context = browser.new_context()
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(f"{message.type}: {message.text}"))
    requested: list[str] = []
    page.on("request", lambda request: requested.append(request.url))
    page.goto(f"{url}/docs")
    yield page
    context.close()
    # Chromium reports every refused request, and those are what some tests are about.
    assert [problem for problem in problems if not problem.startswith("error: Failed to load resource")] == []
    assert all(requested_url.startswith(url) for requested_url in requested)


@pytest.fixture
def page(browser: Browser, server: LiveServer) -> Iterator[Page]:
    with docs_page(browser, server.url) as page:
        yield page


def opened(page: Page, operation: str) -> Locator:
    entry = page.locator(f"#{operation}")
    entry.locator("summary").first.click()
    return entry


def send(page: Page, operation: str, body: dict[str, Any] | None = None) -> Locator:
    entry = opened(page, operation)
    if body is not None:
        entry.locator("textarea").fill(json.dumps(body))
    entry.get_by_role("button", name="Send").click()
    return entry


def test_every_route_and_shape_is_on_the_page_and_every_link_leads_somewhere(page: Page, server: LiveServer) -> None:
    document = httpx.get(f"{server.url}/openapi.json").json()
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    expect(page.locator("#operations > details")).to_have_count(len(operations))
    for operation in operations:
        expect(page.locator(f"#{operation['operationId']} > summary")).to_contain_text(operation["summary"])
    schemas = document["components"]["schemas"]
    assert set(page.locator("#schemas > details > summary").all_inner_texts()) == set(schemas)
    for name in ("ChatCompletionRequest", "Usage"):
        fields = page.locator(f"#shape-{name} th[scope=row]").all_text_contents()
        assert sorted(fields) == sorted(schemas[name]["properties"])
    targets = set(page.eval_on_selector_all("main a", "links => links.map(link => link.getAttribute('href').slice(1))"))
    assert targets <= set(page.eval_on_selector_all("[id]", "found => found.map(each => each.id)"))
    assert "shape-ChatMessage" in targets


def test_a_link_opens_the_shape_that_it_names(page: Page) -> None:
    entry = opened(page, "chat_completions")
    entry.get_by_role("link", name="ChatCompletionRequest", exact=True).click()
    expect(page.locator("#shape-ChatCompletionRequest")).to_have_attribute("open", "")
    expect(page.locator("#shape-ChatCompletionRequest").get_by_text("temperature", exact=True)).to_be_in_viewport()


def test_an_example_can_be_tried(page: Page) -> None:
    entry = send(page, "chat_completions")
    expect(entry.locator("output")).to_contain_text("200 after")
    expect(entry.locator(".example")).to_have_text(re.compile("}$"))
    answer = json.loads(entry.locator(".example").inner_text())
    assert answer["choices"][0]["message"]["content"] == expected_text(CHAT_PROMPT, 8)


def test_a_stream_is_shown_as_it_comes_and_can_be_stopped(page: Page, server: LiveServer) -> None:
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 100, "stream": True}
    with server.runner.held():
        entry = send(page, "chat_completions", body)
        server.runner.allow(3)
        expect(entry.locator(".example")).to_contain_text(f'"content":"{expected_text(CHAT_PROMPT, 1)}')
        entry.get_by_role("button", name="Stop").click()
        expect(entry.locator("output")).to_have_text("stopped")
        expect(entry.get_by_role("button", name="Stop")).to_be_hidden()
    expect(entry.locator(".example")).not_to_contain_text("[DONE]")


def test_a_path_and_a_query_are_filled_in(page: Page) -> None:
    entry = opened(page, "model")
    entry.get_by_label("id (path)").fill("fake")
    entry.get_by_role("button", name="Send").click()
    expect(entry.locator(".example")).to_contain_text('"task": "generate"')
    entry = opened(page, "stream")
    entry.get_by_label("prompt (query)").fill("The river & the mill")
    entry.get_by_label("max_tokens (query)").fill("4")
    entry.get_by_label("stop (query)").fill("never there")
    entry.get_by_role("button", name="Send").click()
    expect(entry.locator(".example")).to_contain_text("event: done")


def test_a_refusal_names_its_field(page: Page) -> None:
    entry = send(page, "completions", {"prompt": "a", "temperature": "hot"})
    expect(entry.locator("output")).to_contain_text("400")
    expect(entry.locator("output")).to_have_class("failed")
    expect(entry.locator(".example")).to_contain_text('"param": "temperature"')


def test_where_there_are_keys_the_page_asks_for_one(browser: Browser, tmp_path: Path) -> None:
    secret, key = create_key("someone")
    append_key(tmp_path / "keys.toml", key)
    with live_server(api_keys_file=tmp_path / "keys.toml") as server, docs_page(browser, server.url) as page:
        expect(page.locator("#about")).to_contain_text("an API key is needed")
        page.get_by_label("API key").fill(secret)
        page.get_by_role("button", name="Use it").click()
        entry = send(page, "version")
        expect(entry.locator("output")).to_contain_text("200 after")
