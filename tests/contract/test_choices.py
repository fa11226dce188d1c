"""Several answers in one response, their log probabilities, and prompts that are echoed."""

import json
from typing import Any

import anyio
import pytest

from asgi_client import call, chunks, exchange
from fake_engine import EOS, FakeRunner, expected_text, make_scheduler
from live_app import live_app

pytestmark = pytest.mark.anyio

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 6, "temperature": 0}
CHAT_PROMPT = "[user]hi\n[assistant]"
COMPLETION = {"prompt": "hello", "max_tokens": 4, "temperature": 0}


async def both(path: str, body: dict[str, Any], **fields: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The whole answer and the chunks of a streamed one."""
    async with live_app(**fields) as app:
        whole = await call(app.asgi, "POST", path, body)
        streamed = await call(
            app.asgi, "POST", path, body | {"stream": True, "stream_options": {"include_usage": True}}
        )
        assert whole.status == streamed.status == 200, whole.body
    return whole.json(), chunks(streamed.body)


def texts(read: list[dict[str, Any]], num_choices: int) -> list[str]:
    found = [""] * num_choices
    for chunk in read:
        for choice in chunk["choices"]:
            found[choice["index"]] += choice["delta"].get("content", "") if "delta" in choice else choice["text"]
    return found


async def test_each_choice_of_a_chat_is_its_own_and_the_prompt_counts_once() -> None:
    whole, read = await both("/v1/chat/completions", CHAT | {"n": 3})
    expected = [expected_text(CHAT_PROMPT, 6, choice) for choice in range(3)]
    assert len(set(expected)) == 3
    assert [choice["message"]["content"] for choice in whole["choices"]] == expected
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2]
    assert texts(read, 3) == expected
    for usage in (whole["usage"], read[-1]["usage"]):
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(CHAT_PROMPT), 18)


async def test_choices_open_in_order_and_each_ends_once() -> None:
    _, read = await both("/v1/chat/completions", CHAT | {"n": 3})
    opened = [chunk["choices"][0]["index"] for chunk in read[:3]]
    assert opened == [0, 1, 2]
    assert all(chunk["choices"][0]["delta"] == {"role": "assistant", "content": ""} for chunk in read[:3])
    roles = [choice for chunk in read for choice in chunk["choices"] if "role" in choice["delta"]]
    assert len(roles) == 3
    ends = [choice["index"] for chunk in read for choice in chunk["choices"] if choice["finish_reason"]]
    assert sorted(ends) == [0, 1, 2]


async def test_prompts_times_choices_are_numbered_as_openai_numbers_them() -> None:
    whole, read = await both("/v1/completions", COMPLETION | {"prompt": ["ab", "cde"], "n": 2})
    expected = [expected_text(prompt, 4, choice) for prompt in ("ab", "cde") for choice in (0, 1)]
    assert [choice["text"] for choice in whole["choices"]] == texts(read, 4) == expected
    assert whole["usage"]["prompt_tokens"] == 5
    ids, _ = await both("/v1/completions", COMPLETION | {"prompt": [list(b"ab"), list(b"cde")], "n": 2})
    assert ids["choices"] == whole["choices"]


async def test_one_wrong_prompt_of_several_refuses_all() -> None:
    async with live_app() as app:
        for prompt in (["ab", ""], [[1, 2], [999]], ["a", "b" * 600]):
            answer = await call(app.asgi, "POST", "/v1/completions", COMPLETION | {"prompt": prompt})
            assert (answer.status, answer.json()["error"]["param"]) == (400, "prompt")
        assert app.client.num_unfinished == 0
        assert app.client.num_waiting == 0


async def test_log_probabilities_have_a_limit_in_all_which_cuts_only_what_was_not_asked_for() -> None:
    asked = [
        {"prompt": [list(b"a" * 400)] * 2, "max_tokens": 1, "echo": True, "logprobs": 20, "n": 16},
        {"prompt": "a", "max_tokens": 100, "logprobs": 20, "n": 128},
    ]
    async with live_app() as app:
        for body in asked:
            answer = await call(app.asgi, "POST", "/v1/completions", body)
            assert (answer.status, answer.json()["error"]["param"]) == (400, "logprobs")
        body = {"messages": CHAT["messages"], "logprobs": True, "top_logprobs": 20, "n": 128}
        answer = await call(app.asgi, "POST", "/v1/chat/completions", body)
        assert answer.status == 200
        assert answer.json()["usage"]["completion_tokens"] == 128 * (2**18 // (21 * 128))


async def test_a_choice_that_fails_ends_the_response_and_the_others() -> None:
    runner = FakeRunner()
    async with live_app(runner=runner, scheduler=make_scheduler(max_num_seqs=1)) as app:
        with runner.held():
            request = exchange(app.asgi, "POST", "/v1/completions")
            request.send_body(json.dumps(COMPLETION | {"n": 3, "stream": True, "max_tokens": 50}).encode())
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(request.run)
                await anyio.wait_all_tasks_blocked()
                runner.fail_next = True
                runner.allow(2)  # a step of one row is tried twice
                await request.done.wait()
        assert request.body.count(b'"error"') == 1
        assert b"[DONE]" not in request.body
        assert app.client.num_unfinished == 0
        metrics = (await call(app.asgi, "GET", "/metrics")).body.decode()
        assert 'headrace_requests_cancelled_total{phase="queued"} 0.0' in metrics, "nobody left"


async def test_a_client_that_leaves_takes_all_its_choices_with_it() -> None:
    runner = FakeRunner()
    async with live_app(runner=runner) as app:
        with runner.held():
            request = exchange(app.asgi, "POST", "/v1/chat/completions")
            request.send_body(json.dumps(CHAT | {"n": 4, "stream": True}).encode())
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(request.run)
                await anyio.wait_all_tasks_blocked()
                assert app.client.num_unfinished == 4
                request.disconnect()
                await request.done.wait()
            assert app.client.num_unfinished == 0


async def test_a_request_takes_as_many_places_in_the_queue_as_it_has_answers() -> None:
    runner = FakeRunner()
    async with live_app(runner=runner, scheduler=make_scheduler(max_num_seqs=2), max_queue_size=4) as app:
        never = await call(app.asgi, "POST", "/v1/completions", COMPLETION | {"n": 7})
        assert never.status == 400
        with runner.held():
            first = exchange(app.asgi, "POST", "/v1/completions")
            first.send_body(json.dumps(COMPLETION | {"n": 4}).encode())
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(first.run)
                await anyio.wait_all_tasks_blocked()
                full = await call(app.asgi, "POST", "/v1/completions", COMPLETION | {"n": 5})
                assert full.status == 429
                runner.allow(1000)
                await first.done.wait()
        assert first.status == 200
        assert (await call(app.asgi, "POST", "/v1/completions", COMPLETION | {"n": 6})).status == 200


async def test_a_chats_log_probabilities_name_every_token_of_its_text() -> None:
    whole, read = await both("/v1/chat/completions", CHAT | {"logprobs": True, "top_logprobs": 2, "n": 2})
    for index, choice in enumerate(whole["choices"]):
        content = choice["logprobs"]["content"]
        assert choice["logprobs"]["refusal"] is None
        assert "".join(item["token"] for item in content) == choice["message"]["content"]
        for item in content:
            token_id = ord(item["token"])
            assert item["bytes"] == [token_id]
            assert item["logprob"] == -1 - token_id / 1000
            best = [(top["token"], top["logprob"]) for top in item["top_logprobs"]]
            assert best == [(chr(token_id + 1), -0.5), (item["token"], item["logprob"])]
        streamed = [
            item
            for chunk in read
            for part in chunk["choices"]
            if part["index"] == index and part["logprobs"]
            for item in part["logprobs"]["content"]
        ]
        assert streamed == content


async def test_without_being_asked_no_choice_has_log_probabilities() -> None:
    for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", COMPLETION)):
        whole, read = await both(path, body)
        assert whole["choices"][0]["logprobs"] is None
        assert all(choice["logprobs"] is None for chunk in read for choice in chunk["choices"])


async def test_a_completions_log_probabilities_are_four_lists_of_one_length() -> None:
    whole, read = await both("/v1/completions", COMPLETION | {"logprobs": 1})
    [choice] = whole["choices"]
    logprobs, text = choice["logprobs"], choice["text"]
    assert logprobs["tokens"] == list(text)
    assert logprobs["token_logprobs"] == [-1 - ord(token) / 1000 for token in text]
    assert logprobs["text_offset"] == [0, 1, 2, 3]
    # The likeliest, and beside it the one that is there.
    assert [list(top) for top in logprobs["top_logprobs"]] == [[chr(ord(token) + 1), token] for token in text]
    parts = [choice["logprobs"] for chunk in read for choice in chunk["choices"] if choice["logprobs"]]
    assert {name: [item for part in parts for item in part[name]] for name in logprobs} == logprobs


@pytest.mark.parametrize(("skips", "offsets"), [(True, [0, 0, 1]), (False, [0, 7, 8])])
async def test_special_tokens_take_no_room_in_a_text_that_skips_them(skips: bool, offsets: list[int]) -> None:
    body = {"prompt": [EOS, 104, 105], "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 0}
    whole, _ = await both("/v1/completions", body | {"skip_special_tokens": skips})
    [choice] = whole["choices"]
    assert choice["text"].startswith("hi" if skips else "<|end|>hi")
    assert choice["logprobs"]["text_offset"][:3] == offsets


@pytest.mark.parametrize("prompt", ["h\u00e9llo", list("h\u00e9llo".encode())], ids=["text", "ids"])
async def test_an_echo_begins_with_the_prompt_and_its_log_probabilities(prompt: Any) -> None:
    text = "h\u00e9llo" + expected_text("h\u00e9llo", 4)
    plain, read = await both("/v1/completions", COMPLETION | {"prompt": prompt, "echo": True})
    assert plain["choices"][0]["text"] == text
    assert texts(read, 1) == [text]
    assert plain["usage"]["completion_tokens"] == 4
    whole, read = await both(
        "/v1/completions", COMPLETION | {"prompt": prompt, "echo": True, "logprobs": 1, "n": 2, "max_tokens": 1}
    )
    for index, choice in enumerate(whole["choices"]):
        assert choice["text"].startswith("h\u00e9llo")
        logprobs = choice["logprobs"]
        assert len(logprobs["tokens"]) == 7
        assert logprobs["token_logprobs"][0] is None
        assert logprobs["top_logprobs"][0] is None
        # The accented letter has two bytes and so two tokens, of which the second begins no character.
        assert logprobs["text_offset"] == [0, 1, 2, 2, 3, 4, 5]
        assert logprobs["token_logprobs"][1] == -1 - 0xC3 / 1000
        parts = [
            part["logprobs"]
            for chunk in read
            for part in chunk["choices"]
            if part["index"] == index and part["logprobs"]
        ]
        assert {name: [item for part in parts for item in part[name]] for name in logprobs} == logprobs


async def test_a_prompt_can_be_echoed_and_scored_without_an_answer() -> None:
    body = {"prompt": ["hello", "you"], "n": 2, "max_tokens": 0, "temperature": 0, "echo": True, "logprobs": 1}
    whole, read = await both("/v1/completions", body)
    expected, _ = await both("/v1/completions", body | {"max_tokens": 1})
    assert [choice["text"] for choice in whole["choices"]] == texts(read, 4) == ["hello", "hello", "you", "you"]
    assert whole["usage"]["completion_tokens"] == 0
    for choice, longer in zip(whole["choices"], expected["choices"], strict=True):
        assert choice["finish_reason"] == "length"
        assert choice["logprobs"] == {name: items[:-1] for name, items in longer["logprobs"].items()}
    plain, _ = await both("/v1/completions", {"prompt": "hello", "max_tokens": 0, "echo": True})
    assert plain["choices"][0]["text"] == "hello"


async def test_a_prompt_of_special_tokens_alone_has_an_entry_for_each() -> None:
    body = {"prompt": [EOS, EOS], "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1, "n": 2}
    whole, read = await both("/v1/completions", body)
    for index, choice in enumerate(whole["choices"]):
        logprobs = choice["logprobs"]
        assert [*map(len, logprobs.values())] == [3, 3, 3, 3]
        assert logprobs["tokens"][:2] == ["<|end|>"] * 2
        assert logprobs["token_logprobs"][:2] == [None, -1 - EOS / 1000]
        assert logprobs["text_offset"] == [0, 0, 0]
        parts = [c["logprobs"] for chunk in read for c in chunk["choices"] if c["index"] == index and c["logprobs"]]
        assert {name: [item for part in parts for item in part[name]] for name in logprobs} == logprobs
    scored, _ = await both("/v1/completions", body | {"max_tokens": 0, "n": 1})
    assert scored["choices"][0]["logprobs"] == {name: items[:2] for name, items in logprobs.items()}
    silent, read = await both("/v1/completions", body | {"logprobs": None, "n": 1})
    assert len(silent["choices"][0]["text"]) == 1
    assert all(chunk["choices"][0]["text"] or chunk["choices"][0]["finish_reason"] for chunk in read[:-1])


@pytest.mark.parametrize("max_tokens", [1, 4])
async def test_behind_an_echo_the_token_that_ends_the_answer_has_an_entry_too(max_tokens: int) -> None:
    end = ord(expected_text("hello", 4)[max_tokens - 1])
    body = COMPLETION | {"max_tokens": max_tokens, "stop_token_ids": [end], "logprobs": 1}
    echoed, read = await both("/v1/completions", body | {"echo": True})
    [choice] = echoed["choices"]
    assert (choice["finish_reason"], choice["text"]) == ("stop", "hello" + expected_text("hello", max_tokens - 1))
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"] + chr(end)
    assert len(choice["logprobs"]["tokens"]) == 5 + echoed["usage"]["completion_tokens"]
    parts = [choice["logprobs"]["tokens"] for chunk in read for choice in chunk["choices"] if choice["logprobs"]]
    assert [token for part in parts for token in part] == choice["logprobs"]["tokens"]
    plain, _ = await both("/v1/completions", body)
    assert "".join(plain["choices"][0]["logprobs"]["tokens"]) == plain["choices"][0]["text"]


def token_ids(read: list[dict[str, Any]], index: int) -> list[int]:
    """Of all of a choice's chunks."""
    choices = [choice for chunk in read for choice in chunk["choices"] if choice["index"] == index]
    return [token_id for choice in choices for token_id in choice.get("token_ids", [])]


async def test_the_token_ids_of_a_chat_are_told_where_that_is_asked_for() -> None:
    whole, read = await both("/v1/chat/completions", CHAT | {"n": 2, "return_token_ids": True})
    assert whole["prompt_token_ids"] == [*CHAT_PROMPT.encode()]
    assert [chunk.get("prompt_token_ids") for chunk in read] == [whole["prompt_token_ids"]] + [None] * (len(read) - 1)
    for index, choice in enumerate(whole["choices"]):
        assert bytes(choice["token_ids"]).decode() == choice["message"]["content"]
        assert token_ids(read, index) == choice["token_ids"]
        assert "prompt_token_ids" not in choice
    for chunk in read:
        for choice in chunk["choices"]:
            if "token_ids" in choice:
                assert bytes(choice["token_ids"]).decode() == choice["delta"]["content"]


async def test_token_ids_are_told_where_an_answer_is_looked_at_for_calls_too() -> None:
    tool = {"type": "function", "function": {"name": "mill"}}
    body = CHAT | {"tools": [tool], "logprobs": True, "return_token_ids": True}
    # The model is told of the tool in bytes.
    room: dict[str, Any] = {"runner": FakeRunner(max_context_tokens=2048), "scheduler": make_scheduler(num_blocks=256)}
    whole, read = await both("/v1/chat/completions", body, **room)
    [choice] = whole["choices"]
    assert bytes(choice["token_ids"]).decode() == choice["message"]["content"]
    assert token_ids(read, 0) == choice["token_ids"]
    assert [chunk.get("prompt_token_ids") for chunk in read] == [whole["prompt_token_ids"]] + [None] * (len(read) - 1)
    told = [item for chunk in read for c in chunk["choices"] if c["logprobs"] for item in c["logprobs"]["content"]]
    assert told == choice["logprobs"]["content"]


async def test_the_token_ids_of_completions_are_told_with_those_of_each_ones_prompt() -> None:
    body = COMPLETION | {"prompt": ["ab", "cde"], "echo": True, "return_token_ids": True}
    whole, read = await both("/v1/completions", body)
    opening = {chunk["choices"][0]["index"]: chunk["choices"][0] for chunk in reversed(read[:-1])}
    for index, (choice, prompt) in enumerate(zip(whole["choices"], ("ab", "cde"), strict=True)):
        assert choice["prompt_token_ids"] == opening[index]["prompt_token_ids"] == [*prompt.encode()]
        assert prompt + bytes(choice["token_ids"]).decode() == choice["text"]
        assert token_ids(read, index) == choice["token_ids"]
        assert texts(read, 2)[index] == choice["text"]
    assert "prompt_token_ids" not in whole


async def test_token_ids_are_as_many_as_the_usage_says_whatever_becomes_of_their_text() -> None:
    text = expected_text("stop here", 40)
    stopped = {"prompt": "stop here", "max_tokens": 40, "temperature": 0, "return_token_ids": True, "stop": text[9:12]}
    ended = stopped | {"stop": None, "stop_token_ids": [ord(text[20])]}
    for body in (stopped, ended, stopped | {"logprobs": 0}, ended | {"logprobs": 0, "min_tokens": 2}):
        whole, read = await both("/v1/completions", body)
        [choice] = whole["choices"]
        assert choice["finish_reason"] == "stop"
        assert len(choice["token_ids"]) == whole["usage"]["completion_tokens"]
        assert bytes(choice["token_ids"]).decode().startswith(choice["text"])
        assert token_ids(read, 0) == choice["token_ids"]
        if choice["logprobs"] is not None:
            assert "".join(choice["logprobs"]["tokens"]) == choice["text"]


async def test_without_being_asked_no_answer_has_token_ids() -> None:
    for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", COMPLETION)):
        for asked in ({}, {"return_token_ids": False}, {"return_token_ids": None}):
            whole, read = await both(path, body | asked)
            assert "token_ids" not in json.dumps([whole, read])


async def test_a_native_stream_tells_token_ids_too() -> None:
    async with live_app() as app:
        created = await call(app.asgi, "POST", "/v1/streams", COMPLETION | {"return_token_ids": True})
        assert created.json()["prompt_token_ids"] == [*b"hello"]
        events = (await call(app.asgi, "GET", created.json()["events_url"])).events()
        tokens = [json.loads(event["data"]) for event in events if event.get("event") == "token"]
        assert bytes(token_id for token in tokens for token_id in token["token_ids"]).decode() == expected_text(
            "hello", 4
        )


async def test_a_native_stream_carries_log_probabilities_and_has_one_answer() -> None:
    async with live_app() as app:
        created = await call(app.asgi, "POST", "/v1/streams", COMPLETION | {"logprobs": 1, "echo": True})
        events = await call(app.asgi, "GET", created.json()["events_url"])
        tokens = [json.loads(line[6:]) for line in events.body.decode().split("\n") if line.startswith('data: {"text"')]
        assert "".join(token["text"] for token in tokens) == "hello" + expected_text("hello", 4)
        assert sum(token["num_tokens"] for token in tokens) == 4
        assert "".join(item["token"] for token in tokens for item in token["logprobs"]) == "hello" + expected_text(
            "hello", 4
        )
        for wrong in ({"n": 2}, {"prompt": ["a", "b"]}):
            refused = await call(app.asgi, "POST", "/v1/streams", COMPLETION | wrong)
            assert refused.status == 400


async def test_cached_tokens_are_told_and_kept_from_other_salts() -> None:
    body = COMPLETION | {"prompt": "a prompt of forty bytes, which is enough."}
    async with live_app() as app:

        async def cached_tokens(**fields: Any) -> int:
            answer = await call(app.asgi, "POST", "/v1/completions", body | fields)
            return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])

        assert [await cached_tokens() for _ in "12"] == [0, 32]
        assert [await cached_tokens(cache_salt="mine") for _ in "12"] == [0, 32]
        assert await cached_tokens(n=3) == 32
        metrics = (await call(app.asgi, "GET", "/metrics")).body.decode()
        # Three single requests found nothing, 32 and 32 of 41; of three choices each found 32.
        assert "headrace_prefix_cache_queries_total 287.0" in metrics
        assert "headrace_prefix_cache_hits_total 160.0" in metrics
