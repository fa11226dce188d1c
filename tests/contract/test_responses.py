"""/v1/responses, as its clients meet it: OpenAI's own, strict about every field, and readers that come back."""

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import anyio
import httpx2
import openai
import pytest
from openai import AsyncOpenAI

import chat_templates as templates
from asgi_client import Exchange, call, exchange, with_state
from fake_engine import FakeRunner, byte_tokenizer, expected_text, make_scheduler
from headrace.server.api_keys import append_key, create_key
from headrace.server.drain import drain
from headrace.server.responses_protocol import ResponsesRequest
from live_app import LiveApp, live_app
from speaking_model import SpeakingRunner

pytestmark = pytest.mark.anyio

NUM_TOKENS = 12
BODY: dict[str, Any] = {"input": "hi", "max_output_tokens": NUM_TOKENS, "temperature": 0}
PROMPT = "[user]hi\n[assistant]"
TEXT = expected_text(PROMPT, NUM_TOKENS)
# Ends an answer, and with it a response.
STOPPED = {"stop": TEXT[7:9]}


def client_of(app: LiveApp, secret: str = "none") -> AsyncOpenAI:
    """OpenAI's client, which raises for a field that is missing or of another type."""

    return AsyncOpenAI(
        base_url="http://127.0.0.1/v1",
        api_key=secret,
        http_client=httpx2.AsyncClient(transport=httpx2.ASGITransport(with_state(app.asgi))),
        max_retries=0,
        _strict_response_validation=True,
    )


async def create(app: LiveApp, headers: dict[str, str] | None = None, **fields: Any) -> dict[str, Any]:
    answer = await call(app.asgi, "POST", "/v1/responses", BODY | fields, headers=headers)
    assert answer.status == 200, answer.body
    created: dict[str, Any] = answer.json()
    return created


async def read(app: LiveApp, id: str, starting_after: int | None = None) -> Exchange:
    query = "stream=true" + ("" if starting_after is None else f"&starting_after={starting_after}")
    answer = await call(app.asgi, "GET", f"/v1/responses/{id}", query=query)
    assert answer.status == 200, answer.body
    return answer


async def get(app: LiveApp, id: str) -> dict[str, Any]:
    answer = await call(app.asgi, "GET", f"/v1/responses/{id}")
    assert answer.status == 200, answer.body
    found: dict[str, Any] = answer.json()
    return found


def events_of(answer: Exchange) -> list[dict[str, Any]]:
    """The data of a stream's events, which are named as they say."""
    found = []
    for event in answer.events():
        data = json.loads(event.pop("data"))
        assert event == {"event": data["type"]}
        found.append(data)
    return found


def kinds_of(events: list[dict[str, Any]]) -> list[str]:
    """The events' types, with those of one type in a row as one."""
    return [kind for kind, _ in groupby(event["type"].removeprefix("response.") for event in events)]


def text_of(response: dict[str, Any]) -> str:
    return "".join(part["text"] for item in response["output"] for part in item.get("content", []))


def delta_of(events: list[dict[str, Any]]) -> str:
    return "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")


