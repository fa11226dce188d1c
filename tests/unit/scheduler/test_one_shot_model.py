"""Models that answer in one pass: equal to transformers' own forward, whoever shares the pass, with pauses in it."""

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
    T5Config,
    T5Model,
)

from headrace.scheduler.config import OneShotConfig, OneShotTask
from headrace.scheduler.errors import ModelSourceError, UnsupportedModelError
from headrace.scheduler.one_shot_model import OneShotModel, load_one_shot_model
from requirements import need, need_packaged_model

TEXTS = [
    "A headrace feeds the mill wheel.",
    "Water!",
    "The wheel turns for as long as water runs in the channel above it, and it never stops for one sack of grain.",
]
SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "initializer_range": 0.3,
}


def no_pause() -> None: ...


def load(path: Path, task: OneShotTask, **fields: Any) -> OneShotModel:
    return load_one_shot_model(OneShotConfig("tiny", path, task, **fields))


def save(model: Any, path: Path) -> Path:
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.5 * torch.randn_like(parameter)
    model.save_pretrained(path)
    return path


def tiny_encoder(path: Path, *modules: str, **pooling: Any) -> Path:
    """A random encoder; with modules as sentence-transformers writes them down."""
    torch.manual_seed(1)
    save(BertModel(BertConfig(**SHAPE)), path)
    if modules:
        names = [f"sentence_transformers.models.{name}" for name in modules]
        listed = [{"idx": i, "name": str(i), "path": f"{i}_M" if i else "", "type": n} for i, n in enumerate(names)]
        (path / "modules.json").write_text(json.dumps(listed))
        (path / "1_M").mkdir()
        (path / "1_M" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32} | pooling))
    return path


def tiny_cross_encoder(path: Path) -> Path:
    torch.manual_seed(2)
    return save(BertForSequenceClassification(BertConfig(**(SHAPE | {"num_labels": 1}))), path)


def tiny_classifier(path: Path, **fields: Any) -> Path:
    torch.manual_seed(3)
    shape: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 2]}
    labels = {i: f"label {i}" for i in range(5)}
    model = ResNetForImageClassification(ResNetConfig(**shape, **({"id2label": labels} | fields)))
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.data += torch.rand_like(buffer)
    return save(model, path)


def token_rows(*lengths: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(1, 96, length) for length in lengths]


