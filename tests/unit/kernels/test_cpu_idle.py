"""What the kernel's backend does in idle time: it comes to an end, and no result changes by a bit, whenever it was."""

import ctypes
import gc
import random
import time
import weakref
from typing import Any

import pytest
import torch

from cpu_models import PagedRun, TinyModel, cpu_backend, random_tokens
from headrace.kernels import cpu_backend as module
from headrace.kernels.cpu_backend import CpuBackend
from sanitized_kernel import sampling

pytestmark = pytest.mark.xdist_group("cpu kernel")  # which each worker would compile

MIXED = ("Q4_0", "Q8_0", "bfloat16", "Q4_1", "Q8_0")
NUM_BLOCKS = 60
SEQUENCES = [random_tokens(length, seed=length) for length in (150, 40, 17, 90)]
# Steps of few rows and of many; of a step's logit rows too, which are all of them.
STEPS: list[dict[int, int]] = [
    {0: 1},
    {0: 16},
    {0: 17, 1: 1},
    {1: 39, 2: 10},
    {2: 7},
    {3: 90},
    {0: 100},
    {0: 1},
    {0: 15},
]


def use_all(backend: CpuBackend) -> int:
    """How many pieces of work there were."""
    num_pieces = 0
    while backend.use_idle_time():
        num_pieces += 1
        assert num_pieces < 10_000
    return num_pieces


def run(backend: CpuBackend, idle_before: dict[int, int]) -> list[torch.Tensor]:
    """All steps' logits, `idle_before[i]` pieces of idle work done before step i."""
    paged = PagedRun(backend, SEQUENCES, num_blocks=NUM_BLOCKS)
    logits = []
    for i, counts in enumerate(STEPS):
        for _ in range(idle_before.get(i, 0)):
            backend.use_idle_time()
        logits += [rows.clone() for rows in paged.step(counts).values()]
    return logits


@pytest.mark.parametrize(
    "settings",
    [{}, {"activation_bits": 16}, {"is_batch_invariant": True}, {"is_kv_int8": True}, {"num_threads": 3}],
    ids=str,
)
@pytest.mark.parametrize("types", [MIXED, ("Q4_0",), ("Q4_1",), ("Q8_0",), ("bfloat16",)], ids=str)
def test_idle_work_changes_no_bit_whenever_it_is_done(
    library: ctypes.CDLL, types: tuple[str, ...], settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PANELS_AT_ONCE", 2)
    monkeypatch.setattr(module, "_HUGE_PAGE_BYTES", 2**12)
    model = TinyModel(types=types, windows=(None, 40, None), head_dim=80, is_tied=len(types) > 1)
    expected = run(cpu_backend(library, model, NUM_BLOCKS, **settings), {})
    generator = random.Random(7)
    schedules = [{0: 10_000}, *({i: generator.choice([0, 1, 5, 30]) for i in range(len(STEPS))} for _ in range(4))]
    for idle_before in schedules:
        backend = cpu_backend(library, model, NUM_BLOCKS, has_wide_copy=True, touched_ahead_bytes=2**15, **settings)
        found = run(backend, idle_before)
        assert all(torch.equal(first, second) for first, second in zip(found, expected, strict=True)), idle_before


def test_the_cache_is_touched_so_far_ahead_of_what_is_used_and_no_further(
    library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = TinyModel()
    block_bytes = module.kv_bytes_per_token(model.config, False) * 16 // 2
    monkeypatch.setattr(module, "_HUGE_PAGE_BYTES", 2 * block_bytes)
    backend = cpu_backend(library, model, 40, touched_ahead_bytes=2 * 6 * block_bytes)
    caches = [memory for memory in backend._packer._kept if memory.nbytes == 40 * block_bytes]
    assert len(caches) == 2
    for cache in caches:
        cache[:] = 1  # as if there were something: touching is seen, as it clears
    assert use_all(backend) == 2 * 3
    for cache in caches:
        assert [bool(cache[i * block_bytes]) for i in range(8)] == [False] * 6 + [True] * 2
    # A sequence in blocks 9 and 10: what is before and among them is left alone.
    paged = PagedRun(backend, [random_tokens(20)])
    paged.tables = [[9, 10]]
    paged.step({0: 20})
    assert use_all(backend) == 2 * 3
    for cache in caches:
        cleared = [not cache[i * block_bytes : (i + 1) * block_bytes].any() for i in range(20)]
        assert cleared == [*[True] * 6, *[False] * 6, *[True] * 6, *[False] * 2]


def test_a_small_cache_is_touched_whole(library: ctypes.CDLL) -> None:
    backend = cpu_backend(library, TinyModel(), 3, touched_ahead_bytes=2**40)
    assert use_all(backend) == 2
    assert not backend.use_idle_time()


def test_weights_that_are_not_quantised_are_not_copied(library: ctypes.CDLL) -> None:
    assert use_all(cpu_backend(library, TinyModel(), 3, has_wide_copy=True)) == 0


def test_a_backend_is_freed_at_once_and_a_closed_one_does_no_idle_work(library: ctypes.CDLL) -> None:
    backend = cpu_backend(library, TinyModel(types=MIXED), 3, has_wide_copy=True, touched_ahead_bytes=2**20)
    backend.use_idle_time()
    gc.disable()
    try:
        reference = weakref.ref(backend)
        close = backend.close
        del backend
        assert reference() is None
        assert not close.alive
    finally:
        gc.enable()
    closed = cpu_backend(library, TinyModel(), 3)
    closed.close()
    with pytest.raises(AssertionError, match="closed"):
        closed.use_idle_time()


def test_the_wait_for_the_interpreters_lock_is_that_of_all_calls_of_a_step(library: ctypes.CDLL) -> None:
    backend = cpu_backend(library, TinyModel(), 8)
    paged = PagedRun(backend, [random_tokens(20)])
    before_s = time.monotonic()
    logits = paged.step({0: 20})[0]
    computed = backend.times
    backend.sample(logits.clone(), sampling(20, TinyModel()))
    sampled = backend.times
    assert computed is not None
    assert sampled is not None
    assert before_s <= computed.began_s == sampled.began_s
    assert computed.began_s < computed.ended_s < sampled.ended_s <= time.monotonic()
    assert computed.lock_wait_s is not None
    assert sampled.lock_wait_s is not None
    assert 0 < computed.lock_wait_s < sampled.lock_wait_s
    paged.num_computed[0] = 0
    paged.step({0: 1})
    assert backend.times is not None
    assert backend.times.began_s > sampled.ended_s
