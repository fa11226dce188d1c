"""A model in parts: ranks that compute together come to what one of them would, and are told no more than is new."""

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from cpu_models import PagedRun, TinyModel, dequantised, merged, random_adapter, random_tokens, reference_backend
from headrace.kernels import torch_ops, triton_ops
from headrace.kernels.backend import Backend, StepBatch
from headrace.kernels.decoder import Decoder, KVCache, Weight
from headrace.kernels.gpu_backend import GpuBackend
from headrace.kernels.gpu_linear import gpu_linear
from headrace.kernels.lora import Adapter
from headrace.kernels.quantised import QuantisedWeight
from headrace.kernels.sampling import SamplingBatch
from headrace.kernels.tensor_parallel import Group, Sharding, UnsupportedPlanError
from headrace.kernels.torch_backend import TorchBackend
from headrace.scheduler.lockstep import LockstepBackend
from rank_threads import RankThreads, in_lockstep
from sampling_batches import make_batch

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of interpreted kernels' padding

CPU = torch.device("cpu")
NUM_BLOCKS = 12
PLAN = {
    "lm_head": "colwise_gather_output",
    "model.embed_tokens": "embedding_rowwise",
    **{f"model.layers.*.self_attn.{name}_proj": "colwise" for name in "qkv"},
    **{f"model.layers.*.self_attn.{name}_norm": "replicated_with_grad_allreduce" for name in "qk"},
    "model.layers.*.self_attn.o_proj": "rowwise",
    **{f"model.layers.*.mlp.{name}_proj": "colwise" for name in ("gate", "up")},
    "model.layers.*.mlp.down_proj": "rowwise",
}
MODELS = {
    "llama": (TinyModel(), 2),
    "every bias, tied, an odd vocabulary": (
        TinyModel(has_qkv_bias=True, has_other_biases=True, is_tied=True, vocab_size=101),
        2,
    ),
    "qwen3, three ranks": (TinyModel(has_head_norms=True, num_heads=6, num_kv_heads=3, head_dim=32), 3),
}
# Three sequences: chunks beside decoding.
SCHEDULE = [{0: 20}, {0: 1, 1: 13}, {0: 1, 1: 8, 2: 5}, {1: 1, 0: 1, 2: 1}, {0: 1, 1: 1, 2: 1}]


def sequences() -> list[list[int]]:
    return [random_tokens(length, seed=length) for length in (30, 24, 9)]


def part(model: TinyModel, group: Group) -> tuple[Any, dict[str, Weight], Sharding]:
    sharding = Sharding.by_plan(PLAN, group.rank, group.size)
    config = replace(
        model.config,
        num_heads=model.num_heads // group.size,
        num_kv_heads=model.num_kv_heads // group.size,
        intermediate_size=model.intermediate_size // group.size,
    )
    return config, {name: sharding.take(name, weight) for name, weight in model.weights().items()}, sharding


def torch_part(model: TinyModel, group: Group, adapters: list[Adapter] | None = None) -> Backend:
    config, weights, sharding = part(model, group)
    own = [sharding.take_adapter(adapter) for adapter in adapters or []]
    decoder = Decoder(config, merged(weights, {}), torch_ops, adapters=own, group=group)
    cache = KVCache.allocate(config.shape, NUM_BLOCKS, 16, torch.float32, CPU)
    return TorchBackend(decoder, cache, torch_ops)


# Triton's interpreter is for one thread at a time: each has its turn while others wait for it in what they do together.
TURN = threading.Lock()


class TakesTurns(Group):
    def __init__(self, group: Group) -> None:
        super().__init__(group._ranks)

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        self._together(super().sum, x)
        return x

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        gathered: torch.Tensor = self._together(super().gather, x)
        return gathered

    def share(self, x: torch.Tensor) -> None:
        self._together(super().share, x)

    def _together(self, exchange: Callable[[torch.Tensor], Any], x: torch.Tensor) -> Any:
        TURN.release()
        try:
            return exchange(x)
        finally:
            TURN.acquire()


