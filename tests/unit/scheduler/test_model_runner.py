"""What a request gets is its own: alone, in company, in chunks, after preemption, in blocks that held other keys."""

import math
import threading
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import pytest
import torch

from headrace.kernels import torch_ops
from headrace.kernels.backend import StepBatch
from headrace.kernels.decoder import Decoder, DecoderConfig, KVCache
from headrace.kernels.sampling import SamplingBatch
from headrace.kernels.step_times import StepTimes
from headrace.kernels.torch_backend import TorchBackend
from headrace.scheduler.block_pool import BlockPool
from headrace.scheduler.errors import DeviceLostError
from headrace.scheduler.grammar import Following, Grammar, GrammarState, Move
from headrace.scheduler.messages import FinishReason, GenerationRequest, SamplingParams, SequenceOutput, TokenLogprobs
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
        has_prefix_cache: bool = True,
        backend: type[TorchBackend] = TorchBackend,
    ) -> None:
        self.model = model = tiny_llama(seed=5, initializer_range=0.2)
        config = DecoderConfig(
            windows=(None, None),
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
            vocab_size=VOCAB_SIZE,
            hidden_size=64,
            intermediate_size=96,
            rms_norm_eps=model.config.rms_norm_eps,
            max_position=128,
            inv_freq=model.model.rotary_emb.inv_freq,
        )
        weights = {name: weight.to(dtype) for name, weight in model.state_dict().items()}
        decoder = Decoder(config, weights, torch_ops)
        self.cache = KVCache.allocate(decoder.shape, num_blocks, block_size, dtype, torch.device("cpu"))
        self.runner = ModelRunner(
            backend(decoder, self.cache, torch_ops),
            vocab_size=VOCAB_SIZE,
            block_size=block_size,
            max_context_tokens=128,
            max_num_batched_tokens=budget,
            description="tiny",
        )
        self.scheduler = Scheduler(
            BlockPool(num_blocks),
            block_size=block_size,
            max_num_batched_tokens=budget,
            max_num_seqs=max_num_seqs,
            has_prefix_cache=has_prefix_cache,
        )
        for _ in range(100):
            self.scheduler._lengths.observe(1)  # so that more are admitted than will find blocks

    def generate(
        self, prompts: list[list[int]], samplings: list[SamplingParams], leader_id: int | None = None
    ) -> list[list[int]]:
        return generate(self.scheduler, self.runner, prompts, samplings, leader_id=leader_id)

    def step(self) -> list[SequenceOutput]:
        output = self.scheduler.schedule(0.0)
        outputs = self.scheduler.update(output, self.runner.run(output))
        self.scheduler.check_books()
        return outputs


