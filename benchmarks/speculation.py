"""`python -m headrace.benchmarks.speculation`: what drafts gain, and what they cost where they gain nothing.

Two kinds of work: answers grounded in the input (a text or a program is repeated with a change, quoted, put in order),
and ordinary ones (questions without a text). Two engines, one with drafts and one without, take turns with the same
requests, in the same process, one step at a time: a scheduler and a runner, no HTTP. What counts is the seconds per
output token from the first token on, as the median over the rounds of the ratio of both. `num_equal` of the last line,
one JSON object, says how many answers are the same, token for token; with `--batch-invariant` all have to be.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from headrace.kernels.step_times import StepTimes
from headrace.scheduler.config import EngineConfig
from headrace.scheduler.messages import GenerationRequest, SamplingParams, Tier
from headrace.scheduler.model_loader import load_engine
from headrace.scheduler.model_source import ModelSource, resolve_model
from headrace.server.tokenizer import load_tokenizer

_PROSE = """\
A mill is driven by a wheel, and the wheel by the water that falls on it. The channel that brings the water from the
river is the headrace, and the one that takes it away is the tailrace. A gate at the head of the channel lets in as much
as the miller wants. In a dry summer the mill stands still for weeks; in spring it runs day and night. An overshot wheel
takes the water at its top and turns by its weight, an undershot wheel stands in the stream and turns by its push, and
a breastshot wheel takes it in the middle. The stones are dressed twice a year, when their furrows are shallow."""
_PROGRAM = """\
def mean_flow(readings, skip_first=False):
    total = 0.0
    count = 0
    for index, reading in enumerate(readings):
        if skip_first and index == 0:
            continue
        if reading.value is None:
            continue
        total += reading.value * reading.weight
        count += reading.weight
    if count == 0:
        raise ValueError("no readings")
    return total / count


def largest_flow(readings):
    largest = None
    for reading in readings:
        if reading.value is None:
            continue
        if largest is None or reading.value > largest.value:
            largest = reading
    return largest"""
_TABLE = """\
name, kind, metres, built
Old Mill, overshot, 4.2, 1762
Weir House, undershot, 6.0, 1801
Long Meadow, breastshot, 5.1, 1790
Upper Race, overshot, 3.8, 1755
Stone Bridge, undershot, 5.5, 1820
Green Farm, breastshot, 4.9, 1777"""
_WORK = {
    "grounded": (
        f"Repeat this text word for word, but write 'engine' in place of 'mill'.\n\n{_PROSE}",
        f"Here is a program. Write it once more with the variable `total` renamed to `weighted_sum`.\n\n{_PROGRAM}",
        f"Correct the spelling of this text and give it back in full.\n\n{_PROSE}",
        f"Give back this table with the lines in the order of the years.\n\n{_TABLE}",
        f"Quote the sentences of this text that are about wheels, word for word.\n\n{_PROSE}",
        f"Add a docstring to each function and give back the whole program.\n\n{_PROGRAM}",
        f"Turn this table into a list of JSON objects.\n\n{_TABLE}",
        f"Summarize this text in its own words and sentences.\n\n{_PROSE}",
    ),
    "ordinary": (
        "Why is the sky blue?",
        "Write a short story about a lighthouse keeper and a fox.",
        "How do I make bread without yeast?",
        "What is the difference between a virus and a bacterium?",
        "Give me advice for a first job interview.",
        "Describe a walk through a forest in autumn.",
        "Explain recursion to a child.",
        "What should I see in Rome in two days?",
    ),
}


@dataclass(slots=True)
class _Run:
    """What one engine made of some requests: seconds and tokens from each one's first token on."""

    seconds: float = 0.0
    num_tokens: int = 0
    num_steps: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    answers: dict[int, list[int]] = field(default_factory=dict)


