"""What a server process holds when it has nothing to do: the same before and after whatever clients did to it."""

import time
from dataclasses import dataclass

from server_process import ServerProcess
from waiting import until


@dataclass(frozen=True)
class Footprint:
    """Counts that stand still, and memory, which allocators keep some of."""

    num_tasks: float
    num_threads: int
    num_descriptors: int
    resident_bytes: int

    def leaks(self, before: "Footprint", num_idle_threads: int) -> dict[str, float]:
        """What is there beyond `before`. Idle workers end when another one is next used, so that some may be there or
        not."""
        more = {
            "tasks": self.num_tasks - before.num_tasks,
            "descriptors": self.num_descriptors - before.num_descriptors,
            "threads": max(0, self.num_threads - before.num_threads - num_idle_threads),
        }
        return {name: num for name, num in more.items() if num}


def settle(server: ServerProcess, before: Footprint | None = None) -> Footprint:
    """Wait until all is finished, and look at what is left; for a while until it is as `before`."""
    until(lambda: is_idle(server), "no request, no block is held", timeout_s=60)
    # The connections of those requests, too, are closed a moment later.
    counts: list[tuple[float, int, int]] = []

    def is_calm() -> bool:
        time.sleep(0.2)
        tasks = server.metrics()["headrace_event_loop_tasks"]
        counts.append((tasks, server.num_threads(), server.num_descriptors()))
        return len(counts) >= 5 and len(set(counts[-5:])) == 1

    until(is_calm, "the counts stand still", timeout_s=30)
    # A leak stays; a connection that is still being closed does not.
    deadline_s = time.monotonic() + 60
    while before and counts[-1][::2] != (before.num_tasks, before.num_descriptors) and time.monotonic() < deadline_s:
        is_calm()
    return Footprint(*counts[-1], server.resident_bytes())


def is_idle(server: ServerProcess) -> bool:
    metrics = server.metrics()
    is_free = metrics["headrace_kv_cache_free_blocks"] == metrics["headrace_kv_cache_total_blocks"]
    return metrics["headrace_num_requests_running"] == metrics["headrace_num_requests_waiting"] == 0 and is_free