class DevicelikeBackend(TorchBackend):
    """Is asynchronous as a device is: it alone knows a step's tokens until they are read, and overwrites its logits."""

    is_asynchronous = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.drawn = torch.empty(0, dtype=torch.int64)
        self.reads: list[DelayedRead] = []
        self.num_pending = 0
        self._logits = torch.empty(0)

    @torch.inference_mode()
    def forward(self, batch: StepBatch) -> torch.Tensor:
        self._logits.fill_(float("nan"))
        self.num_pending += sum(token_id < 0 for token_id in batch.token_ids)
        known = [max(0, int(self.drawn[-1 - token_id])) if token_id < 0 else token_id for token_id in batch.token_ids]
        self.drawn = torch.empty(0, dtype=torch.int64)
        self._logits = super().forward(replace(batch, token_ids=known))
        return self._logits

    def argmax(self, batch: StepBatch) -> torch.Tensor:
        self.drawn = super().argmax(batch)
        return self.drawn

    def sample(self, logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
        self.drawn = super().sample(logits, batch)
        return self.drawn

    def read(self, tensors: Seq[torch.Tensor]) -> "DelayedRead":
        assert sum(not read.is_over for read in self.reads) <= 1, "more than one step ahead"
        self.reads.append(DelayedRead([tensor.clone() for tensor in tensors]))
        return self.reads[-1]


@dataclass
class DelayedRead:
    tensors: list[torch.Tensor]
    times: StepTimes | None = None
    is_over: bool = False

    def wait(self) -> list[torch.Tensor]:
        assert not self.is_over, "read twice"
        self.is_over = True
        return self.tensors


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
@pytest.mark.parametrize("backend", [TorchBackend, DevicelikeBackend])
def test_every_request_gets_what_it_gets_alone_greedy_or_random(
    each_alone: list[list[int]], fields: dict[str, Any], backend: type[TorchBackend]
) -> None:
    engine = Engine(**fields, backend=backend)
    assert engine.generate(PROMPTS, SAMPLINGS) == each_alone
    load = engine.scheduler.load()
    assert (load.num_preemptions > 0) == ("num_blocks" in fields)
    assert engine.generate(PROMPTS, SAMPLINGS) == each_alone, "once more, with what the first time left in the cache"
    if "num_blocks" not in fields:
        assert engine.scheduler.load().num_prefix_hits > load.num_prefix_hits


@pytest.mark.parametrize("num_blocks", [64, 16])
def test_steps_launched_ahead_give_the_same_tokens_whatever_is_asked_for(num_blocks: int) -> None:
    own: list[dict[str, Any]] = [
        {},
        {"repetition_penalty": 1.3},
        {"min_tokens": 6, "stop_token_ids": frozenset(range(0, VOCAB_SIZE, 2))},
        {"logit_bias": ((5, 4.0), (6, -4.0)), "num_logprobs": 2},
        {"num_prompt_logprobs": 3},
        {"stop_token_ids": frozenset(range(0, VOCAB_SIZE, 4)), "frequency_penalty": 0.4, "num_logprobs": 0},
    ]
    samplings = [replace(sampling, **fields) for sampling, fields in zip(SAMPLINGS, own, strict=True)]
    engine = Engine(num_blocks=num_blocks, budget=20, backend=DevicelikeBackend)
    expected = Engine(num_blocks=num_blocks, budget=20).generate(PROMPTS, samplings)
    assert engine.generate(PROMPTS, samplings) == expected
    backend = engine.runner.backend
    assert isinstance(backend, DevicelikeBackend)
    assert backend.num_pending > 0
    assert all(read.is_over for read in backend.reads)
    assert engine.generate(PROMPTS[:1], SAMPLINGS[:1]) == Engine().generate(PROMPTS[:1], SAMPLINGS[:1]), "all greedy"


def test_a_backend_that_is_not_asynchronous_is_never_given_a_token_that_is_not_known() -> None:
    with pytest.raises(AssertionError, match="not known"):
        Engine().runner.backend.forward(StepBatch([-1], [1], [1], [[0]], [0]))


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
    for tensor in (tensor for layer in engine.cache.layers for tensor in layer[:2]):
        tensor.fill_(float("nan"))
    assert engine.generate(PROMPTS[2:4], SAMPLINGS[2:4]) == expected


@pytest.mark.parametrize("block_size", [1, 4, 8])
def test_a_chunk_of_one_token_does_not_look_behind_its_context(block_size: int) -> None:
    """It shares a call with longer contexts, and its own later blocks are allocated and not yet cleared."""
    prompts = [[(3 * i) % VOCAB_SIZE for i in range(num_blocks * block_size)] for num_blocks in (2, 7)]
    fields: dict[str, Any] = {"num_blocks": 96 // block_size, "block_size": block_size, "budget": 2, "max_num_seqs": 2}
    expected = Engine(**fields).generate(prompts, SAMPLINGS[:2])
    engine = Engine(**fields)
    for tensor in (tensor for layer in engine.cache.layers for tensor in layer[:2]):
        tensor.fill_(float("nan"))
    assert engine.generate(prompts, SAMPLINGS[:2]) == expected


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


def test_a_conversation_that_finds_its_earlier_turns_goes_on_as_without_them() -> None:
    engine, without = Engine(budget=11), Engine(budget=11, has_prefix_cache=False)
    prompt = list(PROMPTS[4])
    for turn in range(4):
        sampling = replace(SAMPLINGS[turn], max_tokens=9)
        [answer] = engine.generate([prompt], [sampling])
        assert without.generate([prompt], [sampling]) == [answer]
        prompt += [*answer, 1, 2, 3]
    load = engine.scheduler.load()
    assert load.num_prefix_hits > load.num_prefix_queries / 2
    assert without.scheduler.load().num_prefix_hits == 0


def test_each_choice_draws_what_it_draws_alone() -> None:
    samplings = [replace(SAMPLINGS[1], choice=choice) for choice in range(5)]
    alone = [Engine().generate([PROMPTS[5]], [sampling])[0] for sampling in samplings]
    assert len({tuple(tokens) for tokens in alone}) == 5
    for budget in (5, 7, 64):
        engine = Engine(budget=budget, max_num_seqs=5)
        assert engine.generate([PROMPTS[5]] * 5, samplings, leader_id=0) == alone
        assert engine.scheduler.load().num_prefix_hits == 4 * 28, "the prompt is computed once"


@pytest.mark.parametrize(
    "fields", [{"repetition_penalty": 1.5}, {"presence_penalty": 1.5}, {"frequency_penalty": 0.8}], ids=str
)
def test_a_penalised_answer_repeats_less_and_is_the_same_in_company(fields: dict[str, Any]) -> None:
    samplings = [replace(sampling, **fields, max_tokens=40) for sampling in SAMPLINGS[:4]]
    together = Engine(budget=9).generate(PROMPTS[:4], samplings)
    assert together == [Engine().generate([p], [s])[0] for p, s in zip(PROMPTS, samplings, strict=False)]
    free = Engine().generate(PROMPTS[:1], [replace(SAMPLINGS[0], max_tokens=40)])
    assert len(set(together[0])) > len(set(free[0]))


def test_a_repetition_penalty_is_that_of_generate() -> None:
    prompt = torch.tensor([PROMPTS[5]])
    expected = Engine().model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=30,
        do_sample=False,
        repetition_penalty=1.4,
        pad_token_id=0,
    )
    sampling = SamplingParams(temperature=0, repetition_penalty=1.4, max_tokens=30)
    assert Engine(budget=8).generate([PROMPTS[5]], [sampling]) == [expected[0, len(PROMPTS[5]) :].tolist()]


@pytest.mark.parametrize("fields", [{}, {"budget": 1, "max_num_seqs": 1}, {"budget": 11}, {"num_blocks": 11}], ids=str)
def test_log_probabilities_are_the_models_own_whatever_is_changed_for_sampling(fields: dict[str, Any]) -> None:
    engine = Engine(**fields)
    own: dict[str, Any] = {
        "num_logprobs": 3,
        "num_prompt_logprobs": 2,
        "repetition_penalty": 1.2,
        "logit_bias": ((5, 4.0), (6, -4.0)),
    }
    samplings = [replace(sampling, **own) for sampling in SAMPLINGS]
    for i, (prompt, sampling) in enumerate(zip(PROMPTS, samplings, strict=True)):
        engine.scheduler.add(GenerationRequest(i, tuple(prompt), sampling, 0.0))
    tokens: list[list[int]] = [list(prompt) for prompt in PROMPTS]
    found: list[list[TokenLogprobs]] = [[] for _ in PROMPTS]
    while engine.scheduler.has_work:
        for output in engine.step():
            tokens[output.request_id] += output.token_ids
            found[output.request_id] += [*output.prompt_logprobs, *output.logprobs]
    assert (engine.scheduler.load().num_preemptions > 0) == ("num_blocks" in fields)
    for i, prompt in enumerate(PROMPTS):
        with torch.inference_mode():
            expected = engine.model(torch.tensor([tokens[i]])).logits[0, :-1].log_softmax(-1)
        assert len(found[i]) == len(tokens[i]) - 1, "every token but the first has one, and none has two"
        for position, logprobs in enumerate(found[i]):
            row = expected[position]
            assert logprobs.logprob == pytest.approx(float(row[tokens[i][position + 1]]), abs=1e-3)
            best = row.topk(2 if position + 1 < len(prompt) else 3)
            assert [token for token, _ in logprobs.top] == best.indices.tolist()
            assert [logprob for _, logprob in logprobs.top] == pytest.approx(best.values.tolist(), abs=1e-3)


@pytest.mark.parametrize("fields", [{}, {"budget": 11}, {"num_blocks": 11}], ids=str)
def test_a_prompt_that_is_only_scored_gets_what_it_gets_before_an_answer(fields: dict[str, Any]) -> None:
    def scored(max_tokens: int) -> list[tuple[TokenLogprobs, ...]]:
        engine = Engine(**fields)
        sampling = SamplingParams(max_tokens=max_tokens, num_prompt_logprobs=2)
        for i, prompt in enumerate(PROMPTS):
            engine.scheduler.add(GenerationRequest(i, tuple(prompt), sampling, 0.0))
        found: list[tuple[TokenLogprobs, ...]] = [()] * len(PROMPTS)
        num_tokens = 0
        while engine.scheduler.has_work:
            for output in engine.step():
                found[output.request_id] += output.prompt_logprobs
                num_tokens += len(output.token_ids)
        assert num_tokens == max_tokens * len(PROMPTS)
        return found

    assert scored(0) == scored(1)


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


class AlternatingCompiler:
    """What follows a token is of the other parity. Each third token takes a step longer, where it `is_slow`."""

    def __init__(self, *, is_slow: bool = False) -> None:
        self.is_slow = is_slow
        self.delayed: list[tuple[GrammarState, Following]] = []

    def following(self, parity: int) -> Following:
        ids = np.arange(-(-VOCAB_SIZE // 32) * 32)
        return Following(np.packbits(ids % 2 == parity, bitorder="little").view(np.uint32), is_over=False)

    def submit(self, moves: list[Move]) -> None:
        for state, token_ids in moves:
            following = self.following(1 - token_ids[-1] % 2)
            if self.is_slow and token_ids[-1] % 3 == 0:
                self.delayed.append((state, following))
            else:
                state.settle(following)

    def catch_up(self) -> None:
        for state, following in self.delayed:
            state.settle(following)
        self.delayed.clear()

    def grammar(self) -> Grammar:
        return Grammar(cast(Any, self), cast(Any, None), self.following(0), 0)


@pytest.mark.parametrize("is_slow", [False, True])
@pytest.mark.parametrize("has_logprobs", [False, True])
def test_rows_that_keep_to_a_grammar_do_so_and_their_neighbours_never_notice(
    each_alone: list[list[int]], *, is_slow: bool, has_logprobs: bool
) -> None:
    """What a row is given is the same whenever its mask comes, with the log probabilities of what it was given."""
    compilers = AlternatingCompiler(), AlternatingCompiler(is_slow=is_slow)
    texts = []
    for compiler in compilers:
        engine = Engine()
        for i, (prompt, sampling) in enumerate(zip(PROMPTS, SAMPLINGS, strict=True)):
            grammar = compiler.grammar() if i % 2 else None
            own = replace(sampling, num_logprobs=2) if has_logprobs else sampling
            engine.scheduler.add(GenerationRequest(i, tuple(prompt), own, 0.0, grammar=grammar))
        tokens: list[list[int]] = [[] for _ in PROMPTS]
        while engine.scheduler.has_work:
            for output in engine.step():
                tokens[output.request_id] += output.token_ids
                assert [each.token_id for each in output.logprobs] == [*output.token_ids] * has_logprobs
            compiler.catch_up()
        texts.append(tokens)
        assert tokens[::2] == each_alone[::2]
        for constrained in tokens[1::2]:
            assert [token_id % 2 for token_id in constrained] == [i % 2 for i in range(NUM_TOKENS)]
    assert texts[0] == texts[1]


def test_a_batch_of_which_all_keep_to_grammars_waits_for_what_they_allow() -> None:
    compiler = AlternatingCompiler(is_slow=True)
    engine = Engine()
    engine.scheduler.add(GenerationRequest(0, tuple(PROMPTS[3]), SAMPLINGS[0], 0.0, grammar=compiler.grammar()))
    tokens: list[int] = []
    while engine.scheduler.has_work:
        if compiler.delayed:
            threading.Timer(0.01, compiler.catch_up).start()
        [output] = engine.step()
        tokens += output.token_ids
    assert len(tokens) == NUM_TOKENS


def test_where_all_keep_to_grammars_one_that_stays_unknown_holds_up_its_own_answer_alone() -> None:
    slow = AlternatingCompiler(is_slow=True)
    engine = Engine()
    for i, compiler in enumerate((AlternatingCompiler(), slow)):
        engine.scheduler.add(GenerationRequest(i, tuple(PROMPTS[3]), SAMPLINGS[0], 0.0, grammar=compiler.grammar()))
    num_tokens = [0, 0]
    while num_tokens[0] < NUM_TOKENS:
        for output in engine.step():
            num_tokens[output.request_id] += len(output.token_ids)
    assert slow.delayed
    assert num_tokens[1] < NUM_TOKENS
    while engine.scheduler.has_work:
        slow.catch_up()
        engine.step()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_stop_token_is_drawn_before_min_tokens_where_a_grammar_has_no_other(temperature: float) -> None:
    words = np.zeros(-(-VOCAB_SIZE // 32), np.uint32)
    words[1] = 1 << 3
    grammar = replace(AlternatingCompiler().grammar(), first=Following(words, is_over=False))
    sampling = SamplingParams(temperature=temperature, seed=3, min_tokens=5, stop_token_ids=frozenset({1, 35}))
    engine = Engine()
    engine.scheduler.add(GenerationRequest(0, tuple(PROMPTS[2]), sampling, 0.0, grammar=grammar))
    [output] = engine.step()
    assert (output.token_ids, output.finish_reason) == ((35,), FinishReason.STOP)


def test_prompts_that_are_not_done_are_given_no_token() -> None:
    engine = Engine(budget=8)
    engine.scheduler.add(GenerationRequest(0, tuple(PROMPTS[4]), SAMPLINGS[0], 0.0))
    for expected in ([None], [None], [int]):
        output = engine.scheduler.schedule(0.0)
        results = engine.runner.run(output)
        assert [None if r.token_id is None else type(r.token_id) for r in results] == expected
        engine.scheduler.update(output, results)


@pytest.mark.parametrize("backend", [TorchBackend, DevicelikeBackend])
@pytest.mark.parametrize("fields", [{}, {"num_logprobs": 2}, {"num_prompt_logprobs": 1}], ids=str)
def test_a_prompt_that_the_model_makes_no_numbers_of_costs_nobody_else_a_token(
    each_alone: list[list[int]], backend: type[TorchBackend], fields: dict[str, Any]
) -> None:
    engine = Engine(budget=11, backend=backend)
    used = {token for tokens in (*PROMPTS, *each_alone) for token in tokens}
    poison = next(token for token in range(VOCAB_SIZE) if token not in used)
    decoder = engine.runner.backend._decoder  # type: ignore[attr-defined]
    decoder._embedding[poison] = float("nan")
    prompts = [[*prompt[:2], poison, *prompt[3:]] if i == 4 else prompt for i, prompt in enumerate(PROMPTS)]
    for i, (prompt, sampling) in enumerate(zip(prompts, SAMPLINGS, strict=True)):
        sampling = replace(sampling, max_tokens=4, **fields)
        engine.scheduler.add(GenerationRequest(i, tuple(prompt), sampling, 0.0))
    outputs = []
    while engine.scheduler.has_work:
        outputs += engine.step()
    for i, expected in enumerate(each_alone):
        own = [output for output in outputs if output.request_id == i]
        assert own[-1].finish_reason is (FinishReason.ERROR if i == 4 else FinishReason.LENGTH)
        assert [token for output in own for token in output.token_ids] == ([] if i == 4 else expected[:4])
        logprobs = [each.logprob for output in own for each in (*output.logprobs, *output.prompt_logprobs)]
        assert not any(math.isnan(logprob or 0.0) for logprob in logprobs)


def test_a_device_that_does_not_answer_after_a_raise_is_lost() -> None:
    class Lost(TorchBackend):
        def recover(self) -> None:
            raise RuntimeError("an illegal address\nand advice")

    Engine().runner.recover()
    with pytest.raises(DeviceLostError, match=r"^the device is lost: an illegal address$"):
        Engine(backend=Lost).runner.recover()
