"""What is decided before the first byte is an HTTP status with OpenAI's envelope, and touches nothing else."""

import json
from typing import Any

import anyio
import pytest
from pydantic import ValidationError

from asgi_client import Exchange, call, exchange
from fake_engine import EOS, FakeRunner, expected_text, make_scheduler
from headrace.scheduler.engine_core import ComputedStep
from headrace.scheduler.messages import RowResult
from headrace.server.drain import drain
from headrace.server.protocol import UNSUPPORTED, CompletionRequest
from live_app import live_app

pytestmark = pytest.mark.anyio

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
OK = {"prompt": "hi", "max_tokens": 2, "temperature": 0}


def assert_refused(answer: Exchange, status: int, *, param: str | None = None, code: str | None = None) -> None:
    assert answer.status == status, answer.body
    error = answer.json()["error"]
    details = {"tier", "predicted_ttft_s", "target_ttft_s"} if error["code"] == "queue_full" else set()
    assert set(error) == {"message", "type", "param", "code"} | details
    assert error["message"]
    if param is not None:
        assert error["param"] == param
    if code is not None:
        assert error["code"] == code


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b"null",
        b'{"prompt": "a"',
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": Infinity}',
        b'{"prompt": "a", "temperature": 1e400}',
        b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
    ids=lambda body: repr(body[:30]),
)
async def test_a_body_that_is_no_json_object_is_refused(body: bytes) -> None:
    async with live_app() as app:
        assert_refused(await call(app.asgi, "POST", "/v1/completions", body), 400)
        assert (await call(app.asgi, "POST", "/v1/completions", OK)).status == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 0, "min_tokens": 1, "echo": True}, "min_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 10**18}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 2000}, "max_tokens"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 1e308}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"min_p": 2}, "min_p"),
        ({"top_k": -2}, "top_k"),
        ({"seed": 2**64}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"stop": [""]}, "stop[0]"),
        ({"stop": 5}, "stop"),
        ({"prompt": {"text": "x"}}, "prompt"),
        ({"stop": ["x" * 1_000_000]}, "stop[0]"),
        ({"stop": ["x"] * 10_000}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"stop_token_ids": [257]}, "stop_token_ids"),
        ({"timeout": 0}, "timeout"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"model": "m" * 10_000}, "model"),
        ({"model": 5}, "model"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [257]}, "prompt"),
        ({"prompt": "x" * 600}, "prompt"),
        ({"prompt": "x" * 1_000_000}, "prompt"),
        ({"prompt": None}, None),
    ],
    ids=lambda value: repr(value)[:40],
)
async def test_a_wrong_value_is_refused_by_name(fields: dict[str, Any], param: str | None) -> None:
    async with live_app() as app:
        assert_refused(await call(app.asgi, "POST", "/v1/completions", OK | fields), 400, param=param)
        assert app.runner.num_steps == 0


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "assistant", "content": None, "tool_calls": [{"id": "x"}]}], "messages[0].tool_calls[0].function"),
        ([{"role": "assistant", "content": "x", "prefix": True}, CHAT["messages"][0]], "messages[0].prefix"),
        ([{"role": "user", "content": [1] * 100_000}], "messages[0].content[0]"),
        ([{"role": "king", "content": "x"}], "messages[0].role"),
        ([{"role": "user", "content": 5}], None),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}], None),
        ("hi", "messages"),
        ([{"role": "user", "content": "x"}] * 3000, "messages"),
    ],
)
async def test_wrong_messages_are_refused(messages: Any, param: str | None) -> None:
    async with live_app() as app:
        assert_refused(await call(app.asgi, "POST", "/v1/chat/completions", {"messages": messages}), 400, param=param)


