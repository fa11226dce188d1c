"""The breadth path: no row depends on its neighbours, not even through a mixture's experts."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from headrace.kernels import torch_ops
from headrace.kernels.decoder import KVCache, PackedBatch
from headrace.kernels.hf_decoder import HuggingFaceDecoder, WeightsError, _mix_experts
from headrace.kernels.ops import AttentionMetadata
from tiny_models import VOCAB_SIZE, tiny_config, tiny_model

MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 48},
}


def make_decoder(family: str, dtype: torch.dtype = torch.float32, **fields: Any) -> HuggingFaceDecoder:
    model = tiny_model(family, **fields)
    decoder = HuggingFaceDecoder(model.config)
    decoder.load(dict(model.state_dict()), dtype, torch.device("cpu"), torch_ops)
    return decoder


def logits_of(decoder: HuggingFaceDecoder, sequences: list[list[int]], rows: list[int]) -> torch.Tensor:
    """Compute whole sequences side by side, two blocks of 16 tokens for each; logits of these rows of the batch."""
    starts = [0]
    for tokens in sequences:
        starts.append(starts[-1] + len(tokens))
    tables = [[2 * i, 2 * i + 1] for i in range(len(sequences))]
    metadata = AttentionMetadata(starts, [len(tokens) for tokens in sequences], tables)
    cache = KVCache.allocate(decoder.shape, 99, 16, decoder.dtype, torch.device("cpu"))
    positions = [p for tokens in sequences for p in range(len(tokens))]
    batch = PackedBatch(
        token_ids=torch.tensor([token for tokens in sequences for token in tokens]),
        positions=torch.tensor(positions),
        slot_mapping=torch.tensor([32 * i + p for i, tokens in enumerate(sequences) for p in range(len(tokens))]),
        logit_rows=torch.tensor(rows, dtype=torch.int64),
        attention_plan=torch_ops.plan_attention(metadata, 16, torch.device("cpu")),
    )
    return decoder.forward(batch, cache)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["gemma2", *MIXTURES])
def test_what_the_neighbours_are_never_changes_a_bit_of_a_row(family: str, dtype: torch.dtype) -> None:
    decoder = make_decoder(family, dtype, **MIXTURES.get(family, {}))
    own = [(7 * j) % VOCAB_SIZE for j in range(9)]
    results = []
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        others = [torch.randint(0, VOCAB_SIZE, (n,), generator=generator).tolist() for n in (20, 13, 1, 1, 31)]
        results.append(logits_of(decoder, [others[0], own, *others[1:]], list(range(20, 29))))
        assert results[-1].dtype == torch.float32
    for result in results[1:]:
        assert torch.equal(result, results[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_where_neighbours_are_routed_never_changes_a_bit_of_a_row(dtype: torch.dtype) -> None:
    model = tiny_model("mixtral", **MIXTURES["mixtral"]).to(dtype)
    [experts, *_] = [module for module in model.modules() if type(module).__name__.endswith("Experts")]
    hidden = torch.randn(40, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    weights = torch.full((40, 2), 0.5)
    results: list[torch.Tensor] = []
    # The first token has its experts to itself, shares them with one row, or with all.
    for sharer in (slice(0, 0), slice(1, 2), slice(30, 31), slice(1, 40)):
        ids = torch.tensor([[2, 3]] * 40)
        ids[sharer] = ids[0] = torch.tensor([0, 1])
        results.append(_mix_experts(experts, hidden, ids, weights)[0])
    for result in results[1:]:
        assert torch.equal(result, results[0])


@pytest.mark.parametrize("num_tokens", [1, 5, 16, 17, 70])
@pytest.mark.parametrize("family", MIXTURES)
def test_a_mixture_is_the_weighted_sum_of_each_tokens_experts(family: str, num_tokens: int) -> None:
    model = tiny_model(family, **MIXTURES[family])
    [experts, *_] = [module for module in model.modules() if type(module).__name__.endswith("Experts")]
    generator = torch.Generator().manual_seed(num_tokens)
    hidden = torch.randn(num_tokens, 64, generator=generator)
    # Most tokens go to one expert, so that it gets more than a tile, and some get none.
    scores = torch.rand(num_tokens, 6, generator=generator) + torch.tensor([9.0, 0, 0, 0, 0, -9.0])
    weights, ids = scores.topk(3)
    with torch.inference_mode():
        mixed = _mix_experts(experts, hidden, ids, weights)
        for token in range(num_tokens):
            expected = torch.zeros(64)
            for expert, weight in zip(ids[token].tolist(), weights[token], strict=True):
                gate, up = (experts.gate_up_proj[expert] @ hidden[token]).chunk(2)
                expected += weight * (experts.down_proj[expert] @ (F.silu(gate) * up))
            torch.testing.assert_close(mixed[token], expected, rtol=1e-4, atol=1e-4)


def test_only_the_rows_asked_for_pass_the_head_in_the_order_asked() -> None:
    decoder = make_decoder("olmo2")
    tokens = [3, 1, 4, 1, 5, 9, 2, 6]
    whole = logits_of(decoder, [tokens], list(range(8)))
    for rows in ([7, 2], [0], []):
        logits = logits_of(decoder, [tokens], rows)
        assert logits.shape == (len(rows), VOCAB_SIZE)
        torch.testing.assert_close(logits, whole[rows], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "fields", "kv_shape"),
    [
        ("gpt_neox", {}, (4, 16)),
        ("gpt2", {}, (4, 16)),
        ("gemma", {"head_dim": 40, "num_key_value_heads": 1}, (1, 40)),
        ("phi3", {"num_key_value_heads": 2}, (2, 16)),
    ],
)
def test_a_model_tells_what_its_cache_holds_before_it_has_weights(
    family: str, fields: dict[str, Any], kv_shape: tuple[int, int]
) -> None:
    shape = HuggingFaceDecoder(tiny_config(family, num_hidden_layers=3, **fields)).shape
    assert shape.kv_shapes == (kv_shape,) * 3
    assert (shape.vocab_size, shape.max_position) == (VOCAB_SIZE, 256)
    assert shape.kv_bytes_per_token(torch.bfloat16) == 3 * 2 * kv_shape[0] * kv_shape[1] * 2


def test_weights_come_in_the_dtype_asked_for() -> None:
    decoder = make_decoder("stablelm", torch.bfloat16)
    assert {parameter.dtype for parameter in decoder._model.parameters()} == {torch.bfloat16}
    assert decoder.dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "olmo2"])
def test_a_weight_that_is_missing_unknown_or_misshapen_is_named(family: str) -> None:
    model = tiny_model(family)
    for name in ("transformer.h.1.ln_2.bias", "gpt_neox.layers.0.mlp.dense_h_to_4h.weight", "model.norm.weight"):
        if name not in model.state_dict():
            continue
        others = {key: value for key, value in model.state_dict().items() if key != name}
        extra = {"model.layers.0.self_attn.q_proj.scale": torch.ones(3)}
        for weights, culprit in (
            (others, name),
            (model.state_dict() | extra, "q_proj.scale"),
            (others | {name: model.state_dict()[name][:-2].clone()}, name),
        ):
            with pytest.raises(WeightsError, match=culprit):
                HuggingFaceDecoder(model.config).load(dict(weights), torch.float32, torch.device("cpu"), torch_ops)


@pytest.mark.parametrize(
    ("family", "table"),
    [
        ("gpt2", "transformer.h.0.attn.bias"),
        ("gpt2", "transformer.h.0.attn.masked_bias"),
        ("gpt_neox", "gpt_neox.layers.0.attention.bias"),
        ("gpt_neox", "gpt_neox.layers.0.attention.masked_bias"),
        ("gpt_neox", "gpt_neox.layers.0.attention.rotary_emb.inv_freq"),
        ("olmo2", "model.layers.0.self_attn.rotary_emb.inv_freq"),
    ],
)
def test_tables_that_old_checkpoints_carry_are_no_obstacle(family: str, table: str) -> None:
    model = tiny_model(family)
    weights = dict(model.state_dict()) | {table: torch.ones(8)}
    HuggingFaceDecoder(model.config).load(weights, torch.float32, torch.device("cpu"), torch_ops)
