"""A client library as a process: reads a call per line of JSON, answers each with what the client saw as one line.

The process ends with its input and not before, so that what a client leaves open stays open. Imported by the drivers
beside it, in environments that have nothing of this project.
"""

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Call:
    """What to ask. `extra` holds the fields of the body that OpenAI's API does not know.

    A stream is closed after `leave_after` of its chunks.
    """

    way: str
    body: dict[str, Any]
    extra: dict[str, Any]
    timeout_s: float
    max_retries: int
    leave_after: int | None


@dataclass
class Seen:
    """What the client handed to its user; a list has an item per choice, but `calls` are the first choice's tool calls,
    a name and arguments each. `num_chunks` counts a stream's."""

    texts: list[str] = field(default_factory=list)
    finish_reasons: list[str | None] = field(default_factory=list)
    logprobs: list[list[tuple[str, float]]] = field(default_factory=list)
    usage: dict[str, int] | None = None
    num_chunks: int = 0
    calls: list[list[str]] = field(default_factory=list)
    error: dict[str, Any] | None = None

    def add(
        self, index: int, text: str | None, finish_reason: str | None, logprobs: Iterable[tuple[str, float]] = ()
    ) -> None:
        """Add a piece of a choice; `logprobs` has its tokens, each with its log probability."""
        while len(self.texts) <= index:
            self.texts.append("")
            self.finish_reasons.append(None)
            self.logprobs.append([])
        self.texts[index] += text or ""
        self.finish_reasons[index] = finish_reason or self.finish_reasons[index]
        self.logprobs[index] += logprobs

    def add_calls(self, calls: Iterable[Any] | None) -> None:
        """Add calls, or pieces of them, as OpenAI's SDK has them."""
        for place, call in enumerate(calls or ()):
            if (index := getattr(call, "index", place)) == len(self.calls):
                self.calls.append(["", ""])
            self.calls[index][0] += call.function.name or ""
            self.calls[index][1] += call.function.arguments or ""


def pairs(logprobs: Any) -> list[tuple[str, float]]:
    """The tokens and log probabilities out of either route's form as the SDK's objects, or None."""
    if logprobs is None:
        return []
    if (content := getattr(logprobs, "content", None)) is not None:
        return [(item.token, item.logprob) for item in content]
    return list(zip(logprobs.tokens, logprobs.token_logprobs, strict=True))


Way = Callable[[Call, Seen], Awaitable[None]]


def serve(ways: Mapping[str, Way]) -> None:
    """Answer calls until the input ends; what a way raises is the call's `error`."""
    asyncio.run(_serve(ways))


async def _serve(ways: Mapping[str, Way]) -> None:
    # Some libraries print hints to the user: out of the way of the answers.
    answers, sys.stdout = sys.stdout, sys.stderr
    # The loop runs between calls too, since asynchronous clients close connections in tasks of their own.
    while line := await asyncio.to_thread(sys.stdin.readline):
        call, seen = Call(**json.loads(line)), Seen()
        try:
            await ways[call.way](call, seen)
        except Exception as error:
            seen.error = {
                "types": [cls.__name__ for cls in type(error).__mro__],
                "message": str(error),
                "status": getattr(error, "status_code", None),
            }
        print(json.dumps(asdict(seen)), file=answers, flush=True)
