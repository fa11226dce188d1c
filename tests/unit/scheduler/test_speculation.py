"""With drafts a request gets, token for token, what it gets without them: greedy or random, alone or in company, to
whatever end; and what it gets is distributed as the model says."""

import itertools
import math
import random
from collections import Counter
from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import Any

import pytest
import torch

from fake_engine import FORGETFUL, run
from headrace.kernels import sampling, torch_ops
from headrace.kernels.backend import HostRead, StepBatch
from headrace.kernels.decoder import Decoder, DecoderConfig, KVCache
from headrace.kernels.step_times import StepTimes
from headrace.kernels.torch_backend import TorchBackend
from headrace.scheduler.block_pool import BlockPool
from headrace.scheduler.config import SchedulingPolicy
from headrace.scheduler.messages import FinishReason, GenerationRequest, SamplingParams, SequenceOutput
from headrace.scheduler.model_runner import ModelRunner
from headrace.scheduler.scheduler import Scheduler, SchedulerOutput
from headrace.scheduler.step_time import StepShape
from tiny_models import VOCAB_SIZE, tiny_llama

BLOCK_SIZE = 4
# A text that repeats itself, so that something is found, and some that begin with it.
TEXT = [(7 * i) % 11 + i // 40 for i in range(90)]


def make_scheduler(num_blocks: int = 64, num_speculative_tokens: int = 8, **fields: Any) -> Scheduler:
    policy = SchedulingPolicy(
        num_speculative_tokens=num_speculative_tokens, speculation_max_seqs=fields.pop("speculation_max_seqs", 4)
    )
    fields = {"max_num_batched_tokens": 64, "max_num_seqs": 8} | fields
    return Scheduler(BlockPool(num_blocks), block_size=BLOCK_SIZE, policy=policy, **fields)


def repeating(id: int = 0, max_tokens: int = 40, **fields: Any) -> GenerationRequest:
    """One that the fake model answers with letters that come to repeat themselves."""
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, **fields)
    return GenerationRequest(id, (FORGETFUL, 97, 98 + id % 3), params, 0.0)


def steps_to_the_end(scheduler: Scheduler) -> list[SchedulerOutput]:
    steps = []
    while scheduler.has_work:
        steps.append(scheduler.schedule(0.0))
        scheduler.update(steps[-1], run(steps[-1]))
        scheduler.check_books()
    return steps


# What is drafted, and when


def test_a_text_that_repeats_itself_takes_a_fraction_of_the_steps() -> None:
    num_steps = {}
    for num_speculative_tokens in (0, 8):
        scheduler = make_scheduler(num_speculative_tokens=num_speculative_tokens)
        scheduler.add(repeating(max_tokens=100))
        num_steps[num_speculative_tokens] = len(steps_to_the_end(scheduler))
        load = scheduler.load()
        assert (load.num_accepted_tokens > 0) == (num_speculative_tokens > 0)
        assert load.num_accepted_tokens <= load.num_drafted_tokens
        assert num_steps[num_speculative_tokens] == 100 - load.num_accepted_tokens
    assert num_steps[0] == 100
    assert num_steps[8] < 30


def test_nothing_is_drafted_while_many_run_or_anybody_waits() -> None:
    scheduler = make_scheduler(speculation_max_seqs=2)
    scheduler.add(repeating(0, 200))
    while not (output := scheduler.schedule(0.0)).shape.num_drafted:
        scheduler.update(output, run(output))
    scheduler.update(output, run(output))
    scheduler.add(repeating(1, 20))
    assert not scheduler.schedule(0.0).shape.num_drafted, "beside a prompt"
    scheduler = make_scheduler(speculation_max_seqs=2)
    for id in range(3):
        scheduler.add(repeating(id, 30 * (id + 1)))
    for step in steps_to_the_end(scheduler):
        assert not step.shape.num_drafted or len(step.rows) <= 2
    assert scheduler.load().num_accepted_tokens > 0


def test_no_draft_is_longer_than_what_is_asked_for_the_answer_wants_or_a_step_may_have() -> None:
    scheduler = make_scheduler(num_speculative_tokens=15)
    for id in range(4):
        scheduler.add(repeating(id, 60 + id))
    steps = steps_to_the_end(scheduler)
    assert max(sum(row.num_tokens for row in step.rows) for step in steps[1:]) <= 16
    for step in steps:
        for row in step.rows:
            assert row.start + row.num_tokens < row.sequence.num_total_tokens


