"""The scheduler's rules one by one, and many random lives, with a model that is a fixed function."""

import dataclasses
import itertools
import random
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from fake_engine import drawn_tokens, next_token, run
from headrace.kernels.step_times import StepTimes
from headrace.scheduler.block_pool import BlockPool
from headrace.scheduler.config import SchedulingPolicy
from headrace.scheduler.messages import FinishReason, GenerationRequest, SamplingParams, SequenceOutput, Tier
from headrace.scheduler.scheduler import Scheduler, SchedulerOutput
from headrace.scheduler.sequence import Sequence
from headrace.scheduler.step_time import StepShape

BLOCK_SIZE = 4
SALTS = itertools.count()


def request(id: int, num_prompt: int = 8, max_tokens: int = 8, **fields: Any) -> GenerationRequest:
    """A prompt of its own, with no beginning that another has."""
    sampling = SamplingParams(max_tokens=max_tokens)
    prompt = tuple((id * 7 + i) % 200 for i in range(num_prompt))
    fields = {"cache_salt": b"%d" % next(SALTS)} | fields
    return GenerationRequest(id, prompt, sampling, 0.0, **fields)


def alone(request: GenerationRequest) -> list[int]:
    token_ids = list(request.prompt_token_ids)
    for _ in range(request.sampling.max_tokens):
        token_ids.append(next_token(token_ids))
    return token_ids[len(request.prompt_token_ids) :]


