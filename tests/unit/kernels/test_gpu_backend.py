"""Steps as a GPU runs them agree with steps in torch; on a CPU the kernels are interpreted, and there are no graphs."""

import functools
import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import requirements
from cpu_models import PagedRun, TinyModel, dequantised, random_adapter, random_tokens, reference_backend
from fake_flashinfer import BatchPrefillWithPagedKVCacheWrapper
from headrace.kernels import flashinfer_ops, gpu_backend as gpu_backend_module, triton_ops
from headrace.kernels.backend import StepBatch
from headrace.kernels.decoder import Decoder, KVCache, Weight
from headrace.kernels.gpu_backend import GpuBackend, _Graph, _Size
from headrace.kernels.gpu_linear import gpu_linear
from headrace.kernels.ops import Ops
from headrace.kernels.quantised import QuantisedWeight
from headrace.kernels.sampling import SamplingBatch
from sampling_batches import make_batch

# What padding rows hold is nobody's, and may overflow.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Interpreted, each of its runs takes seconds.
IS_LONG = DEVICE.type == "cuda" or requirements.IS_LONG
EMBEDDING = "model.embed_tokens.weight"
MODELS = {
    "llama": TinyModel(),
    "qwen2": TinyModel(has_qkv_bias=True, num_kv_heads=1, is_tied=True),
    "qwen3": TinyModel(has_head_norms=True, head_dim=32, num_heads=3, num_kv_heads=3),
    "mistral": TinyModel(windows=(9, None), intermediate_size=72),
}
SCHEDULES: dict[str, list[dict[int, int]]] = {
    "all at once": [],
    "chunks beside decoding": [{0: 20}, {0: 1, 1: 13}, {0: 1, 1: 8, 2: 5}, {1: 1, 0: 1, 2: 1}, {0: 1, 1: 1, 2: 1}],
}


def gpu_backend(model: TinyModel, num_blocks: int, dtype: torch.dtype = torch.float32, **settings: Any) -> GpuBackend:
    weights: dict[str, Weight] = {
        name: weight
        if isinstance(weight, QuantisedWeight) and name != EMBEDDING
        else dequantised(weight).to(DEVICE, dtype)
        for name, weight in model.weights().items()
    }
    is_fp8, kv_dtype = settings.pop("is_fp8", False), settings.pop("kv_dtype", dtype)
    make_head = functools.partial(gpu_linear, dtype=dtype, device=DEVICE)
    make_linear = functools.partial(make_head, is_fp8=is_fp8)
    ops: Ops = flashinfer_ops if "flashinfer_wrapper" in settings else triton_ops
    decoder = Decoder(model.config, weights, ops, make_linear, make_head, settings.pop("adapters", ()))
    cache = KVCache.allocate(model.config.shape, num_blocks, 16, kv_dtype, DEVICE)
    limits: dict[str, Any] = {"max_num_seqs": 4, "max_num_batched_tokens": 128, "max_num_blocks": 8} | settings
    backend = GpuBackend(decoder, cache, **limits)
    backend.capture()
    return backend


def sequences() -> list[list[int]]:
    return [random_tokens(length, seed=length) for length in (30, 24, 9)]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", MODELS if IS_LONG else ["qwen2", "qwen3"])
def test_logits_are_those_of_torch_in_float32(name: str, schedule: str) -> None:
    expected = PagedRun(reference_backend(MODELS[name], 12), sequences(), num_blocks=12).all_logits()
    run = PagedRun(gpu_backend(MODELS[name], 12), sequences(), num_blocks=12)
    for found, wanted in zip(run.all_logits(SCHEDULES[schedule]), expected, strict=True):
        torch.testing.assert_close(found.cpu(), wanted, rtol=2e-4, atol=2e-4)


def test_rows_with_adapters_get_what_merged_weights_would_make_and_others_are_as_ever() -> None:
    model = MODELS["qwen2"]
    adapters = [random_adapter(model, 1, 3), random_adapter(model, 2, 5, ("v_proj", "up_proj", "down_proj"))]
    numbers = [2, 0, 1]
    expected = []
    for tokens, number in zip(sequences(), numbers, strict=True):
        backend = reference_backend(model, 12, adapter=adapters[number - 1] if number else None)
        expected += PagedRun(backend, [tokens], num_blocks=12).all_logits()
    run = PagedRun(gpu_backend(model, 12, adapters=adapters), sequences(), num_blocks=12, adapters=numbers)
    # The last step but one has no adapter, and so a graph, where there are some.
    for found, wanted in zip(run.all_logits([*SCHEDULES["chunks beside decoding"], {1: 1}]), expected, strict=True):
        torch.testing.assert_close(found.cpu(), wanted, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    ("limit", "settings"),
    [
        (0.2, {"kv_dtype": torch.int8}),
        (0.5, {"kv_dtype": torch.float8_e4m3fn}),
        (0.2, {"is_fp8": True}),
        *([(0.05, {}), (0.05, {"types": ("Q4_0", "Q8_0", "Q4_1")})] if IS_LONG else []),
    ],
)
def test_logits_of_narrower_types_are_near(limit: float, settings: dict[str, Any]) -> None:
    settings = dict(settings)
    model = TinyModel(types=settings.pop("types", ("bfloat16",)))
    expected = PagedRun(reference_backend(model, 12), sequences(), num_blocks=12).all_logits()
    run = PagedRun(gpu_backend(model, 12, torch.bfloat16, **settings), sequences(), num_blocks=12)
    for found, wanted in zip(run.all_logits(SCHEDULES["chunks beside decoding"]), expected, strict=True):
        error = (found.cpu() - wanted).norm() / wanted.norm()
        assert error < limit, f"{error:.3f}"


