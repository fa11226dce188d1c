"""The ops with attention by the package flashinfer; all others are `triton_ops`.

FlashInfer (Ye et al., MLSys 2025) divides a step's work among programs on the host (`plan`), once for all layers of a
kind, and each of these launches what was planned (`run`). A step's lengths are known when it is launched, so nothing
waits for the device. A CUDA graph has what runs; a plan for it goes before each replay to the memory that it reads.

Of its kernels the backend fa2, for decoding too: one that every GPU has, that splits long contexts and reads a
key/value head once for its query heads. Its fa3 does neither, and prompt chunks have decoding rows beside them.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from headrace.kernels.decoder import ModelShape
from headrace.kernels.ops import AttentionMetadata, LayerCache
from headrace.kernels.triton_ops import (
    linear_add,
    norm_gate_up,
    norm_linear,
    rms_norm,
    rope_and_write_kv,
    silu_mul,
    write_kv,
)

__all__ = [
    "linear_add",
    "norm_gate_up",
    "norm_linear",
    "paged_attention",
    "plan_attention",
    "rms_norm",
    "rope_and_write_kv",
    "silu_mul",
    "write_kv",
]

# Makes a `flashinfer.BatchPrefillWithPagedKVCacheWrapper`.
MakeWrapper = Callable[..., Any]

# What its authors compile and test; its source says of 8 bits that they are not for heads of 64.
_HEAD_DIMS = {2: (64, 128, 256), 1: (128, 256)}
# What its documentation recommends where no graph has to hold every step of a size.
_WORKSPACE_BYTES = 128 * 2**20
_BLOCK = 256


class KernelsMissingError(RuntimeError):
    """flashinfer cannot compile what a model needs; the message says why."""


class _Kind(NamedTuple):
    """What a plan depends on beside the step's lengths: layers that agree in it share one."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None
    softcap: float | None
    dtype: torch.dtype
    cache_dtype: torch.dtype


class _Lengths(NamedTuple):
    """A step's sequences, on the host: int32, their starts in the batch and among the blocks [B + 1], how many tokens
    the last block of each has, and its context [B]."""

    query_starts: torch.Tensor
    block_starts: torch.Tensor
    last_lens: torch.Tensor
    context_lens: torch.Tensor


def find_wrapper() -> MakeWrapper:
    """flashinfer's, where it is installed. Raises: ImportError, or whatever its own imports raise."""
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper

    return BatchPrefillWithPagedKVCacheWrapper  # type: ignore[no-any-return]


def why_not(shape: ModelShape, dtype: torch.dtype, cache_dtype: torch.dtype) -> str | None:
    """Say why its kernels cannot serve a model, None where they can."""
    if dtype.itemsize != 2:
        return f"it computes in 16 bits, not in {str(dtype).removeprefix('torch.')}"
    if cache_dtype is torch.int8:
        return "it knows no int8 cache with a scale per token"
    head_dims = _HEAD_DIMS[cache_dtype.itemsize]
    for _, head_dim in shape.kv_shapes:
        if head_dim not in head_dims:
            cache = "" if cache_dtype is dtype else " and a cache in fp8"
            return f"its heads with {head_dim} numbers{cache} are not tested; {', '.join(map(str, head_dims))} are"
    return None


