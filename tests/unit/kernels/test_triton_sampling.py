"""Drawing without a sort agrees with the specification; on a CPU the kernels are interpreted, on a GPU compiled."""

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from triton.runtime import interpreter

from headrace.kernels import triton_sampling
from headrace.kernels.triton_sampling import argmax, sample

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16]
# How far a float32 sum may put a boundary, as a share of the row's mass.
SLACK = 2e-6
INF = float("inf")
# Temperature, top-k, top-p, min-p.
Setting = tuple[float, int, float, float]
PLAIN: Setting = (1.0, 0, 1.0, 0.0)
SETTINGS: dict[str, Setting] = {
    "plain": PLAIN,
    "greedy": (0.0, 0, 1.0, 0.0),
    "greedy with filters": (0.0, 7, 0.5, 0.5),
    "cold": (1e-4, 0, 1.0, 0.0),
    "cold with filters": (1e-4, 20, 0.9, 0.1),
    "hot": (1e4, 0, 1.0, 0.0),
    "hot top-k": (1e4, 40, 1.0, 0.0),
    "hot top-p": (1e4, 0, 0.7, 0.0),
    "top-k 1": (1.0, 1, 1.0, 0.0),
    "top-k 2": (1.0, 2, 1.0, 0.0),
    "top-k 50": (0.7, 50, 1.0, 0.0),
    "top-k 900": (1.0, 900, 1.0, 0.0),
    "top-k of all": (1.0, 10**6, 1.0, 0.0),
    "top-p tiny": (1.0, 0, 1e-6, 0.0),
    "top-p 0": (1.0, 0, 0.0, 0.0),
    "top-p 0.5": (1.0, 0, 0.5, 0.0),
    "top-p 0.95": (0.8, 0, 0.95, 0.0),
    "top-p 0.999": (1.5, 0, 0.999, 0.0),
    "top-p nearly 1": (1.0, 0, 0.9999999, 0.0),
    "min-p 0.05": (1.0, 0, 1.0, 0.05),
    "min-p 1": (1.0, 0, 1.0, 1.0),
    "top-k and top-p": (1.0, 64, 0.8, 0.0),
    "top-k beyond top-p": (1.0, 700, 0.3, 0.0),
    "all filters": (1.2, 100, 0.95, 0.02),
    "top-p and min-p": (1.2, 0, 0.9, 0.2),
}


@pytest.fixture(autouse=True)
def interpreted_as_compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """NumPy 2.4 makes no int of an array of one element any more; Triton 3.6's interpreter does of loop bounds. A GPU
    does not warn of infinities."""
    patch_tensor = interpreter._patch_lang_tensor

    def patch_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_index)
    with np.errstate(all="ignore"):
        yield


