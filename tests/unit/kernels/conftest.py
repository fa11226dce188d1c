"""The C++ kernel, compiled once per session for the instruction sets that this machine has: in `make test` for the best
and the least of them, and for AMX as it is emulated, in `make test-all` for every one."""

import ctypes
import fcntl
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cpu_models import EMULATED_AMX
from headrace.kernels.cpu_library import (
    INSTRUCTION_SETS,
    InstructionSet,
    KernelUnavailableError,
    choose_instruction_set,
    load_library,
)
from requirements import IS_LONG, lack

SETS = {each.name: each for each in (*INSTRUCTION_SETS, EMULATED_AMX)}


def why_not(instruction_set: InstructionSet) -> str | None:
    """Why this machine cannot run it, None where it can."""
    try:
        choose_instruction_set("avx512_bf16" if instruction_set is EMULATED_AMX else instruction_set.name)
    except KernelUnavailableError as error:
        return str(error)
    return None


@pytest.fixture(scope="session")
def kernel_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all of the session's workers."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return tmp_path_factory.mktemp("kernels")
    folder = tmp_path_factory.getbasetemp().parent / "kernels"
    folder.mkdir(exist_ok=True)
    return folder


def load_once(instruction_set: InstructionSet, folder: Path) -> ctypes.CDLL:
    """Load what one worker has compiled and the others have waited for."""
    with (folder / f"{instruction_set.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return load_library(instruction_set, folder)


@pytest.fixture(scope="session")
def libraries(kernel_folder: Path) -> dict[str, ctypes.CDLL]:
    runnable = [each for each in SETS.values() if why_not(each) is None]
    if not IS_LONG:
        native = [each for each in runnable if each is not EMULATED_AMX]
        runnable = [each for each in runnable if each in (*native[:1], *native[-1:], EMULATED_AMX)]
    with ThreadPoolExecutor(2) as pool:
        try:
            loaded = list(pool.map(lambda each: load_once(each, kernel_folder), runnable))
        except KernelUnavailableError as error:
            if "no C++ compiler" not in str(error):
                raise
            lack(str(error))
    return {each.name: library for each, library in zip(runnable, loaded, strict=True)}


@pytest.fixture(params=SETS)
def library(request: pytest.FixtureRequest, libraries: dict[str, ctypes.CDLL]) -> ctypes.CDLL:
    name: str = request.param
    if name not in libraries:
        pytest.skip(f"{name}: {why_not(SETS[name]) or 'runs in make test-all'}")
    return libraries[name]


@pytest.fixture
def any_library(libraries: dict[str, ctypes.CDLL]) -> ctypes.CDLL:
    """One for what does not depend on the instruction set."""
    if not libraries:
        pytest.skip(str(why_not(INSTRUCTION_SETS[-1])))
    return next(iter(libraries.values()))
