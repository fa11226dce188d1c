"""What the chat page does with an answer, its end and its interruptions: on the fake model, in a real browser."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from chat_page import ChatPage, open_chat_page
from fake_engine import FakeRunner
from headrace.server.api_keys import append_key, create_key
from live_server import LiveServer, live_server
from tcp_relay import TcpRelay
from waiting import until

PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}

Relayed = tuple[ChatPage, TcpRelay, FakeRunner]


@pytest.fixture
def fake() -> Iterator[LiveServer]:
    with live_server() as server:
        yield server


@pytest.fixture
def chat(browser: Browser, fake: LiveServer) -> Iterator[ChatPage]:
    with open_chat_page(browser, fake.url) as chat:
        chat.bound_answers(20)
        yield chat


@pytest.fixture
def relayed(browser: Browser) -> Iterator[Relayed]:
    """A page whose connections can be cut, on a model that makes only the tokens it is allowed."""
    runner = FakeRunner()
    with (
        live_server(runner=runner) as fake,
        TcpRelay(fake.url) as relay,
        open_chat_page(browser, relay.url) as chat,
        runner.held(),
    ):
        chat.bound_answers(30)
        yield chat, relay, runner


def answered(chat: ChatPage, question: str) -> str:
    chat.ask(question)
    chat.until("done")
    return chat.text


def say(page: Page, text: str) -> None:
    """Have the next stream answer with this text, in two pieces, instead of the model's."""
    middle = len(text) // 2
    events = "".join(
        f"id: s:{i + 1}\nevent: token\ndata: {json.dumps({'text': part, 'num_tokens': 1})}\n\n"
        for i, part in enumerate((text[:middle], text[middle:]))
    )
    done = {"finish_reason": "stop", "usage": {"completion_tokens": 2}, "timings": {"ttft_s": 0.5, "total_s": 1.5}}
    events += f"id: s:3\nevent: done\ndata: {json.dumps(done)}\n\n"
    page.route(
        "**/v1/streams/*/events*",
        lambda route: route.fulfill(content_type="text/event-stream; charset=utf-8", body=events),
    )


def test_turns_follow_each_other_and_the_whole_chat_is_sent(chat: ChatPage) -> None:
    bodies = chat.bound_answers(20)
    first = answered(chat, "one")
    second = answered(chat, "two")
    assert len(first) == len(second) == 20
    roles = ["user", "assistant", "user"]
    assert [message["role"] for message in bodies[-1]["messages"]] == roles
    assert [message["content"] for message in bodies[-1]["messages"]] == ["one", first, "two"]
    chat.page.reload()
    assert chat.page.locator(".answer .text").all_inner_texts() == [first, second], "a reload keeps both"


def test_editing_a_question_asks_anew_from_there(chat: ChatPage) -> None:
    bodies = chat.bound_answers(20)
    answered(chat, "one")
    answered(chat, "two")
    chat.page.locator(".edit").first.click()
    chat.page.locator(".editor textarea").first.fill("three")
    chat.page.locator(".editor textarea").first.press("Enter")
    chat.until("done")
    assert chat.page.locator(".bubble").all_inner_texts() == ["three"]
    assert [message["content"] for message in bodies[-1]["messages"]] == ["three"]


def test_a_question_can_be_left_as_it_was(chat: ChatPage) -> None:
    answer = answered(chat, "one")
    chat.page.click(".edit")
    chat.page.fill(".editor textarea", "three")
    chat.page.press(".editor textarea", "Escape")
    expect(chat.page.locator(".editor")).to_be_hidden()
    assert (chat.page.locator(".bubble").inner_text(), chat.text) == ("one", answer)


def test_the_first_tokens_time_and_the_pace_are_told(chat: ChatPage) -> None:
    say(chat.page, "ab")
    chat.ask("one")
    chat.until("done")
    expect(chat.answer.locator(".stats")).to_have_text("2 tokens · 1.0 tokens/s · first token after 0.50 s")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_follows_the_systems_colours_until_told_otherwise(browser: Browser, fake: LiveServer, scheme: str) -> None:
    def brightness(page: Page) -> int:
        colour = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        return sum(int(part) for part in re.findall(r"\d+", colour)[:3])

    with open_chat_page(browser, fake.url, color_scheme=scheme) as chat:
        assert (brightness(chat.page) > 380) == (scheme == "light")
        other = "dark" if scheme == "light" else "light"
        chat.page.click("#open-settings")
        chat.page.check(f"#settings input[value={other}]", force=True)
        chat.page.keyboard.press("Escape")
        chat.page.reload()
        assert (brightness(chat.page) > 380) == (other == "light"), "and remembers it"


def test_a_phone_shows_everything_without_scrolling_sideways(browser: Browser, fake: LiveServer) -> None:
    with open_chat_page(browser, fake.url, **PHONE) as chat:
        say(
            chat.page,
            "```\n" + "x" * 400 + "\n```\n\n| " + " | ".join("column" for _ in range(20)) + " |\n" + "|---" * 20 + "|",
        )
        chat.ask("https://example.org/" + "y" * 300)
        chat.until("done")
        width = chat.page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert width[0] <= width[1]
        box = chat.page.locator("#prompt").bounding_box()
        assert box is not None
        assert box["y"] + box["height"] <= 740
        for button in chat.page.locator("button:visible, a.tool:visible").all():
            size = button.bounding_box()
            assert size is not None
            assert min(size["width"], size["height"]) >= 24, "large enough for a finger (WCAG 2.5.8)"


