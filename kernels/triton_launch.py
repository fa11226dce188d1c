"""What launches of Triton kernels share: the device's size, counters, and starting while the kernel before ends.

Programmatic dependent launch (CUDA programming guide; Hopper and later): a kernel is set up while the one before it
ends, and each of its programs waits for that end before it reads or writes what other kernels do. Until then it may
ask for what nobody writes: weights come to the L2 cache while the memory has nothing else to do.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl

# Without a GPU kernels are interpreted, and cut up as they would be on an H100.
_DEFAULT_NUM_SMS = 132
_NUM_COUNTERS = 8192


def launch_options(device: torch.device) -> dict[str, Any]:
    """The options of a launch of a kernel that takes HAS_PDL."""
    return {"HAS_PDL": True, "launch_pdl": True} if _can_launch_early(device) else {"HAS_PDL": False}


@triton.jit
def prefetch(places):  # type: ignore[no-untyped-def]
    """Ask for the 128 bytes at each of these places to be in the L2 cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [places.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def launch_dependents_at(step, last):  # type: ignore[no-untyped-def]
    """Let the next kernel start, in one step of a loop; by a predicate, as Triton loads nothing ahead across an if."""
    tl.inline_asm_elementwise(
        "{ .reg .pred now; setp.eq.s32 now, $1, $2; @now griddepcontrol.launch_dependents; mov.b32 $0, 0; }",
        "=r,r,r",
        [step, last],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


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
