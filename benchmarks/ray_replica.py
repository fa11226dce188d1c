"""The replica of `ray_overhead`, in a module that Ray's workers can import."""

from headrace.benchmarks.ray_overhead import load_engine
from headrace.server.ray_serve import Replica


class StampingReplica(Replica):
    load_engine = staticmethod(load_engine)
