"""What the chat page keeps, survives and tells, on the fake model: exact texts through reloads and restarts."""

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Route, expect

from chat_page import LOW_CONTRASTS, ChatPage, open_chat_page
from fake_engine import expected_text, make_scheduler
from live_server import LiveServer, live_server
from tcp_relay import TcpRelay
from waiting import until

NUM_TOKENS = 30


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    """One sequence runs at a time and one may wait; the grace time is the page's, not the server's."""
    with live_server(scheduler=make_scheduler(max_num_seqs=1), max_queue_size=2, stream_grace_s=0) as server:
        yield server


@pytest.fixture
def chat(browser: Browser, server: LiveServer) -> Iterator[ChatPage]:
    with open_chat_page(browser, server.url) as chat:
        chat.bound_answers(NUM_TOKENS)
        yield chat


def said(*turns: str, system: str = "", num_tokens: int = NUM_TOKENS) -> str:
    """What the fake model answers to a question, after other questions and answers."""
    roles = ("user", "assistant") * len(turns)
    prompt = f"[system]{system}\n" if system else ""
    prompt += "".join(f"[{role}]{text}\n" for role, text in zip(roles, turns, strict=False))
    return expected_text(f"{prompt}[assistant]", num_tokens)


def record(chat: ChatPage) -> Any:
    turn = chat.stored()["turns"][-1]
    return turn["answers"][turn["shown"]]


def test_the_place_in_the_queue_is_shown_then_live_speed_then_the_measured_one(
    chat: ChatPage, server: LiveServer
) -> None:
    with server.runner.held():
        first = httpx.post(f"{server.url}/v1/streams", json={"prompt": "a", "max_tokens": 9, "disconnect_grace_s": 60})
        assert first.status_code == 201
        server.runner.allow(1)
        chat.ask("hi")
        chat.until_note(r"^Number 1 in the queue(, about \d+ s)?$")
        server.runner.allow(8 + 20)
        chat.until("streaming")
        stats = chat.answer.locator(".stats")
        expect(stats).to_contain_text("first token after")
        chat.page.wait_for_timeout(100)  # a rate needs some time to be one
        server.runner.allow(5)
        expect(stats).to_have_text(re.compile(r"^\d+ tokens · [\d.]+ tokens/s · first token after [\d.]+ s$"))
    chat.until("done")
    expect(stats).to_have_text(
        re.compile(rf"^{NUM_TOKENS} tokens · [\d.]+ tokens/s · first token after [\d.]+ s · cut at the length limit$")
    )
    assert chat.text == said("hi")


def test_regenerating_keeps_the_other_answers_and_the_shown_one_is_sent_on(chat: ChatPage) -> None:
    page = chat.page
    chat.ask("hi")
    chat.until("done")
    expect(chat.answer.locator(".alternatives")).to_be_hidden()
    page.route(
        "**/v1/streams", lambda route: route.continue_(post_data=json.dumps({"prompt": "other", "max_tokens": 9}))
    )
    page.get_by_label("Regenerate").click()
    chat.until_text(expected_text("other", 9))
    chat.until("done")
    page.unroute("**/v1/streams")
    expect(chat.answer.locator(".place")).to_have_text("2 / 2")
    page.get_by_label("Previous answer").click()
    chat.until_text(said("hi"))
    page.reload()
    expect(chat.answer.locator(".place")).to_have_text("1 / 2")
    chat.ask("more")
    chat.until_text(said("hi", said("hi"), "more"))
    expect(page.locator(".answer").first.locator(".alternatives")).to_be_hidden()


def test_a_reload_goes_on_with_the_same_answer(chat: ChatPage, server: LiveServer) -> None:
    with server.runner.held():
        chat.ask("hi")
        until(lambda: record(chat)["stream"] is not None, "the page knows where its answer is")
        chat.page.reload()
        chat.until_note("queue|first token")
        for num_tokens in (3, 8):
            server.runner.allow(num_tokens + 1 - len(chat.text))
            expect(chat.answer.locator(".text")).to_have_text(re.compile(rf"^[a-z]{{{num_tokens},}}$"))
            chat.page.reload()
            expect(chat.answer.locator(".text")).to_have_text(re.compile(rf"^[a-z]{{{num_tokens},}}$"))
    chat.until("done")
    assert chat.text == said("hi") == record(chat)["text"]


