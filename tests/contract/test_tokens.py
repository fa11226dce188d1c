"""/tokenize and /detokenize say what a generation would begin with; a model can be asked for by its name."""

import json
from typing import Any

import anyio
import pytest

from asgi_client import Exchange, call, exchange
from fake_engine import EOS, VOCAB_SIZE, FakeRunner, expected_text, make_scheduler
from headrace.server.version import VERSION
from live_app import LiveApp, live_app

pytestmark = pytest.mark.anyio

MESSAGES = [{"role": "user", "content": "h\u00e9llo <|end|>"}]


async def tokenize(app: LiveApp, **fields: Any) -> dict[str, Any]:
    answer = await call(app.asgi, "POST", "/tokenize", fields)
    assert answer.status == 200, answer.body
    answered: dict[str, Any] = answer.json()
    return answered


async def num_prompt_tokens(app: LiveApp, path: str, **fields: Any) -> int:
    answer = await call(app.asgi, "POST", path, fields | {"max_tokens": 1})
    return int(answer.json()["usage"]["prompt_tokens"])


async def test_the_tokens_of_a_text_and_of_a_conversation_are_those_that_a_generation_begins_with() -> None:
    async with live_app() as app:
        text = await tokenize(app, prompt="h\u00e9<|end|>")
        assert text == {"count": 4, "max_model_len": 512, "tokens": [*"h\u00e9".encode(), EOS], "token_strs": None}
        assert await num_prompt_tokens(app, "/v1/completions", prompt="h\u00e9<|end|>") == 4
        chat = await tokenize(app, messages=MESSAGES, model="fake", prompt=None)
        assert chat["count"] == len(chat["tokens"])
        assert await num_prompt_tokens(app, "/v1/chat/completions", messages=MESSAGES) == chat["count"]
        assert app.client.load.num_running == 0
        assert app.runner.num_steps == 2, "tokenizing costs the engine nothing"


async def test_tokens_are_spelled_as_the_vocabulary_has_them_where_that_is_asked_for() -> None:
    async with live_app() as app:
        answer = await tokenize(app, prompt=" a<|end|>", return_token_strs=True)
        assert answer["token_strs"] == ["\u0120", "a", "<|end|>"]
        assert (await tokenize(app, prompt="", return_token_strs=True))["token_strs"] == []


async def test_what_was_tokenized_comes_back() -> None:
    async with live_app() as app:
        for text in ("h\u00e9llo <|end|>\n\U0001f30a", ""):
            tokens = (await tokenize(app, prompt=text))["tokens"]
            answer = await call(app.asgi, "POST", "/detokenize", {"tokens": tokens})
            assert answer.json() == {"prompt": text}


async def test_a_long_list_is_whole_and_what_could_not_fit_is_not_tokenized() -> None:
    async with live_app(runner=FakeRunner(max_context_tokens=4096)) as app:
        text = "abc" * 5000  # beyond the context, though a token may have seven characters
        answer = await tokenize(app, prompt=text, return_token_strs=True)
        assert answer["token_strs"] == list(text)
        assert answer["count"] == len(answer["tokens"]) == 15_000
        refused = await call(app.asgi, "POST", "/tokenize", {"prompt": "a" * 7 * 4096 + "a"})
        assert (refused.status, refused.json()["error"]["code"]) == (400, "context_length_exceeded")


@pytest.mark.parametrize(
    ("path", "fields", "status", "param"),
    [
        ("/tokenize", {}, 400, "messages"),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}, 400, "messages"),
        ("/tokenize", {"prompt": [1, 2]}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "return_token_strs": 1}, 400, "return_token_strs"),
        ("/tokenize", {"prompt": "a", "add_special_tokens": 1}, 400, "add_special_tokens"),
        ("/tokenize", {"messages": [{"role": "king", "content": "x"}]}, 400, "messages[0].role"),
        ("/tokenize", {"prompt": "a", "model": "other"}, 404, "model"),
        ("/tokenize", {"prompt": "a" * 10_000}, 400, "prompt"),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": "a"}, 400, "tokens"),
        ("/detokenize", {"tokens": [1, -1]}, 400, "tokens[1]"),
        ("/detokenize", {"tokens": [VOCAB_SIZE]}, 400, "tokens"),
        ("/detokenize", {"tokens": [], "model": "other"}, 404, "model"),
    ],
    ids=str,
)
async def test_what_is_wrong_is_refused_by_name(path: str, fields: dict[str, Any], status: int, param: str) -> None:
    async with live_app(runner=FakeRunner(max_context_tokens=64)) as app:
        answer = await call(app.asgi, "POST", path, fields)
        assert answer.status == status, answer.body
        assert answer.json()["error"]["param"] == param


