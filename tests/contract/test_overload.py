"""Under load: who is refused before the first byte, what a key allows, and what a request's time being over looks like.

`live_app` asserts at its end that nothing is left in any book.
"""

import json
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import httpx2
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from asgi_client import Exchange, call, chunks, exchange, with_state
from fake_engine import expected_text, make_scheduler
from headrace.kernels.step_times import StepTimes
from headrace.scheduler.messages import Tier
from headrace.scheduler.scheduler import Scheduler
from headrace.scheduler.step_time import StepShape
from headrace.server.admission import Demand
from headrace.server.api_keys import create_key
from headrace.server.errors import RateLimitError
from headrace.server.generation import Generation
from headrace.server.metrics import SHED_REASONS
from live_app import LiveApp, live_app

pytestmark = pytest.mark.anyio

SSE = {"accept": "text/event-stream"}
BODY = {"prompt": "river", "max_tokens": 6, "temperature": 0}
QUERY = "prompt=river&max_tokens=6&temperature=0"
TEXT = expected_text("river", 6)
# Targets that nothing meets, and such as everything does.
NEVER, ALWAYS = "1e-9,1e-9,1e-9", "1e6,1e6,1e6"
ROUTES = ["chat", "chat-stream", "completion", "completion-stream"]


def slow_scheduler(**options: Any) -> Scheduler:
    """A scheduler that has seen a prompt token take 50 ms, and a step 100 ms."""
    scheduler = make_scheduler(**options)
    for i in range(200):
        num_tokens, num_decoding = 8 * (i % 5), i % 3
        shape = StepShape(num_tokens, num_decoding, 10 * num_decoding)
        scheduler.observe(shape, 0.1 + 0.05 * num_tokens + 0.01 * num_decoding)
    return scheduler


def route_and_body(route: str, **fields: Any) -> tuple[str, dict[str, Any]]:
    path = "/v1/chat/completions" if route.startswith("chat") else "/v1/completions"
    prompt = {"messages": [{"role": "user", "content": "hi"}]} if "chat" in path else {"prompt": "hi"}
    return path, prompt | {"stream": route.endswith("stream"), "temperature": 0, "max_tokens": 6} | fields


class Server:
    """An App with keys, or without; `name` is whose key a request is made with."""

    def __init__(self, app: LiveApp, tasks: anyio.abc.TaskGroup, file: Path, secrets: dict[str, str]) -> None:
        self.app = app
        self.file = file
        self._tasks = tasks
        self._secrets = secrets

    def start(self, name: str = "", path: str = "/v1/completions", body: dict[str, Any] | None = None) -> Exchange:
        """Send a whole request and begin to answer it."""
        request = exchange(self.app.asgi, "POST", path, headers=self._headers(name))
        request.send_body(json.dumps(BODY if body is None else body).encode())
        self._tasks.start_soon(request.run)
        return request

    async def call(self, name: str = "", path: str = "/v1/completions", **fields: Any) -> Exchange:
        return await call(self.app.asgi, "POST", path, BODY | fields, headers=self._headers(name))

    async def run(self, name: str = "", **fields: Any) -> Exchange:
        """Start a request and have its first step computed; the runner must be held."""
        request = self.start(name, body=BODY | {"prompt": "running", "max_tokens": 50} | fields)
        num_running = self.app.client.load.num_running
        await self.app.until(lambda: self.app.client.num_unfinished > num_running)
        self.app.runner.allow(1)
        await self.app.until(lambda: self.app.client.load.num_running > num_running)
        return request

    def write_keys(self, **tenants: str) -> None:
        """The key file: each tenant's table, with these lines."""
        tables = []
        for name, lines in tenants.items():
            secret, key = create_key(name)
            self._secrets[name] = secret
            tables.append(key.as_toml() + lines + "\n")
        self.file.write_text("".join(tables))

    def change_limits(self, **tenants: str) -> None:
        """Give tenants other lines, and the same keys, and have the file read again."""
        tables = {}
        for table in self.file.read_text().split("[[keys]]\n")[1:]:
            lines = table.splitlines()
            tables[json.loads(lines[0].removeprefix("name = "))] = "\n".join(lines[:2])
        self.file.write_text("".join(f"[[keys]]\n{table}\n{tenants.get(name, '')}\n" for name, table in tables.items()))
        self.app.reload_keys()

    def metrics(self) -> dict[tuple[str, tuple[str, ...]], float]:
        """Every sample by name and label values, in the order of their labels' names."""
        families = text_string_to_metric_families(self.app.client.metrics.expose().decode())
        samples = [sample for family in families for sample in family.samples]
        return {(s.name, tuple(value for _, value in sorted(s.labels.items()))): s.value for s in samples}

    def num_shed(self, reason: str) -> dict[str, int]:
        """How many requests of each tier were shed for it, of tiers that had some."""
        seen = self.metrics()
        found = {tier.value: int(seen["headrace_requests_shed_total", (reason, tier.value)]) for tier in Tier}
        return {tier: num for tier, num in found.items() if num}

    def _headers(self, name: str) -> dict[str, str]:
        return {"authorization": f"Bearer {self._secrets[name]}"} if name else {}


