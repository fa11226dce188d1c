"""What routers in front of a server read, ask and say: every name in docs/routers.md, and what comes of it."""

import json
import re
from pathlib import Path
from typing import Any

import anyio
import pytest
from prometheus_client.parser import text_string_to_metric_families

from asgi_client import Exchange, call, exchange
from fake_engine import FakeRunner, expected_text, make_scheduler
from headrace.scheduler.fair_queue import tenant_of
from headrace.scheduler.messages import Tier
from headrace.server.api_keys import append_key, create_key
from headrace.server.drain import drain, take_leave
from killed_app import killed_app
from live_app import LiveApp, live_app

pytestmark = pytest.mark.anyio

DOCUMENT = (Path(__file__).parents[2] / "docs" / "routers.md").read_text()
# Of the tables' rows: (what a router reads, each of its names).
ROWS = re.findall(r"^\| (metric|route|header) \| (.+?) \|", DOCUMENT, re.MULTILINE)
NAMES = {kind: [name for k, cell in ROWS if k == kind for name in re.findall(r"`(.+?)`", cell)] for kind, _ in ROWS}
ADAPTERS = {"poet": "", "cook": ""}
BODY = {"prompt": "river", "max_tokens": 6, "temperature": 0}
TRUSTING: dict[str, Any] = {"trusted_proxies": "127.0.0.0/8"}
STRANGERS: dict[str, Any] = {"trusted_proxies": "10.0.0.0/8"}
ASKED = {"endpoint-load-metrics-format": "JSON"}


def test_the_document_lists_names() -> None:
    assert len(NAMES["metric"]) > 10
    assert len(NAMES["route"]) > 5
    assert len(NAMES["header"]) > 5


async def test_every_metric_that_a_router_reads_is_exposed_with_the_labels_that_it_reads() -> None:
    async with live_app(adapters=ADAPTERS) as app:
        await call(app.asgi, "POST", "/v1/completions", BODY)
        text = (await call(app.asgi, "GET", "/metrics")).body.decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    exposed = {sample.name: sample for sample in samples}
    assert exposed["vllm:gpu_prefix_cache_queries_total"].value == len(BODY["prompt"])  # type: ignore[arg-type]
    for metric in NAMES["metric"]:
        name, _, labels = metric.rstrip("}").partition("{")
        assert name in exposed, metric
        assert exposed[name].labels["model_name"] == "fake"
        assert set(filter(None, labels.split(","))) <= exposed[name].labels.keys(), metric


async def test_the_short_metrics_are_some_of_all_with_the_same_numbers() -> None:
    async with live_app(adapters=ADAPTERS) as app:
        few, all_of_them = [(await call(app.asgi, "GET", path)).body.decode() for path in ("/metrics/load", "/metrics")]
    told = {line for line in few.splitlines() if "lora_requests_info{" not in line}  # whose value is the time
    assert told < set(all_of_them.splitlines())
    read = {sample.name for family in text_string_to_metric_families(few) for sample in family.samples}
    endpoint_pickers = [cell for kind, cell in ROWS if kind == "metric"][:5]
    assert {re.split("[`{]", cell)[1] for cell in endpoint_pickers} <= read
    assert len(few) < len(all_of_them) / 10


async def test_every_route_that_a_router_asks_is_served() -> None:
    async with live_app() as app:
        for route in NAMES["route"]:
            method, path = route.split()
            answer = await call(app.asgi, method, path, BODY if method == "POST" else None)
            assert answer.status != 404, route


async def test_the_engines_description_is_of_its_cache_and_adapters() -> None:
    async with live_app(adapters=ADAPTERS, scheduler=make_scheduler(num_blocks=48)) as app:
        text = (await call(app.asgi, "GET", "/metrics")).body.decode()
    assert 'vllm:cache_config_info{block_size="16",model_name="fake",num_gpu_blocks="48"} 1.0' in text
    pattern = (
        r'^vllm:lora_requests_info{max_lora="2",model_name="fake",running_lora_adapters="poet,cook",'
        r'waiting_lora_adapters=""} 1\.\d+e\+09$'
    )
    assert re.search(pattern, text, re.MULTILINE)
    async with live_app() as app:
        assert "lora_requests_info" not in (await call(app.asgi, "GET", "/metrics")).body.decode()


