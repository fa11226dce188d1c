"""Clients behind a network at its worst get the right text, a part of it that they can tell, or a refusal; never wrong
text. TESTS_SEED repeats what went wrong with which connection."""

import os
import random
from collections import Counter
from typing import Any

import anyio
import httpx

from footprint import settle
from nemesis import (
    FAULTS,
    NativeReading,
    Nemesis,
    check_native_stream,
    create_native,
    exchange,
    read_native,
    read_openai_stream,
)
from server_process import ServerProcess

SEED = int(os.environ.get("TESTS_SEED") or random.randrange(2**32))
NUM_CLIENTS = 16
NUM_TRIES = 60
PROMPTS = ("The mill wheel", "Once upon a time", "1, 2, 3, 4,")
NUM_BODIES = 6


def _body(i: int) -> dict[str, Any]:
    return {
        "prompt": PROMPTS[i % len(PROMPTS)],
        "max_tokens": 8 + 8 * (i % 2),
        "temperature": 0,
        "ignore_eos": True,
    }


def _reference(server: ServerProcess, i: int) -> str:
    answer = httpx.post(f"{server.url()}/v1/completions", json=_body(i), timeout=60)
    return str(answer.json()["choices"][0]["text"])


def test_whatever_the_network_does_no_client_gets_wrong_text_and_nothing_is_left(server: ServerProcess) -> None:
    print(f"TESTS_SEED={SEED}")
    references = [_reference(server, i) for i in range(NUM_BODIES)]
    before = settle(server)
    outcomes: Counter[str] = Counter()
    readings: list[NativeReading] = []

    async def stream_openai(i: int) -> None:
        record = await exchange(nemesis.url, "POST", "/v1/completions", _body(i) | {"stream": True})
        outcome, text = read_openai_stream(record)
        assert text == references[i % NUM_BODIES] if outcome == "whole" else references[i % NUM_BODIES].startswith(text)
        outcomes[outcome] += 1

    async def stream_native(i: int) -> None:
        # Its grace time must outlast every freeze; where its id never arrived, it ends by itself.
        path = await create_native(nemesis.url, _body(i) | {"disconnect_grace_s": 60}, NUM_TRIES)
        if path is not None:
            reading = await read_native(nemesis.url, path, NUM_TRIES)
            check_native_stream(reading)
            assert reading.text == references[i % NUM_BODIES]
            readings.append(reading)

    async def storm() -> None:
        async with anyio.create_task_group() as tasks:
            for i in range(NUM_CLIENTS // 2):
                tasks.start_soon(stream_openai, i)
                tasks.start_soon(stream_native, i)

    with Nemesis(server.url(), SEED) as nemesis:
        anyio.run(storm)
    print(f"{dict(outcomes)}, {len(readings)} native, faults {dict(nemesis.faults)}")
    assert len(readings) > 0
    assert min(nemesis.faults[fault] for fault in FAULTS) > 0
    after = settle(server, before)
    assert after.leaks(before, num_idle_threads=2) == {}
    assert "Traceback" not in server.output