def test_a_reload_before_the_server_has_answered_asks_again(chat: ChatPage) -> None:
    asked: list[Route] = []
    chat.page.route("**/v1/streams", lambda route: asked.append(route))
    chat.ask("hi")
    until(lambda: (chat.page.title(), len(asked))[1] == 1, "the page has asked")
    chat.page.reload()
    until(lambda: (chat.page.title(), len(asked))[1] == 2, "it asks once more")
    asked[1].fallback()
    chat.until("done")
    assert chat.text == said("hi")


def test_a_crash_loses_only_what_the_server_still_has(browser: Browser, server: LiveServer) -> None:
    """Without the page's last word, what is stored is older than what was seen, and reading goes on from there."""
    with open_chat_page(browser, server.url) as chat:
        chat.bound_answers(NUM_TOKENS)
        with server.runner.held():
            server.runner.allow(6)
            chat.ask("hi")
            chat.until("streaming")
            until(lambda: record(chat)["text"] != "", "the page has saved what it saw")
            saved = chat.page.evaluate("({ ...localStorage })")
            url = chat.page.url
            server.runner.allow(10)
        chat.until("done")
        other = browser.new_context()
        chat_again = ChatPage(other.new_page())
        chat_again.page.goto(f"{server.url}/health")
        chat_again.page.evaluate("(saved) => Object.assign(localStorage, saved)", saved)
        chat_again.open(url)
        chat_again.until("done")
        assert chat_again.text == said("hi")
        other.close()


def test_coming_online_ends_the_wait_at_once(browser: Browser, server: LiveServer) -> None:
    """The page's longer timers do not run, so that only the event can make it try again."""
    with open_chat_page(browser, server.url) as chat:
        chat.bound_answers(NUM_TOKENS)
        chat.page.evaluate(
            """() => {
              const setTimeout = window.setTimeout;
              window.setTimeout = (callback, ms) => (ms > 200 ? 0 : setTimeout(callback, ms));
            }"""
        )
        chat.page.route("**/events*", lambda route: route.fulfill(status=502, body="Bad gateway"))
        with server.runner.held():
            with chat.page.expect_response(
                lambda response: response.request.resource_type == "fetch" and "/events" in response.url
            ):
                chat.ask("hi")  # and the page asks what closed its EventSource
            chat.until_note("Connection lost")
            chat.page.unroute("**/events*")
            chat.page.evaluate("dispatchEvent(new Event('online'))")
            chat.until_note("queue|first token")
        chat.until("done")
        assert chat.text == said("hi")


def test_a_connection_that_fell_silent_is_replaced(browser: Browser, server: LiveServer) -> None:
    with TcpRelay(server.url) as relay:
        context = browser.new_context()
        chat = ChatPage(context.new_page())
        chat.page.clock.install()
        chat.open(relay.url)
        chat.bound_answers(NUM_TOKENS)
        with server.runner.held():
            server.runner.allow(6)
            chat.ask("hi")
            chat.until("streaming")
            relay.freeze()
        with chat.page.expect_request("**/events?last_event_id=*"):
            chat.page.clock.fast_forward(26_000)
        chat.until("done")
        assert chat.text == said("hi")
        context.close()
        assert chat.problems == []


def test_a_restarted_server_is_told_of_and_the_answer_can_be_had_again(browser: Browser) -> None:
    with live_server() as first:
        context = browser.new_context()
        chat = ChatPage(context.new_page())
        chat.open(first.url)
        chat.bound_answers(NUM_TOKENS)
        with first.runner.held():
            first.runner.allow(6)
            chat.ask("hi")
            chat.until("streaming")
            seen = chat.text
            first.should_exit = True
            chat.until_note("Connection lost")
    with live_server(port=first.port):
        chat.until("error")
        expect(chat.answer.locator(".error")).to_contain_text("It was probably restarted.")
        assert chat.text.startswith(seen)
        chat.page.get_by_role("button", name="Try again").click()
        chat.until("done")
        assert chat.text == said("hi")
        context.close()


def test_an_overloaded_server_is_asked_again_when_it_said(chat: ChatPage, server: LiveServer) -> None:
    body = {"prompt": "a", "max_tokens": 2, "disconnect_grace_s": 60}
    with server.runner.held():
        while httpx.post(f"{server.url}/v1/streams", json=body).status_code != 429:
            pass
        chat.ask("hi")
        chat.until_note(r"Trying again in \d+ s$")
    chat.until("done")
    assert chat.text == said("hi")


