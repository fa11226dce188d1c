"""The kernels' errors that the GPU report tells are small."""

import pytest
import torch

pytest.importorskip("triton")

from headrace.benchmarks.gpu_measurements import parity


@pytest.mark.skipif(not torch.cuda.is_available(), reason="its sizes are a GPU's; what it calls is tested interpreted")
def test_every_kernel_is_near_its_reference() -> None:
    for name, error in parity().items():
        limit = 0.1 if "fp8" in name or "float8" in name else 0.05
        assert error < limit, f"{name}: {error}"
