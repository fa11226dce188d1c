"""Building the engine from a model on disk: what settings and memory allow, kernel, KV cache, runner, scheduler.

Called once, on the engine thread. Each rank of a tensor-parallel group calls `load_model` in its process. What families
there are is the plan's affair (`model_plan`), and how a model lies on the disk is `model_files`'.
"""

import ctypes
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from headrace.kernels import cpu_backend, torch_ops
from headrace.kernels.backend import Backend
from headrace.kernels.cpu_backend import CpuBackend, Weight
from headrace.kernels.cpu_library import (
    InstructionSet,
    KernelUnavailableError,
    choose_instruction_set,
    load_library,
)
from headrace.kernels.decoder import Decoder, DecoderConfig, KVCache, ModelShape
from headrace.kernels.hf_decoder import HuggingFaceDecoder
from headrace.kernels.linear import is_reordered
from headrace.kernels.lora import Adapter
from headrace.kernels.ops import Ops
from headrace.kernels.quantised import QuantisedWeight
from headrace.kernels.tensor_parallel import Group
from headrace.kernels.torch_backend import TorchBackend
from headrace.scheduler.block_pool import BlockPool
from headrace.scheduler.config import EngineConfig, SchedulingPolicy
from headrace.scheduler.errors import CapacityError, HeadraceError, RankError
from headrace.scheduler.gguf_config import gguf_config
from headrace.scheduler.gguf_file import open_gguf
from headrace.scheduler.lockstep import LockstepBackend
from headrace.scheduler.lora_adapter import read_adapter
from headrace.scheduler.memory import available_bytes
from headrace.scheduler.messages import Tier
from headrace.scheduler.model_files import gguf_rope_factors, read_config, read_directory, read_gguf
from headrace.scheduler.model_plan import COMPACT_FAMILIES, ModelPlan, plan_model
from headrace.scheduler.model_runner import ModelRunner, Watch
from headrace.scheduler.model_source import cache_dir
from headrace.scheduler.ranks import Peers, Ranks
from headrace.scheduler.scheduler import Scheduler

logger = logging.getLogger(__name__)

# Between two tokens of a stream, for premium, standard and batch, where the settings say nothing.
_ITL_TARGETS_S = {"cpu": (0.15, 0.15, 0.15), "cuda": (0.04, 0.06, 0.25)}
# How far ahead of what is used the KV cache is touched in idle time, where nobody has said how large it shall be.
_TOUCHED_AHEAD_BYTES = 2**29
# How much of the memory that is free when the model has been read a bfloat16 copy of quantised weights may take.
_WIDE_COPY_SHARE = 0.1
# Shares of free memory the KV cache may take: a CPU's is shared with the user's other programs.
_KV_SHARE_CPU, _KV_SHARE_CUDA = 0.4, 0.85
# Free memory where the system does not tell.
_ASSUMED_BYTES = 4 * 2**30


@dataclass(frozen=True, slots=True)
class _Kernel:
    """The C++ kernel, loaded, and what it is to run."""

    library: ctypes.CDLL
    instruction_set: InstructionSet
    config: DecoderConfig


@dataclass(frozen=True, slots=True)
class _Attention:
    """A decoder's ops, flashinfer's wrapper where the attention is by it, and why not where it was asked for."""

    ops: Ops
    flashinfer_wrapper: Callable[..., Any] | None = None
    why_not: str = ""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that is ready to run, or a rank's part of one."""

    backend: Backend
    device: torch.device
    vocab_size: int
    num_blocks: int
    max_context_tokens: int
    description: str