@asynccontextmanager
async def serving(tmp_path: Path, tenants: dict[str, str] | None = None, **options: Any) -> AsyncIterator[Server]:
    """`tenants` are the lines of each one's table in the key file; without any there are no keys."""
    file = tmp_path / "keys.toml"
    secrets: dict[str, str] = {}
    if tenants is not None:
        writer = Server.__new__(Server)
        writer.file, writer._secrets = file, secrets
        writer.write_keys(**tenants)
        options["api_keys_file"] = file
    async with live_app(**options) as app:
        async with anyio.create_task_group() as tasks:
            yield Server(app, tasks, file, secrets)
        assert not app.limits._running, "an answer's place was not given back"


def hold_tokenizing(app: LiveApp, may_finish: threading.Event) -> None:
    """Let texts be tokenized once the test says so."""
    tokenizer = app.generator.tokenizer
    assert tokenizer is not None
    encode = tokenizer.encode

    def slow_encode(text: str, *, add_special_tokens: bool) -> list[int]:
        may_finish.wait(10)
        return encode(text, add_special_tokens=add_special_tokens)

    tokenizer.encode = slow_encode  # type: ignore[method-assign]


def assert_overloaded(answer: Exchange, tier: str = "standard") -> dict[str, Any]:
    """A refusal for what is predicted, in both spellings and with the figures."""
    assert answer.status == 429, answer.body
    assert answer.headers["content-type"] == "application/json"
    error: dict[str, Any] = answer.json()["error"]
    fields = {"message", "type", "param", "code", "tier", "predicted_ttft_s", "target_ttft_s"}
    assert set(error) == fields
    assert (error["type"], error["code"], error["tier"]) == ("overloaded_error", "predicted_too_late", tier)
    assert error["predicted_ttft_s"] > 0.5 * error["target_ttft_s"] >= 0
    assert 1 <= int(answer.headers["retry-after"]) <= 120
    assert 750 <= int(answer.headers["retry-after-ms"]) <= 120_000
    return error


def assert_rate_limited(answer: Exchange, limit: str) -> float:
    """A refusal for what a key allows; returns after how many seconds to come back."""
    assert answer.status == 429, answer.body
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert limit in error["message"]
    return int(answer.headers["retry-after-ms"]) / 1000


def is_ok(answer: Exchange) -> bool:
    return answer.status == 200 and answer.json()["choices"][0]["text"] == TEXT


# Prediction


@pytest.mark.parametrize("route", ROUTES)
async def test_a_first_token_that_would_come_too_late_is_429_before_the_first_byte(tmp_path: Path, route: str) -> None:
    path, body = route_and_body(route)
    async with serving(tmp_path, scheduler=slow_scheduler(), ttft_targets_s=NEVER) as server:
        with server.app.runner.held():
            running = await server.run()
            refused = await call(server.app.asgi, "POST", path, body)
            error = assert_overloaded(refused)
            # A step of 0.1 s and the prompt's tokens at 50 ms each, at least.
            assert error["predicted_ttft_s"] > 0.2
            assert server.app.client.num_waiting == server.app.client.admission.num_queued(Tier.STANDARD) == 0
            assert server.app.client.num_unfinished == 1
        await running.done.wait()
        assert running.json()["choices"][0]["text"] == expected_text("running", 50)
        assert server.num_shed("predicted_too_late") == {"standard": 1}
        assert server.metrics()["headrace_requests_rejected_total", ("429",)] == 1
        assert server.metrics()["headrace_prompt_tokens_total", ()] == len("running"), "of accepted ones"
        assert (await call(server.app.asgi, "POST", path, body)).status == 200


async def test_a_target_that_can_be_met_lets_the_same_request_in(tmp_path: Path) -> None:
    async with serving(tmp_path, scheduler=slow_scheduler(), ttft_targets_s=ALWAYS) as server:
        with server.app.runner.held():
            await server.run()
            queued = server.start()
            await server.app.until(lambda: server.app.client.num_unfinished == 2)
        await queued.done.wait()
        assert is_ok(queued)


async def test_where_no_targets_are_set_they_are_those_of_the_device(tmp_path: Path) -> None:
    async with serving(tmp_path, ttft_targets_s="auto") as server:
        assert list(server.app.client.admission.targets_s.values()) == [2.0, 8.0, 60.0]


