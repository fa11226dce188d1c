"""Random models small enough for a unit test, and the two ways to continue a prompt with one that must agree."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from headrace.scheduler.engine_core import LaunchedStep, Runner
from headrace.scheduler.messages import GenerationRequest, SamplingParams
from headrace.scheduler.scheduler import Scheduler, SchedulerOutput

VOCAB_SIZE = 96


# Config fields that any family takes, cut to its size.
SHAPE: dict[str, Any] = {
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
    "pad_token_id": None,
}


def tiny_config(model_type: str = "llama", **fields: Any) -> Any:
    return CONFIG_MAPPING[model_type](**(SHAPE | fields))


def tiny_model(model_type: str, seed: int = 0, **fields: Any) -> Any:
    """A model of any family of transformers whose every part matters: norms and biases that are not one and zero, and
    embeddings that do not drown what the layers add to them."""
    torch.manual_seed(seed)
    # Eager attention is the definition: transformers 5.17 has Gemma 2 use one by default that forgets the softcap.
    config = tiny_config(model_type, **fields)
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.5 * torch.randn_like(parameter)
    model.get_input_embeddings().weight.data *= 0.2
    return model


def tiny_llama(seed: int = 0, **fields: Any) -> Any:
    return tiny_model("llama", seed, **fields)


def generate(
    scheduler: Scheduler,
    runner: Runner,
    prompts: Sequence[list[int]],
    samplings: Sequence[SamplingParams],
    *,
    is_staggered: bool = False,
    leader_id: int | None = None,
    adapters: Sequence[str | None] = (),
) -> list[list[int]]:
    """The tokens of each prompt, submitted together or one per step, run to their ends.

    With `leader_id` all others follow that one. `adapters` go around. The books are checked at every step. An
    asynchronous runner is a step ahead.
    """
    names = itertools.cycle(adapters or [None])
    requests = [
        GenerationRequest(
            i, tuple(prompt), sampling, 0.0, leader_id=None if i == leader_id else leader_id, adapter=next(names)
        )
        for i, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True))
    ]
    answers: list[list[int]] = [[] for _ in prompts]
    in_flight: list[tuple[SchedulerOutput, LaunchedStep]] = []

    def record(num_ahead: int) -> None:
        while len(in_flight) > num_ahead:
            step, launched = in_flight.pop(0)
            for output in scheduler.update(step, launched.wait()):
                answers[output.request_id] += output.token_ids
            scheduler.check_books()

    while requests or scheduler.has_work or in_flight:
        num_new = 1 if is_staggered else len(requests)
        for request in requests[:num_new]:
            scheduler.add(request)
        del requests[:num_new]
        if scheduler.may_preempt:
            record(0)
        step = scheduler.schedule(0.0)
        if step.rows:
            in_flight.append((step, runner.launch(step)))
            record(int(runner.is_asynchronous))
        else:
            record(0)
    return answers


def greedy(num_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=num_tokens)


def generate_with_hugging_face(model: Any, prompt: list[int], num_tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    tokens = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False, pad_token_id=0
    )
    return tokens[0, len(prompt) :].tolist()  # type: ignore[no-any-return]
