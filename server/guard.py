"""Who may call a server that has no keys and listens on loopback: this machine's programs and this server's own page.

A page from elsewhere, open in the user's browser, can reach loopback too. Its Origin gives it away, and after DNS
rebinding its Host does. Pure ASGI, since a wrapper that hides `receive` would hide disconnects.
"""

import secrets
import time
from urllib.parse import SplitResult, urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from headrace.server.endpoint import error_response
from headrace.server.errors import ForbiddenError
from headrace.server.request_log import log_unaccepted

_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


class LoopbackGuard:
    """Refuses with 403 a foreign Host, and an Origin that is neither this server's nor in `cors_origins`."""

    def __init__(self, app: ASGIApp, *, allowed_hosts: tuple[str, ...], cors_origins: tuple[str, ...]) -> None:
        self._app = app
        self._hosts = _LOOPBACK_NAMES | {host.lower() for host in allowed_hosts}
        self._origins = frozenset(cors_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (error := self._refusal(Headers(scope=scope))) is not None:
            id = secrets.token_hex(16)
            log_unaccepted(id, scope["path"][:200], time.monotonic(), f"refused: {error.status}")
            response = error_response(error)
            response.headers["x-request-id"] = id
            await response(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _refusal(self, headers: Headers) -> ForbiddenError | None:
        host = headers.get("host", "")
        if _split(f"//{host}").hostname not in self._hosts:
            return ForbiddenError(f"the host {host[:200]!r} is not served here; see the setting allowed_hosts")
        origin = headers.get("origin")
        if "*" in self._origins or origin in self._origins:
            return None
        if origin is None:
            # A page elsewhere can send a GET without an Origin, but not without its browser saying where from.
            # Following a link to the chat page is fine.
            is_foreign = headers.get("sec-fetch-site") in ("cross-site", "same-site")
            if is_foreign and headers.get("sec-fetch-mode") != "navigate":
                return ForbiddenError("pages of other origins may not call this server; see the setting cors_origins")
            return None
        if _split(origin).netloc == host:
            return None
        return ForbiddenError(f"pages of {origin[:200]!r} may not call this server; see the setting cors_origins")


def _split(url: str) -> SplitResult:
    """The URL's parts, all of them empty where it is none."""
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")
