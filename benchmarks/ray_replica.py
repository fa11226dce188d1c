"""The replica of `ray_overhead`, in a module that Ray's workers can import."""

from typing import Any

from headrace.benchmarks.ray_overhead import load_engine, words
from headrace.server.ray_serve import Replica


class StampingReplica(Replica):
    load_engine = staticmethod(load_engine)

    async def __init__(self, settings: dict[str, Any], num_replicas: int) -> None:
        words()
        await super().__init__(settings, num_replicas)
