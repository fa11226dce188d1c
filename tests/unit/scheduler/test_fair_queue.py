"""Who is next, against shares, lifts and plain lists."""

import itertools
import random
from typing import Any

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from headrace.scheduler.fair_queue import FairQueue
from headrace.scheduler.messages import GenerationRequest, SamplingParams, Tier
from headrace.scheduler.sequence import Sequence, SequenceStatus

WEIGHTS = {Tier.PREMIUM: 8.0, Tier.STANDARD: 3.0, Tier.BATCH: 1.0}
IDS = itertools.count()


def sequence(tier: Tier = Tier.STANDARD, tenant: str = "", *, is_long: bool = False, **fields: Any) -> Sequence:
    request = GenerationRequest(next(IDS), (1,), SamplingParams(), 0.0, tier=tier, tenant=tenant, **fields)
    made = Sequence(request)
    made.is_long = is_long
    return made


def take(queue: FairQueue[Sequence], *, cost: float = 0, **fields: Any) -> Sequence:
    """Run the next one."""
    picked = queue.pick(**fields)
    assert picked is not None
    queue.remove(picked)
    picked.status = SequenceStatus.RUNNING
    assert picked.account is not None
    picked.account.charge(cost)
    return picked


def queue_of(*sequences: Sequence) -> FairQueue[Sequence]:
    queue: FairQueue[Sequence] = FairQueue(WEIGHTS)
    for item in sequences:
        queue.push(item)
    return queue


@pytest.mark.parametrize("seed", range(5))
def test_backlogged_tiers_and_tenants_get_shares_by_their_weights_up_to_the_largest_request(seed: int) -> None:
    rng, queue = random.Random(seed), queue_of()
    weights = {"a": 1.0, "b": 2.0, "c": 5.0}
    served = dict.fromkeys(itertools.product(Tier, weights), 0.0)
    for tier, tenant in served:
        for _ in range(2):
            queue.push(sequence(tier, tenant, weight=weights[tenant]))
    most = 1000
    for _ in range(5000):
        cost = rng.choice([1, 50, most])
        request = take(queue, cost=cost).request
        served[request.tier, request.tenant] += cost
        queue.push(sequence(request.tier, request.tenant, weight=request.weight))
        # No two of them are ever further apart than what one request of each may cost.
        for tier in Tier:
            of_tier = [served[tier, tenant] / weight for tenant, weight in weights.items()]
            assert max(of_tier) - min(of_tier) <= most
        tiers = [sum(served[tier, tenant] for tenant in weights) / WEIGHTS[tier] for tier in Tier]
        assert max(tiers) - min(tiers) <= most


def test_a_tier_or_tenant_with_nobody_waiting_saves_no_service_up() -> None:
    queue = queue_of(sequence(tenant="busy"))
    for _ in range(100):
        take(queue, cost=30)
        queue.push(sequence(tenant="busy"))
    queue.push(sequence(tenant="new"))
    for _ in range(10):
        queue.push(sequence(tenant="new"))
        queue.push(sequence(Tier.BATCH))
    took = []
    for _ in range(40):
        took.append(take(queue, cost=30).request)
        queue.push(sequence(took[-1].tier, took[-1].tenant))
    assert sum(request.tier is Tier.BATCH for request in took) == pytest.approx(10, abs=1), "a share of 1 beside 3"
    standard = [request.tenant for request in took if request.tier is Tier.STANDARD]
    assert standard.count("new") == pytest.approx(15, abs=1), "half of what is not batch's"


def test_one_comes_back_no_better_off_even_where_nobody_waits_then() -> None:
    queue = queue_of(sequence(tenant="busy"))
    for _ in range(10):
        take(queue, cost=300)
        queue.push(sequence(tenant="busy"))
    take(queue, cost=300)
    queue.push(sequence(Tier.BATCH))
    queue.push(sequence(tenant="new"))
    # What was the smallest when somebody was last picked: ten had been charged then.
    assert queue._tiers[Tier.BATCH].served == 10 * 300 / 3
    assert queue._tiers[Tier.STANDARD].tenants["new"].served == 10 * 300


