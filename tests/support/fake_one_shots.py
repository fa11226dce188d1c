"""Fake models that answer in one pass, and directories with what is read for them: no torch, no weights.

Words are tokens. Answers are fixed functions of the input alone, so that neighbours would show.
"""

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from headrace.scheduler.config import OneShotTask
from headrace.server.one_shot_models import OneShotSource
from headrace.server.settings import OneShotModelSettings

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
WORDS = [
    *SPECIAL,
    "example",
    "river",
    "wheel",
    "mill",
    "water",
    "stone",
    "turns",
    "the",
    "a",
    "over",
    "poison",
    "nothing",
]
CLS, SEP = WORDS.index("[CLS]"), WORDS.index("[SEP]")
POISON, NOTHING = WORDS.index("poison"), WORDS.index("nothing")
MAX_TOKENS = 48
NUM_DIMENSIONS = 8
LABELS = ["red", "green", "blue"]
SIDE = 8


def write_text_model(path: Path, **options: Any) -> Path:
    """A directory with a tokenizer of words, special tokens as BERT's, and a config. Returns it."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)],
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), SPECIAL, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=backend, **names, **options).save_pretrained(path)
    config = {"model_type": "bert", "vocab_size": len(WORDS), "max_position_embeddings": MAX_TOKENS}
    (path / "config.json").write_text(json.dumps(config))
    return path


def write_image_model(path: Path) -> Path:
    """A directory with an image processor, and labels. Returns it."""
    path.mkdir(parents=True, exist_ok=True)
    processor = {
        "image_processor_type": "ConvNextImageProcessor",
        "size": {"shortest_edge": SIDE},
        "crop_pct": 1.0,
        "do_normalize": False,
    }
    (path / "preprocessor_config.json").write_text(json.dumps(processor))
    labels = {str(i): label for i, label in enumerate(LABELS)}
    (path / "config.json").write_text(json.dumps({"model_type": "resnet", "id2label": labels}))
    return path


def token_ids(text: str) -> list[int]:
    """What the tokenizer makes of known words."""
    return [CLS, *map(WORDS.index, text.split()), SEP]


def fake_vector(ids: Sequence[int]) -> np.ndarray:
    """The fake encoder's answer, of length 1."""
    vector = np.random.default_rng(list(ids)).standard_normal(NUM_DIMENSIONS).astype(np.float32)
    return vector / np.float32(np.linalg.norm(vector))


def fake_logit(row: np.ndarray) -> np.ndarray:
    """The fake cross-encoder's: how many words of the first text are in the second."""
    ids, types = row
    common = set(ids[types == 0].tolist()) & set(ids[types == 1].tolist()) - {SEP}
    return np.array([2.0 * len(common) - 1], np.float32)


def fake_probabilities(pixels: np.ndarray) -> np.ndarray:
    """The fake classifier's: how bright each colour is."""
    brightness = [np.exp(4 * channel.mean()) for channel in pixels]
    return np.array([each / sum(brightness) for each in brightness], np.float32)


_ANSWERS: dict[OneShotTask, Callable[[np.ndarray], np.ndarray]] = {
    OneShotTask.EMBED: lambda row: fake_vector(row.tolist()),
    OneShotTask.SCORE: fake_logit,
    OneShotTask.CLASSIFY: fake_probabilities,
}


class FakeOneShotModel:
    """Answers by its task; `batches` are those it began.

    Inside `held()` a batch goes on pausing between its layers, but does not end. With POISON in an input its batch
    raises, and with NOTHING that input's answer is no number; `fail_next` makes a batch raise whatever it holds.
    """

    num_bytes = 1000

    def __init__(self, task: OneShotTask) -> None:
        self.description = f"fake model to {task}"
        self.batches: list[list[np.ndarray]] = []
        self.num_abandoned = 0
        self.fail_next = False
        self._answer = _ANSWERS[task]
        self._is_held = False
        self._changed = threading.Condition()

    def run(self, inputs: Sequence[np.ndarray], pause: Callable[[], None]) -> list[np.ndarray]:
        self.batches.append(list(inputs))
        try:
            pause()
            with self._changed:
                is_held = self._is_held
            while is_held:
                pause()
                with self._changed:
                    self._changed.wait_for(lambda: not self._is_held, timeout=0.001)  # a layer
                    is_held = self._is_held
        except BaseException:
            self.num_abandoned += 1
            raise
        if self.fail_next or any(POISON in row for row in inputs if row.dtype == np.int64):
            self.fail_next = False
            raise RuntimeError("the fake one-shot model fails as told")
        return [self._answer_one(row) for row in inputs]

    @property
    def sizes(self) -> list[int]:
        return [len(batch) for batch in self.batches]

    def _answer_one(self, row: np.ndarray) -> np.ndarray:
        answer = self._answer(row)
        return np.full_like(answer, np.nan) if row.dtype == np.int64 and NOTHING in row else answer

    @contextmanager
    def held(self) -> Iterator[None]:
        with self._changed:
            self._is_held = True
        try:
            yield
        finally:
            with self._changed:
                self._is_held = False
                self._changed.notify_all()


class FakeOneShot:
    """A model, where what is read for it lies, and its settings: what an App is told of it."""

    def __init__(self, name: str, task: OneShotTask, path: Path, **settings: Any) -> None:
        self.source = OneShotSource(name, path, OneShotModelSettings(model=str(path), task=task, **settings))
        self.model = FakeOneShotModel(task)
