"""The C++ kernel against the machine: `python -m headrace.benchmarks.kernel_bench`.

A decode step has to read every weight and every key and value once, so its floor is those bytes over the bandwidth this
machine reaches; the products of a prompt, or of many rows, take their multiply-adds over the rate of products out of
registers ("of both": over the larger of the two). Both are measured between the steps, as is the torch path: on a
shared machine only ratios of one run count. Figures are medians. The demo model, or a GGUF of a compact family.
Prints tables, and as the last line of stdout one JSON object.
"""

import argparse
import ctypes
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from headrace.kernels import torch_ops
from headrace.kernels.backend import Backend, StepBatch
from headrace.kernels.cpu_backend import CpuBackend, kv_bytes_per_token
from headrace.kernels.cpu_library import (
    INSTRUCTION_SETS,
    InstructionSet,
    choose_instruction_set,
    compile_library,
    load_library,
)
from headrace.kernels.decoder import DecoderConfig, KVCache
from headrace.kernels.torch_backend import TorchBackend
from headrace.scheduler.config import EngineConfig
from headrace.scheduler.gguf_config import gguf_config
from headrace.scheduler.gguf_file import open_gguf
from headrace.scheduler.messages import GenerationRequest, SamplingParams
from headrace.scheduler.model_files import read_gguf
from headrace.scheduler.model_loader import load_engine
from headrace.scheduler.model_plan import plan_model
from headrace.scheduler.model_source import cache_dir, resolve_model

_BLOCK_SIZE = 16
_READ_BYTES = 2**29
_PRODUCT_ROUNDS = 8_000_000
# torch's threads go on spinning for a while after a step.
_SETTLING_S = 0.05
_PROMPT_TOKENS = 512
_MAX_WIDTH = 64
_GOALS = {("bfloat16", 1): 1.15, ("bfloat16", 8): 1.35, ("bfloat16", 64): 1.6, ("as stored", 1): 1.3}
_PROMPT_GOAL = 0.55
_HOST_GOAL, _SAMPLING_GOAL = 0.05, 1.1


@dataclass(frozen=True, slots=True)
class Decode:
    """A decode step of `width` rows. Times in ms; `goal` is the ratio of `kernel_ms` to `floor_ms` that is aimed at."""

    weights: str
    kv: str
    width: int
    context: int
    kernel_ms: float
    torch_ms: float | None
    floor_ms: float
    product_ms: float | None  # None where products are of integers
    goal: float | None
    phases_ms: dict[str, float]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt of 512 tokens in one step: `share` is its products' rate over the ceiling in bfloat16, which those of
    integers can exceed."""

    weights: str
    kernel_ms: float
    torch_ms: float | None
    share: float
    goal: float


@dataclass(frozen=True, slots=True)
class Step:
    """A step of the whole engine, 64 rows: what of it is not the kernel's step, and what sampling costs."""

    greedy_ms: float
    host_share: float
    sampled_ratio: float


class Ceilings:
    """What the cores reach together, measured whenever asked; the best of three, as threads may begin on one core."""

    def __init__(self, instruction_set: InstructionSet, num_threads: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "ceilings.so"
            compile_library(path, [Path(__file__).parent / "cpu_ceilings.cpp"], instruction_set.compiler_flags)
            library = ctypes.CDLL(str(path))
        library.read_bandwidth.restype = library.product_rate.restype = ctypes.c_double
        library.read_bandwidth.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int)
        library.product_rate.argtypes = (ctypes.c_int64, ctypes.c_int)
        self._library = library
        self._num_threads = num_threads
        self._memory = np.ones(_READ_BYTES, np.uint8)

    def bytes_per_s(self) -> float:
        address = self._memory.ctypes.data
        return max(float(self._library.read_bandwidth(address, _READ_BYTES, self._num_threads)) for _ in "123")

    def flop_per_s(self) -> float:
        return max(float(self._library.product_rate(_PRODUCT_ROUNDS, self._num_threads)) for _ in "123")


@dataclass(frozen=True, slots=True)
class Subject:
    """A packed model: in the kernel, and where there is such a thing the same in torch."""

    weights: str
    kv: str
    kernel: CpuBackend
    torch: TorchBackend | None
    kv_bytes_per_token: int