class Life:
    """A scheduler and all it has said of each request. Steps take a second by this clock, whatever they are said to
    have taken: a + b P + g D + h K with `costs_s`, which the scheduler knows from the start."""

    def __init__(
        self,
        num_blocks: int = 64,
        budget: int = 64,
        max_num_seqs: int = 32,
        *,
        block_size: int = BLOCK_SIZE,
        costs_s: tuple[float, float, float, float] | None = None,
        has_short_answers: bool = False,
        **policy: Any,
    ) -> None:
        self.scheduler = Scheduler(
            BlockPool(num_blocks),
            block_size=block_size,
            max_num_batched_tokens=budget,
            max_num_seqs=max_num_seqs,
            policy=SchedulingPolicy(**policy),
        )
        self.costs_s = costs_s
        if costs_s is not None:
            self.learn(costs_s)
        for _ in range(100 if has_short_answers else 0):
            self.scheduler._lengths.observe(1)
        self.requests: dict[int, GenerationRequest] = {}
        self.tokens: dict[int, list[int]] = {}
        self.ends: dict[int, list[FinishReason]] = {}
        self.first_scheduled: list[int] = []
        self.now = 0.0

    def learn(self, costs_s: tuple[float, float, float, float]) -> None:
        self.costs_s = costs_s
        for i in range(2000):
            shape = StepShape(i * 7 % 65, i % 17, i * 11 % 400)
            self.scheduler.observe(shape, self.seconds(shape))

    def seconds(self, shape: StepShape) -> float:
        assert self.costs_s is not None
        a, b, g, h = self.costs_s
        return a + b * shape.num_prompt_tokens + g * shape.num_decoding + h * shape.decode_context

    def add(self, *requests: GenerationRequest) -> None:
        for request in requests:
            self.requests[request.request_id] = request
            self.tokens[request.request_id], self.ends[request.request_id] = [], []
            self.scheduler.add(request)

    def step(self, after_s: float = 1) -> dict[int, int]:
        """One step: the number of tokens computed of each request."""
        self.now += after_s
        output = self.scheduler.schedule(self.now)
        self.record(output.dropped)
        self.update(output)
        rows = {row.sequence.request.request_id: row.num_tokens for row in output.rows}
        assert len(rows) == len(output.rows)
        return rows

    def update(self, output: SchedulerOutput) -> None:
        times = None
        if self.costs_s is not None:
            times = StepTimes(self.now, self.now + self.seconds(output.shape), None)
        self.record(self.scheduler.update(output, run(output), times))
        self.scheduler.check_books()

    def record(self, outputs: list[SequenceOutput]) -> None:
        for output in outputs:
            if output.scheduled_s is not None:
                self.first_scheduled.append(output.request_id)
            self.tokens[output.request_id] += output.token_ids
            if output.finish_reason is not None:
                self.ends[output.request_id].append(output.finish_reason)

    def finish(self) -> None:
        for _ in range(20_000):
            if not self.scheduler.has_work:
                break
            self.step()
        assert not self.scheduler.has_work, "livelock"
        load = self.scheduler.load()
        assert (load.num_running, load.num_waiting) == (0, 0)
        assert load.num_free_blocks == load.num_total_blocks
        for id, ends in self.ends.items():
            assert len(ends) == 1, f"request {id} ended {ends}"
            expected = alone(self.requests[id])
            if ends == [FinishReason.LENGTH]:
                assert self.tokens[id] == expected
            else:
                assert self.tokens[id] == expected[: len(self.tokens[id])]

    @property
    def running(self) -> list[int]:
        return sorted(self.scheduler._running)

    def sequence(self, id: int) -> Sequence:
        return self.scheduler._sequences[id]

    @property
    def num_preemptions(self) -> int:
        return self.scheduler.load().num_preemptions

    def served(self, tier: Tier = Tier.STANDARD) -> float:
        return self.scheduler._queue._tiers[tier].served


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32),
    num_blocks=st.integers(12, 40),
    budget=st.integers(1, 30),
    max_num_seqs=st.integers(1, 12),
    has_short_answers=st.booleans(),
)
def test_whatever_happens_books_add_up_and_tokens_are_those_of_each_request_alone(
    seed: int, num_blocks: int, budget: int, max_num_seqs: int, *, has_short_answers: bool
) -> None:
    max_num_seqs = min(max_num_seqs, budget)
    random_ = random.Random(seed)
    life = Life(num_blocks, budget, max_num_seqs, has_short_answers=has_short_answers)
    capacity = num_blocks * BLOCK_SIZE
    for id in range(random_.randint(1, 25)):
        num_prompt = random_.randint(1, min(40, capacity - 1))
        max_tokens = random_.randint(1, min(30, capacity - num_prompt))
        deadline_s = life.now + random_.randint(1, 20) if random_.random() < 0.1 else float("inf")
        tier, tenant = random_.choice(list(Tier)), random_.choice("ab")
        life.add(request(id, num_prompt, max_tokens, deadline_s=deadline_s, tier=tier, tenant=tenant, cache_salt=b""))
        for _ in range(random_.randint(0, 6)):
            event = random_.random()
            if event < 0.1:
                victim = random_.choice(list(life.requests))
                is_alive = not life.ends[victim]
                life.scheduler.cancel(victim)
                life.step()
                assert not is_alive or life.ends[victim], "a cancelled request is over after the next schedule()"
            elif event < 0.13 and life.running:
                life.record(life.scheduler.fail([life.sequence(random_.choice(life.running))], "told to"))
            else:
                life.step()
    life.finish()
    for tenant in "ab":
        for tier in Tier:
            own = [r for r in life.requests.values() if (r.tier, r.tenant) == (tier, tenant)]
            if all(r.deadline_s == float("inf") for r in own):
                ids = {r.request_id for r in own}
                order = [id for id in life.first_scheduled if id in ids]
                assert order == sorted(order), "inside a tenant first come, first served"


def test_a_pool_that_holds_one_request_at_its_longest_serves_many_without_livelock() -> None:
    life = Life(num_blocks=10, budget=8, max_num_seqs=8, has_short_answers=True)
    life.add(*(request(id, 10, 30) for id in range(8)))
    life.finish()
    assert life.num_preemptions > 0


# A: prompts beside decoding


