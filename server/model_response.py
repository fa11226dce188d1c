"""A response as the server keeps it: the conversation that it answers, its settings, and the generation that does.

Lives on the event loop. Its output is not here: `response_events` makes it of the generation's log, each time that
somebody asks. What the journal keeps of it beside the generation is in JSON's types.
"""

import sys
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, Self

from headrace.scheduler.messages import FinishReason
from headrace.server.generation import Generation, Recipe
from headrace.server.journal_rows import StreamRecord
from headrace.server.protocol import parse_request, rename
from headrace.server.responses_protocol import FIELD_NAMES, ResponseParams
from headrace.server.stream_registry import KeptStream

ID_PREFIX = "resp_"
# In place of those that the journal has as items: nothing that comes after the prompt asks for them.
_ANY_MESSAGES = [{"role": "user", "content": ""}]

_STATUSES = {FinishReason.STOP: "completed", FinishReason.LENGTH: "incomplete", FinishReason.CANCELLED: "cancelled"}


@dataclass(slots=True, eq=False)
class ModelResponse(KeptStream):
    """`items` is the whole conversation, with what earlier responses said and were told. `settings` is what its object
    says from the beginning on, `params` the chat completion that it is, but for the messages."""

    _: KW_ONLY
    items: Sequence[dict[str, Any]]
    settings: dict[str, Any]
    params: ResponseParams

    @property
    def is_over(self) -> bool:
        """Whether it has an end, which one that another process goes on with has not."""
        return self.generation.is_over and not self.generation.is_interrupted

    @property
    def final_status(self) -> str:
        """Of one that is over."""
        terminal = self.generation.log.terminal
        assert terminal is not None
        return "failed" if terminal.error is not None else _STATUSES[terminal.finish_reason]

    def item_id(self, prefix: str, index: int) -> str:
        """The id of its `index`-th output item, the same whenever that is made."""
        return f"{prefix}_{self.id.removeprefix(ID_PREFIX)}_o{index}"

    def unfinished(self, output: Sequence[dict[str, Any]], status: str | None = None) -> dict[str, Any]:
        """Its object with the output so far; how far the engine is says the status, where it is not given."""
        if status is None:
            status = "queued" if self.generation.stages.scheduled_s is None else "in_progress"
        head = {"id": self.id, "object": "response", "created_at": self.created_s, "status": status}
        end = {"completed_at": None, "error": None, "incomplete_details": None, "usage": None}
        return {**head, **end, "output": output, **self.settings}

    def finished(self, output: Sequence[dict[str, Any]], num_reasoning_tokens: int) -> dict[str, Any]:
        """Its object once it is over."""
        status, generation = self.final_status, self.generation
        content = self.unfinished(output, status)
        terminal, stages = generation.log.terminal, generation.stages
        if terminal is not None and terminal.error is not None:
            rename(terminal.error, FIELD_NAMES)
            # Of the codes that clients know the one for whatever is not the request's fault.
            content["error"] = {"code": "server_error", "message": terminal.error.message}
        elif status == "incomplete":
            content["incomplete_details"] = {"reason": "max_output_tokens"}
        elif status == "completed":
            assert stages.last_token_s is not None, "stopped without a token"
            content["completed_at"] = self.created_s + round(stages.last_token_s - stages.received_s)
        num_input, num_output = generation.num_prompt_tokens, generation.num_output_tokens
        content["usage"] = {
            "input_tokens": num_input,
            "input_tokens_details": {"cached_tokens": generation.num_cached_tokens, "cache_write_tokens": 0},
            "output_tokens": num_output,
            "output_tokens_details": {"reasoning_tokens": num_reasoning_tokens},
            "total_tokens": num_input + num_output,
        }
        return content

    def record(self, recipe: Recipe, submitted_s: float) -> StreamRecord:
        own = {
            "items": self.items,
            "settings": self.settings,
            "params": self.params.model_dump(mode="json", by_alias=True, exclude_none=True, exclude={"messages"}),
            "num_own_bytes": self.num_own_bytes,
        }
        return replace(KeptStream.record(self, recipe, submitted_s), response=own)

    @classmethod
    def from_record(cls, record: StreamRecord, generation: Generation, restored_s: float) -> Self:
        """Raises: BadRequestError where this version does not know what its request asks for."""
        assert record.response is not None
        own = record.response
        return cls(
            record.id,
            record.tenant,
            generation,
            record.created_s,
            record.continues_alone,
            unread_since_s=None,
            restored_s=restored_s,
            num_own_bytes=own["num_own_bytes"],
            items=own["items"],
            settings=own["settings"],
            params=parse_request(ResponseParams, own["params"] | {"messages": _ANY_MESSAGES}),
        )


def weight(value: Any) -> int:
    """Bytes of memory that a value of JSON's types takes, as if it shared nothing."""
    num_bytes = 0
    unseen = [value]
    while unseen:
        each = unseen.pop()
        num_bytes += sys.getsizeof(each)
        if isinstance(each, dict):
            unseen += each.keys()
            unseen += each.values()
        elif isinstance(each, list):
            unseen += each
    return num_bytes
