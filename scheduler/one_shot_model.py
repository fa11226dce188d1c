"""Models that answer in one pass: sentence encoders, cross-encoders and image classifiers, as transformers runs them.

Loaded and run on the engine thread, beside the generating model: between its layers a pass calls `pause`, where a step
of that model can be run. Pooling is what the directory says in the files of sentence-transformers. It does not know
texts, images or requests; tokenizing and preprocessing are the server's.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
)
from transformers.utils import logging as transformers_logging

from headrace.scheduler.config import OneShotConfig, OneShotTask
from headrace.scheduler.errors import ModelSourceError, UnsupportedModelError

# A pause costs a call into Python; deeper models pause at every second layer, third, and so on.
_MOST_PAUSES = 100

# What a CPU computes in one pass: more at once is no faster there, and streams wait for each layer.
_CPU_IMAGES, _CPU_TOKENS = 2, 256

_CLASSES: dict[OneShotTask, Any] = {
    OneShotTask.EMBED: AutoModel,
    OneShotTask.SCORE: AutoModelForSequenceClassification,
    OneShotTask.CLASSIFY: AutoModelForImageClassification,
}
_ENDINGS = {OneShotTask.SCORE: "ForSequenceClassification", OneShotTask.CLASSIFY: "ForImageClassification"}

# Hidden states [B, L, D] and mask [B, L, 1], float32, to [B, D]. Every row has a token, and padding is at its end.
_Pooling = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _mean(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (hidden * mask).sum(1) / mask.sum(1)


def _mean_sqrt_len(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (hidden * mask).sum(1) / mask.sum(1).sqrt()


def _max(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return hidden.masked_fill(mask == 0, float("-inf")).amax(1)


def _first(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return hidden[:, 0]


def _last(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1).long().flatten() - 1]


# In the order in which sentence-transformers puts several behind one another.
_POOLINGS: dict[str, _Pooling] = {
    "cls_token": _first,
    "max_tokens": _max,
    "mean_tokens": _mean,
    "mean_sqrt_len_tokens": _mean_sqrt_len,
    "lasttoken": _last,
}


class OneShotModel:
    """A model and its task. `num_bytes` is what its weights take, `description` a line for the operator."""

    def __init__(
        self, config: OneShotConfig, model: Any, poolings: Sequence[_Pooling] = (), *, is_normalized: bool = False
    ) -> None:
        self.name = config.name
        self.task = config.task
        self._model = model
        self._poolings = poolings
        self._is_normalized = is_normalized
        self._pad_token_id: int = getattr(model.config, "pad_token_id", None) or 0
        self._has_token_types = getattr(model.config, "type_vocab_size", 0) > 1
        parameters = list(model.parameters())
        self.num_bytes = sum(tensor.nbytes for tensor in [*parameters, *model.buffers()])
        self.description = (
            f"{config.name}: {type(model).__name__} to {config.task}, "
            f"{sum(parameter.numel() for parameter in parameters) / 1e6:.0f} M parameters in {config.dtype} on "
            f"{model.device}"
        )
        self._pause: Callable[[], None] | None = None
        self._most_at_once = float("inf")
        if self._model.device.type == "cpu":
            self._most_at_once = _CPU_IMAGES if config.task is OneShotTask.CLASSIFY else _CPU_TOKENS
        # Where a model's time goes.
        layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.modules.conv._ConvNd)]
        for layer in layers[:: -(-len(layers) // _MOST_PAUSES) or 1]:
            layer.register_forward_pre_hook(self._between_layers)

    @torch.inference_mode()
    def run(self, inputs: Sequence[np.ndarray], pause: Callable[[], None]) -> list[np.ndarray]:
        """Answer each input; on a CPU in several passes, none of whose layers takes long. What `pause` raises ends the
        pass and comes out.

        EMBED: int64 token ids [L], with special tokens, to a vector [D]. SCORE: int64 token ids and token type ids
        [2, L] to logits [C]. CLASSIFY: float32 pixels [3, H, W], of one size, to probabilities [C]. All answers are
        float32.
        """
        answer = {
            OneShotTask.EMBED: self._embed,
            OneShotTask.SCORE: self._score,
            OneShotTask.CLASSIFY: self._classify,
        }[self.task]
        self._pause = pause
        try:
            answers = [answer(part) for part in self._passes(inputs)]
        finally:
            self._pause = None
        return list(torch.cat(answers).cpu().numpy())

    def _passes(self, inputs: Sequence[np.ndarray]) -> Iterator[Sequence[np.ndarray]]:
        """The inputs in parts, of which each is computed in one pass."""
        begin, longest = 0, 0
        for end, row in enumerate(inputs):
            longest = max(longest, 1 if self.task is OneShotTask.CLASSIFY else row.shape[-1])
            if end > begin and longest * (end + 1 - begin) > self._most_at_once:
                yield inputs[begin:end]
                begin, longest = end, 1 if self.task is OneShotTask.CLASSIFY else row.shape[-1]
        yield inputs[begin:]

    def _embed(self, inputs: Sequence[np.ndarray]) -> torch.Tensor:
        token_ids, mask = self._pad(inputs)
        hidden = self._model(input_ids=token_ids, attention_mask=mask).last_hidden_state.float()
        weights = mask[:, :, None].float()
        pooled = torch.cat([pooling(hidden, weights) for pooling in self._poolings], dim=1)
        return F.normalize(pooled, dim=1) if self._is_normalized else pooled

    def _score(self, inputs: Sequence[np.ndarray]) -> torch.Tensor:
        token_ids, mask = self._pad([token_ids for token_ids, _ in inputs])
        types: dict[str, torch.Tensor] = {}
        if self._has_token_types:
            types["token_type_ids"], _ = self._pad([type_ids for _, type_ids in inputs], pad_id=0)
        return self._model(input_ids=token_ids, attention_mask=mask, **types).logits.float()  # type: ignore[no-any-return]

    def _classify(self, inputs: Sequence[np.ndarray]) -> torch.Tensor:
        pixels = torch.from_numpy(np.stack(inputs)).to(self._model.device, self._model.dtype)
        return self._model(pixel_values=pixels).logits.float().softmax(dim=-1)  # type: ignore[no-any-return]

    def _pad(self, rows: Sequence[np.ndarray], pad_id: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows [B, L], filled up to the longest, and which of it is theirs."""
        padded = np.full((len(rows), max(map(len, rows))), self._pad_token_id if pad_id is None else pad_id, np.int64)
        mask = np.zeros_like(padded)
        for i, row in enumerate(rows):
            padded[i, : len(row)] = row
            mask[i, : len(row)] = 1
        device = self._model.device
        return torch.from_numpy(padded).to(device), torch.from_numpy(mask).to(device)

    def _between_layers(self, module: nn.Module, inputs: Any) -> None:
        if self._pause is not None:
            with torch.inference_mode(mode=False):  # what runs here is no part of the pass
                self._pause()


