"""Greedy tokens equal Hugging Face's `generate()` in float32, however the scheduler cuts and mixes the work."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from headrace.scheduler.block_pool import BlockPool
from headrace.scheduler.config import EngineConfig, SchedulingPolicy
from headrace.scheduler.messages import GenerationRequest, LoadSnapshot, SamplingParams
from headrace.scheduler.model_loader import load_engine
from headrace.scheduler.model_runner import ModelRunner
from headrace.scheduler.model_source import ModelSource
from headrace.scheduler.scheduler import Scheduler
from headrace.server.tokenizer import Tokenizer, load_tokenizer
from requirements import IS_LONG

NUM_OUTPUT_TOKENS = 20
BLOCK_SIZE = 16
NUM_BLOCKS = 512
_NUM_FOUND = 8 if IS_LONG else 4

_CHATS = [
    "What is the capital of France?",
    "Write a haiku about a water mill.",
    "Explain photosynthesis to a child.",
    "List three prime numbers above 100.",
    "Translate 'good morning' into Spanish, German and Japanese.",
    "Why is the sky blue?",
    "Give me a recipe for pancakes with 2 eggs.",
    "Who wrote Hamlet, and when?",
    "你好,你是谁",
    "Décris la mer en une phrase.",
    "Emoji only: 🌊🚣‍♀️?",
    "Sort these: 9, 2, 7, 33, 1",
]
_TEXTS = [
    "The mill wheel turned",
    "def fibonacci(n):\n    if n < 2:\n",
    '{"name": "headrace", "version": ',
    "Once upon a time, in a village by the river,",
    "1, 2, 4, 8, 16,",
    "<html>\n<head>\n<title>",
    "a",
    "The following is a list of countries and their capitals:\n1. France: Paris\n2. Japan:",
    "In 1815, the battle of",
    "   indented   oddly\n\n\n",
    "The water that drives the wheel comes down a channel called a headrace. " * 12,
    "Question: what is 17 + 25?\nAnswer:",
]


@pytest.fixture(scope="module")
def tokenizer(demo_model: Path) -> Tokenizer:
    return load_tokenizer(ModelSource(demo_model, "demo"))


@pytest.fixture(scope="module")
def prompts(tokenizer: Tokenizer) -> list[list[int]]:
    chats = [tokenizer.render_chat([{"role": "user", "content": text}]) for text in _CHATS]
    return [tokenizer.encode(text, add_special_tokens=False) for text in chats + _TEXTS]


@pytest.fixture(scope="module")
def reference(demo_model: Path, prompts: list[list[int]]) -> list[list[int]]:
    """What `generate()` continues each prompt with, alone."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        demo_model.parent, gguf_file=demo_model.name, dtype=torch.float32
    )
    return [_generate(model, prompt) for prompt in prompts]