def test_prompts_get_what_fits_within_the_tightest_target_of_those_that_run_beside_what_decoding_takes() -> None:
    # 5 ms, 1 ms per prompt token, 2 ms per decoding sequence, 0.01 ms per token of context.
    targets_s = {Tier.PREMIUM: 0.05, Tier.STANDARD: 0.1, Tier.BATCH: 1.0}
    life = Life(budget=500, num_blocks=500, costs_s=(0.005, 0.001, 0.002, 0.00001), itl_targets_s=targets_s)
    life.add(request(0, 20, 50, tier=Tier.STANDARD), request(1, 40, 50, tier=Tier.BATCH))
    assert life.step() == {0: 20, 1: 40}
    life.add(request(2, 600, 8, tier=Tier.BATCH))
    # 0.9 x 100 - 5 - 2 x 2 - 0.01 x 60 ms are left.
    assert life.step() == {0: 1, 1: 1, 2: pytest.approx(80, abs=1)}
    life.add(request(3, 20, 50, tier=Tier.PREMIUM))
    life.step()
    assert 3 in life.running
    # 0.9 x 50 - 5 - 3 x 2 - 0.01 x 84 ms.
    assert life.step() == {0: 1, 1: 1, 3: 1, 2: pytest.approx(33, abs=1)}
    life.scheduler.cancel(0, 1, 3)
    assert life.step() == {2: pytest.approx(220, abs=1)}, "0.9 x 250 - 5 ms, with nobody decoding"


def test_what_fits_is_learned_from_what_steps_took() -> None:
    life = Life(budget=200, num_blocks=500)
    life.costs_s = (0.0, 0.01, 0.0, 0.0)
    life.add(request(0, 300, 1))
    assert [life.step() for _ in range(3)] == [{0: 200}, {0: 22}, {0: 22}]


def test_prompts_that_decoding_leaves_no_room_for_get_a_chunk_in_every_fourth_step() -> None:
    life = Life(budget=200, num_blocks=500, costs_s=(0.05, 0.001, 0.0, 0.0), itl_targets_s=dict.fromkeys(Tier, 0.1))
    life.add(request(0, 10, 100))
    life.step()
    life.add(request(1, 140, 8))
    assert life.step() == {0: 1, 1: pytest.approx(40, abs=1)}
    life.learn((0.095, 0.001, 0.0, 0.0))  # from now on
    steps = [life.step() for _ in range(16)]
    assert [step.get(1, 0) for step in steps[3:12:4]] == [32, 32, 32]
    assert sum(step.get(1, 0) for step in steps[:15]) == 96
    assert all(step[0] == 1 for step in steps)
    life.finish()


def test_a_prompt_alone_is_computed_in_every_step_however_slow_steps_are() -> None:
    life = Life(budget=200, num_blocks=500, costs_s=(0.5, 0.001, 0.0, 0.0))
    life.add(request(0, 100, 1))
    assert [life.step() for _ in range(4)] == [{0: 32}, {0: 32}, {0: 32}, {0: 4}]


def test_no_more_are_admitted_than_can_decode_within_the_target() -> None:
    # 10 ms each: 90 of 100 ms are enough for nine, or eight and the step itself.
    life = Life(costs_s=(0.01, 0.0001, 0.01, 0.0), itl_targets_s=dict.fromkeys(Tier, 0.1001), num_blocks=500)
    life.add(*(request(id, 2, 20) for id in range(12)))
    life.step()
    life.step()
    assert life.running == list(range(8))
    life.finish()


# B: who is next


def test_inside_a_tenant_the_earliest_deadline_goes_first_then_the_oldest() -> None:
    life = Life(max_num_seqs=1, budget=64)
    deadlines_s = {0: 1e9, 1: 500.0, 2: 500.0, 3: float("inf"), 4: 400.0}
    life.add(*(request(id, 4, 2, deadline_s=at_s) for id, at_s in deadlines_s.items()))
    life.add(request(5, 4, 2, first_token_deadline_s=450.0))
    life.finish()
    assert life.first_scheduled == [4, 5, 1, 2, 0, 3]