def load_one_shot_model(config: OneShotConfig) -> OneShotModel:
    """Load a model from its Hugging Face directory; only weights in safetensors are read, and no code.

    Raises: ModelSourceError where the directory cannot be read, UnsupportedModelError where it holds no model for the
    task.
    """
    hf_config = _read_config(config.path)
    _check_task(config, hf_config)
    poolings, is_normalized = _read_modules(config.path) if config.task is OneShotTask.EMBED else ((), False)
    model = _read_model(config, hf_config)
    if config.task is OneShotTask.CLASSIFY and config.device == "cpu" and config.dtype == "float32":
        _fold_batch_norms(model)
        model.to(memory_format=torch.channels_last)
    return OneShotModel(config, model, poolings, is_normalized=is_normalized)


def _read_config(folder: Path) -> Any:
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # a config that contradicts itself fails wherever transformers first looks
        raise ModelSourceError(f"{folder}: the config cannot be read: {error}") from error


def _check_task(config: OneShotConfig, hf_config: Any) -> None:
    """Raises: UnsupportedModelError where the architecture is not one for the task."""
    [architecture, *_] = hf_config.architectures or ["a model without an architecture in its config"]
    refusal = f"{config.name} cannot {config.task}: it is {architecture}"
    if config.task is not OneShotTask.EMBED:
        if not architecture.endswith(_ENDINGS[config.task]):
            raise UnsupportedModelError(f"{refusal}, not one of transformers' *{_ENDINGS[config.task]}")
        if config.task is OneShotTask.CLASSIFY and "id2label" not in _read_json(config.path / "config.json"):
            raise UnsupportedModelError(f"{refusal} without labels: its config has no id2label")
        if config.task is OneShotTask.SCORE and hf_config.num_labels != 1:
            raise UnsupportedModelError(f"{refusal} with {hf_config.num_labels} labels, and a score is one number")
        return
    if hf_config.is_encoder_decoder:
        raise UnsupportedModelError(f"{refusal}, an encoder with a decoder")
    # Some decoders were made sentence encoders, and kept the name of their architecture.
    is_encoder = architecture.endswith(("Model", "ForMaskedLM", "ForPreTraining"))
    if not is_encoder and not (config.path / "modules.json").is_file():
        raise UnsupportedModelError(f"{refusal}, no encoder, and has no modules.json that makes it a sentence encoder")


