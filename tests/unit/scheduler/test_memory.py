"""Free memory as a control group sees it."""

from pathlib import Path

import pytest

from headrace.scheduler import memory

GIB = 2**30


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 16 GiB available and no limits."""
    for name in ("_MEMINFO", "_SELF_CGROUP", "_CGROUP_ROOT"):
        monkeypatch.setattr(memory, name, tmp_path / name)
    (tmp_path / "_MEMINFO").write_text(f"MemTotal: 99 kB\nMemAvailable:   {16 * GIB // 1024} kB\n")
    return tmp_path


def limit(folder: Path, limit_name: str, limit: str, usage_name: str, usage: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / limit_name).write_text(f"{limit}\n")
    (folder / usage_name).write_text(f"{usage}\n")


def test_without_a_control_group_the_machine_decides(machine: Path) -> None:
    assert memory.available_bytes() == 16 * GIB


@pytest.mark.parametrize(("own", "expected"), [("max", 3 * GIB), (str(2 * GIB), GIB)])
def test_in_cgroup_v2_the_tightest_group_on_the_way_up_decides(machine: Path, own: str, expected: int) -> None:
    (machine / "_SELF_CGROUP").write_text("0::/pod/app\n")
    root = machine / "_CGROUP_ROOT"
    limit(root / "pod", "memory.max", str(4 * GIB), "memory.current", GIB)
    limit(root / "pod" / "app", "memory.max", own, "memory.current", GIB)
    assert memory.available_bytes() == expected


def test_in_cgroup_v1_the_memory_controller_decides(machine: Path) -> None:
    (machine / "_SELF_CGROUP").write_text("3:cpuset:/x\n4:memory:/app\n")
    folder = machine / "_CGROUP_ROOT" / "memory" / "app"
    limit(folder, "memory.limit_in_bytes", str(8 * GIB), "memory.usage_in_bytes", 3 * GIB)
    assert memory.available_bytes() == 5 * GIB


def test_where_nothing_can_be_read_nothing_is_claimed(machine: Path) -> None:
    (machine / "_MEMINFO").unlink()
    assert memory.available_bytes() is None