def test_a_token_that_nobody_has_read_yet_is_taken_from_the_step_before() -> None:
    prompts = [random_tokens(length, seed=length) for length in (12, 5, 20)]
    tables = [[3 * i, 3 * i + 1, 3 * i + 2] for i in range(3)]

    def steps(backend: GpuBackend, is_read: bool) -> list[list[int]]:
        """Greedy tokens of 7 steps whose rows change places."""
        lengths = [len(prompt) for prompt in prompts]
        ends = list(itertools.accumulate(lengths))
        batch = StepBatch([*itertools.chain(*prompts)], lengths, lengths, tables, [end - 1 for end in ends])
        reads = [backend.read([backend.argmax(batch)])]
        orders = [[0, 1, 2]]
        contexts = list(lengths)
        for step in range(6):
            order = [[2, 0, 1], [1, 2], [2, 1], [0, 1, 2]][step % 4] if step else [2, 1, 0]
            places = {sequence: row for row, sequence in enumerate(orders[-1])}
            order = [sequence for sequence in order if sequence in places]
            known = reads[-1].wait()[0].tolist()
            for sequence in order:
                contexts[sequence] += 1
            token_ids = [known[places[i]] if is_read else -1 - places[i] for i in order]
            orders.append(order)
            rows = [1] * len(order)
            batch = StepBatch(
                token_ids, rows, [contexts[i] for i in order], [tables[i] for i in order], [*range(len(order))]
            )
            reads.append(backend.read([backend.argmax(batch)]))
        return [read.wait()[0].tolist() for read in reads]

    model = MODELS["llama"]
    assert steps(gpu_backend(model, 9), is_read=False) == steps(gpu_backend(model, 9), is_read=True)


def test_tables_grow_and_make_room_for_others() -> None:
    """More sequences, one after the other, than the device has rows for."""
    backend, expected = gpu_backend(MODELS["llama"], 60, max_num_seqs=2), reference_backend(MODELS["llama"], 60)
    first = random_tokens(40, seed=1)
    runs = [PagedRun(each, [first], num_blocks=20, seed=3) for each in (backend, expected)]
    assert_same(runs, {0: 17})
    for i in range(7):
        other = [PagedRun(each, [random_tokens(18, seed=9 + i)], num_blocks=60, seed=3) for each in (backend, expected)]
        for run in other:
            run.tables = [[block + 3 for block in (20 + 2 * i, 21 + 2 * i)]]
        assert_same(other, {0: 18})
        if i % 3 == 0:
            assert_same(runs, {0: 1})


def assert_same(runs: list[PagedRun], counts: dict[int, int]) -> None:
    found, wanted = (run.step(counts)[0] for run in runs)
    torch.testing.assert_close(found.cpu(), wanted, rtol=2e-4, atol=2e-4)


def test_rows_are_drawn_by_their_own_settings() -> None:
    backend = gpu_backend(MODELS["llama"], 12)
    run = PagedRun(backend, sequences(), num_blocks=12)
    batch = run.batch({0: 30, 1: 24, 2: 9})
    logits = backend.forward(replace(batch, logit_rows=[29, 53, 62]))
    best = logits.argmax(-1).tolist()
    second = logits.topk(2).indices[:, 1].tolist()
    settings = SamplingBatch(
        temperature=np.array([0, 1, 0], np.float32),
        top_k=np.array([0, 1, 0]),
        top_p=np.ones(3, np.float32),
        min_p=np.zeros(3, np.float32),
        seed=np.array([1, 2, 3], np.uint64),
        choice=np.zeros(3, np.int64),
        position=np.array([30, 24, 9]),
        masked=[(2, np.array([best[2]]))],
    )
    assert backend.read([backend.sample(logits, settings)]).wait()[0].tolist() == [*best[:2], second[2]]


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.int8, torch.float8_e4m3fn], ids=str)
def test_a_row_that_is_no_numbers_has_no_token_and_what_follows_it_no_numbers_either(kv_dtype: torch.dtype) -> None:
    """Through the cache alone a NaN reaches the tokens behind it, and no neighbour. Each step is launched before the
    tokens of the last are known, and the second draws."""
    if kv_dtype is torch.float8_e4m3fn and DEVICE.type == "cpu":
        pytest.skip("interpreted, these numbers have no NaN")
    model = TinyModel(hidden_size=32, intermediate_size=32, num_heads=2, windows=(None,))

    def tokens(bad_token: int) -> list[list[int]]:
        backend = gpu_backend(model, 9, torch.bfloat16 if kv_dtype.itemsize == 1 else torch.float32, kv_dtype=kv_dtype)
        backend._decoder._embedding[99] = float("nan")  # type: ignore[union-attr]
        prompts = [[5, bad_token, 7, 8], [1, 2, 3, 4, 5]]
        tables = [[0], [1]]
        batch = StepBatch([*itertools.chain(*prompts)], [4, 5], [4, 5], tables, [3, 8])
        reads = [backend.read([backend.argmax(batch)])]
        settings = make_batch([(1.0, 0, 1.0, 0.0)] * 2, [1, 2], [6, 7], [0, 0], masked=[(0, np.arange(50))])
        logits = backend.forward(StepBatch([-1, -2], [1, 1], [5, 6], tables, [0, 1]))
        reads.append(backend.read([backend.sample(logits, settings)]))
        reads.append(backend.read([backend.argmax(StepBatch([-2, -1], [1, 1], [7, 6], tables[::-1], [0, 1]))]))
        return [read.wait()[0].tolist() for read in reads]

    (_, first), (_, second), (third, _) = tokens(6)
    assert tokens(99) == [[-1, first], [-1, second], [third, -1]]