def test_waiting_for_an_overloaded_server_can_be_stopped(chat: ChatPage) -> None:
    refusal = {
        "error": {"message": "the queue is full", "type": "overloaded_error", "param": None, "code": "queue_full"}
    }
    chat.page.route(
        "**/v1/streams", lambda route: route.fulfill(status=429, json=refusal, headers={"retry-after": "100"})
    )
    chat.ask("hi")
    chat.until_note(r"^The queue is full\. Trying again in \d+ s$")
    chat.page.click("#stop")
    chat.until("done")
    expect(chat.answer.locator(".stats")).to_have_text("stopped")


@pytest.mark.parametrize("is_remembered", [False, True])
def test_a_server_with_keys_is_given_one(chat: ChatPage, server: LiveServer, is_remembered: bool) -> None:
    page = chat.page

    def guard(route: Route) -> None:
        if route.request.method == "GET" or route.request.headers.get("authorization") == "Bearer right":
            route.fallback()
        else:
            route.fulfill(status=401, json={"error": {"message": "no key", "type": "authentication_error"}})

    page.route(re.compile("/v1/streams"), guard)
    chat.ask("hi")
    page.get_by_label("Key", exact=True).fill("wrong")
    page.get_by_role("button", name="Use this key").click()
    expect(page.locator("#key-reason")).to_have_text("The server did not accept this key.")
    page.get_by_label("Key", exact=True).fill("right")
    page.get_by_label("Remember").set_checked(is_remembered)
    page.keyboard.press("Enter")
    chat.until("done")
    assert chat.text == said("hi")
    kept = page.evaluate("[sessionStorage, localStorage].map((area) => area.getItem('headrace.key'))")
    assert kept == ([None, '"right"'] if is_remembered else ['"right"', None])
    page.reload()
    with server.runner.held():
        with page.expect_response("**/v1/streams"):
            chat.ask("again")
        chat.until_note("queue")
        with page.expect_response(lambda response: response.request.method == "DELETE") as deleted:
            page.click("#stop")
    assert deleted.value.ok
    chat.until("done")
    page.click("#open-settings")
    page.get_by_role("button", name="Forget the API key").click()
    page.get_by_role("button", name="Done").click()
    chat.ask("and again")
    page.get_by_role("button", name="Cancel").click()
    chat.until("error")
    expect(chat.answer.locator(".error")).to_contain_text("This server asks for an API key.")


def test_an_unreachable_server_and_a_failed_answer_can_be_tried_again(chat: ChatPage, server: LiveServer) -> None:
    page = chat.page
    page.route("**/v1/streams", lambda route: route.abort())
    chat.ask("hi")
    chat.until("error")
    expect(chat.answer.locator(".error")).to_contain_text("The server cannot be reached.")
    page.unroute("**/v1/streams")
    server.runner.fail_next = True
    page.get_by_role("button", name="Try again").click()
    expect(chat.answer.locator(".error")).to_contain_text("The model failed while computing")
    page.get_by_role("button", name="Try again").click()
    chat.until("done")
    assert chat.text == said("hi")
    expect(chat.answer.locator(".alternatives")).to_be_hidden()


def test_chats_are_kept_listed_opened_and_deleted(chat: ChatPage, server: LiveServer) -> None:
    page = chat.page
    for question in ("first question", "second question"):
        with page.expect_navigation(url=f"{server.url}/"):
            page.get_by_role("link", name="New chat", exact=True).click()
        expect(page.locator("#status")).to_have_attribute("data-state", "ready")
        chat.ask(question)
        chat.until("done")
    page.get_by_role("button", name="Chats").click()
    titles = page.locator("#chat-list a")
    assert titles.all_inner_texts() == ["second question", "first question"]
    titles.last.click()
    expect(page.locator(".bubble")).to_have_text("first question")
    assert chat.text == said("first question")
    expect(page).to_have_title("first question · Headrace")
    page.get_by_role("button", name="Chats").click()
    with page.expect_navigation(url=f"{server.url}/"):  # what is there before the page's scripts have run shows no list
        page.get_by_label("Delete “first question”").click()
    expect(page.locator("#welcome")).to_be_visible()
    page.get_by_role("button", name="Chats").click()
    assert titles.all_inner_texts() == ["second question"]


