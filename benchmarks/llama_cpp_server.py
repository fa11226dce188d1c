"""llama.cpp's own HTTP server, as the xllamacpp package embeds it; run by the Python of that package's environment.

`python llama_cpp_server.py GGUF PORT SLOTS CONTEXT_TOKENS THREADS`, until a signal ends it. Every slot has its context;
continuous batching, prefix caching and flash attention are as the server has them by default.
"""

import signal
import sys

import xllamacpp


def main(path: str, port: int, num_slots: int, context_tokens: int, num_threads: int) -> None:
    """Serve `num_slots` requests at once, each of at most `context_tokens`."""
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.port = port
    params.n_parallel = num_slots
    params.n_ctx = num_slots * context_tokens
    params.cpuparams.n_threads = num_threads
    params.cpuparams_batch.n_threads = num_threads
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    signal.pause()


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
