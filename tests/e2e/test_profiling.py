"""A real model's steps, traced while it serves: the trace says what the kernel computed, and the answer is as ever."""

import gzip
import json
from concurrent.futures import ThreadPoolExecutor

import httpx

from server_process import ServerProcess

BODY = {"prompt": "The mill wheel", "max_tokens": 12, "temperature": 0, "ignore_eos": True}


def test_steps_of_a_stream_are_traced_and_its_text_is_what_it_is_without(server: ServerProcess) -> None:
    def answer() -> str:
        text: str = httpx.post(f"{server.url()}/v1/completions", json=BODY, timeout=120).json()["choices"][0]["text"]
        return text

    alone = answer()
    with ThreadPoolExecutor(1) as pool:
        profile = pool.submit(
            httpx.post, f"{server.url()}/admin/profile", json={"steps": 3, "timeout": 60}, timeout=120
        )
        while not profile.done():
            assert answer() == alone
    trace = profile.result()
    assert trace.status_code == 200, trace.text
    events = json.loads(gzip.decompress(trace.content))["traceEvents"]
    names = [event["name"] for event in events if event["ph"] == "X"]
    for name in ("schedule", "launch", "pack", "forward", "wait", "update", "publish"):
        assert names.count(name) == 3, name
    assert {"qkv", "attention", "head"} <= set(names)
