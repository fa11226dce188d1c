"""The simulator: hundreds of seeds hold, the same seed is the same run, and what is broken is found and made small."""

import dataclasses
from typing import Any

import pytest

from headrace.benchmarks import simulate
from headrace.benchmarks.simulate import Scenario, make_scenario, play, shrink
from headrace.benchmarks.simulated_server import CostModel, Job, ServerSettings, SimulatedServer
from headrace.scheduler.messages import SequenceOutput
from headrace.scheduler.scheduler import Scheduler
from headrace.scheduler.sequence import Sequence
from headrace.server.stream_log import LogSlice, StreamLog
from requirements import IS_LONG


@pytest.mark.parametrize("first", range(0, 200 if IS_LONG else 50, 50))
def test_every_invariant_holds_whatever_the_seed(first: int) -> None:
    failures = {seed: failure for seed in range(first, first + 50) if (failure := play(make_scenario(seed)))}
    assert failures == {}


def test_a_seed_is_one_scenario_and_one_run() -> None:
    def tokens(seed: int) -> list[list[float]]:
        scenario = make_scenario(seed)
        server = SimulatedServer(scenario.settings, scenario.costs)
        server.play(client.job for client in scenario.clients)
        return [life.token_s for life in server.lives]

    assert make_scenario(7) == make_scenario(7)
    assert make_scenario(7) != make_scenario(8)
    assert tokens(7) == tokens(7)
    assert any(tokens(7))


def lose_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    def free_all_but_one(self: Scheduler, sequence: Sequence) -> None:
        self._pool.free(sequence.block_ids[1:])
        sequence.block_ids = []

    monkeypatch.setattr(Scheduler, "_free_blocks", free_all_but_one)


def repeat_text(monkeypatch: pytest.MonkeyPatch) -> None:
    read = StreamLog.read

    def read_from_before(self: StreamLog, cursor: int = 0, log_index: int = 0) -> LogSlice:
        return read(self, max(0, cursor - (cursor % 7 == 6)), log_index)

    monkeypatch.setattr(StreamLog, "read", read_from_before)


def forget_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    drop = Scheduler._drop_expired
    monkeypatch.setattr(Scheduler, "_drop_expired", lambda self, now: drop(self, now)[1:])


def go_on_after_a_cancel(monkeypatch: pytest.MonkeyPatch) -> None:
    def keep(self: Scheduler) -> list[SequenceOutput]:
        self._cancelled &= set(self._sequences)
        return []

    monkeypatch.setattr(Scheduler, "_drop_cancelled", keep)


def favour_a_tenant(monkeypatch: pytest.MonkeyPatch) -> None:
    """All work is on the house but the first tenant's, which so comes last whenever others wait."""
    from headrace.scheduler.fair_queue import TenantAccount

    charge = TenantAccount.charge

    def charge_some(self: TenantAccount[Any], tokens: float) -> None:
        if self.name == "t0":
            charge(self, 1e9 * tokens)

    monkeypatch.setattr(TenantAccount, "charge", charge_some)


def overfill_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scheduler, "_fitting_tokens", lambda self, decoding, prompt_context=0: float("inf"))


@pytest.mark.parametrize(
    "break_it", [lose_blocks, repeat_text, forget_an_end, go_on_after_a_cancel, favour_a_tenant, overfill_steps]
)
def test_what_is_broken_is_found(break_it: object, monkeypatch: pytest.MonkeyPatch) -> None:
    break_it(monkeypatch)  # type: ignore[operator]
    monkeypatch.setattr(simulate, "_MAX_S", 700.0)
    assert any(play(make_scenario(seed)) for seed in range(80))


def test_a_failing_scenario_is_shrunk_to_what_it_takes() -> None:
    """Here it takes two clients: one with a long prompt, and any other."""

    def fails(scenario: Scenario) -> bool:
        prompts = [client.job.num_prompt_tokens for client in scenario.clients]
        return len(prompts) > 1 and max(prompts) > 20

    large = next(s for s in map(make_scenario, range(100)) if len(s.clients) > 20 and s.step_faults and fails(s))
    small = shrink(large, fails)
    assert fails(small)
    assert (len(small.clients), small.step_faults, small.noise, small.drain_s) == (2, (), 0.0, None)
    assert all(client.leaves_after_s is client.cut_s is None for client in small.clients)


def test_the_command_plays_seeds_and_prints_a_failing_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert simulate.main(["--seed", "3", "--num-seeds", "2"]) == 0
    assert capsys.readouterr().out == "2 seeds, 0 failed\n"
    overfill_steps(monkeypatch)
    assert simulate.main(["--seed", "99"]) == 1
    assert "shrunk: InvariantError: a step planned to take" in capsys.readouterr().out


def test_a_jobs_answer_is_the_same_on_a_crowded_server() -> None:
    server = SimulatedServer(ServerSettings(num_blocks=24, max_num_batched_tokens=64, max_num_seqs=8), CostModel())
    jobs = [Job(i, 0.0, 40, 30, 100, ttft_timeout_s=600, timeout_s=600) for i in range(30)]
    server.client.admission.targets_s = dict.fromkeys(server.client.admission.targets_s, float("inf"))
    server.play(jobs)
    texts = [life.generation.log.read().text for life in server.lives if life.generation is not None]
    assert texts == [job.text() for job in jobs]
    assert dataclasses.asdict(server.scheduler.load())["num_free_blocks"] == 24