@pytest.mark.parametrize("fields", [{}, {"stream": True}], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("path", "body"),
    [("/v1/completions", BODY), ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]})],
)
async def test_the_load_is_told_beside_an_answer_where_it_is_asked_for(
    path: str, body: dict[str, Any], fields: dict[str, Any]
) -> None:
    async with live_app(scheduler=make_scheduler(max_num_seqs=1)) as app, anyio.create_task_group() as tasks:
        waiting = [exchange(app.asgi, "POST", "/v1/completions") for _ in range(3)]
        with app.runner.held():
            for request in waiting:
                request.send_body(json.dumps(BODY | {"prompt": "x" * 64}).encode())
                tasks.start_soon(request.run)
            await anyio.wait_all_tasks_blocked()
            app.runner.allow(2)
            await app.until(lambda: app.client.load.num_steps >= 2)
            streamed = exchange(app.asgi, "POST", path, headers=ASKED)
            streamed.send_body(json.dumps(body | {"stream": True, "max_tokens": 4}).encode())
            tasks.start_soon(streamed.run)
            await streamed.wait_until(lambda: streamed.status is not None)
            form, _, report = streamed.headers["endpoint-load-metrics"].partition(" ")
            assert form == "JSON"
            load = json.loads(report)["named_metrics"]
            assert load["num_requests_waiting"] == 3  # itself too
            assert 0 < load["kv_cache_usage_perc"] < 1
        for request in (*waiting, streamed):
            await request.done.wait()
        answer = await call(app.asgi, "POST", path, body | fields | {"max_tokens": 4}, headers=ASKED)
        assert answer.status == 200
        num_waiting = 1.0 if fields else 0.0  # a stream has its headers while it waits itself
        assert f'"num_requests_waiting":{num_waiting}' in answer.headers["endpoint-load-metrics"]
        untold = await call(app.asgi, "POST", path, body | fields | {"max_tokens": 4})
        assert "endpoint-load-metrics" not in untold.headers


async def test_a_refusal_tells_the_load_too_and_a_replay_only_its_own_reader() -> None:
    async with live_app() as app:
        refused = await call(app.asgi, "POST", "/v1/completions", BODY | {"temperature": -1}, headers=ASKED)
        assert refused.status == 400
        assert "endpoint-load-metrics" in refused.headers
        key = {"idempotency-key": "k"}
        first = await call(app.asgi, "POST", "/v1/completions", BODY, headers=ASKED | key)
        second = await call(app.asgi, "POST", "/v1/completions", BODY, headers=key)
        third = await call(app.asgi, "POST", "/v1/completions", BODY, headers=ASKED | key)
        told = ["endpoint-load-metrics" in answer.headers for answer in (first, second, third)]
        assert told == [True, False, True]
        assert first.body == second.body == third.body


@pytest.mark.parametrize(
    ("settings", "is_told"), [({}, False), ({"open_metrics": True}, True), (TRUSTING, True)], ids=str
)
async def test_the_load_is_told_to_those_who_may_read_the_metrics(
    tmp_path: Path, settings: dict[str, Any], is_told: bool
) -> None:
    secret, key = create_key("alice", Tier.STANDARD)
    append_key(tmp_path / "keys.toml", key)
    path = "/v1/streams/none/events"  # which needs no key
    async with live_app(api_keys_file=tmp_path / "keys.toml", **settings) as app:
        for headers, is_told_here in ((ASKED, is_told), (ASKED | {"authorization": f"Bearer {secret}"}, True)):
            answer = await call(app.asgi, "GET", path, headers=headers)
            assert (answer.status, "endpoint-load-metrics" in answer.headers) == (404, is_told_here)


async def held_requests(app: LiveApp, tasks: Any, *headers: dict[str, str]) -> list[Exchange]:
    """Requests with these headers that the engine has and cannot go on with."""
    requests = [exchange(app.asgi, "POST", "/v1/completions", headers=each) for each in headers]
    for request in requests:
        request.send_body(json.dumps(BODY).encode())
        tasks.start_soon(request.run)
    await app.until(lambda: app.client.num_unfinished == len(requests))
    return requests


async def test_a_trusted_gateway_says_tier_flow_and_target() -> None:
    said = {
        "x-llm-d-inference-objective": "best-effort",
        "x-llm-d-inference-fairness-id": "tenant-a",
        "x-llm-d-slo-ttft-ms": "1500",
    }
    for settings, is_believed in ((TRUSTING, True), (STRANGERS, False), ({}, False)):
        async with live_app(objectives="best-effort=batch", **settings) as app, anyio.create_task_group() as tasks:
            with app.runner.held():
                [request, other] = await held_requests(app, tasks, said, {})
                [generation, usual] = app.client.unfinished
                assert generation.tier is (Tier.BATCH if is_believed else Tier.STANDARD)
                assert usual.tier is Tier.STANDARD
                flows = app.client.admission.waiting_tenants()
                assert {tenant_of(flow) for flow in flows} == {""}
                assert len(flows) == (2 if is_believed else 1)
                await app.until(lambda app=app: app.scheduler.has_work)  # type: ignore[misc]
                own = app.scheduler._sequences[generation.request_id].request
                target_s = own.target_s - own.arrival_s
                assert 1.2 < target_s < 100 if is_believed else target_s > 1e5
            for each in (request, other):
                await each.done.wait()
                assert each.json()["choices"][0]["text"] == expected_text("river", 6)