@pytest.mark.parametrize("field", sorted(UNSUPPORTED))
async def test_a_field_that_is_not_supported_is_refused_by_name_unless_it_asks_for_nothing(
    field: str,
) -> None:
    async with live_app() as app:
        body = CHAT | {"max_tokens": 1, field: {"anything": ["at", "all"]}}
        refused = await call(app.asgi, "POST", "/v1/chat/completions", body)
        assert_refused(refused, 400, param=field, code="unsupported_parameter")
        for neutral in (None, *UNSUPPORTED[field]):
            body = CHAT | {"max_tokens": 1, field: neutral}
            assert (await call(app.asgi, "POST", "/v1/chat/completions", body)).status == 200


async def test_null_is_absent_and_unknown_fields_are_ignored() -> None:
    fields = dict.fromkeys(("model", "stream", "max_tokens", "temperature", "stop", "seed", "top_p", "user", "timeout"))
    async with live_app() as app:
        answer = await call(
            app.asgi, "POST", "/v1/chat/completions", CHAT | fields | {"max_tokens": 1, "surprise": [1]}
        )
        assert answer.status == 200


async def test_an_end_that_the_model_has_no_logit_for_costs_no_step() -> None:
    runner = FakeRunner()
    runner.vocab_size = EOS  # a tokenizer may know more tokens than the model
    async with live_app(runner=runner) as app:
        answer = await call(app.asgi, "POST", "/v1/completions", OK | {"min_tokens": 2})
        assert answer.status == 200
        [generation] = runner.stop_token_ids
        assert EOS not in generation


async def test_an_unknown_model_is_404_and_the_served_one_may_be_named() -> None:
    async with live_app() as app:
        refused = await call(app.asgi, "POST", "/v1/completions", OK | {"model": "gpt-9"})
        assert_refused(refused, 404, param="model", code="model_not_found")
        assert (await call(app.asgi, "POST", "/v1/completions", OK | {"model": "fake"})).status == 200


async def test_unknown_routes_and_methods_have_the_envelope() -> None:
    async with live_app() as app:
        assert_refused(await call(app.asgi, "GET", "/v1/nothing"), 404, code="not_found")
        assert_refused(await call(app.asgi, "GET", "/v1/completions"), 405)
        assert_refused(await call(app.asgi, "DELETE", "/v1/streams"), 405)


@pytest.mark.parametrize("path", ["/v1/stream", "/v1/streams/x", "/v1/streams/x/events"])
async def test_head_starts_nothing(path: str) -> None:
    async with live_app() as app:
        answer = await call(app.asgi, "HEAD", path, query="prompt=x", headers={"accept": "text/event-stream"})
        assert answer.status == 405
        assert app.client.num_unfinished == 0


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "text/plain"},
        {"content-type": ""},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-encoding": "gzip"},
    ],
)
async def test_other_media_types_and_compressed_bodies_are_415(headers: dict[str, str]) -> None:
    async with live_app() as app:
        assert_refused(await call(app.asgi, "POST", "/v1/completions", OK, headers=headers), 415)


@pytest.mark.parametrize("length", ["5000", "10", None, "minus one", "9" * 5000])
async def test_a_body_over_the_limit_is_413_whatever_its_length_claims(length: str | None) -> None:
    headers = {} if length is None else {"content-length": length}
    async with live_app(max_body_bytes=1000) as app:
        request = exchange(app.asgi, "POST", "/v1/completions", headers=headers)
        for _ in range(5):
            request.send_body(b"x" * 1000, more_body=True)
        await request.run()
        assert_refused(request, 400 if length == "minus one" else 413)
        assert request.headers["connection"] == "close"
        assert len(request.headers["x-request-id"]) == 32


