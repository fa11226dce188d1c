"""Adapters in every backend: a row gets what merged weights would make of it, whichever its neighbours have.

That PEFT merges them alike is test_lora_adapter.py's to show.
"""

import ctypes
import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from cpu_models import (
    PagedRun,
    TinyModel,
    check_close,
    cpu_backend,
    dequantised,
    random_adapter,
    random_tokens,
    reference_backend,
)
from headrace.kernels import torch_ops
from headrace.kernels.backend import StepBatch
from headrace.kernels.decoder import Decoder, KVCache, Weight
from headrace.kernels.lora import Adapter, LowRank, merge
from headrace.kernels.torch_backend import TorchBackend

pytestmark = pytest.mark.xdist_group("cpu kernel")  # which each worker would compile

LENGTHS = (70, 37, 1, 17, 90)
NUMBERS = (1, 0, 2, 3, 2)  # the sequences' adapters
SCHEDULES: tuple[list[dict[int, int]], ...] = (
    [],
    [{0: 60, 1: 30, 2: 1, 3: 12, 4: 55}, *(dict.fromkeys((3, 1, 0), 1) for _ in range(5)), {0: 1, 4: 1}, {4: 1}],
    [{1: 13, 0: 7}, {0: 25, 1: 1, 4: 16}, {4: 1, 3: 16, 0: 1, 1: 1, 2: 1}, {0: 20, 1: 20}, {4: 10, 0: 1, 1: 1}],
)
SHAPES: dict[str, dict[str, Any]] = {
    "heads of 16": {},
    "heads of 80, biases, norms": {"head_dim": 80, "num_heads": 6, "has_qkv_bias": True, "has_head_norms": True},
    "windows, every bias": {"windows": (20, None, 9), "has_qkv_bias": True, "has_other_biases": True},
    "one layer, the narrowest": {"hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "windows": (None,)},
}
MIXED = ("Q4_0", "Q8_0", "bfloat16", "Q4_1", "Q8_0")


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread() -> Iterator[None]:
    """Two cost more than they bring on products this small."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def adapters_of(model: TinyModel) -> list[Adapter]:
    """The second changes a part of each merged product, the third a layer's output alone."""
    return [
        random_adapter(model, 1, 3),
        random_adapter(model, 2, 16, ("k_proj", "up_proj", "down_proj")),
        random_adapter(model, 3, 1, ("0.self_attn.o_proj",)),
    ]


def sequences_of(lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    return [random_tokens(length, seed=seed) for seed, length in enumerate(lengths)]


@functools.cache
def expected_logits(model: TinyModel) -> list[torch.Tensor]:
    """Each sequence's alone, of merged weights."""
    found = []
    for tokens, number in zip(sequences_of(), NUMBERS, strict=True):
        adapter = adapters_of(model)[number - 1] if number else None
        found += PagedRun(reference_backend(model, 10, adapter=adapter), [tokens]).all_logits()
    return found


def torch_backend(model: TinyModel, num_blocks: int, dtype: torch.dtype = torch.float32) -> TorchBackend:
    weights: dict[str, Weight] = {name: dequantised(weight).to(dtype) for name, weight in model.weights().items()}
    decoder = Decoder(model.config, weights, torch_ops, adapters=adapters_of(model))
    cache = KVCache.allocate(model.config.shape, num_blocks, 16, dtype, torch.device("cpu"))
    return TorchBackend(decoder, cache, torch_ops)


@pytest.mark.parametrize("shape", SHAPES)
def test_torch_computes_what_merged_weights_would(shape: str) -> None:
    model = TinyModel(**SHAPES[shape])
    for schedule in SCHEDULES:
        run = PagedRun(torch_backend(model, 20), sequences_of(), num_blocks=20, adapters=NUMBERS)
        for found, wanted in zip(run.all_logits(schedule), expected_logits(model), strict=True):
            torch.testing.assert_close(found, wanted, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        *((shape, {}) for shape in SHAPES),
        ("heads of 80, biases, norms", {"is_kv_int8": True, "types": MIXED, "activation_bits": 8}),
        ("windows, every bias", {"types": MIXED, "activation_bits": 16}),
        ("heads of 16", {"types": MIXED, "is_batch_invariant": True}),
    ],
    ids=str,
)
def test_the_cpu_kernel_computes_what_merged_weights_would(
    library: ctypes.CDLL, shape: str, settings: dict[str, Any]
) -> None:
    settings = dict(settings)
    model = TinyModel(types=settings.pop("types", ("bfloat16",)), **SHAPES[shape])
    for schedule, num_threads in zip(SCHEDULES, (1, 2, 3), strict=True):
        backend = cpu_backend(library, model, 20, num_threads=num_threads, adapters=adapters_of(model), **settings)
        run = PagedRun(backend, sequences_of(), num_blocks=20, adapters=NUMBERS)
        check_close(run.all_logits(schedule), expected_logits(model), settings)


@pytest.mark.parametrize("types", [("bfloat16",), MIXED], ids=["bfloat16", "quantised"])
def test_in_the_cpu_kernel_a_rows_bits_are_its_tokens_and_its_adapters_alone(
    library: ctypes.CDLL, types: tuple[str, ...]
) -> None:
    model = TinyModel(types=types, **SHAPES["heads of 80, biases, norms"])
    own, others = random_tokens(60), sequences_of((50, 9, 1, 20))
    for number in range(4):
        expected: torch.Tensor | None = None
        for seed, numbers in enumerate(([], [0, 0, 0, 0], [1, 2, 3, 0], [2, 2, 2, 2], [3, 1, 0, 2])):
            backend = cpu_backend(
                library,
                model,
                20,
                num_threads=1 + seed,
                is_batch_invariant=True,
                adapters=[] if number == 0 and seed == 0 else adapters_of(model),
            )
            sequences = [own, *others] if numbers else [own]
            run = PagedRun(backend, sequences, num_blocks=20, seed=seed, adapters=[number, *numbers])
            schedule = [{0: 40}] if seed % 2 == 0 else [{1: 7, 0: 1}, {0: 13, 2: 9, 4: 8}, {3: 1, 0: 1}]
            logits = run.all_logits(schedule if numbers else [{0: 60}])[0]
            expected = logits if expected is None else expected
            assert torch.equal(logits, expected), f"adapter {number} beside {numbers}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_torch_the_neighbours_adapters_never_change_a_bit_of_a_row(dtype: torch.dtype) -> None:
    model = TinyModel()
    for number in range(4):
        results = []
        for numbers in ([0, 0, 0], [1, 2, 3], [3, number, 2]):
            run = PagedRun(
                torch_backend(model, 20, dtype),
                sequences_of((20, 30, 9, 9)),
                num_blocks=20,
                adapters=[number, *numbers],
            )
            steps = [run.step(counts)[0] for counts in ({1: 4, 0: 17, 2: 8}, {1: 1, 0: 1, 3: 1}, {0: 1})]
            results.append(torch.cat(steps))
        for result in results[1:]:
            assert torch.equal(result, results[0]), number


def test_a_merged_product_gets_the_parts_that_there_are() -> None:
    parts = [LowRank(torch.randn(rank, 8), torch.randn(size, rank)) for rank, size in ((2, 6), (1, 4), (3, 5))]
    x = torch.randn(7, 8)
    for present in ([0, 1, 2], [1], [0, 2]):
        together = merge([part if i in present else None for i, part in enumerate(parts)], [6, 4, 5])
        assert together is not None
        alone = [
            x @ part.down.T @ part.up.T if i in present else torch.zeros(7, len(part.up))
            for i, part in enumerate(parts)
        ]
        torch.testing.assert_close(x @ together.down.T @ together.up.T, torch.cat(alone, dim=1))
    assert merge([None, None], [6, 4]) is None


def test_rows_of_a_mixed_batch_are_drawn_from_their_own_logits(any_library: ctypes.CDLL) -> None:
    model = TinyModel()
    backend = cpu_backend(any_library, model, 20, adapters=adapters_of(model))
    runs = [PagedRun(backend, sequences_of(), num_blocks=20, adapters=NUMBERS) for _ in range(2)]
    batches = [run.batch(dict.fromkeys(range(5), 1)) for run in runs]
    assert backend.argmax(batches[0]).tolist() == backend.forward(batches[1]).argmax(-1).tolist()


@pytest.mark.parametrize(
    ("adapters", "text"), [([4], "does not exist"), ([-1], "does not exist"), ([1, 1], "more or fewer sequences")]
)
def test_an_adapter_that_there_is_not_is_refused(any_library: ctypes.CDLL, adapters: list[int], text: str) -> None:
    backend = cpu_backend(any_library, TinyModel(), 3, adapters=adapters_of(TinyModel()))
    good = StepBatch([1, 2], [2], [2], [[0]], [1], [3])
    expected = backend.forward(good).clone()
    with pytest.raises(AssertionError, match=text):
        backend.forward(replace(good, adapters=adapters))
    assert torch.equal(backend.forward(good), expected)