def test_after_a_launch_that_raised_all_block_tables_are_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, expected = gpu_backend(MODELS["llama"], 12), reference_backend(MODELS["llama"], 12)
    runs = [PagedRun(each, [random_tokens(20)], num_blocks=12, seed=3) for each in (backend, expected)]
    with monkeypatch.context() as broken:
        broken.setattr(gpu_backend_module, "_update_tables", None)
        with pytest.raises(TypeError):
            runs[0].step({0: 20})
    backend.recover()
    runs[0].num_computed = [0]
    assert_same(runs, {0: 20})


def capture_on_a_cpu(backend: GpuBackend) -> None:
    """Have a graph for each size, whose replay runs again what was captured."""

    def graph(size: _Size) -> _Graph:
        backend._begin_padding(size)
        logits = backend._compute(size)

        def replay() -> None:
            logits.copy_(backend._compute(size))

        return _Graph(replay, logits)

    backend._graphs |= {size: graph(size) for size in backend._sizes()}


@pytest.mark.skipif(DEVICE.type == "cuda", reason="what stands in for flashinfer waits for the device")
def test_flashinfers_attention_draws_the_tokens_that_tritons_does() -> None:
    """In graphs of padded sizes, tokens read late; then launched op by op, as a step that scores its prompt is."""
    model = TinyModel(hidden_size=32, intermediate_size=32, num_heads=2, num_kv_heads=1, windows=(9, None))
    prompts = [random_tokens(length, seed=length) for length in (5, 11, 9)]
    tables = [[3, 7, 1], [0, 5, 2], [8, 4, 6]]

    def drawn(backend: GpuBackend) -> list[list[int]]:
        reads = []

        def step(token_ids: list[int], rows: list[tuple[int, int, int]], logit_rows: list[int]) -> None:
            """Rows of sequence, tokens and context."""
            numbers, lens, contexts = (list(column) for column in zip(*rows, strict=True))
            batch = StepBatch(token_ids, lens, contexts, [tables[i] for i in numbers], logit_rows)
            reads.append(backend.read([backend.argmax(batch)]))

        step([*prompts[0], *prompts[1]], [(0, 5, 5), (1, 11, 11)], [4, 15])
        step([-2, -1], [(1, 1, 12), (0, 1, 6)], [0, 1])
        step([-1, *prompts[2]], [(1, 1, 13), (2, 9, 9)], [0, 9])
        for i in range(3):
            step([-1, -2], [(1, 1, 14 + i), (2, 1, 10 + i)], [0, 1])
        step([-2], [(2, 1, 13)], [0])
        step(prompts[1], [(0, 11, 11)], [*range(11)])
        return [read.wait()[0].tolist() for read in reads]

    limits: dict[str, Any] = {"max_num_seqs": 3, "max_num_batched_tokens": 16}
    wrappers: list[BatchPrefillWithPagedKVCacheWrapper] = []

    def wrapper(*arguments: Any, **settings: Any) -> BatchPrefillWithPagedKVCacheWrapper:
        wrappers.append(BatchPrefillWithPagedKVCacheWrapper(*arguments, **settings))
        return wrappers[-1]

    backend = gpu_backend(model, 9, flashinfer_wrapper=wrapper, **limits)
    capture_on_a_cpu(backend)
    num_captured = len(wrappers)
    assert drawn(backend) == drawn(gpu_backend(model, 9, **limits))
    # Of each size one for each window; no request needs another but where a step is launched op by op.
    assert (num_captured, len(wrappers)) == (2 * len(backend._sizes()), 2 * len(backend._sizes()) + 2)
    assert sum(each.num_plans for each in wrappers[:num_captured]) == num_captured + 2 * 7
