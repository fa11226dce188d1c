"""What a GPU does in a step: ceilings, and steps of a model of random weights beside them; run by `gpu_report`.

`python -m headrace.benchmarks.gpu_measurements parity|ceilings|steps|flashinfer JSON` prints one JSON object as its
last line. A step is timed by events on the device, from its input's arrival to its tokens' departure, on a cache full
of noise. The floor of a decode step is the bytes it must read (weights but the embedding, the context's keys and
values) at the speed of a large copy, counting bytes read and written.
"""

import copy
import functools
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from headrace.kernels import flashinfer_ops, reference, triton_ops, triton_sampling
from headrace.kernels.backend import StepBatch
from headrace.kernels.decoder import KVCache, ModelShape
from headrace.kernels.flashinfer_ops import MakeWrapper
from headrace.kernels.gpu_backend import GpuBackend
from headrace.kernels.gpu_linear import GpuLinear
from headrace.kernels.ops import AttentionMetadata, HeadNorms, Hidden
from headrace.kernels.triton_linear import Weight, dequantise, pack_groups, quantise_fp8
from headrace.scheduler.config import EngineConfig
from headrace.scheduler.lockstep import LockstepBackend
from headrace.scheduler.model_loader import load_engine
from headrace.scheduler.model_runner import ModelRunner
from headrace.scheduler.scheduler import Scheduler

_COPY_BYTES = 2**32
_MATRIX_SIZE = 8192
_BLOCK_SIZE = 16
_NUM_REPEATS = 20


def main() -> None:
    section, options = sys.argv[1], json.loads(sys.argv[2])
    sections: dict[str, Callable[..., dict[str, Any]]] = {
        "parity": parity,
        "ceilings": _ceilings,
        "steps": _steps,
        "flashinfer": _flashinfer,
    }
    results = sections[section](**options)
    print(json.dumps(results))


def parity(
    hidden_size: int = 4096, num_out: int = 6144, vocab_size: int = 128256, device: str = "cuda"
) -> dict[str, Any]:
    """How far each kernel is from its reference, in bfloat16 on random data: |out - reference| / |reference|."""
    torch.manual_seed(0)

    def noise(*shape: int, spread: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, device=device) * spread).bfloat16()

    errors: dict[str, float] = {}
    x, weight = noise(33, hidden_size), noise(hidden_size)
    errors["rms_norm"] = _error(triton_ops.rms_norm(x, weight, 1e-5), reference.rms_norm(x.double(), weight, 1e-5))
    gate_up = noise(33, 2 * num_out)
    errors["silu_mul"] = _error(triton_ops.silu_mul(gate_up), reference.silu_mul(gate_up.float()))
    for cache_dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.int8):
        name = str(cache_dtype).removeprefix("torch.")
        errors |= {f"{op}, {name} cache": error for op, error in _attention_errors(noise, cache_dtype).items()}
    for num_rows in (1, 16, 64, 200):
        errors |= {
            f"{op}, {num_rows} rows": error
            for op, error in _product_errors(noise, num_rows, hidden_size, num_out).items()
        }
    logits = torch.randn(64, vocab_size, device=device) * 3
    errors["argmax, share of wrong tokens"] = _wrong(triton_sampling.argmax(logits), logits.argmax(-1))
    ones, uniform = torch.ones(64, device=device), torch.rand(64, device=device)
    no_top_k = torch.zeros(64, dtype=torch.int32, device=device)
    cumulative = logits.double().softmax(-1).cumsum(-1)
    expected = torch.searchsorted(cumulative, uniform.double()[:, None] * cumulative[:, -1:], right=True).flatten()
    drawn = triton_sampling.sample(logits, ones, no_top_k, ones, 0 * ones, uniform, has_filters=False)
    errors["sampling, share of wrong tokens"] = _wrong(drawn, expected)
    probs, order = logits.double().softmax(-1).sort(descending=True, stable=True)
    rank = torch.arange(vocab_size, device=device)
    for name, top_k, top_p, min_p in (("top-p", 0, 0.9, 0.0), ("top-k", 50, 1.0, 0.0), ("min-p", 0, 1.0, 0.05)):
        kept = (probs.cumsum(-1) - probs < top_p) & (rank < (top_k or vocab_size)) & (probs >= min_p * probs[:, :1])
        inside = torch.zeros_like(kept).scatter_(1, order, kept)
        drawn = triton_sampling.sample(logits, ones, no_top_k + top_k, top_p * ones, min_p * ones, uniform)
        cumulative = torch.where(inside, logits.double().softmax(-1), 0).cumsum(-1)
        expected = torch.searchsorted(cumulative, uniform.double()[:, None] * cumulative[:, -1:], right=True).flatten()
        errors[f"sampling with {name}, share of wrong tokens"] = _wrong(drawn, expected)
    return errors