def pair_rows(*lengths: int) -> list[np.ndarray]:
    return [np.stack([row, np.arange(len(row)) > len(row) // 2]).astype(np.int64) for row in token_rows(*lengths)]


def images(count: int) -> list[np.ndarray]:
    return list(np.random.default_rng(0).standard_normal((count, 3, 40, 40), np.float32))


MODELS: dict[OneShotTask, tuple[Callable[[Path], Path], list[np.ndarray]]] = {
    OneShotTask.EMBED: (tiny_encoder, token_rows(3, 20, 7, 1)),
    OneShotTask.SCORE: (tiny_cross_encoder, pair_rows(3, 20, 7, 2)),
    OneShotTask.CLASSIFY: (tiny_classifier, images(4)),
}


def test_embeddings_are_those_of_plain_transformers_one_text_at_a_time() -> None:
    path = need_packaged_model("all-minilm-l6-v2")
    model = load(path, OneShotTask.EMBED)
    tokenizer, reference = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path).eval()
    rows = [np.array(tokenizer(text)["input_ids"]) for text in TEXTS]
    answers = model.run(rows, no_pause)
    for row, answer in zip(rows, answers, strict=True):
        with torch.inference_mode():
            mean = reference(torch.from_numpy(row)[None]).last_hidden_state[0].mean(dim=0)
        np.testing.assert_allclose(answer, mean / mean.norm(), atol=1e-4)
    assert [answer.dtype for answer in answers] == [np.float32] * 3
    assert answers[0] @ answers[2] > answers[1] @ answers[2], "what means more alike is nearer"
    assert model.num_bytes == 90_861_056
    assert model.description == "tiny: BertModel to embed, 23 M parameters in float32 on cpu"


POOLINGS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "cls_token": lambda hidden: hidden[0],
    "mean_tokens": lambda hidden: hidden.sum(0) / len(hidden),
    "max_tokens": lambda hidden: torch.stack([column.max() for column in hidden.T]),
    "mean_sqrt_len_tokens": lambda hidden: hidden.sum(0) / len(hidden) ** 0.5,
    "lasttoken": lambda hidden: hidden[-1],
}


@pytest.mark.parametrize("modes", [*([mode] for mode in POOLINGS), ["max_tokens", "mean_tokens"]], ids=" ".join)
@pytest.mark.parametrize("is_normalized", [False, True])
def test_pooling_is_what_the_directory_says(tmp_path: Path, modes: list[str], is_normalized: bool) -> None:
    names = ["Transformer", "Pooling", *(["Normalize"] if is_normalized else [])]
    switches = {f"pooling_mode_{mode}": mode in modes for mode in POOLINGS}
    path = tiny_encoder(tmp_path / "model", *names, **switches)
    reference = AutoModel.from_pretrained(path).eval()
    rows = token_rows(9, 2, 5)
    for row, answer in zip(rows, load(path, OneShotTask.EMBED).run(rows, no_pause), strict=True):
        with torch.inference_mode():
            hidden = reference(torch.from_numpy(row)[None]).last_hidden_state[0]
        expected = torch.cat([POOLINGS[mode](hidden) for mode in modes])
        np.testing.assert_allclose(answer, expected / (expected.norm() if is_normalized else 1), atol=1e-5)


def test_without_modules_it_is_the_normalised_mean(tmp_path: Path) -> None:
    plain, listed = tiny_encoder(tmp_path / "plain"), tmp_path / "listed"
    tiny_encoder(listed, "Transformer", "Pooling", "Normalize", pooling_mode_mean_tokens=True)
    rows = token_rows(9, 2)
    answers = [load(path, OneShotTask.EMBED).run(rows, no_pause) for path in (plain, listed)]
    np.testing.assert_array_equal(answers[0], answers[1])


def test_scores_are_transformers_own_logits(tmp_path: Path) -> None:
    path = tiny_cross_encoder(tmp_path)
    reference = BertForSequenceClassification.from_pretrained(path).eval()
    rows = pair_rows(8, 30, 3)
    for row, answer in zip(rows, load(path, OneShotTask.SCORE).run(rows, no_pause), strict=True):
        ids, types = torch.from_numpy(row)[:, None]
        with torch.inference_mode():
            [expected] = reference(ids, token_type_ids=types).logits
        np.testing.assert_allclose(answer, expected, atol=1e-5)


def test_probabilities_are_transformers_own_though_batch_norms_are_folded(tmp_path: Path) -> None:
    path = tiny_classifier(tmp_path)
    reference = ResNetForImageClassification.from_pretrained(path).eval()
    pixels = images(3)
    with torch.inference_mode():
        expected = reference(torch.from_numpy(np.stack(pixels))).logits.softmax(-1)
    np.testing.assert_allclose(load(path, OneShotTask.CLASSIFY).run(pixels, no_pause), expected, atol=1e-5)


def test_the_converted_resnet_knows_what_is_on_photographs() -> None:
    path = need_packaged_model("resnet-50")
    package = find_spec("skimage")
    need(package is not None, "scikit-image")
    assert package is not None
    assert package.origin is not None
    folder = Path(package.origin).parent / "data"
    model = load(path, OneShotTask.CLASSIFY)
    processor = AutoImageProcessor.from_pretrained(path, backend="pil")
    photographs = [Image.open(folder / f"{name}.png").convert("RGB") for name in ("chelsea", "coffee", "camera")]
    answers = model.run([processor(photograph)["pixel_values"][0] for photograph in photographs], no_pause)
    labels = json.loads((path / "config.json").read_text())["id2label"]
    assert [labels[str(answer.argmax())] for answer in answers] == ["Egyptian cat", "espresso", "tripod"]
    assert all(answer.max() > 0.6 for answer in answers)
    np.testing.assert_allclose([answer.sum() for answer in answers], 1, atol=1e-5)


@pytest.mark.parametrize("task", MODELS)
def test_neighbours_do_not_change_a_row(tmp_path: Path, task: OneShotTask) -> None:
    make, rows = MODELS[task]
    model = load(make(tmp_path), task)
    together = model.run(rows, no_pause)
    for row, answer in zip(rows, together, strict=True):
        np.testing.assert_allclose(model.run([row], no_pause)[0], answer, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "task", "least"),
    [("all-minilm-l6-v2", OneShotTask.EMBED, 36), ("resnet-50", OneShotTask.CLASSIFY, 54)],
)
def test_a_pass_pauses_between_its_layers(name: str, task: OneShotTask, least: int) -> None:
    model = load(need_packaged_model(name), task)
    row = np.arange(5) if task is OneShotTask.EMBED else np.zeros((3, 224, 224), np.float32)
    pauses: list[None] = []
    model.run([row], lambda: pauses.append(None))
    assert least <= len(pauses) <= 100


def test_a_deep_model_does_not_pause_at_every_layer(tmp_path: Path) -> None:
    path = save(BertModel(BertConfig(**(SHAPE | {"num_hidden_layers": 40}))), tmp_path)
    pauses: list[None] = []
    load(path, OneShotTask.EMBED).run(token_rows(4), lambda: pauses.append(None))
    assert 50 <= len(pauses) <= 100


