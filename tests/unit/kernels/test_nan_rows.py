"""What is no number is told from what is: such a row, and no other, gets -1 for its token, from every backend."""

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from cpu_models import PagedRun, TinyModel, cpu_backend, dequantised, random_tokens
from headrace.kernels import torch_ops
from headrace.kernels.backend import Backend, StepBatch
from headrace.kernels.cpu_backend import Weight, kv_bytes_per_token
from headrace.kernels.decoder import Decoder, KVCache
from headrace.kernels.sampling import SamplingBatch, argmax, log_probabilities, sample
from headrace.kernels.torch_backend import TorchBackend
from sampling_batches import make_batch, random_logits

pytestmark = pytest.mark.xdist_group("cpu kernel")  # which each worker would compile

NAN, INF = float("nan"), float("inf")
POISON = 99  # the token whose embedding is no number
Draw = Callable[[torch.Tensor, SamplingBatch], list[int]]

GREEDY, PLAIN, FILTERED = (0.0, 0, 1.0, 0.0), (0.8, 0, 1.0, 0.0), (0.8, 30, 0.9, 0.05)


def poisoned(types: tuple[str, ...]) -> tuple[TinyModel, dict[str, Weight]]:
    """The embedding, the first matrix, is bfloat16: the others are of these types."""
    model = TinyModel(types=("bfloat16", *types), has_qkv_bias=True)
    weights = model.weights()
    embedding = weights["model.embed_tokens.weight"]
    assert isinstance(embedding, torch.Tensor)
    embedding[POISON, 7] = NAN
    return model, weights


def torch_backend() -> TorchBackend:
    model, weights = poisoned(("bfloat16",))
    decoder = Decoder(model.config, {name: dequantised(weight) for name, weight in weights.items()}, torch_ops)
    cache = KVCache.allocate(model.config.shape, 200, 16, torch.float32, torch.device("cpu"))
    return TorchBackend(decoder, cache, torch_ops)


def greedy_tokens(backend: Backend, num_rows: int, bad: set[int]) -> list[list[int]]:
    """Each row's tokens in a prompt's chunk, its end, and two more tokens; the bad rows have the poison near their
    beginning, where the cache alone brings it to what follows."""
    prompts = [random_tokens(24, POISON, seed=row) for row in range(num_rows)]
    for row in bad:
        prompts[row][3] = POISON
    run = PagedRun(backend, prompts, num_blocks=200)
    found: list[list[int]] = [[] for _ in prompts]
    for count in (9, 13, 1, 1):
        batch = run.batch(dict.fromkeys(range(num_rows), count))
        last = [(row + 1) * count - 1 for row in range(num_rows)]
        batch = StepBatch(batch.token_ids, batch.query_lens, batch.context_lens, batch.block_tables, last)
        for tokens, token_id in zip(found, backend.argmax(batch).tolist(), strict=True):
            tokens.append(token_id)
    return found


def check_rows(make: Callable[[], Backend], num_rows: int) -> None:
    bad = {row for row in range(num_rows) if row % 3 == 0}
    expected = greedy_tokens(make(), num_rows, set())
    for row, tokens in enumerate(greedy_tokens(make(), num_rows, bad)):
        assert tokens == ([-1] * 4 if row in bad else expected[row]), f"row {row} of {num_rows}"


@pytest.mark.parametrize("num_rows", [1, 4, 20])
@pytest.mark.parametrize("is_kv_int8", [False, True], ids=["bfloat16", "int8"])
@pytest.mark.parametrize("types", [("bfloat16",), ("Q4_0", "Q8_0", "Q4_1")], ids=["bfloat16 weights", "quantised"])
def test_a_nan_in_a_prompt_reaches_all_that_follows_and_no_neighbour(
    library: ctypes.CDLL, types: tuple[str, ...], is_kv_int8: bool, num_rows: int
) -> None:
    model, weights = poisoned(types)
    check_rows(lambda: cpu_backend(library, model, 200, dict(weights), is_kv_int8=is_kv_int8), num_rows)


def test_a_nan_far_behind_reaches_the_rows_of_a_long_context(library: ctypes.CDLL) -> None:
    """Whose segments are computed apart, and merged."""
    model, weights = poisoned(("bfloat16",))
    tokens = random_tokens(800, POISON)
    tokens[300] = POISON
    for is_kv_int8 in (False, True):
        run = PagedRun(cpu_backend(library, model, 50, dict(weights), is_kv_int8=is_kv_int8), [tokens])
        logits = run.all_logits([{0: 300}, {0: 1}, {0: 498}])[0]
        assert logits[:300].isfinite().all()
        assert logits[300:].isnan().all()


