"""Comparisons as `benchmarks.compare` fills them, of figures that a test chooses."""

from dataclasses import asdict
from typing import Any

from headrace.benchmarks.comparison import Comparison, Measurement
from headrace.benchmarks.measurement import Outcome, Run, Targets, Timeline, summarize

OUTPUT_TOKENS = 3


def comparison(*measurements: Measurement, prompt_tokens: int = 154) -> Comparison:
    """One of these measurements."""
    settings: dict[str, Any] = {
        "model": "tiny",
        "targets": list(dict.fromkeys(measurement.target for measurement in measurements)),
        "prompt_tokens": prompt_tokens,
        "max_tokens": OUTPUT_TOKENS,
        "requests_per_stream": 1,
    }
    environment = {"cores": 2, "cpu": "a CPU", "versions": {"vllm": "0.1"}, "commands": {}}
    return Comparison(settings, environment, measurements=list(measurements))


def measurement(
    target: str,
    tokens_per_s: float,
    *,
    round_number: int = 0,
    width: int = 8,
    ttft_ms: float = 10.0,
    itl_ms: float = 5.0,
    paused: dict[str, float] | None = None,
) -> Measurement:
    """A measurement whose latencies are all alike."""
    run = Run(label="", num_planned=1, width=width, ended_s=1.0)
    first_s, gap_s = ttft_ms / 1e3, itl_ms / 1e3
    timeline = Timeline(154, OUTPUT_TOKENS, prompt_tokens=154, output_tokens=OUTPUT_TOKENS, outcome=Outcome.OK)
    timeline.content_s = [first_s + index * gap_s for index in range(OUTPUT_TOKENS)]
    run.timelines.append(timeline)
    summary = asdict(summarize(run, Targets())) | {"output_tokens_per_s": tokens_per_s}
    return Measurement(target, round_number, width, summary, server_cores=1.5, paused=paused or {})
