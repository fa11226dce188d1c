"""The orderly end of what is served: be ready no more, refuse what comes, wait for what was accepted, end the rest.

Lives on the event loop, the same for a server and a proxy. When it is over nothing is left to be answered; connections
are somebody else's to close.
"""

from typing import Protocol

import anyio

_POLL_S = 0.05


class Drainable(Protocol):
    @property
    def has_been_ready(self) -> bool:
        """Whether anybody may have been told that it is."""

    @property
    def num_unfinished(self) -> int:
        """Requests that are accepted and not answered yet."""

    def leave(self) -> None:
        """Be ready no more."""

    def stop_accepting(self) -> None:
        """Refuse requests from now on, and be ready no more."""

    def end_unfinished(self) -> None:
        """Give every request that is left its end."""


async def take_leave(app: Drainable, delay_s: float, hurried: anyio.Event) -> None:
    """Be ready no more and take requests for `delay_s` still, or until `hurried` is set: who routes them here has to
    notice first."""
    app.leave()
    with anyio.move_on_after(delay_s):
        await hurried.wait()


async def drain(app: Drainable, grace_s: float, hurried: anyio.Event) -> None:
    """Bring `app` to its end: at once when `hurried` is set, else within `grace_s`."""
    app.stop_accepting()
    with anyio.move_on_after(grace_s):
        # Requests end in many places, none of which has to know of this one.
        while app.num_unfinished and not hurried.is_set():
            with anyio.move_on_after(_POLL_S):
                await hurried.wait()
    app.end_unfinished()
