"""`python -m headrace.benchmarks.scheduler_bench`: what scheduling and publishing cost beside a step of the real model.

256 sequences run and 1,000 of 100 tenants wait. The host's part of a step is `schedule()`, `update()`, the snapshot and
handing the publication to the loop; the bound is the larger of 1 % of a step and 200 us. Then 10,000 requests that wait
are cancelled at once, and the longest of the next steps' host parts is printed beside a step's length.
"""

import argparse
import statistics
import sys
import time
from collections import deque
from collections.abc import Sequence

from headrace.kernels.step_times import StepTimes
from headrace.scheduler.config import EngineConfig
from headrace.scheduler.messages import GenerationRequest, SamplingParams, StepOutput, Tier
from headrace.scheduler.model_loader import load_engine
from headrace.scheduler.model_source import resolve_model

_NUM_RUNNING = 256
_NUM_WAITING = 1000
_NUM_TENANTS = 100
_NUM_CANCELLED = 10_000
_PROMPT_TOKENS = 64
_BOUND_S, _BOUND_SHARE = 200e-6, 0.01


class _Engine:
    """The engine's loop, one step at a time, its halves timed."""

    def __init__(self, model: str | None) -> None:
        self._scheduler, self._runner = load_engine(
            EngineConfig(
                resolve_model(model).path,
                max_num_seqs=_NUM_RUNNING,
                max_num_batched_tokens=512,
                itl_targets_s=(float("inf"),) * len(Tier),
            )
        )
        for shape, seconds in self._runner.warm_up():
            self._scheduler.observe(shape, seconds)
        self._num_requests = 0
        self._published: deque[StepOutput] = deque(maxlen=1)

    def add(self, num_requests: int) -> range:
        """Queue requests; returns their ids."""
        ids = range(self._num_requests, self._num_requests + num_requests)
        for id in ids:
            prompt = tuple((id * 31 + i) % 20_000 for i in range(_PROMPT_TOKENS))
            sampling = SamplingParams(temperature=0.0, max_tokens=2000)
            tier, tenant = tuple(Tier)[id % 3], f"t{id % _NUM_TENANTS}"
            request = GenerationRequest(id, prompt, sampling, 0.0, deadline_s=1e9, tier=tier, tenant=tenant)
            self._scheduler.add(request)
        self._num_requests += num_requests
        return ids

    def cancel(self, ids: range) -> None:
        self._scheduler.cancel(*ids)

    def step(self) -> tuple[float, float, int]:
        """(Seconds of the host's part, of the model's part, sequences that run)."""
        began_s = time.perf_counter()
        output = self._scheduler.schedule(began_s)
        scheduled_s = time.perf_counter()
        results = self._runner.run(output)
        computed_s = time.perf_counter()
        outputs = self._scheduler.update(output, results, StepTimes(scheduled_s, computed_s, None))
        load = self._scheduler.load()
        self._published.append(StepOutput((*output.dropped, *outputs), load))
        host_s = scheduled_s - began_s + time.perf_counter() - computed_s
        return host_s, computed_s - scheduled_s, load.num_running


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("headrace.benchmarks.scheduler_bench", description=__doc__.partition("\n\n")[0])
    parser.add_argument("model", nargs="?", help="a GGUF file; the demo model where none is named")
    parser.add_argument("--num-steps", type=int, default=60)
    options = parser.parse_args(arguments)
    engine = _Engine(options.model)
    waiting = engine.add(_NUM_RUNNING + _NUM_WAITING)
    while engine.step()[2] < _NUM_RUNNING:
        pass
    steps = [engine.step() for _ in range(options.num_steps)]
    host_s, model_s = (statistics.median(step[i] for step in steps) for i in (0, 1))
    bound_s = max(_BOUND_S, _BOUND_SHARE * (host_s + model_s))
    print(f"{steps[-1][2]} running, {_NUM_WAITING} waiting of {_NUM_TENANTS} tenants, medians of {len(steps)} steps")
    print(f"host {host_s * 1e6:.0f} us of a step of {(host_s + model_s) * 1e3:.1f} ms, bound {bound_s * 1e6:.0f} us")
    more = engine.add(_NUM_CANCELLED)
    engine.step()
    began_s = time.perf_counter()
    engine.cancel(more)
    marked_s = time.perf_counter() - began_s
    after = [engine.step() for _ in range(_NUM_CANCELLED // 200)]
    longest_s = marked_s + max(step[0] for step in after) - host_s
    print(
        f"{_NUM_CANCELLED} cancels at once: {longest_s * 1e3:.2f} ms more in the longest step, "
        f"{100 * longest_s / (host_s + model_s):.1f} % of one"
    )
    assert waiting
    return 0


if __name__ == "__main__":
    sys.exit(main())
