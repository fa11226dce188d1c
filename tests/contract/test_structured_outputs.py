"""Answers that keep to a grammar, on every route, whatever field it comes in; and the fields that are refused."""

import json
import random
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import anyio
import pytest

from asgi_client import Exchange, call, chunks, exchange
from fake_engine import FakeRunner, make_scheduler
from json_schemas import UNSUPPORTED, Schema, random_schema, validate, with_unsupported
from live_app import LiveApp, live_app
from recorded_streams import crash

pytestmark = pytest.mark.anyio

SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["mill", "wheel"]}, "turns": {"type": "integer", "minimum": 1, "maximum": 99}},
    "required": ["name", "turns"],
    "additionalProperties": False,
}
LARK = 'start: ("go" | "stop") "!"'
# (fields, what the whole answer looks like)
FORMS: list[tuple[dict[str, Any], str]] = [
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": True}}}, "{"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}}, "{"),
    ({"structured_outputs": {"json": SCHEMA}}, "{"),
    ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, "{"),
    ({"structured_outputs": {"regex": "(left|right)[0-9]{3}"}}, "(left|right)[0-9]{3}"),
    ({"structured_outputs": {"choice": ["yes", "no, never", "é😀"]}}, "yes|no, never|é😀"),
    ({"structured_outputs": {"grammar": LARK}}, "(go|stop)!"),
    ({"guided_json": SCHEMA}, "{"),
    ({"guided_json": json.dumps(SCHEMA)}, "{"),
    ({"guided_regex": "(left|right)[0-9]{3}"}, "(left|right)[0-9]{3}"),
    ({"guided_choice": ['"quoted"\n', "\\d", "x"]}, '"quoted"\n|\\\\d|x'),
    ({"guided_grammar": 'root ::= ("go" | "stop") "!"'}, "(go|stop)!"),
]
CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 200}
COMPLETION = {"prompt": "hi", "max_tokens": 200}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "journal").mkdir()
    return tmp_path / "journal" / "streams.db"


def assert_kept(text: str, form: str) -> None:
    if form == "{":
        answer = json.loads(text)
        assert set(answer) == {"name", "turns"}
        assert answer["name"] in ("mill", "wheel")
        assert 1 <= answer["turns"] <= 99
    else:
        assert re.fullmatch(form, text), text


@pytest.mark.parametrize(
    ("fields", "form"), FORMS, ids=lambda value: next(iter(value)) if isinstance(value, dict) else ""
)
async def test_an_answer_keeps_to_its_grammar_and_stops_there_on_every_route(fields: dict[str, Any], form: str) -> None:
    async with live_app() as app:
        for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", COMPLETION)):
            whole = await call(app.asgi, "POST", path, body | fields)
            assert whole.status == 200, whole.body
            [choice] = whole.json()["choices"]
            assert choice["finish_reason"] == "stop"
            text = choice["message"]["content"] if "message" in choice else choice["text"]
            assert_kept(text, form)
        streamed = await call(app.asgi, "POST", "/v1/completions", COMPLETION | fields | {"stream": True})
        assert "".join(choice["text"] for chunk in chunks(streamed.body) for choice in chunk["choices"]) == text
        created = await call(app.asgi, "POST", "/v1/streams", COMPLETION | fields)
        assert created.status == 201, created.body
        url = created.json()["url"]
        await app.until(lambda: app.num_unfinished == 0)
        snapshot = (await call(app.asgi, "GET", url)).json()
        assert (snapshot["text"], snapshot["finish_reason"]) == (text, "stop")


@pytest.mark.parametrize(
    "fields", [{"response_format": {"type": "json_object"}}, {"structured_outputs": {"json_object": True}}]
)
async def test_a_json_object_is_one_or_the_beginning_of_one(fields: dict[str, Any]) -> None:
    async with live_app() as app:
        answer = (await call(app.asgi, "POST", "/v1/completions", COMPLETION | fields)).json()["choices"][0]
    assert answer["text"].lstrip()[0] == "{"
    assert answer["finish_reason"] in ("stop", "length")
    if answer["finish_reason"] == "stop":
        assert isinstance(json.loads(answer["text"]), dict)


