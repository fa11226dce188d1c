"""Replicas on Ray Serve, as `headrace deploy` starts them: routing, streams, departures, deaths and the end."""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import pytest

from ray_deployment import REPLICA, Deployment, complete, deployed, frames, stream
from requirements import long
from waiting import until

pytestmark = [
    long,
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def deployment(slow_model: Path) -> Iterator[Deployment]:
    with deployed(slow_model, "--replicas", "2", "--drain-grace-s", "60") as deployment:
        yield deployment


def test_what_comes_at_once_is_shared_and_what_begins_alike_stays_together(deployment: Deployment) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda n: complete(deployment, f"{n} mill wheels", max_tokens=50), range(16)))
    assert len({answer.headers[REPLICA] for answer in answers}) == 2
    system = "You mend mill wheels, and nothing else. " * 60
    first, *others = (complete(deployment, f"{system}{n}") for n in range(6))
    assert {answer.headers[REPLICA] for answer in others} == {first.headers[REPLICA]}
    cached = [answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in others]
    assert min(cached) > 2000


def test_a_client_that_leaves_at_the_proxy_is_cancelled_in_its_replica_within_steps(deployment: Deployment) -> None:
    replica = complete(deployment, "hi").headers[REPLICA]
    surplus = []
    for _ in range(5):
        before = deployment.metric(replica, "generation_tokens_total")
        num_read = 0
        with stream(deployment, {REPLICA: replica}) as response:
            for frame in frames(response):
                num_read += len(frame["choices"][0].get("token_ids", ()))
                if num_read >= 50:
                    break
        assert response.headers[REPLICA] == replica
        assert num_read >= 50
        until(lambda: deployment.metric(replica, "num_requests_running") == 0, "the sequence is cancelled")
        surplus.append(deployment.metric(replica, "generation_tokens_total") - before - num_read)
    print(f"tokens computed beyond those that were read: {surplus}")
    assert sorted(surplus)[2] <= 3


def test_a_stream_whose_replica_is_killed_ends_with_one_error_and_the_other_replica_goes_on(
    deployment: Deployment,
) -> None:
    with stream(deployment) as response:
        events = frames(response)
        next(events)
        victim = response.headers[REPLICA]
        os.kill(deployment.pids()[victim], signal.SIGKILL)
        *_, last = events
    assert last["error"]["code"] == "replica_lost"
    assert complete(deployment, "hi").headers[REPLICA] != victim


def refusals(deployment: Deployment) -> list[httpx.Response]:
    """What is answered from now on to who asks again and again, until nobody answers."""
    answers = []
    with suppress(httpx.TransportError):
        while True:
            body = {"prompt": "hi", "max_tokens": 1}
            answers.append(httpx.post(f"{deployment.url()}/v1/completions", json=body, timeout=60))
    return answers


def test_the_end_refuses_what_comes_waits_for_what_runs_and_tells_what_runs_longer(slow_model: Path) -> None:
    with (
        deployed(slow_model, "--replicas", "2", "--drain-grace-s", "8") as deployment,
        ThreadPoolExecutor(1) as pool,
        stream(deployment, max_tokens=40) as short,
        stream(deployment, max_tokens=8000) as endless,
    ):
        events, further = frames(short), frames(endless)
        next(events)
        next(further)
        deployment.process.send_signal(signal.SIGTERM)
        until(lambda: httpx.get(f"{deployment.url()}/ready").status_code == 503, "it drains")
        refused = pool.submit(refusals, deployment)
        *_, last = events
        *_, last_of_endless = further
        assert last["choices"][0]["finish_reason"] == "length"
        assert last_of_endless["error"]["code"] == "draining"
        assert deployment.stop(timeout_s=120) == 0
        assert {answer.status_code for answer in refused.result()} == {503}
        assert {answer.json()["error"]["code"] for answer in refused.result()} == {"draining"}
        assert {answer.headers["retry-after"] for answer in refused.result()} == {"1"}


def test_a_second_signal_ends_what_runs_at_once_and_it_is_told(slow_model: Path) -> None:
    with deployed(slow_model, "--drain-grace-s", "600") as deployment, stream(deployment, max_tokens=8000) as endless:
        events = frames(endless)
        next(events)
        deployment.process.send_signal(signal.SIGTERM)
        until(lambda: httpx.get(f"{deployment.url()}/ready").status_code == 503, "it drains")
        deployment.process.send_signal(signal.SIGTERM)
        *_, last = events
        assert last["error"]["code"] == "draining"
        assert deployment.process.wait(60) == 0


def test_a_model_that_is_not_there_is_told_and_ends_the_deployment(slow_model: Path) -> None:
    deployment = Deployment([str(slow_model / "none")])
    deployment.wait_for(rf"(?m)^headrace: {slow_model}/none is no directory", 180)
    assert deployment.process.wait(60) == 1
    assert "AttributeError" not in deployment.output
    deployment.stop()


def test_a_signal_ends_a_deployment_that_is_still_loading(slow_model: Path) -> None:
    deployment = Deployment([str(slow_model)])
    deployment.wait_for("Adding 1 replica", 120)
    assert deployment.stop(timeout_s=60) == 0
    assert "are ready" not in deployment.output


def test_replicas_are_added_while_requests_wait(slow_model: Path) -> None:
    flags = ["--replicas", "1", "--max-replicas", "2", "--max-num-seqs", "2", "--ttft-targets-s", "[1e6,1e6,1e6]"]
    with deployed(slow_model, *flags) as deployment, ExitStack() as streams:
        for _ in range(6):
            streams.enter_context(stream(deployment))
        until(lambda: len(deployment.pids()) == 2, "a second replica", 120)
