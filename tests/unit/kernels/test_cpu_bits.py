"""What the C++ kernel promises to the bit: a row depends on its own sequence alone, and memory changes hands clean.

Quantised weights promise it of their own accord but for the batch's width, and with `is_batch_invariant`, or where all
widths are multiplied as integers, of that too.
"""

import ctypes
import gc
import os
import subprocess
import sys
import weakref
from typing import Any

import numpy as np
import pytest
import torch

from cpu_models import PagedRun, TinyModel, cpu_backend, random_tokens
from headrace.kernels.backend import StepBatch
from headrace.kernels.cpu_backend import CpuBackend, kv_bytes_per_token, most_integer_rows
from waiting import until

pytestmark = pytest.mark.xdist_group("cpu kernel")  # which each worker would compile

MODEL: dict[str, Any] = {
    "head_dim": 80,
    "num_heads": 6,
    "windows": (40, None, 300),
    "has_qkv_bias": True,
    "has_head_norms": True,
}
MIXED = ("Q4_0", "Q8_0", "bfloat16", "Q4_1", "Q8_0")
FORMATS: dict[str, dict[str, Any]] = {
    "bfloat16": {"types": ("bfloat16",), "is_kv_int8": False},
    "bfloat16, int8 cache": {"types": ("bfloat16",), "is_kv_int8": True},
    "quantised": {"types": MIXED, "is_kv_int8": False, "is_batch_invariant": True},
    "quantised, int8 cache": {"types": MIXED, "is_kv_int8": True, "is_batch_invariant": True},
    "quantised, 8-bit activations": {"types": MIXED, "is_kv_int8": False, "activation_bits": 8},
}
TOKENS = random_tokens(330)
NEIGHBOURS = [random_tokens(length, seed=length) for length in (1, 290, 15, 70)]
# Of the first sequence, with neighbours 1 .. 4.
SCHEDULES: dict[str, list[dict[int, int]]] = {
    "one prefill": [],
    "beside others": [{1: 1, 2: 260, 3: 4}, {2: 1, 0: 330, 4: 50, 3: 1}],
    "uneven chunks": [{0: n} for n in (1, 11, 12, 13, 31, 32, 33, 64, 100)],
    "chunks beside others": [{2: 100, 0: 70}, {0: 1, 2: 1, 3: 15, 4: 1}, {4: 8, 0: 190, 2: 1}, {0: 60, 4: 60}],
    "one by one at the end": [{0: 300, 2: 280}, *({0: 1, 2: 1} for _ in range(9)), *({0: 1} for _ in range(20))],
}


@pytest.fixture(params=FORMATS)
def settings(request: pytest.FixtureRequest, library: ctypes.CDLL) -> dict[str, Any]:
    """What makes a backend of one format batch-invariant."""
    settings = dict(FORMATS[request.param])
    if "activation_bits" in settings and 0 < most_integer_rows(library, 8) < len(TOKENS):
        pytest.skip("with AMX many rows are multiplied otherwise")
    return settings | {"model": TinyModel(**MODEL, types=settings.pop("types"))}


def poison(backend: CpuBackend, model: TinyModel, num_tokens: int, is_kv_int8: bool, byte: int) -> None:
    """Fill the cache with what is no number in any format (0xff), or infinite or huge (0x7f)."""
    num_layers = len(model.config.windows)
    num_bytes = num_tokens * kv_bytes_per_token(model.config, is_kv_int8) // num_layers
    caches = [memory for memory in backend._packer._kept if memory.nbytes == num_bytes]
    assert len(caches) == num_layers
    for cache in caches:
        cache.view(np.uint8)[:] = byte


def assert_equal(first: torch.Tensor, second: torch.Tensor, what: object) -> None:
    assert torch.equal(first, second), f"{what}: rows {(first != second).any(-1).nonzero().flatten().tolist()} differ"