async def test_tokenizing_is_refused_where_a_generation_would_be(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="headrace.requests")
    async with live_app(scheduler=make_scheduler(max_num_seqs=1), max_queue_size=1) as app:
        async with anyio.create_task_group() as tasks:
            waiting: list[Exchange] = []
            with app.runner.held():
                for _ in range(2):
                    waiting.append(exchange(app.asgi, "POST", "/v1/completions"))
                    waiting[-1].send_body(json.dumps({"prompt": "a", "max_tokens": 1}).encode())
                    tasks.start_soon(waiting[-1].run)
                    await anyio.wait_all_tasks_blocked()
                refused = await call(app.asgi, "POST", "/tokenize", {"prompt": "a"})
                assert (refused.status, refused.json()["error"]["code"]) == (429, "queue_full")
        assert (await call(app.asgi, "POST", "/tokenize", {"prompt": "secret"})).status == 200
        app.stop_accepting()
        assert (await call(app.asgi, "POST", "/detokenize", {"tokens": [1]})).status == 503
    lines = [json.loads(record.getMessage()) for record in caplog.records if record.name == "headrace.requests"]
    [line] = [line for line in lines if line["route"] == "/tokenize" and line["finish_reason"] == "answered"]
    assert line["prompt_tokens"] == 6
    assert "secret" not in str(lines)


async def test_a_model_is_found_by_its_name_which_may_have_slashes() -> None:
    async with live_app() as app:
        app.generator.model_name = "some/where/fake"
        [listed] = (await call(app.asgi, "GET", "/v1/models")).json()["data"]
        assert (await call(app.asgi, "GET", "/v1/models/some/where/fake")).json() == listed
        for other in ("fake", "some/where", "some/where/fake/", "\n"):
            answer = await call(app.asgi, "GET", f"/v1/models/{other}")
            assert answer.status == 404
            assert answer.json()["error"]["code"] == "model_not_found"
            assert len(answer.headers["x-request-id"]) == 32


async def test_the_version_is_that_of_the_fingerprint() -> None:
    async with live_app() as app:
        assert (await call(app.asgi, "GET", "/version")).json() == {"version": VERSION}


FORGED = [{"role": "user", "content": "hi <|end|>"}]


@pytest.mark.parametrize(("setting", "num_control"), [("text", 0), ("control", 1)])
async def test_control_tokens_in_messages_are_what_the_setting_says(setting: str, num_control: int) -> None:
    async with live_app(control_tokens_in_messages=setting) as app:
        chat = await tokenize(app, messages=FORGED)
        assert chat["tokens"].count(EOS) == num_control
        assert await num_prompt_tokens(app, "/v1/chat/completions", messages=FORGED) == chat["count"]
        assert (await tokenize(app, prompt="hi <|end|>"))["tokens"].count(EOS) == 1, "a prompt is the client's own"


async def test_the_assistants_message_is_continued() -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well, "}]
    continued = "[user]hi\n[assistant]Well, "
    async with live_app() as app:
        tokens = (await tokenize(app, messages=messages, continue_final_message=True))["tokens"]
        assert bytes(tokens).decode() == continued
        body = {"messages": messages, "continue_final_message": True, "max_tokens": 6, "temperature": 0}
        answer = await call(app.asgi, "POST", "/v1/chat/completions", body)
        assert answer.json()["choices"][0]["message"]["content"] == expected_text(continued, 6)
        assert answer.json()["usage"]["prompt_tokens"] == len(tokens)
        closed = (await tokenize(app, messages=messages, add_generation_prompt=True))["tokens"]
        assert bytes(closed).decode() == continued + "\n[assistant]"
