"""`python -m headrace.benchmarks.simulate --seed N`: the scheduler, admission and the stream log, on a virtual clock.

From one seed comes a scenario: a server's settings, jobs, and what goes wrong (bursts, steps that take long or raise,
clients that leave at any moment, read slowly, or are cut and come back, a drain). It is played on the production
classes, and after every event the invariants are looked at:

- blocks add up (`Scheduler.check_books`), and nothing runs for a request after its cancel has been drained;
- every accepted request ends with exactly one terminal entry, every refused one with a 4xx or 503;
- what each reader has got is a gapless beginning, without duplicates, of what the request gets alone, and all of it
  where it finished;
- after a cancel nothing more reaches a log;
- a step that has prompts in it was planned within the tightest inter-token target of its streams;
- of two tenants of a tier that both have something waiting, none is served more than the other by more than a bound;
- once faults and arrivals stop, everything ends.

A seed that fails is shrunk: what can be left out of its scenario is, and what is left is printed.
"""

import argparse
import contextlib
import multiprocessing
import random
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

from headrace.benchmarks.simulated_server import CostModel, Job, Life, ServerSettings, SimulatedServer
from headrace.scheduler.config import SchedulingPolicy
from headrace.scheduler.messages import FinishReason, Tier
from headrace.scheduler.scheduler import SchedulerOutput
from headrace.server.errors import UnavailableError

T = TypeVar("T")
_TIERS = tuple(Tier)
# A run that lasts longer, in virtual time, hangs.
_MAX_S = 36_000.0
_FINISHED = (FinishReason.STOP, FinishReason.LENGTH)


_STAYS = partial(replace, leaves_after_s=None)
_READS_AT_ONCE = partial(replace, read_interval_s=0.0)
_IS_NOT_CUT = partial(replace, cut_s=None)
_IS_NOT_DRAINED = partial(replace, drain_s=None)
_HAS_NO_NOISE = partial(replace, noise=0.0)


class InvariantError(AssertionError):
    """What must hold did not."""


@dataclass(frozen=True, slots=True)
class Client:
    """A job and how its client behaves: it leaves `leaves_after_s` after it came, reads every `read_interval_s` (0 at
    once), is cut at `cut_s` and comes back `away_s` later to read on from its cursor."""

    job: Job
    leaves_after_s: float | None = None
    read_interval_s: float = 0.0
    cut_s: float | None = None
    away_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Scenario:
    """All that a seed decides. `step_faults` maps a step's number to a factor on its time, or None where it raises."""

    settings: ServerSettings
    costs: CostModel
    clients: tuple[Client, ...]
    step_faults: tuple[tuple[int, float | None], ...] = ()
    noise: float = 0.0
    noise_seed: int = 0
    drain_s: float | None = None
    drain_grace_s: float = 5.0

    def __str__(self) -> str:
        parts = [f"{self.settings}", f"{self.costs}", f"noise {self.noise}, seed {self.noise_seed}"]
        parts += [f"drain at {self.drain_s} for {self.drain_grace_s}"] if self.drain_s is not None else []
        parts += [f"step {number}: {'raises' if factor is None else factor}" for number, factor in self.step_faults]
        return "\n".join(["  " + part for part in parts] + [f"  {client}" for client in self.clients])