async def test_a_strict_client_reads_a_whole_response_with_its_settings() -> None:
    async with live_app() as app:
        response = await client_of(app).responses.create(
            model="fake",
            input=[
                {"role": "developer", "content": "be brief"},
                {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
            ],
            instructions="be kind",
            max_output_tokens=NUM_TOKENS,
            temperature=0,
            metadata={"a": "b"},
            user="someone",
            include=["message.output_text.logprobs"],
            top_logprobs=2,
        )
    prompt = "[system]be kind\n[system]be brief\n" + PROMPT
    assert response.output_text == expected_text(prompt, NUM_TOKENS)
    assert (response.status, response.incomplete_details and response.incomplete_details.reason) == (
        "incomplete",
        "max_output_tokens",
    )
    assert response.usage is not None
    assert (response.usage.input_tokens, response.usage.output_tokens) == (len(prompt), NUM_TOKENS)
    assert (response.instructions, response.metadata, response.user) == ("be kind", {"a": "b"}, "someone")
    assert (response.temperature, response.top_p, response.background) == (0, 1, False)
    [message] = response.output
    assert message.type == "message"
    assert message.content[0].type == "output_text"
    scored = message.content[0].logprobs or []
    assert "".join(item.token for item in scored) == response.output_text
    assert all(len(item.top_logprobs) == 2 for item in scored)


async def test_an_answer_that_ends_by_itself_is_completed() -> None:
    async with live_app() as app:
        response = await client_of(app).responses.create(input="hi", temperature=0, extra_body=STOPPED, model="fake")
    assert (response.status, response.output_text) == ("completed", TEXT[:7])
    assert response.completed_at is not None
    assert response.completed_at >= response.created_at
    assert response.incomplete_details is None


async def test_events_have_the_life_cycle_and_count_up() -> None:
    async with live_app() as app:
        answer = await call(app.asgi, "POST", "/v1/responses", BODY | {"stream": True} | STOPPED)
        events = events_of(answer)
        stored = await get(app, events[0]["response"]["id"])
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert b"\r" not in answer.body
    assert b"id:" not in answer.body.replace(b'"id":', b"")
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert kinds_of(events) == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert delta_of(events) == TEXT[:7]
    *_, text_done, part_done, item_done, completed = events
    assert text_done["text"] == part_done["part"]["text"] == item_done["item"]["content"][0]["text"] == TEXT[:7]
    assert completed["response"]["output"] == [item_done["item"]]
    assert completed["response"] == stored


@pytest.mark.parametrize("fields", [{}, STOPPED, {"text_format": None}], ids=["length", "stop", "helper"])
async def test_the_clients_helper_accumulates_what_the_response_is(fields: dict[str, Any]) -> None:
    async with live_app() as app:
        snapshot = ""
        stream = client_of(app).responses.stream(
            model="fake", input="hi", temperature=0, max_output_tokens=NUM_TOKENS, extra_body=fields
        )
        async with stream as events:
            async for event in events:
                if event.type == "response.output_text.delta":
                    snapshot = event.snapshot
                elif event.type in ("response.completed", "response.incomplete"):
                    assert snapshot == event.response.output_text
        assert snapshot == (TEXT[:7] if "stop" in fields else TEXT)


async def finished_in_every_way(app: LiveApp) -> list[str]:
    """Responses that ended in each way there is, and their events all of which can be read again."""
    ids = []
    for fields in ({}, STOPPED, {"stream": True}, {"background": True}, {"background": True, "stream": True}):
        answer = await call(app.asgi, "POST", "/v1/responses", BODY | fields)
        ids.append(events_of(answer)[0]["response"]["id"] if fields.get("stream") else answer.json()["id"])
    scored: dict[str, Any] = {"include": ["message.output_text.logprobs"], "top_logprobs": 1}
    ids.append((await create(app, background=True, **scored))["id"])
    with app.runner.held():
        cancelled, cancelled_at_once = [(await create(app, background=True))["id"] for _ in range(2)]
        app.runner.allow(3)
        generation = app.responses.get(cancelled).generation
        await app.until(lambda: generation.num_output_tokens >= 1)
        for id in (cancelled, cancelled_at_once):
            await call(app.asgi, "POST", f"/v1/responses/{id}/cancel")
    await app.until(lambda: app.client.load.num_running == 0)
    app.runner.fail_next = True
    ids += [cancelled, (await create(app, background=True))["id"]]
    for id in ids:
        await read(app, id)  # to its end
    return ids


async def test_a_reader_that_comes_back_behind_any_event_gets_exactly_the_rest() -> None:
    async with live_app() as app:
        ids = await finished_in_every_way(app)
        assert {(await get(app, id))["status"] for id in ids} == {"incomplete", "completed", "cancelled", "failed"}
        for id in ids:
            whole = await read(app, id)
            frames = [frame + b"\n\n" for frame in whole.body.split(b"\n\n")[:-1]]
            assert len(frames) == len(events_of(whole)) >= 4
            for number in range(len(frames)):
                assert (await read(app, id, number)).body == b"".join(frames[number + 1 :])
            beyond = await call(
                app.asgi, "GET", f"/v1/responses/{id}", query=f"stream=true&starting_after={len(frames)}"
            )
            assert (beyond.status, beyond.json()["error"]["param"]) == (400, "starting_after")


async def test_who_reads_a_response_while_it_is_made_gets_what_who_comes_later_gets() -> None:
    async with live_app() as app, anyio.create_task_group() as tasks:
        with app.runner.held():
            created = await create(app, background=True)
            assert created["status"] == "queued"
            readers = [
                exchange(app.asgi, "GET", f"/v1/responses/{created['id']}", query=f"stream=true{behind}")
                for behind in ("", "", "&starting_after=1")
            ]
            for reader in readers:
                tasks.start_soon(reader.run)
            app.runner.allow(4)
            await readers[0].wait_until(lambda: b"output_text.delta" in readers[0].body)
            running = await get(app, created["id"])
            readers[1].disconnect()
            await readers[1].done.wait()
        for reader in (readers[0], readers[2]):
            await reader.done.wait()
        whole = await read(app, created["id"])
        assert running["status"] == "in_progress"
        assert TEXT.startswith(text_of(running))
        assert readers[0].body == whole.body
        assert whole.body.startswith(readers[1].body)
        assert events_of(readers[2]) == events_of(whole)[2:]
        assert kinds_of(events_of(whole))[:3] == ["created", "queued", "in_progress"]
        assert events_of(whole)[-1]["response"] == await get(app, created["id"])


async def test_a_background_response_outlives_the_client_that_asked_for_it() -> None:
    async with live_app() as app, anyio.create_task_group() as tasks:
        request = exchange(app.asgi, "POST", "/v1/responses")
        request.send_body(json.dumps(BODY | {"background": True, "stream": True}).encode())
        with app.runner.held():
            tasks.start_soon(request.run)
            await request.wait_until(lambda: b"response.in_progress" in request.body)
            request.disconnect()
            await request.done.wait()
        id = events_of(request)[0]["response"]["id"]
        await read(app, id)
        assert text_of(await get(app, id)) == TEXT


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("store", [False, True])
async def test_any_other_response_ends_when_its_client_leaves(stream: bool, store: bool) -> None:
    async with live_app() as app, anyio.create_task_group() as tasks:
        request = exchange(app.asgi, "POST", "/v1/responses")
        request.send_body(json.dumps(BODY | {"stream": stream, "store": store}).encode())
        with app.runner.held():
            tasks.start_soon(request.run)
            await app.until(lambda: app.client.num_unfinished == 1)
            request.disconnect()
            await request.done.wait()
            assert app.client.num_unfinished == 0
        kept = [response.id for response in app.responses._finished.values()]
        assert len(kept) == store
        for id in kept:
            assert (await get(app, id))["status"] == "cancelled"


async def test_cancelling_ends_a_response_for_its_readers_and_can_be_repeated() -> None:
    async with live_app() as app, anyio.create_task_group() as tasks:
        client = client_of(app)
        with app.runner.held():
            created = await create(app, background=True)
            reader = exchange(app.asgi, "GET", f"/v1/responses/{created['id']}", query="stream=true")
            tasks.start_soon(reader.run)
            app.runner.allow(3)
            await reader.wait_until(lambda: b"output_text.delta" in reader.body)
            cancelled = await client.responses.cancel(created["id"])
            await reader.done.wait()
        assert cancelled.status == "cancelled"
        assert TEXT.startswith(cancelled.output_text)
        assert events_of(reader)[-1]["type"] == "response.incomplete"
        assert events_of(reader)[-1]["response"]["status"] == "cancelled"
        assert await client.responses.cancel(created["id"]) == cancelled
        over = await create(app, background=True)
        await read(app, over["id"])
        assert (await client.responses.cancel(over["id"])).status == "incomplete"
        with pytest.raises(openai.BadRequestError, match="only a background response"):
            await client.responses.cancel((await create(app))["id"])


async def test_a_deleted_response_is_gone_and_one_that_runs_ends() -> None:
    async with live_app() as app:
        client = client_of(app)
        with app.runner.held():
            running = await create(app, background=True)
            await client.responses.delete(running["id"])
            assert app.client.num_unfinished == 0
        over = await create(app)
        deleted = await call(app.asgi, "DELETE", f"/v1/responses/{over['id']}")
        assert deleted.json() == {"id": over["id"], "object": "response", "deleted": True}
        for id in (running["id"], over["id"], "resp_" + "0" * 32, "x"):
            for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/input_items"), ("POST", "/cancel")):
                answer = await call(app.asgi, method, f"/v1/responses/{id}{path}")
                assert (answer.status, answer.json()["error"]["param"]) == (404, "id")


async def test_two_who_delete_a_running_response_at_once_are_told_by_turns() -> None:
    async with live_app() as app, anyio.create_task_group() as tasks:
        with app.runner.held():
            id = (await create(app, background=True))["id"]
            requests = [exchange(app.asgi, "DELETE", f"/v1/responses/{id}") for _ in range(2)]
            for request in requests:
                tasks.start_soon(request.run)
            for request in requests:
                await request.done.wait()
        assert sorted(request.status or 0 for request in requests) == [200, 404]


async def test_what_is_not_stored_cannot_be_read_again() -> None:
    async with live_app() as app:
        whole = await create(app, store=False)
        streamed = events_of(await call(app.asgi, "POST", "/v1/responses", BODY | {"store": False, "stream": True}))
        assert text_of(whole) == text_of(streamed[-1]["response"]) == TEXT
        for id in (whole["id"], streamed[0]["response"]["id"]):
            assert (await call(app.asgi, "GET", f"/v1/responses/{id}")).status == 404
        assert not app.responses._finished


async def test_a_conversation_goes_on_as_if_it_were_sent_whole() -> None:
    async with live_app() as app:
        client = client_of(app)
        first = await client.responses.create(
            model="fake", input="hi", instructions="only once", max_output_tokens=5, temperature=0
        )
        second = await client.responses.create(
            model="fake", input="and?", previous_response_id=first.id, max_output_tokens=6, temperature=0
        )
        await client.responses.delete(first.id)
        third = await client.responses.create(
            model="fake",
            input=[{"role": "user", "content": "so?"}],
            previous_response_id=second.id,
            max_output_tokens=7,
            temperature=0,
        )
        items = [item async for item in client.responses.input_items.list(third.id, order="asc", limit=2)]
        newest = [item.id async for item in client.responses.input_items.list(third.id)]
    prompt = "[user]hi\n[assistant]"
    assert first.output_text == expected_text("[system]only once\n" + prompt, 5)
    prompt += f"{first.output_text}\n[user]and?\n[assistant]"
    assert second.output_text == expected_text(prompt, 6)
    prompt += f"{second.output_text}\n[user]so?\n[assistant]"
    assert third.output_text == expected_text(prompt, 7)
    assert third.previous_response_id == second.id
    texts = [item.content[0].text for item in items if item.type == "message"]  # type: ignore[union-attr]
    assert texts == ["hi", first.output_text, "and?", second.output_text, "so?"]
    assert newest == [item.id for item in reversed(items)]
    assert len(set(newest)) == 5


TOOL: dict[str, Any] = {
    "type": "function",
    "name": "look_up",
    "description": "Looks a word up",
    "parameters": {"type": "object", "properties": {"word": {"type": "string"}}},
    "strict": None,
}
CALLS = [
    f'<tool_call>\n{{"name": "look_up", "arguments": {{"word": "{word}"}}}}\n</tool_call>' for word in ("mill", "race")
]


async def test_calls_are_items_of_their_own_and_their_answers_go_on_with_the_conversation() -> None:
    runner = SpeakingRunner(byte_tokenizer(), "I look. " + "\n".join(CALLS))
    async with live_app(runner=runner, scheduler=make_scheduler(num_blocks=512)) as app:
        client: Any = client_of(app)
        body = {"model": "fake", "temperature": 0, "tools": [TOOL]}
        events = []
        async with client.responses.stream(input="hi", **body) as stream:
            async for event in stream:
                events.append(event)
        asked = events[-1].response
        stored = await client.responses.retrieve(asked.id)
        message, *calls = stored.output
        answers = [
            {"type": "function_call_output", "call_id": call.call_id, "output": f"answer {i}"}
            for i, call in enumerate(calls)
        ]
        by_name = await client.responses.create(input=answers, previous_response_id=asked.id, **body)
        sent = [{"role": "user", "content": "hi"}, *(item.to_dict() for item in stored.output), *answers]
        await client.responses.create(input=sent, **body)
        items = [item async for item in client.responses.input_items.list(by_name.id, order="asc")]
    assert (stored.status, stored.output_text.strip()) == ("completed", "I look.")
    assert [item.type for item in stored.output] == ["message", "function_call", "function_call"]
    assert [json.loads(call.arguments)["word"] for call in calls] == ["mill", "race"]
    assert [tool.to_dict() for tool in stored.tools] == [TOOL]
    deltas = "".join(event.delta for event in events if event.type == "response.function_call_arguments.delta")
    assert deltas == "".join(call.arguments for call in calls)
    assert [item.type for item in items[-2:]] == ["function_call_output"] * 2
    assert message.id == items[1].id
    prompts = {bytes(prompt).decode() for prompt in runner.prompts}
    assert len(prompts) == 2, "both ways to go on come to the same prompt"
    assert {prompt.count("answer 0") for prompt in prompts} == {0, 1}


async def test_a_page_of_items_says_where_it_begins_and_ends() -> None:
    async with live_app() as app:
        created = await create(app, input=[{"role": "user", "content": str(i)} for i in range(5)])
        path = f"/v1/responses/{created['id']}/input_items"
        pages = [(await call(app.asgi, "GET", path, query="limit=2&order=asc")).json()]
        while pages[-1]["has_more"]:
            query = f"limit=2&order=asc&after={pages[-1]['last_id']}"
            pages.append((await call(app.asgi, "GET", path, query=query)).json())
        assert [[item["content"][0]["text"] for item in page["data"]] for page in pages] == [
            ["0", "1"],
            ["2", "3"],
            ["4"],
        ]
        for page in pages:
            assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][-1]["id"])
        for query, status in (
            ("after=x", 404),
            ("limit=0", 400),
            ("limit=101", 400),
            ("limit=a", 400),
            ("order=up", 400),
        ):
            answer = await call(app.asgi, "GET", path, query=query)
            assert (answer.status, answer.json()["error"]["param"]) == (status, query.partition("=")[0])