def load_engine(config: EngineConfig, say: Callable[[str], None] = print) -> tuple[Scheduler, ModelRunner]:
    """Load the model and size the KV cache; `say` is told what takes long.

    Raises: UnsupportedModelError, ModelSourceError for the model; CapacityError where memory does not suffice, or the
    settings ask for what this machine has not got; RankError for what another rank raised.
    """
    watch: Watch | None = None
    if config.tensor_parallel_size == 1:
        model = load_model(config, say)
        backend = model.backend
    else:
        ranks = Ranks(config)
        try:
            model = load_model(config, say, ranks)
            ranks.wait_loaded()
        except Exception as error:
            # What waits for a rank that goes fails with it.
            reason = ranks.why_lost(timeout_s=0.0 if isinstance(error, HeadraceError) else 1.0)
            ranks.close()
            if reason is not None:
                raise RankError(reason) from error
            raise
        backend, watch = LockstepBackend(model.backend, ranks), ranks.watch
    runner = ModelRunner(
        backend,
        vocab_size=model.vocab_size,
        block_size=config.block_size,
        max_context_tokens=model.max_context_tokens,
        max_num_batched_tokens=config.max_num_batched_tokens,
        description=model.description,
        adapters=tuple(config.lora_adapters),
        gpu_uuid=f"GPU-{torch.cuda.get_device_properties(model.device).uuid}" if model.device.type == "cuda" else None,
        watch=watch,
    )
    scheduler = Scheduler(
        BlockPool(model.num_blocks),
        block_size=config.block_size,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_num_seqs=config.max_num_seqs,
        has_prefix_cache=config.enable_prefix_caching,
        policy=SchedulingPolicy(
            tier_weights=dict(zip(Tier, config.tier_weights, strict=True)),
            itl_targets_s=dict(zip(Tier, config.itl_targets_s or _ITL_TARGETS_S[model.device.type], strict=True)),
            one_shot_share=config.one_shot_share,
            # A device that is a step ahead does not know the tokens that a draft would follow.
            num_speculative_tokens=0 if runner.is_asynchronous else config.speculative_tokens,
            speculation_max_seqs=config.speculation_max_seqs,
        ),
    )
    return scheduler, runner


