"""The C++ kernel reads and writes only what is its own, and its threads do not race."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from cpu_models import EMULATED_AMX
from headrace.kernels import cpu_library
from headrace.kernels.cpu_library import (
    INSTRUCTION_SETS,
    InstructionSet,
    KernelUnavailableError,
    choose_instruction_set,
)
from requirements import IS_LONG, long, need

SCRIPT = Path(__file__).parents[2] / "support" / "sanitized_kernel.py"
# Unoptimised, they find the most and compile the fastest.
ADDRESS_FLAGS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1", "-O0")
THREAD_FLAGS = ("-fsanitize=thread", "-g1", "-O1")


def runnable_sets() -> list[InstructionSet]:
    try:
        best = choose_instruction_set()
    except KernelUnavailableError as error:
        pytest.skip(str(error))
    found = list(INSTRUCTION_SETS[INSTRUCTION_SETS.index(best) :])
    return [EMULATED_AMX, *found] if EMULATED_AMX.cpu_flags <= cpu_library._cpu_flags() else found


def runtime(name: str) -> str:
    """The path of a sanitizer's shared library, which Python has to load first."""
    command = [os.environ.get("CXX", "g++"), f"-print-file-name={name}"]
    try:
        path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        path = ""
    need(os.path.isabs(path), name)
    return path


def check(folder: Path, sets: list[InstructionSet], flags: tuple[str, ...], environment: dict[str, str]) -> None:
    paths = [folder / each.name for each in sets]
    sanitized = [replace(each, compiler_flags=(*each.compiler_flags, *flags)) for each in sets]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(cpu_library.build, paths, sanitized))
    result = subprocess.run(
        [sys.executable, SCRIPT, *paths],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr[-5000:]
    assert result.stdout.split() == [str(path) for path in paths]


def test_no_memory_is_misused_and_nothing_undefined_computed(tmp_path: Path) -> None:
    environment = {
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libubsan.so')}",
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    }
    sets = runnable_sets()
    if not IS_LONG:
        sets = sets[:1]  # what serves here
    check(tmp_path, sets, ADDRESS_FLAGS, environment)


@long
def test_threads_do_not_race(tmp_path: Path) -> None:
    """One instruction set tells: all share their memory in the same places."""
    environment = {
        "LD_PRELOAD": runtime("libtsan.so"),
        "TSAN_OPTIONS": "halt_on_error=1:ignore_noninstrumented_modules=1",
        "OMP_NUM_THREADS": "1",
    }
    check(tmp_path, runnable_sets()[-1:], THREAD_FLAGS, environment)
