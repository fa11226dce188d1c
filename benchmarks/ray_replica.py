"""The replica of `ray_overhead`, in a module that Ray's workers can import."""

from headrace.benchmarks.ray_overhead import load_engine, words
from headrace.server.ray_serve import Replica

words()  # before there are threads: two of them cannot load from transformers at once


class StampingReplica(Replica):
    load_engine = staticmethod(load_engine)