async def test_an_item_is_as_good_as_its_name() -> None:
    async with live_app() as app:
        first = await create(app, include=["message.output_text.logprobs"])
        question = {"role": "user", "content": "and?"}
        named = [{"type": "item_reference", "id": id} for id in (f"msg_{first['id'][5:]}_i0", first["output"][0]["id"])]
        by_name = await create(app, input=[*named, question])
        sent = await create(app, input=[{"role": "user", "content": "hi"}, first["output"][0], question])
        assert text_of(by_name) == text_of(sent)
        listed = (await call(app.asgi, "GET", f"/v1/responses/{by_name['id']}/input_items", query="order=asc")).json()
        assert [item["id"] for item in listed["data"][:2]] == [item["id"] for item in named]
        unknown = {"type": "item_reference", "id": first["output"][0]["id"] + "9"}
        answer = await call(app.asgi, "POST", "/v1/responses", BODY | {"input": [question, unknown]})
        assert (answer.status, answer.json()["error"]["param"]) == (404, "input[1].id")


async def test_an_item_is_in_a_conversation_once() -> None:
    async with live_app() as app:
        first = await create(app)
        named = {"type": "item_reference", "id": f"msg_{first['id'][5:]}_i0"}
        twice: list[tuple[dict[str, Any], str]] = [
            ({"input": [named, named]}, "input[1].id"),
            ({"input": [named], "previous_response_id": first["id"]}, "input[0].id"),
        ]
        for fields, param in twice:
            answer = await call(app.asgi, "POST", "/v1/responses", BODY | fields)
            assert (answer.status, answer.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("include", [[], ["message.output_text.logprobs"]], ids=["plain", "logprobs"])
async def test_reasoning_is_an_item_and_part_of_the_conversation(include: list[Any]) -> None:
    tokenizer = byte_tokenizer(templates.QWEN3)
    runner = SpeakingRunner(tokenizer, "<think>\nHm.\n</think>\n\nYes.")
    async with live_app(runner=runner, tokenizer=tokenizer, scheduler=make_scheduler(num_blocks=512)) as app:
        client: Any = client_of(app)
        body = {"model": "fake", "temperature": 0}
        async with client.responses.stream(input="hi", include=include, **body) as stream:
            kinds = [event.type async for event in stream]
            response = await stream.get_final_response()
        assert [item.type for item in response.output] == ["reasoning", "message"]
        assert (response.output[0].content[0].text, response.output_text) == ("Hm.", "Yes.")
        assert {"response.reasoning_text.delta", "response.reasoning_text.done"} <= {*kinds}
        events = events_of(await read(app, response.id))
        assert [event["type"] for event in events] == kinds
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        assert text_of(await get(app, response.id)) == "Hm.Yes."
        await client.responses.create(input="so?", previous_response_id=response.id, **body)
        items = [{"role": "user", "content": "hi"}, *(item.to_dict() for item in response.output)]
        await client.responses.create(input=[*items, {"role": "user", "content": "so?"}], **body)
    first, second = sorted((bytes(prompt).decode() for prompt in runner.prompts), key=len)
    assert second.startswith(first)
    assert "Hm." in second, "both ways to go on come to the same prompt"


async def test_what_is_held_back_behind_reasoning_counts_as_what_it_turns_out_to_be() -> None:
    tokenizer, thought = byte_tokenizer(templates.QWEN3), "<think>\nHm."
    runner = SpeakingRunner(tokenizer, f"{thought}\n</think>\n\n{CALLS[0]}")
    async with live_app(runner=runner, tokenizer=tokenizer, scheduler=make_scheduler(num_blocks=512)) as app:
        response = await create(app, tools=[TOOL], max_output_tokens=None)
    assert [item["type"] for item in response["output"]] == ["reasoning", "function_call"]
    assert response["usage"]["output_tokens_details"]["reasoning_tokens"] == len(thought)


async def test_a_model_that_reasons_is_told_not_to() -> None:
    told = "{{ ('yes' if enable_thinking else 'no') if enable_thinking is defined else reasoning_effort or 'unknown' }}"
    tokenizer = byte_tokenizer(templates.QWEN3 + told)
    runner = SpeakingRunner(tokenizer, "Yes.")
    async with live_app(runner=runner, tokenizer=tokenizer, scheduler=make_scheduler(num_blocks=512)) as app:
        for fields, word in (
            ({}, "unknown"),
            ({"reasoning": {"effort": None}}, "unknown"),
            ({"reasoning": {"effort": "none"}}, "no"),
            ({"reasoning": {"effort": "high", "summary": "auto"}}, "high"),
            ({"reasoning": {"effort": "none"}, "chat_template_kwargs": {"enable_thinking": True}}, "yes"),
        ):
            runner.prompts.clear()
            await create(app, **fields)
            [prompt] = runner.prompts
            assert bytes(prompt).decode().endswith(word)


async def test_a_previous_response_has_to_be_there_and_over() -> None:
    async with live_app() as app:
        for id in ("resp_" + "0" * 32, "x", ""):
            answer = await call(app.asgi, "POST", "/v1/responses", BODY | {"previous_response_id": id})
            error = answer.json()["error"]
            assert (answer.status, error["param"]) == (404, "previous_response_id")
            assert error["code"] == "previous_response_not_found"
        with app.runner.held():
            running = await create(app, background=True)
            answer = await call(app.asgi, "POST", "/v1/responses", BODY | {"previous_response_id": running["id"]})
            assert (answer.status, answer.json()["error"]["param"]) == (400, "previous_response_id")


async def test_a_conversation_that_has_grown_too_long_is_refused() -> None:
    async with live_app(runner=FakeRunner(max_context_tokens=128)) as app:
        response = await create(app)
        for _ in range(10):
            body = BODY | {"input": "x" * 30, "previous_response_id": response["id"]}
            answer = await call(app.asgi, "POST", "/v1/responses", body)
            if answer.status != 200:
                break
            response = answer.json()
        error = answer.json()["error"]
        assert (answer.status, error["code"]) == (400, "context_length_exceeded")
        assert error["param"] in ("input", "max_output_tokens")


async def test_only_its_owner_has_a_response(tmp_path: Path) -> None:
    headers = {}
    for name in ("alice", "bob"):
        secret, key = create_key(name)
        append_key(tmp_path / "keys.toml", key)
        headers[name] = {"x-api-key": secret}
    async with live_app(api_keys_file=tmp_path / "keys.toml") as app:
        created = await create(app, headers["alice"], background=True)
        path = f"/v1/responses/{created['id']}"
        others: list[tuple[str, str, Any]] = [
            ("GET", path, None),
            ("DELETE", path, None),
            ("POST", f"{path}/cancel", None),
        ]
        others += [("GET", f"{path}/input_items", None)]
        others += [("POST", "/v1/responses", BODY | {"previous_response_id": created["id"]})]
        item = {"type": "item_reference", "id": f"msg_{created['id'][5:]}_i0"}
        others += [("POST", "/v1/responses", BODY | {"input": [item]})]
        for method, other_path, body in others:
            assert (await call(app.asgi, method, other_path, body, headers=headers["bob"])).status == 404
            assert (await call(app.asgi, method, other_path, body)).status == 401
        assert (await call(app.asgi, "GET", path, headers=headers["alice"])).status == 200
        assert (await call(app.asgi, "DELETE", path, headers=headers["alice"])).status == 200
        assert (await call(app.asgi, "GET", path, headers=headers["bob"])).status == 404


async def test_stored_responses_stay_for_their_time_and_within_their_room() -> None:
    async with live_app(response_ttl_s=100) as app:
        ids = [(await create(app, input=f"{i}" * 100))["id"] for i in range(4)]
        kept = app.responses._finished
        app.responses._max_finished_bytes = sum(response.num_bytes for response in kept.values()) + 1000
        app.responses.sweep(app.client.clock())
        assert list(kept) == ids
        await get(app, ids[0])
        last = (await create(app, input="x" * 100))["id"]
        app.responses.sweep(app.client.clock())
        assert list(kept) == [ids[2], ids[3], ids[0], last], "least recently asked for goes first"
        app.responses.sweep(app.client.clock() + 99)
        assert len(kept) == 4
        app.responses.sweep(app.client.clock() + 100)
        assert not kept
        assert (await call(app.asgi, "GET", f"/v1/responses/{last}")).status == 404
    async with live_app(response_store_bytes=0) as app:
        id = (await create(app))["id"]
        app.responses.sweep(app.client.clock())
        assert (await call(app.asgi, "GET", f"/v1/responses/{id}")).status == 404


async def test_a_response_weighs_what_it_holds() -> None:
    async with live_app(runner=FakeRunner(4096), scheduler=make_scheduler(num_blocks=512)) as app:

        async def weight_of(**fields: Any) -> int:
            id = (await create(app, **fields))["id"]
            return app.responses.get(id).num_bytes

        light = await weight_of()
        for heavy in (
            {"input": "x" * 1100},
            {"instructions": "x" * 1000},
            {"metadata": {str(i): "x" * 200 for i in range(5)}},
            {"prompt_cache_key": "x" * 500, "safety_identifier": "x" * 500},
            {"max_output_tokens": 30},
        ):
            assert await weight_of(**heavy) >= light + 1000, heavy
        first = await create(app, input="x" * 1100)
        assert await weight_of(previous_response_id=first["id"]) >= light + 1000


async def test_a_response_whose_step_fails_says_so_in_every_way_it_is_read() -> None:
    async with live_app() as app:
        app.runner.fail_next = True
        whole = await call(app.asgi, "POST", "/v1/responses", BODY)
        assert (whole.status, whole.json()["error"]["code"]) == (500, "engine_error")
        app.runner.fail_next = True
        events = events_of(await call(app.asgi, "POST", "/v1/responses", BODY | {"stream": True}))
        assert kinds_of(events) == ["created", "in_progress", "failed"]
        failed = events[-1]["response"]
        assert failed["error"]["code"] == "server_error"
        assert "fake model" not in failed["error"]["message"], "internals stay inside"
        response = await client_of(app).responses.retrieve(failed["id"])
        assert (response.status, response.output) == ("failed", [])


async def test_a_drain_ends_what_runs_with_a_failure() -> None:
    async with live_app() as app, anyio.create_task_group() as tasks:
        with app.runner.held():
            background = await create(app, background=True)
            request = exchange(app.asgi, "POST", "/v1/responses")
            request.send_body(json.dumps(BODY | {"stream": True}).encode())
            tasks.start_soon(request.run)
            await request.wait_until(lambda: b"response.in_progress" in request.body)
            await drain(app, 0.05, anyio.Event())
            await request.done.wait()
            assert events_of(request)[-1]["type"] == "response.failed"
            assert (await get(app, background["id"]))["status"] == "failed"
            refused = await call(app.asgi, "POST", "/v1/responses", BODY)
            assert (refused.status, refused.json()["error"]["code"]) == (503, "draining")


async def test_a_silent_response_gets_comments() -> None:
    async with live_app(heartbeat_s=1) as app, anyio.create_task_group() as tasks:
        request = exchange(app.asgi, "POST", "/v1/responses")
        request.send_body(json.dumps(BODY | {"stream": True}).encode())
        with app.runner.held():
            tasks.start_soon(request.run)
            await request.wait_until(lambda: request.body.endswith(b":\n\n"))
        await request.done.wait()
        assert request.body.count(b":\n\n") >= 1
        assert delta_of(events_of(request)) == TEXT


async def test_texts_are_padded_where_it_is_asked_for_and_events_stay_what_they_are() -> None:
    async with live_app() as app:
        options = {"stream": True, "stream_options": {"include_obfuscation": True}}
        padded = events_of(await call(app.asgi, "POST", "/v1/responses", BODY | options))
        id = padded[0]["response"]["id"]
        again = await call(app.asgi, "GET", f"/v1/responses/{id}", query="stream=true&include_obfuscation=true")
        plain = events_of(await read(app, id))
        for events in (padded, events_of(again)):
            deltas = [event for event in events if event["type"] == "response.output_text.delta"]
            assert all(len(json.dumps(event["delta"]) + event.pop("obfuscation")) % 32 == 0 for event in deltas)
            assert events == plain
        client = client_of(app)
        stream = await client.responses.retrieve(id, stream=True, starting_after=3)
        assert [event.sequence_number async for event in stream] == [event["sequence_number"] for event in plain[4:]]


async def test_fields_that_are_not_supported_are_refused_by_name_unless_they_ask_for_nothing() -> None:
    async with live_app() as app:
        for field, neutral in ResponsesRequest.unsupported.items():
            refused = await call(app.asgi, "POST", "/v1/responses", BODY | {field: {"anything": ["at", "all"]}})
            error = refused.json()["error"]
            assert (refused.status, error["param"], error["code"]) == (400, field, "unsupported_parameter")
            for value in (None, *neutral):
                await create(app, max_output_tokens=1, **{field: value})
        assert app.client.num_unfinished == 0


USER = {"role": "user", "content": "x"}
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no input": ({"input": None}, "input"),
    "input a number": ({"input": 5}, "input"),
    "input empty": ({"input": []}, "input"),
    "input too long": ({"input": [USER] * 3000}, "input"),
    "item a number": ({"input": [USER, 5]}, "input[1].type"),
    "item of another type": ({"input": [USER, {"type": "computer_call"}]}, "input[1].type"),
    "role unknown": ({"input": [{"role": "king", "content": "x"}]}, "input[0].role"),
    "no content": ({"input": [{"role": "user"}]}, "input[0].content"),
    "an image": (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://x"}]}]},
        "input[0].content[0].type",
    ),
    "text a number": (
        {"input": [{"role": "user", "content": [{"type": "input_text", "text": 5}]}]},
        "input[0].content[0].text",
    ),
    "a call without a name": ({"input": [{"type": "function_call", "call_id": "c", "arguments": ""}]}, "input[0].name"),
    "an answer to no call": ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id"),
    "a tool of the server's": ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    "a tool without a name": ({"tools": [{"type": "function"}]}, "tools[0].name"),
    "a tool with a bad name": ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
    "a tool twice": ({"tools": [{"type": "function", "name": "a"}] * 2}, "tools[1].name"),
    "parameters that are none": (
        {"tools": [{"type": "function", "name": "a", "parameters": {"type": "string"}}]},
        "tools[0].parameters",
    ),
    "tool_choice without tools": ({"tool_choice": "required"}, "tool_choice"),
    "tool_choice unknown": (
        {"tools": [{"type": "function", "name": "a"}], "tool_choice": {"type": "function", "name": "b"}},
        "tool_choice.name",
    ),
    "an allowed tool unknown": (
        {
            "tools": [{"type": "function", "name": "a"}],
            "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "b"}]},
        },
        "tool_choice.tools[0].name",
    ),
    "tool_choice a word": ({"tool_choice": "sometimes"}, "tool_choice"),
    "tool_choice of another kind": ({"tool_choice": {"type": "mcp"}}, "tool_choice.type"),
    "max_output_tokens 0": ({"max_output_tokens": 0}, "max_output_tokens"),
    "max_output_tokens over the context": ({"max_output_tokens": 10**6}, "max_output_tokens"),
    "temperature": ({"temperature": -1}, "temperature"),
    "top_p": ({"top_p": 2}, "top_p"),
    "top_logprobs alone": ({"top_logprobs": 2}, "top_logprobs"),
    "top_logprobs 21": ({"top_logprobs": 21, "include": ["message.output_text.logprobs"]}, "top_logprobs"),
    "include": ({"include": ["everything"]}, "include[0]"),
    "metadata of 17 pairs": ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
    "metadata with a long key": ({"metadata": {"k" * 65: "v"}}, "metadata." + "k" * 65 + ".[key]"),
    "metadata with a long value": ({"metadata": {"k": "v" * 513}}, "metadata.k"),
    "metadata with a number": ({"metadata": {"k": 5}}, "metadata.k"),
    "background without store": ({"background": True, "store": False}, "background"),
    "background a text": ({"background": "yes"}, "background"),
    "stream_options without stream": ({"stream_options": {"include_obfuscation": True}}, "stream_options"),
    "text.format": ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
    "text.format without a schema": ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema"),
    "a schema that cannot be kept to": (
        {"text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "array", "uniqueItems": True}}}},
        "text.format.schema",
    ),
    "text.verbosity": ({"text": {"verbosity": "low"}}, "text.verbosity"),
    "reasoning.effort": ({"reasoning": {"effort": "utmost"}}, "reasoning.effort"),
    "reasoning.summary": ({"reasoning": {"summary": "long"}}, "reasoning.summary"),
    "truncation": ({"truncation": "auto"}, "truncation"),
    "extensions": ({"top_k": -2}, "top_k"),
    "best_of": ({"best_of": 2}, "best_of"),
}


async def test_wrong_fields_are_refused_by_their_own_names_and_start_nothing() -> None:
    async with live_app() as app:
        for case, (fields, param) in WRONG.items():
            answer = await call(app.asgi, "POST", "/v1/responses", BODY | fields)
            assert (answer.status, answer.json()["error"]["param"]) == (400, param), (case, answer.body)
            assert param[:200] in answer.json()["error"]["message"], case
        assert not app.responses._finished
        assert not app.responses._running


async def test_an_unknown_model_is_404() -> None:
    async with live_app() as app:
        with pytest.raises(openai.NotFoundError) as error:
            await client_of(app).responses.create(model="gpt-9", input="hi")
        assert (error.value.param, error.value.code) == ("model", "model_not_found")


async def test_null_is_absent_and_unknown_fields_are_ignored() -> None:
    async with live_app() as app:
        response = await create(app, **dict.fromkeys(ResponsesRequest.model_fields.keys() - BODY.keys()), surprise=[1])
        assert text_of(response) == TEXT


async def test_every_generation_has_one_line_in_the_log_that_does_not_name_its_response(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", logger="headrace.requests")
    async with live_app() as app:
        ids = [(await create(app, background=background))["id"] for background in (False, True)]
        await read(app, ids[1])
    lines = [record.getMessage() for record in caplog.records if record.name == "headrace.requests"]
    assert [json.loads(line)["route"] for line in lines] == ["/v1/responses"] * 2
    assert not any(id in line for id in ids for line in lines)
