"""The C++ kernel of kernels/cpu as a loaded library: which CPUs it runs on, how it is built, and its C functions.

It is compiled at first use, for this CPU's best instruction set, into a cache whose file names carry a hash of the
sources and flags. Libraries that were built beside the sources (`python -m headrace.kernels.cpu_library`), as a wheel
may carry them, are used as they are.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

_SOURCES = Path(__file__).parent / "cpu"
_PREBUILT = _SOURCES / "prebuilt"
# GCC's own headers of intrinsics use values they never set.
_FLAGS = ("-std=c++20", "-O3", "-fPIC", "-shared", "-pthread", "-Wall", "-Wextra", "-Wno-uninitialized")
# linux/arch_prctl and asm/prctl.h: AMX's registers are large, and a process has to ask for them.
_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA = 158, 0x1023, 18


class KernelUnavailableError(Exception):
    """The kernel cannot run here; the message says why."""


@dataclass(frozen=True, slots=True)
class InstructionSet:
    """A family of CPUs: what /proc/cpuinfo lists for it, and what the compiler is told."""

    name: str
    cpu_flags: frozenset[str]
    compiler_flags: tuple[str, ...]


# What the compiler may use of x86-64-v3 and v4, under Linux's names.
_AVX2 = frozenset({"avx2", "fma", "f16c", "bmi1", "bmi2", "movbe", "abm"})
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_AVX512_BF16 = _AVX512 | {"avx512_bf16", "avx512_vnni"}
# The best first.
INSTRUCTION_SETS = (
    InstructionSet(
        "amx",
        _AVX512_BF16 | {"amx_tile", "amx_bf16"},
        ("-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni", "-mamx-tile", "-mamx-bf16"),
    ),
    InstructionSet("avx512_bf16", _AVX512_BF16, ("-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni")),
    InstructionSet("avx512_vnni", _AVX512 | {"avx512_vnni"}, ("-march=x86-64-v4", "-mavx512vnni")),
    InstructionSet("avx512", _AVX512, ("-march=x86-64-v4",)),
    InstructionSet("avx2", _AVX2, ("-march=x86-64-v3",)),
)


def choose_instruction_set(name: str = "auto") -> InstructionSet:
    """The best of this CPU, or the one that is named.

    Raises: KernelUnavailableError where this machine has not got it.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise KernelUnavailableError(f"the CPU kernel is for Linux on x86-64, not {sys.platform} {platform.machine()}")
    for candidate in INSTRUCTION_SETS:
        if name in ("auto", candidate.name):
            missing = candidate.cpu_flags - _cpu_flags()
            if not missing and (candidate.name != "amx" or _may_use_amx()):
                return candidate
            if name != "auto":
                raise KernelUnavailableError(f"this CPU lacks {', '.join(sorted(missing)) or 'permission for AMX'}")
    raise KernelUnavailableError("this CPU has neither AVX-512 nor AVX2")


def load_library(
    instruction_set: InstructionSet, cache_folder: Path, say: Callable[[str], None] = print
) -> ctypes.CDLL:
    """Load the kernel, building it first where it was not yet, or not whole.

    Raises: KernelUnavailableError where it cannot be built or loaded.
    """
    name = _library_name(instruction_set)
    if (prebuilt := _PREBUILT / name).exists():
        return _load(prebuilt)
    path = cache_folder / "kernels" / name
    if path.exists():
        try:
            return _load(path)
        except KernelUnavailableError as error:
            say(str(error))
    build(path, instruction_set, say)
    return _load(path)


def _load(path: Path) -> ctypes.CDLL:
    try:
        return _declare(ctypes.CDLL(str(path)))
    except (OSError, AttributeError) as error:
        raise KernelUnavailableError(f"the CPU kernel cannot be loaded: {error}") from error


def build(path: Path, instruction_set: InstructionSet, say: Callable[[str], None] = print) -> None:
    """Compile the kernel to `path`. Raises: KernelUnavailableError."""
    _find_compiler()
    say(f"compiling the CPU kernel for {instruction_set.name}, once; it takes some seconds")
    compile_library(path, sorted(_SOURCES.glob("*.cpp")), instruction_set.compiler_flags)


def compile_library(path: Path, sources: Sequence[Path], flags: Sequence[str]) -> None:
    """Compile C++ that may include the kernel's headers. Raises: KernelUnavailableError, with the first complaint."""
    compiler = _find_compiler()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            # Built aside and moved: another server that starts meanwhile finds a whole library or none.
            unfinished = Path(folder) / path.name
            command: list[str | Path] = [*compiler, *_FLAGS, *flags, f"-I{_SOURCES}", "-o", unfinished, *sources]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode != 0:
                complaint = next((line for line in result.stderr.splitlines() if "error" in line), result.stderr)
                complaint = complaint or f"{compiler[0]} ended with {result.returncode}"
                raise KernelUnavailableError(f"the CPU kernel does not compile: {complaint}")
            with unfinished.open("rb") as file:
                os.fsync(file)  # half a library, after a crash, would end every start
            unfinished.replace(path)
    except OSError as error:
        raise KernelUnavailableError(f"the CPU kernel cannot be built: {error}") from error


def _find_compiler() -> list[str]:
    """The compiler's command, of $CXX or g++. Raises: KernelUnavailableError where there is none."""
    try:
        compiler = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    except ValueError as error:
        raise KernelUnavailableError(f"CXX names no compiler: {error}") from error
    if shutil.which(compiler[0]) is None:
        raise KernelUnavailableError(f"there is no C++ compiler ({compiler[0]}) to build the CPU kernel with")
    return compiler


def _library_name(instruction_set: InstructionSet) -> str:
    flags = (*_FLAGS, *instruction_set.compiler_flags)
    digest = hashlib.sha256(" ".join(flags).encode())
    for source in sorted([*_SOURCES.glob("*.cpp"), *_SOURCES.glob("*.h")]):
        digest.update(source.name.encode() + source.read_bytes())
    return f"headrace-{instruction_set.name}-{digest.hexdigest()[:16]}.so"


@functools.cache
def _cpu_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split(":")[1].split() for line in lines if line.startswith("flags")), []))


@functools.cache
def _may_use_amx() -> bool:
    syscall = ctypes.CDLL(None).syscall
    return int(syscall(_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA)) == 0


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    pointer = ctypes.c_void_p
    for name, result, arguments in (
        ("create", pointer, (pointer,)),
        ("destroy", None, (pointer,)),
        ("step", ctypes.c_int, (pointer, pointer, pointer)),
        ("sample", ctypes.c_int, (pointer, pointer, ctypes.c_int64, pointer, pointer, pointer)),
        ("dequantise", None, (pointer, ctypes.c_int64, ctypes.c_int64, pointer)),
        ("use_wide", ctypes.c_int, (pointer, pointer, pointer)),
        ("profile", None, (pointer, pointer)),
        ("most_integer_rows", ctypes.c_int64, (ctypes.c_int64,)),
    ):
        function = getattr(library, f"headrace_{name}")
        function.restype, function.argtypes = result, arguments
    return library


if __name__ == "__main__":
    for each in INSTRUCTION_SETS:
        build(_PREBUILT / _library_name(each), each)
