"""Lanes: from single inputs over batches back to single outcomes, and what happens to those that fail or leave."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from headrace.scheduler.config import SchedulingPolicy
from headrace.scheduler.dynamic_batcher import BatchPolicy
from headrace.scheduler.messages import LoadSnapshot
from headrace.server.batch_lane import Asker, BatchLane, Computed, LaneInput
from headrace.server.errors import BadRequestError, DeadlineError, EngineFailedError, OverloadedError, UnavailableError
from headrace.server.metrics import Metrics

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Doubler:
    """Doubles numbers, once it is let; notes its batches. Negative ones raise, and so does a batch that holds one."""

    def __init__(self, *, is_held: bool = False) -> None:
        self.batches: list[list[int]] = []
        self.gate = anyio.Event()
        self.num_given_up = 0
        if not is_held:
            self.gate.set()

    async def __call__(self, contents: Sequence[int]) -> Computed:
        self.batches.append(list(contents))
        try:
            await self.gate.wait()
            await checkpoint()
        except anyio.get_cancelled_exc_class():
            self.num_given_up += 1
            raise
        if any(content == 13 for content in contents):
            raise EngineFailedError("thirteen")
        if any(content == 14 for content in contents):
            raise ZeroDivisionError
        return Computed([BadRequestError("odd") if content % 2 else 2 * content for content in contents], 0.01)


class Lane(BatchLane):
    """A lane whose metrics can be read."""

    def __init__(self, compute: Any, metrics: Metrics, policy: BatchPolicy, max_queue_size: int) -> None:
        super().__init__(
            "model",
            policy,
            compute,
            tier_weights=SchedulingPolicy().tier_weights,
            max_queue_size=max_queue_size,
            metrics=metrics,
            clock=anyio.current_time,
        )
        self.read = metrics

    def counts(self) -> dict[str, float]:
        lines = self.read.expose().decode().splitlines()
        prefix = 'headrace_batch_items_total{model="model",outcome="'
        found = [line.removeprefix(prefix).split('"} ') for line in lines if line.startswith(prefix)]
        return {outcome: float(value) for outcome, value in found if float(value)}


@asynccontextmanager
async def lane_of(compute: Any, *, max_queue_size: int = 100, **policy: Any) -> AsyncIterator[Lane]:
    lane = Lane(compute, Metrics("fake", LoadSnapshot, lambda: 0), BatchPolicy(**policy), max_queue_size)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lane.run)
        yield lane
        assert lane.num_unfinished == 0
        tasks.cancel_scope.cancel()


async def until(predicate: Callable[[], bool]) -> None:
    with anyio.fail_after(10):
        while not predicate():
            await checkpoint()


async def ask(lane: BatchLane, *numbers: int, timeout_s: float = 30, **options: Any) -> list[Any]:
    return await lane.submit([LaneInput(number) for number in numbers], Asker(), timeout_s, **options)


async def test_each_input_gets_its_own_outcome_in_order() -> None:
    doubler = Doubler()
    async with lane_of(doubler, max_size=2) as lane:
        assert await ask(lane, 2, 4, 6, 8, 10) == [4, 8, 12, 16, 20]
        assert doubler.batches == [[2, 4], [6, 8], [10]]
        assert lane.counts() == {"ok": 5}


async def test_requests_share_a_batch_that_fills_while_another_is_computed() -> None:
    doubler = Doubler(is_held=True)
    async with lane_of(doubler) as lane, anyio.create_task_group() as tasks:
        answers: dict[int, list[Any]] = {}

        async def client(number: int) -> None:
            answers[number] = await ask(lane, number)

        for number in (2, 4, 6):
            tasks.start_soon(client, number)
            await until(lambda number=number: lane.num_unfinished == number // 2)  # type: ignore[misc]
        doubler.gate.set()
        await until(lambda: len(answers) == 3)
        assert answers == {2: [4], 4: [8], 6: [12]}
        assert doubler.batches == [[2], [4, 6]]


async def test_one_item_that_fails_a_batch_fails_alone() -> None:
    doubler = Doubler()
    async with lane_of(doubler) as lane:
        outcomes = await ask(lane, 2, 4, 13, 6, 8, is_all_or_nothing=False)
        assert isinstance(outcomes.pop(2), EngineFailedError)
        assert outcomes == [4, 8, 12, 16]
        assert lane.counts() == {"ok": 4, "error": 1}


async def test_an_item_whose_outcome_is_an_error_takes_its_request_along_and_nobody_elses() -> None:
    doubler = Doubler(is_held=True)
    async with lane_of(doubler) as lane, anyio.create_task_group() as tasks:
        ends: dict[str, Any] = {}

        async def client(name: str, *numbers: int) -> None:
            try:
                ends[name] = await ask(lane, *numbers)
            except BadRequestError as error:
                ends[name] = error.message

        tasks.start_soon(client, "first", 2)
        await until(lambda: len(doubler.batches) == 1)
        tasks.start_soon(client, "odd", 4, 3)
        tasks.start_soon(client, "even", 6)
        await until(lambda: lane.num_unfinished == 4)
        doubler.gate.set()
        await until(lambda: len(ends) == 3)
        assert ends == {"first": [4], "odd": "odd", "even": [12]}
        assert doubler.batches == [[2], [4, 3, 6]]


async def test_what_raises_anything_else_is_an_internal_error_of_that_batch(caplog: pytest.LogCaptureFixture) -> None:
    async with lane_of(Doubler()) as lane:
        with pytest.raises(EngineFailedError):
            await ask(lane, 14)
        assert await ask(lane, 2) == [4]
    assert "ZeroDivisionError" in caplog.text


async def test_who_leaves_the_queue_is_not_computed_and_a_batch_without_anybody_is_given_up() -> None:
    doubler = Doubler(is_held=True)
    async with lane_of(doubler) as lane, anyio.create_task_group() as tasks:
        scopes = [anyio.CancelScope() for _ in range(3)]

        async def client(scope: anyio.CancelScope, *numbers: int) -> None:
            with scope:
                await ask(lane, *numbers)

        for scope, numbers in zip(scopes, ([2], [4, 6], [8]), strict=True):
            tasks.start_soon(client, scope, *numbers)
            await until(lambda: len(doubler.batches) == 1)
        await until(lambda: lane.num_unfinished == 4)
        scopes[1].cancel()
        await until(lambda: lane.num_unfinished == 2)
        assert doubler.num_given_up == 0
        scopes[0].cancel()
        await until(lambda: len(doubler.batches) == 2)
        assert doubler.num_given_up == 1
        assert doubler.batches[1] == [8]
        doubler.gate.set()
        await until(lambda: lane.num_unfinished == 0)
        assert lane.counts() == {"ok": 1, "cancelled": 3}


async def test_a_batch_is_not_given_up_for_those_who_leave_it_as_long_as_one_stays() -> None:
    doubler = Doubler(is_held=True)
    async with lane_of(doubler) as lane:
        with pytest.raises(DeadlineError):
            await ask(lane, 2, 4, timeout_s=0.01)
        await until(lambda: doubler.num_given_up == 1)
        assert lane.counts() == {"deadline": 2}


async def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    doubler = Doubler(is_held=True)
    async with lane_of(doubler, max_queue_size=3, max_size=1) as lane, anyio.create_task_group() as tasks:
        tasks.start_soon(ask, lane, 2)
        await until(lambda: len(doubler.batches) == 1)
        for number in (4, 6):
            tasks.start_soon(ask, lane, number)
        await until(lambda: lane.num_unfinished == 3)
        with pytest.raises(OverloadedError) as refused:
            await ask(lane, 8, 10)
        assert "retry-after" in refused.value.headers
        with pytest.raises(BadRequestError, match="more than this server can queue"):
            await ask(lane, 2, 4, 6, 8)
        # Of a full queue another tenant has its part.
        tasks.start_soon(lane.submit, [LaneInput(8)], Asker(tenant="other"), 30)
        await until(lambda: lane.num_unfinished == 4)
        doubler.gate.set()
        await until(lambda: lane.num_unfinished == 0)


async def test_a_lane_that_is_closed_tells_those_it_computes_and_those_that_wait() -> None:
    doubler = Doubler(is_held=True)
    lane = Lane(doubler, Metrics("fake", LoadSnapshot, lambda: 0), BatchPolicy(), 10)
    async with anyio.create_task_group() as tasks:
        lane_scope = anyio.CancelScope()

        async def run() -> None:
            with lane_scope:
                await lane.run()

        async def client() -> None:
            with pytest.raises(UnavailableError):
                await ask(lane, 2)

        tasks.start_soon(run)
        tasks.start_soon(client)
        await until(lambda: len(doubler.batches) == 1)
        tasks.start_soon(client)
        await until(lambda: lane.num_unfinished == 2)
        lane_scope.cancel()
    assert lane.num_unfinished == 0
