"""The compact families on a CPU: every step is one call into the C++ kernel of kernels/cpu.

Here are the kernel's structures as ctypes sees them, and the packing of weights into its layouts; kernels/cpu/README.md
explains both. All memory but scratch is owned here: the library holds pointers to it until it is closed.
"""

import contextlib
import ctypes
import itertools
import mmap
import time
import weakref
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from headrace.kernels.backend import HostRead, StepBatch
from headrace.kernels.decoder import DecoderConfig
from headrace.kernels.lora import Adapter, LowRank
from headrace.kernels.quantised import GROUP_BYTES, GROUP_SIZE, QuantisedWeight
from headrace.kernels.sampling import SamplingBatch
from headrace.kernels.step_times import StepTimes

Weight = torch.Tensor | QuantisedWeight
_Allocate = Callable[[int], npt.NDArray[np.uint8]]

# Weights are put side by side in pieces of memory of this size, at multiples of a cache line.
_CHUNK_BYTES, _ALIGNMENT = 2**26, 64
_HUGE_PAGE_BYTES = 2**21
# How many of a weight's panels are dequantised in one piece of idle time.
_PANELS_AT_ONCE = 8
# Rows of logits whose memory is kept from step to step; more are asked for by scored prompts only.
_MAX_KEPT_ROWS = 256
_PANEL = 32
_TILE_TOKENS = 16
_RANK_UNIT = 16
_FORMATS = {"bfloat16": 0, "Q4_0": 1, "Q4_1": 2, "Q8_0": 3}
_MAX_HEAD_DIM = 256
PHASES = ("embed", "norm", "qkv", "attention", "out", "gate_up", "down", "head")


class _Linear(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("format", ctypes.c_int64),
        ("num_inputs", ctypes.c_int64),
        ("num_panels", ctypes.c_int64),
    )


_LINEARS = ("query", "key", "value", "out", "gate", "up", "down")
# Their modules' names, in this order.
_MODULES = (*(f"self_attn.{name}_proj" for name in "qkvo"), *(f"mlp.{name}_proj" for name in ("gate", "up", "down")))


class _LowRank(ctypes.Structure):
    _fields_ = (
        ("down", ctypes.c_void_p),
        ("up", ctypes.c_void_p),
        ("rank", ctypes.c_int64),
        ("num_inputs", ctypes.c_int64),
    )


class _LayerAdapter(ctypes.Structure):
    _fields_ = (("targets", _LowRank * len(_LINEARS)),)


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _Linear) for name in _LINEARS),
        *((name, ctypes.c_void_p) for name in ("input_norm", "post_norm", "query_norm", "key_norm")),
        ("window", ctypes.c_int64),
        ("cache", ctypes.c_void_p),
    )


class _ModelConfig(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in (
                "vocab_size",
                "hidden_size",
                "num_heads",
                "num_kv_heads",
                "head_size",
                "intermediate_size",
                "num_layers",
                "max_tokens",
                "block_size",
                "num_threads",
                "is_kv_int8",
                "is_batch_invariant",
                "activation_bits",
            )
        ),
        ("rms_norm_eps", ctypes.c_float),
        ("rope_scale", ctypes.c_float),
        ("inv_freq", ctypes.c_void_p),
        ("final_norm", ctypes.c_void_p),
        ("embedding", _Linear),
        ("head", _Linear),
        ("layers", ctypes.c_void_p),
        ("num_adapters", ctypes.c_int64),
        ("adapters", ctypes.c_void_p),
    )


class _Batch(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("num_tokens", "num_sequences", "num_logit_rows")),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "token_ids",
                "query_lens",
                "context_lens",
                "block_starts",
                "blocks",
                "logit_rows",
                "logits",
                "argmax",
                "adapters",
                "argmax_only",
            )
        ),
    )


# A row of `sample`: struct RowSampling.
_ROW = np.dtype(
    [
        *((name, np.float32) for name in ("temperature", "top_p", "min_p", "repetition", "presence", "frequency")),
        ("top_k", np.int64),
        ("seed", np.uint64),
        *((name, np.int64) for name in ("choice", "position")),
        *((name, np.int64) for name in ("token_ids", "num_token_ids", "num_prompt_tokens")),
        *(
            (name, np.int64)
            for name in ("biased", "biases", "num_biased", "masked", "num_masked", "allowed", "is_known")
        ),
    ]
)