def _read_modules(folder: Path) -> tuple[list[_Pooling], bool]:
    """How hidden states become a sentence's vector, as modules.json says: the poolings, and whether it is normalised.

    Raises: ModelSourceError, UnsupportedModelError.
    """
    path = folder / "modules.json"
    if not path.is_file():
        return [_mean], True
    modules = _read_json(path)
    try:
        kinds = [module["type"].rpartition(".")[2] for module in modules]
        if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"]):
            raise UnsupportedModelError(
                f"{path}: its modules are {', '.join(kinds)}; only Transformer, Pooling, and then Normalize or nothing "
                "can be run"
            )
        pooling_path = folder / modules[1]["path"] / "config.json"
    except (KeyError, TypeError, AttributeError) as error:
        raise ModelSourceError(f"{path} is no list of modules of sentence-transformers") from error
    return _read_poolings(pooling_path), len(kinds) == 3


def _read_poolings(path: Path) -> list[_Pooling]:
    prefix = "pooling_mode_"
    content = _read_json(path)
    modes = {key.removeprefix(prefix) for key, value in content.items() if key.startswith(prefix) and value}
    if not modes or not modes <= _POOLINGS.keys():
        raise UnsupportedModelError(
            f"{path}: pooling by {', '.join(sorted(modes)) or 'nothing known'}; can be by {', '.join(_POOLINGS)}"
        )
    return [pooling for mode, pooling in _POOLINGS.items() if mode in modes]


def _read_model(config: OneShotConfig, hf_config: Any) -> Any:
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # what it would report is raised below
    try:
        model, report = _CLASSES[config.task].from_pretrained(
            config.path,
            config=hf_config,
            dtype=getattr(torch, config.dtype),
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as error:  # files missing or cut short: each of a kind of its own
        raise ModelSourceError(f"{config.path}: the model cannot be loaded: {error}") from error
    for name, found, expected in sorted(report["mismatched_keys"]):
        raise ModelSourceError(
            f"{config.path}: weight {name} has shape {tuple(found)}, the config says {tuple(expected)}"
        )
    for name in sorted(report["missing_keys"]):
        # Sentence encoders often come without BERT's own pooler, whose answer is not used.
        if not (config.task is OneShotTask.EMBED and name.startswith("pooler.")):
            raise ModelSourceError(f"{config.path}: the model lacks the weight {name}")
    model.config.use_cache = False  # of decoders: nothing follows
    return model.eval().to(config.device)


def _fold_batch_norms(model: nn.Module) -> None:
    """Make each batch norm a part of the convolution before it, which saves a pass over what it computes."""
    for module in list(model.modules()):
        # transformers' names where one directly follows the other.
        convolution, norm = getattr(module, "convolution", None), getattr(module, "normalization", None)
        if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            module.convolution = fuse_conv_bn_eval(convolution, norm)
            module.normalization = nn.Identity()


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelSourceError(f"{path} cannot be read: {error}") from error