def test_tiers_share_the_budget_by_their_weights_and_tenants_by_theirs() -> None:
    life = Life(budget=16, max_num_seqs=2)
    weights = {"light": 1.0, "heavy": 3.0}
    tenants = [(tier, tenant) for tier in Tier for tenant in weights]
    for id in range(3000):
        tier, tenant = tenants[id % 6]
        life.add(request(id, 16, 1, tier=tier, tenant=tenant, weight=weights[tenant]))
    served = dict.fromkeys(tenants, 0)
    for _ in range(800):
        for id, num_tokens in life.step().items():
            served[tenants[id % 6]] += num_tokens
    total = sum(served.values())
    shares = {Tier.PREMIUM: 8 / 12, Tier.STANDARD: 3 / 12, Tier.BATCH: 1 / 12}
    for tier, share in shares.items():
        of_tier = served[tier, "light"] + served[tier, "heavy"]
        assert of_tier / total == pytest.approx(share, rel=0.02)
        # The policy lets a tenant be early by 512 tokens of service where its prompt is cached, and none is.
        assert served[tier, "heavy"] / of_tier == pytest.approx(0.75, rel=0.05)


def test_what_the_cache_holds_and_what_is_computed_again_costs_nothing() -> None:
    life = Life(num_blocks=12, has_short_answers=True)
    prompt = request(0, 16, 1, cache_salt=b"one")
    life.add(prompt)
    life.finish()
    assert life.served() * 3 == pytest.approx(16)
    life.add(dataclasses.replace(prompt, request_id=1))
    life.finish()
    assert life.served() * 3 == pytest.approx(16 + 4), "twelve of its tokens were found"
    life.add(*(request(id, 9, 25) for id in (2, 3, 4)))
    life.finish()
    assert life.num_preemptions >= 2
    assert life.served() * 3 == pytest.approx(20 + 3 * (9 + 24))


def test_decoded_tokens_cost_what_they_take_in_prompt_tokens() -> None:
    life = Life(costs_s=(0.01, 0.001, 0.004, 0.0005))
    life.add(request(0, 8, 3))
    life.finish()
    assert life.served() * 3 == pytest.approx(8 + 2 * 4 + 0.5 * (8 + 9), rel=0.02)


def test_a_third_long_prompt_waits_and_short_ones_pass_it() -> None:
    life = Life(num_blocks=1000, budget=40, has_short_answers=True)
    life.add(*(request(id, 300, 2) for id in range(4)), request(4, 30, 2))
    assert life.step() == {0: 40}, "nobody is there yet for whom something would be kept"
    assert life.step() == {0: 28, 1: 12}, "30 % are kept where a short one waits"
    rows = life.step()
    assert rows == {0: 28, 4: 12}, "a third long one would be 2"
    life.finish()
    assert life.first_scheduled == [0, 1, 4, 2, 3]


def test_short_prompts_under_way_go_before_long_ones() -> None:
    life = Life(num_blocks=1000, budget=40, has_short_answers=True)
    life.add(request(0, 300, 2), request(1, 60, 2))
    assert life.step() == {0: 40}
    assert life.step() == {0: 28, 1: 12}
    assert life.step() == {1: 40}
    assert life.step() == {1: 8, 0: 32}


# D: admission by the projected peak


def test_nobody_is_admitted_whose_answer_would_find_no_blocks_when_the_others_have_grown() -> None:
    life = Life(num_blocks=100)
    # After a hundred answers of 80 tokens three that hold 20 can have 100 each, and a fourth would be too much.
    for _ in range(100):
        life.scheduler._lengths.observe(80)
    life.add(*(request(id, 20, 200) for id in range(5)))
    life.step()
    life.step()
    assert life.running == [0, 1, 2]
    assert life.scheduler.load().num_free_blocks > 80


def test_blocks_found_in_the_cache_count_once_whoever_holds_them_or_if_nobody_does() -> None:
    prompt = request(0, 61, 20, cache_salt=b"one")
    for is_held in (False, True):
        life = Life(num_blocks=40)
        life.add(prompt)
        while life.running != ([0] if is_held else []) or not life.first_scheduled:
            life.step()
        for _ in range(100):
            life.scheduler._lengths.observe(8)
        if not is_held:
            life.add(request(1, 65, 20))
            life.step()
        # 15 found, 6 of its own, 2 to come: too much beside 17 and 2 to come, enough beside 16 of which 15 are the
        # same.
        sharing = (*prompt.prompt_token_ids, *range(20))
        life.add(dataclasses.replace(prompt, request_id=2, prompt_token_ids=sharing))
        life.step()
        assert (2 in life.running) == is_held
        life.finish()


