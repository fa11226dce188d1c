"""The C++ kernel on the real model: as exact as bfloat16 allows, however a text is cut, and alike in any company."""

import asyncio
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import save_file

from headrace.kernels.backend import Backend, StepBatch
from headrace.kernels.cpu_backend import CpuBackend
from headrace.kernels.cpu_library import KernelUnavailableError, choose_instruction_set
from headrace.scheduler.config import EngineConfig
from headrace.scheduler.gguf_config import gguf_config
from headrace.scheduler.gguf_file import open_gguf
from headrace.scheduler.model_files import read_gguf
from headrace.scheduler.model_loader import load_engine
from headrace.scheduler.model_source import ModelSource
from headrace.server.tokenizer import load_tokenizer
from requirements import IS_LONG, lack, long, need_program
from server_process import ServerProcess, serving

TEXT = Path(__file__).parent / "texts" / "mill.txt"

NUM_TOKENS = 600 if IS_LONG else 300
MAX_TOKENS = 1024


@pytest.fixture(scope="module", autouse=True)
def kernel_runs_here() -> None:
    try:
        choose_instruction_set()
    except KernelUnavailableError as error:
        lack(str(error))
    need_program("g++")


def has_amx() -> bool:
    return choose_instruction_set().name == "amx"


@pytest.fixture(scope="module")
def text(demo_model: Path) -> list[int]:
    """A text's tokens, in prose that no model has learned by heart."""
    tokenizer = load_tokenizer(ModelSource(demo_model, "demo"))
    return tokenizer.encode(TEXT.read_text(), add_special_tokens=False)


def load(model: Path, **fields: Any) -> Backend:
    defaults: dict[str, Any] = {"device": "cpu", "max_num_batched_tokens": MAX_TOKENS, "kv_cache_bytes": 2**29}
    _, runner = load_engine(EngineConfig(model, **(defaults | fields)))
    assert isinstance(runner.backend, CpuBackend) == (fields.get("dtype") != "float32")
    return runner.backend


@pytest.fixture(scope="module")
def reference(demo_model: Path, text: list[int]) -> torch.Tensor:
    return compute(load(demo_model, dtype="float32"), text[:NUM_TOKENS], [NUM_TOKENS])


@pytest.fixture(scope="module")
def bfloat16_reference(bfloat16_model: Path, text: list[int]) -> torch.Tensor:
    """The rounded weights in float32."""
    return compute(load(bfloat16_model, dtype="float32"), text[:NUM_TOKENS], [NUM_TOKENS])