class FlashinferPlan:
    """The attention of all steps of a backend, one after the other: `begin` plans a step, whose layers then `attend`.

    Steps have at most `max_num_seqs` sequences, and `max_num_blocks` blocks of them all.
    """

    def __init__(
        self,
        make_wrapper: MakeWrapper,
        *,
        block_size: int,
        max_num_seqs: int,
        max_num_blocks: int,
        device: torch.device,
    ) -> None:
        self._make_wrapper, self._block_size, self._device = make_wrapper, block_size, device

        def buffer(size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.int32, device=device)

        # A plan goes before each step, so all sizes share these.
        self._query_starts, self._block_starts, self._last_lens = (buffer(max_num_seqs + 1) for _ in range(3))
        self._blocks = buffer(max_num_blocks)
        self._workspace = self._bytes(_WORKSPACE_BYTES)
        self._wrappers: dict[Hashable, dict[_Kind, Any]] = {}
        self._size: Hashable = None
        self._lengths: _Lengths
        # A wrapper fills the same pinned memory with each of its plans, which must have been sent by then.
        self._sent = torch.cuda.Event() if device.type == "cuda" else None

    def begin(
        self, query_lens: Sequence[int], context_lens: Sequence[int], num_sequences: int, size: Hashable = None
    ) -> None:
        """Plan a step, padded to `num_sequences` with empty ones.

        `size` names the padded size whose graph computes it: its number of sequences is always the same, and its first
        step has the most tokens. Without one the step is launched op by op.
        """
        if self._sent is not None:
            # Sent ahead of the last step's kernels, and the step before that one is over: hardly ever a wait.
            self._sent.synchronize()
        lens = np.zeros((3, num_sequences), np.int32)
        lens[0, : len(query_lens)] = query_lens
        lens[1, : len(context_lens)] = context_lens
        lens[2] = -(-lens[1] // self._block_size)
        starts = np.zeros((2, num_sequences + 1), np.int32)
        np.cumsum(lens[::2], axis=1, out=starts[:, 1:])
        last_lens = (lens[1] - 1) % self._block_size + 1
        self._size, self._lengths = size, _Lengths(*map(self._pinned, (*starts, last_lens, lens[1])))
        self._block_starts[: num_sequences + 1].copy_(self._lengths.block_starts, non_blocking=True)
        for kind, wrapper in self._wrappers.setdefault(size, {}).items():
            self._plan(wrapper, kind)

    def take_blocks(self, block_tables: torch.Tensor, table_rows: torch.Tensor) -> None:
        """Take the step's blocks from tables on the device: int32 [tables, blocks], and int32 [B], which is whose."""
        _take_blocks[(len(self._lengths.context_lens),)](
            block_tables,
            table_rows,
            self._block_starts,
            self._blocks,
            block_tables.shape[1],
            BLOCK=_BLOCK,
        )

    def attend(
        self,
        q: torch.Tensor,
        cache: LayerCache,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """`Ops.paged_attention` in the step that began last.

        Raises: KernelsMissingError, for the first layer of a kind.
        """
        num_kv_heads, head_dim = cache.keys.shape[2:]
        kind = _Kind(q.shape[1], num_kv_heads, head_dim, scale, window, softcap, q.dtype, cache.keys.dtype)
        wrappers = self._wrappers[self._size]
        wrapper = wrappers.get(kind)
        if wrapper is None:
            try:
                wrapper = wrappers[kind] = self._add_wrapper(kind)
            except (RuntimeError, OSError) as error:
                raise KernelsMissingError(f"flashinfer cannot make its kernels: {error}") from error
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if sinks is None:
            wrapper.run(q, (cache.keys, cache.values), out=out)
            return out
        _, lse = wrapper.run(q, (cache.keys, cache.values), out=out, return_lse=True)
        # A sink's only effect is its share of the sum of exponentials, whose logarithm is to base 2.
        share = torch.sigmoid(lse * math.log(2) - sinks.float())
        return (out * share[..., None]).to(q.dtype)

    def _add_wrapper(self, kind: _Kind) -> Any:
        num_sequences = len(self._lengths.context_lens)
        if self._size is None:
            wrapper = self._make_wrapper(self._workspace, "NHD", backend="fa2")
        else:
            wrapper = self._make_wrapper(
                self._workspace,
                "NHD",
                use_cuda_graph=True,
                qo_indptr_buf=self._query_starts[: num_sequences + 1],
                paged_kv_indptr_buf=self._block_starts[: num_sequences + 1],
                paged_kv_indices_buf=self._blocks,
                paged_kv_last_page_len_buf=self._last_lens[:num_sequences],
                backend="fa2",
            )
            num_bytes, num_plan_bytes = wrapper.workspace_size(**self._arguments(kind))
            if num_bytes > len(self._workspace):  # graphs that have the smaller one keep it
                self._workspace = self._bytes(num_bytes)
            wrapper.reset_workspace_buffer(self._workspace, self._bytes(num_plan_bytes))
        self._plan(wrapper, kind)
        return wrapper

    def _plan(self, wrapper: Any, kind: _Kind) -> None:
        wrapper.plan(**self._arguments(kind), non_blocking=True)
        if self._sent is not None:
            self._sent.record()

    def _arguments(self, kind: _Kind) -> dict[str, Any]:
        lengths = self._lengths
        return {
            "qo_indptr": lengths.query_starts,
            "paged_kv_indptr": lengths.block_starts,
            "paged_kv_indices": self._blocks[: int(lengths.block_starts[-1])],
            "paged_kv_last_page_len": lengths.last_lens,
            "num_qo_heads": kind.num_heads,
            "num_kv_heads": kind.num_kv_heads,
            "head_dim_qk": kind.head_dim,
            "page_size": self._block_size,
            "causal": True,
            "sm_scale": kind.scale,
            # How many tokens before its own a token sees.
            "window_left": -1 if kind.window is None else kind.window - 1,
            "logits_soft_cap": kind.softcap,
            "q_data_type": kind.dtype,
            "kv_data_type": kind.cache_dtype,
            # Which it would compute from the others, in memory that is not pinned.
            "seq_lens": lengths.context_lens,
        }

    def _bytes(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self._device)

    def _pinned(self, values: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(values)
        return tensor if self._sent is None else tensor.pin_memory()


def plan_attention(metadata: AttentionMetadata, block_size: int, device: torch.device) -> FlashinferPlan:
    """As `Ops` says, of one step that is launched op by op."""
    starts, num_sequences = metadata.query_starts, len(metadata.context_lens)
    tables = metadata.padded_tables(device)
    plan = FlashinferPlan(
        find_wrapper(),
        block_size=block_size,
        max_num_seqs=num_sequences,
        max_num_blocks=tables.numel(),
        device=device,
    )
    plan.begin([starts[b + 1] - starts[b] for b in range(num_sequences)], metadata.context_lens, num_sequences)
    rows = torch.arange(num_sequences, dtype=torch.int32, device=device)
    plan.take_blocks(tables, rows)
    return plan


def paged_attention(
    q: torch.Tensor,
    cache: LayerCache,
    plan: FlashinferPlan,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `Ops` says, of caches without scales. Rows behind the last query token are left as they are."""
    if q.stride()[1:] != (q.shape[2], 1):
        q = q.contiguous()
    return plan.attend(q, cache, scale, window, softcap, sinks)


@triton.jit(do_not_specialize=["table_width"])
def _take_blocks(block_tables, table_rows, block_starts, blocks, table_width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """A program per sequence copies the beginning of its table to where its blocks are among those of all."""
    sequence = tl.program_id(0)
    begin = tl.load(block_starts + sequence)
    num_blocks = tl.load(block_starts + sequence + 1) - begin
    table = block_tables + tl.load(table_rows + sequence).to(tl.int64) * table_width
    for first in range(0, num_blocks, BLOCK):
        column = first + tl.arange(0, BLOCK)
        block = tl.load(table + column, mask=column < num_blocks, other=0)
        tl.store(blocks + begin + column, block, mask=column < num_blocks)