@pytest.mark.parametrize(
    "fields", [{"repetition_penalty": 1.1}, {"presence_penalty": 0.1}, {"num_logprobs": 0}], ids=str
)
def test_nothing_is_drafted_where_what_is_drawn_depends_on_more_than_its_place(fields: dict[str, Any]) -> None:
    scheduler = make_scheduler()
    scheduler.add(repeating(0, 60, **fields))
    steps_to_the_end(scheduler)
    assert scheduler.load().num_drafted_tokens == 0


def test_nobody_loses_blocks_to_a_draft() -> None:
    scheduler = make_scheduler(num_blocks=18, has_prefix_cache=False)
    for id in range(3):
        scheduler.add(repeating(id, 20))
    for step in steps_to_the_end(scheduler):
        for row in step.rows:
            assert not row.draft or len(row.sequence.block_ids) <= 6
    assert scheduler.load().num_preemptions == 0
    assert scheduler.load().num_accepted_tokens > 0


def test_what_a_drafted_token_costs_is_learned_and_where_it_is_as_dear_as_a_step_few_are_tried() -> None:
    num_drafted, num_accepted = [], []
    for token_s in (0.0, 0.001, 0.010):
        scheduler = make_scheduler(num_blocks=100)
        scheduler.add(repeating(max_tokens=300))
        while scheduler.has_work:
            output = scheduler.schedule(0.0)
            seconds = 0.010 + token_s * output.shape.num_drafted
            scheduler.update(output, run(output), StepTimes(0.0, seconds, None))
        num_drafted.append(scheduler.load().num_drafted_tokens)
        num_accepted.append(scheduler.load().num_accepted_tokens)
    assert min(num_accepted[:2]) > 200
    assert 0 < num_drafted[2] <= 8 + 300 // 16, "one in sixteen, for it may become cheaper"


def test_a_draft_is_no_longer_than_the_inter_token_target_allows() -> None:
    scheduler = make_scheduler()
    scheduler.policy = replace(scheduler.policy, itl_targets_s=dict.fromkeys(scheduler.policy.itl_targets_s, 0.1))
    for i in range(2000):
        shape = StepShape(0, i % 9, 0, 0.0, i % 5)
        scheduler.observe(shape, 0.05 + 0.01 * shape.num_decoding + 0.01 * shape.num_drafted)
    scheduler.add(repeating(max_tokens=60))
    lengths = {step.shape.num_drafted for step in steps_to_the_end(scheduler)}
    assert max(lengths) in (2, 3), "of 90 ms the sequence's own token takes 60, each more 10"


def test_accepted_tokens_are_charged_and_rejected_ones_not() -> None:
    for num_speculative_tokens in (0, 8):
        scheduler = make_scheduler(num_speculative_tokens=num_speculative_tokens)
        for id in range(2):
            scheduler.add(repeating(id, 50))
        steps_to_the_end(scheduler)
        served = [tier.served for tier in scheduler._queue._tiers.values()]
        # Its prompt's three tokens, and all of the answer's but the last, a prompt token each.
        assert sum(served) * 3 == pytest.approx(2 * (3 + 49))


# The same tokens


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama(seed=5, initializer_range=0.2)


@pytest.fixture(scope="module")
def runner(model: Any) -> ModelRunner:
    config = DecoderConfig(
        windows=(None, None),
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=96,
        rms_norm_eps=model.config.rms_norm_eps,
        max_position=256,
        inv_freq=model.model.rotary_emb.inv_freq,
    )
    decoder = Decoder(config, dict(model.state_dict()), torch_ops)
    cache = KVCache.allocate(decoder.shape, 64, BLOCK_SIZE, torch.float32, torch.device("cpu"))
    return ModelRunner(
        TorchBackend(decoder, cache, torch_ops),
        vocab_size=VOCAB_SIZE,
        block_size=BLOCK_SIZE,
        max_context_tokens=256,
        max_num_batched_tokens=400,
        description="tiny",
    )


def answers(
    scheduler: Scheduler,
    runner: ModelRunner,
    requests: list[GenerationRequest],
    *,
    cancelled: dict[int, int] | None = None,
    arrivals: dict[int, int] | None = None,
) -> dict[int, tuple[list[int], FinishReason]]:
    """What each got and how it ended. Some arrive later, and some are cancelled after so many tokens."""
    found: dict[int, list[int]] = {request.request_id: [] for request in requests}
    ends: dict[int, FinishReason] = {}
    step = 0

    def record(outputs: list[SequenceOutput]) -> None:
        for output in outputs:
            assert output.request_id not in ends
            found[output.request_id] += output.token_ids
            if output.finish_reason is not None:
                ends[output.request_id] = output.finish_reason
            elif len(found[output.request_id]) >= (cancelled or {}).get(output.request_id, math.inf):
                scheduler.cancel(output.request_id)

    while len(ends) < len(requests):
        for request in requests:
            if (arrivals or {}).get(request.request_id, 0) == step:
                scheduler.add(request)
        output = scheduler.schedule(0.0)
        record(output.dropped)
        record(scheduler.update(output, runner.run(output)))
        scheduler.check_books()
        step += 1
    return {id: (found[id], ends[id]) for id in found}


