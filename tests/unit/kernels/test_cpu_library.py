"""Which instruction set is chosen, and how the kernel's library is named, built, kept and found again."""

import ctypes
import platform
import sys
from pathlib import Path

import pytest

from headrace.kernels import cpu_library
from headrace.kernels.cpu_library import (
    INSTRUCTION_SETS,
    InstructionSet,
    KernelUnavailableError,
    choose_instruction_set,
    load_library,
)

pytestmark = pytest.mark.xdist_group("cpu kernel")  # which each worker would compile

AVX2 = INSTRUCTION_SETS[-1]
ANY = InstructionSet("any", frozenset(), ())
FUNCTIONS = ("create", "destroy", "step", "sample", "dequantise", "use_wide", "profile", "most_integer_rows")


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kernel that compiles in no time and does nothing; its `create` returns the header's number."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "number.h").write_text("#define NUMBER 1\n")
    bodies = "\n".join(f"long headrace_{name}() {{ return NUMBER; }}" for name in FUNCTIONS)
    (folder / "interface.cpp").write_text(f'#include "number.h"\nextern "C" {{\n{bodies}\n}}\n')
    monkeypatch.setattr(cpu_library, "_SOURCES", folder)
    monkeypatch.setattr(cpu_library, "_PREBUILT", folder / "prebuilt")
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def pretend(monkeypatch: pytest.MonkeyPatch, cpu_flags: frozenset[str], may_use_amx: bool = True) -> None:
    monkeypatch.setattr(cpu_library, "_cpu_flags", lambda: cpu_flags)
    monkeypatch.setattr(cpu_library, "_may_use_amx", lambda: may_use_amx)


def number_of(library: ctypes.CDLL) -> int | None:
    number: int | None = library.headrace_create(None)
    return number


def test_the_best_instruction_set_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_flags: frozenset[str] = frozenset()
    for each in reversed(INSTRUCTION_SETS):
        cpu_flags |= each.cpu_flags
        pretend(monkeypatch, cpu_flags)
        assert choose_instruction_set() is each
        # The others that this CPU has can be named.
        for lesser in INSTRUCTION_SETS[INSTRUCTION_SETS.index(each) :]:
            assert choose_instruction_set(lesser.name) is lesser


def test_amx_needs_the_systems_permission(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, frozenset().union(*(each.cpu_flags for each in INSTRUCTION_SETS)), may_use_amx=False)
    assert choose_instruction_set().name == "avx512_bf16"
    with pytest.raises(KernelUnavailableError, match="lacks permission for AMX"):
        choose_instruction_set("amx")


def test_what_a_cpu_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, AVX2.cpu_flags - {"fma", "f16c"})
    with pytest.raises(KernelUnavailableError, match="neither AVX-512 nor AVX2"):
        choose_instruction_set()
    with pytest.raises(KernelUnavailableError, match="this CPU lacks f16c, fma"):
        choose_instruction_set("avx2")
    with pytest.raises(KernelUnavailableError, match=r"this CPU lacks avx512_bf16, .*avx512f"):
        choose_instruction_set("avx512_bf16")


def test_the_machines_own_flags_are_read() -> None:
    assert cpu_library._cpu_flags() <= set(Path("/proc/cpuinfo").read_text().split())


@pytest.mark.parametrize(("system", "machine"), [("darwin", "arm64"), ("linux", "aarch64"), ("win32", "x86_64")])
def test_other_platforms_are_named(monkeypatch: pytest.MonkeyPatch, system: str, machine: str) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    with pytest.raises(KernelUnavailableError, match=f"not {system} {machine}"):
        choose_instruction_set()