async def test_a_native_stream_that_would_begin_too_late_is_429_and_an_eventsource_is_told_to_come_back(
    tmp_path: Path,
) -> None:
    async with serving(tmp_path, scheduler=slow_scheduler(), ttft_targets_s=NEVER) as server:
        with server.app.runner.held():
            await server.run()
            assert_overloaded(await server.call(path="/v1/streams"))
            later = await call(server.app.asgi, "GET", "/v1/stream", query=QUERY, headers=SSE)
            assert later.status == 200
            assert later.headers["content-type"].startswith("text/event-stream")
            [event] = later.events()
            assert 750 <= int(event["retry"]) <= 120_000
            assert later.is_complete
            assert server.app.client.num_unfinished == 1
        assert server.num_shed("predicted_too_late") == {"standard": 2}


async def test_an_idle_server_never_answers_429(tmp_path: Path) -> None:
    async with serving(tmp_path, scheduler=slow_scheduler(), ttft_targets_s=NEVER) as server:
        client = server.app.client
        for route in ROUTES * 2:
            path, body = route_and_body(route)
            predicted = client.admission.predict(client.load, Demand(Tier.STANDARD, "", 1.0, 2))
            assert predicted.ttft_s > predicted.target_s, "all that lets it in is that nobody is there"
            assert (await call(server.app.asgi, "POST", path, body)).status == 200
        several = await server.call(n=20, prompt=["a" * 100, "b" * 100])
        assert several.status == 200
        assert server.num_shed("predicted_too_late") == {}


async def test_before_any_step_has_been_seen_nobody_is_refused(tmp_path: Path) -> None:
    async with serving(tmp_path, ttft_targets_s=NEVER) as server:
        with server.app.runner.held():
            requests = [server.start() for _ in range(20)]
            await server.app.until(lambda: server.app.client.num_unfinished == 20)
        for request in requests:
            await request.done.wait()
            assert is_ok(request)


@pytest.mark.parametrize("limit", ["requests", "tokens", "bytes"])
async def test_a_full_queue_is_429_whatever_it_is_full_of(tmp_path: Path, limit: str) -> None:
    settings: dict[str, Any] = {
        "requests": {"max_queue_size": 2},
        "tokens": {"max_queue_tokens": 9},  # two prompts are more
        "bytes": {"max_queue_bytes": 60},  # two bodies are more
    }[limit]
    may_finish = threading.Event()
    async with serving(tmp_path, scheduler=slow_scheduler(max_num_seqs=1), **settings) as server:
        with server.app.runner.held():
            if limit == "bytes":
                hold_tokenizing(server.app, may_finish)
                waiting = [server.start()]
                await anyio.wait_all_tasks_blocked()
            else:
                await server.run()
                waiting = [server.start() for _ in range(2)]
                await server.app.until(lambda: server.app.client.num_unfinished == 3)
            refused = await server.call()
            may_finish.set()
        assert refused.status == 429
        error = refused.json()["error"]
        assert (error["code"], error["tier"], error["type"]) == ("queue_full", "standard", "overloaded_error")
        assert limit in error["message"]
        assert 750 <= int(refused.headers["retry-after-ms"]) <= 120_000
        assert server.num_shed("queue_full") == {"standard": 1}
        for request in waiting:
            await request.done.wait()
            assert is_ok(request)
        assert is_ok(await server.call())
        assert server.app.client._num_reserved.total() == server.app.client._num_reserved_bytes == 0


async def test_who_fills_the_queue_shuts_himself_out_and_nobody_else(tmp_path: Path) -> None:
    keys = {"flood": "", "other": ""}
    async with serving(tmp_path, keys, scheduler=slow_scheduler(max_num_seqs=1), max_queue_size=4) as server:
        with server.app.runner.held():
            await server.run("flood")
            waiting = [server.start("flood") for _ in range(4)]
            await server.app.until(lambda: server.app.client.num_unfinished == 5)
            assert (await server.call("flood")).status == 429
            waiting += [server.start("other") for _ in range(2)]
            await server.app.until(lambda: server.app.client.num_unfinished == 7)
            assert (await server.call("other")).status == 429, "half of the queue is its share"
        for request in waiting:
            await request.done.wait()
            assert is_ok(request)


# Tiers


TIERS = {tier.value: f'tier = "{tier.value}"' for tier in Tier}


@pytest.mark.parametrize("lucky", Tier)
async def test_each_tier_has_a_target_of_its_own_and_the_key_tells_the_tier(tmp_path: Path, lucky: Tier) -> None:
    targets_s = ",".join("1e6" if tier is lucky else "1e-9" for tier in Tier)
    async with serving(tmp_path, TIERS, scheduler=slow_scheduler(), ttft_targets_s=targets_s) as server:
        with server.app.runner.held():
            await server.run("standard")
            queued = server.start(lucky.value)
            await server.app.until(lambda: server.app.client.num_unfinished == 2)
            assert server.metrics()["headrace_tier_requests_waiting", (lucky.value,)] == 1
            others = [tier.value for tier in Tier if tier is not lucky]
            for other in others:
                assert_overloaded(await server.call(other), other)
        await queued.done.wait()
        assert is_ok(queued)
        assert server.num_shed("predicted_too_late") == dict.fromkeys(others, 1)


