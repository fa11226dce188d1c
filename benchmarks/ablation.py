"""`python -m headrace.benchmarks.ablation`: what each letter of the scheduling policy is worth, on the simulator.

The jobs are the Azure conversation trace's (benchmarks/traces), lengths scaled by one factor, arriving at a multiple of
what the server can do. First FCFS with a fixed chunk, and one letter after another added to it; then each letter alone,
with and without it, on the load that it is for and by the figure that it is for; then the whole policy from 1x to 3x.
Every figure is the median over seeds, which draw the jobs' tenants. A cost model's time is no machine's: the ratios are
what counts.
"""

import argparse
import random
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from headrace.benchmarks.arrivals import read_trace
from headrace.benchmarks.simulated_server import CostModel, Job, Life, ServerSettings, SimulatedServer
from headrace.scheduler.config import SchedulingPolicy
from headrace.scheduler.kv_forecast import OutputLengths
from headrace.scheduler.messages import FinishReason, Tier

_TRACE = Path(__file__).parent / "traces" / "azure_2023_conversation.csv"
_LENGTH_SCALE = 0.25
_NEVER = float("inf")
_ITL_TARGET_S = 0.15
_TTFT_TARGETS_S = (2.0, 8.0, 60.0)
_FIXED_CHUNK = 256
# (Tenant, its tier, its weight, its share of the jobs): one of them asks for far more than its weight is worth.
_TENANTS = (
    ("p1", Tier.PREMIUM, 1.0, 0.08),
    ("p2", Tier.PREMIUM, 1.0, 0.07),
    ("s1", Tier.STANDARD, 1.0, 0.35),
    ("s2", Tier.STANDARD, 2.0, 0.15),
    ("s3", Tier.STANDARD, 1.0, 0.10),
    ("b1", Tier.BATCH, 1.0, 0.20),
    ("b2", Tier.BATCH, 1.0, 0.05),
)
_FULL = ServerSettings(
    num_blocks=2048,
    max_num_batched_tokens=1024,
    policy=SchedulingPolicy(itl_targets_s=dict.fromkeys(Tier, _ITL_TARGET_S)),
    ttft_targets_s=_TTFT_TARGETS_S,
)


@dataclass(frozen=True, slots=True)
class Variant:
    """A policy: which letters are on."""

    settings: ServerSettings = _FULL
    forecasts: bool = True  # D
    makes_room: bool = True  # E, for premium
    drops_hopeless: bool = True  # F

    def without(self, letter: str) -> "Variant":
        settings = self.settings
        match letter:
            case "A":
                policy = replace(settings.policy, itl_targets_s=dict.fromkeys(Tier, _NEVER))
                return replace(self, settings=replace(settings, policy=policy, max_num_batched_tokens=_FIXED_CHUNK))
            case "B":
                return replace(self, settings=replace(settings, is_fair=False))
            case "C":
                return replace(self, settings=replace(settings, ttft_targets_s=(_NEVER,) * 3))
            case "D":
                return replace(self, forecasts=False)
            case "E":
                return replace(self, makes_room=False)
            case "F":
                return replace(self, drops_hopeless=False)
        raise AssertionError(letter)


class _NoForecast(OutputLengths):
    """Admission on today's use: nobody is expected to add anything."""

    def expected_remaining(self, num_tokens: np.ndarray) -> np.ndarray:
        return np.zeros(len(num_tokens))


@dataclass(slots=True)
class Outcome:
    """What came of all jobs of a run, and when its last event was."""

    lives: list[Life]
    end_s: float
    num_preemptions: int

    def ttfts_s(self, tier: Tier) -> list[float]:
        return [life.ttft_s for life in self.lives if life.job.tier is tier and life.ttft_s is not None]

    def ttft_ratio(self, tier: Tier, percentile: float = 99) -> float:
        """First tokens' times over their targets."""
        lives = [life for life in self.lives if life.job.tier is tier]
        ratios = [life.ttft_s / _target_s(life.job) for life in lives if life.ttft_s is not None]
        return float(np.percentile(ratios, percentile)) if ratios else float("nan")

    def gaps_s(self) -> np.ndarray:
        return np.concatenate([np.diff(life.token_s) for life in self.lives if len(life.token_s) > 1])

    def is_good(self, life: Life) -> bool:
        """Whether it finished, and had its first token by its tier's target."""
        terminal = life.generation.log.terminal if life.generation is not None else None
        is_finished = terminal is not None and terminal.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
        return is_finished and (life.ttft_s or 0.0) <= _target_s(life.job)

    @property
    def goodput(self) -> float:
        """Good jobs per second."""
        return sum(map(self.is_good, self.lives)) / self.end_s

    @property
    def good_share(self) -> float:
        """Of all jobs; those that were shed are failures."""
        return sum(map(self.is_good, self.lives)) / len(self.lives)

    def jain_index(self, from_s: float, to_s: float, tenants: Iterable[tuple[str, float]]) -> float:
        """Of tokens per weight that tenants got in a time in which all of them have something waiting (Jain 1984)."""
        shares = []
        for name, weight in tenants:
            mine = [life for life in self.lives if life.job.tenant == name]
            prompts = sum(
                life.job.num_prompt_tokens for life in mine if life.token_s and from_s <= life.token_s[0] < to_s
            )
            outputs = sum(from_s <= at_s < to_s for life in mine for at_s in life.token_s)
            shares.append((prompts + 2 * outputs) / weight)  # VTC's weights of the two
        return sum(shares) ** 2 / (len(shares) * sum(share**2 for share in shares))


