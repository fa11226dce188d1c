"""What an assistant's answer consists of: text, reasoning, and tool calls with their arguments.

The words in which a parser of a model's text speaks to the routes, which write each in their own shape. Knows neither
the formats in which models write these nor the wire.
"""

from dataclasses import dataclass
from typing import Any, Protocol

from pydantic_core import from_json, to_json


@dataclass(frozen=True, slots=True)
class TextPart:
    text: str


@dataclass(frozen=True, slots=True)
class ReasoningPart:
    text: str


@dataclass(frozen=True, slots=True)
class ToolCallPart:
    """A call of a tool begins, the answer's `index`-th; its arguments follow."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolArgumentsPart:
    """A piece of the JSON text that the arguments of the `index`-th call are."""

    index: int
    text: str


Part = TextPart | ReasoningPart | ToolCallPart | ToolArgumentsPart


class AnswerParser(Protocol):
    """Takes an answer apart as it is written. Pieces may be cut anywhere; the parts in sum do not depend on where.

    Nothing that may be a part of a marker is given out before it is known not to be.
    """

    def push(self, text: str) -> list[Part]:
        """The parts that are certain, now that the answer goes on with `text`."""

    def finish(self) -> list[Part]:
        """The answer is over: what was held back."""


class PlainText:
    """The parser of answers that are nothing but text."""

    def push(self, text: str) -> list[Part]:
        return [TextPart(text)] if text else []

    def finish(self) -> list[Part]:
        return []


def parse_arguments(text: str) -> dict[str, Any]:
    """A call's arguments as an object; of a call that was cut what is whole, and nothing where there is no object. What
    JSON has no number for, such as NaN or 1e999, is null."""
    try:
        arguments = from_json(to_json(from_json(text or "{}", allow_partial=True), inf_nan_mode="null"))
    except ValueError:
        return {}
    return arguments if isinstance(arguments, dict) else {}