async def test_what_a_gateway_has_said_of_a_stream_holds_where_it_is_taken_up_again(tmp_path: Path) -> None:
    said = {
        "x-llm-d-inference-objective": "batch",
        "x-llm-d-inference-fairness-id": "tenant-a",
        "x-llm-d-slo-ttft-ms": "1500",
    }
    (tmp_path / "journal").mkdir()
    path, runner = tmp_path / "journal" / "streams.db", FakeRunner()
    async with killed_app(path, tmp_path / "kill", 3, **TRUSTING) as (app, left):
        created = await call(app.asgi, "POST", "/v1/streams", BODY, headers=said)
        generation = app.registry.get(created.json()["id"]).generation
        await app.until(lambda: generation.num_output_tokens == 3)
    with runner.held():
        async with live_app(runner=runner, journal_file=left) as app:
            [generation] = app.client.unfinished
            assert generation.tier is Tier.BATCH
            await app.until(lambda: app.scheduler.has_work)
            own = app.scheduler._sequences[generation.request_id].request
            assert (own.tier, tenant_of(own.tenant), own.tenant != "") == (Tier.BATCH, "", True)
            assert own.target_s - own.arrival_s < 100
            runner.allow(10)
            await app.until(lambda: generation.is_over)


@pytest.mark.parametrize("name", NAMES["header"])
async def test_a_header_that_no_gateway_writes_is_refused_by_its_name_and_ignored_from_strangers(name: str) -> None:
    if name.startswith("endpoint-"):
        return  # what is asked for in no known form is not told
    for settings, status in ((TRUSTING, 400), (STRANGERS, 200), ({}, 200)):
        async with live_app(**settings) as app:
            answer = await call(app.asgi, "POST", "/v1/completions", BODY, headers={name: "-1 x"})
            assert answer.status == status
            if status == 400:
                assert answer.json()["error"]["param"] == name


async def test_of_a_header_that_is_there_twice_none_is_believed() -> None:
    async with live_app(**TRUSTING) as app:
        request = exchange(app.asgi, "POST", "/v1/completions", headers={"x-gateway-inference-objective": "premium"})
        request.scope["headers"].append((b"x-gateway-inference-objective", b"batch"))  # the gateway's own
        await request.run()
    assert (request.status, request.json()["error"]["param"]) == (400, "x-gateway-inference-objective")


async def test_what_a_key_allows_holds_for_all_its_flows_together(tmp_path: Path) -> None:
    secret, key = create_key("alice", Tier.STANDARD)
    append_key(tmp_path / "keys.toml", key.model_copy(update={"max_concurrent": 2}))
    settings = TRUSTING | {"api_keys_file": tmp_path / "keys.toml"}
    named = {"authorization": f"Bearer {secret}", "x-gateway-inference-objective": "premium"}
    async with live_app(**settings) as app, anyio.create_task_group() as tasks:
        with app.runner.held():
            flows = [named | {"x-gateway-inference-fairness-id": flow} for flow in ("a", "b", "c")]
            requests = await held_requests(app, tasks, *flows[:2])
            assert [generation.tier for generation in app.client.unfinished] == [Tier.STANDARD] * 2
            assert [generation.tenant for generation in app.client.unfinished] == ["alice"] * 2
            refused = await call(app.asgi, "POST", "/v1/completions", BODY, headers=flows[2])
            assert (refused.status, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
            assert int(refused.headers["retry-after"]) >= 1
        for request in requests:
            await request.done.wait()
            assert request.status == 200
        for flow in flows:  # what one flow began any other may read: they are one tenant's
            created = await call(app.asgi, "POST", "/v1/streams", BODY, headers=flow)
            snapshot = f"/v1/streams/{created.json()['id']}"
            assert (await call(app.asgi, "GET", snapshot, headers=flows[0])).status == 200


async def test_who_leaves_is_ready_no_more_and_serves_until_it_drains() -> None:
    async with live_app() as app:
        hurried = anyio.Event()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(take_leave, app, 600, hurried)
            await anyio.wait_all_tasks_blocked()
            for path in ("/ready", "/health_generate"):
                ready = await call(app.asgi, "GET", path)
                assert (ready.status, ready.json()) == (503, {"status": "draining"})
            assert (await call(app.asgi, "GET", "/health")).status == 200
            assert (await call(app.asgi, "POST", "/v1/completions", BODY)).status == 200
            hurried.set()
        await drain(app, 20, anyio.Event())
        refused = await call(app.asgi, "POST", "/v1/completions", BODY)
        assert (refused.status, refused.json()["error"]["code"]) == (503, "draining")
        assert int(refused.headers["retry-after"]) >= 1