def test_everything_can_be_done_from_the_keyboard(chat: ChatPage) -> None:
    page = chat.page
    focused = "document.activeElement.getAttribute('aria-label') ?? document.activeElement.innerText"
    expect(page.locator("#prompt")).to_be_focused()
    page.keyboard.type("line one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("line two")
    page.keyboard.press("Enter")
    chat.until("done")
    assert page.locator(".bubble").inner_text() == "line one\nline two"
    reached = []
    for _ in range(20):
        page.keyboard.press("Shift+Tab")
        reached.append(page.evaluate(focused).strip())
        outline = page.evaluate(
            "getComputedStyle(document.activeElement).outlineStyle + getComputedStyle(document.activeElement).boxShadow"
        )
        assert outline != "nonenone", f"{reached[-1]} does not show its focus"
        if "Skip to the message box" in reached:
            break
    assert {
        "Regenerate the answer",
        "Copy the answer",
        "Edit the message",
        "Settings",
        "Skip to the message box",
    } <= set(reached)


def test_escape_stops_an_answer(browser: Browser) -> None:
    runner = FakeRunner()
    with live_server(runner=runner) as fake, open_chat_page(browser, fake.url) as chat:
        chat.bound_answers(400)
        with runner.held():
            chat.ask("one")
            runner.allow(3)
            chat.until("streaming")
            chat.page.keyboard.press("Escape")
            chat.until("done")
        expect(chat.answer.locator(".stats")).to_contain_text("stopped")
        assert fake.app.client.num_unfinished == 0


def test_a_closed_event_source_is_made_anew_where_it_stopped(relayed: Relayed) -> None:
    chat, relay, runner = relayed
    chat.page.evaluate(
        """() => {
            window.states = [];
            const Real = EventSource;
            window.EventSource = class extends Real {
                constructor(url) {
                    super(url);
                    this.addEventListener('error', () => states.push(this.readyState));
                }
            };
        }"""
    )
    chat.ask("one")
    runner.allow(5)
    chat.until("streaming")
    # A proxy's own answer, which ends an EventSource for good, to the reconnection and to what looks into it.
    chat.page.route("**/v1/streams/*/events*", lambda route: route.fulfill(status=502, body="a proxy's page"))
    relay.cut()
    relay.mend()
    chat.until_note("Connection lost")
    until(lambda: chat.page.evaluate("states.includes(EventSource.CLOSED)"), "the browser gives up")
    runner.allow(1000)
    chat.page.unroute("**/v1/streams/*/events*")
    chat.until("done")
    assert len(chat.text) == 30


def test_a_lost_connection_shows_beside_the_model_until_it_is_back(relayed: Relayed) -> None:
    chat, relay, runner = relayed
    chat.ask("one")
    runner.allow(5)
    chat.until("streaming")
    status = chat.page.locator("#status")
    expect(status).to_have_attribute("data-state", "ready")
    relay.cut()
    expect(status).to_have_attribute("data-state", "unreachable")
    expect(status).to_contain_text("no connection")
    relay.mend()
    expect(status).to_have_attribute("data-state", "ready")
    runner.allow(1000)
    chat.until("done")


def test_a_refusal_is_shown_with_a_way_to_try_again(chat: ChatPage) -> None:
    chat.page.route(
        "**/v1/streams", lambda route: route.fulfill(status=400, json={"error": {"message": "no such thing"}})
    )
    chat.ask("one")
    chat.until("error")
    expect(chat.answer.locator(".error")).to_contain_text("No such thing.")
    chat.page.unroute("**/v1/streams")
    chat.bound_answers(20)
    chat.page.click(".retry")
    chat.until("done")


def test_a_server_with_keys_asks_for_one_and_goes_on(browser: Browser, tmp_path: Path) -> None:
    secret, key = create_key("alice")
    file = tmp_path / "keys.toml"
    append_key(file, key)
    with live_server(api_keys_file=file) as fake, open_chat_page(browser, fake.url) as chat:
        chat.bound_answers(20)
        chat.ask("one")
        chat.page.fill("#key input[name=key]", "wrong")
        chat.page.keyboard.press("Enter")
        expect(chat.page.locator("#key")).to_be_visible()
        chat.page.fill("#key input[name=key]", secret)
        chat.page.keyboard.press("Enter")
        chat.until("done")
        assert secret not in chat.page.evaluate("JSON.stringify(localStorage)"), "unless told to remember it"


def test_settings_go_along_with_the_next_question(chat: ChatPage) -> None:
    bodies = chat.bound_answers(20)
    chat.page.click("#open-settings")
    chat.page.fill("#settings [name=system]", "Be brief.")
    chat.page.fill("#settings [name=temperature]", "0.5")
    chat.page.fill("#settings [name=max_tokens]", "7")
    chat.page.click("#settings button.primary")
    answered(chat, "one")
    assert bodies[-1]["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (bodies[-1]["temperature"], bodies[-1]["max_tokens"]) == (0.5, 7)
