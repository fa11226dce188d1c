"""How a stream is written as rows of a journal, and read out of them: how it was accepted, its prompt, then what came
of it, each with a CRC over its stream and place.

Pure, for the journal's thread and for those who read what another process writes. Times are on the wall's clock in a
row, since they have to outlive a boot, and on the monotonic one elsewhere.
"""

import json
import time
import zlib
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from headrace.scheduler.messages import (
    FinishReason,
    GrammarKind,
    SamplingParams,
    SequenceOutput,
    Tier,
    TokenLogprobs,
)
from headrace.server.generation import Recipe
from headrace.server.grammars import GrammarSource
from headrace.server.standing import NO_HINTS, Hints

# Rows before the first of what came of a stream.
NUM_HEAD_ROWS = 2
# What reading rows of another version raises, beside ValueError for a row that is not as it was written.
UNREADABLE = (ValueError, TypeError, LookupError, AttributeError)


Row = tuple[int, bytes, int]  # position, body, CRC
Rows = Sequence[Row]
# What came of a stream, and when; None where a process took it up again.
RecordedOutput = tuple[float, SequenceOutput | None]


@dataclass(frozen=True, slots=True)
class StreamRecord:
    """A stream as it was accepted. `log_id` is what the request log calls it; times are on this process's monotonic
    clock. `response` is what a response consists of beside its answer, in JSON's types; a native stream has none.
    `hints` are a gateway's."""

    id: str
    tenant: str
    log_id: str
    created_s: int
    continues_alone: bool
    grace_s: float | None
    received_s: float
    submitted_s: float
    recipe: Recipe
    response: dict[str, Any] | None = None
    hints: Hints = NO_HINTS


@dataclass(frozen=True, slots=True)
class RecordedStream:
    """What the file has of a stream: what came of it, in order."""

    record: StreamRecord
    outputs: tuple[RecordedOutput, ...]

    @property
    def token_ids(self) -> tuple[int, ...]:
        """What was sampled."""
        outputs = (output for _, output in self.outputs if output is not None)
        return tuple(token_id for output in outputs for token_id in output.token_ids)

    @property
    def is_finished(self) -> bool:
        return any(output is not None and output.finish_reason is not None for _, output in self.outputs[-1:])

    @property
    def last_s(self) -> float:
        """When something came of it for the last time."""
        return self.outputs[-1][0] if self.outputs else self.record.received_s

    @property
    def num_vain_restarts(self) -> int:
        """How often it was taken up since its last token."""
        count = 0
        for _, output in reversed(self.outputs):
            if output is not None and output.token_ids:
                break
            count += output is None
        return count


class RowFormat:
    """Writes and reads the bodies of rows, between this process's clock and the wall's."""

    def __init__(self) -> None:
        self._clock_offset_s = time.time() - time.monotonic()

    def write_head(self, record: StreamRecord, model: str) -> tuple[bytes, bytes]:
        fields = asdict(record) | {"model": model}
        fields |= {name: fields[name] + self._clock_offset_s for name in ("received_s", "submitted_s")}
        prompt = array("q", fields["recipe"].pop("prompt_token_ids")).tobytes()
        return _to_json(fields), prompt

    def write_resumption(self) -> bytes:
        return _to_json({"at_s": time.monotonic() + self._clock_offset_s, "is_resumption": True})

    def write_output(self, output: SequenceOutput, now: float) -> bytes:
        fields = {name: value for name, value in output._asdict().items() if value and name != "request_id"}
        if output.scheduled_s is not None:
            fields["scheduled_s"] = output.scheduled_s + self._clock_offset_s
        fields["at_s"] = now + self._clock_offset_s
        return _to_json(fields)

    def read_stream(self, id: str, rows: Rows) -> tuple[RecordedStream, str]:
        """A stream out of all its rows, and whose model it is of. Raises: those of `UNREADABLE`."""
        outputs = self.read_outputs(id, rows[NUM_HEAD_ROWS:], NUM_HEAD_ROWS)
        body, prompt = _checked(id, rows[:NUM_HEAD_ROWS], 0)
        fields = json.loads(body)
        recipe, model = fields.pop("recipe"), fields.pop("model")
        tier, *hints = fields.pop("hints", NO_HINTS)
        fields["hints"] = Hints(None if tier is None else Tier(tier), *hints)
        sampling = recipe.pop("sampling")
        bias = tuple((token_id, value) for token_id, value in sampling.pop("logit_bias"))
        stop_token_ids = frozenset(sampling.pop("stop_token_ids"))
        if (grammar := recipe.get("grammar")) is not None:
            kind, *rest = grammar
            recipe["grammar"] = GrammarSource(GrammarKind(kind), *rest)
        recipe |= {
            "prompt_token_ids": tuple(array("q", prompt)),
            "sampling": SamplingParams(**sampling, logit_bias=bias, stop_token_ids=stop_token_ids),
            "stop_strings": tuple(recipe["stop_strings"]),
            "kept_token_ids": tuple(recipe.get("kept_token_ids", ())),
            "cache_salt": bytes.fromhex(recipe["cache_salt"]),
        }
        for name in ("received_s", "submitted_s"):
            fields[name] = self._on_this_clock(fields[name])
        return RecordedStream(StreamRecord(**fields, recipe=Recipe(**recipe)), outputs), model

    def read_outputs(self, id: str, rows: Rows, position: int) -> tuple[RecordedOutput, ...]:
        """What came of a stream, out of its rows from a position on. Raises: as `read_stream`."""
        return tuple(map(self._read_output, _checked(id, rows, position)))

    def _read_output(self, body: bytes) -> RecordedOutput:
        fields = json.loads(body)
        at_s = self._on_this_clock(fields.pop("at_s"))
        if fields.pop("is_resumption", False):
            return at_s, None
        if "finish_reason" in fields:
            fields["finish_reason"] = FinishReason(fields["finish_reason"])
        if "scheduled_s" in fields:
            fields["scheduled_s"] = self._on_this_clock(fields["scheduled_s"])
        for name in ("logprobs", "prompt_logprobs"):
            fields[name] = tuple(_token_logprobs(item) for item in fields.get(name, ()))
        return at_s, SequenceOutput(-1, tuple(fields.pop("token_ids", ())), **fields)

    def _on_this_clock(self, at_s: float) -> float:
        """Never later than now, whatever has happened to the wall clock."""
        return min(time.monotonic(), at_s - self._clock_offset_s)


def crc_of(id: str, position: int, body: bytes) -> int:
    return zlib.crc32(body, zlib.crc32(f"{id} {position}".encode()))


def _checked(id: str, rows: Rows, position: int) -> list[bytes]:
    """Their bodies. Raises: ValueError."""
    for expected, (found, body, crc) in enumerate(rows, start=position):
        if found != expected or crc != crc_of(id, found, body):
            raise ValueError(f"its row {expected} is missing, or not as it was written")
    return [body for _, body, _ in rows]


def _token_logprobs(item: list[Any]) -> TokenLogprobs:
    token_id, logprob, top = item
    return TokenLogprobs(token_id, logprob, tuple((other, value) for other, value in top))


def _as_json(value: Any) -> Any:
    match value:
        case TokenLogprobs():
            return [value.token_id, value.logprob, value.top]
        case frozenset():
            return sorted(value)
        case bytes():
            return value.hex()
    raise TypeError(f"not for the journal: {type(value)}")


# Made once: `json.dumps` would make one for every row.
_encoder = json.JSONEncoder(separators=(",", ":"), default=_as_json)


def _to_json(fields: dict[str, Any]) -> bytes:
    return _encoder.encode(fields).encode("ascii")