def test_what_the_browser_keeps_is_bounded(chat: ChatPage) -> None:
    chat.page.evaluate(
        """() => { for (let i = 0; i < 60; i++) localStorage['headrace.chat.0' + String(i).padStart(2, '0')] =
                     JSON.stringify({ id: String(i), turns: [], filler: 'x'.repeat(80000) }) }"""
    )
    chat.ask("hi")
    chat.until("done")
    keys = chat.page.evaluate("Object.keys(localStorage).filter((key) => key.startsWith('headrace.chat.')).sort()")
    assert len(keys) == 50
    assert "headrace.chat.059" in keys
    assert "headrace.chat.010" not in keys
    assert record(chat)["text"] == said("hi")


def test_a_second_tab_follows_the_same_chat(chat: ChatPage) -> None:
    chat.ask("one")
    chat.until("done")
    second = ChatPage(chat.page.context.new_page())
    second.open(chat.page.url)
    chat.page.bring_to_front()
    chat.ask("two")
    chat.until_text(said("one", said("one"), "two"))
    expect(second.page.locator(".turn")).to_have_count(2)
    second.until_text(chat.text)
    assert second.problems == []


def test_a_second_tab_does_not_ask_what_the_first_one_is_asking(chat: ChatPage) -> None:
    second = ChatPage(chat.page.context.new_page())
    chat.ask("one")
    chat.until("done")
    second.open(chat.page.url)
    asked: list[Route] = []
    for tab in (chat, second):
        tab.page.route("**/v1/streams", lambda route: asked.append(route))
    chat.page.bring_to_front()
    chat.ask("two")
    until(lambda: chat.stored()["turns"][-1]["question"] == "two", "the question is kept")
    second.page.evaluate("new Promise((resolve) => setTimeout(resolve, 300))")
    asked[0].fallback()
    chat.until_text(said("one", said("one"), "two"))
    second.until_text(chat.text)
    assert len(asked) == 1


def test_without_storage_the_page_still_answers(browser: Browser, server: LiveServer) -> None:
    context = browser.new_context()
    context.add_init_script(
        "for (const name of ['localStorage', 'sessionStorage'])"
        " Object.defineProperty(window, name, { get() { throw new DOMException('blocked', 'SecurityError') } })"
    )
    chat = ChatPage(context.new_page())
    chat.open(server.url)
    chat.ask("hi")
    chat.until("done")
    assert chat.text == said("hi", num_tokens=len(chat.text)) != ""
    warning = chat.page.locator("#keys")
    expect(warning).to_contain_text("cannot be kept")
    chat.page.set_viewport_size({"width": 360, "height": 740})
    box = warning.bounding_box()
    assert box is not None
    assert box["width"] > 100, "on a phone, too, which has no keys to tell of"
    context.close()
    assert chat.problems == []


def test_where_others_have_taken_the_room_the_chats_that_are_kept_stay(chat: ChatPage, server: LiveServer) -> None:
    chat.ask("one")
    chat.until("done")
    url = chat.page.url
    chat.page.evaluate(
        """() => {
          for (let chars = 4e6, i = 0; chars > 1; ) {
            try { localStorage[`other${i++}`] = 'x'.repeat(chars); } catch { chars = Math.floor(chars / 2); }
          }
        }"""
    )
    chat.open(f"{server.url}/")
    chat.ask("two " * 5000)
    expect(chat.page.locator("#keys")).to_contain_text("cannot be kept")
    chat.open(url)
    assert chat.text == said("one")


@pytest.mark.parametrize("stored", ["{}", "[1]", '{"turns": [{}]}', '{"turns": [{"answers": [], "shown": 0}]}', "x"])
def test_what_is_no_chat_is_not_opened(browser: Browser, server: LiveServer, stored: str) -> None:
    with open_chat_page(browser, server.url) as chat:
        chat.page.evaluate("(stored) => { localStorage['headrace.chat.0'] = stored }", stored)
        chat.open(f"{server.url}/?chat=0")
        expect(chat.page.locator("#welcome")).to_be_visible()
        chat.page.get_by_role("button", name="Chats").click()
        expect(chat.page.locator("#chat-list li")).to_have_count(0)


