"""Drives a library that serves no HTTP, in its own process; run by the Python of that library's environment.

`python peer_worker.py openvino|transformers MODEL KV_CACHE_BYTES THREADS`. A JSON line on stdin asks for a closed loop,
{"prompts": [...], "width": 8, "max_tokens": 128}: each stream sends as many of the prompts as every other, one after
the other. A JSON line on stdout answers: {"requests": [...]}, each {"wave", "launched_s", "token_s": [...],
"prompt_tokens", "error"}. Seconds are CLOCK_MONOTONIC's, which is one for all processes of a machine. Imports nothing
of Headrace: it is run where Headrace is not installed.
"""

import dataclasses
import glob
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, Protocol

_BATCHED_TOKENS: Final = 256  # of a step; OpenVINO's and Headrace's default
_GPU_BATCHED_TOKENS: Final = 2048


class Engine(Protocol):
    """A continuous batcher, stepped by one thread."""

    def add(self, request_id: int, prompt: str, max_tokens: int) -> int:
        """Queue a greedy request that ignores the end of sequence; returns its prompt's tokens."""
        ...

    def step(self) -> Iterable[tuple[int, int, bool, str]]:
        """Compute; returns (request id, new tokens, whether it ended, error) of the requests that got on."""
        ...


class OpenVino:
    """OpenVINO GenAI's continuous batching, by steps of its own scheduler; the model is a GGUF file."""

    def __init__(self, model: str, kv_cache_bytes: int, num_threads: int) -> None:
        import openvino_genai

        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = kv_cache_bytes // 2**30
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            model, scheduler, "CPU", {"INFERENCE_NUM_THREADS": num_threads}
        )
        self._tokenizer = self._pipeline.get_tokenizer()
        self._config = openvino_genai.GenerationConfig()
        self._config.do_sample = False
        self._config.ignore_eos = True
        self._config.apply_chat_template = False
        self._running: dict[int, Any] = {}

    def add(self, request_id: int, prompt: str, max_tokens: int) -> int:
        self._config.max_new_tokens = max_tokens
        input_ids = self._tokenizer.encode(prompt).input_ids
        self._running[request_id] = self._pipeline.add_request(request_id, input_ids, self._config)
        return int(input_ids.shape[1])

    def step(self) -> Iterable[tuple[int, int, bool, str]]:
        self._pipeline.step()
        for request_id, handle in list(self._running.items()):
            outputs = handle.read().values() if handle.can_read() else ()
            num_tokens = sum(len(output.generated_ids) for output in outputs)
            status = handle.get_status().name
            is_ended = status != "RUNNING" and not handle.can_read()
            if is_ended:
                del self._running[request_id]
            if num_tokens or is_ended:
                yield request_id, num_tokens, is_ended, "" if status in ("RUNNING", "FINISHED") else status


class Transformers:
    """transformers' continuous batching, with its thread; the model is a Hugging Face directory, with random weights
    where it holds none."""

    def __init__(self, model: str, kv_cache_bytes: int, num_threads: int) -> None:
        os.environ["OMP_NUM_THREADS"] = str(num_threads)
        import torch
        from transformers import (
            AutoConfig,
            AutoModelForCausalLM,
            AutoTokenizer,
            ContinuousBatchingConfig,
            GenerationConfig,
        )

        device = "cuda" if torch.cuda.is_available() else "cpu"
        known = {field.name for field in dataclasses.fields(ContinuousBatchingConfig)}
        is_older = "auto_switch_to_flash" not in known  # than 5.20 or so, which still had names of its own for this
        attention = "paged|sdpa" if is_older else "sdpa"
        how: dict[str, Any] = {"dtype": torch.bfloat16, "attn_implementation": attention}
        if glob.glob(f"{model}/*.safetensors"):
            decoder = AutoModelForCausalLM.from_pretrained(model, **how)
            decoder.to(device)  # type: ignore[arg-type]  # a wrapper hides `self`
        else:
            with torch.device(device):
                decoder = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model), **how).eval()
        config = decoder.config
        bytes_per_token = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        max_batch_tokens = _GPU_BATCHED_TOKENS if device == "cuda" else _BATCHED_TOKENS
        options: dict[str, Any] = {"max_batch_tokens": max_batch_tokens, "auto_switch_to_flash": False}
        batching = ContinuousBatchingConfig(**{name: value for name, value in options.items() if name in known})
        page_size = batching.page_size if "page_size" in known else batching.block_size
        batching.num_blocks = kv_cache_bytes // (bytes_per_token * page_size)
        self._tokenizer = AutoTokenizer.from_pretrained(model)
        self._manager = decoder.init_continuous_batching(
            # No token has the id -1: the end of sequence is ignored.
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=config.pad_token_id),
            continuous_batching_config=batching,
        )
        self._manager.start()
        self._num_tokens: dict[str, int] = {}

    def add(self, request_id: int, prompt: str, max_tokens: int) -> int:
        input_ids = self._tokenizer(prompt)["input_ids"]
        self._num_tokens[str(request_id)] = 0
        self._manager.add_request(input_ids, str(request_id), max_new_tokens=max_tokens, streaming=True)
        return len(input_ids)

    def step(self) -> Iterable[tuple[int, int, bool, str]]:
        output = self._manager.get_result(timeout=1)
        if output is None:
            if not self._manager.is_running():
                raise RuntimeError("the generation thread has ended")
            return
        num_tokens = len(output.generated_tokens)  # of all steps so far
        num_new = num_tokens - self._num_tokens.pop(output.request_id)
        if not output.is_finished():
            self._num_tokens[output.request_id] = num_tokens
        yield int(output.request_id), num_new, output.is_finished(), output.error or ""


def closed_loop(
    engine: Engine,
    prompts: Sequence[str],
    width: int,
    max_tokens: int,
    now_s: Callable[[], float] = time.monotonic,
    first_id: int = 0,
) -> list[dict[str, Any]]:
    """Keep `width` requests running, and describe each one; stream i sends prompts i, i + width, ..."""
    requests: dict[int, dict[str, Any]] = {}

    def launch(index: int) -> None:
        launched_s = now_s()
        prompt_tokens = engine.add(first_id + index, prompts[index], max_tokens)
        requests[index] = {
            "wave": index // width,
            "launched_s": launched_s,
            "token_s": [],
            "prompt_tokens": prompt_tokens,
            "error": "",
        }

    for index in range(min(width, len(prompts))):
        launch(index)
    num_running = len(requests)
    while num_running:
        for request_id, num_tokens, is_ended, error in engine.step():
            index = request_id - first_id
            requests[index]["token_s"] += [now_s()] * num_tokens
            if is_ended:
                requests[index]["error"] = error
                if index + width < len(prompts):
                    launch(index + width)
                else:
                    num_running -= 1
    return list(requests.values())


def main(engine_name: str, model: str, kv_cache_bytes: int, num_threads: int) -> None:
    """Answer jobs until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints is no answer
    engines: dict[str, Callable[[str, int, int], Engine]] = {"openvino": OpenVino, "transformers": Transformers}
    engine = engines[engine_name](model, kv_cache_bytes, num_threads)
    first_id = 0
    for line in sys.stdin:
        job = json.loads(line)
        requests = closed_loop(engine, job["prompts"], job["width"], job["max_tokens"], first_id=first_id)
        first_id += len(requests)
        print(json.dumps({"requests": requests}), file=answers)
    os._exit(0)  # a library's threads may not end by themselves


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