def test_one_that_has_had_more_than_the_others_is_not_let_off_when_it_comes_back() -> None:
    queue = queue_of(sequence(tenant="greedy"), sequence(tenant="modest"))
    greedy = take(queue, cost=0)
    assert greedy.account is not None
    greedy.account.charge(9000)  # while it runs, and nobody of its tenant waits
    queue.push(sequence(tenant="greedy"))
    for _ in range(9):
        queue.push(sequence(tenant="modest"))
    assert [take(queue, cost=1000).request.tenant for _ in range(9)] == ["modest"] * 9


def test_no_tier_starves_behind_others_that_always_have_somebody() -> None:
    queue = queue_of(*(sequence(tier) for tier in [*Tier] * 2))
    waits, since = [], 0
    for step in range(1200):
        picked = take(queue, cost=100)
        queue.push(sequence(picked.request.tier))
        if picked.request.tier is Tier.BATCH:
            waits.append(step - since)
            since = step
    assert len(waits) == pytest.approx(100, abs=1)
    assert max(waits) <= 13


def test_of_equals_the_higher_rank_and_then_the_older_goes_first() -> None:
    first, second, third, fourth = (sequence(tier) for tier in (*reversed(Tier), Tier.BATCH))
    queue = queue_of(first, fourth, second, third)
    assert [take(queue) for _ in range(4)] == [third, second, first, fourth]


def test_inside_a_tenant_the_earliest_deadline_goes_first_then_the_older() -> None:
    made = [
        sequence(),
        sequence(deadline_s=7.0),
        sequence(first_token_deadline_s=5.0, deadline_s=9.0),
        sequence(deadline_s=7.0),
        sequence(deadline_s=6.0, is_long=True),
    ]
    queue = queue_of(*reversed(made))
    assert [made.index(take(queue)) for _ in made] == [2, 4, 1, 3, 0]


def test_one_that_is_preempted_comes_back_to_its_place() -> None:
    made = [sequence() for _ in range(4)]
    queue = queue_of(*made)
    for _ in range(3):
        take(queue)
    for back in (made[1], made[0]):
        back.status = SequenceStatus.WAITING
        queue.push(back)
    assert [made.index(take(queue)) for _ in range(3)] == [0, 1, 3]
    assert queue.pick() is None


def test_short_ones_are_found_behind_long_ones_and_tiers_with_none_are_passed_over() -> None:
    long = [sequence(Tier.PREMIUM, is_long=True), sequence(is_long=True), sequence(tenant="b", is_long=True)]
    queue = queue_of(*long)
    assert not queue.buckets.get(False)
    assert queue.pick(bucket=False) is None
    short = sequence(tenant="b")
    queue.push(short)
    assert queue.buckets.get(False)
    assert queue.pick() is long[0]
    assert take(queue, bucket=False) is short
    assert not queue.buckets.get(False)
    assert [take(queue) for _ in long] == long


def test_only_one_tier_is_looked_at_where_asked_for() -> None:
    standard, batch = sequence(), sequence(Tier.BATCH)
    queue = queue_of(standard, batch)
    assert queue.pick(only=Tier.PREMIUM) is None
    assert queue.pick(only=Tier.BATCH) is batch


def test_what_waits_no_more_is_not_kept() -> None:
    queue = queue_of(sequence())
    for _ in range(5000):
        item = sequence()
        queue.push(item)
        queue.remove(item)
        item.status = SequenceStatus.FINISHED
    [tenant] = queue._tiers[Tier.STANDARD].tenants.values()
    assert len(queue) == 1
    assert sum(map(len, tenant.heaps.values())) <= 2 + 64 + 1
    item = take(queue)
    assert tenant.heaps == {}, "not even until its tenant comes again"
    with pytest.raises(AssertionError, match="twice"):
        queue.remove(item)