class Bench:
    def __init__(self, path: Path, num_rounds: int, contexts: list[int], widths: list[int], kernel: str) -> None:
        self._plan = plan_model(path, gguf_config(open_gguf(path)), None)
        if self._plan.decoder_config is None:
            raise SystemExit(f"{path} is of a family that the kernel does not run")
        self.config: DecoderConfig = self._plan.decoder_config
        self.path = path
        self.contexts, self.widths, self.num_rounds = contexts, widths, num_rounds
        self.num_threads = torch.get_num_threads()
        self.instruction_set = choose_instruction_set(kernel)
        self._library = load_library(self.instruction_set, cache_dir())
        self.ceilings = Ceilings(self.instruction_set, self.num_threads)
        # Blocks for every sequence at its longest, and the step that fills them.
        self._blocks_each = -(-max(*contexts, _PROMPT_TOKENS) // _BLOCK_SIZE)
        self._num_blocks = self._blocks_each * max(widths)

    def subject(self, weights: str, kv: str) -> Subject:
        """`weights` is "bfloat16", or "as stored" in the GGUF; `kv` is "bfloat16" or "int8"."""
        file, is_int8 = open_gguf(self.path), kv == "int8"
        kernel = CpuBackend(
            self._library,
            self.config,
            read_gguf(file, torch.bfloat16, keeps_quants=weights != "bfloat16"),
            num_blocks=self._num_blocks,
            block_size=_BLOCK_SIZE,
            max_num_batched_tokens=_PROMPT_TOKENS,
            num_threads=self.num_threads,
            is_kv_int8=is_int8,
        )
        in_torch = self._in_torch() if weights == kv == "bfloat16" else None
        subject = Subject(weights, kv, kernel, in_torch, kv_bytes_per_token(self.config, is_int8))
        for backend in (kernel, in_torch):
            if backend is not None:
                self._fill(backend)
        return subject

    def decode(self, subject: Subject, width: int, context: int) -> Decode:
        batch = StepBatch(
            [7 * row % self.config.vocab_size for row in range(width)],
            [1] * width,
            [context] * width,
            [self._blocks(row) for row in range(width)],
            list(range(width)),
        )
        phases: dict[str, float] = {}
        kernel_s, torch_s, bandwidth, rate = self._measure(subject, batch, 10, phases)
        num_bytes = subject.kernel.weight_bytes + width * context * subject.kv_bytes_per_token
        return Decode(
            subject.weights,
            subject.kv,
            width,
            context,
            kernel_s * 1e3,
            None if torch_s is None else torch_s * 1e3,
            num_bytes / bandwidth * 1e3,
            2 * self._num_weights(has_head=True) * width / rate * 1e3 if subject.weights == "bfloat16" else None,
            _GOALS.get((subject.weights, width)) if (subject.kv, context) == ("bfloat16", self.contexts[0]) else None,
            phases,
        )

    def prompt(self, subject: Subject) -> Prompt:
        num = _PROMPT_TOKENS
        batch = StepBatch([7] * num, [num], [num], [self._blocks(0)], [num - 1])
        kernel_s, torch_s, _, rate = self._measure(subject, batch, 2, {})
        # Scores and weighted values of a causal half; a head for one row.
        attention = 2 * 2 * self.config.num_heads * self.config.head_dim * len(self.config.windows) * num * num / 2
        share = (2 * self._num_weights(has_head=False) * num + attention) / rate / kernel_s
        return Prompt(subject.weights, kernel_s * 1e3, None if torch_s is None else torch_s * 1e3, share, _PROMPT_GOAL)

    def step(self) -> Step:
        """Two engines in turn, one greedy and one sampling, each with 64 sequences."""
        greedy, sampled = SamplingParams(temperature=0), SamplingParams(temperature=0.8, top_p=0.95)
        engines = [_Engine(self.path, self.instruction_set, sampling) for sampling in (greedy, sampled)]
        seconds: list[list[float]] = [[], []]
        kernel_s = []
        for _ in range(10 * self.num_rounds):
            for engine, times in zip(engines, seconds, strict=True):
                total, in_kernel = engine.step()
                times.append(total)
                if engine is engines[0]:
                    kernel_s.append(in_kernel)
        greedy_s, sampled_s = (statistics.median(times) for times in seconds)
        return Step(greedy_s * 1e3, 1 - statistics.median(kernel_s) / greedy_s, sampled_s / greedy_s)

    def _measure(
        self, subject: Subject, batch: StepBatch, num_steps: int, phases: dict[str, float]
    ) -> tuple[float, float | None, float, float]:
        """Medians of the kernel's seconds, torch's, bytes per second and floating-point operations per second."""
        kernel_s, torch_s, bandwidth, rate = [], [], [], []
        subject.kernel.argmax(batch)
        before = subject.kernel.profile()
        for _ in range(self.num_rounds):
            if subject.torch is not None:
                torch_s.append(_seconds(lambda: subject.torch.argmax(batch)))  # type: ignore[union-attr]
                time.sleep(_SETTLING_S)
            bandwidth.append(self.ceilings.bytes_per_s())
            rate.append(self.ceilings.flop_per_s())
            kernel_s += [_seconds(lambda: subject.kernel.argmax(batch)) for _ in range(num_steps)]
        for name, seconds in subject.kernel.profile().items():
            phases[name] = (seconds - before[name]) / len(kernel_s) * 1e3
        torch_median = statistics.median(torch_s) if torch_s else None
        return statistics.median(kernel_s), torch_median, statistics.median(bandwidth), statistics.median(rate)

    def _in_torch(self) -> TorchBackend:
        weights = read_gguf(open_gguf(self.path), torch.bfloat16, keeps_quants=False)
        decoder = self._plan.build(weights, torch.bfloat16, torch.device("cpu"), torch_ops, "none", (), None)
        shape, device = self.config.shape, torch.device("cpu")
        cache = KVCache.allocate(shape, self._num_blocks, _BLOCK_SIZE, torch.bfloat16, device)
        return TorchBackend(decoder, cache, torch_ops)

    def _fill(self, backend: Backend) -> None:
        """Compute every sequence up to the longest context: what was never written is no memory to read."""
        length = max(self.contexts)
        for row in range(max(self.widths)):
            for start in range(0, length, _PROMPT_TOKENS):
                num = min(_PROMPT_TOKENS, length - start)
                backend.argmax(StepBatch([row] * num, [num], [start + num], [self._blocks(row)], [num - 1]))

    def _blocks(self, row: int) -> list[int]:
        """The sequence's blocks, scattered over the cache."""
        return [(row + i * max(self.widths)) % self._num_blocks for i in range(self._blocks_each)]

    def _num_weights(self, *, has_head: bool) -> int:
        config = self.config
        attended = config.num_heads * config.head_dim
        projected = attended + 2 * config.num_kv_heads * config.head_dim
        layer = config.hidden_size * (projected + attended + 3 * config.intermediate_size)
        return len(config.windows) * layer + has_head * config.vocab_size * config.hidden_size


class _Engine:
    """An engine with 64 sequences past their prompts."""

    def __init__(self, path: Path, instruction_set: InstructionSet, sampling: SamplingParams) -> None:
        chosen: dict[str, Any] = {"cpu_kernel": instruction_set.name}
        config = EngineConfig(path, device="cpu", kv_cache_bytes=2**30, **chosen)
        self._scheduler, self._runner = load_engine(config)
        self._has_prompts = True
        params = SamplingParams(temperature=sampling.temperature, top_p=sampling.top_p, seed=1, max_tokens=10_000)
        for row in range(_MAX_WIDTH):
            self._scheduler.add(GenerationRequest(row, tuple(range(row, row + 200)), params, 0.0))
        while self._scheduler.load().num_waiting or self._has_prompts:
            self.step()

    def step(self) -> tuple[float, float]:
        """Run one step; returns its seconds, and those in the kernel's own step."""
        backend = self._runner.backend
        assert isinstance(backend, CpuBackend)
        before, start = sum(backend.profile().values()), time.perf_counter()
        output = self._scheduler.schedule(0.0)
        self._has_prompts = any(row.num_tokens > 1 for row in output.rows)
        self._scheduler.update(output, self._runner.run(output))
        total = time.perf_counter() - start
        return total, sum(backend.profile().values()) - before


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return f"{facts.get('model name')}, family {facts.get('cpu family')}"


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("kernel_bench", description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", help="a GGUF file; the demo model where none is named")
    parser.add_argument("--rounds", type=int, default=7, help="rounds per figure, at least 3 for a median")
    parser.add_argument("--contexts", default="220", help="context lengths, the first of them with goals")
    parser.add_argument("--widths", default="1,8,32,64", help="rows per step")
    names = ["auto", *(each.name for each in INSTRUCTION_SETS)]
    parser.add_argument("--kernel", default="auto", choices=names, help="instruction set")
    args = parser.parse_args(argv)
    path = resolve_model(args.model).path
    contexts, widths = ([int(part) for part in text.split(",")] for text in (args.contexts, args.widths))
    bench = Bench(path, args.rounds, contexts, widths, args.kernel)
    print(f"{path.name}, kernel for {bench.instruction_set.name}, {bench.num_threads} threads, {_cpu_name()}")
    bandwidth = statistics.median(bench.ceilings.bytes_per_s() for _ in range(5))
    rate = statistics.median(bench.ceilings.flop_per_s() for _ in range(5))
    print(f"ceilings now: {bandwidth / 1e9:.1f} GB/s read, {rate / 1e9:.0f} GFLOP/s in bfloat16 products\n")
    decodes: list[Decode] = []
    prompts: list[Prompt] = []
    for weights, kv in (
        ("bfloat16", "bfloat16"),
        ("bfloat16", "int8"),
        ("as stored", "bfloat16"),
        ("as stored", "int8"),
    ):
        subject = bench.subject(weights, kv)
        if not decodes:
            print("weights    KV        rows  context  kernel ms  torch ms  floor ms  ratio  goal  ", end="")
            print("products ms  of both  tok/s")
        for context in contexts:
            for width in widths:
                decodes.append(bench.decode(subject, width, context))
                print(_decode_line(decodes[-1]), flush=True)
        if kv == "bfloat16":
            prompts.append(bench.prompt(subject))
        subject.kernel.close()
    print(f"\nprompt of {_PROMPT_TOKENS} tokens   kernel ms  torch ms  of the bfloat16 ceiling  goal")
    for prompt in prompts:
        in_torch = "-" if prompt.torch_ms is None else f"{prompt.torch_ms:.1f}"
        print(f"{prompt.weights:20} {prompt.kernel_ms:10.1f} {in_torch:>9} {prompt.share:22.0%}  {prompt.goal:.0%}")
    step = bench.step()
    print(
        f"\nwhole step of {_MAX_WIDTH} rows, weights as stored: greedy {step.greedy_ms:.1f} ms, "
        f"outside the kernel {step.host_share:.1%} of it (goal {_HOST_GOAL:.0%}); "
        f"at temperature 0.8, top_p 0.95 {step.sampled_ratio:.2f} times that (goal {_SAMPLING_GOAL})"
    )
    print("\nphases of a step, ms")
    for decode in decodes:
        parts = "  ".join(f"{name} {ms:.2f}" for name, ms in decode.phases_ms.items())
        print(f"{decode.weights:10} {decode.kv:8} {decode.width:3} rows  {parts}")
    report = {
        "model": path.name,
        "kernel": bench.instruction_set.name,
        "num_threads": bench.num_threads,
        "bytes_per_s": bandwidth,
        "flop_per_s": rate,
        "decode": [asdict(decode) for decode in decodes],
        "prompt": [asdict(prompt) for prompt in prompts],
        "step": asdict(step),
    }
    print(json.dumps(report))
    return 0


def _decode_line(decode: Decode) -> str:
    in_torch = "-" if decode.torch_ms is None else f"{decode.torch_ms:.2f}"
    goal = "-" if decode.goal is None else f"{decode.goal:.2f}"
    products, of_both = "-", "-"
    if decode.product_ms is not None:
        products = f"{decode.product_ms:.2f}"
        of_both = f"{decode.kernel_ms / max(decode.floor_ms, decode.product_ms):.2f}"
    return (
        f"{decode.weights:10} {decode.kv:8} {decode.width:5} {decode.context:8} {decode.kernel_ms:10.2f} {in_torch:>9} "
        f"{decode.floor_ms:9.2f} {decode.kernel_ms / decode.floor_ms:6.2f} {goal:>5} {products:>12} {of_both:>8} "
        f"{decode.width / decode.kernel_ms * 1e3:6.0f}"
    )


if __name__ == "__main__":
    sys.exit(main())