def _generate(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    input_ids = torch.tensor([prompt])
    output = model.generate(  # type: ignore[operator]
        input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=NUM_OUTPUT_TOKENS, do_sample=False
    )
    return [int(token_id) for token_id in output[0, len(prompt) :]]


@pytest.fixture(scope="module")
def runner(demo_model: Path) -> ModelRunner:
    kv_bytes = NUM_BLOCKS * BLOCK_SIZE * 30 * 2 * 3 * 64 * 4
    _, runner = load_engine(EngineConfig(demo_model, device="cpu", dtype="float32", kv_cache_bytes=kv_bytes))
    return runner


def _run(
    runner: ModelRunner,
    prompts: list[list[int]],
    tokenizer: Tokenizer,
    *,
    num_blocks: int = NUM_BLOCKS,
    max_num_batched_tokens: int = 256,
    max_num_seqs: int = 16,
    steps_between_arrivals: int = 0,
    num_speculative_tokens: int = 0,
) -> tuple[list[list[int]], LoadSnapshot, int]:
    """All prompts through one scheduler: (tokens of each, the load at the end, the widest batch)."""
    scheduler = Scheduler(
        BlockPool(num_blocks),
        block_size=BLOCK_SIZE,
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_seqs=max_num_seqs,
        policy=SchedulingPolicy(num_speculative_tokens=num_speculative_tokens),
    )
    sampling = SamplingParams(temperature=0, max_tokens=NUM_OUTPUT_TOKENS, stop_token_ids=tokenizer.eos_token_ids)
    outputs: list[list[int]] = [[] for _ in prompts]
    arrivals = iter(enumerate(prompts))
    num_arrived = step = width = 0
    while num_arrived < len(prompts) or scheduler.has_work:
        if steps_between_arrivals == 0 or step % steps_between_arrivals == 0:
            for i, prompt in arrivals:
                scheduler.add(GenerationRequest(i, tuple(prompt), sampling, float(step)))
                num_arrived += 1
                if steps_between_arrivals:
                    break
        output = scheduler.schedule(float(step))
        width = max(width, len(output.rows))
        for result in scheduler.update(output, runner.run(output)):
            outputs[result.request_id] += result.token_ids
        scheduler.check_books()
        step += 1
    return outputs, scheduler.load(), width


def test_tokens_equal_generate_when_each_prompt_runs_alone(
    runner: ModelRunner, prompts: list[list[int]], reference: list[list[int]], tokenizer: Tokenizer
) -> None:
    assert len(prompts) >= 20
    assert _run(runner, prompts, tokenizer, max_num_seqs=1)[0] == reference


def test_tokens_equal_generate_sixteen_wide_with_staggered_arrival(
    runner: ModelRunner, prompts: list[list[int]], reference: list[list[int]], tokenizer: Tokenizer
) -> None:
    outputs, _, width = _run(runner, prompts, tokenizer, steps_between_arrivals=1)
    assert outputs == reference
    assert width == 16


def test_tokens_equal_generate_when_some_are_drafted(
    runner: ModelRunner, prompts: list[list[int]], reference: list[list[int]], tokenizer: Tokenizer
) -> None:
    outputs, load, _ = _run(
        runner, prompts[-6:], tokenizer, max_num_seqs=4, steps_between_arrivals=10, num_speculative_tokens=8
    )
    assert outputs == reference[-6:]
    assert load.num_accepted_tokens > 0


@pytest.mark.parametrize("chunk", [3, 7, 33] if IS_LONG else [7])
def test_tokens_equal_generate_when_prompts_are_chunked_at_awkward_sizes(
    runner: ModelRunner, prompts: list[list[int]], reference: list[list[int]], tokenizer: Tokenizer, chunk: int
) -> None:
    outputs, _, _ = _run(runner, prompts, tokenizer, max_num_batched_tokens=chunk, max_num_seqs=min(chunk, 6))
    assert outputs == reference


def test_tokens_equal_generate_after_preemption(
    runner: ModelRunner, prompts: list[list[int]], reference: list[list[int]], tokenizer: Tokenizer
) -> None:
    outputs, load, _ = _run(runner, prompts, tokenizer, num_blocks=24, max_num_batched_tokens=64)
    assert outputs == reference
    assert load.num_preemptions >= 5
    assert load.num_free_blocks == 24


@pytest.mark.parametrize("chunk", [5, 17, 256] if IS_LONG else [5])
def test_tokens_equal_generate_when_prompts_are_found_in_the_prefix_cache(
    runner: ModelRunner, prompts: list[list[int]], reference: list[list[int]], tokenizer: Tokenizer, chunk: int
) -> None:
    """Each prompt again, and then with most of its answer."""
    turns = [prompt + answer for prompt, answer in zip(prompts, reference, strict=True)]
    longest = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))[:_NUM_FOUND]
    asked = [prompts[i] for i in longest] * 2 + [turns[i][:-4] for i in longest]
    expected = [reference[i] for i in longest] * 2
    outputs, load, _ = _run(
        runner, asked, tokenizer, max_num_batched_tokens=chunk, max_num_seqs=min(chunk, 8), steps_between_arrivals=40
    )
    assert outputs[: len(expected)] == expected
    # Greedy, so that what was cut off an answer comes again, up to where generating stopped for want of tokens.
    for i, output in zip(longest, outputs[len(expected) :], strict=True):
        rest = reference[i][-4:]
        assert output[: len(rest)] == rest
    assert load.num_prefix_hits > load.num_prefix_queries / 3