def _wrong(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found != expected).double().mean())


def _product_errors(noise: Callable[..., torch.Tensor], num_rows: int, num_in: int, num_out: int) -> dict[str, float]:
    """Products of each kind of weight: of a norm, of a norm through the gate, and added to the residual stream."""
    x, residual, eps = noise(num_rows, num_in), noise(num_rows, num_out), 1e-5
    normed = reference.rms_norm(x.float(), torch.ones(num_in, device=x.device), eps)
    integers = torch.randint(0, 16, (num_out, num_in), dtype=torch.uint8, device=x.device)
    scales, minimums = (noise(num_out, num_in // 32, spread=0.002).half() for _ in range(2))
    plain = noise(num_out, num_in, spread=num_in**-0.5)
    weights: dict[str, Weight] = {
        "bfloat16": plain,
        "fp8": quantise_fp8(plain),
        "4 bits": pack_groups(integers.cpu(), scales.cpu(), 32, minimums=minimums.cpu(), device=x.device),
    }
    errors = {}
    for name, weight in weights.items():
        dense = dequantise(weight).float()
        linear = GpuLinear(weight)
        errors[f"norm and product, {name}"] = _error(linear.of_norm(Hidden(x), eps), normed @ dense.T)
        gated = reference.silu_mul(normed @ dense.T)
        errors[f"norm, product and gate, {name}"] = _error(linear.of_norm(Hidden(x), eps, is_gated=True), gated)
        added = linear.added_to(x, Hidden(residual))
        errors[f"product and sum, {name}"] = _error(added.values, residual.float() + x.float() @ dense.T)
        if added.squares is not None:
            squares = added.values.float().pow(2).sum(-1)
            errors[f"squares of that, {name}"] = _error(added.squares.sum(0), squares)
    return errors


def _attention_errors(
    noise: Callable[..., torch.Tensor],
    cache_dtype: torch.dtype,
    num_heads: int = 32,
    num_kv_heads: int = 8,
    head_dim: int = 128,
) -> dict[str, float]:
    """Rope and cache, then decoding, chunks and prompts side by side over it, with all that bounds what they see."""
    num_blocks = 200
    rows = [(1, 700), (1, 17), (60, 60), (33, 290), (1, 1)]
    shape = ModelShape(1, 4096, ((num_kv_heads, head_dim),))
    caches = [KVCache.allocate(shape, num_blocks, _BLOCK_SIZE, cache_dtype, noise(1).device) for _ in range(2)]
    order = torch.randperm(num_blocks).tolist()
    starts, tables = [0], []
    for num_query, context in rows:
        starts.append(starts[-1] + num_query)
        tables.append([order.pop() for _ in range(-(-context // _BLOCK_SIZE))])
    metadata = AttentionMetadata(starts, [context for _, context in rows], tables)
    slots = torch.tensor([b * _BLOCK_SIZE + i for table in tables for b in table for i in range(_BLOCK_SIZE)])
    slots = slots.to(noise(1).device)
    qkv = noise(len(slots), num_heads + 2 * num_kv_heads, head_dim)
    angles = torch.rand(len(slots), head_dim // 2, device=slots.device) * 6
    outputs: list[list[torch.Tensor]] = []
    errors = {}
    norms = HeadNorms(noise(head_dim), noise(head_dim), 1e-6)
    variants: dict[str, dict[str, Any]] = {
        "attention": {},
        "attention in a window": {"window": 24},
        "attention with softcap and sinks": {"softcap": 5.0, "sinks": noise(num_heads)},
    }
    for ops, cache in ((triton_ops, caches[0]), (reference, caches[1])):
        q = ops.rope_and_write_kv(qkv.clone(), None, angles.cos(), angles.sin(), cache.layers[0], slots)
        plan: Any = ops.plan_attention(metadata, _BLOCK_SIZE, q.device)
        q = q[: starts[-1]].clone()
        scale = head_dim**-0.5
        attended = [ops.paged_attention(q, cache.layers[0], plan, scale, **options) for options in variants.values()]
        none = torch.full_like(slots, -1)
        normed = ops.rope_and_write_kv(qkv.clone(), norms, angles.cos(), angles.sin(), cache.layers[0], none)
        outputs.append([q, normed, *attended])
    for name, found, expected in zip(("rope", "norm and rope", *variants), *outputs, strict=True):
        errors[name] = _error(found, expected)
    stored = [cache.layers[0].keys.float() for cache in caches]
    errors["keys stored"] = _error(stored[0], stored[1])
    if cache_dtype is not torch.int8 and _find_flashinfer() is not None:
        plan = flashinfer_ops.plan_attention(metadata, _BLOCK_SIZE, noise(1).device)
        q, _, *attended = outputs[1]
        for (name, options), expected in zip(variants.items(), attended, strict=True):
            found = flashinfer_ops.paged_attention(q, caches[1].layers[0], plan, head_dim**-0.5, **options)
            errors[f"{name} by flashinfer"] = _error(found, expected)
    return errors


def _find_flashinfer() -> MakeWrapper | None:
    try:
        return flashinfer_ops.find_wrapper()
    except ImportError:
        return None


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def _ceilings() -> dict[str, Any]:
    source = torch.randint(-128, 127, (_COPY_BYTES,), dtype=torch.int8, device="cuda")
    copy_s = _median_s(functools.partial(torch.empty_like(source).copy_, source))
    a, b = (torch.randn(_MATRIX_SIZE, _MATRIX_SIZE, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    product_s = _median_s(functools.partial(torch.mm, a, b))
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "num_multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "copy_gb_per_s": 2 * _COPY_BYTES / copy_s / 1e9,
        "matrix_tflop_per_s": 2 * _MATRIX_SIZE**3 / product_s / 1e12,
    }


def _median_s(run: Callable[[], object]) -> float:
    for _ in range(3):
        run()
    times = []
    for _ in range(_NUM_REPEATS):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        run()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended) / 1e3)
    return float(statistics.median(times))


def _steps(
    model: str,
    decode: list[tuple[int, int]],
    prefill: list[tuple[int, int]],
    copy_gb_per_s: float,
    matrix_tflop_per_s: float,
    **settings: Any,
) -> dict[str, Any]:
    """Time decode steps of (sequences, context) and prompt chunks of (tokens, context they end at). Of several ranks it
    is the first one's share that is counted."""
    _, scheduler, runner = _load(model, decode, prefill, settings)
    backend: Any = runner.backend
    own: Any = backend.own if isinstance(backend, LockstepBackend) else backend
    num_blocks = scheduler.load().num_total_blocks
    decoder = own._decoder
    products = [product for layer in decoder._layers for product in (layer.qkv, layer.out, layer.gate_up, layer.down)]
    weight_bytes = sum(linear.num_bytes for linear in (*(product.linear for product in products), decoder._head))
    kv_bytes = (
        sum(
            tensor[0].numel() * tensor.element_size()
            for layer in own._cache.layers
            for tensor in layer
            if tensor is not None
        )
        // _BLOCK_SIZE
    )
    rows = []
    for width, context in decode:
        row: dict[str, Any] = {"sequences": width, "context": context}
        rows.append(row)
        if width * -(-context // _BLOCK_SIZE) > num_blocks:
            row["error"] = "no room in memory"
            continue
        step_s, gap_s = _decode_s(backend, width, context, num_blocks)
        floor_s = (weight_bytes + width * context * kv_bytes) / (copy_gb_per_s * 1e9)
        row |= {"step_ms": step_s * 1e3, "gap_ms": gap_s * 1e3, "floor_ms": floor_s * 1e3, "of_floor": floor_s / step_s}
    chunks = []
    for num_tokens, context in prefill:
        step_s = _prefill_s(backend, num_tokens, context)
        flop = _prefill_flop(decoder, num_tokens, context)
        chunks.append(
            {
                "tokens": num_tokens,
                "context": context,
                "step_ms": step_s * 1e3,
                "tokens_per_s": num_tokens / step_s,
                "tflop_per_s": flop / step_s / 1e12,
                "of_ceiling": flop / step_s / 1e12 / matrix_tflop_per_s,
            }
        )
    return {
        "description": runner.description,
        "weight_bytes": weight_bytes,
        "kv_bytes_per_token": kv_bytes,
        "decode": rows,
        "prefill": chunks,
    }


def _flashinfer(model: str, decode: list[tuple[int, int]], prefill: list[tuple[int, int]]) -> dict[str, Any]:
    """Time steps with each attention in turn, of one decoder's weights and cache."""
    wrapper = _find_flashinfer()
    if wrapper is None:
        return {"missing": "not installed"}
    config, scheduler, runner = _load(model, decode, prefill, {})
    triton: Any = runner.backend
    decoder = copy.copy(triton._decoder)
    decoder._ops = flashinfer_ops
    flashinfer = GpuBackend(
        decoder,
        triton._cache,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_num_blocks=triton._max_num_blocks,
        flashinfer_wrapper=wrapper,
    )
    flashinfer.capture()
    num_blocks = scheduler.load().num_total_blocks
    sizes = [(width, width, context) for width, context in decode if width * -(-context // _BLOCK_SIZE) <= num_blocks]
    rows: list[dict[str, Any]] = []
    for width, num_tokens, context in sizes + [(1, num_tokens, context) for num_tokens, context in prefill]:
        times: dict[str, list[float]] = {"triton_ms": [], "flashinfer_ms": []}
        for _ in range(3):
            for found, backend in zip(times.values(), (triton, flashinfer), strict=True):
                if num_tokens > width:
                    step_s = _prefill_s(backend, num_tokens, context)
                else:
                    step_s, _ = _decode_s(backend, width, context, num_blocks)
                found.append(step_s * 1e3)
        medians = {name: statistics.median(found) for name, found in times.items()}
        rows.append({"sequences": width, "tokens": num_tokens, "context": context, **medians})
    return {"steps": rows}


def _load(
    model: str, decode: list[tuple[int, int]], prefill: list[tuple[int, int]], settings: dict[str, Any]
) -> tuple[EngineConfig, Scheduler, ModelRunner]:
    """A model of random weights, its cache full of noise, for steps of these sizes."""
    longest = max((context for _, context in decode + prefill), default=0) + 2 * _NUM_REPEATS
    widest = max((width for width, _ in decode), default=1)
    config = EngineConfig(
        Path(model),
        device="cuda",
        load_format="dummy",
        block_size=_BLOCK_SIZE,
        max_num_seqs=max(widest, 1),
        max_num_batched_tokens=max([num_tokens for num_tokens, _ in prefill] + [widest, 16]),
        max_model_len=longest + 64,
        **settings,
    )
    scheduler, runner = load_engine(config, lambda line: None)
    backend: Any = runner.backend
    own: Any = backend.own if isinstance(backend, LockstepBackend) else backend
    for layer in own._cache.layers:
        for cache in layer[:2]:
            _fill_with_noise(cache)
        for scales in layer[2:]:
            if scales is not None:
                scales.fill_(1 / 64)
    return config, scheduler, runner


def _fill_with_noise(cache: torch.Tensor) -> None:
    if cache.dtype in (torch.int8, torch.float8_e4m3fn):
        # As fp8 these are numbers from 2**-9 to 2, of both signs.
        magnitude = torch.randint(0, 64, cache[:1].shape, dtype=torch.uint8, device=cache.device)
        sign = torch.randint(0, 2, cache[:1].shape, dtype=torch.uint8, device=cache.device) * 128
        cache.view(torch.uint8).copy_((magnitude + sign).expand(cache.shape))
    else:
        cache.normal_()


def _decode_s(backend: Any, width: int, context: int, num_blocks: int) -> tuple[float, float]:
    """Seconds of a step that every sequence has one token in, and of the time between two such steps."""
    per_sequence = -(-(context + _NUM_REPEATS + 4) // _BLOCK_SIZE)
    if width * per_sequence > num_blocks:
        per_sequence = -(-context // _BLOCK_SIZE)
    order = torch.randperm(num_blocks)[: width * per_sequence].tolist()
    tables = [order[i * per_sequence : (i + 1) * per_sequence] for i in range(width)]
    batch = StepBatch([1 + i % 999 for i in range(width)], [1] * width, [context] * width, tables, [*range(width)])
    pending: Any = None
    times, gaps, last_end = [], [], None
    for step in range(_NUM_REPEATS + 5):
        # Launched ahead, as the engine does: the step before is read when this one is under way.
        launched = backend.read([backend.argmax(batch)])
        if pending is not None:
            pending.wait()
            if step > 5:
                times.append(pending.times.ended_s - pending.times.began_s)
                if last_end is not None:
                    gaps.append(pending.times.began_s - last_end)
            last_end = pending.times.ended_s
        pending = launched
        batch = StepBatch([-1 - i for i in range(width)], [1] * width, [context] * width, tables, [*range(width)])
    pending.wait()
    return statistics.median(times), statistics.median(gaps)


def _prefill_s(backend: Any, num_tokens: int, context: int) -> float:
    tables = [[*range(-(-context // _BLOCK_SIZE))]]
    batch = StepBatch([1 + i % 999 for i in range(num_tokens)], [num_tokens], [context], tables, [num_tokens - 1])
    times = []
    for step in range(13):
        read = backend.read([backend.argmax(batch)])
        read.wait()
        if step >= 3:
            times.append(read.times.ended_s - read.times.began_s)
    return float(statistics.median(times))


def _prefill_flop(decoder: Any, num_tokens: int, context: int) -> float:
    """Two per weight and token, the head's for one token only; four per query head, dimension and visible token."""
    config = decoder._config
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    per_layer = config.hidden_size * (2 * q_size + 2 * kv_size + 3 * config.intermediate_size)
    num_layers = len(config.windows)
    visible = sum(range(context - num_tokens + 1, context + 1))
    head = decoder._embedding.numel()
    return float(2 * num_tokens * per_layer * num_layers + 4 * q_size * visible * num_layers + 2 * head)


if __name__ == "__main__":
    main()