def kept_and_weights(row: torch.Tensor, setting: Setting) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The specification of the filters, for one row [V] and a temperature above 0.

    Returns, in the order of the vocabulary, which tokens are kept, bool [V], all probabilities, float64 [V], and each
    token's distance from being cut or kept by top-p or min-p, as a share of what that is measured by, float64 [V].
    """
    temperature, top_k, top_p, min_p = torch.tensor(setting, dtype=torch.float32).double().tolist()
    probs = torch.softmax(row.double() / temperature, dim=-1)
    # By logit, as a probability may underflow; otherwise the same.
    order = torch.sort(row.double(), descending=True, stable=True).indices
    ordered = probs[order]
    rank = torch.arange(len(row))
    is_kept = rank < top_k if top_k > 0 else torch.ones_like(rank, dtype=torch.bool)
    mass = torch.where(is_kept, ordered, 0.0)
    distance = torch.full_like(probs, INF)
    if top_p < 1:
        before = mass.cumsum(-1) - mass
        is_kept &= (before < top_p * mass.sum()) | (rank == 0)
        distance = (before / mass.sum() - top_p).abs()
    if min_p > 0:
        is_kept &= ordered >= min_p * ordered[0]
        distance = torch.minimum(distance, (ordered / ordered[0] - min_p).abs() / min_p)
    return (
        torch.zeros_like(is_kept).scatter_(0, order, is_kept),
        probs,
        torch.zeros_like(probs).scatter_(0, order, distance),
    )


def sample_reference(row: torch.Tensor, setting: Setting, uniform: float) -> int:
    """The token of one row [V], by the specification."""
    if setting[0] <= 0:
        return int(row.argmax())
    is_kept, probs, _ = kept_and_weights(row, setting)
    cumulative = torch.where(is_kept, probs, 0.0).cumsum(-1)
    beyond = (is_kept & (cumulative > uniform * cumulative[-1])).nonzero()
    return int(beyond[0]) if len(beyond) else int(is_kept.nonzero()[-1])


def check(row: torch.Tensor, setting: Setting, uniform: float, token: int) -> None:
    """Assert that a draw is the specification's, but for what rounding may move."""
    if token == sample_reference(row, setting, uniform):
        return
    assert setting[0] > 0, "a greedy row took another token"
    is_kept, probs, distance = kept_and_weights(row, setting)
    near = distance <= 1e-6
    assert is_kept[token] or near[token], f"{token} was cut"
    assert probs[token] > 0
    # Whether the tokens at a boundary are kept or not: the interval may lie anywhere between.
    intervals = []
    for each in {False, True}:
        weights = torch.where(torch.where(near, each, is_kept), probs, 0.0)
        weights[token] = probs[token]
        cumulative = weights.cumsum(-1) / weights.sum()
        intervals.append((float(cumulative[token] - weights[token] / weights.sum()), float(cumulative[token])))
    low, high = min(low for low, _ in intervals), max(high for _, high in intervals)
    assert low - SLACK <= uniform <= high + SLACK, f"{token} has [{low}, {high}), not {uniform}"


def draw(logits: torch.Tensor, settings: list[Setting], uniforms: list[float], **promises: bool) -> list[int]:
    columns = list(zip(*settings, strict=True))
    dtypes = (torch.float32, torch.int32, torch.float32, torch.float32)
    temperature, top_k, top_p, min_p = (
        torch.tensor(column, dtype=dtype, device=DEVICE) for column, dtype in zip(columns, dtypes, strict=True)
    )
    uniform = torch.tensor(uniforms, dtype=torch.float32, device=DEVICE)
    token_ids = sample(logits.to(DEVICE), temperature, top_k, top_p, min_p, uniform, **promises)
    assert token_ids.dtype == torch.int32
    drawn: list[int] = token_ids.tolist()
    return drawn


def draw_and_check(logits: torch.Tensor, settings: list[Setting], uniforms: list[float]) -> list[int]:
    tokens = draw(logits, settings, uniforms)
    rounded = torch.tensor(uniforms, dtype=torch.float32).tolist()
    for row, setting, uniform, token in zip(logits, settings, rounded, tokens, strict=True):
        check(row, setting, uniform, token)
    return tokens


