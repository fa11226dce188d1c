"""The dynamic batcher alone: what shares a batch, when it is due, and what waiting costs and brings."""

import heapq
import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from headrace.scheduler.config import SchedulingPolicy
from headrace.scheduler.dynamic_batcher import Batch, BatchItem, BatchPolicy, DynamicBatcher
from headrace.scheduler.messages import Tier
from headrace.scheduler.sequence import SequenceStatus

_ids = itertools.count()


def batcher(**policy: Any) -> DynamicBatcher:
    return DynamicBatcher(BatchPolicy(**policy), SchedulingPolicy().tier_weights)


def item(cost: float = 1.0, arrival_s: float = 0.0, **fields: Any) -> BatchItem:
    return BatchItem(next(_ids), "content", cost, arrival_s=arrival_s, **fields)


def taken(made: DynamicBatcher, now: float = 0.0) -> list[float]:
    """The costs of the next batch's items."""
    batch = made.next_batch(now)
    return [] if batch is None else [item.cost for item in batch.items]


def test_a_batch_holds_at_most_its_size() -> None:
    made = batcher(max_size=3)
    for _ in range(7):
        made.add(item())
    sizes = [len(taken(made)) for _ in range(4)]
    assert sizes == [3, 3, 1, 0]
    assert made.due_s() == float("inf")


def test_a_batch_costs_at_most_its_most_and_one_that_is_larger_goes_alone() -> None:
    made = batcher(max_cost=100)
    for cost in (30.0, 31.0, 32.0, 33.0, 500.0):
        made.add(item(cost))
    assert taken(made) == [30.0, 31.0, 32.0]
    assert taken(made) == [33.0]
    assert taken(made) == [500.0]


def test_groups_never_mix() -> None:
    made = batcher()
    for group in ("a", "b", "a", ("b",), "b"):
        made.add(item(group=group))
    groups = []
    while batch := made.next_batch(0.0):
        groups.append({item.group for item in batch.items})
    assert groups == [{"a"}, {"b"}, {("b",)}]


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(costs=st.lists(st.floats(1, 600), min_size=1, max_size=60), most=st.sampled_from([0.0, 0.1, 0.3]))
def test_padding_is_bounded_and_everybody_is_taken_once(costs: list[float], most: float) -> None:
    made = batcher(max_size=8, max_padding=most)
    items = [item(cost) for cost in costs]
    for each in items:
        made.add(each)
    found = []
    while (batch := made.next_batch(0.0)) is not None:
        largest = max(item.cost for item in batch.items)
        assert batch.cost == largest * len(batch.items)
        assert batch.padding <= most + 1e-9
        assert batch.padding == pytest.approx(1 - sum(item.cost for item in batch.items) / batch.cost)
        found += batch.items
    assert sorted(found, key=id) == sorted(items, key=id)
    assert all(each.status is SequenceStatus.RUNNING for each in items)
    assert made.waiting_cost == 0
    assert len(made) == 0


def test_who_is_next_is_fair_to_tiers_and_tenants() -> None:
    made = batcher(max_size=1)
    for _ in range(24):
        made.add(item(tenant="flood"))
    for tenant, tier in (("quiet", Tier.STANDARD), ("paying", Tier.PREMIUM)):
        made.add(item(tenant=tenant, tier=tier))
    first = []
    for _ in range(4):
        batch = made.next_batch(0.0)
        assert batch is not None
        first.append(batch.items[0].tenant)
    assert {"paying", "quiet"} <= set(first)


def test_of_one_tenant_the_earliest_deadline_goes_first() -> None:
    made = batcher(max_size=1)
    late, early = item(first_token_due_s=9.0), item(first_token_due_s=3.0)
    made.add(late)
    made.add(early)
    batch = made.next_batch(0.0)
    assert batch is not None
    assert batch.items == [early]


def test_what_is_removed_is_not_taken_and_removing_twice_does_nothing() -> None:
    made = batcher()
    gone, kept = item(2.0), item(3.0)
    made.add(gone)
    made.add(kept)
    for _ in range(2):
        made.remove(gone)
    assert made.waiting_cost == 3.0
    batch = made.next_batch(0.0)
    assert batch is not None
    assert batch.items == [kept]
    made.remove(kept)
    assert kept.status is SequenceStatus.RUNNING


def taught(**policy: Any) -> DynamicBatcher:
    """One that knows: a batch takes 100 ms, and 10 more for each item; and lately three came together, a ms apart."""
    made = batcher(**policy)
    for size in (1, 8, 1, 8, 4, 2) * 3:
        made.end(Batch([], float(size), 0.0), 0.0, 0.1 + 0.01 * size)
    for at_s in (1.0, 1.001, 1.002):
        made.add(item(arrival_s=at_s))
    batch = made.next_batch(1.002)
    assert batch is not None
    made.end(batch, 1.132, 0.13)
    return made


def test_what_has_left_is_not_kept_however_many_groups_it_was_of() -> None:
    made = batcher()
    made.add(item())
    for group in range(1000):
        gone = item(group=group)
        made.add(gone)
        made.remove(gone)
    [tenant] = made._queue._tiers[Tier.STANDARD].tenants.values()
    assert sum(map(len, tenant.heaps.values())) == tenant.num_entries < 80
    assert len(tenant.heaps) < 80
    assert taken(made) == [1.0]