@pytest.mark.parametrize(
    "fields",
    [
        {"service_tier": "auto"},
        {"service_tier": "default"},
        {"priority": 0},
        {"tier": "batch", "weight": 1000, "tenant": "batch"},
        {"user": "batch", "metadata": {"tier": "batch"}},
    ],
    ids=str,
)
async def test_nothing_in_a_request_changes_its_tier(tmp_path: Path, fields: dict[str, Any]) -> None:
    async with serving(tmp_path, TIERS, scheduler=slow_scheduler(), ttft_targets_s="1e-9,1e6,1e6") as server:
        with server.app.runner.held():
            await server.run("batch")
            assert_overloaded(await server.call("premium", **fields), "premium")
            queued = server.start("standard", body=BODY | fields)
            await server.app.until(lambda: server.app.client.num_unfinished == 2)
            [generation] = [g for g in server.app.client._generations.values() if g.phase == "queued"]
            assert generation.tier is Tier.STANDARD
        await queued.done.wait()


@pytest.mark.parametrize("fields", [{"service_tier": "priority"}, {"service_tier": "flex"}, {"priority": -5}], ids=str)
async def test_asking_for_another_tier_is_refused_by_name(tmp_path: Path, fields: dict[str, Any]) -> None:
    async with serving(tmp_path, TIERS) as server:
        refused = await server.call("premium", **fields)
        assert refused.status == 400
        assert refused.json()["error"]["code"] == "unsupported_parameter"
        assert refused.json()["error"]["param"] in fields


async def test_metrics_tell_tiers_apart_and_nothing_finer(tmp_path: Path) -> None:
    tenants = TIERS | {f"tenant-{i}": "" for i in range(9)}
    async with serving(tmp_path, tenants) as server:
        nums = {"premium": 1, "standard": 2, "batch": 3}
        for name, num in nums.items():
            for _ in range(num):
                assert is_ok(await server.call(name, user=f"user-{num}"))
        for i in range(9):
            assert is_ok(await server.call(f"tenant-{i}"))
        nums["standard"] += 9
        seen = server.metrics()
        for tier, num in nums.items():
            for metric in ("time_to_first_token", "request_queue_time"):
                assert seen[f"headrace_{metric}_seconds_count", (tier,)] == num
            assert seen["headrace_inter_token_latency_seconds_count", (tier,)] == 5 * num
        # Under vLLM's names, which know no tiers, they are added up.
        assert seen["vllm:time_to_first_token_seconds_count", ("fake",)] == 15
        exposed = server.app.client.metrics.expose().decode()
        assert "tenant-" not in exposed
        labels: dict[str, set[str]] = {}
        for family in text_string_to_metric_families(exposed):
            for sample in family.samples:
                for name, value in sample.labels.items():
                    labels.setdefault(name, set()).add(value)
        assert labels["tier"] == set(Tier)
        assert labels["reason"] == set(SHED_REASONS)
        cache = {"block_size", "num_gpu_blocks"}
        assert labels.keys() <= {"tier", "reason", "phase", "finished_reason", "status", "le", "model_name"} | cache


# What a key allows


async def test_requests_per_minute_are_enforced_for_each_tenant_by_itself(tmp_path: Path) -> None:
    async with serving(tmp_path, {"alice": "requests_per_minute = 2", "bob": ""}) as server:
        assert [is_ok(await server.call("alice")) for _ in range(2)] == [True, True]
        for _ in range(3):
            wait_s = assert_rate_limited(await server.call("alice", stream=True), "2 requests per minute")
            assert 25 < wait_s <= 30
        later = await call(server.app.asgi, "GET", "/v1/stream", query=QUERY, headers=SSE | server._headers("alice"))
        assert (later.status, [list(event) for event in later.events()]) == (200, [["retry"]])
        for _ in range(5):
            assert is_ok(await server.call("bob"))
        assert server.num_shed("rate_limit") == {"standard": 4}


async def test_tokens_per_minute_count_prompts_and_answers(tmp_path: Path) -> None:
    num_tokens = len("river") + 6
    limit = f"tokens_per_minute = {2 * num_tokens}"
    async with serving(tmp_path, {"alice": limit, "bob": limit}) as server:
        assert [is_ok(await server.call("alice")) for _ in range(2)] == [True, True]
        wait_s = assert_rate_limited(await server.call("alice"), "22 tokens per minute")
        assert 0 < wait_s <= 60 / (2 * num_tokens)
        # The last one let in may go beyond, and is waited for.
        assert (await server.call("bob", prompt="x" * 40, max_tokens=50)).status == 200
        wait_s = assert_rate_limited(await server.call("bob"), "tokens per minute")
        assert wait_s == pytest.approx((90 + 1 - 22) * 60 / 22, rel=0.05)