class QueueMachine(RuleBasedStateMachine):
    """The queue beside a plain list of all that wait, and counters that are counted again."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: FairQueue[Sequence] = FairQueue(WEIGHTS)
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []

    @rule(
        tier=st.sampled_from(list(Tier)),
        tenant=st.sampled_from("abc"),
        is_long=st.booleans(),
        deadline_s=st.integers(0, 5),
    )
    def push(self, tier: Tier, tenant: str, *, is_long: bool, deadline_s: int) -> None:
        weight = {"a": 1.0, "b": 1.0, "c": 3.0}[tenant]
        self._push(sequence(tier, tenant, is_long=is_long, deadline_s=float(deadline_s), weight=weight))

    def _push(self, item: Sequence) -> None:
        tiers = self.queue._tiers
        served = {name: tier.served for name, tier in tiers.items()}
        backlogged = {other.request.tier for other in self.waiting}
        self.queue.push(item)
        tier = item.request.tier
        if backlogged and tier not in backlogged:
            served[tier] = max(served[tier], min(served[name] for name in backlogged))
        if backlogged:
            assert {name: tier.served for name, tier in tiers.items()} == served
        own = [other.account for other in self.waiting if other.request.tier is tier]
        if own and item.account not in own:
            assert item.account is not None
            assert item.account.served >= min(account.served for account in own if account is not None)
        self.waiting.append(item)

    @precondition(lambda self: self.waiting)
    @rule(takes_long=st.booleans(), cost=st.integers(0, 20))
    def take(self, *, takes_long: bool, cost: int) -> None:
        candidates = [item for item in self.waiting if takes_long or not item.is_long]
        picked = self.queue.pick() if takes_long else self.queue.pick(bucket=False)
        if not candidates:
            assert picked is None
            return
        assert picked in candidates
        tiers = self.queue._tiers
        ranks = list(Tier)
        best = min((tiers[item.request.tier].served, ranks.index(item.request.tier)) for item in candidates)
        in_tier = [item for item in candidates if item.request.tier is ranks[best[1]]]
        smallest = min(item.account.served for item in in_tier if item.account is not None)
        in_tenants = [item for item in in_tier if item.account is not None and item.account.served == smallest]
        places = {item: (item.request.deadline_s, item.request.request_id) for item in in_tenants}
        assert picked in places
        assert picked is not None
        assert picked.account is not None
        assert places[picked] == min(place for item, place in places.items() if item.account is picked.account)
        self.leave(picked, SequenceStatus.RUNNING)
        picked.account.charge(cost)
        self.running.append(picked)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), cost=st.integers(0, 20))
    def preempt(self, data: st.DataObject, cost: int) -> None:
        item = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        assert item.account is not None
        item.account.charge(cost)
        item.status = SequenceStatus.WAITING
        self._push(item)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        self.leave(data.draw(st.sampled_from(self.waiting)), SequenceStatus.FINISHED)

    def leave(self, item: Sequence, status: SequenceStatus) -> None:
        self.queue.remove(item)
        item.status = status
        self.waiting.remove(item)
        assert len(self.queue) == len(self.waiting)
        assert bool(self.queue.buckets.get(False)) == any(not other.is_long for other in self.waiting)


TestQueueMachine: Any = QueueMachine.TestCase
TestQueueMachine.settings = settings(max_examples=100, stateful_step_count=40, derandomize=True, deadline=None)


@pytest.mark.parametrize("num_waiting", [2, 5])
def test_a_tenants_flows_have_its_weight_together_and_equal_parts_of_it(num_waiting: int) -> None:
    weights = {"alice/1": 2.0, "alice/17": 2.0, "alice/200": 2.0, "bob": 1.0}
    queue = queue_of(*(sequence(tenant=name, weight=weights[name]) for name in list(weights) * num_waiting))
    served = dict.fromkeys(weights, 0)
    for _ in range(900):
        request = take(queue, cost=10).request
        served[request.tenant] += 1
        queue.push(sequence(tenant=request.tenant, weight=request.weight))
    assert served == pytest.approx({"alice/1": 200, "alice/17": 200, "alice/200": 200, "bob": 300}, abs=2)


def test_a_flow_has_what_its_tenants_others_leave() -> None:
    queue = queue_of(*(sequence(tenant="alice/1") for _ in range(20)), *(sequence(tenant="bob") for _ in range(20)))
    queue.push(sequence(tenant="alice/2"))
    order = [take(queue, cost=10).request.tenant for _ in range(21)]
    assert order.count("alice/2") == 1
    assert abs(order.count("bob") - order.count("alice/1")) <= 2
