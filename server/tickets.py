"""Tickets for GET /v1/stream: EventSource can send no key, and a key has no place in a URL.

Lives on the event loop. A ticket starts one stream and names it from then on: shown again, as EventSource does when it
reconnects, it resumes that stream. It expires some time after it was issued, or last shown since it started one.
"""

import secrets
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

import anyio

from headrace.server.errors import InvalidTicketError

# Longer than the longest wait that an overloaded server asks for.
TICKET_TTL_S = 300
# Per tenant; beyond, its least recently shown one goes.
_MAX_TICKETS = 10_000


@dataclass(slots=True, eq=False)
class Ticket:
    """`stream_id` is None until it has started its stream; who looks and starts holds `lock`."""

    tenant: str
    expires_s: float
    stream_id: str | None = None
    lock: anyio.Lock = field(default_factory=anyio.Lock)


class Tickets:
    """Every ticket that has not expired, least recently shown first. They begin with the name of the `replica` that
    issues them, where it has one."""

    def __init__(self, clock: Callable[[], float], replica: str = "") -> None:
        self._clock = clock
        self._prefix = f"{replica}." if replica else ""
        self._tickets: dict[str, OrderedDict[str, Ticket]] = {}

    def issue(self, tenant: str) -> str:
        """A new ticket: 256 random bits."""
        now = self._clock()
        tickets = self._tickets.setdefault(tenant, OrderedDict())
        while tickets and (len(tickets) >= _MAX_TICKETS or next(iter(tickets.values())).expires_s <= now):
            tickets.popitem(last=False)
        ticket = self._prefix + secrets.token_urlsafe(32)
        tickets[ticket] = Ticket(tenant, now + TICKET_TTL_S)
        return ticket

    def show(self, ticket: str) -> Ticket:
        """Raises: InvalidTicketError for one that was never issued, or has expired."""
        now = self._clock()
        # Found by hash, and Python's hash of a string is keyed: the time taken tells nothing of the others.
        for tickets in self._tickets.values():
            found = tickets.get(ticket)
            if found is not None and found.expires_s > now:
                if found.stream_id is not None:  # unspent it expires, however often it is shown
                    found.expires_s = now + TICKET_TTL_S
                    tickets.move_to_end(ticket)
                return found
        raise InvalidTicketError("this ticket was not issued here, or has expired")

    def keep_only(self, tenants: frozenset[str]) -> None:
        """Forget the tickets of tenants that are none any more."""
        for tenant in self._tickets.keys() - tenants:
            del self._tickets[tenant]