def _target_s(job: Job) -> float:
    """Its tier's, and the time that its prompt takes."""
    return dict(zip(Tier, _TTFT_TARGETS_S, strict=True))[job.tier] + job.num_prompt_tokens * CostModel().prompt_token_s


def run(jobs: Sequence[Job], variant: Variant) -> Outcome:
    """Play jobs on a server of this policy."""
    server = SimulatedServer(variant.settings, CostModel())
    if not variant.forecasts:
        server.scheduler._lengths = _NoForecast()
    if not variant.drops_hopeless:
        server.scheduler._prefill_s = lambda sequence, cached: 0.0  # type: ignore[method-assign]
    if not variant.makes_room:
        submit = server.client.submit
        server.client.submit = lambda request, generation: submit(  # type: ignore[method-assign]
            replace(request, target_s=_NEVER), generation
        )
    server.play(jobs)
    return Outcome(server.lives, server.queue.now, server.scheduler.load().num_preemptions)


def trace_jobs(num_jobs: int, rate_per_s: float, seed: int) -> list[Job]:
    """The trace's first jobs, at a mean rate, of tenants that the seed draws."""
    rng = random.Random(seed)
    jobs = []
    for number, arrival in enumerate(read_trace(_TRACE, num_jobs, _LENGTH_SCALE, rate_per_s)):
        name, tier, weight, _ = rng.choices(_TENANTS, [tenant[3] for tenant in _TENANTS])[0]
        tokens = arrival.prompt_tokens, arrival.output_tokens
        jobs.append(Job(number, arrival.at_s, *tokens, max(1024, tokens[1]), name, tier, weight, timeout_s=600))
    return jobs


def capacity_per_s(num_jobs: int) -> float:
    """Jobs per second that the server does when all of them are there at once."""
    jobs = [replace(job, at_s=0.0) for job in trace_jobs(num_jobs, 1.0, 0)]
    return num_jobs / run(jobs, Variant().without("C")).end_s


# Each letter's load and figure.


def _heavy_prompts(seed: int, capacity: float) -> tuple[list[Job], Callable[[Outcome], float]]:
    jobs = [replace(job, tenant="s2", tier=Tier.STANDARD, weight=1.0) for job in trace_jobs(600, 0.8 * capacity, seed)]
    rng = random.Random(seed)
    jobs = [replace(job, at_s=max(0.0, job.at_s + rng.uniform(-1, 1))) for job in jobs]
    return jobs, lambda outcome: float(np.percentile(outcome.ttfts_s(Tier.STANDARD), 99))


def _flood(seed: int, capacity: float) -> tuple[list[Job], Callable[[Outcome], float]]:
    jobs = [replace(job, at_s=job.at_s / 1000, timeout_s=_NEVER) for job in trace_jobs(1000, capacity, seed)]
    rng = random.Random(seed)
    shares = (("s1", 1.0, 0.6), ("s2", 2.0, 0.25), ("s3", 1.0, 0.15))
    for i, job in enumerate(jobs):
        name, weight, _ = rng.choices(shares, [share for _, _, share in shares])[0]
        jobs[i] = replace(job, tenant=name, tier=Tier.STANDARD, weight=weight)
    tenants = [(name, weight) for name, weight, _ in shares]
    return jobs, lambda outcome: outcome.jain_index(5.0, 25.0, tenants)


def _overload(seed: int, capacity: float) -> tuple[list[Job], Callable[[Outcome], float]]:
    return trace_jobs(1000, 2 * capacity, seed), lambda outcome: outcome.goodput


def _long_answers(seed: int, capacity: float) -> tuple[list[Job], Callable[[Outcome], float]]:
    jobs = trace_jobs(600, 0.7 * capacity, seed)
    jobs = [replace(job, num_answer_tokens=min(1024, 4 * job.num_answer_tokens)) for job in jobs]
    return jobs, lambda outcome: float(outcome.gaps_s().max())


def _full_house(seed: int, capacity: float) -> tuple[list[Job], Callable[[Outcome], float]]:
    rng = random.Random(seed)
    jobs = [Job(i, rng.random() * 2, 100, rng.randint(500, 3000), 4000, "b", Tier.BATCH) for i in range(60)]
    jobs += [Job(100 + i, 5 + rng.random() * 60, 150, 60, 200, "p", Tier.PREMIUM) for i in range(60)]
    return jobs, lambda outcome: float(np.percentile(outcome.ttfts_s(Tier.PREMIUM), 99))