@pytest.mark.parametrize("task", MODELS)
def test_what_a_pause_raises_comes_out_and_the_model_stays_usable(tmp_path: Path, task: OneShotTask) -> None:
    make, rows = MODELS[task]
    model = load(make(tmp_path), task)
    before = model.run(rows, no_pause)
    num_pauses = 0

    def cancel() -> None:
        nonlocal num_pauses
        num_pauses += 1
        if num_pauses == 3:
            raise KeyboardInterrupt("enough")

    with pytest.raises(KeyboardInterrupt, match="enough"):
        model.run(rows, cancel)
    assert num_pauses == 3
    np.testing.assert_array_equal(model.run(rows, no_pause), before)


def test_a_pause_is_no_part_of_the_pass(tmp_path: Path) -> None:
    model = load(tiny_encoder(tmp_path), OneShotTask.EMBED)
    are_plain: set[bool] = set()
    model.run(token_rows(4), lambda: are_plain.add(not torch.zeros(1).is_inference()))
    assert are_plain == {True}


def test_bfloat16_answers_in_float32(tmp_path: Path) -> None:
    rows = token_rows(4, 9)
    path = tiny_encoder(tmp_path)
    exact, model = load(path, OneShotTask.EMBED), load(path, OneShotTask.EMBED, dtype="bfloat16")
    answers = model.run(rows, no_pause)
    assert answers[0].dtype == np.float32
    np.testing.assert_allclose(answers, exact.run(rows, no_pause), atol=0.05)
    assert 2 * model.num_bytes == pytest.approx(exact.num_bytes, rel=0.2)


def causal_lm(path: Path) -> Path:
    shape = {key: value for key, value in SHAPE.items() if key != "initializer_range"}
    return save(LlamaForCausalLM(LlamaConfig(**shape)), path)


def encoder_with_dense(path: Path) -> Path:
    return tiny_encoder(path, "Transformer", "Pooling", "Dense", pooling_mode_mean_tokens=True)


def encoder_with_weighted_mean(path: Path) -> Path:
    return tiny_encoder(path, "Transformer", "Pooling", pooling_mode_weightedmean_tokens=True)


def t5(path: Path) -> Path:
    return save(T5Model(T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)), path)


def unlabelled(path: Path) -> Path:
    tiny_classifier(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if k not in ("id2label", "label2id")})
    )
    return path


def bare_resnet(path: Path) -> Path:
    return save(ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2])), path)


@pytest.mark.parametrize(
    ("make", "task", "message"),
    [
        (causal_lm, OneShotTask.EMBED, r"tiny cannot embed: it is LlamaForCausalLM, no encoder"),
        (t5, OneShotTask.EMBED, r"T5Model, an encoder with a decoder"),
        (tiny_cross_encoder, OneShotTask.EMBED, r"BertForSequenceClassification, no encoder"),
        (tiny_encoder, OneShotTask.SCORE, r"cannot score: it is BertModel, not .*\*ForSequenceClassification"),
        (tiny_classifier, OneShotTask.SCORE, r"ResNetForImageClassification"),
        (bare_resnet, OneShotTask.CLASSIFY, r"cannot classify: it is ResNetModel"),
        (unlabelled, OneShotTask.CLASSIFY, r"without labels"),
        (encoder_with_dense, OneShotTask.EMBED, r"Transformer, Pooling, Dense"),
        (encoder_with_weighted_mean, OneShotTask.EMBED, r"pooling by weightedmean_tokens"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_is_no_model_for_the_task_is_refused(
    tmp_path: Path, make: Callable[[Path], Path], task: OneShotTask, message: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        load(make(tmp_path / "model"), task)


def test_an_encoder_saved_with_its_language_head_is_taken(tmp_path: Path) -> None:
    path = save(BertForMaskedLM(BertConfig(**SHAPE)), tmp_path)  # which has no pooler, and a head that is not used
    [answer] = load(path, OneShotTask.EMBED).run(token_rows(5), no_pause)
    assert answer.shape == (32,)


def cut_weights(path: Path) -> None:
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def pickled_weights(path: Path) -> None:
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()


def lacking_a_weight(path: Path) -> None:
    weights = load_file(path / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def other_shapes(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))


def own_code(path: Path) -> None:
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Model"}}
    (path / "config.json").write_text(json.dumps(config))
    (path / "own.py").write_text("raise SystemExit('was run')")


def modules_of_another_kind(path: Path) -> None:
    (path / "modules.json").write_text('{"a": 1}')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_weights, "cannot be loaded"),
        (pickled_weights, "cannot be loaded"),
        (lacking_a_weight, r"lacks the weight encoder\.layer\.1\.output\.dense\.weight"),
        (other_shapes, r"has shape .* the config says"),
        (own_code, "config cannot be read"),
        (modules_of_another_kind, "no list of modules"),
        (shutil.rmtree, "config cannot be read"),
    ],
)
def test_a_directory_that_cannot_be_read_is_refused(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    path = tiny_encoder(tmp_path / "model")
    damage(path)
    with pytest.raises(ModelSourceError, match=message):
        load(path, OneShotTask.EMBED)