@pytest.fixture(scope="module")
def bfloat16_model(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model as a directory of safetensors in bfloat16."""
    folder, file = tmp_path_factory.mktemp("bfloat16"), open_gguf(demo_model)
    gguf_config(file).save_pretrained(folder)
    weights = read_gguf(file, torch.bfloat16, keeps_quants=False)
    save_file({name: w for name, w in weights.items() if isinstance(w, torch.Tensor)}, folder / "model.safetensors")
    return folder


def scattered(num_tokens: int) -> list[int]:
    """A block table that jumps about."""
    num_blocks = -(-num_tokens // 16)
    return [(7 * i + 3) % 1021 for i in range(num_blocks)]


def compute(backend: Backend, tokens: list[int], chunks: list[int], num_last: int | None = None) -> torch.Tensor:
    """Logits of the tokens, or of the last ones, [tokens, V], with the chunks repeated until there are no more."""
    rows, done, blocks = [], 0, scattered(len(tokens))
    for chunk in itertools.cycle(chunks):
        num = min(chunk, len(tokens) - done)
        wanted = [i for i in range(num) if num_last is None or done + i >= len(tokens) - num_last]
        rows.append(
            backend.forward(StepBatch(tokens[done : done + num], [num], [done + num], [blocks], wanted)).clone()
        )
        done += num
        if done == len(tokens):
            return torch.cat(rows)
    raise AssertionError("no chunks")


def divergence(expected: torch.Tensor, actual: torch.Tensor) -> float:
    """Mean Kullback-Leibler divergence of the next token's distribution."""
    logs = expected.double().log_softmax(-1)
    return float((logs.exp() * (logs - actual.double().log_softmax(-1))).sum(-1).mean())


def agreement(expected: torch.Tensor, actual: torch.Tensor) -> float:
    return float((expected.argmax(-1) == actual.argmax(-1)).double().mean())


def test_in_bfloat16_it_agrees_with_float32(
    bfloat16_model: Path, text: list[int], bfloat16_reference: torch.Tensor
) -> None:
    actual = compute(load(bfloat16_model), text[:NUM_TOKENS], [NUM_TOKENS])
    assert divergence(bfloat16_reference, actual) < 0.001
    assert agreement(bfloat16_reference, actual) >= 0.99


def test_an_int8_cache_stays_close_to_float32(
    bfloat16_model: Path, text: list[int], bfloat16_reference: torch.Tensor
) -> None:
    actual = compute(load(bfloat16_model, kv_cache_dtype="int8"), text[:NUM_TOKENS], [NUM_TOKENS])
    assert divergence(bfloat16_reference, actual) < 0.003


@pytest.mark.parametrize("chunk", [NUM_TOKENS, 8, 1], ids=["wide", "narrow", "one by one"])
@pytest.mark.parametrize("fields", [{"cpu_activations": "int16"}, {"batch_invariant": True}], ids=str)
def test_weights_as_the_gguf_has_them_agree_with_float32(
    demo_model: Path, text: list[int], reference: torch.Tensor, chunk: int, fields: dict[str, Any]
) -> None:
    actual = compute(load(demo_model, **fields), text[:NUM_TOKENS], [chunk])
    assert divergence(reference, actual) < 0.001
    assert agreement(reference, actual) >= 0.98


@pytest.mark.parametrize("chunk", [NUM_TOKENS, 8, 1], ids=["wide", "narrow", "one by one"])
def test_activations_of_8_bits_stay_close_to_float32(
    demo_model: Path, text: list[int], reference: torch.Tensor, chunk: int
) -> None:
    actual = compute(load(demo_model), text[:NUM_TOKENS], [chunk])
    assert divergence(reference, actual) < 0.005
    assert agreement(reference, actual) >= 0.93


@pytest.mark.parametrize(
    "chunks",
    [
        pytest.param([1], marks=long),
        [7, 1, 33, 64, 5, 1, 1, 100, 13],
        [NUM_TOKENS - 20, 1],
        [256, 3],
    ],
)
def test_however_a_text_is_cut_its_logits_agree_with_one_prefill(
    demo_model: Path, bfloat16_model: Path, text: list[int], chunks: list[int]
) -> None:
    tokens = text[:NUM_TOKENS]
    as_stored = load(demo_model, cpu_activations="int16")
    assert divergence(compute(as_stored, tokens, [NUM_TOKENS]), compute(as_stored, tokens, chunks)) < 0.001
    for backend in load(demo_model), load(bfloat16_model):
        whole, cut = compute(backend, tokens, [NUM_TOKENS]), compute(backend, tokens, chunks)
        # With AMX's tiles wide steps are in bfloat16.
        assert torch.equal(whole, cut) or (has_amx() and divergence(whole, cut) < 0.005)


@long
def test_it_agrees_up_to_the_full_context(demo_model: Path, bfloat16_model: Path, text: list[int]) -> None:
    tokens = (text * 14)[:8192]
    assert len(tokens) == 8192
    in_float32 = load(demo_model, dtype="float32", kv_cache_bytes=2**30)
    expected = compute(in_float32, tokens, [512], num_last=64)
    actual = compute(load(bfloat16_model), tokens, [512, 33], num_last=64)
    assert divergence(expected, actual) < 0.002
    assert agreement(expected, actual) >= 0.95


@pytest.fixture(scope="module")
def invariant_server(demo_model: Path) -> Iterator[ServerProcess]:
    with serving("--batch-invariant", "--kv-cache-bytes", "1GiB") as process:
        assert "C++ kernel" in process.output
        yield process


def test_through_the_server_batched_text_equals_text_alone(invariant_server: ServerProcess) -> None:
    subjects = ["mills", "rivers", "bread", "the moon", "prime numbers", "glass", "tea", "maps", "salt", "clocks"]
    requests = [
        {
            "messages": [{"role": "user", "content": f"Write a few sentences about {subject}. " * (1 + i % 4)}],
            "max_tokens": 30 + 10 * i,
            "temperature": (0, 0.8)[i % 2],
            "top_p": 0.95,
            "seed": i,
        }
        for i, subject in enumerate(subjects)
    ]

    async def ask(client: httpx.AsyncClient, request: dict[str, Any]) -> str:
        response = await client.post("/v1/chat/completions", json=request)
        return str(response.raise_for_status().json()["choices"][0]["message"]["content"])

    async def compare() -> None:
        async with httpx.AsyncClient(base_url=invariant_server.url(), timeout=60) as client:
            alone = [await ask(client, request) for request in requests]
            together = await asyncio.gather(*(ask(client, request) for request in 3 * requests))
        assert together == 3 * alone

    asyncio.run(compare())
