"""Steps on an NVIDIA GPU: inputs made on the device, a CUDA graph per padded size, tokens read a step later.

The host sends an array per step, tokens and lengths, and another of what is new in the block tables, which stay on the
device. Tokens that the step before drew are taken from where it left them, so a step can be launched before they are
known. Sizes are padded to a few; each has a graph, captured when the engine warms up. A padding sequence has no tokens,
a padding token no slot. A step with a row that has an adapter is launched op by op, as it is.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic

import numpy as np
import torch
import triton
import triton.language as tl

from headrace.kernels import triton_sampling
from headrace.kernels.backend import StepBatch
from headrace.kernels.decoder import Decoder, KVCache, PackedBatch
from headrace.kernels.flashinfer_ops import FlashinferPlan, MakeWrapper
from headrace.kernels.hf_decoder import HuggingFaceDecoder
from headrace.kernels.lora import AdapterRows, rows_by_adapter
from headrace.kernels.sampling import SamplingBatch, modify_logits, uniforms, upload
from headrace.kernels.step_times import StepTimes
from headrace.kernels.tensor_parallel import Group
from headrace.kernels.triton_attention import AttentionPlan

# Steps whose input may still be on its way when the next one's is written: the one in flight and the one before.
_NUM_STAGES = 3
_BLOCK = 128
_BELOW_ONE = np.nextafter(np.float32(1), np.float32(0))


@dataclass(frozen=True, slots=True)
class _Size:
    """The padded size of a step: T tokens of B sequences, R rows of logits."""

    num_tokens: int
    num_sequences: int
    num_rows: int
    has_prefill: bool


@dataclass(slots=True)
class _Table:
    """A sequence's row of the device's block tables, and how many of its blocks are there."""

    block_ids: list[int]
    row: int
    num_written: int = 0


@dataclass(frozen=True, slots=True)
class _Graph:
    """A captured forward, and where it leaves its logits."""

    replay: Callable[[], None]
    logits: torch.Tensor


class _Clock:
    """Tells when steps began and ended on the device, whose events know only how far they are apart."""

    def __init__(self) -> None:
        self._last: tuple[torch.cuda.Event, float] | None = None

    def restart(self) -> None:
        """Forget the last step: nothing is known of what lies between it and the next."""
        self._last = None

    def times(self, began: torch.cuda.Event, ended: torch.cuda.Event) -> StepTimes:
        """Of a step that has ended just now, or at a known distance from the one before."""
        if self._last is None:
            ended_s = monotonic()
        else:
            last, last_s = self._last
            ended_s = last_s + last.elapsed_time(ended) / 1e3
        self._last = ended, ended_s
        return StepTimes(ended_s - began.elapsed_time(ended) / 1e3, ended_s, None)


class PendingRead:
    """Tensors on their way to the host. `times` are the step's, once it was waited for."""

    times: StepTimes | None = None

    def __init__(self, tensors: Sequence[torch.Tensor], began: torch.cuda.Event | None, clock: _Clock) -> None:
        self._clock = clock
        self._began = began
        self._copies = [
            torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=began is not None).copy_(tensor, non_blocking=True)
            for tensor in tensors
        ]
        self._ended = _record(began is not None)

    def wait(self) -> list[torch.Tensor]:
        if self._began is not None and self._ended is not None:
            self._ended.synchronize()
            self.times = self._clock.times(self._began, self._ended)
        return self._copies