@pytest.mark.parametrize("stream", [True, False])
async def test_a_full_queue_is_429_before_the_first_byte(stream: bool) -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    async with live_app(scheduler=scheduler, max_queue_size=2) as app, anyio.create_task_group() as tasks:
        accepted = []
        with app.runner.held():
            for i in range(3):
                request = exchange(app.asgi, "POST", "/v1/completions")
                request.send_body(json.dumps(OK | {"prompt": f"q{i}"}).encode())
                accepted.append(request)
                tasks.start_soon(request.run)
                await anyio.wait_all_tasks_blocked()
                if i == 0:  # it runs before the others queue behind it
                    app.runner.allow(1)
                    await app.until(lambda: app.client.num_waiting == 0)
            refused = await call(app.asgi, "POST", "/v1/completions", OK | {"stream": stream})
            assert_refused(refused, 429, code="queue_full")
            assert refused.json()["error"]["tier"] == "standard"
            assert refused.json()["error"]["predicted_ttft_s"] > 0
            assert 1 <= int(refused.headers["retry-after"]) <= 120
            assert 750 <= int(refused.headers["retry-after-ms"]) <= 120_000
        for i, request in enumerate(accepted):
            await request.done.wait()
            assert request.json()["choices"][0]["text"] == expected_text(f"q{i}", 2)
        assert (await call(app.asgi, "POST", "/v1/completions", OK)).status == 200


async def test_who_can_start_at_once_is_not_counted_as_waiting() -> None:
    scheduler = make_scheduler(max_num_seqs=4)
    async with live_app(scheduler=scheduler, max_queue_size=2) as app, anyio.create_task_group() as tasks:
        burst = [exchange(app.asgi, "POST", "/v1/completions") for _ in range(9)]
        with app.runner.held():
            for request in burst:
                request.send_body(json.dumps(OK).encode())
                tasks.start_soon(request.run)
            await anyio.wait_all_tasks_blocked()
        for request in burst:
            await request.done.wait()
    assert sorted(request.status or 0 for request in burst) == [200] * 6 + [429] * 3


async def test_a_draining_server_is_503_and_not_ready_but_alive() -> None:
    async with live_app() as app, anyio.create_task_group() as tasks:
        with app.runner.held():
            running = exchange(app.asgi, "POST", "/v1/completions")
            running.send_body(json.dumps(OK).encode())
            tasks.start_soon(running.run)
            await anyio.wait_all_tasks_blocked()
            tasks.start_soon(drain, app, 20, anyio.Event())
            await anyio.wait_all_tasks_blocked()
            assert_refused(await call(app.asgi, "POST", "/v1/completions", OK), 503, code="draining")
            assert (await call(app.asgi, "GET", "/ready")).status == 503
            assert (await call(app.asgi, "GET", "/health")).status == 200
        await running.done.wait()
        assert running.json()["choices"][0]["text"] == expected_text("hi", 2)


async def test_what_outlasts_the_drain_ends_with_a_terminal_event() -> None:
    async with live_app() as app, anyio.create_task_group() as tasks:
        with app.runner.held():
            requests = [exchange(app.asgi, "POST", "/v1/completions") for _ in range(2)]
            for request, stream in zip(requests, (True, False), strict=True):
                request.send_body(json.dumps(OK | {"stream": stream}).encode())
                tasks.start_soon(request.run)
            await anyio.wait_all_tasks_blocked()
            await drain(app, 0.05, anyio.Event())
            for request in requests:
                await request.done.wait()
    assert b'"code":"draining","resumable":false' in requests[0].body
    error = requests[1].json()["error"]
    assert (requests[1].status, error["code"], error["resumable"]) == (503, "draining", False)