class InTurn(GpuBackend):
    def forward(self, batch: StepBatch) -> torch.Tensor:
        with TURN:
            return super().forward(batch)

    def sample(self, logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
        with TURN:
            return super().sample(logits, batch)


def gpu_part(model: TinyModel, ranks: Group) -> Backend:
    group = TakesTurns(ranks)
    config, weights, _ = part(model, group)
    make = functools.partial(gpu_linear, dtype=torch.float32, device=CPU)
    decoder = Decoder(config, weights, triton_ops, make, make, group=group)
    cache = KVCache.allocate(config.shape, NUM_BLOCKS, 16, torch.float32, CPU)
    return InTurn(decoder, cache, max_num_seqs=4, max_num_batched_tokens=128, max_num_blocks=8, group=group)


def check_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", MODELS)
def test_the_logits_of_all_ranks_together_are_those_of_one(name: str) -> None:
    model, size = MODELS[name]
    expected = PagedRun(reference_backend(model, NUM_BLOCKS), sequences(), num_blocks=NUM_BLOCKS).all_logits()
    with in_lockstep(size, functools.partial(torch_part, model)) as (backend, _):
        check_equal(PagedRun(backend, sequences(), num_blocks=NUM_BLOCKS).all_logits(SCHEDULE), expected)


def test_adapters_are_shared_among_the_ranks_as_weights_are() -> None:
    model = TinyModel(has_qkv_bias=True)
    adapters = [random_adapter(model, 1, 3), random_adapter(model, 2, 5, ("v_proj", "up_proj", "down_proj"))]
    numbers = [2, 0, 1]
    expected = []
    for tokens, number in zip(sequences(), numbers, strict=True):
        alone = reference_backend(model, NUM_BLOCKS, adapter=adapters[number - 1] if number else None)
        expected += PagedRun(alone, [tokens], num_blocks=NUM_BLOCKS).all_logits()
    with in_lockstep(2, lambda group: torch_part(model, group, adapters)) as (backend, _):
        run = PagedRun(backend, sequences(), num_blocks=NUM_BLOCKS, adapters=numbers)
        check_equal(run.all_logits(SCHEDULE), expected)


def test_a_token_that_rank_0_has_drawn_and_not_told_reaches_the_others_on_the_device() -> None:
    model = TinyModel(windows=(None,), vocab_size=33)
    tokens = random_tokens(6, vocab_size=33)

    def follow_up(backend: Backend, second: list[int]) -> tuple[torch.Tensor, int]:
        """The logits behind a token that is drawn, or known, and which one is drawn."""
        table = [3]
        logits = backend.forward(StepBatch(tokens, [6], [6], [table], [5]))
        likeliest = logits.argmax(dim=-1)
        drawn = backend.sample(logits, make_batch([(4.0, 0, 1.0, 0.0)], [11], [6], [0])).clone()
        assert drawn != likeliest, "which the others know"
        return backend.forward(StepBatch(second, [1], [7], [table], [0])).clone(), int(drawn)

    with in_lockstep(2, functools.partial(gpu_part, model)) as (backend, _):
        found, drawn = follow_up(backend, [-1])
    expected, _ = follow_up(reference_backend(model, NUM_BLOCKS), [drawn])
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)


def test_a_plan_that_leaves_out_the_vocabulary_splits_it_all_the_same() -> None:
    plan = {name: style for name, style in PLAN.items() if name.startswith("model.layers")}
    assert Sharding.by_plan(plan, 0, 2) == Sharding.by_plan(PLAN, 0, 2)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_a_part_of_a_quantised_weight_is_that_part_quantised(kind: str) -> None:
    model = TinyModel(types=(kind,), intermediate_size=128, vocab_size=101)
    for rank in range(2):
        sharding = Sharding.by_plan(PLAN, rank, 2)
        for name, weight in model.weights().items():
            expected = sharding.take(name, dequantised(weight))
            assert torch.equal(dequantised(sharding.take(name, weight)), expected), name
            assert sharding.shape(name, weight.shape) == expected.shape, name


def test_what_quantised_groups_cannot_be_split_into_is_refused() -> None:
    weight = TinyModel(types=("Q8_0",)).weights()["model.layers.0.mlp.down_proj.weight"]
    assert isinstance(weight, QuantisedWeight)
    with pytest.raises(UnsupportedPlanError, match="tensor_parallel_size 2 does not divide the groups of 32"):
        Sharding.by_plan(PLAN, 0, 2).take("model.layers.0.mlp.down_proj.weight", weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.layers.*.self_attn.q_proj": "packed_colwise"}, "the style packed_colwise"),
        ({"model.layers.*.self_attn.o_proj": "colwise"}, "splits model.layers.*.self_attn.o_proj along another axis"),
        ({"model.layers.*.mlp.up_proj": None}, "does not split model.layers.*.mlp.up_proj"),
        ({"model.layers.*.input_layernorm": "colwise"}, "splits model.layers.*.input_layernorm"),
    ],
)
def test_a_plan_that_is_not_how_the_decoder_computes_is_refused(change: dict[str, str | None], message: str) -> None:
    plan = {name: style for name, style in (PLAN | change).items() if style is not None}
    with pytest.raises(UnsupportedPlanError) as caught:
        Sharding.by_plan(plan, 0, 2)
    assert message in str(caught.value)


