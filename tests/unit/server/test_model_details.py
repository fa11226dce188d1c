"""What model files say of a model: both kinds say the same of the same model."""

from pathlib import Path

import pytest

from gguf_writing import write_model
from headrace.scheduler.errors import ModelSourceError
from headrace.scheduler.model_source import ModelSource
from headrace.server.model_details import read_model_details
from tiny_models import tiny_llama


def test_the_details_are_those_of_the_files(tmp_path: Path) -> None:
    model = tiny_llama()
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    model.save_pretrained(tmp_path / "folder")
    file = write_model(tmp_path / "model.gguf", "llama", model, {}, "Q8_0")
    for path, format, value_type in ((tmp_path / "folder", "safetensors", "F32"), (file, "gguf", "Q8_0")):
        details = read_model_details(ModelSource(path, "tiny"))
        assert (details.format, details.family, details.value_type) == (format, "llama", value_type)
        assert details.num_parameters == num_parameters
        weights = file if format == "gguf" else path / "model.safetensors"
        assert details.num_bytes == weights.stat().st_size
        assert details.modified_s == weights.stat().st_mtime
        assert len(details.digest) == 64


@pytest.mark.parametrize("config", [None, b"{", b"[]"])
def test_a_folder_that_cannot_be_read_is_an_error(tmp_path: Path, config: bytes | None) -> None:
    if config is not None:
        (tmp_path / "config.json").write_bytes(config)
    with pytest.raises(ModelSourceError):
        read_model_details(ModelSource(tmp_path, "broken"))
