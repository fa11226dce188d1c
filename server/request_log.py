"""One structured line per request, with the time of every stage. It holds no prompt, no text and no key."""

import json
import logging
from dataclasses import asdict

from headrace.server.generation import Generation

logger = logging.getLogger("headrace.requests")


def log_request(generation: Generation, route: str) -> None:
    """Write the line of a generation that is over. Stages are milliseconds after the request was received."""
    terminal = generation.log.terminal
    assert terminal is not None
    stages = asdict(generation.stages)
    received_s = stages.pop("received_s")
    line = {
        "id": generation.id,
        "route": route,
        "finish_reason": terminal.finish_reason.value,
        "prompt_tokens": generation.num_prompt_tokens,
        "completion_tokens": generation.num_output_tokens,
        "stages_ms": {
            name.removesuffix("_s"): None if at_s is None else round((at_s - received_s) * 1000, 1)
            for name, at_s in stages.items()
        },
    }
    logger.info("%s", json.dumps(line))
