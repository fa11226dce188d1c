"""What launches of Triton kernels share: the device's size, counters, and starting while the kernel before ends.

Programmatic dependent launch (CUDA programming guide; Hopper and later): a kernel is set up while the one before it
ends, and each of its programs waits for that end before it reads or writes what other kernels do; it lets the next one
start when its own products are done.
"""

import functools
from typing import Any

import torch
import triton

# Off: it gained 1 to 2 % of a chain of products on an H100, and has not been measured in whole steps.
HAS_DEPENDENT_LAUNCH = False
# Without a GPU kernels are interpreted, and cut up as they would be on an H100.
_DEFAULT_NUM_SMS = 132
_NUM_COUNTERS = 8192


def launch_options(device: torch.device) -> dict[str, Any]:
    """The options of a launch of a kernel that takes HAS_PDL."""
    has_pdl = HAS_DEPENDENT_LAUNCH and _can_launch_early(device)
    return {"HAS_PDL": True, "launch_pdl": True} if has_pdl else {"HAS_PDL": False}


@functools.cache
def num_sms(device: torch.device) -> int:
    """How many multiprocessors the device has."""
    if device.type != "cuda":
        return _DEFAULT_NUM_SMS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def counters(device: torch.device) -> torch.Tensor:
    """Zeros, int32, for programs that share a result: who counts to the end leaves a zero again.

    One stream uses them, and the first call is before any is captured in a CUDA graph.
    """
    return torch.zeros(_NUM_COUNTERS, dtype=torch.int32, device=device)


@functools.cache
def _can_launch_early(device: torch.device) -> bool:
    if triton.knobs.runtime.interpret or device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)