def why_not(config: DecoderConfig, block_size: int) -> str | None:
    """What of this model or setting the kernel cannot run, None where it can."""
    for is_wrong, text in (
        (config.hidden_size % _PANEL, f"hidden_size {config.hidden_size} is no multiple of {_PANEL}"),
        (config.intermediate_size % _PANEL, f"intermediate_size {config.intermediate_size} is no multiple of {_PANEL}"),
        (config.head_dim % 16, f"head_dim {config.head_dim} is no multiple of 16"),
        (config.head_dim > _MAX_HEAD_DIM, f"head_dim {config.head_dim} is over {_MAX_HEAD_DIM}"),
        (config.num_heads * config.head_dim % _PANEL, f"the heads' size together is no multiple of {_PANEL}"),
        (block_size % _TILE_TOKENS, f"block_size {block_size} is no multiple of {_TILE_TOKENS}"),
    ):
        if is_wrong:
            return text
    return None


def most_integer_rows(library: ctypes.CDLL, activation_bits: int) -> int:
    """Up to how many rows of a step quantised weights are multiplied as integers, `is_batch_invariant` apart."""
    return int(library.headrace_most_integer_rows(activation_bits))


def kv_bytes_per_token(config: DecoderConfig, is_kv_int8: bool) -> int:
    """Bytes of KV cache that a token takes in all layers."""
    return len(config.windows) * config.num_kv_heads * _kv_bytes_per_head(config, is_kv_int8)


def _kv_bytes_per_head(config: DecoderConfig, is_kv_int8: bool) -> int:
    padded = _round_up(config.head_dim)
    return 2 * padded + 2 * 4 if is_kv_int8 else 2 * padded * 2  # int8 has a float32 scale for key and value


