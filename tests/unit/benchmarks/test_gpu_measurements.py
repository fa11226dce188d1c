"""The kernels' errors that the GPU report tells are small, and what it counts of a model is what a step reads."""

import functools
import itertools
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from cpu_models import TinyModel, merged
from headrace.benchmarks import gpu_measurements
from headrace.benchmarks.gpu_measurements import _attention_errors, _steps, parity
from headrace.benchmarks.gpu_report import _print_http
from headrace.kernels import triton_ops
from headrace.kernels.backend import HostRead, StepBatch
from headrace.kernels.decoder import Decoder, KVCache
from headrace.kernels.gpu_backend import GpuBackend
from headrace.kernels.gpu_linear import gpu_linear
from headrace.kernels.step_times import StepTimes
from requirements import long

CPU = torch.device("cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="its sizes are a GPU's; what it calls is tested interpreted")
def test_every_kernel_is_near_its_reference() -> None:
    for name, error in parity().items():
        limit = 0.1 if "fp8" in name or "float8" in name else 0.05
        assert error < limit, f"{name}: {error}"


@long
def test_attention_of_every_kind_is_near_its_reference_interpreted() -> None:
    def noise(*shape: int, spread: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape) * spread).bfloat16()

    errors = _attention_errors(noise, torch.int8, num_heads=2, num_kv_heads=1, head_dim=32)
    assert len(errors) == 6
    assert max(errors.values()) < 0.02, errors


def test_a_round_over_http_tells_the_gap_between_steps(capsys: pytest.CaptureFixture[str]) -> None:
    summary = {"ttft_ms": {"p50": 10.0, "p99": 20.0}, "itl_ms": None, "output_tokens_per_s": 300.0}
    result = {"width": 8, "target": "headrace", "summary": summary, "busy_s": 9.7, "wall_s": 10.0, "gauge": 1.0}
    _print_http(result | {"engine_step_gap": {"sum_s": 0.3, "count": 100.0}})
    _print_http(result | {"target": "transformers", "busy_s": 0.0, "engine_step_gap": {"sum_s": 0.0, "count": 0.0}})
    ours, theirs = capsys.readouterr().out.splitlines()
    assert ours == "| 8 | headrace | 300 | 10.0 / 20.0 | 0.0 / 0.0 | 97.0% | 3.000 | 1.0 |"
    assert "| - | - | 1.0 |" in theirs


class _Timed(GpuBackend):
    """Computes nothing: each step takes two seconds, and the device rests one."""

    steps = itertools.count()

    def argmax(self, batch: StepBatch) -> torch.Tensor:
        assert all(len(table) * 16 >= end for table, end in zip(batch.block_tables, batch.context_lens, strict=True))
        return torch.zeros(len(batch.logit_rows))

    def read(self, tensors: Sequence[torch.Tensor]) -> HostRead:  # type: ignore[override]
        began_s = 3.0 * next(self.steps)
        return HostRead([*tensors], StepTimes(began_s, began_s + 2, None))


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.int8], ids=str)
def test_a_steps_floor_is_what_it_reads_of_weights_and_cache(
    kv_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = TinyModel()
    weights = merged(model.weights(), {})
    read = (weight.shape for name, weight in weights.items() if "norm" not in name and "embed" not in name)
    weight_bytes = sum(4 * shape.numel() for shape in read)
    make = functools.partial(gpu_linear, dtype=torch.float32, device=CPU)
    decoder = Decoder(model.config, {**weights}, triton_ops, make, make)
    num_blocks = 9
    cache = KVCache.allocate(model.config.shape, num_blocks, 16, kv_dtype, CPU)
    backend = _Timed(decoder, cache, max_num_seqs=4, max_num_batched_tokens=64, max_num_blocks=8)
    scheduler = SimpleNamespace(load=lambda: SimpleNamespace(num_total_blocks=num_blocks))
    runner = SimpleNamespace(backend=backend, description="tiny")
    monkeypatch.setattr(gpu_measurements, "load_engine", lambda *_: (scheduler, runner))
    found = _steps("folder", [(1, 40), (3, 40), (4, 40)], [(32, 100)], copy_gb_per_s=1e-6, matrix_tflop_per_s=1e-9)
    token_bytes = model.config.shape.kv_bytes_per_token(kv_dtype)
    assert (found["weight_bytes"], found["kv_bytes_per_token"]) == (weight_bytes, token_bytes)
    one, three, four = found["decode"]
    assert one["floor_ms"] == pytest.approx(weight_bytes + 40 * token_bytes)
    assert three["floor_ms"] == pytest.approx(weight_bytes + 120 * token_bytes)
    assert (three["step_ms"], three["gap_ms"]) == (2000, 1000)
    assert four["error"] == "no room in memory"
    [chunk] = found["prefill"]
    assert (chunk["step_ms"], chunk["tokens_per_s"]) == (2000, 16)
    assert chunk["of_ceiling"] == pytest.approx(chunk["tflop_per_s"] * 1e9)
