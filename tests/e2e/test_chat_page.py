"""The chat page on the real model, in a real browser: it streams, stops, and loses nothing to a reload or a cut."""

import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, expect

from chat_page import ChatPage, open_chat_page
from requirements import IS_LONG
from server_process import ServerProcess, serving
from tcp_relay import TcpRelay

CUTS_S = [10, 60] if IS_LONG else [10]


@pytest.fixture(scope="module")
def server(demo_model: Path) -> Iterator[ServerProcess]:
    """The server's own grace time is short, so that streams survive because the page asks for a longer one."""
    with serving("--max-model-len", "512", "--kv-cache-bytes", "256MiB", "--stream-grace-s", "1") as process:
        yield process


@pytest.fixture
def chat(browser: Browser, server: ServerProcess) -> Iterator[ChatPage]:
    with open_chat_page(browser, server.url()) as chat:
        yield chat


def _ask(chat: ChatPage, question: str) -> str:
    """Ask, and wait until the answer streams; returns where the server has it."""
    with chat.page.expect_response("**/v1/streams") as created:
        chat.ask(question)
    url: str = created.value.json()["url"]
    chat.until("streaming")
    return url


def _snapshot(server: ServerProcess, url: str) -> dict[str, str]:
    snapshot: dict[str, str] = httpx.get(server.url() + url).json()
    return snapshot


def test_an_answer_streams_and_shows_its_speed(chat: ChatPage, server: ServerProcess) -> None:
    chat.bound_answers(60, ignore_eos=True)
    url = _ask(chat, "Name three rivers.")
    chat.until("done")
    sent = _snapshot(server, url)["text"]
    assert chat.stored()["turns"][0]["answers"][0]["text"] == sent
    # Markdown hides its marks, and the numbers of its lists, and nothing else.
    assert re.findall(r"[^\W\d]+", chat.text) == re.findall(r"[^\W\d]+", sent) != []
    stats = chat.answer.locator(".stats").inner_text()
    assert re.fullmatch(r"60 tokens · [\d.]+ tokens/s · first token after [\d.]+ s · cut at the length limit", stats)
    expect(chat.page.locator("#model")).to_have_text(re.compile("SmolLM2"))


def test_stop_cancels_the_stream_on_the_server(chat: ChatPage, server: ServerProcess) -> None:
    chat.bound_answers(400, ignore_eos=True)
    url = _ask(chat, "Write a very long story about a river, in many chapters.")
    chat.page.click("#stop")
    chat.until("done")
    snapshot = _snapshot(server, url)
    assert snapshot["finish_reason"] == "cancelled"
    assert chat.stored()["turns"][0]["answers"][0]["text"] == snapshot["text"]
    expect(chat.page.locator("#send")).to_be_visible()


def test_a_reload_in_mid_answer_loses_and_doubles_nothing(chat: ChatPage, server: ServerProcess) -> None:
    chat.bound_answers(200, ignore_eos=True)
    url = _ask(chat, "Tell me about the history of water mills.")
    chat.page.reload()
    chat.until("done")
    snapshot = _snapshot(server, url)
    assert snapshot["finish_reason"] == "length"
    assert chat.stored()["turns"][0]["answers"][0]["text"] == snapshot["text"]


@pytest.mark.parametrize("seconds", CUTS_S)
def test_an_answer_survives_a_cut_network(browser: Browser, server: ServerProcess, seconds: int) -> None:
    with TcpRelay(server.url()) as relay, open_chat_page(browser, relay.url) as chat:
        chat.bound_answers(400, ignore_eos=True)
        url = _ask(chat, "Tell me about the history of water mills.")
        relay.cut()
        chat.until_note("Connection lost")
        chat.page.wait_for_timeout(1000 * seconds)
        relay.mend()
        chat.until("done")
        snapshot = _snapshot(server, url)
        assert snapshot["finish_reason"] == "length"
        assert chat.stored()["turns"][0]["answers"][0]["text"] == snapshot["text"]
