"""http_bench measures a real server: tokens on the beat, each of them an event, and what they cost."""

import json
import subprocess
import sys


def test_it_measures_a_few_streams_on_the_beat() -> None:
    flags = ["--streams", "4", "--rate", "200", "--seconds", "1", "--rounds", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "headrace.benchmarks.http_bench", *flags],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    result = json.loads(done.stdout.splitlines()[-1])
    assert len(result["readings"]) == 2
    for reading in result["readings"]:
        assert 100 < reading["num_tokens"] <= 220
        # A machine that is busy with something else joins a few.
        assert 0.5 * reading["num_tokens"] < reading["num_events"] < reading["num_tokens"] + 12
        assert reading["cpu_s"]["loop"] > 0
        assert set(reading["p99_s"]) == {"event_loop_lag", "engine_step_gap", "engine_lock_wait"}
    assert result["us_per_token"] > 0
