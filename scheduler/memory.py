"""How much memory this process may still take, as its control group sees it where one limits it."""

from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_SELF_CGROUP = Path("/proc/self/cgroup")
_CGROUP_ROOT = Path("/sys/fs/cgroup")


def available_bytes() -> int | None:
    """The machine's available memory, or what the control group leaves of it; None where neither can be read."""
    found = [value for value in (_machine_available(), _cgroup_available()) if value is not None]
    return min(found, default=None)


def _machine_available() -> int | None:
    try:
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return None


def _cgroup_available() -> int | None:
    """The smallest allowance on the way from the process's group up to the root, in cgroup v2 or v1."""
    try:
        lines = _SELF_CGROUP.read_text().splitlines()
    except OSError:
        return None
    left = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, limit_name, usage_name = _CGROUP_ROOT, "memory.max", "memory.current"
            reclaimable = "inactive_file"
        elif controllers == "memory":
            base, limit_name, usage_name = _CGROUP_ROOT / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            reclaimable = "total_inactive_file"
        else:
            continue
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):
            if base not in (folder, *folder.parents):
                break
            try:
                limit, usage = (int((folder / name).read_text()) for name in (limit_name, usage_name))
            except (OSError, ValueError):  # absent, or "max"
                continue
            left.append(max(0, limit - usage + _read_stat(folder / "memory.stat", reclaimable)))
    return min(left, default=None)


def _read_stat(path: Path, name: str) -> int:
    """A line of memory.stat in bytes: page cache counts as used, and is given up on demand."""
    try:
        return next(int(line.split()[1]) for line in path.read_text().splitlines() if line.split()[0] == name)
    except (OSError, ValueError, IndexError, StopIteration):
        return 0