async def test_an_engine_that_dies_gives_every_stream_its_end_and_readiness_goes() -> None:
    class DyingRunner(FakeRunner):
        def launch(self, output: Any) -> ComputedStep:
            super().launch(output)
            return ComputedStep([RowResult(1)] * 7)  # more than the rows: the scheduler's own books would be wrong

    runner = DyingRunner()
    changes: list[Exception | None] = []
    # The blocks of a dead engine were never given back, and `live_app` says so.
    with pytest.raises(AssertionError):  # noqa: PT012
        async with live_app(runner=runner) as app, anyio.create_task_group() as tasks:
            app._on_engine_change = changes.append
            request = exchange(app.asgi, "POST", "/v1/completions")
            request.send_body(json.dumps(OK | {"stream": True}).encode())
            tasks.start_soon(request.run)
            await request.done.wait()
            assert b'"code":"engine_error"' in request.body
            assert (await call(app.asgi, "GET", "/health")).status == 503
            assert (await call(app.asgi, "GET", "/ready")).status == 503
            after = await call(app.asgi, "POST", "/v1/completions", OK)
            assert_refused(after, 503, code="engine_dead")
            assert after.headers["x-should-retry"] == "false"
            assert isinstance(changes[-1], ValueError)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "127.0.0.1:8000"}, 200),
        ({"host": "localhost"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"host": "evil.example"}, 403),
        ({"host": "127.0.0.1.evil.example"}, 403),
        ({"host": ""}, 403),
        ({"origin": "http://127.0.0.1:8000"}, 200),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "http://127.0.0.1:9999"}, 403),
        ({"origin": "null"}, 403),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}, 403),
        ({"sec-fetch-site": "same-site", "sec-fetch-mode": "cors"}, 403),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "cors", "origin": "https://chat.example"}, 200),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, 200),
        ({"sec-fetch-site": "same-origin", "sec-fetch-mode": "cors"}, 200),
        ({"sec-fetch-site": "none"}, 200),
        ({"origin": "https://chat.example"}, 200),
    ],
)
async def test_on_loopback_host_and_origin_are_checked(headers: dict[str, str], status: int) -> None:
    async with live_app(cors_origins="https://chat.example") as app:
        assert (await call(app.asgi, "POST", "/v1/completions", OK, headers=headers)).status == status


async def test_a_list_of_millions_of_wrong_items_costs_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for fields in ({"stop": [1] * 100_000}, {"prompt": [""] * 100_000}, {"stop_token_ids": ["x"] * 1000}):
        with pytest.raises(ValidationError) as wrong:
            CompletionRequest.model_validate(OK | fields)
        assert wrong.value.error_count() <= 3


async def test_a_stream_that_is_told_to_come_back_is_logged_and_counted_as_refused(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", logger="headrace.requests")
    async with live_app() as app:
        app.stop_accepting()
        sse = {"accept": "text/event-stream"}
        later = await call(app.asgi, "GET", "/v1/stream", query="prompt=x", headers=sse)
        assert (later.status, len(later.headers["x-request-id"])) == (200, 32)
        metrics = (await call(app.asgi, "GET", "/metrics")).body.decode()
        assert 'headrace_requests_rejected_total{status="503"} 1.0' in metrics
    [line] = [json.loads(record.getMessage()) for record in caplog.records if record.name == "headrace.requests"]
    assert (line["id"], line["finish_reason"]) == (later.headers["x-request-id"], "refused: 503")


async def test_a_deadline_that_passes_before_the_first_byte_is_an_end_and_no_refusal() -> None:
    async with live_app() as app:
        with app.runner.held():
            answer = exchange(app.asgi, "POST", "/v1/completions")
            answer.send_body(json.dumps(OK | {"timeout": 0.05}).encode())
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(answer.run)
                await anyio.sleep(0.2)
                app.runner.allow(100)
                await answer.done.wait()
        assert answer.status == 504
        metrics = (await call(app.asgi, "GET", "/metrics")).body.decode()
        assert "headrace_requests_rejected_total{" not in metrics
        assert 'headrace_requests_finished_total{finished_reason="deadline_exceeded"} 1.0' in metrics


async def test_refusals_before_any_route_carry_an_id_too() -> None:
    async with live_app() as app:
        for path, headers in (("/v1/models", {"host": "evil.example"}), ("/no/such/route", {})):
            refused = await call(app.asgi, "GET", path, headers=headers)
            assert refused.status in (403, 404)
            assert len(refused.headers["x-request-id"]) == 32


async def test_every_request_has_one_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="headrace.requests")
    async with live_app() as app, anyio.create_task_group() as tasks:
        await call(app.asgi, "POST", "/v1/completions", OK | {"prompt": "secret"})
        await call(app.asgi, "POST", "/v1/completions", {"prompt": "secret", "best_of": 2})
        await call(app.asgi, "POST", "/v1/completions", b"secret", headers={"content-type": "text/plain"})
        leaving = exchange(app.asgi, "POST", "/v1/completions")
        leaving.send_body(b'{"prompt": "secret', more_body=True)
        tasks.start_soon(leaving.run)
        await anyio.wait_all_tasks_blocked()
        leaving.disconnect()
        await leaving.done.wait()
    lines = [json.loads(record.getMessage()) for record in caplog.records if record.name == "headrace.requests"]
    outcomes = [line["finish_reason"] for line in lines]
    assert outcomes == ["length", "refused: 400", "refused: 415", "cancelled: body"]
    assert all(line["received"].endswith("+00:00") and "secret" not in str(line) for line in lines)
    assert lines[0]["stages_ms"]["end"] >= lines[0]["stages_ms"]["first_byte"]