def test_neither_chunks_nor_neighbours_nor_threads_change_a_bit(library: ctypes.CDLL, settings: dict[str, Any]) -> None:
    alone = PagedRun(cpu_backend(library, num_blocks=21, num_threads=1, **settings), [TOKENS])
    expected = alone.all_logits([{0: 1}] * len(TOKENS))[0]
    for num_threads in (1, 2, 3, 5):
        for seed, (name, schedule) in enumerate(SCHEDULES.items()):
            block_size = (16, 32, 64)[(seed + num_threads) % 3]
            backend = cpu_backend(library, num_blocks=60, num_threads=num_threads, block_size=block_size, **settings)
            run = PagedRun(backend, [TOKENS, *NEIGHBOURS], block_size, seed=seed)
            logits = run.all_logits(schedule)[0]
            assert_equal(logits, expected, f"{name}, {num_threads} threads, blocks of {block_size}")


def test_tokens_that_were_tried_in_vain_change_no_bit(library: ctypes.CDLL, settings: dict[str, Any]) -> None:
    """Of one to nine tokens a step the first few are the sequence's, and what the others wrote is written over."""
    tokens = TOKENS[:150]
    expected = PagedRun(cpu_backend(library, num_blocks=21, **settings), [tokens]).all_logits([{0: 1}] * len(tokens))[0]
    run = PagedRun(cpu_backend(library, num_blocks=21, num_threads=3, **settings), [list(tokens)])
    found = []
    while (start := run.num_computed[0]) < len(tokens):
        count = min(1 + start % 9, len(tokens) - start)
        num_true = 1 + start % 4 % count
        vain = slice(start + num_true, start + count)
        run.sequences[0][vain] = random_tokens(count - num_true, seed=start)
        found.append(run.step({0: count})[0][:num_true])
        run.sequences[0][vain] = tokens[vain]
        run.num_computed[0] = start + num_true
    assert_equal(torch.cat(found), expected, "beside what was tried in vain")


def test_the_width_of_the_batch_changes_no_bit(library: ctypes.CDLL, settings: dict[str, Any]) -> None:
    """The first sequence's last token, again and again, beside 0 to 69 others."""
    sequences = [random_tokens(3 + seed % 20, seed=seed) for seed in range(70)]
    backends = [cpu_backend(library, num_blocks=140, num_threads=num_threads, **settings) for num_threads in (1, 3)]
    for backend in backends:
        run = PagedRun(backend, sequences)
        run.step({i: len(tokens) - 1 for i, tokens in enumerate(sequences)})
        ends = list(run.num_computed)
        expected = {}
        for i in (0, 30, 69):
            expected[i] = run.step({i: 1})[i]
            run.num_computed = list(ends)
        for width in range(1, 71):
            # Last, in the middle or first.
            order = [*range(70 - width, 70)] if width % 3 == 0 else [*range(width)]
            logits = run.step(dict.fromkeys(order[::-1] if width % 3 == 1 else order, 1))
            run.num_computed = list(ends)
            for i in expected.keys() & logits.keys():
                assert_equal(logits[i], expected[i], f"sequence {i} of {width}")


@pytest.mark.parametrize("num_rows", [2, 8, 9, 16, 17, 40])
@pytest.mark.parametrize("is_kv_int8", [False, True], ids=["bfloat16", "int8"])
@pytest.mark.parametrize("activation_bits", [8, 16])
def test_what_the_neighbours_are_changes_no_bit_of_a_narrow_batch_either(
    library: ctypes.CDLL, num_rows: int, is_kv_int8: bool, activation_bits: int
) -> None:
    """Even where they are no numbers at all; a fixed width is all that quantised weights ask for."""
    model = TinyModel(**MODEL, types=("bfloat16", *MIXED))
    weights = model.weights()
    embedding = weights["model.embed_tokens.weight"]
    assert isinstance(embedding, torch.Tensor)
    embedding[98], embedding[99] = float("inf"), float("nan")
    results = []
    for seed in range(4):
        backend = cpu_backend(
            library,
            model,
            num_rows,
            dict(weights),
            num_threads=1 + seed,
            is_kv_int8=is_kv_int8,
            activation_bits=activation_bits,
        )
        others = [random_tokens(12, 98, seed * 100 + i) if seed < 2 else [96 + seed] * 12 for i in range(num_rows - 1)]
        own = num_rows // 2
        run = PagedRun(backend, [*others[:own], random_tokens(12, 98), *others[own:]], seed=seed)
        everyone = range(num_rows)
        steps = [run.step(dict.fromkeys(everyone, count)) for count in (1, 1, 9, 1)]
        results.append(torch.cat([step[own] for step in steps]))
        if seed > 1:
            assert steps[-1][0].isnan().all()
    for result in results:
        assert_equal(result, results[0], "a row")
        assert result.isfinite().all()


