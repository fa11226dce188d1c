"""Drive libraries of the C++ kernel that were built with sanitizers through all its features; for a process of its own.

python sanitized_kernel.py LIBRARY ...
"""

import ctypes
import sys

import numpy as np
import numpy.typing as npt
import torch

from cpu_models import PagedRun, TinyModel, cpu_backend, random_adapter, random_tokens
from headrace.kernels import cpu_backend as packing
from headrace.kernels.cpu_library import _declare
from headrace.kernels.sampling import Penalties, SamplingBatch

MODELS = (
    TinyModel(head_dim=80, num_heads=6, windows=(20, None), has_qkv_bias=True, has_head_norms=True, vocab_size=101),
    TinyModel(types=("Q4_0", "Q8_0", "bfloat16", "Q4_1", "Q8_0"), is_tied=True, has_other_biases=True, rope_scale=1.2),
    TinyModel(types=("Q8_0", "Q4_1", "Q4_0"), head_dim=16, num_heads=32, num_kv_heads=1, vocab_size=33),
    TinyModel(hidden_size=32, intermediate_size=32, head_dim=256, num_heads=2, windows=(5,), vocab_size=1),
)
# Joined, left and decoded in widths on both sides of each path's bounds.
SCHEDULE = [{0: 1}, {0: 13, 1: 3}, {0: 1, 1: 1, 2: 1}, {1: 40, 0: 1}, {0: 280, 1: 2}, {0: 1}, {0: 1, 1: 1, 2: 1}]
LENGTHS = (300, 60, 9)


def allocate(num_bytes: int) -> npt.NDArray[np.uint8]:
    """Memory of a weight's or the cache's own, with a sanitizer's guards around it."""
    return np.zeros(num_bytes, np.uint8)


def run_model(
    library: ctypes.CDLL,
    model: TinyModel,
    num_threads: int,
    is_kv_int8: bool,
    is_invariant: bool = False,
    activation_bits: int = 8,
) -> None:
    num_blocks = sum(-(-length // 16) for length in LENGTHS)
    backend = cpu_backend(
        library,
        model,
        num_blocks,
        max_num_batched_tokens=300,
        num_threads=num_threads,
        is_kv_int8=is_kv_int8,
        is_batch_invariant=is_invariant,
        activation_bits=activation_bits,
        has_wide_copy=True,
        touched_ahead_bytes=2**20,
        adapters=[random_adapter(model, 1, 1), random_adapter(model, 2, 17, ("k_proj", "up_proj", "down_proj"))],
    )
    sequences = [random_tokens(length, model.vocab_size, seed=length) for length in LENGTHS]
    run = PagedRun(backend, sequences)
    for adapters in ((), (2, 0, 1)):  # before the wide copy is made, and with it
        run.adapters = adapters
        for logits in run.all_logits(SCHEDULE):
            assert logits.isfinite().all()
        run.num_computed = [0] * len(LENGTHS)
        while backend.use_idle_time():
            pass
    assert len(backend.argmax(run.batch({0: 20, 2: 9})).tolist()) == 29
    for num_rows in (1, 24):
        logits = torch.randn(num_rows, model.vocab_size)
        assert all(
            0 <= token < model.vocab_size for token in backend.sample(logits, sampling(num_rows, model)).tolist()
        )
    backend.close()


def sampling(num_rows: int, model: TinyModel) -> SamplingBatch:
    rows = np.arange(num_rows)
    some = np.arange(0, model.vocab_size, 3)
    return SamplingBatch(
        np.where(rows % 6 == 5, 0, 0.8).astype(np.float32),
        np.where(rows % 3 == 1, 1 + 4 * rows, 0),
        np.where(rows % 4 == 2, 0.7, 1).astype(np.float32),
        np.where(rows % 5 == 3, 0.05, 0).astype(np.float32),
        rows.astype(np.uint64),
        np.zeros(num_rows, np.int64),
        rows,
        penalties=[Penalties(num_rows - 1, np.tile(some, 3), len(some), 1.2, 0.3, 0.1)],
        biased=[(0, some, np.ones(len(some), np.float32))],
        masked=[(num_rows // 2, some[1:])],
        allowed=[(num_rows // 2, np.full(-(-model.vocab_size // 32), 0x0F0F_F0F1, np.uint32))],
    )


def main() -> None:
    torch.set_num_threads(1)
    packing._allocate, packing._CHUNK_BYTES = allocate, 0
    for path in sys.argv[1:]:
        library = _declare(ctypes.CDLL(path))
        for i, model in enumerate(MODELS):
            run_model(library, model, num_threads=1 + i % 2, is_kv_int8=i % 2 == 0)
            run_model(library, model, num_threads=2, is_kv_int8=i % 2 == 1, activation_bits=16)
            run_model(library, model, num_threads=5, is_kv_int8=i % 2 == 1, is_invariant=i % 2 == 0)
        print(path)


if __name__ == "__main__":
    main()