def load_model(config: EngineConfig, say: Callable[[str], None], peers: Peers | None = None) -> LoadedModel:
    """Load the model, or this rank's part of it; `peers` are met before the weights are read. Raises: as `load_engine`,
    and what `peers` do."""
    device = choose_device(config.device) if peers is None else _device_of_rank(config, peers.rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # of this thread: kernels are launched on the current one
    path = config.model_path
    file = open_gguf(path) if path.is_file() else None
    hf_config = read_config(path) if file is None else gguf_config(file)
    rope_factors = None if file is None else gguf_rope_factors(file)
    plan = plan_model(path, hf_config, rope_factors, 0 if peers is None else peers.rank, config.tensor_parallel_size)
    kernel, why_not = _choose_kernel(config, device, plan, say)
    dtype = torch.bfloat16 if kernel is not None else _choose_dtype(config, device)
    max_model_len = config.max_model_len or plan.shape.max_position
    if max_model_len > plan.shape.max_position:
        raise CapacityError(f"max_model_len: {max_model_len} is over the model's own {plan.shape.max_position}")
    _check_settings(config, device, dtype, is_gguf=file is not None)
    kv_dtype = {"auto": dtype, "int8": torch.int8, "fp8": torch.float8_e4m3fn}[config.kv_cache_dtype]
    attention = _choose_attention(config, device, plan.shape, dtype, kv_dtype)
    if kernel is not None:
        token_bytes = cpu_backend.kv_bytes_per_token(kernel.config, kv_dtype is torch.int8)
    else:
        token_bytes = plan.shape.kv_bytes_per_token(kv_dtype)
    if config.kv_cache_bytes is not None:  # wrong sizes are told before the weights are read
        _num_blocks(config, token_bytes, max_model_len, config.kv_cache_bytes)

    adapters = [read_adapter(folder, plan.linears) for folder in config.lora_adapters.values()]
    if plan.sharding is not None:
        adapters = [plan.sharding.take_adapter(adapter) for adapter in adapters]
    group = None if peers is None else peers.meet(device)
    if config.load_format == "dummy":
        weights = plan.random_weights(hf_config.tie_word_embeddings, dtype, device)
    else:
        keeps_quants = kernel is not None or (device.type == "cuda" and plan.decoder_config is not None)
        weights = (
            read_directory(path, plan.sharding)
            if file is None
            else read_gguf(file, dtype, keeps_quants=keeps_quants, sharding=plan.sharding)
        )
    plan.check(weights)
    decoder = None
    if kernel is None:
        decoder = plan.build(weights, dtype, device, attention.ops, config.quantization, adapters, group)
    if config.kv_cache_bytes is not None:
        cache_bytes = config.kv_cache_bytes
    else:
        cache_bytes = _free_bytes(device, config.tensor_parallel_size)
        if peers is not None:
            cache_bytes = peers.least(cache_bytes)
    num_blocks = _num_blocks(config, token_bytes, max_model_len, cache_bytes)
    what = f"{hf_config.model_type}, {len(plan.shape.kv_shapes)} layers in"
    backend: Backend
    if kernel is not None:
        backend, how = _with_kernel(config, kernel, weights, adapters, num_blocks, cache_bytes, what)
    else:
        assert decoder is not None
        cache = KVCache.allocate(plan.shape, num_blocks, config.block_size, kv_dtype, device)
        if attention.flashinfer_wrapper is not None:
            say("flashinfer compiles its kernels at the first start, which takes minutes")
        backend, how = _with_decoder(config, decoder, cache, attention, max_model_len, what, group)
        how += f" (no C++ kernel: {why_not})" if why_not else ""
    max_context_tokens = min(max_model_len, num_blocks * config.block_size)
    cache_gib = num_blocks * config.block_size * token_bytes / 2**30
    kv_name = "" if config.kv_cache_dtype == "auto" else f" in {config.kv_cache_dtype}"
    noise = "random weights; " if config.load_format == "dummy" else ""
    added = f"; LoRA adapters: {', '.join(config.lora_adapters)}" if adapters else ""
    ranks, each = ("", "") if group is None else (f"; {group.size} tensor-parallel ranks", " each")
    description = (
        f"{noise}{how}{added}{ranks}; KV cache {cache_gib:.2f} GiB{each}{kv_name}, {num_blocks} blocks of "
        f"{config.block_size} tokens; context {max_context_tokens} tokens"
    )
    return LoadedModel(backend, device, plan.shape.vocab_size, num_blocks, max_context_tokens, description)


def _with_kernel(
    config: EngineConfig,
    kernel: _Kernel,
    weights: dict[str, Weight],
    adapters: Sequence[Adapter],
    num_blocks: int,
    cache_bytes: int,
    what: str,
) -> tuple[Backend, str]:
    """The C++ kernel's backend, and what is said of it. Raises: CapacityError where memory does not suffice."""
    activation_bits = int(config.cpu_activations.removeprefix("int"))
    num_rows = 0 if config.batch_invariant else cpu_backend.most_integer_rows(kernel.library, activation_bits)
    has_wide_copy = num_rows < config.max_num_batched_tokens and _fits_wide_copy(weights)
    try:
        backend = CpuBackend(
            kernel.library,
            kernel.config,
            weights,
            num_blocks=num_blocks,
            block_size=config.block_size,
            max_num_batched_tokens=config.max_num_batched_tokens,
            num_threads=torch.get_num_threads(),
            is_kv_int8=config.kv_cache_dtype == "int8",
            is_batch_invariant=config.batch_invariant,
            activation_bits=activation_bits,
            has_wide_copy=has_wide_copy,
            touched_ahead_bytes=_TOUCHED_AHEAD_BYTES if config.kv_cache_bytes is None else cache_bytes,
            adapters=adapters,
        )
    except (OSError, MemoryError) as error:
        raise CapacityError(
            f"memory does not suffice for kv_cache_bytes {cache_bytes} and max_num_batched_tokens "
            f"{config.max_num_batched_tokens}: {error}"
        ) from error
    has_integers = num_rows > 0 and set(backend.weight_types) != {"bfloat16"}
    return backend, (
        f"packed {what} {', '.join(backend.weight_types)}"
        f"{f', {activation_bits}-bit activations' if has_integers else ''}"
        f"{' (a copy in bfloat16 for wide batches)' if has_wide_copy else ''} on cpu, "
        f"C++ kernel for {kernel.instruction_set.name}, {torch.get_num_threads()} threads"
    )


def _with_decoder(
    config: EngineConfig,
    decoder: Decoder | HuggingFaceDecoder,
    cache: KVCache,
    attention: _Attention,
    max_model_len: int,
    what: str,
    group: Group | None,
) -> tuple[Backend, str]:
    """The backend of a decoder on its device, and what is said of it."""
    is_packed = isinstance(decoder, Decoder)
    dtype, device = decoder.dtype, decoder.device
    quantised = f", weights in {config.quantization}" if config.quantization != "none" else ""
    backend: Backend
    if device.type == "cuda":
        from headrace.kernels.flashinfer_ops import KernelsMissingError
        from headrace.kernels.gpu_backend import GpuBackend

        backend = GpuBackend(
            decoder,
            cache,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_num_blocks=-(-max_model_len // config.block_size),
            group=group,
            flashinfer_wrapper=attention.flashinfer_wrapper,
        )
        if is_packed:  # what else runs in a forward of transformers cannot be known
            try:
                backend.capture()
            except KernelsMissingError as error:
                raise CapacityError(f"gpu_attention flashinfer: {error}") from error
        kernels = "Triton kernels, CUDA graphs" if is_packed else "Triton attention"
        if attention.flashinfer_wrapper is not None:
            kernels = "Triton kernels, flashinfer's attention, CUDA graphs" if is_packed else "flashinfer's attention"
        elif attention.why_not:
            kernels += f" (no flashinfer: {attention.why_not})"
    else:
        backend = TorchBackend(decoder, cache, torch_ops)
        linears = "prepacked linears" if is_packed and is_reordered(device, dtype) else "plain linears"
        kernels = f"torch ops, {linears}"
    maker = "packed" if is_packed else "transformers'"
    return backend, f"{maker} {what} {str(dtype).removeprefix('torch.')}{quantised} on {device}, {kernels}"


def _choose_kernel(
    config: EngineConfig, device: torch.device, plan: ModelPlan, say: Callable[[str], None]
) -> tuple[_Kernel | None, str]:
    """The C++ kernel where it can run this, else why not.

    Raises: CapacityError where the settings ask for it and it cannot.
    """
    needed_by = [
        name
        for name, needs_it in (
            (f"cpu_kernel {config.cpu_kernel}", config.cpu_kernel not in ("auto", "torch")),
            ("kv_cache_dtype int8", config.kv_cache_dtype == "int8" and device.type == "cpu"),
            ("batch_invariant", config.batch_invariant),
        )
        if needs_it
    ]
    if config.cpu_kernel == "torch":
        why_not = "cpu_kernel is torch"
    elif device.type != "cpu":
        why_not = f"the device is {device}"
    elif plan.decoder_config is None:
        why_not = f"it is for {', '.join(sorted(COMPACT_FAMILIES))}"
    elif config.tensor_parallel_size > 1:
        why_not = f"tensor_parallel_size is {config.tensor_parallel_size}"
    elif config.dtype not in ("auto", "bfloat16"):
        why_not = f"it computes in bfloat16, not {config.dtype}"
    else:
        why_not = cpu_backend.why_not(plan.decoder_config, config.block_size) or ""
        if not why_not:
            try:
                instruction_set = choose_instruction_set(config.cpu_kernel)
                library = load_library(instruction_set, cache_dir(), say)
                return _Kernel(library, instruction_set, plan.decoder_config), ""
            except KernelUnavailableError as error:
                why_not = str(error)
    if needed_by:
        raise CapacityError(f"{needed_by[0]} needs the C++ kernel for CPUs: {why_not}")
    # On another device or for another family nobody expects it.
    return None, why_not if device.type == "cpu" and plan.decoder_config is not None else ""


def _choose_attention(
    config: EngineConfig, device: torch.device, shape: ModelShape, dtype: torch.dtype, kv_dtype: torch.dtype
) -> _Attention:
    """What attends on this device, flashinfer where the settings ask for it and it can serve the model.

    Raises: CapacityError where they ask for what is not there.
    """
    is_asked = config.gpu_attention == "flashinfer"
    if device.type != "cuda":
        if is_asked:
            raise CapacityError(f"gpu_attention flashinfer needs a GPU, and the device is {device}")
        return _Attention(torch_ops)
    from headrace.kernels import flashinfer_ops, triton_ops

    if not is_asked:
        return _Attention(triton_ops)
    try:
        wrapper = flashinfer_ops.find_wrapper()
    except Exception as error:  # it loads a dozen others, which fail in their own ways where they do not fit
        raise CapacityError(f"gpu_attention flashinfer needs headrace[flashinfer]: {error}") from error
    if why_not := flashinfer_ops.why_not(shape, dtype, kv_dtype):
        logger.warning("attention in Triton: flashinfer cannot serve this model, %s", why_not)
        return _Attention(triton_ops, why_not=why_not)
    return _Attention(flashinfer_ops, wrapper)


def choose_device(device: str) -> torch.device:
    has_cuda = torch.cuda.is_available()
    if device.startswith("cuda") and not has_cuda:
        raise CapacityError(f"device {device} is set, but torch sees no GPU")
    if device == "auto":
        device = "cuda" if has_cuda else "cpu"
    # A thread's own device must be one of them by its number.
    return torch.device("cuda", 0) if device == "cuda" else torch.device(device)


def _device_of_rank(config: EngineConfig, rank: int) -> torch.device:
    """The GPUs of a group follow each other. Raises: CapacityError where there are too few."""
    device = choose_device(config.device)
    if device.type != "cuda":
        return device
    first, size = device.index or 0, config.tensor_parallel_size
    if first + size > torch.cuda.device_count():
        raise CapacityError(
            f"tensor_parallel_size {size} needs GPUs {first} to {first + size - 1}, and torch sees "
            f"{torch.cuda.device_count()}"
        )
    return torch.device("cuda", first + rank)


def _check_settings(config: EngineConfig, device: torch.device, dtype: torch.dtype, *, is_gguf: bool) -> None:
    """Raises: CapacityError where the device has no kernel for what the settings ask for, or they contradict."""
    is_cuda, is_fp8 = device.type == "cuda", config.quantization == "fp8"
    for name, value in (("kv_cache_dtype fp8", config.kv_cache_dtype), ("quantization fp8", config.quantization)):
        if value == "fp8" and (not is_cuda or torch.cuda.get_device_capability(device) < (8, 9)):
            raise CapacityError(f"{name} needs a GPU of compute capability 8.9 or later, and the device is {device}")
    if is_fp8 and dtype is not torch.bfloat16:
        raise CapacityError(f"quantization fp8 needs dtype bfloat16, not {str(dtype).removeprefix('torch.')}")
    if is_fp8 and is_gguf:
        raise CapacityError("quantization fp8 is for float checkpoints, and the model is a GGUF")
    if config.load_format == "dummy" and is_gguf:
        raise CapacityError("load_format dummy needs a directory with a config, and the model is a GGUF")
    if is_cuda and config.block_size.bit_count() != 1:
        raise CapacityError(f"block_size {config.block_size}: on a GPU it must be a power of two")


def _choose_dtype(config: EngineConfig, device: torch.device) -> torch.dtype:
    if config.dtype != "auto":
        return getattr(torch, config.dtype)  # type: ignore[no-any-return]
    if device.type != "cpu":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    has_bfloat16 = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return torch.bfloat16 if has_bfloat16 else torch.float32


def _fits_wide_copy(weights: dict[str, Weight]) -> bool:
    """Whether there are quantised weights, and memory for a bfloat16 copy of them is no matter."""
    num_bytes = sum(2 * math.prod(w.shape) for w in weights.values() if isinstance(w, QuantisedWeight))
    available = available_bytes()
    return num_bytes > 0 and available is not None and num_bytes <= _WIDE_COPY_SHARE * available


def _free_bytes(device: torch.device, num_ranks: int) -> int:
    """What the KV cache of a rank may take of the memory that is free now."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # of what loading held for a while
        return int(torch.cuda.mem_get_info(device)[0] * _KV_SHARE_CUDA)
    available = available_bytes()
    return int((_ASSUMED_BYTES if available is None else available) * _KV_SHARE_CPU / num_ranks)


def _num_blocks(config: EngineConfig, token_bytes: int, max_model_len: int, cache_bytes: int) -> int:
    """Blocks in so many bytes. Raises: CapacityError where they cannot hold what the settings ask for."""
    block_bytes = config.block_size * token_bytes
    # More than every running sequence at full length can never be used.
    num_useful = config.max_num_seqs * -(-max_model_len // config.block_size)
    num_blocks = min(cache_bytes // block_bytes, num_useful)
    num_slots = num_blocks * config.block_size
    if num_slots < 2:
        raise CapacityError(f"kv_cache_bytes: {cache_bytes} is too small, a block takes {block_bytes}")
    if config.max_model_len is not None and num_slots < config.max_model_len:
        raise CapacityError(
            f"kv_cache_bytes: {cache_bytes} holds {num_slots} tokens, less than max_model_len ({config.max_model_len})"
        )
    return num_blocks