def random_requests(rng: random.Random) -> list[GenerationRequest]:
    requests = []
    for id in range(rng.randint(1, 5)):
        first, num_prompt = rng.choice((0, 0, 11)), rng.randint(1, 40)
        params = SamplingParams(
            temperature=rng.choice((0.0, 0.0, 0.3, 0.7, 1.0)),
            top_p=rng.choice((1.0, 0.9)),
            top_k=rng.choice((0, 0, 5)),
            seed=rng.randint(0, 2**64 - 1),
            choice=rng.randint(0, 2),
            max_tokens=rng.randint(1, 50),
            min_tokens=rng.choice((0, 0, 6, 20)),
            stop_token_ids=frozenset(rng.sample(range(VOCAB_SIZE), rng.choice((0, 1, 4)))),
            logit_bias=((rng.randrange(VOCAB_SIZE), 3.0),) if rng.random() < 0.3 else (),
            presence_penalty=rng.choice((0.0, 0.0, 0.0, 0.4)),
            num_logprobs=rng.choice((None, None, None, 1)),
        )
        params = replace(params, min_tokens=min(params.min_tokens, params.max_tokens))
        requests.append(GenerationRequest(id, tuple(TEXT[first : first + num_prompt]), params, 0.0))
    return requests


def test_over_random_lives_every_token_and_every_end_is_that_without_drafts(runner: ModelRunner) -> None:
    """Chunks, neighbours, preemption, shared prefixes, stop tokens, cancels: whatever comes between."""
    num_accepted = num_rejected = num_preemptions = num_hits = 0
    ends: Counter[FinishReason] = Counter()
    for seed in range(20):
        rng = random.Random(seed)
        requests = random_requests(rng)
        cancelled = {r.request_id: rng.randint(1, 20) for r in requests if rng.random() < 0.15}
        arrivals = {r.request_id: rng.randint(0, 12) for r in requests}
        fields = {"num_blocks": rng.choice((24, 30, 64)), "max_num_batched_tokens": rng.choice((9, 64))}
        found = []
        for num_speculative_tokens in (0, rng.choice((1, 3, 8, 15))):
            scheduler = make_scheduler(num_speculative_tokens=num_speculative_tokens, **fields)
            for _ in range(100):
                scheduler._lengths.observe(1)  # so that more are admitted than will find blocks
            found.append(answers(scheduler, runner, requests, cancelled=cancelled, arrivals=arrivals))
        load = scheduler.load()
        num_accepted += load.num_accepted_tokens
        num_rejected += load.num_drafted_tokens - load.num_accepted_tokens
        num_preemptions += load.num_preemptions
        num_hits += load.num_prefix_hits
        for id, (tokens, end) in found[0].items():
            ends[end] += 1
            if end is FinishReason.CANCELLED:
                shorter, longer = sorted((tokens, found[1][id][0]), key=len)
                assert longer[: len(shorter)] == shorter
            else:
                assert found[1][id] == (tokens, end)
    assert min(num_accepted, num_rejected, num_preemptions, num_hits) > 0
    assert ends.keys() == {FinishReason.STOP, FinishReason.LENGTH, FinishReason.CANCELLED}


def test_a_prefix_that_others_find_holds_no_rejected_token(runner: ModelRunner) -> None:
    """What a later turn finds of an earlier one's answer is what it would compute."""
    params = SamplingParams(temperature=0.4, max_tokens=40)
    scheduler, plain = make_scheduler(), make_scheduler(num_speculative_tokens=0, has_prefix_cache=False)
    prompt = TEXT[:30]
    for turn in range(3):
        request = GenerationRequest(turn, tuple(prompt), replace(params, seed=turn), 0.0)
        found = answers(scheduler, runner, [request])
        assert found == answers(plain, runner, [request])
        prompt += [*found[turn][0], *TEXT[:5]]
    load = scheduler.load()
    assert load.num_prefix_hits > load.num_prefix_queries / 2
    assert load.num_drafted_tokens > load.num_accepted_tokens > 0


