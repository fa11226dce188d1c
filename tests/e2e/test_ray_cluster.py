"""Replicas on a cluster of Ray's that runs already: tensor-parallel groups, Serve's own configs, what it replaces and takes
away."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from fake_engine import VOCAB_SIZE, byte_wrapper
from ray_deployment import (
    BIN,
    FLAGS,
    REPLICA,
    Cluster,
    Deployment,
    children,
    clustered,
    complete,
    deployed,
    environment,
    frames,
    is_running,
    stream,
)
from requirements import long
from server_process import serving
from tiny_models import tiny_llama
from waiting import until

NUM_TOKENS = 24
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
    command = [BIN / "python", "-c", PLACEMENT_GROUPS, cluster.address]
    asked = subprocess.run(command, env=os.environ | cluster.keys, capture_output=True, text=True, timeout=60)
    groups = json.loads(asked.stdout.splitlines()[-1])
    return [group for group in groups if group["state"] != "REMOVED"]


def ranks(deployment: Deployment, replica: str) -> list[int]:
    """The processes of its tensor-parallel group beyond its own."""
    pids = children(deployment.pids()[replica])
    return [pid for pid in pids if "headrace.scheduler.rank" in Path(f"/proc/{pid}/cmdline").read_text()]


def test_a_tensor_parallel_group_has_its_gpus_answers_as_one_process_does_and_is_replaced_as_one(
    cluster: Cluster, tiny_model: Path
) -> None:
    body = {"prompt": "The mill wheel", "max_tokens": NUM_TOKENS, "temperature": 0}
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
