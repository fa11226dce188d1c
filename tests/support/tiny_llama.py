"""A random Llama small enough for a unit test, and the two ways to continue a prompt with it that must agree."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from headrace.scheduler.engine_core import Runner
from headrace.scheduler.messages import GenerationRequest, SamplingParams
from headrace.scheduler.scheduler import Scheduler

VOCAB_SIZE = 96


def tiny_config(**fields: Any) -> LlamaConfig:
    shape = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return LlamaConfig(**(shape | fields))


def tiny_llama(seed: int = 0, **fields: Any) -> Any:
    torch.manual_seed(seed)
    return LlamaForCausalLM(tiny_config(**fields)).eval()


def generate(
    scheduler: Scheduler,
    runner: Runner,
    prompts: Sequence[list[int]],
    samplings: Sequence[SamplingParams],
    leader_id: int | None = None,
) -> list[list[int]]:
    """The tokens of each prompt, submitted together and run to their ends; the books are checked at every step.

    With `leader_id` all others follow that one.
    """
    for i, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True)):
        leader = None if i == leader_id else leader_id
        scheduler.add(GenerationRequest(i, tuple(prompt), sampling, 0.0, leader_id=leader))
    answers: list[list[int]] = [[] for _ in prompts]
    while scheduler.has_work:
        step = scheduler.schedule(0.0)
        for output in scheduler.update(step, runner.run(step)):
            answers[output.request_id] += output.token_ids
        scheduler.check_books()
    return answers


def greedy(num_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=num_tokens)


def generate_with_hugging_face(model: Any, prompt: list[int], num_tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    tokens = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False, pad_token_id=0
    )
    return tokens[0, len(prompt) :].tolist()  # type: ignore[no-any-return]
