"""The packed decoder computes Hugging Face's logits, however packed, and each row's from its own sequence alone."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from headrace.kernels import reference, torch_ops
from headrace.kernels.decoder import Decoder, DecoderConfig, KVCache, PackedBatch
from headrace.kernels.ops import AttentionMetadata, LayerCache, Ops

VOCAB = 80
MAX_POSITION = 96
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 1e4},
    "linear": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
        "rope_theta": 1e4,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4},
}


def make_model(**fields: Any) -> Any:
    torch.manual_seed(11)
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "max_position_embeddings": MAX_POSITION,
        "tie_word_embeddings": False,
        "initializer_range": 0.2,
    }
    return LlamaForCausalLM(LlamaConfig(**(shape | fields))).eval()


def make_decoder(model: Any, ops: Ops, dtype: torch.dtype = torch.float32) -> Decoder:
    config, rotary = model.config, model.model.rotary_emb
    weights = {name: weight.to(dtype) for name, weight in model.state_dict().items()}
    if config.tie_word_embeddings:
        del weights["lm_head.weight"]
    decoder_config = DecoderConfig(
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        windows=(None,) * config.num_hidden_layers,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        rms_norm_eps=config.rms_norm_eps,
        max_position=config.max_position_embeddings,
        inv_freq=rotary.inv_freq,
        rope_scale=rotary.attention_scaling,
    )
    return Decoder(decoder_config, weights, ops)


class Packed:
    """Sequences of given lengths in scattered blocks, computed in steps of any mixture of chunks."""

    def __init__(self, decoder: Decoder, ops: Ops, sequences: list[list[int]], block_size: int = 4) -> None:
        self.decoder, self.ops, self.sequences, self.block_size = decoder, ops, sequences, block_size
        num_blocks = sum(math.ceil(len(tokens) / block_size) for tokens in sequences)
        free = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(2)).tolist()
        self.tables = [[free.pop() for _ in range(math.ceil(len(tokens) / block_size))] for tokens in sequences]
        self.cache = KVCache.allocate(decoder.shape, num_blocks, block_size, decoder.dtype, torch.device("cpu"))
        self.num_computed = [0] * len(sequences)

    def step(self, num_tokens: dict[int, int]) -> dict[int, torch.Tensor]:
        """Compute the next `num_tokens[i]` tokens of sequence i; the logits of every one of them."""
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        starts = [0]
        for i, count in num_tokens.items():
            span = range(self.num_computed[i], self.num_computed[i] + count)
            token_ids += [self.sequences[i][p] for p in span]
            positions += span
            slots += [self.tables[i][p // self.block_size] * self.block_size + p % self.block_size for p in span]
            starts.append(len(token_ids))
            self.num_computed[i] += count
        metadata = AttentionMetadata(
            starts, [self.num_computed[i] for i in num_tokens], [self.tables[i] for i in num_tokens]
        )
        batch = PackedBatch(
            token_ids=torch.tensor(token_ids),
            positions=torch.tensor(positions),
            slot_mapping=torch.tensor(slots),
            logit_rows=torch.arange(len(token_ids)),
            attention_plan=self.ops.plan_attention(metadata, self.block_size, torch.device("cpu")),
        )
        logits = self.decoder.forward(batch, self.cache)
        return {i: logits[starts[k] : starts[k + 1]] for k, i in enumerate(num_tokens)}


def random_sequences(lengths: list[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def hugging_face_logits(model: Any, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("rope", "fields", "ops"),
    [
        *(pytest.param(rope, {}, torch_ops, id=rope) for rope in ROPES),
        pytest.param("default", {"tie_word_embeddings": True}, torch_ops, id="tied"),
        pytest.param("default", {"head_dim": 16}, torch_ops, id="wide heads"),
        pytest.param("default", {"num_key_value_heads": 1}, torch_ops, id="one key/value head"),
        pytest.param("default", {}, reference, id="reference"),
    ],
)
def test_logits_are_hugging_faces(rope: str, fields: dict[str, Any], ops: Ops) -> None:
    model = make_model(rope_parameters=ROPES[rope], **fields)
    sequences = random_sequences([1, 7, 70])
    packed = Packed(make_decoder(model, ops), ops, sequences)
    # One sequence decodes beside a whole prompt and a chunk of another, then all go on.
    packed.step({1: 6})
    packed.step({1: 1, 0: 1, 2: 33})
    logits = packed.step({2: 37})
    expected = hugging_face_logits(model, sequences[2])[33:]
    torch.testing.assert_close(logits[2], expected, rtol=1e-4, atol=1e-4)
    assert logits[2].dtype == torch.float32


MODEL = make_model()
DECODER = make_decoder(MODEL, torch_ops)
SEQUENCES = random_sequences([1, 4, 9, 16, 31])
EXPECTED = [hugging_face_logits(MODEL, tokens) for tokens in SEQUENCES]


@settings(max_examples=20, derandomize=True, deadline=None)
@given(block_size=st.integers(1, 9), data=st.data())
def test_any_split_into_steps_and_chunks_gives_the_same_logits(block_size: int, data: st.DataObject) -> None:
    packed = Packed(DECODER, torch_ops, SEQUENCES, block_size)
    while left := [i for i, tokens in enumerate(SEQUENCES) if packed.num_computed[i] < len(tokens)]:
        rows = data.draw(st.lists(st.sampled_from(left), min_size=1, unique=True))
        # Half of the chunks reach to the end, so that a run takes few steps.
        lengths = {i: len(SEQUENCES[i]) - packed.num_computed[i] for i in rows}
        counts = {i: data.draw(st.integers(1, n) | st.just(n)) for i, n in lengths.items()}
        for i, logits in packed.step(counts).items():
            end = packed.num_computed[i]
            torch.testing.assert_close(logits, EXPECTED[i][end - len(logits) : end], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_the_neighbours_are_never_changes_a_bit_of_a_row(dtype: torch.dtype) -> None:
    decoder = make_decoder(MODEL, torch_ops, dtype)
    results = []
    for seed in (1, 2):
        others = random_sequences([20, 13, 13, 9], seed)
        packed = Packed(decoder, torch_ops, [SEQUENCES[4], *others])
        packed.step({1: 12, 0: 17, 2: 12, 3: 12})
        results.append([packed.step({2: 1, 3: 1, 0: 1, 1: 1})[0], packed.step({0: 13, 4: 9, 1: 7})[0]])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)
        assert first.dtype == torch.float32, "whatever the weights are"


def test_only_the_rows_asked_for_pass_the_head_in_the_order_asked() -> None:
    packed = Packed(DECODER, torch_ops, SEQUENCES[2:3])
    whole = packed.step({0: 9})[0]
    for rows in ([8, 2], [0], []):
        batch = PackedBatch(
            token_ids=torch.tensor(SEQUENCES[2]),
            positions=torch.arange(9),
            slot_mapping=torch.tensor([packed.tables[0][p // 4] * 4 + p % 4 for p in range(9)]),
            logit_rows=torch.tensor(rows, dtype=torch.int64),
            attention_plan=torch_ops.plan_attention(
                AttentionMetadata([0, 9], [9], packed.tables), 4, torch.device("cpu")
            ),
        )
        logits = DECODER.forward(batch, packed.cache)
        assert logits.shape == (len(rows), VOCAB)
        torch.testing.assert_close(logits, whole[rows], rtol=1e-5, atol=1e-5)


def test_weights_are_let_go_once_laid_out() -> None:
    weights = dict(MODEL.state_dict())
    Decoder(DECODER._config, weights, torch_ops)
    assert [name for name in weights if ".layers." in name] == []


def test_a_tokens_keys_and_values_weigh_what_the_config_says() -> None:
    # 2 layers, keys and values, 3 heads of 8.
    assert DECODER.shape.kv_bytes_per_token(torch.float32) == 2 * 2 * 3 * 8 * 4
    assert DECODER.shape.kv_bytes_per_token(torch.bfloat16) == 2 * 2 * 3 * 8 * 2


def test_clearing_zeroes_the_blocks_named_in_every_layer_and_no_other() -> None:
    cache = KVCache([LayerCache(torch.ones(5, 2, 3, 8), torch.ones(5, 2, 3, 8)) for _ in range(2)])
    cache.clear(torch.tensor([3, 0]))
    cache.clear(torch.empty(0, dtype=torch.int64))
    for tensor in (tensor for layer in cache.layers for tensor in layer[:2]):
        assert [bool(block.any()) for block in tensor] == [False, True, True, False, True]