async def test_so_many_answers_at_once_as_a_key_allows_choices_counted(tmp_path: Path) -> None:
    async with serving(tmp_path, {"alice": "max_concurrent = 3", "bob": ""}) as server:
        with server.app.runner.held():
            first = server.start("alice")
            pair = server.start("alice", body=BODY | {"n": 2})
            await server.app.until(lambda: server.app.client.num_unfinished == 3)
            assert_rate_limited(await server.call("alice"), "3 answers at once")
            assert_rate_limited(await server.call("alice", path="/v1/streams"), "3 answers at once")
            others = [server.start("bob") for _ in range(9)]
            await server.app.until(lambda: server.app.client.num_unfinished == 12)
            too_many = await server.call("alice", n=4)
            assert too_many.status == 400, "coming back would not help"
        for request in (first, pair, *others):
            await request.done.wait()
            assert request.status == 200
        assert (await server.call("alice", n=3)).status == 200


@pytest.mark.parametrize("phase", ["body", "tokenizing", "queued", "prefill", "decode"])
async def test_who_leaves_gives_back_its_place_whenever_it_does(tmp_path: Path, phase: str) -> None:
    scheduler = make_scheduler(max_num_seqs=1, max_num_batched_tokens=4)
    async with serving(tmp_path, {"alice": "max_concurrent = 1", "bob": ""}, scheduler=scheduler) as server:
        app = server.app
        may_finish = threading.Event()
        if phase == "tokenizing":
            hold_tokenizing(server.app, may_finish)
        with app.runner.held():
            if phase == "queued":
                await server.run("bob", prompt="bob")
            if phase == "body":
                request = exchange(app.asgi, "POST", "/v1/completions", headers=server._headers("alice"))
                request.send_body(b"{", more_body=True)
                server._tasks.start_soon(request.run)
            else:
                request = server.start("alice", body=BODY | {"prompt": "x" * 10, "max_tokens": 50, "stream": True})
            await anyio.wait_all_tasks_blocked()
            if phase in ("prefill", "decode"):
                app.runner.allow(1 if phase == "prefill" else 4)
                await app.until(lambda: [g.phase for g in app.client._generations.values()] == [phase])
            assert app.limits.num_running("alice") == (phase != "body")
            request.disconnect()
            await anyio.wait_all_tasks_blocked()
            may_finish.set()
            await request.done.wait()
            assert app.limits.num_running("alice") == 0
            assert not app.client.admission.num_queued_tokens
        assert is_ok(await server.call("alice"))


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"prompt": "x" * 600}, 400),
        ({"prompt": ""}, 400),
        ({"prompt": [257]}, 400),
        ({"temperature": -1}, 400),
        ({"logit_bias": {"300": 1}}, 400),
        ({"model": "another"}, 404),
    ],
    ids=str,
)
async def test_who_is_refused_for_what_it_asks_gives_back_its_place(
    tmp_path: Path, fields: dict[str, Any], status: int
) -> None:
    async with serving(tmp_path, {"alice": "max_concurrent = 1\ntokens_per_minute = 11"}) as server:
        for _ in range(3):
            assert (await server.call("alice", **fields)).status == status
            assert server.app.limits.num_running("alice") == 0
        assert is_ok(await server.call("alice")), "nor has it used tokens"


async def test_who_finds_the_queue_full_or_too_long_gives_back_its_place(tmp_path: Path) -> None:
    tenants = {"alice": "max_concurrent = 1\ntokens_per_minute = 11", "bob": "", "carol": 'tier = "batch"'}
    options: dict[str, Any] = {"max_queue_size": 1, "ttft_targets_s": "1e-9,1e-9,1e6"}
    async with serving(tmp_path, tenants, scheduler=slow_scheduler(max_num_seqs=1), **options) as server:
        with server.app.runner.held():
            await server.run("bob")
            for _ in range(3):
                assert_overloaded(await server.call("alice"))
                assert server.app.limits.num_running("alice") == 0
            queued = server.start("carol")
            await server.app.until(lambda: server.app.client.num_unfinished == 2)
            for _ in range(3):
                full = await server.call("alice")
                assert (full.status, full.json()["error"]["code"]) == (429, "queue_full")
                assert server.app.limits.num_running("alice") == 0
        await queued.done.wait()
        await server.app.until(lambda: server.app.client.load.num_running == 0)
        assert is_ok(await server.call("alice")), "nor has it used tokens"