@pytest.mark.parametrize("byte", [0xFF, 0x7F])
def test_what_blocks_held_before_changes_no_bit(library: ctypes.CDLL, settings: dict[str, Any], byte: int) -> None:
    model = settings["model"]
    expected = PagedRun(cpu_backend(library, num_blocks=21, **settings), [TOKENS]).all_logits()[0]
    for block_size, name in ((16, "one by one at the end"), (64, "uneven chunks"), (32, "beside others")):
        num_blocks = 60
        backend = cpu_backend(library, num_blocks=num_blocks, block_size=block_size, **settings)
        poison(backend, model, num_blocks * block_size, settings["is_kv_int8"], byte)
        run = PagedRun(backend, [TOKENS, *NEIGHBOURS], block_size, num_blocks)
        assert_equal(run.all_logits(SCHEDULES[name])[0], expected, name)


def test_a_block_that_changes_hands_brings_nothing_along(library: ctypes.CDLL, settings: dict[str, Any]) -> None:
    """The owners before computed no numbers; the next has the same blocks in another order."""
    model = settings["model"]
    weights = model.weights()
    norm = weights["model.layers.0.input_layernorm.weight"]
    assert isinstance(norm, torch.Tensor)
    tokens = random_tokens(150)
    fresh = cpu_backend(library, num_blocks=10, weights=dict(weights), **settings)
    expected = PagedRun(fresh, [tokens]).all_logits([{0: 100}, {0: 1}])[0]
    reused = cpu_backend(library, num_blocks=10, weights=dict(weights), **settings)
    norms = [memory for memory in reused._packer._kept if np.array_equal(memory, norm.numpy())]
    assert len(norms) == 1
    norms[0][:] = np.inf
    assert PagedRun(reused, [random_tokens(160, seed=5)]).all_logits()[0].isnan().any()
    norms[0][:] = norm.numpy()
    for seed in range(3):
        assert_equal(PagedRun(reused, [tokens], seed=seed).all_logits([{0: 100}, {0: 1}])[0], expected, seed)
        PagedRun(reused, [random_tokens(159, seed=seed)]).all_logits([{0: 37}])


def test_sequences_that_share_their_first_blocks_are_as_if_alone(
    library: ctypes.CDLL, settings: dict[str, Any]
) -> None:
    prefix = TOKENS[:288]
    sequences = [prefix + random_tokens(30, seed=seed) for seed in range(4)]
    expected = PagedRun(cpu_backend(library, num_blocks=80, **settings), sequences).all_logits()
    run = PagedRun(cpu_backend(library, num_blocks=80, num_threads=3, **settings), sequences)
    run.step({0: 288})
    for i in range(1, 4):
        run.tables[i][:18] = run.tables[0][:18]
        run.num_computed[i] = 288
    for i, logits in enumerate(run.all_logits([{0: 1, 1: 1, 2: 1, 3: 1}, {2: 20, 1: 1}])):
        assert_equal(logits, expected[i][288:], i)


