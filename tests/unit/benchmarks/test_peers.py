"""How targets are started, and what is told of those that are not installed."""

from pathlib import Path

import pytest

from headrace.benchmarks.peers import TARGETS, Installation, InstallError


@pytest.fixture
def installation(tmp_path: Path) -> Installation:
    """Every environment, and the directory, as empty folders."""
    gguf = tmp_path / "tiny.gguf"
    gguf.touch()
    installation = Installation(tmp_path / "peers", gguf)
    installation.directory.mkdir(parents=True)
    for name in TARGETS:
        python = installation.python(name)
        python.parent.mkdir(parents=True)
        python.touch()
    return installation


@pytest.mark.parametrize("name", TARGETS)
def test_each_target_is_given_the_model_in_the_form_it_reads(installation: Installation, name: str) -> None:
    recipe = installation.recipe(name, 8, 512)
    is_directory = name in ("headrace-bf16", "vllm", "transformers")
    assert str(installation.directory if is_directory else installation.gguf) in recipe.command
    assert recipe.speaks_http == (name not in ("openvino", "transformers"))


def test_llama_cpp_has_a_context_for_each_slot(installation: Installation) -> None:
    assert installation.recipe("llama.cpp", 8, 512).command[-4:-1] == ("{port}", "8", "512")


def test_vllm_computes_on_every_core(installation: Installation) -> None:
    assert installation.recipe("vllm", 8, 512).environment["VLLM_CPU_OMP_THREADS_BIND"].startswith("0-")


@pytest.mark.parametrize("name", ["vllm", "llama.cpp", "openvino", "transformers", "headrace-bf16"])
def test_what_is_not_installed_is_refused_with_what_to_do(tmp_path: Path, name: str) -> None:
    with pytest.raises(InstallError, match="run with --install first"):
        Installation(tmp_path, tmp_path / "tiny.gguf").recipe(name, 1, 512)


def test_a_peers_version_is_that_of_its_own_environment(installation: Installation) -> None:
    assert installation.version("openvino") is None
    record = installation.folder / "openvino/lib/python3.11/site-packages/openvino_genai-1.2.dist-info"
    record.mkdir(parents=True)
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: openvino-genai\nVersion: 1.2\n")
    assert installation.version("openvino") == "1.2"


def test_a_model_that_not_every_target_reads_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    with pytest.raises(InstallError, match=r"no \.gguf file"):
        Installation.of(None, str(tmp_path), print)
    with pytest.raises(InstallError, match="no directory"):
        Installation.of(None, "no-such-model", print)
