"""The policy's targets, on the simulator: virtual time, so that no machine's speed is in them."""

from dataclasses import replace

import numpy as np
import pytest

from headrace.benchmarks.ablation import Variant, capacity_per_s, run, trace_jobs
from headrace.benchmarks.simulated_server import CostModel, Job, ServerSettings, SimulatedServer
from headrace.scheduler.config import SchedulingPolicy
from headrace.scheduler.messages import Tier

NEVER = float("inf")
ITL_TARGET_S = 0.15


@pytest.fixture(scope="module")
def capacity() -> float:
    return capacity_per_s(600)


def test_at_twice_the_load_admitted_first_tokens_come_in_time_and_as_much_gets_done(capacity: float) -> None:
    at_once = [run(trace_jobs(1000, capacity, seed), Variant()) for seed in (1, 2, 3)]
    for factor in (2.0, 3.0):
        outcomes = [run(trace_jobs(1000, factor * capacity, seed), Variant()) for seed in (1, 2, 3)]
        for tier in Tier:
            assert np.median([outcome.ttft_ratio(tier) for outcome in outcomes]) <= 1
        gaps_s = np.concatenate([outcome.gaps_s() for outcome in outcomes])
        assert np.percentile(gaps_s, 99) <= 1.25 * ITL_TARGET_S
        goodput = np.median([outcome.goodput for outcome in outcomes])
        assert goodput >= 0.95 * np.median([outcome.goodput for outcome in at_once])


def test_first_come_first_served_keeps_none_of_that(capacity: float) -> None:
    variant = Variant()
    for letter in "FEDCBA":
        variant = variant.without(letter)
    outcome = run(trace_jobs(1000, 2 * capacity, 1), variant)
    assert outcome.ttft_ratio(Tier.PREMIUM) > 5
    assert outcome.goodput < 0.6 * run(trace_jobs(1000, 2 * capacity, 1), Variant()).goodput


def test_backlogged_tenants_and_tiers_are_served_by_their_weights() -> None:
    tenants = [("a", Tier.STANDARD, 1.0), ("b", Tier.STANDARD, 2.0), ("p", Tier.PREMIUM, 1.0), ("l", Tier.BATCH, 1.0)]
    jobs = [
        Job(4 * i + n, 0.0, 100 + 37 * i % 200, 20 + 13 * i % 60, 100, *tenant)
        for i in range(300)
        for n, tenant in enumerate(tenants)
    ]
    outcome = run(jobs, Variant().without("C"))
    end_s = min(max(life.token_s[-1] for life in outcome.lives if life.job.tenant == name) for name, _, _ in tenants)
    shares = [("a", 3 / 12 / 3), ("b", 3 / 12 * 2 / 3), ("p", 8 / 12), ("l", 1 / 12)]
    assert end_s > 20
    assert outcome.jain_index(3.0, end_s - 3, shares) >= 0.95


@pytest.mark.parametrize("has_target", [True, False])
def test_a_prompt_of_the_full_context_does_not_hold_up_the_streams(has_target: bool) -> None:
    targets_s = dict.fromkeys(Tier, ITL_TARGET_S if has_target else NEVER)
    settings = ServerSettings(
        num_blocks=2048, max_num_batched_tokens=4096, policy=SchedulingPolicy(itl_targets_s=targets_s)
    )
    server = SimulatedServer(settings, CostModel())
    server.play([*(Job(i, 0.0, 60, 1500, 1500) for i in range(8)), Job(8, 2.0, 8000, 8, 8)])
    done_s = server.lives[8].token_s[0]
    gaps_s = [
        later - earlier
        for life in server.lives[:8]
        for earlier, later in zip(life.token_s, life.token_s[1:], strict=False)
        if 2.0 <= later <= done_s
    ]
    assert (np.percentile(gaps_s, 99) <= 1.25 * ITL_TARGET_S) == has_target


def test_one_tenants_flood_costs_the_others_no_more_than_the_same_load_of_many() -> None:
    def probes_ttft_s(crowd: int) -> float:
        flood = [Job(i, 0.0, 100, 40, 40, tenant=f"crowd {i % crowd}") for i in range(1000)]
        probes = [Job(1000 + i, 0.5 + 0.25 * i, 100, 40, 40, tenant=f"probe {i % 4}") for i in range(48)]
        outcome = run([*flood, *probes], Variant().without("C"))
        return float(np.median([life.token_s[0] - life.job.at_s for life in outcome.lives[1000:]]))

    assert probes_ttft_s(1) <= 1.2 * probes_ttft_s(10)


def test_premium_keeps_its_first_tokens_and_batch_gets_its_twelfth_while_premium_asks_for_all() -> None:
    premium = [Job(i, i / 12, 200, 60, 60, "p", Tier.PREMIUM) for i in range(600)]
    batch = [Job(1000 + i, 0.0, 200, 60, 60, "b", Tier.BATCH) for i in range(200)]
    outcome = run([*premium, *batch], replace(Variant(), settings=replace(Variant().settings, max_num_seqs=32)))
    assert outcome.ttft_ratio(Tier.PREMIUM) <= 1
    window = [sum(10 <= at_s < 40 for at_s in life.token_s) for life in outcome.lives]
    num_premium, num_batch = sum(window[:600]), sum(window[600:])
    assert num_batch >= (num_premium + num_batch) / 12