@pytest.mark.parametrize(
    ("given", "is_taken"),
    [
        ("f1e2d3c4-0000-4000-8000-00000000abcd", True),
        ("Req_1.2:3~a+b/c=@d-", True),
        ("x" * 128, True),
        ("x" * 129, False),
        ("", False),
        ("two words", False),
        ('a"b', False),
        ("a\\n", False),
        ("\u00e9", False),
        ("1\u00b2", False),
    ],
)
async def test_a_request_is_called_what_its_client_calls_it_if_that_is_a_word(
    given: str, is_taken: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="headrace.requests")
    headers = {"x-request-id": given}
    async with live_app() as app:
        answers = [
            await call(app.asgi, "POST", "/v1/completions", OK, headers=headers),
            await call(app.asgi, "POST", "/v1/completions", OK | {"stream": True}, headers=headers),
            await call(app.asgi, "POST", "/v1/completions", OK | {"n": 0}, headers=headers),
            await call(app.asgi, "POST", "/tokenize", {"prompt": "a"}, headers=headers),
            await call(app.asgi, "POST", "/v1/streams", OK, headers=headers),
            await call(app.asgi, "POST", "/v1/completions", b"{", headers=headers | {"content-type": "text/plain"}),
            await call(app.asgi, "GET", "/v1/nothing", headers=headers),
            await call(app.asgi, "GET", "/v1/models", headers=headers | {"host": "evil.example"}),
        ]
        await app.until(lambda: app.client.num_unfinished == 0)
    assert [answer.status for answer in answers] == [200, 200, 400, 200, 201, 415, 404, 403]
    ids = [answer.headers["x-request-id"] for answer in answers]
    logged = [json.loads(record.getMessage())["id"] for record in caplog.records if record.name == "headrace.requests"]
    assert sorted(id.removeprefix("cmpl-") for id in logged) == sorted(ids)
    if is_taken:
        assert set(ids) == {given}
    else:
        assert {len(id) for id in ids} == {32}
        assert len(set(ids)) == len(ids)
    assert given not in answers[4].json()["id"] or not given, "a stream's id suffices to read it"


async def test_a_page_of_an_allowed_origin_may_send_its_own_headers() -> None:
    headers = {
        "origin": "https://chat.example",
        "access-control-request-method": "GET",
        "access-control-request-headers": "last-event-id, x-stainless-lang",
    }
    async with live_app(cors_origins="https://chat.example") as app:
        preflight = await call(app.asgi, "OPTIONS", "/v1/streams/x/events", headers=headers)
    assert preflight.status == 200
    assert preflight.headers["access-control-allow-origin"] == "https://chat.example"
    allowed = preflight.headers["access-control-allow-headers"].lower()
    assert "last-event-id" in allowed
    assert "x-stainless-lang" in allowed