def test_steps_that_follow_each_other_closely_are_not_mixed_up(library: ctypes.CDLL) -> None:
    """More threads than cores: some are always late, and walk through a step that the others have left."""
    model = TinyModel(num_heads=2, num_kv_heads=1, windows=(None,) * 3)
    sequences = [random_tokens(200, seed=seed) for seed in range(3)]
    widths = [1, 13, 2, 150, 9, 40, 1, 90]
    batches = []
    for width in widths:
        run = PagedRun(cpu_backend(library, model, 40), sequences)
        batches.append(run.batch(dict.fromkeys(range(3), width)))
    expected = [cpu_backend(library, model, 40, num_threads=1).forward(batch).clone() for batch in batches]
    backend = cpu_backend(library, model, 40, num_threads=4 * (os.cpu_count() or 1))
    for _ in range(40):
        for batch, logits in zip(batches, expected, strict=True):
            assert_equal(backend.forward(batch), logits, f"{len(batch.token_ids)} rows")
            assert backend.argmax(batch).tolist() == logits.argmax(-1).tolist()


def num_os_threads() -> int:
    return len(os.listdir("/proc/self/task"))


@pytest.fixture
def before(any_library: ctypes.CDLL) -> int:
    """The threads when no backend of an earlier test is left."""
    gc.collect()
    return num_os_threads()


@pytest.mark.parametrize("num_threads", [1, 2, 7])
def test_closing_ends_the_threads_and_twice_is_harmless(
    any_library: ctypes.CDLL, before: int, num_threads: int
) -> None:
    backend = cpu_backend(any_library, TinyModel(), 4, num_threads=num_threads)
    assert num_os_threads() == before + num_threads - 1
    PagedRun(backend, [TOKENS[:60]]).all_logits()
    assert num_os_threads() == before + num_threads - 1
    backend.close()
    until(lambda: num_os_threads() == before, "the kernel's threads end")
    backend.close()
    with pytest.raises(AssertionError, match="the backend is closed"):
        backend.forward(StepBatch([1], [1], [1], [[0]], [0]))


def test_collection_closes(any_library: ctypes.CDLL, before: int) -> None:
    backends: list[Any] = [cpu_backend(any_library, TinyModel(), 4, num_threads=3)]
    backends[0].forward(StepBatch([1], [1], [1], [[0]], [0]))
    backends.append(backends)  # a cycle
    reference = weakref.ref(backends[0])
    del backends
    gc.collect()
    assert reference() is None
    until(lambda: num_os_threads() == before, "the kernel's threads end")


def test_backends_come_and_go_while_others_run(any_library: ctypes.CDLL, before: int) -> None:
    """Closed right behind a step, while members may still be on their way through it."""
    lasting = cpu_backend(any_library, TinyModel(), 4)
    batch = StepBatch(TOKENS[:40], [40], [40], [[0, 1, 2]], [39])
    expected = lasting.forward(batch).clone()
    for num_threads in (2, 8) * 20:
        backend = cpu_backend(any_library, TinyModel(), 4, num_threads=num_threads)
        assert_equal(backend.forward(batch), expected, "the new one")
        backend.close()
        assert_equal(lasting.forward(batch), expected, "the lasting one")
    lasting.close()
    until(lambda: num_os_threads() == before, "the kernel's threads end")


def test_a_model_that_does_not_fit_is_an_error_and_not_a_crash(any_library: ctypes.CDLL) -> None:
    """In a process of its own whose address space is bounded: threads' stacks take of it."""
    script = f"""
import resource
from ctypes import CDLL
from cpu_models import TinyModel, cpu_backend
from headrace.kernels.cpu_library import _declare
library = _declare(CDLL({any_library._name!r}))
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))
for settings in {{"max_num_batched_tokens": 2**24}}, {{"num_threads": 4096}}:
    try:
        cpu_backend(library, TinyModel(), 2, **settings)
    except MemoryError as error:
        print(error)
cpu_backend(library, TinyModel(), 2).close()
"""
    environment = os.environ | {"PYTHONPATH": ":".join(path for path in sys.path if path)}
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("do not fit this machine") == 2
