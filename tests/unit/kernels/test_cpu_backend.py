"""The C++ kernel computes what torch does in float32, to bfloat16's precision, however the work is cut into steps."""

import ctypes
import functools
import gzip
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize

from cpu_models import (
    PagedRun,
    TinyModel,
    check_close,
    cpu_backend,
    dequantised,
    random_tokens,
    reference_backend,
)
from headrace.kernels.backend import StepBatch
from headrace.kernels.cpu_backend import PHASES, kv_bytes_per_token, why_not
from headrace.kernels.quantised import GROUP_BYTES, QuantisedWeight
from headrace.scheduler.model_runner import ModelRunner
from sampling_batches import make_batch

pytestmark = pytest.mark.xdist_group("cpu kernel")  # which each worker would compile

LENGTHS = (600, 37, 1, 17, 256)
SHAPES: dict[str, dict[str, Any]] = {
    "heads of 16, none shared": {"num_kv_heads": 4},
    "heads of 64 in threes": {"head_dim": 64, "num_heads": 6},
    "heads of 80 in sevens": {"head_dim": 80, "num_heads": 14},
    "32 heads of 96 on one": {"head_dim": 96, "num_heads": 32, "num_kv_heads": 1},
    "heads of 128": {"head_dim": 128, "num_heads": 2, "num_kv_heads": 2},
    "heads of 256 in threes": {"head_dim": 256, "num_heads": 3, "num_kv_heads": 1},
    "Qwen2: biases": {"has_qkv_bias": True, "head_dim": 48},
    "Qwen3: norms of heads": {"has_head_norms": True, "head_dim": 64},
    "every bias": {"has_qkv_bias": True, "has_other_biases": True, "head_dim": 80},
    "tied": {"is_tied": True, "vocab_size": 131},
    "whole panels of tokens": {"vocab_size": 128},
    "fewer tokens than a panel": {"vocab_size": 5},
    "one layer, the narrowest": {"hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "windows": (None,)},
    "intermediate smaller than hidden": {"hidden_size": 160, "intermediate_size": 32},
    "scaled RoPE": {"rope_scale": 1.3, "head_dim": 32},
    "a large epsilon": {"rms_norm_eps": 0.3, "has_head_norms": True},
    "windows beside full layers": {"windows": (48, None, 300, 17)},
    "the smallest window": {"windows": (1, 2)},
}
# The first is of one step; sequences join, decode and go on in uneven chunks in the others.
SCHEDULES: tuple[list[dict[int, int]], ...] = (
    [],
    [{0: 590, 1: 30, 2: 1, 3: 12, 4: 255}, *(dict.fromkeys((3, 1, 0), 1) for _ in range(5)), {0: 1, 4: 1}],
    [{1: 13, 0: 7}, {0: 255, 1: 1, 4: 16}, {4: 1, 3: 16, 0: 1, 1: 1, 2: 1}, {0: 200, 1: 20}, {4: 100, 0: 1, 1: 1}],
)


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread() -> Iterator[None]:
    """Two cost more than they bring on products this small."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@functools.cache
def expected_logits(model: TinyModel, lengths: tuple[int, ...] = LENGTHS) -> list[torch.Tensor]:
    num_blocks = sum(-(-length // 16) for length in lengths)
    return PagedRun(reference_backend(model, num_blocks), sequences_of(model, lengths)).all_logits()


def sequences_of(model: TinyModel, lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    return [random_tokens(length, model.vocab_size, seed) for seed, length in enumerate(lengths)]


def check_all_schedules(library: ctypes.CDLL, model: TinyModel, **settings: Any) -> None:
    for schedule, block_size, num_threads in zip(SCHEDULES, (16, 64, 32), (2, 1, 3), strict=True):
        backend = cpu_backend(library, model, 70, block_size=block_size, num_threads=num_threads, **settings)
        logits = PagedRun(backend, sequences_of(model), block_size, num_blocks=70).all_logits(schedule)
        check_close(logits, expected_logits(model), settings)


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_the_references(library: ctypes.CDLL, shape: str) -> None:
    check_all_schedules(library, TinyModel(**SHAPES[shape]))


@pytest.mark.parametrize("shape", ["heads of 80 in sevens", "heads of 256 in threes", "windows beside full layers"])
def test_an_int8_cache_costs_little_precision(library: ctypes.CDLL, shape: str) -> None:
    check_all_schedules(library, TinyModel(**SHAPES[shape]), is_kv_int8=True)


TYPES = {
    **{name: (name,) for name in GROUP_BYTES},
    "mixed": ("Q4_0", "Q8_0", "bfloat16", "Q4_1", "Q8_0"),
}


@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize(
    "settings", [{"activation_bits": 8}, {"activation_bits": 16}, {"is_batch_invariant": True}], ids=str
)
def test_quantised_weights_stand_for_what_gguf_says(library: ctypes.CDLL, types: str, settings: dict[str, Any]) -> None:
    model = TinyModel(types=TYPES[types], head_dim=80, has_qkv_bias=True, windows=(None, 30, None))
    check_all_schedules(library, model, **settings)


@pytest.mark.parametrize("is_tied", [False, True], ids=["own head", "tied"])
@pytest.mark.parametrize("activation_bits", [8, 16])
def test_batches_of_every_width_up_to_30_of_quantised_weights(
    library: ctypes.CDLL, is_tied: bool, activation_bits: int
) -> None:
    """One to thirty rows: sixteen, or all, are the most that are multiplied as integers, a dozen at a time."""
    lengths = (30,) * 30
    model = TinyModel(types=TYPES["mixed"], is_tied=is_tied, intermediate_size=160)
    for is_kv_int8 in (False, True):
        settings: dict[str, Any] = {"is_kv_int8": is_kv_int8, "activation_bits": activation_bits}
        backend = cpu_backend(library, model, 60, **settings)
        schedule = [dict.fromkeys(range(width), 1) for width in range(1, 31)]
        logits = PagedRun(backend, sequences_of(model, lengths)).all_logits(schedule)
        check_close(logits, expected_logits(model, lengths), settings)


def test_the_random_weights_are_valid_gguf() -> None:
    for name, weight in TinyModel(types=TYPES["mixed"]).weights().items():
        if isinstance(weight, QuantisedWeight):
            values = dequantize(weight.rows, gguf.GGMLQuantizationType[weight.type_name])
            assert values.shape == weight.shape
            assert values.std() > 0.05, name
            assert torch.equal(dequantised(weight), torch.from_numpy(values))


@pytest.mark.parametrize("is_kv_int8", [False, True], ids=["bfloat16", "int8"])
def test_a_context_of_many_segments_that_fills_the_cache(library: ctypes.CDLL, is_kv_int8: bool) -> None:
    model = TinyModel(windows=(None, 270), num_heads=6, head_dim=32)
    lengths = (1136,)
    for block_size, num_threads, schedule in (
        (16, 3, [{0: 1000}, *({0: 1} for _ in range(130))]),
        (16, 1, [{0: 511}, {0: 2}, {0: 254}, {0: 258}]),
        (16, 2, [{0: 3} for _ in range(378)]),
    ):
        backend = cpu_backend(
            library, model, 1136 // block_size, block_size=block_size, num_threads=num_threads, is_kv_int8=is_kv_int8
        )
        logits = PagedRun(backend, sequences_of(model, lengths), block_size).all_logits(schedule)
        check_close(logits, expected_logits(model, lengths), {"is_kv_int8": is_kv_int8})


def test_a_prompt_of_the_whole_context_in_one_step(library: ctypes.CDLL) -> None:
    model = TinyModel(windows=(None,))
    backend = cpu_backend(library, model, 64, block_size=64, max_num_batched_tokens=4096)
    logits = PagedRun(backend, sequences_of(model, (4096,)), 64).all_logits()
    check_close(logits, expected_logits(model, (4096,)), {})


def test_only_the_rows_asked_for_pass_the_head_in_the_order_asked(library: ctypes.CDLL) -> None:
    model = TinyModel()
    tokens = random_tokens(30)
    for types in TYPES["mixed"], ("bfloat16",):
        backend = cpu_backend(library, TinyModel(types=types), 4, is_batch_invariant=True)
        whole = PagedRun(backend, [tokens]).step({0: 30})[0]
        for rows in ([29], [29, 3, 17], [], list(range(29, -1, -1))):
            logits = backend.forward(StepBatch(tokens, [30], [30], [[2, 1, 3, 0]], rows))
            assert logits.shape == (len(rows), model.vocab_size)
            assert logits.dtype == torch.float32
            assert torch.equal(logits, whole[rows])
            assert (
                backend.argmax(StepBatch(tokens, [30], [30], [[0, 1]], rows)).tolist()
                == whole[rows].argmax(-1).tolist()
            )


def test_rows_of_which_only_the_argmax_is_wanted_have_that_token_beside_rows_that_are_drawn(
    library: ctypes.CDLL,
) -> None:
    """Their logits are left as they were, and the others are drawn from as without them."""
    backend = cpu_backend(library, TinyModel(), 4, is_batch_invariant=True)
    tokens, rows = random_tokens(30), [29, 3, 17, 11, 5]
    batch = StepBatch(tokens, [30], [30], [[2, 1, 3, 0]], rows)
    expected = backend.argmax(batch)
    whole = backend.forward(batch).clone()
    settings = make_batch([(0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0)] * 2, range(4), range(4), [0] * 4)
    drawn = backend.sample(whole[:4].clone(), settings)
    is_plain = np.array([True, False, True, False, False])
    backend._logits[:] = 7
    left = backend.forward(replace(batch, argmax_only=is_plain))
    assert (left[is_plain] == 7).all()
    assert left[~is_plain].equal(whole[~is_plain])
    found = backend.sample(left[:4], replace(settings, argmax_only=is_plain[:4]))
    assert found.tolist() == drawn.tolist()
    assert found[::2].tolist() == expected[:4:2].tolist()


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_argmax_is_the_largest_logit(library: ctypes.CDLL, num_threads: int) -> None:
    for fields in ({}, {"types": ("Q4_0",), "vocab_size": 500}, {"is_tied": True, "vocab_size": 33}):
        model = TinyModel(**fields)
        sequences = sequences_of(model, (40, 25, 40))
        results = []
        for is_argmax in (False, True):
            backend = cpu_backend(library, model, 8, num_threads=num_threads)
            run = PagedRun(backend, sequences)
            batches = [run.batch(counts) for counts in ({0: 20, 1: 24}, {0: 1, 2: 39, 1: 1}, {0: 1, 2: 1}, {0: 18})]
            if is_argmax:
                results.append([backend.argmax(batch).tolist() for batch in batches])
            else:
                results.append([backend.forward(batch).argmax(-1).tolist() for batch in batches])
        assert results[0] == results[1]


@pytest.mark.parametrize("types", ["bfloat16", "Q8_0"])
def test_the_lowest_of_equally_likely_tokens_wins(library: ctypes.CDLL, types: str) -> None:
    model = TinyModel(vocab_size=200, types=(types,))
    weights = model.weights()
    head = weights["lm_head.weight"]
    # Tokens 67 .. 133 and 134 .. 199 are as likely as 0 .. 66, and lie in other panels.
    if isinstance(head, QuantisedWeight):
        weights["lm_head.weight"] = QuantisedWeight(head.type_name, head.rows[torch.arange(200).numpy() % 67])
    else:
        weights["lm_head.weight"] = head[torch.arange(200) % 67]
    for num_threads in (1, 3):
        backend = cpu_backend(library, model, 20, dict(weights), num_threads=num_threads)
        for num_tokens in (300, 3):
            run = PagedRun(backend, [random_tokens(num_tokens, 200)])
            batch = run.batch({0: num_tokens})
            logits = backend.forward(batch).clone()
            assert torch.equal(logits[:, :66], logits[:, 67:133])
            assert backend.argmax(batch).tolist() == logits[:, :67].argmax(-1).tolist()


@pytest.mark.parametrize("token_id", [-1, 100, 2**40])
def test_an_unknown_token_is_an_error_and_nothing_is_computed(any_library: ctypes.CDLL, token_id: int) -> None:
    backend = cpu_backend(any_library, TinyModel(), 2)
    good = StepBatch([1, 2], [2], [2], [[0]], [1])
    logits = backend.forward(good).clone()
    caches = [memory.copy() for memory in backend._packer._kept]
    for run in (backend.forward, backend.argmax):
        with pytest.raises(IndexError, match=r"not within 0 \.\. 99"):
            run(StepBatch([3, token_id], [2], [2], [[0]], [1]))
    assert all((before == now).all() for before, now in zip(caches, backend._packer._kept, strict=True))
    assert torch.equal(backend.forward(good), logits)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"token_ids": [1] * 33, "query_lens": [33], "context_lens": [33]}, "more tokens"),
        ({"query_lens": [3], "context_lens": [3]}, "more tokens"),
        ({"logit_rows": [0] * 33}, "more rows of logits"),
        ({"query_lens": [2, 0], "context_lens": [2, 1], "block_tables": [[0], [1]]}, "a row without tokens"),
        ({"context_lens": [1]}, "a row without tokens"),
        ({"context_lens": [17]}, "a block table is too short"),
        ({"block_tables": [[]]}, "a block table is too short"),
        ({"block_tables": [[3]]}, "a block that does not exist"),
        ({"block_tables": [[-1]]}, "a block that does not exist"),
    ],
)
def test_a_batch_that_would_lead_the_kernel_astray_is_refused(
    any_library: ctypes.CDLL, changes: dict[str, Any], text: str
) -> None:
    backend = cpu_backend(any_library, TinyModel(), 3, max_num_batched_tokens=32)
    good = StepBatch([1, 2], [2], [2], [[0]], [1])
    expected = backend.forward(good).clone()
    with pytest.raises(AssertionError, match=text):
        backend.forward(replace(good, **changes))
    assert torch.equal(backend.forward(good), expected)


@pytest.mark.parametrize(
    ("fields", "block_size", "text"),
    [
        ({"hidden_size": 48}, 16, "hidden_size 48 is no multiple of 32"),
        ({"intermediate_size": 100}, 16, "intermediate_size 100 is no multiple of 32"),
        ({"head_dim": 24}, 16, "head_dim 24 is no multiple of 16"),
        ({"head_dim": 272}, 16, "head_dim 272 is over 256"),
        ({"num_heads": 3, "num_kv_heads": 1}, 16, "the heads' size together is no multiple of 32"),
        ({}, 24, "block_size 24 is no multiple of 16"),
        ({}, 1, "block_size 1 is no multiple of 16"),
    ],
)
def test_what_the_kernel_cannot_run_is_named(fields: dict[str, Any], block_size: int, text: str) -> None:
    assert why_not(TinyModel(**fields).config, block_size) == text


def test_what_the_kernel_can_run_has_no_objection() -> None:
    for fields in SHAPES.values():
        for block_size in (16, 32, 48, 1024):
            assert why_not(TinyModel(**fields).config, block_size) is None


def test_a_tokens_keys_and_values_weigh_what_the_cache_takes(any_library: ctypes.CDLL) -> None:
    # 2 layers, keys and values, 2 heads of 80 in whole panels: 96; int8 has a float32 scale for each.
    model = TinyModel(head_dim=80)
    for is_kv_int8, expected in ((False, 2 * 2 * 2 * 96 * 2), (True, 2 * 2 * 2 * (96 + 4))):
        assert kv_bytes_per_token(model.config, is_kv_int8) == expected
        backend = cpu_backend(any_library, model, 7, is_kv_int8=is_kv_int8)
        assert 7 * 16 * expected // 2 in {memory.nbytes for memory in backend._packer._kept}


def test_a_packed_model_knows_its_types_and_size_and_lets_the_weights_go(any_library: ctypes.CDLL) -> None:
    model = TinyModel(types=("Q8_0", "bfloat16"), windows=(None,))
    weights = model.weights()
    matrices = [weight for weight in weights.values() if isinstance(weight, QuantisedWeight) or weight.ndim == 2]
    expected = sum(w.rows.nbytes if isinstance(w, QuantisedWeight) else 2 * w.numel() for w in matrices)
    backend = cpu_backend(any_library, model, 2, weights)
    assert not weights
    assert backend.weight_types == ["Q8_0", "bfloat16"]
    # 100 tokens and heads of 16 are padded to whole panels.
    assert expected < backend.weight_bytes < 1.5 * expected


def test_the_profile_grows_with_what_is_computed(any_library: ctypes.CDLL) -> None:
    backend = cpu_backend(any_library, TinyModel(), 2)
    assert set(backend.profile().values()) == {0.0}
    backend.forward(StepBatch([1] * 20, [20], [20], [[0, 1]], [19]))
    profile = backend.profile()
    assert all(seconds > 0 for seconds in profile.values())
    backend.forward(StepBatch([1] * 20, [20], [20], [[0, 1]], []))
    assert backend.profile()["head"] == profile["head"]


def test_a_trace_of_a_runners_steps_shows_each_steps_phases_beside_its_forward(
    any_library: ctypes.CDLL, tmp_path: Path
) -> None:
    model = TinyModel()
    runner = ModelRunner(
        cpu_backend(any_library, model, 8),
        vocab_size=model.vocab_size,
        block_size=16,
        max_context_tokens=128,
        max_num_batched_tokens=64,
        description="tiny",
    )
    runner.tracer.begin()
    runner.warm_up()
    runner.tracer.end().save(tmp_path / "trace.json.gz")
    events = json.loads(gzip.decompress((tmp_path / "trace.json.gz").read_bytes()))["traceEvents"]
    spans = {
        name: [e for e in events if e["ph"] == "X" and e["name"] == name] for name in (*PHASES, "forward", "sample")
    }
    assert {len(found) for found in spans.values()} == {8}
    for i, forward in enumerate(spans["forward"]):
        spent = sum(spans[phase][i]["dur"] for phase in PHASES)
        assert 0 < spent <= forward["dur"]