async def test_an_answer_cut_by_its_length_is_the_beginning_of_one_that_keeps_to_the_grammar() -> None:
    async with live_app() as app:
        fields = {"guided_regex": "(abc){5}", "max_tokens": 7}
        answer = (await call(app.asgi, "POST", "/v1/completions", COMPLETION | fields)).json()["choices"][0]
    assert (answer["text"], answer["finish_reason"]) == ("abcabca", "length")


@pytest.mark.parametrize(
    "fields", [{"response_format": {"type": "text"}}, {"response_format": None}, {"guided_json": None}]
)
async def test_what_asks_for_no_grammar_changes_nothing(fields: dict[str, Any]) -> None:
    async with live_app() as app:
        free = (await call(app.asgi, "POST", "/v1/completions", COMPLETION)).json()["choices"]
        assert (await call(app.asgi, "POST", "/v1/completions", COMPLETION | fields)).json()["choices"] == free


async def test_of_two_hundred_schemas_what_ends_fulfils_them_and_what_is_cut_is_the_beginning_of_what_does() -> None:
    """The fake model says the same for longer with more tokens, and whatever is allowed, as no real one does."""
    ends = {"stop": 0, "length": 0}
    scheduler = make_scheduler(num_blocks=4096, max_num_batched_tokens=256, max_num_seqs=40)
    limit = anyio.CapacityLimiter(32)

    async with live_app(runner=FakeRunner(2048), scheduler=scheduler) as app:

        async def answer(seed: int, schema: Schema, max_tokens: int) -> tuple[str, str]:
            form = {"type": "json_schema", "json_schema": {"name": "example", "schema": schema, "strict": True}}
            body = {"prompt": f"{seed}", "response_format": form, "max_tokens": max_tokens}
            async with limit:
                answered = await call(app.asgi, "POST", "/v1/completions", body)
            assert answered.status == 200, (seed, answered.body)
            [choice] = answered.json()["choices"]
            return choice["text"], choice["finish_reason"]

        async def check(seed: int) -> None:
            schema = random_schema(random.Random(seed))
            text, reason = await answer(seed, schema, 100)
            ends[reason] += 1
            if reason == "length":
                whole, reason = await answer(seed, schema, 500)
                assert whole.startswith(text.rstrip("\ufffd")), seed
                text = whole
            if reason == "stop":
                validate(schema, text)

        async with anyio.create_task_group() as tasks:
            for seed in range(200):
                tasks.start_soon(check, seed)
    assert ends["stop"] > 80
    assert ends["length"] > 20


async def test_a_keyword_that_is_not_supported_is_refused_by_its_name_wherever_it_is() -> None:
    async with live_app() as app:
        for seed, keyword in enumerate([*UNSUPPORTED] * 3):
            schema = with_unsupported(random.Random(seed), keyword)
            answer = await call(app.asgi, "POST", "/v1/completions", COMPLETION | {"guided_json": schema})
            assert (answer.status, answer.json()["error"]["param"]) == (400, "guided_json")
            assert f'"{keyword}"' in answer.json()["error"]["message"]


async def test_each_choice_and_each_prompt_keeps_to_it_by_itself() -> None:
    async with live_app() as app:
        fields = {"prompt": ["a", "b"], "n": 3, "guided_regex": "[a-z]{4}[0-9]"}
        choices = (await call(app.asgi, "POST", "/v1/completions", COMPLETION | fields)).json()["choices"]
    assert len(choices) == 6
    assert len({choice["text"] for choice in choices}) > 1
    for choice in choices:
        assert_kept(choice["text"], "[a-z]{4}[0-9]")