def test_a_lone_clients_items_do_not_wait() -> None:
    made = batcher(max_wait_s=0.5)
    for at_s in range(20):
        made.add(item(arrival_s=at_s))
        batch = made.next_batch(at_s)
        assert batch is not None
        made.end(batch, at_s + 0.1, 0.1)


def test_what_had_company_waits_for_it_as_long_as_a_batch_of_its_own_is_worth() -> None:
    made = taught(max_wait_s=0.5)
    made.add(item(arrival_s=2.0))
    assert made.next_batch(2.0) is None, "three came together lately"
    assert made.due_s() == pytest.approx(2.0 + 0.11, abs=0.005)
    made.add(item(arrival_s=2.05))
    assert made.due_s() == pytest.approx(2.05 + 0.12 / 2, abs=0.005), "now two would wait for one"
    made.add(item(arrival_s=2.06))
    assert made.due_s() == float("-inf"), "all three are here"


def test_those_who_came_while_a_batch_was_computed_wait_for_those_of_it() -> None:
    made = taught(max_wait_s=0.5)
    for _ in range(3):
        made.add(item(arrival_s=2.0))
    batch = made.next_batch(2.0)
    assert batch is not None
    made.add(item(arrival_s=2.001))
    made.add(item(arrival_s=2.002))
    made.end(batch, 2.13, 0.13)
    assert made.due_s() == pytest.approx(2.13 + 0.12 / 2, abs=0.005)
    for at_s in (2.131, 2.132, 2.133):
        assert made.next_batch(at_s) is None
        made.add(item(arrival_s=at_s))
    batch = made.next_batch(2.133)
    assert batch is not None
    assert len(batch.items) == 5


def test_nobody_waits_longer_than_the_longest_wait() -> None:
    made = taught(max_wait_s=0.05)
    made.add(item(arrival_s=2.0))
    assert made.due_s() == 2.05


# What waiting costs and brings, on a clock of the test's own.

START_S, ITEM_S = 0.010, 0.001


class Machine:
    """One batch at a time, of `START_S` and `ITEM_S` for each item; `on_end` hears of each item's end."""

    def __init__(self, made: DynamicBatcher, on_end: Callable[[BatchItem, float], None]) -> None:
        self.batcher = made
        self.now = 0.0
        self.sizes: list[int] = []
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._is_busy = False
        self._on_end = on_end
        for size in (1, 8, 1, 8, 4, 2) * 3:
            made.end(Batch([], size, 0.0), 0.0, START_S + ITEM_S * size)

    def at(self, at_s: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._events, (at_s, next(_ids), call))

    def arrive(self) -> None:
        self.batcher.add(item(arrival_s=self.now))
        self._look()

    def run(self, until_s: float) -> None:
        while self._events and self._events[0][0] <= until_s:
            self.now, _, call = heapq.heappop(self._events)
            call()

    def _look(self) -> None:
        if self._is_busy:
            return
        batch = self.batcher.next_batch(self.now)
        if batch is None:
            if self.batcher.due_s() < float("inf"):
                self.at(self.batcher.due_s(), self._look)
            return
        self._is_busy = True
        self.sizes.append(len(batch.items))
        seconds = START_S + ITEM_S * len(batch.items)

        def end() -> None:
            self._is_busy = False
            self.batcher.end(batch, self.now, seconds)
            for each in batch.items:
                self._on_end(each, self.now)
            self._look()

        self.at(self.now + seconds, end)


@pytest.mark.parametrize("rate", [1, 5, 10])
def test_at_a_low_rate_the_median_is_that_of_no_wait(rate: float) -> None:
    medians = {}
    for max_wait_s in (0.0, 0.05):
        latencies: list[float] = []
        machine = Machine(batcher(max_wait_s=max_wait_s), lambda each, now: latencies.append(now - each.arrival_s))  # noqa: B023
        rng = random.Random(3)
        at_s = 0.0
        for _ in range(2000):
            at_s += rng.expovariate(rate)
            machine.at(at_s, machine.arrive)
        machine.run(float("inf"))
        assert len(latencies) == 2000
        medians[max_wait_s] = sorted(latencies)[1000]
    assert medians[0.05] <= 1.05 * medians[0.0]


@pytest.mark.parametrize(("num_clients", "jitter_s"), [(32, 0.0), (32, 0.002), (64, 0.002), (200, 0.005)])
def test_at_saturation_throughput_is_that_of_full_batches(num_clients: int, jitter_s: float) -> None:
    most = 32
    num_done = 0
    rng = random.Random(5)

    def come_back(each: BatchItem, now: float) -> None:
        nonlocal num_done
        num_done += 1
        machine.at(now + rng.uniform(0, jitter_s), machine.arrive)

    machine = Machine(batcher(max_size=most), come_back)
    for _ in range(num_clients):
        machine.at(rng.uniform(0, 0.1), machine.arrive)
    machine.run(20.0)
    # As fast as the clients allow: those of a batch that all were in come back after it.
    gap_s = jitter_s if num_clients == most else 0.0
    full = 20.0 * most / (START_S + ITEM_S * most + gap_s)
    assert num_done >= 0.95 * full, machine.sizes[-20:]
