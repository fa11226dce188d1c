"""The chat page as its user sees it: asking, waiting for an answer, reading what it says."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from playwright.sync_api import Browser, Locator, Page, Route, expect

TIMEOUT_MS = 60_000
# WCAG's contrast of every text with what is behind it, where that is below 4.5.
LOW_CONTRASTS = """
() => {
  const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const luminance = (colour) => colour.slice(0, 3).map((part) => part / 255)
    .map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4))
    .reduce((sum, part, i) => sum + part * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element) => {
    for (let each = element; each; each = each.parentElement) {
      const colour = rgba(getComputedStyle(each).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return [255, 255, 255, 255];
  };
  const low = [];
  for (const element of document.querySelectorAll('body *')) {
    const hasText = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!hasText || !element.checkVisibility() || element.closest('noscript, :disabled')) continue;
    const pair = [luminance(rgba(getComputedStyle(element).color)), luminance(behind(element))].sort((a, b) => b - a);
    const contrast = (pair[0] + 0.05) / (pair[1] + 0.05);
    if (contrast < 4.5) low.push([element.outerHTML.slice(0, 80), contrast]);
  }
  return low;
}
"""


class ChatPage:
    """One tab. `problems` are the page's uncaught errors, which `open_chat_page` wants to be none."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.problems: list[str] = []
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("console", self._on_console)

    def _on_console(self, message: Any) -> None:
        # Chromium reports every refused or cut request as an error of the page's; those are what some tests are about.
        if message.type == "error" and not message.text.startswith("Failed to load resource"):
            self.problems.append(message.text)

    def open(self, url: str) -> None:
        self.page.goto(url)
        expect(self.page.locator("#status")).to_have_attribute("data-state", "ready", timeout=TIMEOUT_MS)

    def bound_answers(self, num_tokens: int, **fields: Any) -> list[dict[str, Any]]:
        """From now on have every answer be so long, with these fields too; returns the bodies that the page sends."""
        bodies: list[dict[str, Any]] = []

        def change(route: Route) -> None:
            if route.request.method != "POST":
                route.fallback()
                return
            bodies.append(route.request.post_data_json or {})
            route.continue_(post_data=json.dumps(bodies[-1] | {"max_tokens": num_tokens} | fields))

        # Of another pattern than the tests' own routes, so that unrouting those leaves it.
        self.page.route(re.compile(r"/v1/streams$"), change)
        return bodies

    def ask(self, question: str) -> None:
        self.page.fill("#prompt", question)
        self.page.press("#prompt", "Enter")

    @property
    def answer(self) -> Locator:
        """The last answer."""
        return self.page.locator(".answer").last

    @property
    def text(self) -> str:
        return self.answer.locator(".text").inner_text()

    def until(self, state: str) -> None:
        expect(self.answer).to_have_attribute("data-state", state, timeout=TIMEOUT_MS)

    def until_note(self, pattern: str) -> None:
        expect(self.answer.locator(".note")).to_have_text(re.compile(pattern), timeout=TIMEOUT_MS)

    def until_text(self, text: str) -> None:
        expect(self.answer.locator(".text")).to_have_text(text, timeout=TIMEOUT_MS)

    def stored(self) -> Any:
        """The newest chat that the browser keeps."""
        key = "Object.keys(localStorage).filter((key) => key.startsWith('headrace.chat.')).sort().at(-1)"
        return json.loads(self.page.evaluate(f"localStorage.getItem({key})"))


@contextmanager
def open_chat_page(browser: Browser, url: str, **options: Any) -> Iterator[ChatPage]:
    """A tab of its own context, open at `url`; what goes wrong inside it fails the test."""
    context = browser.new_context(**({"viewport": {"width": 1100, "height": 800}} | options))
    chat = ChatPage(context.new_page())
    chat.open(url)
    yield chat
    context.close()
    assert chat.problems == []