async def test_log_probabilities_and_stop_strings_go_with_a_grammar() -> None:
    async with live_app() as app:
        fields = {"guided_regex": "abc(de)*", "stop": "c", "logprobs": 1}
        choice = (await call(app.asgi, "POST", "/v1/completions", COMPLETION | fields)).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("ab", "stop")
    assert choice["logprobs"]["tokens"] == ["a", "b"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/streams"])
@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"guided_json": {"type": "array", "uniqueItems": True}}, "guided_json", "uniqueItems"),
        ({"structured_outputs": {"json": {"not": {}}}}, "structured_outputs.json", "not"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"if": {}}}}}, None, '"if"'),
        ({"guided_regex": "("}, "guided_regex", ""),
        ({"guided_grammar": "start: nobody"}, "guided_grammar", "nobody"),
        ({"guided_choice": []}, "guided_choice", ""),
        ({"guided_choice": "yes"}, "guided_choice", ""),
        ({"guided_regex": "a", "guided_json": {}}, "guided_regex", "guided_json"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex", "response_format"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs.choice", ""),
        ({"response_format": {"type": "json"}}, "response_format.type", ""),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", ""),
        ({"response_format": "json_object"}, "response_format", ""),
        ({"response_format": {"type": "json_object", "schema": {}}}, "response_format.schema", ""),
        ({"guided_json": {"enum": [2**60 + 1]}}, "guided_json", "enum"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos", "guided_regex"),
        ({"guided_regex": "a" * (2**17 + 1)}, "guided_regex", ""),
        ({"guided_json": {"title": "a" * 2**17}}, "guided_json", ""),
    ],
)
async def test_a_grammar_that_cannot_be_kept_to_is_refused_by_its_field(
    path: str, fields: dict[str, Any], param: str | None, said: str
) -> None:
    async with live_app() as app:
        body = (CHAT if "chat" in path else COMPLETION) | fields
        answer: Exchange = await call(app.asgi, "POST", path, body)
        assert answer.status == 400, answer.body
        error = answer.json()["error"]
        assert error["param"] == (param or "response_format.json_schema.schema")
        assert error["message"].startswith(error["param"])
        assert said in error["message"]
        assert app.runner.num_steps == 0


async def test_a_grammar_is_compiled_once_and_forgotten_for_newer_ones() -> None:
    async def ask(app: LiveApp, regex: str) -> None:
        answer = await call(app.asgi, "POST", "/v1/completions", COMPLETION | {"guided_regex": regex})
        assert_kept(answer.json()["choices"][0]["text"], regex)

    async with live_app(grammar_cache_bytes=3 * 2**20) as app:
        assert app.grammars.num_bytes == 0
        await ask(app, "one")
        one = app.grammars.num_bytes
        assert one > 0
        await ask(app, "one")
        assert app.grammars.num_bytes == one
        for regex in ("two", "[0-9]three", "four", "one"):
            await ask(app, regex)
            assert app.grammars.num_bytes <= 3 * 2**20


async def test_a_grammar_that_turns_out_too_complex_is_a_refusal_of_its_field_and_in_a_stream_an_error() -> None:
    fields = {"guided_regex": "(a{1,99}){1,99}(a{1,99}){1,99}b"}
    async with live_app() as app:
        beside = exchange(app.asgi, "POST", "/v1/completions")
        beside.send_body(json.dumps(COMPLETION).encode())
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(beside.run)
            whole = await call(app.asgi, "POST", "/v1/completions", COMPLETION | fields)
            streamed = await call(app.asgi, "POST", "/v1/completions", COMPLETION | fields | {"stream": True})
        assert beside.status == 200
    assert whole.status == 400, whole.body
    error = whole.json()["error"]
    assert (error["param"], error["code"]) == ("guided_regex", "grammar_too_complex")
    assert json.loads(streamed.body.strip().split(b"data: ")[-1])["error"] == error


@pytest.mark.parametrize("num_steps", range(1, 7))
async def test_a_stream_that_outlives_its_process_goes_on_within_its_grammar(path: Path, num_steps: int) -> None:
    runner = FakeRunner()
    with ExitStack() as held:
        held.enter_context(runner.held())
        runner.allow(num_steps)
        async with live_app(journal_file=path, runner=runner) as app:
            body = COMPLETION | {"guided_regex": "(ab|cd)-[0-9]{3}", "on_disconnect": "continue"}
            url = (await call(app.asgi, "POST", "/v1/streams", body)).json()["url"]
            generation = app.registry.get(url.rpartition("/")[2]).generation
            await app.until(lambda: generation.num_output_tokens == num_steps)
            crash(path, path.parent / "copy")
            held.close()
    async with live_app(journal_file=path.parent / "copy" / path.name) as app:
        await app.until(lambda: app.num_unfinished == 0)
        snapshot = (await call(app.asgi, "GET", url)).json()
    assert snapshot["finish_reason"] == "stop"
    assert_kept(snapshot["text"], "(ab|cd)-[0-9]{3}")
