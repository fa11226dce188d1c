"""SwiGLU's elementwise half as a Triton kernel, for products too wide to hold it."""

import torch
import triton
import triton.language as tl


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    num_tokens, width = gate_up.shape
    out = gate_up.new_empty(num_tokens, width // 2)
    block = min(1024, triton.next_power_of_2(width // 2))
    _silu_mul[(num_tokens, triton.cdiv(width // 2, block))](gate_up, out, width // 2, BLOCK=block, num_warps=4)
    return out


@triton.jit
def _silu_mul(gate_up, out, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    gate = tl.load(gate_up + token * 2 * width + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + token * 2 * width + width + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + token * width + column, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=mask)
