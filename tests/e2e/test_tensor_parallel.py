"""A tensor-parallel group of real processes, in the end behind a real server, and what becomes of it when one goes."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch.distributed as dist

from fake_engine import VOCAB_SIZE, byte_tokenizer
from headrace.scheduler import ranks
from headrace.scheduler.config import EngineConfig
from headrace.scheduler.errors import DeviceLostError, RankError
from headrace.scheduler.model_loader import load_engine
from raw_client import RawRequest
from requirements import long
from server_process import ServerProcess, serving
from tiny_models import generate, generate_with_hugging_face, greedy, tiny_llama
from waiting import until

NUM_TOKENS = 12
PROMPT = [(7 * i + 3) % VOCAB_SIZE for i in range(40)]
# A server and its ranks import what they need one after the other.


def tiny() -> Any:
    return tiny_llama(seed=5, vocab_size=VOCAB_SIZE, max_position_embeddings=8192)


def children(server: ServerProcess) -> list[int]:
    lists = Path(f"/proc/{server.pid}/task").glob("*/children")
    return [int(pid) for each in lists for pid in each.read_text().split()]


def is_running(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny().save_pretrained(tmp_path)
    byte_tokenizer()._wrapper.save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def server(folder: Path) -> Iterator[ServerProcess]:
    flags = ("--device", "cpu", "--dtype", "float32", "--tensor-parallel-size", "2", "--kv-cache-bytes", "64MiB")
    # Half of the time is what the ranks have for each other.
    with serving(str(folder), *flags, "--watchdog-hard-s", "40") as process:
        yield process


def test_two_processes_compute_what_hugging_face_does_and_the_end_of_one_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "share_threads", lambda *_: None)  # of this process, which goes on
    config = EngineConfig(folder, dtype="float32", tensor_parallel_size=2, kv_cache_bytes=2**22)
    scheduler, runner = load_engine(config)
    [answer] = generate(scheduler, runner, [PROMPT], [greedy(NUM_TOKENS)])
    assert answer == generate_with_hugging_face(tiny(), PROMPT, NUM_TOKENS)
    backend: Any = runner.backend
    [rank] = backend._followers._processes._processes
    rank.kill()
    with pytest.raises((RuntimeError, RankError)):
        generate(scheduler, runner, [PROMPT], [greedy(NUM_TOKENS)])
    with pytest.raises(DeviceLostError, match=r"the device is lost: rank 1: it has ended \(exit code -9\)"):
        runner.recover()
    backend._followers.close()
    dist.destroy_process_group()


@long
def test_two_processes_answer_as_hugging_face_does_and_a_killed_one_ends_the_server(server: ServerProcess) -> None:
    url = f"{server.url()}/v1/completions"
    body = {"prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    answer = httpx.post(url, json=body, timeout=60).json()
    assert answer["choices"][0]["token_ids"] == generate_with_hugging_face(tiny(), PROMPT, NUM_TOKENS)
    [rank] = children(server)
    body = {"prompt": PROMPT, "max_tokens": 8000, "ignore_eos": True, "stream": True}
    with RawRequest(server.url(), "/v1/completions", body) as stream:
        stream.read_until(b"data: ")
        os.kill(rank, signal.SIGKILL)
        assert stream.read_to_end().count(b'"error":{') == 1
    assert server.process.wait(30) == 1
    server.wait_for(r"the device is lost: rank 1: it has ended \(exit code -9\)")
    assert not is_running(rank)


@long
def test_a_rank_that_is_killed_while_there_is_nothing_to_do_ends_the_server(server: ServerProcess) -> None:
    [rank] = children(server)
    os.kill(rank, signal.SIGKILL)
    assert server.process.wait(30) == 1
    server.wait_for(r"the device is lost: rank 1: it has ended \(exit code -9\)")


@long
@pytest.mark.parametrize(("sig", "code"), [(signal.SIGTERM, 0), (signal.SIGKILL, -9)])
def test_a_server_that_ends_or_is_killed_leaves_no_rank(server: ServerProcess, sig: int, code: int) -> None:
    [rank] = children(server)
    assert server.stop(sig) == code
    until(lambda: not is_running(rank), "the rank ends")


@long
def test_a_rank_that_stands_still_ends_the_server_in_time(server: ServerProcess) -> None:
    [rank] = children(server)
    os.kill(rank, signal.SIGSTOP)
    answer = httpx.post(f"{server.url()}/v1/completions", json={"prompt": PROMPT, "max_tokens": 4}, timeout=60)
    assert answer.status_code == 500
    assert server.process.wait(30) == 1
    server.wait_for("the device is lost: the ranks are out of step")
    assert not is_running(rank)
