"""A model on disk as a tensor-parallel group loads it, in threads; the processes of a group, in scripts."""

import sys
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch

from gguf_writing import write_model
from headrace.kernels.tensor_parallel import Group
from headrace.scheduler import model_loader, ranks as ranks_module
from headrace.scheduler.config import EngineConfig
from headrace.scheduler.errors import CapacityError, HeadraceError, RankError, UnsupportedModelError
from headrace.scheduler.model_loader import load_engine
from headrace.scheduler.ranks import Ranks
from rank_threads import loading_ranks
from tiny_models import VOCAB_SIZE, generate, generate_with_hugging_face, greedy, tiny_llama, tiny_model

NUM_TOKENS = 10
SHARED = [(7 * i + 3) % VOCAB_SIZE for i in range(24)]
PROMPTS = [[*SHARED, 5], [(11 * i) % VOCAB_SIZE for i in range(30)], [3], [*SHARED, 9, 8], [4, 4, 4]]
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "mistral": {"model_type": "mistral", "sliding_window": 9, "vocab_size": VOCAB_SIZE + 1},
}


def load(path: Path, size: int = 2, **fields: Any) -> Any:
    defaults: dict[str, Any] = {
        "dtype": "float32",
        "kv_cache_bytes": 1 << 20,
        "block_size": 4,
        "max_num_batched_tokens": 16,
        "max_num_seqs": 8,
        "collective_timeout_s": 20,
    }
    return load_engine(EngineConfig(path, tensor_parallel_size=size, **(defaults | fields)))


@pytest.fixture
def in_threads(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The ranks of engines that are loaded, ended afterwards."""
    started = []

    def start(config: EngineConfig) -> Any:
        started.append(loading_ranks(config))
        return started[-1]

    monkeypatch.setattr(model_loader, "Ranks", start)
    yield started
    for each in started:
        each.close()


@pytest.mark.parametrize("name", MODELS)
def test_two_ranks_say_what_hugging_face_does(name: str, tmp_path: Path, in_threads: Any) -> None:
    model = tiny_model(seed=3, **MODELS[name])
    model.save_pretrained(tmp_path)
    scheduler, runner = load(tmp_path)
    runner.warm_up()
    # Prompts in chunks beside decoding, the second time over with what the first has cached.
    expected = [generate_with_hugging_face(model, prompt, NUM_TOKENS) for prompt in PROMPTS]
    for _ in range(2):
        answers = generate(scheduler, runner, PROMPTS, [greedy(NUM_TOKENS)] * len(PROMPTS), is_staggered=True)
        assert answers == expected
    assert "2 tensor-parallel ranks" in runner.description
    assert "no C++ kernel" not in runner.description or "tensor_parallel_size is 2" in runner.description


def test_each_ranks_cache_holds_its_own_heads_and_so_more_tokens(tmp_path: Path, in_threads: Any) -> None:
    tiny_llama().save_pretrained(tmp_path)
    (alone, _), (together, _) = load(tmp_path, 1, kv_cache_bytes=1 << 16), load(tmp_path, kv_cache_bytes=1 << 16)
    assert together.load().num_total_blocks == 2 * alone.load().num_total_blocks


def test_the_parts_of_a_gguf_say_what_the_whole_does(tmp_path: Path, in_threads: Any) -> None:
    model = tiny_llama(seed=4)
    path = write_model(tmp_path / "tiny.gguf", "llama", model, {"rope.freq_base": 10000.0}, "Q8_0")
    answers = [
        generate(scheduler, runner, PROMPTS, [greedy(NUM_TOKENS)] * len(PROMPTS))
        for scheduler, runner in (load(path, 1), load(path, 2))
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("size", "fields", "config", "error", "message"),
    [
        (4, {}, {}, UnsupportedModelError, "tensor_parallel_size 4 does not divide its 2 key/value heads"),
        (2, {}, {"intermediate_size": 97}, UnsupportedModelError, "does not divide its 97 feed-forward inputs"),
        (2, {}, {"model_type": "gemma"}, UnsupportedModelError, "tensor_parallel_size is for llama, mistral"),
        (2, {"cpu_kernel": "avx2"}, {}, CapacityError, "cpu_kernel avx2 needs .*: tensor_parallel_size is 2"),
        (2, {"batch_invariant": True}, {}, CapacityError, "batch_invariant needs .*: tensor_parallel_size is 2"),
    ],
)
def test_what_cannot_be_split_is_refused_before_a_rank_is_started(
    size: int, fields: Any, config: Any, error: type[HeadraceError], message: str, tmp_path: Path
) -> None:
    tiny_model(**({"model_type": "llama"} | config)).save_pretrained(tmp_path)
    with pytest.raises(error, match=message):
        load(tmp_path, size, device="cpu", **fields)


def test_gpus_that_are_not_there_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with pytest.raises(CapacityError, match="tensor_parallel_size 2 needs GPUs 2 to 3, and torch sees 3"):
        load(tmp_path, device="cuda:2")


# The other side of the connection, without what takes seconds to import.
SCRIPT = """#!{python}
import json, os, signal, sys, time
from multiprocessing.connection import Connection
connection = Connection(int(sys.argv[-1]))
rank, *_ = json.loads(connection.recv_bytes())
{body}
"""


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Has the processes of ranks run the script instead."""
    python = sys.executable

    def write(body: str) -> Ranks:
        path = tmp_path / "rank"
        path.write_text(SCRIPT.format(python=python, body=body))
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))
        monkeypatch.setattr(Group, "open", lambda *_: None)
        monkeypatch.setattr(ranks_module, "share_threads", lambda *_: None)
        return Ranks(EngineConfig(tmp_path, tensor_parallel_size=3))

    return write


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("connection.send_bytes(b'\"out of memory\"')", "rank [12]: out of memory"),
        ("os._exit(3)", r"rank [12]: it has ended \(exit code 3\)"),
        ("os.kill(os.getpid(), signal.SIGKILL)", r"rank [12]: it has ended \(exit code -9\)"),
    ],
)
def test_a_rank_that_does_not_come_says_why(body: str, message: str, script: Any) -> None:
    ranks = script(body)
    with pytest.raises(RankError, match=message):
        ranks.meet(torch.device("cuda"))
    ranks.close()


