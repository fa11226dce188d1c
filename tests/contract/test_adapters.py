"""LoRA adapters as clients see them: models of their own beside the one that they are for."""

import json
from pathlib import Path
from typing import Any

import pytest

from asgi_client import call
from fake_engine import FakeRunner, expected_text
from live_app import LiveApp, live_app
from recorded_streams import crash

pytestmark = pytest.mark.anyio

ADAPTERS = {"poet": "its fingerprint", "cook": ""}
PROMPT = "a prompt of forty bytes, which is enough."
BODY = {"prompt": PROMPT, "max_tokens": 6, "temperature": 0}


async def complete(app: LiveApp, **fields: Any) -> dict[str, Any]:
    answer = await call(app.asgi, "POST", "/v1/completions", BODY | fields)
    assert answer.status == 200, answer.body
    content: dict[str, Any] = answer.json()
    return content


async def test_adapters_are_listed_as_children_of_the_model() -> None:
    async with live_app(adapters=ADAPTERS) as app:
        models = (await call(app.asgi, "GET", "/v1/models")).json()["data"]
    assert [
        (model["id"], model["parent"], model["root"], model["task"], model["max_model_len"]) for model in models
    ] == [
        ("fake", None, "fake", "generate", 512),
        ("poet", "fake", "fake", "generate", 512),
        ("cook", "fake", "fake", "generate", 512),
    ]


async def test_each_name_is_answered_by_its_own_adapter_and_in_its_own_name() -> None:
    async with live_app(adapters=ADAPTERS) as app:
        for model, name, adapter in ((None, "fake", None), ("fake", "fake", None), *((n, n, n) for n in ADAPTERS)):
            text = expected_text(PROMPT, 6, adapter=adapter)
            answer = await complete(app, model=model)
            assert (answer["model"], answer["choices"][0]["text"]) == (name, text)
            streamed = await call(app.asgi, "POST", "/v1/completions", BODY | {"model": model, "stream": True})
            chunks = [json.loads(event["data"]) for event in streamed.events()[:-1]]
            assert {chunk["model"] for chunk in chunks} == {name}
            assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text
            created = (await call(app.asgi, "POST", "/v1/streams", BODY | {"model": model})).json()
            await call(app.asgi, "GET", created["events_url"])
            snapshot = (await call(app.asgi, "GET", created["url"])).json()
            assert (created["model"], snapshot["model"], snapshot["text"]) == (name, name, text)
    assert len({expected_text(PROMPT, 6, adapter=adapter) for adapter in (None, *ADAPTERS)}) == 3


async def test_choices_are_all_of_the_adapter() -> None:
    async with live_app(adapters=ADAPTERS) as app:
        answer = await complete(app, model="cook", n=2)
    expected = [expected_text(PROMPT, 6, choice, "cook") for choice in range(2)]
    assert [choice["text"] for choice in answer["choices"]] == expected


@pytest.mark.parametrize("model", ["Poet", "", "fake/poet", "its fingerprint"])
async def test_a_model_that_there_is_not_is_not_found(model: str) -> None:
    async with live_app(adapters=ADAPTERS) as app:
        for path in ("/v1/completions", "/v1/streams"):
            answer = await call(app.asgi, "POST", path, BODY | {"model": model})
            error = answer.json()["error"]
            assert (answer.status, error["param"], error["code"]) == (404, "model", "model_not_found")


async def test_cached_prefixes_are_an_adapters_own() -> None:
    async with live_app(adapters=ADAPTERS) as app:
        num_cached = [
            (await complete(app, model=model))["usage"]["prompt_tokens_details"]["cached_tokens"]
            for model in ("fake", "poet", "cook", "fake", "poet", "cook")
        ]
    assert num_cached == [0, 0, 0, 32, 32, 32]


@pytest.mark.parametrize(
    ("adapters", "has_end"), [(ADAPTERS, True), ({"cook": ""}, False), (ADAPTERS | {"poet": "another"}, False)], ids=str
)
async def test_a_restart_goes_on_with_the_same_adapter_or_ends_its_streams(
    tmp_path: Path, adapters: dict[str, str], has_end: bool
) -> None:
    runner = FakeRunner()
    path = tmp_path / "streams.db"
    with runner.held():
        runner.allow(3)
        async with live_app(runner=runner, adapters=ADAPTERS, journal_file=path) as app:
            stream = (await call(app.asgi, "POST", "/v1/streams", BODY | {"model": "poet"})).json()
            generation = app.registry.get(stream["id"]).generation
            await app.until(lambda: generation.num_output_tokens == 3)
            copy = crash(path, tmp_path / "copy")
            runner.allow(100)
    async with live_app(adapters=adapters, journal_file=copy) as app:
        events = await call(app.asgi, "GET", stream["events_url"])
        snapshot = (await call(app.asgi, "GET", stream["url"])).json()
    assert snapshot["model"] == "poet"
    text = expected_text(PROMPT, 6, adapter="poet")
    if has_end:
        assert (snapshot["text"], events.events()[-1]["event"]) == (text, "done")
    else:
        assert (snapshot["text"], events.events()[-1]["event"]) == (text[:3], "error")
        assert "no adapter poet since its restart" in snapshot["error"]["message"]
