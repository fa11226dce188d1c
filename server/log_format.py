"""The server's own log: of faults on the event loop and in its workers only types and places, no messages.

A message there may quote what a client sent, and a log is read by more people than a prompt was meant for. The engine
and the kernels know numbers only, and what they say ("out of memory, tried to allocate ...") is kept.
"""

import asyncio
import logging
import traceback
from typing import Any

_WITHOUT_TEXT = ("headrace.scheduler", "headrace.kernels")

logger = logging.getLogger(__name__)


class LogFormatter(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        if record.exc_info and record.exc_info[1] is not None and not record.name.startswith(_WITHOUT_TEXT):
            record.exc_text = _places(record.exc_info[1])
        return super().format(record)


def log_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """The loop's exception handler: its default one writes the repr of whatever failed, and so may `context`."""
    logger.error("a callback or a task of the event loop failed", exc_info=context.get("exception"))


def _places(error: BaseException, above: tuple[BaseException, ...] = ()) -> str:
    """A traceback without messages, its causes first; `above` are the errors that it is a cause of."""
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    above = (*above, error)
    causes = [] if cause is None or cause in above else [_places(cause, above)]
    own = ["Traceback (most recent call last):\n", *traceback.format_tb(error.__traceback__), type(error).__qualname__]
    parts = [_places(part, above) for part in getattr(error, "exceptions", ())]
    return "\n\n".join([*causes, "".join(own), *parts])