def _record(is_cuda: bool) -> torch.cuda.Event | None:
    """An event at the end of what was launched so far."""
    if not is_cuda:
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class GpuBackend:
    """A decoder and its cache on one GPU. `max_num_batched_tokens` tokens and `max_num_seqs` sequences in a step at
    most, each of at most `max_num_blocks` blocks. With a `group`, tokens are drawn on its rank 0 alone. A decoder whose
    ops are `flashinfer_ops` needs a `flashinfer_wrapper`."""

    is_asynchronous = True

    def __init__(
        self,
        decoder: Decoder | HuggingFaceDecoder,
        cache: KVCache,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_num_blocks: int,
        group: Group | None = None,
        flashinfer_wrapper: MakeWrapper | None = None,
    ) -> None:
        self._decoder, self._cache, self._group = decoder, cache, group
        self._device = decoder.device
        self._is_cuda = self._device.type == "cuda"  # not so where Triton is interpreted
        self._max_num_seqs, self._max_num_blocks = max_num_seqs, max_num_blocks
        self._decode_sizes = _padded_sizes(1, max_num_seqs)
        self._mixed_sizes = _padded_sizes(16, max_num_batched_tokens)

        def buffer(size: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(size, dtype=dtype, device=self._device)

        self._token_ids, self._positions, self._slots = (buffer(max_num_batched_tokens, torch.int64) for _ in range(3))
        # A step that scores prompts wants the logits of any of its tokens, and those it draws from.
        max_num_rows = max_num_batched_tokens + max_num_seqs
        self._logit_rows, self._drawn = (buffer(max_num_rows, torch.int64) for _ in range(2))
        self._query_starts, self._context_lens, self._table_rows = (buffer(max_num_seqs + 1) for _ in range(3))
        # Twice the sequences: those that are over make room only when it is needed.
        self._block_tables = buffer(2 * max_num_seqs * max_num_blocks).view(-1, max_num_blocks)
        self._tables: OrderedDict[int, _Table] = OrderedDict()
        self._flashinfer: FlashinferPlan | None = None
        if flashinfer_wrapper is not None:
            self._flashinfer = FlashinferPlan(
                flashinfer_wrapper,
                block_size=cache.block_size,
                max_num_seqs=max_num_seqs,
                max_num_blocks=max_num_seqs * max_num_blocks + max_num_batched_tokens,
                device=self._device,
            )
        self._staged = buffer(max_num_batched_tokens + 3 * max_num_seqs + 1 + max_num_rows)
        self._stages = [
            torch.empty(self._staged.shape, dtype=torch.int32, pin_memory=self._is_cuda) for _ in range(_NUM_STAGES)
        ]
        self._num_steps = 0
        self._graphs: dict[_Size, _Graph] = {}
        if self._is_cuda:
            self._pool = torch.cuda.graph_pool_handle()
            self._capture_stream = torch.cuda.Stream(self._device)
        self._began: torch.cuda.Event | None = None
        self._clock = _Clock()

    @torch.inference_mode()
    def capture(self) -> None:
        """Capture a graph for each padded size, which must be done before the first step or not at all."""
        if self._is_cuda:
            for size in self._sizes():
                self._capture(size)

    def _sizes(self) -> list[_Size]:
        """Largest first, so that the smaller ones find their memory in the pool."""
        mixed = [self._mixed_size(num_tokens) for num_tokens in reversed(self._mixed_sizes)]
        return mixed + [_Size(n, n, n, has_prefill=False) for n in reversed(self._decode_sizes)]

    def _mixed_size(self, num_tokens: int) -> _Size:
        num_sequences = min(num_tokens, self._max_num_seqs)
        return _Size(num_tokens, num_sequences, num_sequences, has_prefill=True)

    def _capture(self, size: _Size) -> None:
        self._begin_padding(size)
        self._compute(size)  # compiles, and lets libraries choose
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Not by `torch.cuda.graph`, which collects garbage each time.
        with torch.cuda.stream(self._capture_stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            logits = self._compute(size)
            graph.capture_end()
        self._graphs[size] = _Graph(graph.replay, logits)

    def _begin_padding(self, size: _Size) -> None:
        """Begin a step of nobody's tokens."""
        self._query_starts.zero_()
        self._context_lens.zero_()
        self._slots.fill_(-1)
        if self._flashinfer is not None:
            # Which counts tokens on the host, and takes the first step's as the most.
            lens = np.diff(np.arange(size.num_sequences + 1) * size.num_tokens // size.num_sequences).tolist()
            self._flashinfer.begin(lens, lens, size.num_sequences, size)

    def _compute(self, size: _Size, adapter_rows: tuple[AdapterRows, ...] = ()) -> torch.Tensor:
        plan = self._flashinfer or AttentionPlan(
            self._query_starts[: size.num_sequences + 1],
            self._context_lens[: size.num_sequences],
            self._block_tables,
            self._table_rows[: size.num_sequences],
            size.num_tokens,
            size.has_prefill,
        )
        batch = PackedBatch(
            self._token_ids[: size.num_tokens],
            self._positions[: size.num_tokens],
            self._slots[: size.num_tokens],
            self._logit_rows[: size.num_rows],
            plan,
            adapter_rows,
        )
        logits = self._decoder.forward(batch, self._cache)
        self._drawn[: size.num_rows].copy_(triton_sampling.argmax(logits))
        return logits

    @torch.inference_mode()
    def forward(self, batch: StepBatch) -> torch.Tensor:
        adapter_rows = rows_by_adapter(batch.adapters, batch.query_lens, self._device)
        size = self._padded_size(batch, has_adapters=bool(adapter_rows))
        if self._group is not None and min(batch.token_ids) < 0:
            self._group.share(self._drawn)
        self._prepare(batch, size)
        graph = None if adapter_rows else self._graphs.get(size)
        if self._flashinfer is not None:
            key = None if graph is None else size
            self._flashinfer.begin(batch.query_lens, batch.context_lens, size.num_sequences, key)
            self._flashinfer.take_blocks(self._block_tables, self._table_rows)
        if graph is None:
            logits = self._compute(size, adapter_rows)
        else:
            graph.replay()
            logits = graph.logits
        return logits[: len(batch.logit_rows)]

    def argmax(self, batch: StepBatch) -> torch.Tensor:
        return self._drawn[: len(self.forward(batch))]

    @torch.inference_mode()
    def sample(self, logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
        modify_logits(logits, batch)
        # Below 1 also in float32.
        uniform = np.minimum(uniforms(batch.seed, batch.choice, batch.position).astype(np.float32), _BELOW_ONE)
        top_k = batch.top_k.astype(np.int32).view(np.float32)
        # Each begins at a multiple of 16 bytes: for pointers that do not, kernels would be compiled again.
        settings = np.zeros((5, -(-len(logits) // 4) * 4), np.float32)
        settings[:, : len(logits)] = batch.temperature, batch.top_p, batch.min_p, uniform, top_k
        temperature, top_p, min_p, uniform_on_device, top_k_on_device = upload(settings, self._device)[:, : len(logits)]
        drawn = triton_sampling.sample(
            logits,
            temperature,
            top_k_on_device.view(torch.int32),
            top_p,
            min_p,
            uniform_on_device,
            has_filters=bool(((batch.top_k > 0) | (batch.top_p < 1) | (batch.min_p > 0)).any()),
            is_all_greedy=not (batch.temperature > 0).any(),
        )
        kept = self._drawn[: len(logits)]  # the argmax of the logits as they were, -1 where they are no numbers
        return torch.where(kept < 0, kept, drawn, out=kept)

    def read(self, tensors: Sequence[torch.Tensor]) -> PendingRead:
        return PendingRead(tensors, self._began, self._clock)

    def use_idle_time(self) -> bool:
        self._clock.restart()
        return False

    def profile(self) -> dict[str, float]:
        return {}

    def recover(self) -> None:
        if self._is_cuda:
            torch.cuda.synchronize(self._device)
        self._clock.restart()
        # A launch that raised half-way may not have sent what these say was written.
        self._tables.clear()

    def _padded_size(self, batch: StepBatch, *, has_adapters: bool) -> _Size:
        num_tokens, num_sequences, num_rows = len(batch.token_ids), len(batch.query_lens), len(batch.logit_rows)
        is_scored = num_rows > num_sequences
        if is_scored or has_adapters or not self._graphs:  # nothing is gained from padding
            return _Size(num_tokens, num_sequences, num_rows, has_prefill=True)
        if num_tokens == num_sequences == num_rows:
            padded = _next_size(num_sequences, self._decode_sizes)
            return _Size(padded, padded, padded, has_prefill=False)
        return self._mixed_size(_next_size(num_tokens, self._mixed_sizes))

    def _prepare(self, batch: StepBatch, size: _Size) -> None:
        """Send the step's input, and fill in what `_compute` reads."""
        rows, updates = self._place_tables(batch.block_tables)
        num_tokens, num_sequences, num_rows = len(batch.token_ids), len(batch.query_lens), len(batch.logit_rows)
        num_staged = num_tokens + 3 * num_sequences + 1 + num_rows
        stage = self._stages[self._num_steps % _NUM_STAGES][:num_staged]
        self._num_steps += 1
        values = stage.numpy()
        starts = num_tokens
        contexts = starts + num_sequences + 1
        values[:starts] = batch.token_ids
        values[starts] = 0
        np.cumsum(batch.query_lens, out=values[starts + 1 : contexts])
        values[contexts : contexts + num_sequences] = batch.context_lens
        values[contexts + num_sequences : contexts + 2 * num_sequences] = rows
        values[contexts + 2 * num_sequences :] = batch.logit_rows
        self._began = _record(self._is_cuda)
        if updates:
            grid = (triton.cdiv(len(updates), _BLOCK),)
            on_device = upload(np.array(updates, dtype=np.int32), self._device)
            _update_tables[grid](on_device, self._block_tables, len(updates), self._max_num_blocks, BLOCK=_BLOCK)
        self._staged[:num_staged].copy_(stage, non_blocking=True)
        _prepare[(size.num_sequences + 1,)](
            self._staged,
            self._drawn,
            self._block_tables,
            self._token_ids,
            self._positions,
            self._slots,
            self._query_starts,
            self._context_lens,
            self._table_rows,
            self._logit_rows,
            num_tokens,
            num_sequences,
            num_rows,
            size.num_tokens,
            size.num_sequences,
            size.num_rows,
            self._max_num_blocks,
            S=self._cache.block_size,
            BLOCK=_BLOCK,
        )

    def _place_tables(self, tables: list[list[int]]) -> tuple[list[int], list[tuple[int, int, int]]]:
        """The row of each table, and what is to be written: row, column, block."""
        rows, updates = [], []
        for block_ids in tables:
            # Its own list holds a sequence's blocks, and is only appended to; held here, no other has its id.
            table = self._tables.get(id(block_ids))
            if table is None:
                table = self._add_table(block_ids)
            else:
                self._tables.move_to_end(id(block_ids))
            num_blocks = len(block_ids)
            if table.num_written < num_blocks:
                assert num_blocks <= self._max_num_blocks, "it would reach into the next row"
                updates += [(table.row, i, block_ids[i]) for i in range(table.num_written, num_blocks)]
                table.num_written = num_blocks
            rows.append(table.row)
        return rows, updates

    def _add_table(self, block_ids: list[int]) -> _Table:
        if len(self._tables) < len(self._block_tables):
            row = len(self._tables)
        else:
            row = self._tables.popitem(last=False)[1].row
        table = self._tables[id(block_ids)] = _Table(block_ids, row)
        return table


def _padded_sizes(smallest: int, largest: int) -> list[int]:
    """Powers of two, from 16 on also half-way between them, and `largest`."""
    sizes = []
    size = smallest
    while size < largest:
        sizes.append(size)
        if size >= 16 and size * 3 // 2 < largest:
            sizes.append(size * 3 // 2)
        size *= 2
    return [*sizes, largest]


def _next_size(num: int, sizes: list[int]) -> int:
    return next(size for size in sizes if size >= num)


@triton.jit(do_not_specialize=["num_updates"])
def _update_tables(updates, block_tables, num_updates, max_num_blocks, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    update = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = update < num_updates
    row = tl.load(updates + 3 * update, mask=mask, other=0).to(tl.int64)
    column = tl.load(updates + 3 * update + 1, mask=mask, other=0)
    block = tl.load(updates + 3 * update + 2, mask=mask, other=0)
    tl.store(block_tables + row * max_num_blocks + column, block, mask=mask)


@triton.jit(
    do_not_specialize=[
        "num_tokens",
        "num_sequences",
        "num_rows",
        "padded_tokens",
        "padded_sequences",
        "padded_rows",
    ]
)
def _prepare(  # type: ignore[no-untyped-def]
    staged,
    drawn,
    block_tables,
    token_ids,
    positions,
    slots,
    query_starts,
    context_lens,
    table_rows,
    logit_rows,
    num_tokens,
    num_sequences,
    num_rows,
    padded_tokens,
    padded_sequences,
    padded_rows,
    max_num_blocks,
    S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program per sequence writes its tokens' input, the last one the padding and the rows of logits."""
    sequence = tl.program_id(0)
    staged_starts = staged + num_tokens
    staged_contexts = staged_starts + num_sequences + 1
    staged_rows = staged_contexts + num_sequences
    if sequence < num_sequences:
        start = tl.load(staged_starts + sequence)
        end = tl.load(staged_starts + sequence + 1)
        context_len = tl.load(staged_contexts + sequence)
        row = tl.load(staged_rows + sequence)
        tl.store(query_starts + sequence, start)
        tl.store(context_lens + sequence, context_len)
        tl.store(table_rows + sequence, row)
        table = block_tables + row.to(tl.int64) * max_num_blocks
        for first in range(start, end, BLOCK):
            token = first + tl.arange(0, BLOCK)
            mask = token < end
            token_id = tl.load(staged + token, mask=mask, other=0).to(tl.int64)
            pending = tl.load(drawn - 1 - token_id, mask=mask & (token_id < 0), other=0)
            position = context_len - end + token
            block = tl.load(table + position // S, mask=mask, other=0).to(tl.int64)
            # A row that came to no numbers has drawn -1; what follows it is nobody's, but has to be a token.
            tl.store(token_ids + token, tl.where(token_id < 0, tl.maximum(pending, 0), token_id), mask=mask)
            tl.store(positions + token, position.to(tl.int64), mask=mask)
            tl.store(slots + token, block * S + position % S, mask=mask)
    elif sequence < padded_sequences:
        tl.store(query_starts + sequence, num_tokens)
        tl.store(context_lens + sequence, 0)
        tl.store(table_rows + sequence, 0)
    else:
        tl.store(query_starts + padded_sequences, num_tokens)
        for first in range(num_tokens, padded_tokens, BLOCK):
            token = first + tl.arange(0, BLOCK)
            mask = token < padded_tokens
            tl.store(token_ids + token, tl.zeros([BLOCK], tl.int64), mask=mask)
            tl.store(positions + token, tl.zeros([BLOCK], tl.int64), mask=mask)
            tl.store(slots + token, tl.full([BLOCK], -1, tl.int64), mask=mask)
        for first in range(0, padded_rows, BLOCK):
            index = first + tl.arange(0, BLOCK)
            value = tl.load(staged_rows + num_sequences + index, mask=index < num_rows, other=0)
            tl.store(logit_rows + index, value.to(tl.int64), mask=index < padded_rows)
