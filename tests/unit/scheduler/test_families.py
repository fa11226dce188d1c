"""Every family served continues prompts as Hugging Face's `generate()` does: alone, in company, in chunks, preempted.

The weights are tiny and random, in float32; sliding windows are shorter than the prompts. `make test` runs each family
in the hardest way, `make test-all` in all ways.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from headrace.kernels.hf_decoder import FAMILIES
from headrace.scheduler.block_pool import BlockPool
from headrace.scheduler.config import EngineConfig
from headrace.scheduler.messages import LoadSnapshot
from headrace.scheduler.model_loader import load_engine
from headrace.scheduler.model_plan import COMPACT_FAMILIES
from headrace.scheduler.model_runner import ModelRunner
from headrace.scheduler.scheduler import Scheduler
from requirements import long
from tiny_models import VOCAB_SIZE, generate, generate_with_hugging_face, greedy, tiny_model

NUM_TOKENS, BLOCK_SIZE = 10, 4
PROMPTS = [[(11 * i + j * j) % VOCAB_SIZE for j in range(length)] for i, length in enumerate((5, 40, 1, 17))]
SLIDING, FULL = "sliding_attention", "full_attention"
MIXTURE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}

COMPACT: dict[str, list[dict[str, Any]]] = {
    "llama": [{}, {"attention_bias": True, "mlp_bias": True, "head_dim": 24}],
    "mistral": [{"sliding_window": None, "head_dim": 32}, {"sliding_window": 6, "tie_word_embeddings": True}],
    "qwen2": [
        {},
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "tie_word_embeddings": True},
    ],
    "qwen3": [
        {"head_dim": 32},
        {
            "head_dim": 8,
            "use_sliding_window": True,
            "sliding_window": 7,
            "layer_types": [SLIDING, FULL],
            "attention_bias": True,
        },
    ],
}
BREADTH: dict[str, list[dict[str, Any]]] = {
    "cohere2": [{"sliding_window": 5, "layer_types": [SLIDING, FULL], "logit_scale": 0.5}],
    "gemma": [{"head_dim": 32, "tie_word_embeddings": True}],
    "gemma2": [
        {
            "head_dim": 32,
            "sliding_window": 5,
            "layer_types": [SLIDING, FULL],
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 20.0,
            "query_pre_attn_scalar": 7,
            "tie_word_embeddings": True,
        }
    ],
    "gemma3_text": [
        {
            "head_dim": 32,
            "sliding_window": 6,
            "layer_types": [SLIDING, FULL],
            "query_pre_attn_scalar": 11,
            "rope_parameters": {
                FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                SLIDING: {"rope_type": "default", "rope_theta": 1e4},
            },
            "tie_word_embeddings": True,
        }
    ],
    "gpt2": [{}, {"scale_attn_by_inverse_layer_idx": True, "tie_word_embeddings": True}],
    "gpt_neox": [{}, {"use_parallel_residual": False}],
    "granite": [
        {
            "attention_multiplier": 0.4,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.7,
            "logits_scaling": 2.0,
            "attention_bias": True,
        }
    ],
    "ministral": [{"sliding_window": 6, "layer_types": [SLIDING, FULL], "head_dim": 24}],
    "mixtral": [MIXTURE, MIXTURE | {"sliding_window": 6}],
    "olmo2": [{}],
    "olmo3": [{"sliding_window": 5, "layer_types": [SLIDING, FULL]}],
    "phi": [{"qk_layernorm": True}],
    "phi3": [{}, {"sliding_window": 6}],
    "qwen2_moe": [
        MIXTURE | {"shared_expert_intermediate_size": 32},
        MIXTURE
        | {
            "shared_expert_intermediate_size": 32,
            "use_sliding_window": True,
            "sliding_window": 6,
            "layer_types": [SLIDING, FULL],
        },
    ],
    "qwen3_moe": [
        MIXTURE | {"head_dim": 32, "mlp_only_layers": [0]},
        MIXTURE | {"head_dim": 16, "use_sliding_window": True, "sliding_window": 7},
    ],
    "smollm3": [
        {"no_rope_layers": [1, 0]},
        {"use_sliding_window": True, "sliding_window": 5, "layer_types": [SLIDING, FULL]},
    ],
    "stablelm": [{"use_qkv_bias": True}, {"qk_layernorm": True, "use_parallel_residual": True}],
    "starcoder2": [{"sliding_window": 6}],
}
VARIANTS = [
    pytest.param(family, fields, id=f"{family}-{i}")
    for family, variants in (COMPACT | BREADTH).items()
    for i, fields in enumerate(variants)
]
# Ways to run: settings of the scheduler, and whether the prompts come one per step.
HARDEST: dict[str, Any] = {"max_num_batched_tokens": 7, "max_num_seqs": 4, "num_blocks": 14, "is_staggered": True}
WAYS: dict[str, dict[str, Any]] = {
    "alone": {"max_num_seqs": 1},
    "staggered": {"is_staggered": True},
    "budget 1": {"max_num_batched_tokens": 1, "max_num_seqs": 1},
    "budget 3": {"max_num_batched_tokens": 3, "max_num_seqs": 3},
    "budget 7": {"max_num_batched_tokens": 7},
    "preempted": {"num_blocks": 14},
    "again": {"num_rounds": 2},
}


@dataclass(frozen=True, slots=True)
class Family:
    runner: ModelRunner
    expected: list[list[int]]


@pytest.fixture(scope="module")
def make_family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, dict[str, Any]], Family]:
    made: dict[str, Family] = {}

    def make(family: str, fields: dict[str, Any]) -> Family:
        key = f"{family} {fields}"
        if key not in made:
            folder = tmp_path_factory.mktemp(family)
            model = tiny_model(family, **fields)
            model.save_pretrained(folder)
            made[key] = Family(
                load(folder), [generate_with_hugging_face(model, prompt, NUM_TOKENS) for prompt in PROMPTS]
            )
        return made[key]

    return make


def load(folder: Path) -> ModelRunner:
    config = EngineConfig(
        folder,
        device="cuda" if torch.cuda.is_available() else "cpu",
        dtype="float32",
        block_size=BLOCK_SIZE,
        kv_cache_bytes=1 << 20,
        max_num_seqs=4,
        max_num_batched_tokens=64,
    )
    return load_engine(config)[1]


def run(
    runner: ModelRunner,
    *,
    max_num_batched_tokens: int = 64,
    max_num_seqs: int = 4,
    num_blocks: int = 40,
    is_staggered: bool = False,
    num_rounds: int = 1,
) -> tuple[list[list[int]], LoadSnapshot]:
    scheduler = Scheduler(
        BlockPool(num_blocks),
        block_size=BLOCK_SIZE,
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_seqs=max_num_seqs,
    )
    for _ in range(100):
        scheduler._lengths.observe(1)  # so that more are admitted than will find blocks
    for _ in range(num_rounds):
        answers = generate(scheduler, runner, PROMPTS, [greedy(NUM_TOKENS)] * len(PROMPTS), is_staggered=is_staggered)
    return answers, scheduler.load()


def test_every_family_that_is_admitted_is_compared() -> None:
    assert set(BREADTH) == FAMILIES
    assert set(COMPACT) == COMPACT_FAMILIES


@pytest.mark.parametrize(("family", "fields"), VARIANTS)
def test_staggered_in_chunks_and_preempted_it_continues_as_generate_does(
    make_family: Callable[[str, dict[str, Any]], Family], family: str, fields: dict[str, Any]
) -> None:
    made = make_family(family, fields)
    assert len({tuple(answer) for answer in made.expected}) == len(PROMPTS)
    answers, load = run(made.runner, **HARDEST)
    assert answers == made.expected
    assert load.num_preemptions > 0


@long
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("family", "fields"), VARIANTS)
def test_in_any_other_way_it_continues_as_generate_does(
    make_family: Callable[[str, dict[str, Any]], Family], family: str, fields: dict[str, Any], way: str
) -> None:
    made = make_family(family, fields)
    answers, load = run(made.runner, **WAYS[way])
    assert answers == made.expected
    assert (load.num_preemptions > 0) == (way == "preempted")
    assert load.num_prefix_hits >= (2 if way == "again" else 0)