async def test_a_server_that_begins_to_drain_while_it_tokenizes_gives_back_the_place_and_charges_nothing(
    tmp_path: Path,
) -> None:
    async with serving(tmp_path, {"alice": "max_concurrent = 1\ntokens_per_minute = 5"}) as server:
        app = server.app
        may_finish = threading.Event()
        hold_tokenizing(server.app, may_finish)
        request = server.start("alice", body=BODY | {"prompt": "x" * 100})
        await anyio.wait_all_tasks_blocked()
        app.stop_accepting()
        may_finish.set()
        await request.done.wait()
        assert (request.status, request.json()["error"]["code"]) == (503, "draining")
        assert app.limits.num_running("alice") == app.client.num_waiting == 0
        app.limits.admit("alice", 1)


async def test_an_engine_that_ends_leaves_nothing_in_any_book(tmp_path: Path) -> None:
    async with serving(tmp_path, {"alice": "max_concurrent = 9"}, scheduler=make_scheduler(max_num_seqs=1)) as server:
        app = server.app
        with app.runner.held():
            requests = [await server.run("alice", stream=True)]
            requests += [server.start("alice") for _ in range(4)]
            await app.until(lambda: app.client.num_unfinished == 5)
            assert app.client.admission.num_queued(Tier.STANDARD) == app.client.num_waiting == 4
            app.client._engine.stop()
        for request in requests:
            await request.done.wait()
        await app.client.stopped.wait()
        assert b'"error"' in requests[0].body
        assert {request.status for request in requests[1:]} == {500}
        assert app.limits.num_running("alice") == app.client.num_waiting == app.client.admission.num_queued_tokens == 0


async def test_an_answer_that_is_over_gives_back_its_place_however_it_ended(tmp_path: Path) -> None:
    async with serving(tmp_path, {"alice": "max_concurrent = 1"}) as server:
        fields: dict[str, Any]
        for fields in ({}, {"stop": TEXT[2]}, {"stream": True}, {"timeout": 1e-6}, {"echo": True, "max_tokens": 0}):
            await server.call("alice", **fields)
            assert server.app.limits.num_running("alice") == 0
        server.app.runner.fail_next = True
        assert (await server.call("alice")).status == 500
        with server.app.runner.held():
            stream = (await server.call("alice", path="/v1/streams")).json()
            assert_rate_limited(await server.call("alice"), "1 answers at once")
            await call(server.app.asgi, "DELETE", stream["url"], headers=server._headers("alice"))
        assert is_ok(await server.call("alice"))


async def test_reading_the_keys_again_changes_limits_and_tiers_and_leaves_what_runs(tmp_path: Path) -> None:
    tenants = {"alice": "max_concurrent = 1", "bob": "requests_per_minute = 1"}
    async with serving(tmp_path, tenants, scheduler=slow_scheduler(), ttft_targets_s="1e-9,1e6,1e6") as server:
        assert is_ok(await server.call("bob"))
        assert_rate_limited(await server.call("bob"), "1 requests per minute")
        with server.app.runner.held():
            running = await server.run("alice")
            assert_rate_limited(await server.call("alice"), "1 answers at once")
            server.change_limits(alice="max_concurrent = 2", bob='tier = "premium"')
            second = server.start("alice")
            await server.app.until(lambda: server.app.client.num_unfinished == 2)
            assert_rate_limited(await server.call("alice"), "2 answers at once")
            assert_overloaded(await server.call("bob"), "premium")
            server.change_limits(alice="max_concurrent = 1")
        for request in (running, second):
            await request.done.wait()
            assert request.status == 200
        for _ in range(3):
            assert is_ok(await server.call("bob"))
        assert is_ok(await server.call("alice"))


async def test_a_tenant_that_was_gone_for_a_while_begins_anew(tmp_path: Path) -> None:
    async with serving(tmp_path, {"alice": "requests_per_minute = 1"}) as server:
        assert is_ok(await server.call("alice"))
        assert_rate_limited(await server.call("alice"), "1 requests per minute")
        with_alice = server.file.read_text()
        for content in ("", with_alice):
            server.file.write_text(content)
            server.app.reload_keys()
        assert is_ok(await server.call("alice"))


# Time that is over


def assert_ended_in_its_stream(answer: Exchange, text: str) -> None:
    """A stream that has so much text, then the error, and then its end."""
    assert answer.status == 200
    assert answer.is_complete
    frames = answer.body.decode().removesuffix("\n\n").split("\n\n")
    read = [json.loads(frame.removeprefix("data: ")) for frame in frames]
    error = read.pop()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == ("timeout_error", "deadline_exceeded")
    assert "".join(chunk["choices"][0]["text"] for chunk in read) == text


def assert_ended_whole(answer: Exchange) -> None:
    assert answer.status == 504
    assert answer.json()["error"]["code"] == "deadline_exceeded"
    assert answer.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("name", ["timeout", "queue_timeout", "ttft_timeout"])