def test_a_refusal_without_a_reason_is_one_all_the_same(chat: ChatPage) -> None:
    chat.page.route("**/v1/streams", lambda route: route.fulfill(status=500, json={"error": {"message": " "}}))
    chat.ask("hi")
    chat.until("error")
    expect(chat.answer.locator(".error span")).to_have_text("The server did not say why.")


def test_a_setting_that_cannot_be_does_not_stand_there_as_if_it_were_one(chat: ChatPage) -> None:
    chat.page.click("#open-settings")
    chat.page.fill("#settings [name=temperature]", "5000")
    chat.page.fill("#settings [name=top_p]", "0.5")
    chat.page.keyboard.press("Escape")
    bodies = chat.bound_answers(NUM_TOKENS)
    chat.ask("hi")
    chat.until("done")
    assert bodies[-1]["top_p"] == 0.5
    assert "temperature" not in bodies[-1]
    chat.page.click("#open-settings")
    assert chat.page.input_value("#settings [name=temperature]") == ""


def test_an_edit_waits_for_the_answer_under_way(chat: ChatPage, server: LiveServer) -> None:
    chat.ask("one")
    chat.until("done")
    chat.page.click(".edit")
    chat.page.fill(".editor textarea", "three")
    with server.runner.held():
        chat.ask("two")
        expect(chat.page.locator(".editor .primary").first).to_be_disabled()
        chat.page.locator(".editor textarea").first.press("Enter")
        expect(chat.page.locator(".bubble")).to_have_text(["one", "two"])
    chat.until("done")
    chat.page.locator(".editor textarea").first.press("Enter")
    chat.until_text(said("three"))


@pytest.mark.parametrize(
    ("status", "text"), [("draining", "shutting down"), ("engine_dead", "failed"), (None, "no connection")]
)
def test_why_the_server_is_not_ready_is_told(browser: Browser, server: LiveServer, status: str, text: str) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.route(
        "**/ready", lambda route: route.fulfill(status=503, json={"status": status}) if status else route.abort()
    )
    page.goto(server.url)
    expect(page.locator("#status-text")).to_contain_text(text)
    context.close()


def test_escape_while_composing_leaves_the_editor_open(chat: ChatPage) -> None:
    chat.ask("hi")
    chat.until("done")
    chat.page.click(".edit")
    editor = chat.page.locator(".editor textarea")
    editor.evaluate(
        """(field) => {
          field.dispatchEvent(new KeyboardEvent('keydown', { key: 'Escape', isComposing: true, bubbles: true }));
        }"""
    )
    expect(editor).to_be_visible()
    editor.press("Escape")
    expect(editor).to_be_hidden()


def test_what_is_announced_is_the_answer_once_not_every_token(chat: ChatPage, server: LiveServer) -> None:
    chat.page.evaluate(
        """() => {
          window.announced = [];
          const announcer = document.getElementById('announcer');
          new MutationObserver(() => announced.push(announcer.textContent)).observe(announcer, { childList: true });
        }"""
    )
    assert chat.page.locator("[aria-live], [role=log], [role=alert]").count() == 0
    with server.runner.held():
        chat.ask("hi")
        for num_tokens in range(2, 12):
            server.runner.allow(1)
            expect(chat.answer.locator(".text")).to_have_text(re.compile(rf"^[a-z]{{{num_tokens - 1},}}$"))
            expect(chat.answer).to_have_attribute("aria-busy", "true")
    chat.until("done")
    expect(chat.answer).to_have_attribute("aria-busy", "false")
    announced = [text for text in chat.page.evaluate("announced") if text]
    assert announced[-1] == said("hi")
    assert len(announced) <= 4
    assert all("queue" in text or "first token" in text for text in announced[:-1])


