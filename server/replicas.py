"""Which of several servers a stream or response is of: its id says so, and who asks another one is told where to ask.

Lives on the event loop. An id is 128 random bits behind its maker's name, and is looked up whole, so that no name that
is forged leads to another stream. Addresses come from the settings alone, never out of a request. What another replica
makes is read here where both share a folder of journals.
Source: RFC 9110, 307 (Temporary Redirect) and 421 (Misdirected Request).
"""

import re
import secrets
from typing import Any
from urllib.parse import quote

from starlette.requests import Request

from headrace.server.errors import JournalBusyError, OtherReplicaError
from headrace.server.guard import is_open
from headrace.server.settings import Settings
from headrace.server.shared_journals import SharedJournals
from headrace.server.stream_registry import KeptStream, StreamRegistry

# Of a stream or a response.
_NAMED_ID = re.compile("(?:resp_)?([a-z0-9-]{1,32})-[0-9a-f]{32}")
_NAMED_TICKET = re.compile(r"([a-z0-9-]{1,32})\.[\w-]{43}", re.ASCII)
# What a query may hold as it is.
_QUERY_CHARACTERS = "!$%&'()*+,;=:@/?-._~"


class Replicas:
    """This server among the others. `journals` are those that it shares with them, if it does."""

    def __init__(self, settings: Settings, journals: SharedJournals | None) -> None:
        self._name = settings.replica_name
        self._peers = settings.peers
        self._journals = journals

    def new_id(self) -> str:
        bits = secrets.token_hex(16)
        return f"{self._name}-{bits}" if self._name else bits

    async def reach(self, registry: StreamRegistry[Any], request: Request, id: str, param: str | None = None) -> None:
        """Bring what another replica makes into the registry, up to now, or say where it is; nothing to do where `id`,
        which the field `param` holds, names no other.

        Raises: OtherReplicaError; UnavailableError where it cannot be read for now, or is to be taken over, and the
        server is about to end.
        """
        is_here = id in registry and not registry.is_followed(id)
        if is_here or (found := _NAMED_ID.fullmatch(id)) is None:
            return
        if self._journals is not None and registry.is_whole and await self._journals.bring(found[1], id):
            return
        if (error := self._elsewhere(request, found[1], param)) is not None:
            raise error

    def check_own(self, registry: StreamRegistry[Any], stream: KeptStream) -> None:
        """Raises: OtherReplicaError where the stream is one to read, and another's to change; UnavailableError where
        that is not known yet."""
        if self._journals is not None and registry.is_followed(stream.id):
            holder = self._journals.holder_of(stream.id)
            if holder == self._name:  # which leaves it to another
                raise JournalBusyError
            raise OtherReplicaError(holder, self._peers.get(holder) or None)

    def check_ticket(self, request: Request, ticket: str) -> None:
        """Raises: OtherReplicaError where it was issued by another."""
        found = _NAMED_TICKET.fullmatch(ticket)
        if found is not None and (error := self._elsewhere(request, found[1], None)) is not None:
            raise error

    def _elsewhere(self, request: Request, name: str, param: str | None) -> OtherReplicaError | None:
        """Where to ask, if the name is one of another replica."""
        url = self._peers.get(name)
        if name == self._name or url is None:
            return None
        path = request.scope["path"]
        # Clients do not take their key along to another address, and would be refused there.
        needs_key = request.state.tenant and not is_open(path, has_open_metrics=False)
        if not url or request.method != "GET" or (needs_key and "authorization" in request.headers):
            return OtherReplicaError(name, url or None, param=param)
        query = quote(request.scope["query_string"], safe=_QUERY_CHARACTERS)
        location = f"{url}{path}" + (f"?{query}" if query else "")
        return OtherReplicaError(name, url, location=location, param=param)