def peaked(num_rows: int, vocab_size: int, seed: int) -> torch.Tensor:
    """Logits as a language model's: most are far below the few that matter."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_rows, vocab_size, generator=generator) * 2.5
    top = torch.randint(vocab_size, (num_rows, 20), generator=generator)
    return logits.scatter_add_(1, top, torch.rand(num_rows, 20, generator=generator) * 8)


def flat(num_rows: int, vocab_size: int, seed: int) -> torch.Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 0.3


def tied(num_rows: int, vocab_size: int, seed: int) -> torch.Tensor:
    """Twelve different logits, 0 and -0 among them, and masked tokens."""
    values = torch.tensor([-INF, -7.5, -3.0, -0.5, -0.0, 0.0, 0.25, 1.0, 1.5, 2.0, 3.0, 3.5])
    return values[torch.randint(len(values), (num_rows, vocab_size), generator=torch.Generator().manual_seed(seed))]


def extreme(num_rows: int, vocab_size: int, seed: int) -> torch.Tensor:
    """Masked by infinity and by the least number there is, and outliers."""
    logits = peaked(num_rows, vocab_size, seed)
    logits[:, ::3] = -INF
    logits[:, 1::7] = torch.finfo(torch.bfloat16).min
    logits[:, vocab_size // 2] = -1e9
    logits[:, -1] = 60.0
    logits[:, 5] = 61.0
    return logits


ROWS = {each.__name__: each for each in (peaked, flat, tied, extreme)}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    ("vocab_size", "chunk", "dtype"),
    [(1000, 256, torch.float32), (5003, 4096, torch.bfloat16)],
)
def test_a_batch_of_all_settings_draws_what_the_specification_says(
    vocab_size: int, chunk: int, rows: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_sampling, "_CHUNK", chunk)
    monkeypatch.setattr(triton_sampling, "_LIST_TILE", chunk)
    logits = ROWS[rows](len(SETTINGS), vocab_size, seed=1).to(dtype)
    uniforms = torch.rand(len(SETTINGS), generator=torch.Generator().manual_seed(2)).tolist()
    draw_and_check(logits, list(SETTINGS.values()), uniforms)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_draws_what_the_specification_says_whatever_the_number(name: str) -> None:
    uniforms = [0.0, 0.7, 1 - 2.0**-24]
    logits = torch.cat([peaked(1, 1500, seed=3), tied(1, 1500, seed=3)]).repeat_interleave(len(uniforms), 0)
    draw_and_check(logits, [SETTINGS[name]] * len(logits), uniforms * 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_vocabulary_of_several_chunks(dtype: torch.dtype) -> None:
    settings = [SETTINGS[name] for name in ("plain", "top-k 50", "top-p 0.95", "top-k beyond top-p", "all filters")]
    uniforms = [0.1, 0.35, 0.6, 0.85, 0.999]
    if DEVICE.type == "cuda":
        settings, uniforms = [*SETTINGS.values()] * 4, torch.linspace(0, 0.9999, 4 * len(SETTINGS)).tolist()
    for rows in (peaked, flat):
        logits = rows(len(settings), 128256 if DEVICE.type == "cuda" else 20000, seed=4).to(dtype)
        draw_and_check(logits, settings, uniforms)


def test_a_row_is_drawn_alike_alone_and_in_any_company_and_stride() -> None:
    settings = [SETTINGS[name] for name in ("plain", "top-k 50", "min-p 0.05", "greedy", "all filters", "plain")]
    logits = torch.cat([peaked(3, 5000, seed=5), flat(3, 5000, seed=6)])
    uniforms = [0.2, 0.4, 0.6, 0.8, 0.95, 0.5]
    together = draw(logits, settings, uniforms)
    padded = torch.full((6, 5120), INF)
    padded[:, :5000] = logits
    assert draw(padded[:, :5000], settings, uniforms) == together
    for i in range(6):
        assert draw(logits[i : i + 1], settings[i : i + 1], uniforms[i : i + 1]) == together[i : i + 1]
    plain = [0, 5]
    drawn = draw(logits[plain], [PLAIN] * 2, [uniforms[i] for i in plain], has_filters=False)
    assert drawn == [together[i] for i in plain]
    assert draw(logits, [SETTINGS["greedy"]] * 6, uniforms, is_all_greedy=True) == argmax(logits.to(DEVICE)).tolist()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_is_the_lowest_of_equal_ones_and_nan_is_told_or_never_drawn(dtype: torch.dtype) -> None:
    logits = tied(5, 9000, seed=7).to(dtype)
    logits[1, :8000] = float("nan")
    logits[2] = -INF
    logits[3] = float("nan")
    logits[4, 8999] = INF
    expected = [int(logits[0].argmax()), 8000 + int(logits[1, 8000:].argmax()), 0, 0]
    assert argmax(logits.to(DEVICE)).tolist() == [expected[0], -1, 0, -1, -1]
    logits = logits[:4]
    assert draw(logits, [SETTINGS["top-k 1"]] * 4, [0.99] * 4) == expected
    assert draw(logits, [PLAIN] * 4, [0.99] * 4)[2:] == [0, 0]
    assert argmax(logits[:0].to(DEVICE)).tolist() == []


def test_masked_tokens_and_nan_are_never_drawn() -> None:
    uniforms = [0.0, 0.5, 1 - 2.0**-24] * 4
    logits = torch.full((len(uniforms), 6000), -INF)
    logits[:, 5:20] = float("nan")
    allowed = {300, 4500, 5999}
    logits[:, list(allowed)] = torch.tensor([-2e4, -2e4 + 1, -2e4])
    settings = [SETTINGS[name] for name in ("hot", "top-k 900", "top-p nearly 1", "min-p 0.05") for _ in range(3)]
    assert set(draw(logits, settings, uniforms)) == allowed


def test_infinity_takes_all() -> None:
    logits = flat(3, 500, seed=8)
    logits[:, 77] = INF
    assert draw(logits, [PLAIN, SETTINGS["top-p 0.5"], SETTINGS["min-p 0.05"]], [0.0, 0.5, 0.999]) == [77] * 3


@pytest.mark.parametrize("name", ["plain", "all filters", "top-p and min-p"])
def test_frequencies_are_the_distribution(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_sampling, "_CHUNK", 256)
    monkeypatch.setattr(triton_sampling, "_LIST_TILE", 256)
    num_draws = 1000 if DEVICE.type == "cuda" else 12
    row = peaked(1, 600, seed=9)
    # Evenly spread, a token's interval catches its share to within one draw.
    uniforms = ((torch.arange(num_draws) + 0.5) / num_draws).tolist()
    tokens = draw(row.expand(num_draws, -1).contiguous(), [SETTINGS[name]] * num_draws, uniforms)
    is_kept, probs, _ = kept_and_weights(row[0], SETTINGS[name])
    expected = torch.where(is_kept, probs, 0.0)
    counts = torch.bincount(torch.tensor(tokens), minlength=600)
    assert (counts - num_draws * expected / expected.sum()).abs().max() <= 1.001


COMPILE = """
import re, subprocess, tempfile, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from headrace.kernels import triton_sampling as sampling