@pytest.mark.parametrize("is_setting", [False, True])
async def test_a_queued_request_whose_time_is_over_ends_with_the_error(
    tmp_path: Path, name: str, is_setting: bool
) -> None:
    # Over when it comes, and seen by the first step after it.
    fields: dict[str, Any] = {} if is_setting else {name: 1e-6}
    setting = "request_timeout_s" if name == "timeout" else f"{name}_s"
    options: dict[str, Any] = {setting: 1e-6} if is_setting else {}
    async with serving(tmp_path, **options) as server:
        assert_ended_in_its_stream(await server.call(stream=True, **fields), "")
        assert_ended_whole(await server.call(**fields))
        stream = (await server.call(path="/v1/streams", **fields)).json()
        events = (await call(server.app.asgi, "GET", stream["events_url"], headers=SSE)).events()
        assert events[-1]["event"] == "error"
        assert json.loads(events[-1]["data"])["error"]["code"] == "deadline_exceeded"
        assert events[-1]["id"].startswith(stream["id"])
        assert server.app.runner.num_steps == 0, "it costs nothing"
        assert server.metrics()["headrace_requests_finished_total", ("deadline_exceeded",)] == 3
        assert server.metrics()["headrace_requests_cancelled_total", ("queued",)] == 0, "nobody left"


async def test_a_client_may_ask_for_less_time_than_the_server_gives_and_not_for_more(tmp_path: Path) -> None:
    async with serving(tmp_path, queue_timeout_s=1e-6) as server:
        assert_ended_whole(await server.call(queue_timeout=1000))


@pytest.mark.parametrize("stream", [True, False])
async def test_a_prompt_that_has_no_token_in_time_ends_in_the_midst_of_it(tmp_path: Path, stream: bool) -> None:
    scheduler = make_scheduler(max_num_batched_tokens=8, max_num_seqs=8)
    async with serving(tmp_path, scheduler=scheduler) as server:
        with server.app.runner.held():
            request = await server.run(prompt="p" * 300, ttft_timeout=0.05, stream=stream)
            asked_s = time.monotonic()
            [generation] = server.app.client._generations.values()
            assert generation.phase == "prefill"
            await server.app.until(lambda: time.monotonic() - asked_s > 0.05)
        await request.done.wait()
        if stream:
            assert_ended_in_its_stream(request, "")
        else:
            assert_ended_whole(request)
        assert is_ok(await server.call())


async def test_one_that_has_begun_is_not_ended_for_its_time_in_the_queue_nor_after_its_first_token_for_that(
    tmp_path: Path,
) -> None:
    async with serving(tmp_path) as server:
        with server.app.runner.held():
            request = await server.run(queue_timeout=0.05, ttft_timeout=0.05)
            asked_s = time.monotonic()
            if server.app.client.load.num_running:
                await server.app.until(lambda: time.monotonic() - asked_s > 0.05)
        await request.done.wait()
        assert request.json()["choices"][0]["text"] == expected_text("running", 50)


@pytest.mark.parametrize("is_setting", [False, True])
async def test_a_stream_that_stalls_ends_with_an_error_event_behind_what_it_had(
    tmp_path: Path, is_setting: bool
) -> None:
    fields: dict[str, Any] = {} if is_setting else {"stall_timeout": 5}
    options: dict[str, Any] = {"stall_timeout_s": 5} if is_setting else {}
    async with serving(tmp_path, **options) as server:
        runner = server.app.runner
        # Steps are said to have ended ten seconds ago, so that nothing has come since then.
        now_s = time.monotonic()
        runner.times = StepTimes(now_s - 11, now_s - 10, None)
        stream = await server.call(stream=True, **fields)
        assert_ended_in_its_stream(stream, TEXT[:1])
        runner.times = StepTimes(now_s - 5, now_s - 4, None)
        assert is_ok(await server.call())


