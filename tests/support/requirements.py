"""What a test needs from the machine: missing, it is skipped aloud, or fails where everything must run (CI)."""

import os
import shutil
from typing import NoReturn

import pytest


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