def _round_up(size: int) -> int:
    return -(-size // _PANEL) * _PANEL


class CpuBackend:
    """A packed model in the kernel, with its KV cache. `close` frees its threads and scratch; so does collection.

    Raises: OSError, MemoryError where memory or threads do not suffice.
    `weights` maps Hugging Face's names to tensors [out, in] or quantised weights, and is emptied as they are packed.
    `times` are the last step's.
    """

    is_asynchronous = False

    def __init__(
        self,
        library: ctypes.CDLL,
        config: DecoderConfig,
        weights: dict[str, Weight],
        *,
        num_blocks: int,
        block_size: int,
        max_num_batched_tokens: int,
        num_threads: int,
        is_kv_int8: bool = False,
        is_batch_invariant: bool = False,
        activation_bits: int = 8,
        has_wide_copy: bool = False,
        touched_ahead_bytes: int = 0,
        adapters: Sequence[Adapter] = (),
    ) -> None:
        self._library = library
        self._vocab_size = config.vocab_size
        self._num_blocks, self._block_size = num_blocks, block_size
        self._packer = packer = _Packer()
        cache_bytes = num_blocks * block_size * config.num_kv_heads * _kv_bytes_per_head(config, is_kv_int8)
        caches: list[npt.NDArray[np.uint8]] = []
        embedding = packer.linear(weights.pop("model.embed_tokens.weight"))
        head = weights.pop("lm_head.weight", None)
        layers = (_Layer * len(config.windows))()
        for i, window in enumerate(config.windows):
            _pack_layer(packer, layers[i], weights, f"model.layers.{i}", config)
            layers[i].window = window or 0
            caches.append(_allocate(cache_bytes))
            layers[i].cache = packer.keep(caches[-1])
        self._num_adapters = len(adapters)
        layer_adapters = (_LayerAdapter * (len(adapters) * len(layers)))()
        for i, (adapter, layer) in enumerate(itertools.product(adapters, range(len(layers)))):
            _pack_adapter(packer, layer_adapters[i], adapter, f"model.layers.{layer}", config)
        model = _ModelConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_size=config.head_dim,
            intermediate_size=config.intermediate_size,
            num_layers=len(config.windows),
            max_tokens=max_num_batched_tokens,
            block_size=block_size,
            num_threads=num_threads,
            is_kv_int8=is_kv_int8,
            is_batch_invariant=is_batch_invariant,
            activation_bits=activation_bits,
            rms_norm_eps=config.rms_norm_eps,
            rope_scale=config.rope_scale,
            inv_freq=packer.vector(config.inv_freq),
            final_norm=packer.vector(weights.pop("model.norm.weight")),
            embedding=embedding,
            head=embedding if head is None else packer.linear(head),
            layers=ctypes.addressof(layers),
            num_adapters=len(adapters),
            adapters=ctypes.addressof(layer_adapters),
        )
        self.weight_bytes = packer.weight_bytes
        self.weight_types = sorted(packer.weight_types)
        handle = library.headrace_create(ctypes.byref(model))
        if handle is None:
            raise MemoryError("the CPU kernel's buffers or threads do not fit this machine")
        self._handle = handle
        self._max_tokens = max_num_batched_tokens
        # numpy's pages come on first touch: rows of logits that nobody asks for cost nothing.
        self._logits = np.zeros((min(max_num_batched_tokens, _MAX_KEPT_ROWS), config.vocab_size), np.float32)
        self._argmax = np.empty(0, np.int64)  # of the last forward's rows
        self._cache_use = _CacheUse()
        wide = _widen(library, handle, packer, layers, model.head) if has_wide_copy else iter(())
        ahead = _touch_ahead(caches, num_blocks, self._cache_use, touched_ahead_bytes)
        self._idle_work = itertools.chain(wide, ahead)  # which knows nothing of this object, for it to be freed at once
        self.times: StepTimes | None = None
        self._times = np.zeros(2)  # began, ended: the kernel writes them
        self._lock_wait_s = 0.0  # after the calls of this step
        self.close = weakref.finalize(self, library.headrace_destroy, handle)

    def forward(self, batch: StepBatch) -> torch.Tensor:
        num_rows = len(batch.logit_rows)
        is_kept = num_rows <= len(self._logits)
        logits = self._logits[:num_rows] if is_kept else np.empty((num_rows, self._vocab_size), np.float32)
        self._argmax = self._step(batch, logits)
        return torch.from_numpy(logits)

    def argmax(self, batch: StepBatch) -> torch.Tensor:
        return torch.from_numpy(self._step(batch, None))

    def sample(self, logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
        assert self.close.alive, "the backend is closed"
        assert logits.shape == (len(batch.seed), self._vocab_size), "logits of another shape"
        assert logits.is_contiguous(), "logits with gaps"
        rows = np.zeros(len(logits), _ROW)
        for name in ("temperature", "top_p", "min_p", "top_k", "seed", "choice", "position"):
            rows[name] = getattr(batch, name)
        rows["repetition"] = 1
        for penalties in batch.penalties:
            row = rows[penalties.row]
            self._check(penalties.token_ids)
            row["repetition"], row["presence"] = penalties.repetition, penalties.presence
            row["frequency"], row["num_prompt_tokens"] = penalties.frequency, penalties.num_prompt_tokens
            row["token_ids"], row["num_token_ids"] = penalties.token_ids.ctypes.data, len(penalties.token_ids)
        for index, token_ids, biases in batch.biased:
            row = rows[index]
            self._check(token_ids)
            row["biased"], row["biases"], row["num_biased"] = token_ids.ctypes.data, biases.ctypes.data, len(biases)
        for index, token_ids in batch.masked:
            self._check(token_ids)
            rows[index]["masked"], rows[index]["num_masked"] = token_ids.ctypes.data, len(token_ids)
        for index, mask in batch.allowed:
            assert mask.dtype == np.uint32, "a mask of other words"
            assert len(mask) == -(-self._vocab_size // 32), "a mask of another vocabulary"
            rows[index]["allowed"] = mask.ctypes.data
        token_ids = np.empty(len(rows), np.int64)
        if batch.argmax_only is not None:
            rows["is_known"] = batch.argmax_only
            token_ids[batch.argmax_only] = self._argmax[: len(rows)][batch.argmax_only]
        status = self._library.headrace_sample(
            self._handle,
            rows.ctypes.data,
            len(rows),
            logits.data_ptr(),
            token_ids.ctypes.data,
            self._times.ctypes.data,
        )
        self._note_times()
        if status:
            raise MemoryError("sampling ran out of memory")
        return torch.from_numpy(token_ids)

    def read(self, tensors: Sequence[torch.Tensor]) -> HostRead:
        return HostRead([*tensors], self.times)

    def use_idle_time(self) -> bool:
        """A piece of the wide copy, then of the KV cache that will be needed next."""
        assert self.close.alive, "the backend is closed"
        return next(self._idle_work, False)

    def recover(self) -> None:
        pass

    def _check(self, token_ids: npt.NDArray[np.int64]) -> None:
        if len(token_ids) and not 0 <= token_ids.min() <= token_ids.max() < self._vocab_size:
            raise IndexError(f"a token id is not within 0 .. {self._vocab_size - 1}")

    def profile(self) -> dict[str, float]:
        """Seconds that the calling thread has spent in each kind of phase since the model was packed."""
        seconds = np.zeros(len(PHASES))
        self._library.headrace_profile(self._handle, seconds.ctypes.data)
        return dict(zip(PHASES, seconds.tolist(), strict=True))

    def _step(self, batch: StepBatch, logits: npt.NDArray[np.float32] | None) -> npt.NDArray[np.int64]:
        def array(values: Sequence[int]) -> npt.NDArray[np.int64]:
            return np.array(values, np.int64)

        assert self.close.alive, "the backend is closed"
        token_ids, query_lens, context_lens = array(batch.token_ids), array(batch.query_lens), array(batch.context_lens)
        logit_rows, table_lens = array(batch.logit_rows), array([*map(len, batch.block_tables)])
        blocks = np.fromiter(itertools.chain.from_iterable(batch.block_tables), np.int32)
        block_starts = np.cumsum(table_lens) - table_lens
        self._check(token_ids)
        # The kernel trusts these, and writes where they lead.
        assert len(token_ids) == query_lens.sum() <= self._max_tokens, "more tokens than the step has room for"
        assert len(logit_rows) <= self._max_tokens, "more rows of logits than there is room for"
        assert ((logit_rows >= 0) & (logit_rows < len(token_ids))).all(), "logits of a row that does not exist"
        assert batch.argmax_only is None or batch.argmax_only.shape == (len(logit_rows),), "flags of other rows"
        assert ((query_lens >= 1) & (query_lens <= context_lens)).all(), "a row without tokens"
        assert (context_lens <= table_lens * self._block_size).all(), "a block table is too short"
        adapters = array(batch.adapters) if any(batch.adapters) else None
        if adapters is not None:
            assert len(adapters) == len(query_lens), "adapters of more or fewer sequences"
            assert ((adapters >= 0) & (adapters <= self._num_adapters)).all(), "an adapter that does not exist"
        last_block = int(blocks.max())
        assert 0 <= blocks.min() <= last_block < self._num_blocks, "a block that does not exist"
        self._cache_use.num_blocks = max(self._cache_use.num_blocks, last_block + 1)
        argmax = np.empty(len(batch.logit_rows), np.int64)
        step = _Batch(
            len(token_ids),
            len(query_lens),
            len(logit_rows),
            token_ids.ctypes.data,
            query_lens.ctypes.data,
            context_lens.ctypes.data,
            block_starts.ctypes.data,
            blocks.ctypes.data,
            logit_rows.ctypes.data,
            None if logits is None else logits.ctypes.data,
            argmax.ctypes.data,
            None if adapters is None else adapters.ctypes.data,
            None if batch.argmax_only is None else batch.argmax_only.ctypes.data,
        )
        self._lock_wait_s = 0.0
        status = self._library.headrace_step(self._handle, ctypes.byref(step), self._times.ctypes.data)
        self._note_times()
        if status:
            raise MemoryError("a step ran out of memory")
        return argmax

    def _note_times(self) -> None:
        now = time.monotonic()
        began_s, ended_s = self._times.tolist()
        self._lock_wait_s += now - ended_s
        self.times = StepTimes(began_s, ended_s, self._lock_wait_s)


class _CacheUse:
    """How many blocks of the cache, from its beginning on, have held something."""

    num_blocks = 0


def _touch_ahead(
    caches: list[npt.NDArray[np.uint8]], num_blocks: int, use: _CacheUse, num_bytes: int
) -> Iterator[bool]:
    """Touch each layer's next huge page, until so many bytes are ahead of what is used.

    A page's first touch, which the system answers with a cleared one, can cost a virtual machine more than all that is
    computed into it.
    """
    block_bytes = len(caches[0]) // num_blocks
    num_ahead = num_bytes // (block_bytes * len(caches))
    step = max(1, _HUGE_PAGE_BYTES // block_bytes)
    for first in range(0, num_blocks, step):
        for cache in caches:
            while first >= use.num_blocks + num_ahead:
                yield False
            if first >= use.num_blocks:  # nothing of it holds anything yet
                cache[first * block_bytes : (first + step) * block_bytes] = 0
                yield True


def _widen(
    library: ctypes.CDLL, handle: int, packer: "_Packer", layers: "ctypes.Array[_Layer]", head: _Linear
) -> Iterator[bool]:
    """Make the copy of quantised weights that steps of many rows use once it is whole: the same values as they would
    make of each panel each time."""
    wide_layers, wide_head = type(layers).from_buffer_copy(layers), _Linear.from_buffer_copy(head)
    linears = [getattr(layer, name) for layer in wide_layers for name in _LINEARS] + [wide_head]
    quantised = [linear for linear in linears if linear.format != _FORMATS["bfloat16"]]
    # Promised now, so that what does not fit is told at the start; it takes memory when it is written.
    sizes = [linear.num_inputs * _PANEL * 2 for linear in quantised]
    copies = [
        packer.keep(packer.allocate(linear.num_panels * size)) for linear, size in zip(quantised, sizes, strict=True)
    ]

    def work() -> Iterator[bool]:
        for linear, size, copy in zip(quantised, sizes, copies, strict=True):
            for first in range(0, linear.num_panels, _PANELS_AT_ONCE):
                count = min(_PANELS_AT_ONCE, linear.num_panels - first)
                library.headrace_dequantise(ctypes.byref(linear), first, count, copy + first * size)
                yield True
        for linear, copy in zip(quantised, copies, strict=True):
            linear.data, linear.format = copy, _FORMATS["bfloat16"]
        if library.headrace_use_wide(handle, wide_layers, ctypes.byref(wide_head)):
            raise MemoryError("the wide copy of the weights ran out of memory")

    return work()


class _Packer:
    """Lays weights out as the kernel reads them (struct Linear in kernels/cpu/matmul.h), and keeps their memory."""

    def __init__(self) -> None:
        self._kept: list[npt.NDArray[np.generic]] = []
        self._chunk = np.empty(0, np.uint8)  # what is left of it
        self.weight_bytes = 0
        self.weight_types: set[str] = set()

    def allocate(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        """Memory for a weight, behind the one before it: most alone are smaller than a huge page."""
        size = -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        if size > len(self._chunk):
            self._chunk = _allocate(max(size, _CHUNK_BYTES))
        memory, self._chunk = self._chunk[:num_bytes], self._chunk[size:]
        return memory

    def keep(self, memory: npt.NDArray[np.generic]) -> int:
        self._kept.append(memory)
        return memory.ctypes.data

    def vector(self, values: Weight | None) -> int | None:
        """A float32 copy of a norm's weight."""
        if values is None:
            return None
        assert isinstance(values, torch.Tensor)
        return self.keep(values.float().numpy().copy())

    def linear(self, weight: Weight, bias: torch.Tensor | None = None, head_dim: int | None = None) -> _Linear:
        """With `head_dim` every head's rows are padded to whole panels; else all rows are, together."""
        num_rows, num_inputs = weight.shape
        unit = head_dim or num_rows
        padded = num_rows // unit * _round_up(unit)
        packed_bias = None
        if bias is not None:
            packed_bias = self.keep(_pad_rows(bias.float().numpy()[:, None], unit).copy())
        if isinstance(weight, QuantisedWeight):
            data, type_name = _pack_quantised(weight, unit, self.allocate), weight.type_name
        else:
            data, type_name = _pack_bfloat16(weight, unit, self.allocate), "bfloat16"
        self.weight_types.add(type_name)
        self.weight_bytes += data.nbytes
        return _Linear(self.keep(data), packed_bias, _FORMATS[type_name], num_inputs, padded // _PANEL)

    def low_rank(self, part: LowRank, head_dim: int | None = None) -> _LowRank:
        """What is added to a weight, whose rows are padded as `linear` does."""
        num_missing = -part.rank % _RANK_UNIT
        down = F.pad(part.down, (0, 0, 0, num_missing)).to(torch.bfloat16)
        kept_down = self.allocate(down.nbytes)
        kept_down.view(np.int16).reshape(down.shape)[:] = down.view(torch.int16).numpy()
        up = _pack_bfloat16(F.pad(part.up, (0, num_missing)), head_dim or len(part.up), self.allocate)
        return _LowRank(self.keep(kept_down), self.keep(up), *down.shape)


def _pack_layer(packer: _Packer, layer: _Layer, weights: dict[str, Weight], prefix: str, config: DecoderConfig) -> None:
    def linear(name: str, head_dim: int | None = None) -> _Linear:
        bias = weights.pop(f"{prefix}.{name}.bias", None)
        assert not isinstance(bias, QuantisedWeight)
        return packer.linear(weights.pop(f"{prefix}.{name}.weight"), bias, head_dim)

    layer.query = linear("self_attn.q_proj", config.head_dim)
    layer.key = linear("self_attn.k_proj", config.head_dim)
    layer.value = linear("self_attn.v_proj", config.head_dim)
    layer.out = linear("self_attn.o_proj")
    layer.gate, layer.up, layer.down = linear("mlp.gate_proj"), linear("mlp.up_proj"), linear("mlp.down_proj")
    layer.input_norm = packer.vector(weights.pop(f"{prefix}.input_layernorm.weight"))
    layer.post_norm = packer.vector(weights.pop(f"{prefix}.post_attention_layernorm.weight"))
    layer.query_norm = packer.vector(weights.pop(f"{prefix}.self_attn.q_norm.weight", None))
    layer.key_norm = packer.vector(weights.pop(f"{prefix}.self_attn.k_norm.weight", None))


def _pack_adapter(packer: _Packer, layer: _LayerAdapter, adapter: Adapter, prefix: str, config: DecoderConfig) -> None:
    for i, name in enumerate(_MODULES):
        if (part := adapter.get(f"{prefix}.{name}")) is not None:
            has_heads = name.endswith(("q_proj", "k_proj", "v_proj"))
            layer.targets[i] = packer.low_rank(part, config.head_dim if has_heads else None)


def _pad_rows(rows: npt.NDArray[np.generic], unit: int) -> npt.NDArray[np.generic]:
    """Add zeros behind every `unit` rows, up to whole panels."""
    if unit % _PANEL == 0:
        return rows
    units = rows.reshape(-1, unit, rows.shape[1])
    return np.pad(units, ((0, 0), (0, -unit % _PANEL), (0, 0))).reshape(-1, rows.shape[1])


def _pack_bfloat16(weight: torch.Tensor, unit: int, allocate: _Allocate) -> npt.NDArray[np.generic]:
    """[panels, K / 2, 32 columns, 2 inputs]: a pair of inputs is an int32 here."""
    pairs = _pad_rows(weight.to(torch.bfloat16).contiguous().view(torch.int32).numpy(), unit)
    columns = torch.from_numpy(pairs).view(-1, _PANEL, pairs.shape[1])
    packed = allocate(pairs.nbytes)
    torch.from_numpy(packed.view(np.int32)).view(-1, pairs.shape[1], _PANEL).copy_(columns.transpose(1, 2))
    return packed


def _pack_quantised(weight: QuantisedWeight, unit: int, allocate: _Allocate) -> npt.NDArray[np.generic]:
    """Records [half panels, K / 32] of 16 columns: quants [K / 4 of the group, 16, 4], scales [16], minima [16]."""
    group_bytes = GROUP_BYTES[weight.type_name]
    rows = _pad_rows(weight.rows, unit)
    groups = rows.reshape(len(rows) // 16, 16, weight.shape[1] // GROUP_SIZE, group_bytes)
    num_scales = 2 if weight.type_name == "Q4_1" else 1
    num_quants = group_bytes - 2 * num_scales
    packed = allocate(groups.size // group_bytes * group_bytes)
    records = packed.reshape(groups.shape[0], groups.shape[2], 16 * group_bytes)
    quants = np.ascontiguousarray(groups[..., 2 * num_scales :])
    if weight.type_name == "Q8_0":
        quants ^= 0x80  # the kernel multiplies unsigned quants: 128 is added
    records[..., : 16 * num_quants] = _in_order(quants, 4).reshape(*records.shape[:2], -1)
    scales = np.ascontiguousarray(groups[..., : 2 * num_scales])
    records[..., 16 * num_quants :] = _in_order(scales, 2).reshape(*records.shape[:2], -1)
    return packed


def _in_order(groups: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.uint8]:
    """[halves, 16, K / 32, parts * size] -> [halves, K / 32, parts, 16, size]."""
    units = groups.view(np.dtype(f"u{size}"))
    return np.ascontiguousarray(units.transpose(0, 2, 3, 1)).view(np.uint8)


def _allocate(num_bytes: int) -> npt.NDArray[np.uint8]:
    """Zeros that cost memory on first touch, in huge pages where the system has them: fewer misses on the way."""
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a system without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)
