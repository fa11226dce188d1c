"""What a comparison found: measurements by target, round and width; their medians, ratios and floors. Pure.

A figure of a target is the median over rounds. A ratio is the median of each round's ratio: both sides of it were
measured within minutes of each other. "The best peer" is the best of that round, whichever it was.
"""

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any, Final

from headrace.benchmarks.peers import OURS

SCHEMA: Final = "headrace-compare/1"
_FLOORS_PROMPT_TOKENS: Final = 154
_OTHER_LENGTHS_TOLERANCE: Final = 0.2
_START_LIMIT_S: Final = 5.0
BEST_PEER: Final = "the best peer"


class Figure(StrEnum):
    """A figure of a run; the value is where it lies in its `measurement.Summary`."""

    TOKENS_PER_S = "output_tokens_per_s"
    TTFT_P50 = "ttft_ms.p50"
    TTFT_P99 = "ttft_ms.p99"
    ITL_P50 = "itl_ms.p50"
    ITL_P99 = "itl_ms.p99"

    @property
    def heading(self) -> str:
        """Its name for people."""
        name, _, percentile = self.partition("_ms.")
        return f"{name.upper()} {percentile}" if percentile else "tok/s"


@dataclass(frozen=True, slots=True)
class Measurement:
    """One target at one width in one round.

    `summary` is a `measurement.Summary`. `server_cores`: cores that its processes used. `paused`: the other targets
    that did not rest and were stopped meanwhile, with the share of a core that each had used.
    """

    target: str
    round_number: int
    width: int
    summary: dict[str, Any]
    server_cores: float
    paused: dict[str, float]

    def figure(self, figure: Figure) -> float | None:
        """Look it up; None where no request ended well."""
        found: Any = self.summary
        for key in figure.split("."):
            found = None if found is None else found[key]
        return None if found is None else float(found)


@dataclass(frozen=True, slots=True)
class StartUp:
    """Seconds from making a target's process to its first token. The first start of several fills caches."""

    target: str
    first_token_s: float
    is_counted: bool


@dataclass(slots=True)
class Comparison:
    """Everything one invocation has found so far. `left_out`: target -> why it is, or why it stopped."""

    settings: dict[str, Any]
    environment: dict[str, Any]
    start_ups: list[StartUp] = field(default_factory=list)
    measurements: list[Measurement] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    is_interrupted: bool = False
    is_time_limited: bool = False

    def encode(self) -> str:
        """Write it as a JSON text that `decode` reads."""
        return json.dumps({"schema": SCHEMA, **asdict(self)}, allow_nan=False)

    @classmethod
    def decode(cls, text: str) -> "Comparison":
        """Read what `encode` wrote.

        Raises:
            ValueError: it is none of this schema.
        """
        fields = json.loads(text)
        if not isinstance(fields, dict) or fields.pop("schema", None) != SCHEMA:
            raise ValueError(f"expected a JSON object of the schema {SCHEMA}")
        try:
            start_ups = [StartUp(**start_up) for start_up in fields.pop("start_ups")]
            measurements = [Measurement(**measurement) for measurement in fields.pop("measurements")]
            return cls(start_ups=start_ups, measurements=measurements, **fields)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not all of the schema {SCHEMA}: {error}") from error

    @property
    def targets(self) -> list[str]:
        """Those measured, in the order they were asked for."""
        measured = {measurement.target for measurement in self.measurements}
        return [name for name in self.settings["targets"] if name in measured]

    @property
    def widths(self) -> list[int]:
        """Those measured, narrowest first."""
        return sorted({measurement.width for measurement in self.measurements})


@dataclass(frozen=True, slots=True)
class Spread:
    """The median over rounds, and the least and the most."""

    median: float
    low: float
    high: float
    num_rounds: int

    @classmethod
    def of(cls, samples: Iterable[float | None]) -> "Spread | None":
        """Describe the rounds that have a value; None where none has."""
        known = [sample for sample in samples if sample is not None]
        if not known:
            return None
        median, low, high = (round(figure, 4) for figure in (statistics.median(known), min(known), max(known)))
        return cls(median, low, high, len(known))


@dataclass(frozen=True, slots=True)
class Floor:
    """What a target of ours is to reach against a peer: a ratio of one figure at one width."""

    ours: str
    width: int
    figure: Figure
    peer: str
    bound: float

    @property
    def is_upper(self) -> bool:
        """Whether the ratio is to be at most the bound: it is one of latencies."""
        return self.figure is not Figure.TOKENS_PER_S


