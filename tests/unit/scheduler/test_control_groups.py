"""Free memory in control groups of any depth, against the smallest allowance found by hand."""

from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from headrace.scheduler import memory

MIB = 2**20
MACHINE = 100 * MIB

# (limit or None for none, usage, reclaimable page cache), in MiB.
LEVELS = st.lists(
    st.tuples(st.none() | st.integers(0, 300), st.integers(0, 200), st.none() | st.integers(0, 100)), max_size=4
)


class Machine:
    """A machine's files under a folder of the test's own."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("_MEMINFO", "_SELF_CGROUP", "_CGROUP_ROOT"):
            monkeypatch.setattr(memory, name, root / name)
        self.groups = root / "_CGROUP_ROOT"
        self.self_group = root / "_SELF_CGROUP"
        self.meminfo = root / "_MEMINFO"
        self.meminfo.write_text(f"MemTotal: 1 kB\nMemFree: 2 kB\nMemAvailable:  {MACHINE // 1024} kB\n")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


VERSIONS = {
    1: ("memory/", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", "7:memory:{}\n"),
    2: ("", "memory.max", "memory.current", "inactive_file", "0::{}\n"),
}


@pytest.mark.parametrize("version", VERSIONS)
def test_the_smallest_allowance_from_the_own_group_up_to_the_root_counts(
    tmp_path_factory: pytest.TempPathFactory, version: int
) -> None:
    base, limit_name, usage_name, cache_name, line = VERSIONS[version]

    @settings(max_examples=60, derandomize=True, deadline=None)
    @given(LEVELS)
    def check(levels: list[tuple[int | None, int, int | None]]) -> None:
        with pytest.MonkeyPatch.context() as monkeypatch:
            machine = Machine(tmp_path_factory.mktemp("machine"), monkeypatch)
            folder = machine.groups / base
            allowances = [MACHINE]
            for i, (limit, usage, cache) in enumerate(levels):
                folder = folder / f"group{i}"
                folder.mkdir(parents=True)
                no_limit = "max" if version == 2 else str(2**63 - 4096)
                (folder / limit_name).write_text(f"{no_limit if limit is None else limit * MIB}\n")
                (folder / usage_name).write_text(f"{usage * MIB}\n")
                if cache is not None:
                    other = "inactive_file 1\n" if version == 1 else "total_inactive_file 1\n"
                    (folder / "memory.stat").write_text(f"anon 5\n{other}{cache_name} {cache * MIB}\nx 1\n")
                if limit is not None:
                    allowances.append(max(0, limit - usage + (cache or 0)) * MIB)
            path = "/" + "/".join(f"group{i}" for i in range(len(levels)))
            machine.self_group.write_text(f"9:cpuset:/elsewhere\n{line.format(path)}8:cpu,cpuacct:/x\n")
            # A group beside the path limits others, not this process.
            beside = machine.groups / base / "beside"
            beside.mkdir(parents=True, exist_ok=True)
            (beside / limit_name).write_text("1\n")
            (beside / usage_name).write_text("0\n")
            assert memory.available_bytes() == min(allowances)

    check()


def test_a_group_that_is_not_mounted_here_leaves_the_ones_above_it(machine: Machine) -> None:
    """As in a container without a namespace of its own: the path is the host's, the mount shows its end."""
    machine.self_group.write_text("4:memory:/docker/0123\n")
    folder = machine.groups / "memory"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text(str(50 * MIB))
    (folder / "memory.usage_in_bytes").write_text(str(20 * MIB))
    assert memory.available_bytes() == 30 * MIB


def test_a_group_over_its_limit_has_nothing_left(machine: Machine) -> None:
    machine.self_group.write_text("0::/\n")
    machine.groups.mkdir()
    (machine.groups / "memory.max").write_text(str(10 * MIB))
    (machine.groups / "memory.current").write_text(str(11 * MIB))
    assert memory.available_bytes() == 0


@pytest.mark.parametrize("stat", ["", "\n\n", "inactive_file\n", "inactive_file many\n", "active_file 5\n"])
def test_statistics_that_cannot_be_read_count_as_none(machine: Machine, stat: str) -> None:
    machine.self_group.write_text("0::/\n")
    machine.groups.mkdir()
    (machine.groups / "memory.max").write_text(str(10 * MIB))
    (machine.groups / "memory.current").write_text(str(4 * MIB))
    (machine.groups / "memory.stat").write_text(stat)
    assert memory.available_bytes() == 6 * MIB


@pytest.mark.parametrize("meminfo", ["", "MemTotal: 5 kB\n", "MemAvailable: many kB\n"])
def test_without_the_machines_own_number_the_group_decides(machine: Machine, meminfo: str) -> None:
    machine.meminfo.write_text(meminfo)
    assert memory.available_bytes() is None
    machine.self_group.write_text("0::/\n")
    machine.groups.mkdir()
    (machine.groups / "memory.max").write_text(str(10 * MIB))
    (machine.groups / "memory.current").write_text(str(4 * MIB))
    assert memory.available_bytes() == 6 * MIB
