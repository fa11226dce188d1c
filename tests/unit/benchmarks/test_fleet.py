"""The simulated fleet: the same seed is the same run, nothing is left over, and what fills first comes first."""

import math
from dataclasses import replace

import pytest

from headrace.benchmarks import fleet_costs
from headrace.benchmarks.fleet import breaking_lines, growth_lines, name_of
from headrace.benchmarks.fleet_costs import Rates, UnitCosts, breaking_points
from headrace.benchmarks.routing import POLICIES
from headrace.benchmarks.simulated_fleet import Figures, Setting, Turn, play
from headrace.server.replica_routing import PIECE_TOKENS

SMALL = Setting("round robin", 2, warm_up_s=2.0, window_s=3.0)
COSTS = UnitCosts(
    {policy: {1: 1e-5, 1000: 1e-4} for policy in POLICIES}, 1e-3, 50_000, 500, 5e-3, 1e-5, 4000.0, 150.0, 1000.0
)
RATES = Rates(turns_per_s=10.0, tokens_per_s=500.0, num_streams=20.0, num_pieces=1024, interval_s=1.0)


@pytest.fixture(scope="module")
def figures() -> Figures:
    return play(SMALL)


def test_a_seed_is_one_run(figures: Figures) -> None:
    assert replace(play(SMALL), cpu_s=figures.cpu_s) == figures
    assert play(replace(SMALL, seed=2)).ttft_p50_s != figures.ttft_p50_s


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_each_policy_has_every_turn_that_is_let_in_answered_and_leaves_nothing(policy: str) -> None:
    figures = play(replace(SMALL, policy=policy, window_s=1.0, num_routers=2))  # asserts that nothing is left
    assert figures.num_turns > 5
    assert figures.ttft_p99_s > 0


def test_fleets_that_are_counted_as_one_have_users_of_their_own(figures: Figures) -> None:
    both = play(replace(SMALL, num_fleets=2))
    assert both.num_turns > figures.num_turns
    assert both.ttft_p99_s >= figures.ttft_p99_s or both.ttft_p50_s != figures.ttft_p50_s


def test_a_turns_prompt_is_all_that_was_said_before_and_a_message() -> None:
    first = Turn(1, 0.0, 100, 7, 50, group=3, num_shared_tokens=64, conversation=5)
    said = [*first.prompt(), *(first.token(i) for i in range(7))]
    later = replace(first, number=2, num_prompt_tokens=150)
    assert list(later.prompt()[:107]) == said
    assert len(later.prompt()) == 150
    other = replace(first, number=3, conversation=6)
    assert other.prompt()[:64] == first.prompt()[:64]
    assert other.prompt()[64] != first.prompt()[64]


def test_routers_know_a_prompt_by_what_its_replica_could_have_cached() -> None:
    first = Turn(1, 0.0, 4 * PIECE_TOKENS, 7, 50, group=3, num_shared_tokens=2 * PIECE_TOKENS, conversation=5)
    other = replace(first, number=2, conversation=6)
    later = replace(first, number=3, num_prompt_tokens=6 * PIECE_TOKENS)
    assert first.key().pieces[:2] == other.key().pieces[:2]
    assert not set(first.key().pieces[2:]) & set(other.key().pieces)
    assert later.key().pieces[:4] == first.key().pieces


def test_conversations_find_their_prefixes_where_they_were_before() -> None:
    setting = Setting("round robin", 4, warm_up_s=1.0, window_s=3.0)
    assert play(replace(setting, policy="headrace")).hit_share > play(setting).hit_share + 0.1


def test_what_fills_its_bound_first_comes_first() -> None:
    points = breaking_points(COSTS, RATES, [1, 1000])
    assert [point.num_replicas for point in points] == sorted(point.num_replicas for point in points)
    relayed = next(point for point in points if point.what.startswith("tokens passed on"))
    assert relayed.num_replicas == pytest.approx(200)
    assert relayed.used[1000] == pytest.approx(5)
    free = breaking_points(replace(COSTS, piece_bytes=0.0), RATES, [1, 1000])
    assert math.isinf(free[-1].num_replicas)
    assert "over a million" in breaking_lines(free)[-1]


def test_what_one_of_everything_costs_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_NUM_RELAYED", "_NUM_BEATS", "_NUM_JOURNALED", "_NUM_JOURNAL_STEPS"):
        monkeypatch.setattr(fleet_costs, name, 3)
    monkeypatch.setattr(fleet_costs, "_NUM_DECISIONS", 50)
    costs = fleet_costs.measure([1, 2])
    assert min(costs.render_s, costs.parse_s, costs.relay_s, costs.piece_bytes, costs.journal_bytes) > 0
    assert all(seconds > 0 for by_count in costs.decision_s.values() for seconds in by_count.values())
    assert costs.metrics_bytes > costs.num_series > 100


def test_a_run_is_told_with_how_it_goes_by_its_gauges(figures: Figures) -> None:
    assert name_of(SMALL) == "round robin"
    assert (
        name_of(Setting("least queue", 8, counts_sent=False, num_routers=2)) == "least queue, gauges alone, 2 routers"
    )
    assert growth_lines([figures])[-1].startswith("| round robin | 2 |")