class _Engine:
    """The engine's loop, one step at a time."""

    def __init__(
        self,
        source: ModelSource,
        end_token_ids: frozenset[int],
        num_speculative_tokens: int,
        options: argparse.Namespace,
    ) -> None:
        config = EngineConfig(
            source.path,
            batch_invariant=options.batch_invariant,
            enable_prefix_caching=False,
            kv_cache_bytes=2**28,
            itl_targets_s=(float("inf"),) * len(Tier),
            speculative_tokens=num_speculative_tokens,
            speculation_max_seqs=options.max_seqs,
        )
        self._scheduler, self._runner = load_engine(config)
        for shape, seconds in self._runner.warm_up():
            self._scheduler.observe(shape, seconds)
        while self._runner.use_idle_time():
            pass
        self._end_token_ids = end_token_ids
        self._next_id = 0

    def run(self, prompts: list[list[int]], width: int, temperature: float, max_tokens: int) -> _Run:
        """So many requests at once, again and again until there are none."""
        run, before = _Run(), self._scheduler.load()
        for first in range(0, len(prompts), width):
            for index, prompt in enumerate(prompts[first : first + width], start=first):
                params = SamplingParams(
                    temperature, seed=index, max_tokens=max_tokens, stop_token_ids=self._end_token_ids
                )
                self._scheduler.add(GenerationRequest(self._next_id + index, tuple(prompt), params, 0.0))
                run.answers[index] = []
            self._finish(run)
        self._next_id += len(prompts)
        load = self._scheduler.load()
        run.num_drafted = load.num_drafted_tokens - before.num_drafted_tokens
        run.num_accepted = load.num_accepted_tokens - before.num_accepted_tokens
        return run

    def _finish(self, run: _Run) -> None:
        while self._scheduler.has_work:
            began_s = time.perf_counter()
            output = self._scheduler.schedule(began_s)
            launched_s = time.perf_counter()
            results = self._runner.run(output)
            computed_s = time.perf_counter()
            outputs = self._scheduler.update(output, results, StepTimes(launched_s, computed_s, None))
            if output.shape.num_prompt_tokens == 0:
                run.seconds += time.perf_counter() - began_s
                run.num_tokens += sum(len(each.token_ids) for each in outputs)
                run.num_steps += 1
            for each in outputs:
                run.answers[each.request_id - self._next_id] += each.token_ids


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("speculation", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", nargs="?", help="a GGUF file or a directory; the demo model where none is named")
    parser.add_argument("--tokens", type=int, default=8, help="most tokens drafted for a sequence")
    parser.add_argument("--max-seqs", type=int, default=4, help="most sequences with which some are")
    parser.add_argument("--widths", default="1,4,8")
    parser.add_argument("--temperatures", default="0,0.7")
    parser.add_argument("--output-tokens", type=int, default=200)
    parser.add_argument("--num-prompts", type=int, default=8, help="of each kind of work, up to 8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-invariant", action="store_true")
    options = parser.parse_args(args)
    source = resolve_model(options.model)
    tokenizer = load_tokenizer(source)
    without, with_drafts = (_Engine(source, tokenizer.eos_token_ids, num, options) for num in (0, options.tokens))
    work = {
        kind: [
            tokenizer.encode(tokenizer.render_chat([{"role": "user", "content": text}]), add_special_tokens=False)
            for text in texts[: options.num_prompts]
        ]
        for kind, texts in _WORK.items()
    }
    results: list[dict[str, Any]] = []
    print("| work | streams | temperature | tok/s without | with | ratio | drafts that came true | tokens per step |")
    print("|---|---|---|---|---|---|---|---|")
    for kind, prompts in work.items():
        for width in map(int, options.widths.split(",")):
            for temperature in map(float, options.temperatures.split(",")):
                pairs = []
                for index in range(options.rounds + 1):
                    sides = (without, with_drafts) if index % 2 else (with_drafts, without)
                    runs = {e: e.run(prompts, width, temperature, options.output_tokens) for e in sides}
                    if index > 0:  # the first warms up
                        pairs.append((runs[without], runs[with_drafts]))
                result = _compared(pairs) | {"work": kind, "streams": width, "temperature": temperature}
                cells = [
                    f"{result['tokens_per_s'][0]:.0f}",
                    f"{result['tokens_per_s'][1]:.0f}",
                    f"**{result['ratio']:.2f}** ({min(result['ratios']):.2f}-{max(result['ratios']):.2f})",
                    f"{result['num_accepted']} of {result['num_drafted']}",
                    f"{result['tokens_per_step']:.2f}",
                ]
                print(f"| {kind} | {width} | {temperature} | {' | '.join(cells)} |", flush=True)
                results.append(result)
    num_unequal = sum(result["num_answers"] - result["num_equal"] for result in results)
    if num_unequal:
        print(f"{num_unequal} answers differ{' though none should' if options.batch_invariant else ''}")
    print(json.dumps({"tokens": options.tokens, "max_seqs": options.max_seqs, "results": results}))
    return 0


def _compared(pairs: list[tuple[_Run, _Run]]) -> dict[str, Any]:
    """Of runs (without drafts, with them), the medians; how many answers are the same in the last."""
    rates = [[each.num_tokens / each.seconds for each in pair] for pair in pairs]
    ratios = [with_drafts / without for without, with_drafts in rates]
    without, with_drafts = pairs[-1]
    return {
        "tokens_per_s": [statistics.median(each[side] for each in rates) for side in (0, 1)],
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "num_drafted": with_drafts.num_drafted,
        "num_accepted": with_drafts.num_accepted,
        "tokens_per_step": with_drafts.num_tokens / with_drafts.num_steps,
        "num_equal": sum(without.answers[i] == answer for i, answer in with_drafts.answers.items()),
        "num_answers": len(without.answers),
    }


if __name__ == "__main__":
    sys.exit(main())
