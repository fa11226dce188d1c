"""What admission predicts, against fair queueing played out token by token, and the books that it keeps."""

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings, strategies as st

from headrace.scheduler.messages import LoadSnapshot, Tier
from headrace.server.admission import Admission, Demand, Prediction, queue_part, retry_after_s
from headrace.server.errors import OverloadedError

WEIGHTS = {Tier.PREMIUM: 8.0, Tier.STANDARD: 3.0, Tier.BATCH: 1.0}
TARGETS_S = {Tier.PREMIUM: 1.0, Tier.STANDARD: 2.0, Tier.BATCH: 10.0}
# Busy: 100 prompt tokens and two ends a second, nobody can start at once; idle it would be 400.
LOAD = LoadSnapshot(
    num_running=4, prefill_tokens_per_s=100.0, idle_tokens_per_s=400.0, completions_per_s=2.0, step_s=0.125
)
# Ends come so often that nobody has to wait for one.
ROOMY = LoadSnapshot(num_running=4, prefill_tokens_per_s=100.0, completions_per_s=1e9)


class Clocked:
    """An admission on a clock of the test's, which has learned that its predictions are exact."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.ids: Iterator[int] = itertools.count()
        self.admission = Admission(WEIGHTS, lambda: self.now_s)
        self.admission.targets_s = TARGETS_S
        self.learn(1.0)

    def learn(self, ratio: float, num: int = 128) -> None:
        for _ in range(num):
            self.admission.observe(1.0, ratio)

    def enter(self, tenant: str, num_tokens: int, tier: Tier = Tier.STANDARD, weight: float = 1.0) -> int:
        request_id = next(self.ids)
        self.admission.enter(request_id, Demand(tier, tenant, weight, num_tokens))
        return request_id

    def stop_arriving(self) -> None:
        """Let so much time pass that nobody is expected to send more."""
        self.now_s += 1000.0

    def predict(self, demand: Demand, load: LoadSnapshot = LOAD) -> Prediction:
        return self.admission.predict(load, demand)

    def is_admitted(self, demand: Demand, load: LoadSnapshot = LOAD) -> bool:
        try:
            self.admission.admit(load, demand)
        except OverloadedError:
            return False
        return True

    def assert_empty(self) -> None:
        assert self.admission.num_queued_tokens == 0
        assert [self.admission.num_queued(tier) for tier in Tier] == [0, 0, 0]
        assert not self.admission._demands
        assert not any(queue.requests for queues in self.admission._queues.values() for queue in queues.values())


def mine(num_tokens: int, tier: Tier = Tier.STANDARD, weight: float = 1.0, num_sequences: int = 1) -> Demand:
    return Demand(tier, "mine", weight, num_tokens, num_sequences)


# Fair queueing


@dataclass
class Flow:
    """A tenant in the play: what is left of it to serve, what comes per piece served, and what it has been served."""

    tier: Tier
    weight: float
    left: float
    served: float = 0.0
    is_own: bool = field(default=False)


def play(flows: list[Flow], num_served: int = 0) -> int:
    """Serve pieces one by one, always of the tier and in it of the tenant that has had least for its weight, until
    all of the own ones are; returns how many that took."""
    own = next(flow for flow in flows if flow.is_own)
    in_tier = Counter[Tier]()
    while own.left > 0:
        waiting = [flow for flow in flows if flow.left > 0]
        tier = min({flow.tier for flow in waiting}, key=lambda tier: in_tier[tier] / WEIGHTS[tier])
        flow = min((flow for flow in waiting if flow.tier is tier), key=lambda flow: flow.served / flow.weight)
        flow.left -= 1
        flow.served += 1
        in_tier[tier] += 1
        num_served += 1
    return num_served


def rounding(flows: list[Flow]) -> float:
    """How far the play and a fluid can be apart: a piece for each tenant of the tier, and what the other tiers get
    beside these."""
    own = next(flow for flow in flows if flow.is_own)
    in_tier = sum(1 + flow.weight / own.weight for flow in flows if flow.tier is own.tier)
    others = {flow.tier for flow in flows} - {own.tier}
    return in_tier + sum(1 + WEIGHTS[tier] / WEIGHTS[own.tier] * in_tier for tier in others)


TENANTS = st.lists(
    st.tuples(
        st.sampled_from(Tier),
        st.sampled_from([0.5, 1.0, 2.0, 5.0]),
        st.lists(st.integers(1, 150), min_size=1, max_size=4),
    ),
    max_size=6,
)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    others=TENANTS,
    tier=st.sampled_from(Tier),
    weight=st.sampled_from([0.5, 1.0, 2.0]),
    waiting=st.lists(st.integers(1, 100), max_size=3),
    num_tokens=st.integers(1, 200),
)
def test_the_work_before_a_first_token_is_what_fair_queueing_serves_before_it(
    others: list[tuple[Tier, float, list[int]]], tier: Tier, weight: float, waiting: list[int], num_tokens: int
) -> None:
    clocked = Clocked()
    flows = [Flow(tier, weight, sum(waiting) + num_tokens, is_own=True)]
    for size in waiting:
        clocked.enter("mine", size, tier, weight)
    for i, (other_tier, other_weight, sizes) in enumerate(others):
        flows.append(Flow(other_tier, other_weight, sum(sizes)))
        for size in sizes:
            clocked.enter(f"other-{i}", size, other_tier, other_weight)
    clocked.stop_arriving()
    expected_s = play(flows) / ROOMY.prefill_tokens_per_s
    predicted = clocked.predict(mine(num_tokens, tier, weight), ROOMY)
    tolerance_s = rounding(flows) / ROOMY.prefill_tokens_per_s
    assert predicted.raw_s == pytest.approx(expected_s, abs=tolerance_s)


@settings(max_examples=40, derandomize=True, deadline=None)
@given(
    others=st.lists(st.tuples(st.sampled_from(Tier), st.sampled_from([1.0, 4.0]), st.integers(1, 60)), max_size=5),
    num_waiting=st.integers(0, 40),
    num_sequences=st.integers(1, 8),
    num_startable=st.sampled_from([0.0, 3.5, 30.0]),
)
def test_ends_are_waited_for_as_many_as_start_before_it_in_fair_queueing_and_find_no_free_place(
    others: list[tuple[Tier, float, int]], num_waiting: int, num_sequences: int, num_startable: float
) -> None:
    load = LoadSnapshot(
        num_running=4, prefill_tokens_per_s=1e9, completions_per_s=2.0, num_startable=num_startable, step_s=0.125
    )
    clocked = Clocked()
    flows = [Flow(Tier.STANDARD, 1.0, num_waiting + num_sequences, is_own=True)]
    for _ in range(num_waiting):
        clocked.enter("mine", 1)
    for i, (tier, weight, num) in enumerate(others):
        flows.append(Flow(tier, weight, num))
        for _ in range(num):
            clocked.enter(f"other-{i}", 1, tier, weight)
    clocked.stop_arriving()
    num_ends = max(0.0, play(flows) - num_startable)
    predicted = clocked.predict(mine(1, num_sequences=num_sequences), load)
    assert predicted.raw_s == pytest.approx(num_ends / 2 + 0.125, abs=rounding(flows) / 2)


@pytest.mark.parametrize("tier", Tier)
def test_of_others_no_more_counts_than_waits_and_their_weights_are_worth(tier: Tier) -> None:
    clocked = Clocked()
    clocked.enter("mine", 50, tier)
    clocked.enter("heavy", 1000, tier, weight=3.0)
    clocked.enter("light", 10, tier, weight=3.0)
    clocked.stop_arriving()
    own, heavy, light = 50 + 30, 3 * 80, 10
    predicted = clocked.predict(mine(30, tier), ROOMY)
    assert predicted.raw_s == pytest.approx((own + heavy + light) / 100)


def test_a_lower_tier_costs_a_higher_one_what_its_weight_is_worth_and_no_more() -> None:
    clocked = Clocked()
    clocked.enter("b", 10_000, Tier.BATCH)
    clocked.stop_arriving()
    assert clocked.predict(mine(80, Tier.PREMIUM), ROOMY).raw_s == pytest.approx((80 + 80 / 8) / 100)
    clocked.enter("s", 12, Tier.STANDARD)
    clocked.stop_arriving()
    assert clocked.predict(mine(80, Tier.PREMIUM), ROOMY).raw_s == pytest.approx((80 + 80 / 8 + 12) / 100)


def test_who_keeps_sending_is_counted_with_what_will_come_meanwhile() -> None:
    flowing = Clocked()
    for _ in range(400):  # 40 tokens a second, of which a tenth waits at the end
        flowing.now_s += 0.25
        last = flowing.enter("other", 10)
        if flowing.admission.num_queued_tokens > 40:
            flowing.admission.leave(last)
    waiting = flowing.admission.num_queued_tokens
    predicted_s = flowing.predict(mine(200), ROOMY).raw_s
    # In s seconds 100 s are served: ours, and the other's that waits and comes in them.
    assert predicted_s == pytest.approx((200 + waiting) / (100 - 40), rel=0.1)
    flowing.stop_arriving()
    assert flowing.predict(mine(200), ROOMY).raw_s == pytest.approx((200 + waiting) / 100)


# The formula


def test_a_prediction_is_kappa_times_the_longer_of_work_and_ends_and_a_step() -> None:
    clocked = Clocked()
    for _ in range(3):
        clocked.enter("mine", 40)
    clocked.stop_arriving()
    work_s, ends_s = (3 * 40 + 80) / 100, 4 / 2
    assert clocked.predict(mine(80)).raw_s == pytest.approx(max(work_s, ends_s) + 0.125)
    assert clocked.predict(mine(380)).raw_s == pytest.approx(5.0 + 0.125)
    assert clocked.predict(mine(1, num_sequences=9)).raw_s == pytest.approx(12 / 2 + 0.125)
    clocked.learn(1.5)
    predicted = clocked.predict(mine(380))
    assert predicted.raw_s == pytest.approx(5.0 + 0.125)
    own_s = 380 / 100
    assert predicted.ttft_s == pytest.approx(1.5 * (predicted.raw_s - own_s) + own_s), "its own prompt is no guess"


def test_what_running_prompts_still_need_comes_first() -> None:
    load = LoadSnapshot(num_running=4, prefill_tokens_per_s=100.0, completions_per_s=1e9, num_prefill_tokens=250)
    assert Clocked().predict(mine(50), load).raw_s == pytest.approx(3.0)


def test_free_places_make_waiting_for_ends_needless() -> None:
    clocked = Clocked()
    for _ in range(3):
        clocked.enter("mine", 0)
    clocked.stop_arriving()

    def raw_s(num_startable: float) -> float:
        load = LoadSnapshot(
            num_running=4, prefill_tokens_per_s=1e9, completions_per_s=2.0, num_startable=num_startable, step_s=0.125
        )
        return clocked.predict(mine(0), load).raw_s

    assert [raw_s(num) for num in (0, 1, 3.5, 4, 100)] == pytest.approx([2.125, 1.625, 0.375, 0.125, 0.125], abs=1e-6)


@pytest.mark.parametrize("tier", Tier)
def test_a_tiers_longest_prediction_is_that_of_its_tenant_with_most_waiting_for_its_weight(tier: Tier) -> None:
    clocked = Clocked()

    def longest_s() -> float:
        return clocked.admission.predict_longest(ROOMY, tier)

    assert longest_s() == pytest.approx(0, abs=1e-6), "nobody waits"
    clocked.enter("light", 300, tier)
    clocked.enter("heavy", 400, tier, weight=4.0)
    clocked.stop_arriving()
    # The light one's 300 tokens, and all 400 of the other, which has four times its share.
    assert longest_s() == pytest.approx((300 + 400) / 100)
    assert longest_s() == clocked.predict(Demand(tier, "light", 1.0, 0), ROOMY).ttft_s


def test_on_an_idle_server_the_next_first_token_waits_for_nothing_not_even_for_a_step() -> None:
    clocked = Clocked()
    idle = LoadSnapshot(prefill_tokens_per_s=100.0, step_s=0.5)
    assert clocked.admission.predict_longest(idle, Tier.STANDARD) == 0
    clocked.enter("other", 0)
    assert clocked.admission.predict_longest(idle, Tier.STANDARD) == 0.5


@pytest.mark.parametrize("tier", Tier)
def test_the_target_is_the_tiers_and_the_time_its_own_prompt_takes_on_an_idle_server(tier: Tier) -> None:
    clocked = Clocked()
    clocked.enter("other", 10_000, tier)
    clocked.learn(3.0)
    assert clocked.predict(mine(1000, tier)).target_s == pytest.approx(0.8 * TARGETS_S[tier] + 1000 / 400)


def test_a_request_is_admitted_up_to_its_target_and_refused_beyond_with_the_figures() -> None:
    clocked = Clocked()
    clocked.enter("mine", 100)
    clocked.stop_arriving()
    admitted = [clocked.is_admitted(mine(num_tokens)) for num_tokens in range(200)]
    assert admitted == sorted(admitted, reverse=True), "the longest are refused"
    last = clocked.predict(mine(sum(admitted) - 1))
    # (100 + u) / 100 + 0.125 against 2 + u / 400, of which some is kept.
    assert 0.5 * last.target_s < last.ttft_s <= last.target_s
    with pytest.raises(OverloadedError) as caught:
        clocked.admission.admit(LOAD, mine(1000))
    error = caught.value
    assert (error.status, error.code) == (429, "predicted_too_late")
    assert error.details == {"tier": "standard", "predicted_ttft_s": 11.125, "target_ttft_s": 4.1}
    assert 0.75 * (11.125 - 4.1) <= error.retry_after_s <= 1.25 * (11.125 - 4.1)
    assert clocked.admission.num_queued(Tier.STANDARD) == 1, "who is refused is in no book"


@pytest.mark.parametrize("tier", Tier)
def test_an_idle_server_takes_everything(tier: Tier) -> None:
    clocked = Clocked()
    clocked.learn(3.0)
    idle = LoadSnapshot(prefill_tokens_per_s=1.0, idle_tokens_per_s=1.0, completions_per_s=0.001, step_s=9.0)
    enormous = mine(10**6, tier, num_sequences=128)
    assert clocked.is_admitted(enormous, idle)
    # It is idle no more with somebody running, or submitted and not yet begun.
    running = LoadSnapshot(
        num_running=1, prefill_tokens_per_s=1.0, idle_tokens_per_s=1.0, completions_per_s=0.001, step_s=9.0
    )
    assert not clocked.is_admitted(enormous, running)
    request_id = clocked.enter("other", 0, tier)
    assert not clocked.is_admitted(enormous, idle)
    clocked.admission.leave(request_id)
    assert clocked.is_admitted(enormous, idle)


def test_as_long_as_no_step_has_been_seen_everybody_is_admitted() -> None:
    clocked = Clocked()
    for _ in range(50):
        clocked.enter("other", 10**6, Tier.PREMIUM)
    for load in (LoadSnapshot(num_running=9), LoadSnapshot(num_running=9, completions_per_s=0.001)):
        assert clocked.predict(mine(10**6), load).ttft_s == 0
        assert clocked.is_admitted(mine(10**6), load)
    for seconds in (clocked.admission.position(LoadSnapshot(num_running=9), 3) or (0, math.inf))[1:]:
        assert seconds == 0


# What it learns


def test_kappa_follows_what_first_tokens_took_and_stays_within_its_bounds() -> None:
    clocked = Clocked()
    for ratio, expected in ((1.0, 1.0), (1.7, 1.7), (100.0, 3.0), (0.9, 0.9), (0.0, 0.8), (2.5, 2.5)):
        clocked.learn(ratio)
        assert clocked.admission.kappa == expected


def test_kappa_is_a_high_percentile_so_that_most_first_tokens_come_in_time() -> None:
    clocked = Clocked()
    for i in range(128):
        clocked.learn(0.9 if i % 4 else 1.8, 1)
    assert clocked.admission.kappa == 1.8
    for i in range(256):
        clocked.learn(2.9 if i == 77 else 0.9, 1)
    assert clocked.admission.kappa == 0.9, "one is no percentile"


def test_before_anything_is_learned_predictions_are_stretched_rather_than_trusted() -> None:
    assert 1.0 <= Admission(WEIGHTS, lambda: 0.0).kappa <= 3.0


def test_what_was_predicted_as_next_to_nothing_teaches_nothing() -> None:
    clocked = Clocked()
    for predicted_s in (0.0, 1e-9, 0.019):
        for _ in range(128):
            clocked.admission.observe(predicted_s, 60.0)
    assert clocked.admission.kappa == 1.0


def test_a_tenant_whose_prompts_are_found_in_the_cache_is_predicted_a_shorter_wait_and_nobody_else() -> None:
    clocked = Clocked()
    before = clocked.predict(mine(400), ROOMY)
    for _ in range(50):
        clocked.admission.leave(clocked.enter("mine", 400), num_cached=300)
    clocked.stop_arriving()
    clocked.admission.leave(clocked.enter("mine", 400), num_cached=300)  # it is not forgotten
    for _ in range(50):
        clocked.admission.leave(clocked.enter("mine", 400), num_cached=300)
    other = Demand(Tier.STANDARD, "other", 1.0, 400)
    clocked.now_s += 59
    after = clocked.predict(mine(400), ROOMY)
    assert before.raw_s == pytest.approx(4.0)
    assert after.raw_s == pytest.approx(1.0, rel=0.02)
    # What of it waits is as short for others; their own prompts are not.
    assert clocked.predict(other, ROOMY).raw_s == pytest.approx(4.0, rel=0.02)
    clocked.enter("mine", 400)
    clocked.now_s += 1000
    assert clocked.predict(other, ROOMY).raw_s == pytest.approx(4.0 + 1.0, rel=0.02)
    # The target falls along: a prompt that is in the cache takes no time on an idle server either.
    assert clocked.predict(mine(400)).target_s == pytest.approx(0.8 * 2.0 + 100 / 400, rel=0.02)


def test_what_was_cancelled_while_it_waited_says_nothing_about_the_cache() -> None:
    clocked = Clocked()
    for _ in range(50):
        clocked.admission.leave(clocked.enter("mine", 400))
    assert clocked.predict(mine(400), ROOMY).raw_s >= 4.0


# Books


def test_leaving_twice_or_without_having_come_is_harmless() -> None:
    clocked = Clocked()
    first, second = clocked.enter("mine", 10), clocked.enter("mine", 20)
    for _ in range(3):
        clocked.admission.leave(first, num_cached=0)
        clocked.admission.leave(first)
        clocked.admission.leave(999)
        assert clocked.admission.num_queued_tokens == 20
        assert clocked.admission.num_queued(Tier.STANDARD) == 1
    clocked.admission.leave(second)
    clocked.assert_empty()


@settings(max_examples=50, derandomize=True, deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(Tier), st.integers(0, 5), st.integers(0, 1000), st.integers(0, 30)), max_size=40
    )
)
def test_the_books_hold_what_waits_and_nothing_once_everything_has_left(
    steps: list[tuple[Tier, int, int, int]],
) -> None:
    clocked = Clocked()
    waiting: dict[int, tuple[Tier, int]] = {}
    for i, (tier, tenant, num_tokens, leaver) in enumerate(steps):
        clocked.now_s += i % 7 * 20
        waiting[clocked.enter(f"t{tenant}", num_tokens, tier, 1.0 + tenant)] = tier, num_tokens
        if leaver in waiting:
            clocked.admission.leave(leaver, num_cached=min(leaver, waiting[leaver][1]))
            del waiting[leaver]
        assert clocked.admission.num_queued_tokens == sum(num for _, num in waiting.values())
        for tier in Tier:
            assert clocked.admission.num_queued(tier) == sum(tier is other for other, _ in waiting.values())
        assert all(clocked.admission.position(LOAD, id) for id in waiting)
    for request_id in waiting:
        clocked.admission.leave(request_id)
    clocked.assert_empty()


def test_tenants_that_have_not_come_for_long_are_forgotten_but_not_while_something_of_theirs_waits() -> None:
    clocked = Clocked()
    waiting = clocked.enter("patient", 10)
    for i in range(1000):
        clocked.admission.leave(clocked.enter(f"t{i}", 10))
        clocked.now_s += 1
    [queues] = [queues for queues in clocked.admission._queues.values() if queues]
    assert len(queues) < 100
    assert clocked.admission.num_queued_tokens == 10
    clocked.admission.leave(waiting)
    clocked.assert_empty()


# Places


def positions(clocked: Clocked, request_ids: list[int], load: LoadSnapshot = LOAD) -> list[tuple[int, float]]:
    found = [clocked.admission.position(load, request_id) for request_id in request_ids]
    assert None not in found
    return [place for place in found if place is not None]


@settings(max_examples=50, derandomize=True, deadline=None)
@given(tenants=TENANTS)
def test_places_are_those_of_fair_queueing_from_one_on_each_once(tenants: list[tuple[Tier, float, list[int]]]) -> None:
    clocked = Clocked()
    ids: dict[str, list[int]] = {}
    for i, (tier, weight, sizes) in enumerate(tenants):
        ids[f"t{i}"] = [clocked.enter(f"t{i}", size, tier, weight) for size in sizes]
    everybody = [id for own in ids.values() for id in own]
    found = positions(clocked, everybody)
    assert sorted(place for place, _ in found) == list(range(1, len(everybody) + 1))
    place = dict(zip(everybody, [place for place, _ in found], strict=True))
    etas = [eta for _, eta in sorted(found)]
    assert etas == sorted(etas), "who comes later waits longer"
    for i, (tier, weight, sizes) in enumerate(tenants):
        own = ids[f"t{i}"]
        assert [place[id] for id in own] == sorted(place[id] for id in own), "a tenant's own in their order"
        # Before its last request nothing goes that fair queueing would serve after it.
        if len({tier for tier, _, _ in tenants}) == 1:
            finish = sum(1 + size for size in sizes) / weight
            for j, (_, other_weight, other_sizes) in enumerate(tenants):
                served = list(itertools.accumulate(1 + size for size in other_sizes))
                for other, total in zip(ids[f"t{j}"], served, strict=True):
                    if not math.isclose(total / other_weight, finish):
                        assert (place[other] < place[own[-1]]) == (total / other_weight < finish)


def test_a_small_tenant_and_a_high_tier_do_not_stand_behind_a_long_queue() -> None:
    clocked = Clocked()
    many = [clocked.enter("many", 100) for _ in range(20)]
    batch = [clocked.enter("batch", 100, Tier.BATCH) for _ in range(20)]
    [one] = [clocked.enter("one", 100)]
    [high] = [clocked.enter("high", 100, Tier.PREMIUM)]
    places = dict(zip([*many, *batch, one, high], positions(clocked, [*many, *batch, one, high]), strict=True))
    assert places[high][0] == 1
    assert places[one][0] in (2, 3)
    assert places[batch[0]][0] <= 6, "it has its share too"
    assert max(places.values())[0] == 42


def test_the_estimate_beside_a_place_is_the_formulas() -> None:
    clocked = Clocked()
    clocked.learn(1.5)
    ids = [clocked.enter("mine", 100) for _ in range(3)]
    for place, eta in positions(clocked, ids):
        assert eta == pytest.approx(1.5 * (max(place * 100 / 100, place / 2) + 0.125), abs=1e-3)
    assert [place for place, _ in positions(clocked, ids)] == [1, 2, 3]


def test_who_has_begun_has_no_place_and_the_others_move_up() -> None:
    clocked = Clocked()
    ids = [clocked.enter("mine", 10) for _ in range(4)]
    assert [place for place, _ in positions(clocked, ids)] == [1, 2, 3, 4]
    clocked.admission.leave(ids[0], num_cached=0)
    assert clocked.admission.position(LOAD, ids[0]) is None
    assert clocked.admission.position(LOAD, 999) is None
    clocked.now_s += 1
    assert [place for place, _ in positions(clocked, ids[1:])] == [1, 2, 3]


def test_one_computation_serves_many_askers_and_those_who_come_meanwhile_are_told_the_last_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clocked = Clocked()
    num_computations = 0
    find_positions = clocked.admission._find_positions

    def counted() -> dict[int, tuple[int, float]]:
        nonlocal num_computations
        num_computations += 1
        return find_positions()

    monkeypatch.setattr(clocked.admission, "_find_positions", counted)
    ids = [clocked.enter(f"t{i % 10}", 10) for i in range(500)]
    for _ in range(5):
        positions(clocked, ids)
    assert num_computations == 1
    # A burst of new ones, each asking at once, does not have everything computed for each.
    for i in range(40):
        new = clocked.enter("new", 10)
        clocked.now_s += 0.0001
        [(place, eta)] = positions(clocked, [new])
        assert place == 501 + i
        assert eta >= positions(clocked, ids)[-1][1]
    assert num_computations == 1
    clocked.now_s += 0.1
    [(place, _)] = positions(clocked, [new])
    assert num_computations == 2
    assert place < 500, "its tenant has fewer than the others"


# Coming back


@pytest.mark.parametrize("wait_s", [0.0, 0.001, 1.0, 7.0, 95.0, 120.0, 1e6])
def test_when_to_come_back_is_spread_out_and_within_what_clients_wait(wait_s: float) -> None:
    drawn = [retry_after_s(wait_s) for _ in range(2000)]
    middle = min(96.0, max(1.0, wait_s))
    assert 0.75 * middle <= min(drawn) < 0.8 * middle
    assert 1.2 * middle < max(drawn) <= 1.25 * middle
    assert max(drawn) <= 120


def test_a_requests_own_target_stands_in_place_of_its_tiers() -> None:
    clocked = Clocked()
    clocked.enter("b", 40)
    clocked.stop_arriving()
    demand = Demand(Tier.STANDARD, "a", 1.0, 100)
    assert clocked.is_admitted(demand)
    for target_s in (0.5, 20.0):
        prediction = clocked.predict(replace(demand, ttft_target_s=target_s))
        assert prediction.target_s == pytest.approx(0.8 * target_s + 0.25)  # its own prompt's time when idle
        assert prediction.ttft_s == clocked.predict(demand).ttft_s
    assert not clocked.is_admitted(replace(demand, ttft_target_s=0.5))
    slow = replace(demand, num_tokens=1000)
    for _ in range(4):
        clocked.enter("a", 1000)
    clocked.stop_arriving()
    assert not clocked.is_admitted(slow)
    assert clocked.is_admitted(replace(slow, ttft_target_s=100.0))


def test_a_tenants_flows_wait_as_if_it_were_one_beside_others_and_by_turns_among_themselves() -> None:
    def raw_s(own: str, waiting: dict[str, int]) -> float:
        clocked = Clocked()
        for tenant, num_tokens in waiting.items():
            clocked.enter(tenant, num_tokens)
        clocked.stop_arriving()
        return clocked.predict(Demand(Tier.STANDARD, own, 1.0, 100), ROOMY).raw_s

    many = 10_000
    # Beside bob, who has as much weight as all of alice's flows, a flow's 100 tokens come among twice all flows' 100.
    assert raw_s("alice", {"bob": many}) == pytest.approx(2.0)
    assert raw_s("alice/1", {"alice/2": many}) == pytest.approx(2.0)
    assert raw_s("alice/1", {"alice/2": many, "bob": many}) == pytest.approx(4.0)
    assert raw_s("bob", {"alice/1": many, "alice/2": many}) == pytest.approx(2.0)
    assert raw_s("bob", {"alice": many, "carol": many}) == pytest.approx(3.0)


def test_of_a_full_queue_tenants_have_equal_parts_and_a_tenants_flows_share_its_own() -> None:
    assert queue_part("a", set()) == 1
    assert queue_part("a", {"a", "b"}) == queue_part("c", {"a/1", "a/2"}) == 1 / 2
    assert queue_part("a/1", {"a/2", "b"}) == queue_part("a", {"a/2", "b"}) == 1 / 4
    assert queue_part("/1", {"/2", "/3"}) == 1 / 3
