"""What a request gets is its own: alone, in company, in chunks, after preemption, in blocks that held other keys."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from headrace.kernels import torch_ops
from headrace.kernels.decoder import Decoder, DecoderConfig, KVCache
from headrace.scheduler.block_pool import BlockPool
from headrace.scheduler.messages import FinishReason, GenerationRequest, SamplingParams, SequenceOutput
from headrace.scheduler.model_runner import ModelRunner
from headrace.scheduler.scheduler import Scheduler
from tiny_models import VOCAB_SIZE, generate, tiny_llama

NUM_TOKENS = 14
PROMPTS = [[(7 * i + j * j) % VOCAB_SIZE for j in range(length)] for i, length in enumerate((1, 3, 8, 9, 17, 30))]
SAMPLINGS = [
    SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS),
    SamplingParams(temperature=1.0, seed=1, max_tokens=NUM_TOKENS),
    SamplingParams(temperature=0.7, top_k=20, seed=2, max_tokens=NUM_TOKENS),
    SamplingParams(temperature=1.2, top_p=0.8, seed=2**64 - 1, max_tokens=NUM_TOKENS),
    SamplingParams(temperature=1.0, min_p=0.05, seed=4, max_tokens=NUM_TOKENS),
    SamplingParams(temperature=1.0, seed=1, max_tokens=NUM_TOKENS),
]


class Engine:
    """A tiny random Llama with a scheduler, and its cache in sight."""

    def __init__(
        self,
        num_blocks: int = 64,
        block_size: int = 4,
        budget: int = 64,
        max_num_seqs: int = 8,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        model = tiny_llama(seed=5, initializer_range=0.2)
        config = DecoderConfig(
            windows=(None, None),
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
            vocab_size=VOCAB_SIZE,
            rms_norm_eps=model.config.rms_norm_eps,
            max_position=128,
            inv_freq=model.model.rotary_emb.inv_freq,
        )
        weights = {name: weight.to(dtype) for name, weight in model.state_dict().items()}
        self.cache = KVCache(*([torch.zeros(num_blocks, block_size, 2, 16, dtype=dtype) for _ in "12"] for _ in "kv"))
        self.runner = ModelRunner(
            Decoder(config, weights, torch_ops), self.cache, torch_ops, block_size, 128, budget, "tiny"
        )
        self.scheduler = Scheduler(
            BlockPool(num_blocks), block_size=block_size, max_num_batched_tokens=budget, max_num_seqs=max_num_seqs
        )

    def generate(self, prompts: list[list[int]], samplings: list[SamplingParams]) -> list[list[int]]:
        return generate(self.scheduler, self.runner, prompts, samplings)

    def step(self) -> list[SequenceOutput]:
        output = self.scheduler.schedule(0.0)
        outputs = self.scheduler.update(output, self.runner.run(output))
        self.scheduler.check_books()
        return outputs


@pytest.fixture(scope="module")
def each_alone() -> list[list[int]]:
    return [Engine(max_num_seqs=1).generate([p], [s])[0] for p, s in zip(PROMPTS, SAMPLINGS, strict=True)]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"max_num_seqs": 1},
        {"budget": 1, "max_num_seqs": 1},
        {"budget": 3, "max_num_seqs": 3},
        {"budget": 7, "max_num_seqs": 6},
        {"num_blocks": 11},
        {"num_blocks": 44, "block_size": 1, "budget": 5, "max_num_seqs": 5},
    ],
    ids=str,
)
def test_every_request_gets_what_it_gets_alone_greedy_or_random(
    each_alone: list[list[int]], fields: dict[str, Any]
) -> None:
    engine = Engine(**fields)
    assert engine.generate(PROMPTS, SAMPLINGS) == each_alone
    assert (engine.scheduler.load().num_preemptions > 0) == ("num_blocks" in fields)


def test_the_same_prompt_and_seed_give_the_same_answer_and_another_seed_another() -> None:
    samplings = [replace(SAMPLINGS[1], seed=seed) for seed in (5, 5, 6)]
    first, again, other = Engine().generate([PROMPTS[4]] * 3, samplings)
    assert first == again != other


def test_warming_up_leaves_no_trace_in_an_answer(each_alone: list[list[int]]) -> None:
    engine = Engine(num_blocks=40)
    engine.runner.warm_up()
    assert engine.generate(PROMPTS, SAMPLINGS) == each_alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_block_held_before_never_reaches_its_next_holder(dtype: torch.dtype) -> None:
    expected = Engine(num_blocks=12, dtype=dtype).generate(PROMPTS[2:4], SAMPLINGS[2:4])
    engine = Engine(num_blocks=12, dtype=dtype)
    for tensor in (*engine.cache.keys, *engine.cache.values):
        tensor.fill_(float("nan"))
    assert engine.generate(PROMPTS[2:4], SAMPLINGS[2:4]) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_neighbours_tokens_never_change_an_answer(dtype: torch.dtype) -> None:
    """Same shapes, other contents: in any dtype each row is the same to the last bit, so its tokens are."""
    answers = []
    for shift in (0, 31):
        prompts = [PROMPTS[3], [(token + shift) % VOCAB_SIZE for token in PROMPTS[4]], PROMPTS[5]]
        answers.append(Engine(dtype=dtype).generate(prompts, [SAMPLINGS[0], SAMPLINGS[1], SAMPLINGS[2]]))
    assert answers[0][0] == answers[1][0]
    assert answers[0][2] == answers[1][2]
    assert answers[0][1] != answers[1][1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_stop_token_is_not_even_drawn_before_min_tokens(temperature: float) -> None:
    sampling = SamplingParams(temperature=temperature, seed=3, max_tokens=NUM_TOKENS)
    [free] = Engine().generate([PROMPTS[2]], [sampling])
    stop = frozenset(free)
    engine = Engine()
    engine.scheduler.add(
        GenerationRequest(0, tuple(PROMPTS[2]), replace(sampling, min_tokens=5, stop_token_ids=stop), 0.0)
    )
    tokens: list[int] = []
    reasons = []
    while engine.scheduler.has_work:
        for output in engine.step():
            tokens += output.token_ids
            reasons.append(output.finish_reason)
    assert stop.isdisjoint(tokens[:5])
    assert len(tokens) > 5
    if reasons[-1] is FinishReason.STOP:
        assert tokens[-1] in stop
        assert stop.isdisjoint(tokens[:-1])
    else:
        assert stop.isdisjoint(tokens)


def test_prompts_that_are_not_done_are_given_no_token() -> None:
    engine = Engine(budget=8)
    engine.scheduler.add(GenerationRequest(0, tuple(PROMPTS[4]), SAMPLINGS[0], 0.0))
    for expected in ([None], [None], [int]):
        output = engine.scheduler.schedule(0.0)
        sampled = engine.runner.run(output)
        assert [None if token is None else type(token) for token in sampled] == expected
        engine.scheduler.update(output, sampled)
