"""What all tests share."""

import glob
import os

import pytest

# Where there is no GPU Triton's kernels are interpreted. Read when Triton is first imported, so before all else.
if not glob.glob("/dev/nvidia[0-9]*"):
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"