def test_the_last_tenth_of_the_blocks_is_for_premium() -> None:
    life = Life(num_blocks=50, has_short_answers=True)
    life.add(request(0, 100, 1, tier=Tier.PREMIUM))
    life.finish()
    life.add(request(1, 4 * 20, 8), request(2, 4 * 24, 8))
    for _ in range(4):
        life.step()
    assert life.running == [1]
    life.add(request(3, 4 * 24, 8, tier=Tier.PREMIUM))
    life.step()
    assert life.running == [1, 3]
    life.finish()


def test_only_premium_overtakes_one_that_does_not_fit() -> None:
    life = Life(num_blocks=50, has_short_answers=True)
    life.add(request(0, 4 * 20, 20, tier=Tier.BATCH))  # which has had its share then
    life.step()
    life.step()
    life.add(request(1, 4 * 40, 8), request(2, 4, 8), request(3, 4, 8, tier=Tier.BATCH, tenant="other"))
    life.add(request(4, 4, 8, tenant="other"), request(5, 4, 8, tier=Tier.PREMIUM))
    life.step()
    assert life.running == [0, 5]
    life.finish()
    assert life.first_scheduled[:3] == [0, 5, 1]


# E: preemption


def test_the_lowest_tier_goes_first_and_a_step_that_preempts_admits_nobody() -> None:
    life = Life(num_blocks=15, has_short_answers=True)
    life.add(request(0, 8, 40, tier=Tier.PREMIUM), request(1, 8, 40, tier=Tier.BATCH), request(2, 8, 40))
    preempted: list[int] = []
    while len(preempted) < 2:
        before = set(life.running)
        num_preemptions = life.num_preemptions
        rows = life.step()
        if life.num_preemptions > num_preemptions:
            preempted += before - set(life.running)
            assert set(rows) <= before
    assert preempted == [1, 2]
    life.finish()


def test_of_one_tier_the_one_goes_that_frees_most_for_what_it_takes_to_compute_again_and_of_equals_the_newest() -> None:
    life = Life(num_blocks=10, has_short_answers=True)
    life.add(request(0, 8, 20), request(1, 14, 20), request(2, 8, 20))
    while life.num_preemptions == 0:
        numbers = {id: (len(life.sequence(id).block_ids), life.sequence(id).num_computed_tokens) for id in life.running}
        life.step()
    assert numbers == {0: (3, 10), 1: (4, 16), 2: (3, 10)}
    assert life.running == [0, 1]
    life.finish()