def test_a_step_sends_of_a_block_table_what_is_new() -> None:
    model = TinyModel()
    with in_lockstep(2, functools.partial(torch_part, model)) as (backend, ranks):
        run = PagedRun(backend, [random_tokens(40), random_tokens(40, seed=1)], num_blocks=NUM_BLOCKS)
        for table in run.tables:
            table += [0] * 500
        run.step({0: 2, 1: 2})
        run.step({1: 1, 0: 1})
        run.step({0: 1})
        run.step({0: 1, 1: 1})
    first, known, fewer, again = ranks.sent
    assert first > 1000
    assert known < 200
    assert fewer < 200
    assert 500 < again < first, "of the one that was not in the step before, all"


class _Broken(TorchBackend):
    def forward(self, batch: StepBatch) -> torch.Tensor:
        raise RuntimeError("out of memory")


@dataclass
class _Followers:
    loss: str | None = None

    def send(self, message: bytes) -> None: ...

    def why_lost(self, timeout_s: float = 0.0) -> str | None:
        return self.loss


def test_a_step_that_raises_on_rank_0_is_the_groups_last_one() -> None:
    own = reference_backend(TinyModel(), NUM_BLOCKS)
    broken = LockstepBackend(_Broken(own._decoder, own._cache, torch_ops), _Followers())
    broken.recover()
    with pytest.raises(RuntimeError, match="out of memory"):
        broken.argmax(StepBatch([1], [1], [1], [[0]], [0]))
    with pytest.raises(RuntimeError, match="the ranks are out of step: out of memory"):
        broken.recover()


def test_a_rank_that_does_not_answer_in_time_is_one_that_is_lost() -> None:
    model, ranks = TinyModel(), RankThreads(2, timeout_s=0.2)
    backend = LockstepBackend(torch_part(model, ranks.groups[0]), ranks)
    with pytest.raises(RuntimeError, match=r"[Tt]imed out"):
        backend.argmax(StepBatch([1], [1], [1], [[0]], [0]))
    with pytest.raises(RuntimeError, match=r"out of step: .*[Tt]imed out"):
        backend.recover()
    ranks.close()


class _StepAhead(TorchBackend):
    is_asynchronous = True


def test_what_was_computed_while_a_rank_was_lost_is_nothing() -> None:
    own, followers = reference_backend(TinyModel(), NUM_BLOCKS), _Followers()
    backend = LockstepBackend(_StepAhead(own._decoder, own._cache, torch_ops), followers)
    read = backend.read([backend.argmax(StepBatch([1], [1], [1], [[0]], [0]))])
    followers.loss = "rank 1: it has ended"
    with pytest.raises(RuntimeError, match="rank 1: it has ended"):
        read.wait()
    with pytest.raises(RuntimeError, match="rank 1: it has ended"):
        backend.recover()


class _Slice:
    """A weight in a file, of which each element read is counted."""

    def __init__(self, whole: torch.Tensor) -> None:
        self._whole = whole
        self.num_read = 0

    def get_shape(self) -> list[int]:
        return list(self._whole.shape)

    def __getitem__(self, own: Any) -> torch.Tensor:
        part = self._whole[own]
        self.num_read += part.numel()
        return part


@pytest.mark.parametrize(
    "name",
    ["model.embed_tokens.weight", "model.layers.1.self_attn.k_proj.weight", "model.layers.1.mlp.down_proj.weight"],
)
def test_of_a_weight_in_a_file_a_rank_reads_its_part(name: str) -> None:
    whole = TinyModel().weights()[name]
    assert isinstance(whole, torch.Tensor)
    parts = []
    for rank in range(2):
        weight = _Slice(whole)
        parts.append(Sharding.by_plan(PLAN, rank, 2).take(name, weight))
        assert weight.num_read == whole.numel() // 2
    assert torch.equal(torch.cat(parts, dim=1 if "down" in name else 0), whole)