def test_a_step_with_drafts_that_raises_is_computed_again_with_them(runner: ModelRunner) -> None:
    scheduler = make_scheduler()
    request = GenerationRequest(0, tuple(TEXT[:30]), SamplingParams(temperature=0.0, max_tokens=40), 0.0)
    expected = answers(make_scheduler(num_speculative_tokens=0), runner, [request])[0][0]
    scheduler.add(request)
    found: list[int] = []
    while scheduler.has_work:
        output = scheduler.schedule(0.0)
        runner.run(output)  # lost
        again = SchedulerOutput(output.rows, [], StepShape(0, 0, 0))
        for each in scheduler.update(again, runner.run(again), is_observed=False):
            found += each.token_ids
    assert found == expected
    assert scheduler.load().num_accepted_tokens > 0


# The model's distribution

NUM_LETTERS = 4
NUM_ANSWERS = 2400
# So often one of the three below would fail though all were well, were its seeds drawn anew.
FALSE_ALARM = 1e-6


class MarkovBackend:
    """A model whose next token depends on the last one alone: what is said of each is a row of `table`."""

    is_asynchronous = False

    def __init__(self, table: torch.Tensor) -> None:
        self._table = table

    def forward(self, batch: StepBatch) -> torch.Tensor:
        return self._table[torch.tensor(batch.token_ids)[batch.logit_rows]]

    def argmax(self, batch: StepBatch) -> torch.Tensor:
        return sampling.argmax(self.forward(batch))

    def sample(self, logits: torch.Tensor, batch: sampling.SamplingBatch) -> torch.Tensor:
        return sampling.sample(logits, batch)

    def read(self, tensors: Seq[torch.Tensor]) -> HostRead:
        return HostRead([*tensors])

    def use_idle_time(self) -> bool:
        return False

    def profile(self) -> dict[str, float]:
        return {}

    def recover(self) -> None: ...


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (0.6, 0), (1.0, 3)])
def test_answers_with_drafts_are_distributed_as_the_model_says(temperature: float, top_k: int) -> None:
    """Pearson's chi-squared of the three tokens behind a prompt against the products of their probabilities. Of four
    letters the prompt has all pairs, so that the last two are always found, and the second token of each answer is
    drawn at a draft's place and the third behind it."""
    generator = torch.Generator().manual_seed(3)
    table = 1.5 * torch.randn(NUM_LETTERS, NUM_LETTERS, generator=generator)
    runner = ModelRunner(
        MarkovBackend(table),
        vocab_size=NUM_LETTERS,
        block_size=BLOCK_SIZE,
        max_context_tokens=128,
        max_num_batched_tokens=400,
        description="letters",
    )
    prompt = tuple(random.Random(7).choices(range(NUM_LETTERS), k=60))
    scheduler = make_scheduler(num_blocks=200, max_num_batched_tokens=400, speculation_max_seqs=8)
    requests = [
        GenerationRequest(
            seed, prompt, SamplingParams(temperature=temperature, top_k=top_k, seed=seed, max_tokens=4), 0.0
        )
        for seed in range(NUM_ANSWERS)
    ]
    found: Counter[tuple[int, ...]] = Counter()
    for first in range(0, NUM_ANSWERS, 8):
        for tokens, _ in answers(scheduler, runner, requests[first : first + 8]).values():
            found[tuple(tokens[:3])] += 1
    load = scheduler.load()
    assert load.num_drafted_tokens > NUM_ANSWERS
    assert 0.15 < load.num_accepted_tokens / load.num_drafted_tokens < 0.85, "both ends of a draft are well tried"

    if top_k:
        table[table < table.topk(top_k).values[:, -1:]] = -math.inf
    probs = torch.softmax(table.double() / temperature, -1).tolist()
    expected = {
        (a, b, c): NUM_ANSWERS * probs[prompt[-1]][a] * probs[a][b] * probs[b][c]
        for a, b, c in itertools.product(range(NUM_LETTERS), repeat=3)
    }
    assert found.keys() <= {ids for ids, num in expected.items() if num > 0}
    pairs = [(found[ids], num) for ids, num in expected.items() if num >= 5]
    num_rare = NUM_ANSWERS - sum(num for _, num in pairs)
    if num_rare >= 5:
        pairs.append((NUM_ANSWERS - sum(num for num, _ in pairs), num_rare))
    chi_squared = sum((f - e) ** 2 / e for f, e in pairs)
    freedom = torch.tensor(len(pairs) - 1, dtype=torch.float64)
    chance = float(torch.special.gammaincc(freedom / 2, torch.tensor(chi_squared / 2, dtype=torch.float64)))
    assert chance > FALSE_ALARM / 3
    assert freedom > 15