def test_one_preempted_twice_comes_back_with_all_its_blocks() -> None:
    life = Life(num_blocks=12, max_num_seqs=8, has_short_answers=True)
    life.add(*(request(id, 5, 40, tier=Tier.BATCH if id % 2 else Tier.STANDARD) for id in range(8)))
    num_pinned = 0
    while life.scheduler.has_work:
        life.step()
        for sequence in life.scheduler._running.values():
            if sequence.num_preemptions == 2:
                num_pinned += 1
                assert len(sequence.block_ids) == -(-45 // 4)
    assert num_pinned > 0
    life.finish()


def test_nobody_is_preempted_for_the_third_time() -> None:
    life = Life(num_blocks=20, has_short_answers=True)
    life.add(request(0, 5, 40, tier=Tier.BATCH), request(1, 5, 40), request(2, 5, 40))
    life.sequence(0).num_preemptions = 2
    while life.num_preemptions == 0:
        life.step()
    assert life.running == [0, 1], "of the lowest tier and with the most blocks, and yet it stays"
    life.finish()


def test_a_premium_prompt_that_would_miss_its_target_takes_the_place_of_a_lower_tier() -> None:
    life = Life(max_num_seqs=1)
    life.add(request(0, 60, 1, tier=Tier.PREMIUM))
    life.finish()
    life.add(request(1, 4, 50, tier=Tier.BATCH), request(2, 4, 50, tier=Tier.BATCH))
    life.step()
    life.add(request(3, 4, 3, tier=Tier.PREMIUM, target_s=4.0))
    assert [life.step() for _ in range(2)] == [{1: 1}, {1: 1}], "it has time yet"
    assert not life.scheduler.may_preempt
    assert life.step() == {1: 1}
    assert life.scheduler.may_preempt, "so that no step is in flight"
    assert life.step() == {}, "a step that preempts admits nobody"
    # Premium has had more than its share, so that batch would be next.
    assert life.served(Tier.PREMIUM) > life.served(Tier.BATCH)
    assert life.step() == {3: 4}
    life.finish()
    assert life.num_preemptions == 1


def test_lower_tiers_stay_where_their_places_would_not_do_for_premium() -> None:
    life = Life(num_blocks=30, has_short_answers=True)
    life.add(request(0, 60, 50, tier=Tier.PREMIUM))
    life.step()
    life.add(request(1, 12, 20, tier=Tier.BATCH))
    life.step()
    life.add(request(2, 60, 3, tier=Tier.PREMIUM, target_s=0.0))
    while 0 in life.running:
        assert not life.scheduler.may_preempt
        life.step()
    life.finish()
    assert life.num_preemptions == 0


def test_premium_passes_a_large_prompt_of_a_lower_tier_for_no_more_service_than_that_is() -> None:
    life = Life(num_blocks=50, has_short_answers=True)
    life.add(*(request(id, 20, 10, tier=Tier.PREMIUM) for id in range(400)), request(400, 120, 1, tier=Tier.BATCH))
    while 400 not in life.first_scheduled:
        life.step()
    assert 0 < len(life.first_scheduled) < 100, "premium goes first, and not for ever"
    life.finish()


def test_a_place_made_for_a_premium_prompt_that_is_late_after_all_is_anothers_at_once() -> None:
    life = Life(max_num_seqs=1, costs_s=(0.0, 0.1, 0.1, 0.0))
    life.add(request(0, 2, 50, tier=Tier.BATCH))
    life.step()
    life.add(request(1, 4, 3, tier=Tier.PREMIUM, target_s=0.0, first_token_deadline_s=4.2))
    assert [life.step() for _ in range(3)] == [{0: 1}, {}, {0: 2}]
    assert life.ends[1] == [FinishReason.DEADLINE]
    life.finish()


def test_nobody_is_preempted_for_a_lower_tier_or_for_one_that_is_gone() -> None:
    life = Life(max_num_seqs=1)
    life.add(request(0, 4, 20, tier=Tier.PREMIUM), request(1, 4, 3, target_s=0.0))
    life.add(request(2, 4, 3, tier=Tier.PREMIUM, target_s=0.0))
    for _ in range(5):
        assert life.step().keys() == {0}
        assert not life.scheduler.may_preempt, "steps need not wait for what will not happen"
    life.scheduler.cancel(0, 1, 2)
    life.finish()
    life.add(request(3, 4, 20))
    life.step()
    life.add(request(4000, 4, 3, tier=Tier.PREMIUM, target_s=0.0))
    life.step()
    assert life.scheduler.may_preempt
    # It is gone even where there are too many cancelled ones to drop all of them at once.
    life.add(*(request(id) for id in range(10, 1010)))
    life.scheduler.cancel(4000, *range(10, 1010))
    assert life.step() == {3: 1}
    assert not life.scheduler.may_preempt
    life.finish()
    assert life.num_preemptions == 0


def test_no_more_are_preempted_for_premium_than_it_takes() -> None:
    # 0.1 ms per token of context: 450 tokens fit within the target.
    targets_s = dict.fromkeys(Tier, 0.05)
    life = Life(num_blocks=500, budget=600, costs_s=(0.0, 0.0001, 0.0, 0.0001), itl_targets_s=targets_s)
    life.add(*(request(id, 100, 50, tier=Tier.BATCH) for id in range(4)))
    life.step()
    life.step()
    assert life.running == [0, 1, 2, 3]
    life.add(request(4, 100, 5, tier=Tier.PREMIUM, target_s=0.0))
    for _ in range(3):
        life.step()
    assert life.running == [0, 1, 2, 4]
    life.finish()


# F: deadlines


def test_an_expired_request_is_dropped_waiting_or_running() -> None:
    life = Life(max_num_seqs=1)
    life.add(*(request(id, 4, 50, deadline_s=3.0) for id in range(2)))
    for _ in range(3):
        life.step()
    assert life.ends == {0: [FinishReason.DEADLINE], 1: [FinishReason.DEADLINE]}
    assert not life.scheduler.has_work


def test_a_request_that_has_begun_by_its_queue_deadline_has_met_it() -> None:
    life = Life(max_num_seqs=1, costs_s=(0.01, 0.1, 0.01, 0.0))
    life.add(*(request(id, 8, 3, queue_deadline_s=1.5) for id in range(2)))
    life.finish()
    assert life.ends == {0: [FinishReason.LENGTH], 1: [FinishReason.DEADLINE]}


@pytest.mark.parametrize("kind", ["deadline_s", "first_token_deadline_s"])
def test_a_prompt_that_cannot_be_computed_in_time_costs_nothing(kind: str) -> None:
    life = Life(costs_s=(0.0, 0.1, 0.01, 0.0))
    life.add(request(0, 40, 3, **{kind: 4.9}), request(1, 40, 3, **{kind: 5.2}))
    assert life.step() == {1: 2}, "0.225 s of prompt"
    assert life.ends == {0: [FinishReason.DEADLINE], 1: []}


def test_a_stream_without_a_token_for_too_long_has_stalled() -> None:
    life = Life(costs_s=(0.001, 0.001, 0.001, 0.0))
    life.add(request(0, 4, 20, stall_timeout_s=3.0), request(1, 4, 20, first_token_deadline_s=3.0))
    for _ in range(5):
        life.step(after_s=2.9)
    assert life.ends == {0: [], 1: []}
    life.step(after_s=3.1)
    assert life.ends == {0: [FinishReason.DEADLINE], 1: []}


def test_deadlines_are_kept_however_many_requests_came_and_went() -> None:
    rng = random.Random(1)
    life = Life(num_blocks=8, budget=4, max_num_seqs=4)
    due: list[tuple[float, int]] = []
    for now in range(2000):
        deadline_s = now + rng.choice([3, 30, 400]) * rng.random()
        life.add(request(now, 2, 30, deadline_s=deadline_s))
        due.append((deadline_s, now))
        if rng.random() < 0.9:
            life.scheduler.cancel(now)
            due.remove((deadline_s, now))
        output = life.scheduler.schedule(now)
        expired = {o.request_id for o in output.dropped if o.finish_reason is FinishReason.DEADLINE}
        assert expired == {id for at_s, id in due if at_s <= now}
        due = [entry for entry in due if entry[0] > now]
        over = {o.request_id for o in life.scheduler.update(output, run(output)) if o.finish_reason is not None}
        due = [entry for entry in due if entry[1] not in over]
    life.scheduler.check_books()


def test_nothing_is_kept_of_requests_that_are_over() -> None:
    life = Life()
    for id in range(1000):
        life.add(request(id, 4, 1, deadline_s=1e9, leader_id=id - 1))
        life.step()
        life.scheduler.cancel(id)
    life.step()
    assert len(life.scheduler._deadlines._heap) < 100
    assert not life.scheduler._cancelled
    assert not life.scheduler._followers
    [tenant] = life.scheduler._queue._tiers[Tier.STANDARD].tenants.values()
    assert tenant.heaps == {}


# G: cancellation


def test_blocks_of_a_cancelled_sequence_are_free_when_the_next_schedule_returns() -> None:
    life = Life(num_blocks=32, budget=16, max_num_seqs=4)
    life.add(request(0, 60, 8), request(1, 8, 8))
    life.step()
    assert life.scheduler.load().num_free_blocks == 32 - 15
    life.scheduler.cancel(0)
    assert life.scheduler.load().num_free_blocks == 32 - 15
    life.scheduler.schedule(2.0)
    assert life.scheduler.load().num_free_blocks == 32 - 2, "only the second one's blocks are held"


def test_thousands_of_cancels_are_dealt_with_over_steps_and_no_cancelled_prompt_is_computed() -> None:
    life = Life(max_num_seqs=2)
    life.add(*(request(id, 4, 30, deadline_s=1e9 - 10 * max(0, id - 4996) ** 2) for id in range(5000)))
    life.step()
    assert life.running == [4998, 4999]
    life.scheduler.cancel(*range(4997), 4999, 7000)
    rows = life.step()
    assert set(rows) == {4997, 4998}, "the place of the one that ran is another's, who was not cancelled"
    num_left = life.scheduler.load().num_waiting
    assert 0 < num_left <= 5000 - 256
    for _ in range(25):
        life.step()
        assert life.scheduler.load().num_waiting <= max(0, num_left - 256)
        num_left = life.scheduler.load().num_waiting
    life.finish()
    assert life.first_scheduled == [4999, 4998, 4997]
    assert all(life.ends[id] == [FinishReason.CANCELLED] for id in range(4997))


def test_with_nobody_running_all_cancelled_ones_go_at_once() -> None:
    life = Life()
    life.add(*(request(id, 4, 30) for id in range(5000)))
    life.scheduler.cancel(*range(5000))
    assert life.step() == {}
    assert not life.scheduler.has_work


def test_cancelling_what_is_unknown_or_over_does_nothing() -> None:
    life = Life()
    life.add(request(0, 4, 1))
    life.step()
    life.scheduler.cancel(0)
    life.scheduler.cancel(99)
    assert life.scheduler.schedule(9.0).dropped == []


# What a sequence gets


def test_a_stop_token_ends_a_sequence_only_from_min_tokens_on() -> None:
    made = request(0, 5, 40)
    tokens = alone(made)
    stop = tokens[3]
    first_at = tokens.index(stop)
    for min_tokens in (0, first_at, first_at + 1):
        life = Life()
        sampling = SamplingParams(max_tokens=40, min_tokens=min_tokens, stop_token_ids=frozenset({stop}))
        life.add(GenerationRequest(0, made.prompt_token_ids, sampling, 0.0))
        while not life.ends[0]:
            life.step()
        expected = next(i for i in range(40) if tokens[i] == stop and i >= min_tokens)
        assert life.tokens[0] == tokens[: expected + 1]
        assert life.ends[0] == [FinishReason.STOP]


def test_a_step_ahead_a_premium_prompt_gets_its_place_when_all_tokens_are_known() -> None:
    life = Life(max_num_seqs=2)
    life.add(request(0, 4, 20, tier=Tier.BATCH), request(1, 4, 20, tier=Tier.BATCH))
    life.step()
    life.add(request(2, 4, 3, tier=Tier.PREMIUM, target_s=0.0))
    first = life.scheduler.schedule(2.0)
    assert life.scheduler.may_preempt
    # Whoever schedules ahead all the same finds out.
    with pytest.raises(AssertionError, match="in flight"):
        life.scheduler.schedule(3.0)
    life.update(first)
    life = Life(max_num_seqs=2)
    life.add(request(0, 4, 20), request(1, 4, 20))
    life.step()
    first = life.scheduler.schedule(2.0)
    assert not life.scheduler.may_preempt
    second = life.scheduler.schedule(3.0)
    drawn = run(first)
    life.record(life.scheduler.update(first, drawn))
    life.record(life.scheduler.update(second, run(second, drawn_tokens(first, drawn))))
    life.finish()


def test_a_budget_below_the_batch_limit_is_a_bug() -> None:
    with pytest.raises(AssertionError):
        Life(budget=3, max_num_seqs=4)