INTS = {"top_k", "state", "counts", "num_listed", "num_above", "token_ids"}

def compile_kernel(kernel, num_warps, dtype, **constants):
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("row_stride", "vocab_size", "has_filters"):
            signature[name] = "i32"
        else:
            signature[name] = "*" + (dtype if name in ("logits", "listed") else "i32" if name in INTS else "fp32")
    unaligned = {*constants, "has_filters"}
    places = {name: i for i, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        kernel,
        signature=signature,
        constexprs={(places[name],): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for name, i in places.items() if name not in unaligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(compiled.asm["ptx"])
        file.flush()
        command = [triton.knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", file.name, "-o", "/dev/null"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = int(re.search(r"Used (\\d+) registers", report)[1])
    print(kernel.__name__, dtype, registers, compiled.metadata.shared)
    assert " 0 bytes spill stores" in report, report

sizes = {"CHUNK": sampling._CHUNK, "C": 32}
for dtype, shift in (("fp32", 0), ("bf16", 16)):
    flags = {"HAS_SUM": True, "HAS_TEMPERATURE": True}
    compile_kernel(sampling._reduce_chunks, 4, dtype, **sizes, **flags)
    flags["HAS_TEMPERATURE"] = False
    compile_kernel(sampling._reduce_chunks, 4, dtype, temperature=None, **sizes, **flags)
    flags["HAS_SUM"] = False
    compile_kernel(sampling._reduce_chunks, 4, dtype, temperature=None, **sizes, **flags)
    compile_kernel(sampling._pick_largest, 8, dtype, **sizes)
    num_pivots = {"NUM_PIVOTS": sampling._NUM_PIVOTS}
    compile_kernel(sampling._sum_above_pivots, 4, dtype, **sizes, **num_pivots)
    compile_kernel(sampling._list_between_pivots, 4, dtype, **sizes, **num_pivots)
    rest = sizes | num_pivots | {"WIDTH": sampling._LIST_TILE // 32, "SHIFT": shift}
    compile_kernel(sampling._draw, 8, dtype, **rest)
"""


def test_the_kernels_compile_for_hopper_without_spills() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
