"""What a test needs from the machine: missing, it is skipped aloud, or fails where everything must run (CI)."""

import os
import shutil

import pytest


def need_program(*names: str) -> str:
    """The path of the first of these programs; without any the test is skipped, or fails."""
    for name in names:
        if (path := shutil.which(name)) is not None:
            return path
    message = f"none of {', '.join(names)} is installed"
    if os.environ.get("TESTS_REQUIRE_ALL"):
        pytest.fail(message)
    pytest.skip(message)
