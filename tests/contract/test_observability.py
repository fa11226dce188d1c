"""Health, readiness, metrics, the model list and the page."""

import json
import threading

import anyio
import pytest
from prometheus_client.parser import text_string_to_metric_families

from asgi_client import call, exchange
from fake_engine import FakeRunner, byte_tokenizer, make_scheduler
from headrace.scheduler.scheduler import Scheduler
from headrace.server.app import App
from headrace.server.settings import load_settings
from live_app import LiveApp, live_app

pytestmark = pytest.mark.anyio


def samples(app: LiveApp) -> dict[tuple[str, tuple[str, ...]], float]:
    """Every sample by name and label values, `model_name` left out."""
    families = text_string_to_metric_families(app.client.metrics.expose().decode())
    return {
        (
            sample.name,
            tuple(value for name, value in sorted(sample.labels.items()) if name != "model_name"),
        ): sample.value
        for family in families
        for sample in family.samples
    }


STANDARD = ("standard",)  # the tier where there are no keys


async def test_gauges_rise_and_fall_with_the_requests() -> None:
    async with live_app(scheduler=make_scheduler(max_num_seqs=1)) as app, anyio.create_task_group() as tasks:
        requests = [exchange(app.asgi, "POST", "/v1/completions") for _ in range(3)]
        with app.runner.held():
            for request in requests:
                request.send_body(json.dumps({"prompt": "x" * 20, "max_tokens": 40, "temperature": 0}).encode())
                tasks.start_soon(request.run)
            await anyio.wait_all_tasks_blocked()
            app.runner.allow(2)
            await app.until(lambda: app.client.load.num_steps >= 2)
            seen = samples(app)
            assert seen["headrace_num_requests_running", ()] == 1
            assert seen["headrace_num_requests_waiting", ()] == 2
            assert seen["headrace_tier_requests_waiting", STANDARD] == 2
            assert seen["headrace_queued_prompt_tokens", ()] == 40
            assert 0 < seen["headrace_kv_cache_usage_ratio", ()] < 1
        for request in requests:
            await request.done.wait()
        seen = samples(app)
        assert seen["headrace_num_requests_running", ()] == seen["headrace_num_requests_waiting", ()] == 0
        assert seen["headrace_kv_cache_usage_ratio", ()] == 0
        assert seen["headrace_tier_requests_waiting", STANDARD] == seen["headrace_queued_prompt_tokens", ()] == 0
        assert seen["headrace_generation_tokens_total", ()] == 120
        assert seen["headrace_prompt_tokens_total", ()] == 60
        assert seen["headrace_requests_finished_total", ("length",)] == 3
        for name, count in (("time_to_first_token", 3), ("inter_token_latency", 117), ("request_queue_time", 3)):
            assert seen[f"headrace_{name}_seconds_count", STANDARD] == count
            for tier in ("premium", "batch"):
                assert seen[f"headrace_{name}_seconds_count", (tier,)] == 0
        assert seen["headrace_e2e_request_latency_seconds_count", ()] == 3


async def test_vllms_names_hold_the_same_numbers() -> None:
    async with live_app() as app:
        await call(app.asgi, "POST", "/v1/completions", {"prompt": "x", "temperature": 0})
        seen = samples(app)
    pairs = {
        "num_requests_running": "num_requests_running",
        "num_requests_waiting": "num_requests_waiting",
        "kv_cache_usage_perc": "kv_cache_usage_ratio",
        "generation_tokens_total": "generation_tokens_total",
        "prompt_tokens_total": "prompt_tokens_total",
        "num_preemptions_total": "num_preemptions_total",
        "e2e_request_latency_seconds_sum": "e2e_request_latency_seconds_sum",
    }
    for vllm, own in pairs.items():
        assert seen[f"vllm:{vllm}", ()] == seen[f"headrace_{own}", ()]
    for name in ("time_to_first_token_seconds_sum", "inter_token_latency_seconds_count"):
        assert seen[f"vllm:{name}", ()] == seen[f"headrace_{name}", STANDARD] > 0
    assert seen["vllm:request_success_total", ("length",)] == 1


async def test_a_refusal_is_counted_by_status() -> None:
    async with live_app() as app:
        await call(app.asgi, "POST", "/v1/completions", b"{")
        assert samples(app)["headrace_requests_rejected_total", ("400",)] == 1


def app_that_loads_when_told() -> tuple[App, threading.Event]:
    may_load = threading.Event()

    def load() -> tuple[Scheduler, FakeRunner]:
        may_load.wait(10)
        return make_scheduler(), FakeRunner()

    return App(load_settings([], {}), "fake", load, byte_tokenizer), may_load


async def test_before_the_model_is_loaded_the_server_lives_and_is_not_ready() -> None:
    app, may_load = app_that_loads_when_told()
    async with app.asgi.router.lifespan_context(app.asgi):
        try:
            assert (await call(app.asgi, "GET", "/health")).status == 200
            assert (await call(app.asgi, "GET", "/ready")).status == 503
            refused = await call(app.asgi, "POST", "/v1/completions", {"prompt": "x"})
            assert refused.status == 503
            assert refused.json()["error"]["code"] == "loading"
            assert refused.headers["retry-after"] == "1"
            assert not app.has_been_ready
        finally:
            may_load.set()
        await app.settled.wait()
        assert (await call(app.asgi, "GET", "/ready")).status == 200
        assert app.has_been_ready


async def test_a_server_that_ends_while_its_model_loads_does_not_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headrace.server.app._STOP_TIMEOUT_S", 3600)
    app, may_load = app_that_loads_when_told()
    async with app.asgi.router.lifespan_context(app.asgi):
        pass
    assert app.client.has_thread
    may_load.set()
    await app.client.stopped.wait()
    assert app.client.ready is None or not app.is_ready


async def test_the_model_list_names_the_one_model() -> None:
    async with live_app() as app:
        listed = (await call(app.asgi, "GET", "/v1/models")).json()
    assert listed["object"] == "list"
    [model] = listed["data"]
    assert (model["id"], model["object"], model["max_model_len"]) == ("fake", "model", 512)


async def test_the_page_and_its_parts_are_served_under_a_strict_policy() -> None:
    async with live_app() as app:
        page = await call(app.asgi, "GET", "/")
        assert page.status == 200
        assert "default-src 'self'" in page.headers["content-security-policy"]
        for part in ("chat.js", "chat.css", "favicon.svg"):
            assert f"/static/{part}".encode() in page.body
            assert (await call(app.asgi, "GET", f"/static/{part}")).status == 200
        assert (await call(app.asgi, "GET", "/static/../app.py")).status == 404