def _impatient(seed: int, capacity: float) -> tuple[list[Job], Callable[[Outcome], float]]:
    jobs = [replace(job, ttft_timeout_s=3.0) for job in trace_jobs(1000, 3 * capacity, seed)]
    return jobs, lambda outcome: outcome.goodput


_OVERLOAD_HEADS = "TTFT p99 / target: premium | standard | batch | ITL p99 / target | good jobs/s | of all"
_Load = Callable[[int, float], tuple[list[Job], Callable[[Outcome], float]]]
# (Letter, its load, its figure, whether more of it is better, the policy it is taken out of).
_LETTERS: tuple[tuple[str, _Load, str, bool, Variant], ...] = (
    ("A", _heavy_prompts, "TTFT p99 in s at 0.8x, ITL p99 within the target", False, Variant()),
    ("B", _flood, "Jain index of three tenants, one with 60 % of the jobs", True, Variant().without("C")),
    ("C", _overload, "good jobs per second at 2x", True, Variant()),
    (
        "D",
        _long_answers,
        "longest pause of any stream in s, small KV cache",
        False,
        Variant(replace(_FULL, num_blocks=400, max_num_seqs=128)),
    ),
    (
        "E",
        _full_house,
        "premium TTFT p99 in s, all places held by batch",
        False,
        Variant(replace(_FULL, num_blocks=8000, max_num_seqs=32, ttft_targets_s=(2.0, 8.0, 1000.0))),
    ),
    ("F", _impatient, "good jobs per second at 3x, first tokens wanted in 3 s", True, Variant().without("C")),
)


def ladder(capacity: float, num_jobs: int, seeds: range) -> list[str]:
    """FCFS and a fixed chunk, then one letter after another, at 2x."""
    variants = [
        ("FCFS, fixed chunk", Variant().without("F").without("E").without("D").without("C").without("B").without("A"))
    ]
    for i, letter in enumerate("ABCDEF"):
        variant = Variant()
        for later in "ABCDEF"[i + 1 :]:
            variant = variant.without(later)
        variants.append((f"+ {letter}", variant))
    lines = [f"| policy | {_OVERLOAD_HEADS} |", "|---|---|---|---|---|---|---|"]
    for name, variant in variants:
        outcomes = [run(trace_jobs(num_jobs, 2 * capacity, seed), variant) for seed in seeds]
        lines.append(f"| {name} | {_overload_figures(outcomes)} |")
    return lines


def letters(capacity: float, seeds: range) -> list[str]:
    """Each letter's figure with and without it."""
    lines = ["| letter | figure | without | with | gain |", "|---|---|---|---|---|"]
    for letter, make_load, figure, is_more_better, variant in _LETTERS:
        pairs = []
        for seed in seeds:
            jobs, measure = make_load(seed, capacity)
            pairs.append((measure(run(jobs, variant.without(letter))), measure(run(jobs, variant))))
        without, with_it = _median(pair[0] for pair in pairs), _median(pair[1] for pair in pairs)
        gain = with_it / without - 1 if is_more_better else without / with_it - 1
        lines.append(f"| {letter} | {figure} | {without:.3g} | {with_it:.3g} | {100 * gain:+.0f} % |")
    return lines


def overload(capacity: float, num_jobs: int, seeds: range) -> list[str]:
    """The whole policy from 1x to 3x."""
    lines = [f"| load | {_OVERLOAD_HEADS} |", "|---|---|---|---|---|---|---|"]
    for factor in (1.0, 1.5, 2.0, 3.0):
        outcomes = [run(trace_jobs(num_jobs, factor * capacity, seed), Variant()) for seed in seeds]
        lines.append(f"| {factor:g}x | {_overload_figures(outcomes)} |")
    return lines


def _overload_figures(outcomes: Sequence[Outcome]) -> str:
    figures = [_median(outcome.ttft_ratio(tier) for outcome in outcomes) for tier in Tier]
    figures.append(_median(float(np.percentile(outcome.gaps_s(), 99)) / _ITL_TARGET_S for outcome in outcomes))
    figures.append(_median(outcome.goodput for outcome in outcomes))
    figures.append(_median(outcome.good_share for outcome in outcomes))
    return " | ".join(f"{figure:.2f}" for figure in figures)


def _median(values: Iterable[float]) -> float:
    return statistics.median(values)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("headrace.benchmarks.ablation", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--num-jobs", type=int, default=2000, help="jobs of each run under overload")
    parser.add_argument("--num-seeds", type=int, default=5)
    options = parser.parse_args(arguments)
    seeds = range(1, options.num_seeds + 1)
    capacity = capacity_per_s(options.num_jobs)
    print(f"capacity: {capacity:.1f} jobs/s; medians of {options.num_seeds} seeds\n")
    for lines in (
        ladder(capacity, options.num_jobs, seeds),
        letters(capacity, seeds),
        overload(capacity, options.num_jobs, seeds),
    ):
        print("\n".join(lines) + "\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
