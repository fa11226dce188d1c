"""Keras' ResNet-50, as TensorFlow.js keeps it, rewritten as a Hugging Face directory.

Runs on the main thread, once, where that packaged model is fetched. The network computes the same: what Keras does
otherwise than transformers (layouts, biases before batch norms, its epsilon, blue before red) is moved into the
weights. It does not know where the files come from, and of torch only how transformers names and shapes the weights.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

_DEPTHS = (3, 4, 6, 3)
# torch's nn.BatchNorm2d has this one, whatever a model's config says.
_TORCH_EPSILON = 1e-5
# Of the training images, 0 to 255, in the order red, green, blue.
_MEAN = (123.68, 116.779, 103.939)

_Array = NDArray[np.float32 | np.int64]


def convert_keras_resnet(files: Mapping[str, bytes], folder: Path) -> None:
    """Write the model in `files` (a package's, by path) into `folder`, which exists.

    Raises: KeyError, ValueError where the files hold another model.
    """
    model = json.loads(files["ResNet50/model.json"])
    labels = json.loads(files["assets/labels.json"])
    layers = model["modelTopology"]["model_config"]["config"]["layers"]
    epsilons = {layer["name"]: layer["config"].get("epsilon") for layer in layers}
    weights = _read_weights(model["weightsManifest"], files)

    tensors: dict[str, _Array] = {}
    for name, (convolution, norm) in _convolutions().items():
        # [height, width, in, out] to [out, in, height, width]
        tensors[f"{name}.convolution.weight"] = weights[f"{convolution}/kernel"].transpose(3, 2, 0, 1)
        tensors[f"{name}.normalization.weight"] = weights[f"{norm}/gamma"]
        tensors[f"{name}.normalization.bias"] = weights[f"{norm}/beta"]
        tensors[f"{name}.normalization.running_mean"] = weights[f"{norm}/moving_mean"] - weights[f"{convolution}/bias"]
        tensors[f"{name}.normalization.running_var"] = weights[f"{norm}/moving_variance"] + np.float32(
            epsilons[norm] - _TORCH_EPSILON
        )
        tensors[f"{name}.normalization.num_batches_tracked"] = np.zeros((), np.int64)  # of training; looked for
    first = "resnet.embedder.embedder.convolution.weight"
    tensors[first] = tensors[first][:, ::-1]  # trained on blue, green, red
    tensors["classifier.1.weight"] = weights["fc1000/kernel"].T
    tensors["classifier.1.bias"] = weights["fc1000/bias"]
    save_file(
        {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    _write(
        folder / "config.json",
        {
            "architectures": ["ResNetForImageClassification"],
            "model_type": "resnet",
            "depths": _DEPTHS,
            "downsample_in_bottleneck": True,
            "id2label": {str(i): labels[str(i)].replace("_", " ") for i in range(len(labels))},
        },
    )
    # The shortest side becomes 224 / 0.875 = 256 pixels, and the middle of it is cut out.
    _write(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "ConvNextImageProcessor",
            "size": {"shortest_edge": 224},
            "crop_pct": 0.875,
            "do_rescale": False,
            "image_mean": _MEAN,
            "image_std": (1.0, 1.0, 1.0),
        },
    )
    (folder / "LICENSE").write_bytes(files["LICENSE"])


def _read_weights(manifest: list[dict[str, Any]], files: Mapping[str, bytes]) -> dict[str, _Array]:
    weights: dict[str, _Array] = {}
    for group in manifest:
        content = b"".join(files[f"ResNet50/{path}"] for path in group["paths"])
        offset = 0
        for entry in group["weights"]:
            count = int(np.prod(entry["shape"]))
            weight = np.frombuffer(content, "<f4", count, offset)
            weights[entry["name"]] = weight.reshape(entry["shape"])
            offset += weight.nbytes
    return weights


def _convolutions() -> dict[str, tuple[str, str]]:
    """Keras' names of each convolution and its batch norm, by transformers' name of the two."""
    names = {"resnet.embedder.embedder": ("conv1", "bn_conv1")}
    for stage, depth in enumerate(_DEPTHS):
        for block in range(depth):
            # Stages count from 2, since the convolution above is the first; blocks are a, b, c.
            place = f"{stage + 2}{'abcdef'[block]}_branch"
            parts = {"layer.0": "2a", "layer.1": "2b", "layer.2": "2c"} | ({} if block else {"shortcut": "1"})
            for part, branch in parts.items():
                name = f"resnet.encoder.stages.{stage}.layers.{block}.{part}"
                names[name] = (f"res{place}{branch}", f"bn{place}{branch}")
    return names


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