def make_scenario(seed: int) -> Scenario:
    """Draw a scenario; each seed has its own rates of everything."""
    rng = random.Random(seed)
    block_size = rng.choice([1, 4, 16])
    num_blocks = rng.randint(16, 400)
    capacity = num_blocks * block_size
    num_tokens = rng.choice([8, 64, 256, 1024])
    itl_target_s = rng.choice([0.02, 0.05, 0.15, float("inf")])
    settings = ServerSettings(
        num_blocks=num_blocks,
        block_size=block_size,
        max_num_batched_tokens=num_tokens,
        max_num_seqs=rng.randint(1, min(num_tokens, 48)),
        policy=SchedulingPolicy(
            tier_weights={Tier.PREMIUM: 8.0, Tier.STANDARD: 3.0, Tier.BATCH: 1.0},
            itl_targets_s={tier: itl_target_s * factor for tier, factor in zip(Tier, (1, 1, 4), strict=True)},
        ),
        ttft_targets_s=rng.choice([(0.2, 1.0, 10.0), (2.0, 8.0, 60.0), (float("inf"),) * 3]),
        max_queue_size=rng.choice([4, 1000]),
        is_asynchronous=rng.random() < 0.5,
    )
    costs = CostModel(
        constant_s=rng.choice([1e-4, 2e-3, 1e-2]),
        prompt_token_s=rng.choice([1e-6, 2e-5, 2e-4, 1e-3]),
        sequence_s=rng.choice([1e-5, 3e-4]),
        context_token_s=rng.choice([0.0, 2e-7]),
        attention_s=rng.choice([0.0, 2e-8]),
    )
    num_tenants = rng.randint(1, 5)
    tenants = [(f"t{i}", rng.choice(_TIERS), rng.choice([1.0, 1.0, 2.0])) for i in range(num_tenants)]
    burst_share, leave_share, slow_share, cut_share = (rng.choice([0, 0.1, 0.5]) for _ in range(4))
    mean_gap_s = rng.choice([0.001, 0.02, 0.2])
    longest = rng.choice([20, 200, capacity])
    clients, at_s = [], 0.0
    for number in range(rng.randint(1, 60)):
        if rng.random() >= burst_share:
            at_s += rng.expovariate(1 / mean_gap_s)
        num_prompt = min(1 + int(rng.expovariate(2 / longest)), capacity - 1)
        max_tokens = min(rng.choice([1, 8, 64, 512]), capacity - num_prompt)
        tenant, tier, weight = rng.choice(tenants)
        job = Job(
            number,
            at_s,
            num_prompt,
            num_answer_tokens=rng.randint(0, max_tokens) if rng.random() < 0.7 else max_tokens,
            max_tokens=max_tokens,
            tenant=tenant,
            tier=tier,
            weight=weight,
            group=rng.randrange(3),
            num_shared_tokens=rng.choice([0, num_prompt // 2, num_prompt]),
            timeout_s=rng.choice([600.0, 600.0, rng.uniform(0.01, 5)]),
            ttft_timeout_s=rng.choice([600.0, 600.0, rng.uniform(0.01, 5)]),
        )
        clients.append(
            Client(
                job,
                leaves_after_s=rng.expovariate(1.0) if rng.random() < leave_share else None,
                read_interval_s=rng.uniform(0.01, 2) if rng.random() < slow_share else 0.0,
                cut_s=at_s + rng.expovariate(1.0) if rng.random() < cut_share else None,
                away_s=rng.expovariate(1.0),
            )
        )
    fault_share = rng.choice([0, 0, 0.01, 0.1])
    faults = [(n, rng.choice([None, 3.0, 20.0])) for n in range(400) if rng.random() < fault_share]
    drain_s = rng.uniform(0, at_s + 1) if rng.random() < 0.3 else None
    noise = rng.choice([0.0, 0.05, 0.3])
    return Scenario(settings, costs, tuple(clients), tuple(faults), noise, seed, drain_s, rng.uniform(0, 10))


@dataclass(slots=True)
class _Reader:
    """What one client has got."""

    client: Client
    life: Life
    text: str = ""
    cursor: int = 0
    is_away: bool = False
    has_left: bool = False
    num_terminals: int = 0


@dataclass(slots=True)
class _World:
    """A scenario being played."""

    scenario: Scenario
    server: SimulatedServer = field(init=False)
    readers: dict[int, _Reader] = field(default_factory=dict)  # by job
    faults: dict[int, float | None] = field(init=False)
    dearest_token: float = 0.0  # in prompt tokens

    def __post_init__(self) -> None:
        scenario = self.scenario
        self.faults = dict(scenario.step_faults)
        self.server = SimulatedServer(
            scenario.settings,
            scenario.costs,
            step_fault=self._step_fault,
            on_step=self._on_step,
            on_published=self._on_published,
        )

    def play(self) -> None:
        """Raises: InvariantError, or what the server itself asserts."""
        queue = self.server.queue
        for client in self.scenario.clients:
            queue.at(client.job.at_s, partial(self._come, client))
        if self.scenario.drain_s is not None:
            queue.at(self.scenario.drain_s, self._drain)
        queue.run(_MAX_S)
        self._check_end()

    def _step_fault(self, number: int) -> float | None:
        noise = random.Random(self.scenario.noise_seed * 1_000_003 + number).gauss(1, self.scenario.noise)
        factor = self.faults.get(number, 1.0)
        return None if factor is None else factor * max(0.2, noise)

    def _come(self, client: Client) -> None:
        life = self.server.submit(client.job)
        if life.refusal is not None:
            status = life.refusal.status
            _require(status in (400, 429) or isinstance(life.refusal, UnavailableError), f"refused with {status}")
            return
        reader = self.readers[client.job.number] = _Reader(client, life)
        queue = self.server.queue
        if client.leaves_after_s is not None:
            queue.at(queue.now + client.leaves_after_s, partial(self._leave, reader))
        if client.cut_s is not None:
            queue.at(client.cut_s, partial(self._cut, reader))
            queue.at(client.cut_s + client.away_s, partial(self._come_back, reader))
        if client.read_interval_s > 0:
            queue.at(queue.now + client.read_interval_s, partial(self._read_slowly, reader))

    def _leave(self, reader: _Reader) -> None:
        self._read(reader)
        generation = reader.life.generation
        assert generation is not None
        if not reader.has_left and not generation.is_over:
            self.server.client.cancel(generation)
            reader.has_left = True
            text = generation.log.read().text
            self.server.queue.at(
                self.server.queue.now + 60,
                lambda: _require(generation.log.read().text == text, "a token after the cancel"),
            )

    def _cut(self, reader: _Reader) -> None:
        reader.is_away = True

    def _come_back(self, reader: _Reader) -> None:
        reader.is_away = False
        self._read(reader)

    def _read_slowly(self, reader: _Reader) -> None:
        self._read(reader)
        if not reader.num_terminals:
            self.server.queue.at(
                self.server.queue.now + reader.client.read_interval_s, partial(self._read_slowly, reader)
            )

    def _read(self, reader: _Reader) -> None:
        generation = reader.life.generation
        assert generation is not None
        if reader.is_away or reader.num_terminals:
            return
        piece = generation.log.read(reader.cursor)
        reader.text += piece.text
        reader.cursor = piece.cursor
        reader.num_terminals += piece.terminal is not None
        _require(reader.client.job.text().startswith(reader.text), f"job {reader.client.job.number} reads another text")

    def _on_published(self, lives: list[Life]) -> None:
        self.server.scheduler.check_books()
        for life in lives:
            reader = self.readers.get(life.job.number)
            if reader is not None and reader.client.read_interval_s == 0:
                self._read(reader)

    def _on_step(self, output: SchedulerOutput, seconds: float) -> None:
        scheduler = self.server.scheduler
        scheduler.check_books()
        policy = self.scenario.settings.policy
        shape = output.shape
        if shape.num_prompt_tokens > 32 and shape.num_decoding:  # fewer are forced when prompts starve
            streams = output.rows[: shape.num_decoding]
            target_s = min(policy.itl_targets_s[row.sequence.request.tier] for row in streams)
            planned_s = scheduler._step_time.predict_s(shape)
            # What a prompt finds in the cache is context that the budget did not know of.
            found_s = planned_s - scheduler._step_time.predict_s(shape._replace(prompt_context=0.0))
            _require(planned_s <= target_s + found_s, f"a step planned to take {planned_s:.3f} s of {target_s} s")
        for row in output.rows:
            generation_id = row.sequence.request.request_id
            _require(generation_id not in scheduler._cancelled, "a row of a request whose cancel was drained")
        self._check_fairness()

    def _check_fairness(self) -> None:
        """VTC's theorem: counters of tenants with somebody waiting differ by no more than a prompt and what the running
        sequences can come to cost; here also while two long prompts hold up a third."""
        settings, scheduler = self.scenario.settings, self.server.scheduler
        token, context = scheduler._step_time.decode_cost()
        capacity = settings.num_blocks * settings.block_size
        self.dearest_token = max(self.dearest_token, token + context * capacity)
        bound = 3 * capacity * (1 + self.dearest_token)
        tiers = [tier for tier in scheduler._queue._tiers.values() if tier.backlogged]
        groups = [[tier.served for tier in tiers]]
        groups += [[tenant.served for tenant in tier.backlogged.values()] for tier in tiers]
        for served in groups:
            if served:
                lead = max(served) - min(served)
                _require(lead <= bound, "a tier or tenant is served far more than another that waits")

    def _drain(self) -> None:
        client = self.server.client
        client.is_draining = True
        self.server.queue.at(
            self.server.queue.now + self.scenario.drain_grace_s,
            lambda: client.cancel_all(UnavailableError("the server is shutting down", "draining")),
        )

    def _check_end(self) -> None:
        scheduler, client = self.server.scheduler, self.server.client
        _require(not scheduler.has_work and client.num_unfinished == 0, "something never ends")
        scheduler.check_books()
        load = scheduler.load()
        _require(load.num_free_blocks == load.num_total_blocks, "blocks are left over")
        _require(client.admission.num_queued_tokens == 0 and client.num_waiting == 0, "the queue's books are not empty")
        for reader in self.readers.values():
            generation = reader.life.generation
            assert generation is not None
            terminal = generation.log.terminal
            _require(terminal is not None, "an accepted request has no end")
            assert terminal is not None
            reader.is_away = False
            self._read(reader)
            _require(reader.num_terminals == 1, "a reader has not had exactly one terminal")
            if terminal.finish_reason in _FINISHED:
                _require(reader.text == reader.client.job.text(), "a finished text is not whole")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise InvariantError(message)


def play(scenario: Scenario) -> str | None:
    """What went wrong, with where; None where nothing did."""
    try:
        _World(scenario).play()
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {error} ({frame.name}:{frame.lineno})"
    return None


def shrink(scenario: Scenario, fails: Callable[[Scenario], bool]) -> Scenario:
    """Leave out clients and faults, in ever smaller pieces, as long as it still fails; then what they do."""
    scenario = replace(scenario, clients=_shrink_items(scenario.clients, lambda c: fails(replace(scenario, clients=c))))
    scenario = replace(
        scenario, step_faults=_shrink_items(scenario.step_faults, lambda f: fails(replace(scenario, step_faults=f)))
    )
    for leave_out_of_all in (_IS_NOT_DRAINED, _HAS_NO_NOISE):
        simpler = leave_out_of_all(scenario)
        scenario = simpler if fails(simpler) else scenario
    clients = list(scenario.clients)
    for i in range(len(clients)):
        for leave_out in (_STAYS, _READS_AT_ONCE, _IS_NOT_CUT):
            tried = [*clients[:i], leave_out(clients[i]), *clients[i + 1 :]]
            if fails(replace(scenario, clients=tuple(tried))):
                clients = tried
    return replace(scenario, clients=tuple(clients))


def _shrink_items(items: tuple[T, ...], fails: Callable[[tuple[T, ...]], bool]) -> tuple[T, ...]:
    """Zeller's delta debugging (2002), by complements alone."""
    size = max(1, len(items) // 2)
    while items:
        for begin in range(0, len(items), size):
            fewer = items[:begin] + items[begin + size :]
            if fails(fewer):
                items = fewer
                break
        else:
            if size == 1:
                break
            size //= 2
    return items


def _try_seed(seed: int) -> tuple[int, str | None]:
    return seed, play(make_scenario(seed))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("headrace.benchmarks.simulate", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="the first seed; 0 by default")
    parser.add_argument("--num-seeds", type=int, default=1, help="how many seeds to play; 1 by default")
    parser.add_argument("--num-processes", type=int, default=1)
    options = parser.parse_args(arguments)
    seeds = range(options.seed, options.seed + options.num_seeds)
    failures = []
    with contextlib.ExitStack() as stack:
        outcomes: Iterable[tuple[int, str | None]] = map(_try_seed, seeds)
        if options.num_processes > 1:
            # Not forked: a copy of a process with threads can hang in a lock that one of them held.
            pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(options.num_processes))
            outcomes = pool.imap_unordered(_try_seed, seeds, chunksize=8)
        for seed, failure in outcomes:
            if failure is not None:
                failures.append(seed)
                print(f"seed {seed}: {failure}", flush=True)
    print(f"{len(seeds)} seeds, {len(failures)} failed")
    if failures:
        seed = min(failures)
        kind = (play(make_scenario(seed)) or "").partition(" (")[0]
        smallest = shrink(make_scenario(seed), lambda scenario: (play(scenario) or "").partition(" (")[0] == kind)
        print(f"seed {seed}, shrunk: {play(smallest)}\n{smallest}")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