_FLOORS: Final = (
    Floor("headrace", 1, Figure.TOKENS_PER_S, "llama.cpp", 2.4),
    Floor("headrace", 1, Figure.TOKENS_PER_S, "vllm", 4.5),
    Floor("headrace", 1, Figure.TTFT_P50, BEST_PEER, 0.7),
    Floor("headrace", 8, Figure.TOKENS_PER_S, BEST_PEER, 2.7),
    Floor("headrace", 32, Figure.TOKENS_PER_S, "vllm", 1.8),
    Floor("headrace-int8kv", 32, Figure.TOKENS_PER_S, "vllm", 2.1),
    Floor("headrace", 64, Figure.TOKENS_PER_S, "vllm", 1.55),
    Floor("headrace-int8kv", 64, Figure.TOKENS_PER_S, "vllm", 1.8),
    *(
        Floor("headrace", width, figure, "vllm", bound)
        for width in (8, 32, 64)
        for figure, bound in ((Figure.TTFT_P50, 1.0), (Figure.TTFT_P99, 1.0), (Figure.ITL_P99, 0.5))
    ),
    *(
        Floor("headrace-bf16", width, Figure.TOKENS_PER_S, "vllm", bound)
        for width, bound in ((1, 2.0), (8, 2.0), (32, 1.7), (64, 1.5))
    ),
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a floor is met; None: it was not measured."""

    what: str
    bound: float
    is_upper: bool
    measured: Spread | None

    @property
    def is_met(self) -> bool | None:
        """Compare the median with the bound."""
        if self.measured is None:
            return None
        return self.measured.median <= self.bound if self.is_upper else self.measured.median >= self.bound


def spread(comparison: Comparison, target: str, width: int, figure: Figure) -> Spread | None:
    """Describe a figure of a target at a width over the rounds."""
    return Spread.of(
        measurement.figure(figure)
        for measurement in comparison.measurements
        if measurement.target == target and measurement.width == width
    )


def ratio(comparison: Comparison, ours: str, peer: str, width: int, figure: Figure) -> Spread | None:
    """Describe the rounds' ratios of our figure to a peer's, or to the best peer's."""
    rounds: dict[int, dict[str, float]] = {}
    for measurement in comparison.measurements:
        value = measurement.figure(figure)
        if measurement.width == width and value is not None:
            rounds.setdefault(measurement.round_number, {})[measurement.target] = value
    best: Callable[[Iterable[float]], float] = max if figure is Figure.TOKENS_PER_S else min
    ratios: list[float] = []
    for values in rounds.values():
        peers = {name: value for name, value in values.items() if name not in OURS}
        theirs = best(peers.values()) if peer == BEST_PEER and peers else peers.get(peer)
        if ours in values and theirs:
            ratios.append(values[ours] / theirs)
    return Spread.of(ratios)


def verdicts(comparison: Comparison) -> list[Verdict]:
    """Judge every floor. They are of prompts of 154 tokens; other lengths are held to them within 20 %."""
    is_other_length = comparison.settings["prompt_tokens"] != _FLOORS_PROMPT_TOKENS
    slack = 1 - _OTHER_LENGTHS_TOLERANCE if is_other_length else 1.0
    found = [
        Verdict(
            f"{floor.ours}, {streams(floor.width)}: {floor.figure.heading} over that of {floor.peer}",
            round(floor.bound / slack if floor.is_upper else floor.bound * slack, 3),
            floor.is_upper,
            ratio(comparison, floor.ours, floor.peer, floor.width, floor.figure),
        )
        for floor in _FLOORS
    ]
    for name in OURS:
        found.append(Verdict(f"{name}: start to first token, s", _START_LIMIT_S, True, start_up(comparison, name)))
    return found


def start_up(comparison: Comparison, target: str) -> Spread | None:
    """Describe the counted starts of a target, in seconds to its first token."""
    return Spread.of(
        start.first_token_s for start in comparison.start_ups if start.target == target and start.is_counted
    )


def merge(comparisons: Sequence[Comparison]) -> Comparison:
    """Take several comparisons' rounds as further rounds of one.

    Raises:
        ValueError: their lengths, loads, CPUs or versions differ.
    """
    first, *others = comparisons
    merged = Comparison(dict(first.settings), dict(first.environment))
    for key in ("versions", "commands"):
        every = (comparison.environment[key] for comparison in comparisons)
        merged.environment[key] = {name: value for each in every for name, value in each.items()}
    targets = [name for comparison in comparisons for name in comparison.settings["targets"]]
    merged.settings["targets"] = list(dict.fromkeys(targets))
    for other in others:
        for key in ("model", "prompt_tokens", "max_tokens", "requests_per_stream"):
            if other.settings[key] != first.settings[key]:
                raise ValueError(f"their {key} differ: {first.settings[key]}, {other.settings[key]}")
        if other.environment["cpu"] != first.environment["cpu"]:
            raise ValueError(f"their CPUs differ: {first.environment['cpu']}, {other.environment['cpu']}")
    num_rounds = 0
    for comparison in comparisons:
        for name, version in comparison.environment["versions"].items():
            if merged.environment["versions"][name] != version:
                raise ValueError(f"their versions of {name} differ")
        for measurement in comparison.measurements:
            merged.measurements.append(replace(measurement, round_number=num_rounds + measurement.round_number))
        num_rounds += 1 + max((found.round_number for found in comparison.measurements), default=-1)
        merged.start_ups += comparison.start_ups
        merged.left_out |= comparison.left_out
        merged.is_interrupted |= comparison.is_interrupted
        merged.is_time_limited |= comparison.is_time_limited
    return merged


def streams(width: int) -> str:
    """Name a width."""
    return f"{width} stream{'' if width == 1 else 's'}"
