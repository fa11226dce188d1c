"""`python -m headrace.benchmarks.constrained URL`: what plain streams notice of neighbours that keep to a grammar.

As many streams at once as `--width`; half of them are plain, the other half free in one kind of run and held to a JSON
schema in the other. The two take turns, for as many rounds as asked. What counts is the gap between the plain streams'
tokens: the ratio of its median with constrained neighbours to that without, for greedy and for sampled streams, as the
median over the rounds. The server should be idle otherwise. The last line is one JSON object.
"""

import argparse
import asyncio
import json
import statistics
from collections.abc import Sequence
from typing import Any

from headrace.benchmarks.completion_client import CompletionClient, Endpoint
from headrace.benchmarks.http_client import HttpClient, Target
from headrace.benchmarks.measurement import Outcome, Timeline, percentile

_PROMPT = "Tell me of {} mills and the wheels that drive them."
# So many items that no answer comes to their end.
_ITEM = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 5, "maxLength": 20},
        "kind": {"enum": ["overshot", "undershot", "breastshot"]},
        "metres": {"type": "number"},
        "built": {"type": "string", "format": "date"},
    },
    "required": ["name", "kind", "metres", "built"],
    "additionalProperties": False,
}
_SCHEMA = {"type": "array", "items": _ITEM, "minItems": 100}


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("constrained", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("url", help="of a server without other work")
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(args)
    results: dict[str, Any] = {}
    print("| streams | free neighbours: ITL p50 | p99 | constrained: ITL p50 | p99 | ratio p50 |")
    print("|---|---|---|---|---|---|")
    for name, temperature in (("greedy", 0.0), ("sampled", 0.8)):
        rounds: list[tuple[list[float], list[float]]] = []
        for index in range(options.rounds + 1):
            free, held = (
                asyncio.run(_gaps_ms(options.url, options.width, options.output_tokens, temperature, is_held=is_held))
                for is_held in (False, True)
            )
            if index > 0:  # the first warms up
                rounds.append((free, held))
        ratio = statistics.median(percentile(held, 50) / percentile(free, 50) for free, held in rounds)
        cells = [
            f"{statistics.median(percentile(each[side], percent) for each in rounds):.1f} ms"
            for side in (0, 1)
            for percent in (50, 99)
        ]
        print(f"| {name} | {' | '.join(cells)} | {ratio:.3f} |", flush=True)
        results[name] = {"ratio_p50": ratio, "rounds": [[percentile(each, 50) for each in pair] for pair in rounds]}
    print(json.dumps(results))
    return 0


async def _gaps_ms(url: str, width: int, num_tokens: int, temperature: float, *, is_held: bool) -> list[float]:
    """Of the plain half's streams, from when all run until the first ends."""
    http = HttpClient(Target.parse(url))
    client = CompletionClient(http, Endpoint.COMPLETIONS)
    timelines = [Timeline(0, num_tokens) for _ in range(width)]

    async def stream(index: int) -> None:
        fields = {
            "prompt": _PROMPT.format(index),
            "max_tokens": num_tokens,
            "temperature": temperature,
            "seed": index,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        fields |= {"guided_json": _SCHEMA} if index % 2 and is_held else {"ignore_eos": True}
        await client.stream(json.dumps(fields).encode(), timelines[index])

    try:
        await asyncio.gather(*(stream(index) for index in range(width)))
    finally:
        http.close()
    for timeline in timelines:
        if timeline.outcome is not Outcome.OK or timeline.output_tokens != num_tokens:
            raise SystemExit(
                f"constrained: a stream {timeline.outcome} after {timeline.output_tokens}: {timeline.detail}"
            )
    begin_s = max(timeline.content_s[0] for timeline in timelines)
    end_s = min(timeline.content_s[-1] for timeline in timelines)
    return [
        1000 * (later - earlier)
        for timeline in timelines[::2]
        for earlier, later in zip(timeline.content_s, timeline.content_s[1:], strict=False)
        if begin_s <= earlier and later <= end_s
    ]


if __name__ == "__main__":
    raise SystemExit(main())