@pytest.mark.parametrize("name", ["self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "mlp.gate_proj"])
@pytest.mark.parametrize("types", [("bfloat16",), ("Q4_0", "Q8_0", "Q4_1")], ids=["bfloat16 weights", "quantised"])
def test_one_number_of_a_head_or_of_a_products_input_is_enough(
    library: ctypes.CDLL, types: tuple[str, ...], name: str
) -> None:
    """Which its neighbours in a vector outdo, and integers do not have."""
    model = TinyModel(types=types, has_qkv_bias=True, has_other_biases=True)
    for is_kv_int8, activation_bits in ((False, 8), (True, 8), (True, 16)):
        for num_rows in (1, 20):
            weights = model.weights()
            bias = weights[f"model.layers.0.{name}.bias"]
            assert isinstance(bias, torch.Tensor)
            bias.view(torch.int32)[5] = 0x7FFFFFFF  # the NaN that rounding would make a zero of
            settings: dict[str, Any] = {"is_kv_int8": is_kv_int8, "activation_bits": activation_bits}
            backend = cpu_backend(library, model, 200, weights, **settings)
            assert greedy_tokens(backend, num_rows, set()) == [[-1] * 4] * num_rows


@pytest.mark.parametrize("positions", [range(7, 8), range(256, 512)], ids=["a key", "all keys of a segment"])
def test_a_key_in_the_cache_that_is_no_number_is_enough(library: ctypes.CDLL, positions: range) -> None:
    model = TinyModel(windows=(None,))
    backend = cpu_backend(library, model, 40, num_threads=1)
    run = PagedRun(backend, [random_tokens(600)])
    run.step({0: 598})
    assert min(backend.argmax(run.batch({0: 1})).tolist()) >= 0
    num_bytes = 40 * 16 * kv_bytes_per_token(model.config, is_kv_int8=False)
    [cache] = [memory for memory in backend._packer._kept if memory.nbytes == num_bytes]
    # [blocks, heads, keys and values, ...], where keys are [pairs of dimensions, tokens, 2]
    head = cache.view(np.uint16).reshape(40, model.num_kv_heads, 2, 16, 16, 2)[:, 1]
    head[:, 1] = 0  # no value overflows
    for position in positions:
        head[run.tables[0][position // 16], 0, 2, position % 16, 0] = 0x7FC0
    assert backend.argmax(run.batch({0: 1})).tolist() == [-1]


@pytest.mark.parametrize("num_rows", [1, 4])
def test_so_it_does_in_torch(num_rows: int) -> None:
    check_rows(torch_backend, num_rows)


@pytest.mark.parametrize("where", [0, 40, 99])
@pytest.mark.parametrize("value", [NAN, INF])  # infinite products of both signs add up to NaN
def test_a_single_logit_that_is_no_number_is_enough(any_library: ctypes.CDLL, where: int, value: float) -> None:
    """It comes from the head's own weights, and so to every row."""
    model = TinyModel()
    weights = model.weights()
    head = weights["lm_head.weight"]
    assert isinstance(head, torch.Tensor)
    head[where] = value
    backend = cpu_backend(any_library, model, 8, weights)
    batch = PagedRun(backend, [random_tokens(20)]).batch({0: 20})
    found = backend.argmax(batch).tolist()
    assert found == argmax(backend.forward(batch)).tolist()
    assert found == [-1] * 20


def draws(any_library: ctypes.CDLL) -> dict[str, Draw]:
    backend = cpu_backend(any_library, TinyModel(vocab_size=1003), 4)
    return {
        "torch": lambda logits, batch: sample(logits.clone(), batch).tolist(),
        "kernel": lambda logits, batch: backend.sample(logits.clone(), batch).tolist(),
    }


@pytest.mark.parametrize("name", ["torch", "kernel"])
@pytest.mark.parametrize("setting", [GREEDY, PLAIN, FILTERED], ids=["greedy", "plain", "filtered"])
def test_nothing_is_drawn_from_a_row_that_is_no_numbers_though_a_mask_hides_it(
    any_library: ctypes.CDLL, name: str, setting: Any
) -> None:
    draw = draws(any_library)[name]
    logits = random_logits(6, 1003, seed=1)
    lists: dict[str, Any] = {
        "masked": [(4, np.array([5, 1002]))],
        "biased": [(1, np.array([5]), np.array([-100], np.float32))],
    }
    batch = make_batch([setting] * 6, range(6), range(6), [0] * 6, **lists)
    expected = draw(logits, batch)
    assert min(expected) >= 0
    logits[1, 5], logits[2], logits[4, 1002] = INF, NAN, NAN
    found = draw(logits, batch)
    assert [found[row] for row in (1, 2, 4)] == [-1] * 3
    assert [found[row] for row in (0, 3, 5)] == [expected[row] for row in (0, 3, 5)]


@pytest.mark.parametrize("name", ["torch", "kernel"])
def test_minus_infinity_is_a_number(any_library: ctypes.CDLL, name: str) -> None:
    logits = random_logits(2, 1003, seed=2)
    logits[:, 10:] = -INF
    found = draws(any_library)[name](logits, make_batch([GREEDY, PLAIN], [0, 1], [0, 1], [0, 0]))
    assert found[0] == int(logits[0].argmax())
    assert 0 <= found[1] < 10


@pytest.mark.parametrize("value", [NAN, INF])
def test_log_probabilities_of_no_numbers_are_none(value: float) -> None:
    logits = random_logits(2, 50, seed=3)
    logits[1, 7] = value
    found = log_probabilities(logits, torch.tensor([3, 3]))
    assert found.own.isnan().tolist() == [False, True]
    assert found.own[0] == logits[0].log_softmax(-1)[3]
