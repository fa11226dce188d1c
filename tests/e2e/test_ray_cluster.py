"""What is Serve's own to do with replicas: place tensor-parallel groups, run a config, take a replica away."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml  # type: ignore[import-untyped]

from fake_engine import VOCAB_SIZE, byte_wrapper
from ray_deployment import (
    BIN,
    FLAGS,
    REPLICA,
    Cluster,
    Deployment,
    ServeRun,
    children,
    clustered,
    complete,
    deployed,
    environment,
    frames,
    free_port,
    is_running,
    ray_of_its_own,
    stream,
)
from requirements import long
from resuming_readers import Reader
from server_process import serving
from tiny_models import tiny_llama
from waiting import until

CONFIG = Path(__file__).parents[2] / "configs" / "serve.yaml"
NUM_TOKENS = 24
NUM_NATIVE_TOKENS = 3000
PLACEMENT_GROUPS = """
import json, sys, ray
ray.init(sys.argv[1], log_to_driver=False)
print(json.dumps(list(ray.util.placement_group_table().values())))
"""

pytestmark = [
    long,
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with clustered() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    tiny_llama(seed=5, vocab_size=VOCAB_SIZE, max_position_embeddings=8192).save_pretrained(path)
    byte_wrapper().save_pretrained(path)
    return path


def placement_groups(cluster: Cluster) -> list[dict[str, Any]]:
    """Those that it has now."""
    command = [str(BIN / "python"), "-c", PLACEMENT_GROUPS, cluster.address]
    asked = subprocess.run(command, env=os.environ | cluster.env, capture_output=True, text=True, timeout=60)
    groups = json.loads(asked.stdout.splitlines()[-1])
    return [group for group in groups if group["state"] != "REMOVED"]


def ranks(deployment: Deployment, replica: str) -> list[int]:
    """The processes of its tensor-parallel group beyond its own."""
    pids = children(deployment.pids()[replica])
    return [pid for pid in pids if "headrace.scheduler.rank" in Path(f"/proc/{pid}/cmdline").read_text()]


def test_a_tensor_parallel_group_has_its_gpus_answers_as_one_process_does_and_is_replaced_as_one(
    cluster: Cluster, tiny_model: Path
) -> None:
    body: dict[str, Any] = {"prompt": "The mill wheel", "max_tokens": NUM_TOKENS, "temperature": 0}
    with serving(str(tiny_model), *FLAGS) as server, stream(server, **body) as response:
        expected = [id for frame in frames(response) for id in frame["choices"][0].get("token_ids", ())]
    assert len(expected) == NUM_TOKENS
    flags = ["--device", "cpu", "--tensor-parallel-size", "2", "--replica-gpus", "2"]
    with deployed(tiny_model, *flags, "--drain-grace-s", "10", cluster=cluster) as deployment:
        [group] = placement_groups(cluster)
        assert group["bundles"] == {"0": {"CPU": 0.5, "GPU": 2.0}}
        assert (group["state"], group["strategy"]) == ("CREATED", "STRICT_PACK")
        with stream(deployment, **body) as response:
            found = [id for frame in frames(response) for id in frame["choices"][0].get("token_ids", ())]
        assert found == expected
        replica = response.headers[REPLICA]
        [rank] = ranks(deployment, replica)
        gpus = environment(rank)["CUDA_VISIBLE_DEVICES"]
        assert sorted(gpus.split(",")) == ["0", "1"]
        with stream(deployment, max_tokens=8000) as endless:
            events = frames(endless)
            next(events)
            os.kill(rank, signal.SIGKILL)
            *_, last = events
        assert last["error"]["code"] == "engine_error"
        until(lambda: len(deployment.pids()) == 2, "another replica", 120)
        assert complete(deployment, "hi").headers[REPLICA] not in (replica, None)
        until(lambda: not is_running(deployment.pids()[replica]), "the end of the first one")
        [other] = set(deployment.pids()) - {replica}
        last_ranks = ranks(deployment, other)
        assert len(last_ranks) == 1
        assert deployment.stop(timeout_s=120) == 0
    assert not any(map(is_running, last_ranks))
    assert placement_groups(cluster) == []


def test_a_replica_whose_engine_hangs_is_replaced(cluster: Cluster, tiny_model: Path) -> None:
    flags = ["--device", "cpu", "--tensor-parallel-size", "2", "--replica-gpus", "2", "--drain-grace-s", "1"]
    watchdog = ["--watchdog-soft-s", "2", "--watchdog-hard-s", "600"]
    with deployed(tiny_model, *flags, *watchdog, cluster=cluster) as deployment:
        [replica] = deployment.pids()
        [rank] = ranks(deployment, replica)
        with stream(deployment, max_tokens=8000) as endless:
            events = frames(endless)
            next(events)
            os.kill(rank, signal.SIGSTOP)
            *_, last = events
        assert last["error"]["code"] == "replica_lost"
        deployment.wait_for("RuntimeError: engine_hung")
        deployment.wait_for(r"(?s)(replica \w+ is ready.*){2}")
        assert complete(deployment, "hi").headers[REPLICA] != replica
        until(lambda: not is_running(rank), "the end of what stood still")


def config(folder: Path, model: Path, port: int, num_replicas: int | None = None) -> Path:
    """The config that is shipped, for this machine and this model."""
    content = yaml.safe_load(CONFIG.read_text())
    content["http_options"] = {"host": "127.0.0.1", "port": port}
    [application] = content["applications"]
    application["args"] |= {"host": "127.0.0.1", "model": str(model), "kv_cache_bytes": "256MiB"}
    if num_replicas is not None:
        own = {"replicas": 2, "replica_cpus": 0.5, "journal_dir": str(folder / "journals"), "batch_invariant": True}
        application["args"] |= own | {"drain_grace_s": 1}
        del application["args"]["max_replicas"]
        application["deployments"].append({"name": "Replica", "num_replicas": num_replicas})
    path = folder / f"{num_replicas}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_serve_runs_the_config_that_is_shipped_until_control_c(tmp_path: Path, tiny_model: Path) -> None:
    port = free_port()
    with ray_of_its_own() as env:
        run = ServeRun(config(tmp_path, tiny_model, port), port, env)
        try:
            run.wait_for(r"replica \w+ is ready", 180)
            until(lambda: httpx.get(f"{run.url()}/ready").status_code == 200, "Serve's proxy")
            assert complete(run, "hi").headers[REPLICA] in run.pids()
            assert run.stop(signal.SIGINT, timeout_s=120) == 0
        finally:
            run.stop(timeout_s=120)
        until(lambda: not any(map(is_running, run.pids().values())), "its end")


def test_where_a_replica_is_taken_away_its_streams_end_whole_or_go_on_at_another_one(
    tmp_path: Path, slow_model: Path
) -> None:
    port = free_port()
    body = {"prompt": "The river", "max_tokens": NUM_NATIVE_TOKENS, "temperature": 0, "ignore_eos": True}
    with ray_of_its_own() as env, ExitStack() as stack, ThreadPoolExecutor(4) as pool:
        run = ServeRun(config(tmp_path, slow_model, port, 2), port, env)
        stack.callback(run.stop, timeout_s=120)
        run.wait_for(r"(?s)(replica \w+ is ready.*){2}", 90)
        until(lambda: httpx.get(f"{run.url()}/ready").status_code == 200, "Serve's proxy")
        shorts, longs, natives = {}, {}, {}
        for name in run.pids():
            headers = {REPLICA: name}
            longs[name] = frames(stack.enter_context(stream(run, headers, max_tokens=8000)))
            next(longs[name])
            shorts[name] = frames(stack.enter_context(stream(run, headers, max_tokens=20)))
            created = httpx.post(f"{run.url()}/v1/streams", json=body | {"on_disconnect": "continue"}, headers=headers)
            assert created.headers[REPLICA] == name
            natives[name] = Reader(created.json())
        following = [pool.submit(reader.follow, run.url()) for reader in natives.values()]
        smaller = ServeRun(config(tmp_path, slow_model, port, 1), port, env, "--non-blocking", "--address", "auto")
        assert smaller.process.wait(60) == 0
        smaller.stop()
        for short in shorts.values():
            *_, last = short
            assert last["choices"][0]["finish_reason"] == "length"
        until(lambda: not all(map(is_running, run.pids().values())), "one is taken away", 60)
        [survivor] = [name for name, pid in run.pids().items() if is_running(pid)]
        [taken] = set(run.pids()) - {survivor}
        *_, last = longs[taken]
        assert last["error"]["code"] == "replica_lost"
        assert "choices" in next(longs[survivor])
        for future in following:
            future.result()
        assert [natives[name].events[-1]["event"] for name in (taken, survivor)] == ["interrupted", "done"]
        natives[taken].follow(run.url())
        assert natives[taken].events[-1]["event"] == "done"
        assert natives[taken].text == natives[survivor].text