def test_a_library_is_built_once(sources: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert number_of(load_library(ANY, cache)) == 1
    [path] = (cache / "kernels").iterdir()
    assert path.name.startswith("headrace-any-")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert number_of(load_library(ANY, cache)) == 1
    assert list((cache / "kernels").iterdir()) == [path], "nothing unfinished is left beside it"


def test_changed_sources_flags_and_headers_are_other_libraries(sources: Path, cache: Path) -> None:
    load_library(ANY, cache)
    (sources / "number.h").write_text("#define NUMBER 2\n")
    assert number_of(load_library(ANY, cache)) == 2
    (sources / "more.cpp").write_text("int more;\n")
    load_library(ANY, cache)
    load_library(InstructionSet("any", frozenset(), ("-O1",)), cache)
    load_library(InstructionSet("other", frozenset(), ()), cache)
    assert len(list((cache / "kernels").iterdir())) == 5


def test_a_library_beside_the_sources_is_preferred(sources: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_library(ANY, cache)
    [path] = (cache / "kernels").iterdir()
    (sources / "prebuilt").mkdir()
    path.rename(sources / "prebuilt" / path.name)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert number_of(load_library(ANY, cache)) == 1
    assert not list((cache / "kernels").iterdir())


def test_a_prebuilt_library_of_other_sources_is_not_used(sources: Path, cache: Path) -> None:
    load_library(ANY, cache)
    [path] = (cache / "kernels").iterdir()
    (sources / "prebuilt").mkdir()
    path.rename(sources / "prebuilt" / path.name)
    (sources / "number.h").write_text("#define NUMBER 3\n")
    assert number_of(load_library(ANY, cache)) == 3


@pytest.mark.parametrize("variable", ["PATH", "CXX"])
def test_a_missing_compiler_is_named(
    sources: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv(variable, "/no/such/place")
    with pytest.raises(KernelUnavailableError, match="no C\\+\\+ compiler"):
        load_library(ANY, cache)


def test_another_compiler_can_be_named(sources: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = cache.parent / "compiler"
    compiler.write_text('#!/bin/sh\nexec g++ -DWRAPPED "$@"\n')
    compiler.chmod(0o755)
    (sources / "number.h").write_text("#ifdef WRAPPED\n#define NUMBER 4\n#endif\n")
    monkeypatch.setenv("CXX", str(compiler))
    assert number_of(load_library(ANY, cache)) == 4


def test_the_compilers_first_complaint_is_told_and_nothing_is_left(sources: Path, cache: Path) -> None:
    (sources / "interface.cpp").write_text("int twice;\ndouble twice;\nfloat twice;\n")
    with pytest.raises(KernelUnavailableError, match=r"does not compile: .*interface\.cpp:2:8: error: .*twice"):
        load_library(ANY, cache)
    assert not list((cache / "kernels").iterdir())


def test_flags_that_the_compiler_does_not_know_are_told(sources: Path, cache: Path) -> None:
    with pytest.raises(KernelUnavailableError, match=r"does not compile: .*-mno-such-thing"):
        load_library(InstructionSet("future", frozenset(), ("-mno-such-thing",)), cache)


def test_a_folder_that_cannot_be_written_is_named(sources: Path, cache: Path) -> None:
    cache.write_text("a file")
    with pytest.raises(KernelUnavailableError, match=f"cannot be built: .*{cache}"):
        load_library(ANY, cache)


@pytest.mark.parametrize("content", ["", "no library"])
def test_a_damaged_library_is_built_anew_aloud(sources: Path, cache: Path, content: str) -> None:
    (cache / "kernels").mkdir(parents=True)
    name = cpu_library._library_name(ANY)
    (cache / "kernels" / name).write_text(content)
    said: list[str] = []
    load_library(ANY, cache, said.append)
    assert "cannot be loaded" in said[0]
    assert name in said[0]
    assert said[1].startswith("compiling the CPU kernel for")


def test_without_a_compiler_nothing_is_said_to_be_compiled(
    sources: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    for compiler in ("no-such-compiler", "g++ 'half"):
        monkeypatch.setenv("CXX", compiler)
        with pytest.raises(KernelUnavailableError, match="compiler"):
            load_library(ANY, cache, said.append)
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(KernelUnavailableError, match="false ended with 1"):
        load_library(ANY, cache, said.append)
    assert len(said) == 1


def test_a_library_without_the_functions_is_named(sources: Path, cache: Path) -> None:
    (sources / "interface.cpp").write_text("int nothing;\n")
    with pytest.raises(KernelUnavailableError, match=r"cannot be loaded: .*headrace_create"):
        load_library(ANY, cache)


def test_the_compiler_knows_every_instruction_set(cache: Path, libraries: dict[str, ctypes.CDLL]) -> None:
    """Also those that this machine has not got, of which a wheel may carry libraries."""
    for each in INSTRUCTION_SETS:
        if each.name not in libraries:
            cpu_library.build(cache / each.name, each)
            assert (cache / each.name).stat().st_size > 100_000