async def test_a_request_for_no_time_at_all_is_refused_by_name(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        for name in ("timeout", "queue_timeout", "ttft_timeout", "stall_timeout"):
            for value in (0, -1, "5", True, 1e7):
                fields: dict[str, Any] = {name: value}
                refused = await server.call(**fields)
                assert (refused.status, refused.json()["error"]["param"]) == (400, name)
            for allowed in (None, 100):
                fields = {name: allowed}
                assert is_ok(await server.call(**fields))


# Places in the queue, and times


async def test_queued_events_carry_the_place_and_an_estimate(tmp_path: Path) -> None:
    async with serving(tmp_path, scheduler=slow_scheduler(max_num_seqs=1)) as server:
        readers = []
        with server.app.runner.held():
            await server.run()
            for i in range(3):
                stream = (await server.call(path="/v1/streams", prompt=f"q{i}")).json()
                reader = exchange(server.app.asgi, "GET", stream["events_url"], headers=SSE)
                server._tasks.start_soon(reader.run)
                readers.append(reader)
            for reader in readers:
                await reader.wait_until(lambda reader=reader: b"event: queued" in reader.body)
            queued = [json.loads(reader.events()[1]["data"]) for reader in readers]
            assert [set(event) for event in queued] == [{"position", "eta_s"}] * 3
            assert [event["position"] for event in queued] == [1, 2, 3]
            etas = [event["eta_s"] for event in queued]
            assert 0 < etas[0] < etas[1] < etas[2]
        for i, reader in enumerate(readers):
            await reader.done.wait()
            tokens = [json.loads(event["data"]) for event in reader.events() if event.get("event") == "token"]
            assert "".join(token["text"] for token in tokens) == expected_text(f"q{i}", 6)


async def test_a_place_is_told_again_only_when_it_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headrace.server.native_api._QUEUE_POLL_S", 0.01)
    monkeypatch.setattr("headrace.server.admission._POSITIONS_AGE_S", 0.0)
    async with serving(tmp_path, scheduler=slow_scheduler(max_num_seqs=1)) as server:
        with server.app.runner.held():
            await server.run()
            before, last = [(await server.call(path="/v1/streams", prompt=f"q{i}")).json() for i in range(2)]
            reader = exchange(server.app.asgi, "GET", last["events_url"], headers=SSE)
            server._tasks.start_soon(reader.run)
            await reader.wait_until(lambda: b'"position":2' in reader.body)
            num_asked = 0
            queue_position = server.app.client.queue_position

            def counted(generation: Generation) -> tuple[int, float | None] | None:
                nonlocal num_asked
                num_asked += 1
                return queue_position(generation)

            monkeypatch.setattr(server.app.client, "queue_position", counted)
            await server.app.until(lambda: num_asked >= 5)
            await call(server.app.asgi, "DELETE", before["url"])
            await reader.wait_until(lambda: b'"position":1' in reader.body)
        await reader.done.wait()
        queued = [event for event in reader.events() if event.get("event") == "queued"]
        places = [json.loads(event["data"])["position"] for event in queued]
        assert places in ([2, 1], [2, 1, 0]), "0 once it has begun"
        assert {event["id"] for event in queued} == {f"{last['id']}:0"}


@pytest.mark.parametrize("route", ROUTES)
async def test_the_last_usage_tells_the_seconds_of_each_part(tmp_path: Path, route: str) -> None:
    path, body = route_and_body(route)
    async with serving(tmp_path) as server:
        options = {"stream_options": {"include_usage": True}} if route.endswith("stream") else {}
        answer = await call(server.app.asgi, "POST", path, body | options)
        counts = chunks(answer.body)[-1]["usage"] if options else answer.json()["usage"]
        timings = counts["timings"]
        assert list(timings) == ["queue_s", "prefill_s", "ttft_s", "decode_s", "total_s"]
        assert all(seconds >= 0 for seconds in timings.values())
        assert timings["ttft_s"] + timings["decode_s"] <= timings["total_s"] + 1e-5
        if options:
            nothing = [chunk["usage"] for chunk in chunks(answer.body)[:-1]]
            assert nothing == [None] * len(nothing)


async def test_a_strict_openai_client_takes_the_usage_with_its_times_and_sees_refusals(tmp_path: Path) -> None:
    async with (
        serving(tmp_path, {"alice": "requests_per_minute = 4"}) as server,
        httpx2.AsyncClient(transport=httpx2.ASGITransport(with_state(server.app.asgi))) as http,
        openai.AsyncOpenAI(
            base_url="http://127.0.0.1:8000/v1",
            api_key=server._secrets["alice"],
            http_client=http,
            max_retries=0,
            _strict_response_validation=True,
        ) as client,
    ):
        messages: Any = [{"role": "user", "content": "hi"}]
        chat = await client.chat.completions.create(model="fake", messages=messages, max_tokens=6, temperature=0)
        assert chat.usage is not None
        completion = await client.completions.create(model="fake", prompt="hi", max_tokens=6, temperature=0)
        assert completion.usage is not None
        streamed = await client.chat.completions.create(
            model="fake", messages=messages, max_tokens=6, stream=True, stream_options={"include_usage": True}
        )
        seen = [chunk async for chunk in streamed]
        assert seen[-1].usage is not None
        for counts in (chat.usage, completion.usage, seen[-1].usage):
            assert counts.completion_tokens == 6
            assert counts.model_extra is not None
            assert counts.model_extra["timings"]["ttft_s"] > 0
        await client.completions.create(model="fake", prompt="hi", max_tokens=1)
        with pytest.raises(openai.RateLimitError) as caught:
            await client.completions.create(model="fake", prompt="hi", max_tokens=1)
        assert caught.value.code == RateLimitError.code
        assert caught.value.response.headers["retry-after"] == "15"