def test_the_page_follows_the_text_unless_the_reader_has_scrolled_up(browser: Browser, server: LiveServer) -> None:
    with open_chat_page(browser, server.url, viewport={"width": 400, "height": 300}) as chat:
        chat.bound_answers(400)
        page = chat.page
        jump = page.get_by_role("button", name="Jump to latest")
        distance = "document.documentElement.scrollHeight - innerHeight - scrollY"
        with server.runner.held():
            chat.ask("hi\n" * 30)
            server.runner.allow(20)
            chat.until("streaming")
            until(lambda: page.evaluate(distance) < 2, "the end is in view")
            expect(jump).to_be_hidden()
            page.evaluate("scrollTo(0, 200)")
            expect(jump).to_be_visible()
            server.runner.allow(300)
            expect(chat.answer.locator(".text")).to_have_text(re.compile("^[a-z]{300,}$"))
            assert page.evaluate("scrollY") == 200
            jump.click()
            until(lambda: page.evaluate(distance) < 2, "the end is in view again")
            expect(jump).to_be_hidden()
            server.runner.allow(60)
            expect(chat.answer.locator(".text")).to_have_text(re.compile("^[a-z]{360,}$"))
            until(lambda: page.evaluate(distance) < 2, "and stays there")
            page.focus("#stop")
            page.evaluate("scrollTo(0, 200)")
            expect(jump).to_be_visible()
            page.evaluate("getSelection().selectAllChildren(document.querySelector('.bubble'))")
        chat.until("done")
        assert page.evaluate("scrollY") == 200, "the end does not take a reader away"
        assert page.evaluate("getSelection().toString()").startswith("hi")


EVERY_KIND = "# T\n\n**b** `code` [l](https://x.org) ~~d~~\n\n> quote\n\n- li\n\n```py\nx\n```\n\n|a|\n|-|\n|1|"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read_and_nothing_moves_for_those_who_want_it_still(
    browser: Browser, server: LiveServer, scheme: str
) -> None:
    with open_chat_page(browser, server.url, color_scheme=scheme, reduced_motion="reduce") as chat:
        page = chat.page
        assert page.evaluate(LOW_CONTRASTS) == []
        fields = {"text": EVERY_KIND, "numTokens": 9, "usage": None, "timings": None, "finishReason": "stop"}
        answers = [fields | {"state": "done", "error": None}, fields | {"state": "error", "error": "It failed."}]
        stored = {"id": "a", "turns": [{"question": "hi", "answers": [answer], "shown": 0} for answer in answers]}
        page.evaluate("(chat) => { localStorage['headrace.chat.a'] = JSON.stringify(chat) }", stored)
        chat.open(f"{server.url}/?chat=a")
        chat.until("error")
        assert page.evaluate(LOW_CONTRASTS) == []
        for button in ("Settings", "Chats"):
            page.get_by_role("button", name=button).click()
            assert page.evaluate(LOW_CONTRASTS) == []
            page.keyboard.press("Escape")
        with server.runner.held():
            server.runner.allow(5)
            chat.ask("hi")
            chat.until("streaming")
            assert page.evaluate(LOW_CONTRASTS) == []
            running = (
                "document.getAnimations().filter((each) => each.effect.getTiming().iterations === Infinity).length"
            )
            assert page.evaluate(running) == 0
            page.emulate_media(reduced_motion="no-preference")
            assert page.evaluate(running) == 1, "the cursor blinks for others"
            page.keyboard.press("Escape")


def test_answers_and_code_can_be_copied(browser: Browser, server: LiveServer) -> None:
    with open_chat_page(browser, server.url, permissions=["clipboard-read", "clipboard-write"]) as chat:
        page = chat.page
        answer = {"text": EVERY_KIND, "state": "done", "numTokens": 9, "finishReason": "stop"}
        stored = {"id": "a", "turns": [{"question": "hi", "answers": [answer], "shown": 0}]}
        page.evaluate("(chat) => { localStorage['headrace.chat.a'] = JSON.stringify(chat) }", stored)
        chat.open(f"{server.url}/?chat=a")
        page.get_by_role("button", name="Copy", exact=True).click()
        expect(page.locator("#announcer")).to_have_text("Copied")
        assert page.evaluate("navigator.clipboard.readText()") == "x"
        page.get_by_label("Copy the answer").click()
        until(lambda: page.evaluate("navigator.clipboard.readText()") == EVERY_KIND, "the answer is copied")
        page.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(new Error('plain http')) }")
        page.get_by_role("button", name="Copy", exact=True).click()
        until(lambda: page.evaluate("navigator.clipboard.readText()") == "x", "copied the old way")


def test_the_pages_files_are_asked_for_anew_after_an_upgrade(server: LiveServer) -> None:
    for path in ("/", "/static/chat.js", "/static/markdown.js"):
        assert httpx.get(server.url + path).headers["cache-control"] == "no-cache"
    first = httpx.get(f"{server.url}/static/chat.js")
    again = httpx.get(f"{server.url}/static/chat.js", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.headers["cache-control"]) == (304, "no-cache")