def test_ranks_agree_on_the_least_and_end_when_they_are_told(script: Any) -> None:
    ranks = script(
        "connection.send_bytes(b'0')\n"
        "connection.send_bytes(b'%d' % (100 - rank))\n"
        "assert json.loads(connection.recv_bytes()) == 98\n"
        "connection.send_bytes(b'0')\n"
        "assert connection.recv_bytes() == b'step'\n"
        "try: connection.recv_bytes()\n"
        "except EOFError: sys.exit(0)\n"
        "sys.exit(1)\n"
    )
    ranks.meet(torch.device("cuda"))
    assert ranks.least(101) == 98
    ranks.wait_loaded()
    ranks.send(b"step")
    assert ranks.why_lost() is None
    processes = ranks._processes._processes
    ranks.close()
    assert [process.returncode for process in processes] == [0, 0]
    assert ranks.why_lost() is None


def test_a_rank_that_goes_later_is_noticed_and_one_that_hangs_is_killed(
    script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks_module, "_FAREWELL_S", 0.1)
    ranks = script(
        "connection.send_bytes(b'0')\nif rank == 1: connection.recv_bytes(); os._exit(7)\nwhile True: time.sleep(60)\n"
    )
    ranks.meet(torch.device("cuda"))
    heard, heard_late = Event(), Event()
    ranks.watch(heard.set)
    ranks.send(b"step")
    assert heard.wait(20)
    assert ranks.why_lost() == "rank 1: it has ended (exit code 7)"
    ranks.watch(heard_late.set)
    assert heard_late.is_set()
    with pytest.raises(RankError, match="rank 1: it has ended"):
        ranks.send(b"step")
    processes = ranks._processes._processes
    ranks.close()
    assert [process.returncode for process in processes] == [7, -9]


def test_what_another_rank_raised_is_the_error_of_the_start(tmp_path: Path, script: Any) -> None:
    tiny_llama().save_pretrained(tmp_path)
    script("connection.send_bytes(b'0')\nconnection.send_bytes(b'\"weight x is missing\"')\n")
    with pytest.raises(RankError, match=r"rank [12]: weight x is missing"):
        load(tmp_path, 2, kv_cache_bytes=None)
