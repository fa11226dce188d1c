"""Who may call: with keys, who presents one; without, on loopback, this machine's programs and the server's own page.

A page from elsewhere, open in the user's browser, can reach loopback too. Its Origin gives it away, and after DNS
rebinding its Host does. With keys neither matters: no browser adds one by itself. Pure ASGI, since a wrapper that hides
`receive` would hide disconnects; decided before the body is read.
"""

import re
import time
from urllib.parse import SplitResult, urlsplit

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from headrace.server.api_keys import ApiKeys
from headrace.server.endpoint import error_response, refuse_event_source, request_id
from headrace.server.errors import ApiError, ForbiddenError, UnauthorizedError, UnavailableError
from headrace.server.request_log import OnRejected
from headrace.server.settings import ListenerSettings, is_loopback

# In the extensions of a scope whose connection is one too many (see `ConnectionLimit`).
NO_PLACE = "headrace.no_place"
_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
# Probes, the pages and their files, and a stream's events, where the stream's id is what one must know. GET /v1/stream
# asks for a ticket by itself.
_OPEN_PATHS = re.compile(
    r"/|/classify|/dashboard|/docs|/health(_generate)?|/ready|/static/.*|/v1/stream(s/[^/]+/events)?"
)
# All of them, and the few that routers ask for many times a second.
METRICS_PATHS = ("/metrics", "/metrics/load")


def is_open(path: str, *, has_open_metrics: bool) -> bool:
    """Whether a path needs no key where there are keys."""
    return _OPEN_PATHS.fullmatch(path) is not None or (has_open_metrics and path in METRICS_PATHS)


class _Guard:
    """Refuses what `_check` raises, and tells `on_rejected`."""

    def __init__(self, app: ASGIApp, on_rejected: OnRejected) -> None:
        self._app = app
        self._on_rejected = on_rejected

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._check(scope)
            except ApiError as error:
                id = request_id(Headers(scope=scope))
                self._on_rejected(id, scope["path"], time.monotonic(), error.status)
                response = self._refuse(scope, error, id)
                # A body that was not read may still be coming, so the connection cannot carry another request.
                response.headers["connection"] = "close"
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        """Raises: ApiError."""
        raise NotImplementedError

    def _refuse(self, scope: Scope, error: ApiError, id: str) -> Response:
        return error_response(error, scope["path"], id)


class KeyGuard(_Guard):
    """Where there are keys, refuses with 401 who presents none of them, but for a few open paths.

    Sets `tenant` in the request's state: the name of its key, "" where there is none.
    """

    def __init__(self, app: ASGIApp, *, keys: ApiKeys | None, has_open_metrics: bool, on_rejected: OnRejected) -> None:
        super().__init__(app, on_rejected)
        self._keys = keys
        self._has_open_metrics = has_open_metrics

    def _check(self, scope: Scope) -> None:
        scope["state"]["tenant"] = ""
        if self._keys is None:
            return
        presented = _presented_key(Headers(scope=scope))
        key = None if presented is None else self._keys.find(presented.encode("latin-1"))
        if key is not None:
            scope["state"]["tenant"] = key.name
        elif not is_open(scope["path"], has_open_metrics=self._has_open_metrics):
            raise UnauthorizedError(
                "an API key is needed, as `Authorization: Bearer KEY` or `x-api-key: KEY`"
                if presented is None
                else "the API key is not valid"
            )


def _presented_key(headers: Headers) -> str | None:
    scheme, _, credentials = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return credentials.strip()
    return headers.get("x-api-key")


class LoopbackGuard(_Guard):
    """Refuses with 403 a foreign Host, and an Origin that is neither this server's nor in `cors_origins`."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        allowed_hosts: tuple[str, ...],
        cors_origins: tuple[str, ...],
        on_rejected: OnRejected,
    ) -> None:
        super().__init__(app, on_rejected)
        self._hosts = _LOOPBACK_NAMES | {host.lower() for host in allowed_hosts}
        self._origins = frozenset(cors_origins)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if _split(f"//{host}").hostname not in self._hosts:
            raise ForbiddenError(f"the host {host[:200]!r} is not served here; see the setting allowed_hosts")
        origin = headers.get("origin")
        if "*" in self._origins or origin in self._origins:
            return
        if origin is None:
            # A page elsewhere can send a GET without an Origin, but not without its browser saying where from.
            # Following a link to the chat page is fine.
            is_foreign = headers.get("sec-fetch-site") in ("cross-site", "same-site")
            if is_foreign and headers.get("sec-fetch-mode") != "navigate":
                raise ForbiddenError("pages of other origins may not call this server; see the setting cors_origins")
        elif _split(origin).netloc != host:
            raise ForbiddenError(f"pages of {origin[:200]!r} may not call this server; see the setting cors_origins")


class ProbeGuard(_Guard):
    """On a connection without a place refuses with 503 all but what tells of the server."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_place = NO_PLACE not in scope.get("extensions", {})
        await (self._app if has_place else super().__call__)(scope, receive, send)

    def _refuse(self, scope: Scope, error: ApiError, id: str) -> Response:
        accepted = Headers(scope=scope).get("accept", "")
        is_event_source = scope["method"] == "GET" and "text/event-stream" in accepted
        return (refuse_event_source if is_event_source else error_response)(error, scope["path"], id)

    def _check(self, scope: Scope) -> None:
        if scope["method"] != "GET" or scope["path"] not in ("/health", "/health_generate", "/ready", *METRICS_PATHS):
            raise UnavailableError("all of this server's connections are in use", "too_many_connections")


def admin_guards(settings: ListenerSettings, on_rejected: OnRejected) -> list[Middleware]:
    """What stands before the routes of the operator's address, which asks for no key."""
    return [
        *_loopback_guards(settings, settings.admin_host, on_rejected),
        Middleware(ProbeGuard, on_rejected=on_rejected),
    ]


def guards(settings: ListenerSettings, keys: ApiKeys | None, on_rejected: OnRejected) -> list[Middleware]:
    """What stands before a server's routes, the outermost first."""
    key_guard = Middleware(KeyGuard, keys=keys, has_open_metrics=settings.open_metrics, on_rejected=on_rejected)
    middleware = _loopback_guards(settings, settings.host, on_rejected) if keys is None else []
    if settings.cors_origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],  # client libraries send headers of their own
            expose_headers=[
                "x-request-id",
                "request-id",
                "idempotent-replayed",
                "retry-after",
                "retry-after-ms",
                "location",
            ],
        )
        middleware.append(cors)
    # Inside CORS: a preflight carries no key, and a page of another origin may read why it was refused.
    return [*middleware, Middleware(ProbeGuard, on_rejected=on_rejected), key_guard]


def _loopback_guards(settings: ListenerSettings, host: str, on_rejected: OnRejected) -> list[Middleware]:
    if not is_loopback(host):
        return []
    hosts, origins = settings.allowed_hosts, settings.cors_origins
    return [Middleware(LoopbackGuard, allowed_hosts=hosts, cors_origins=origins, on_rejected=on_rejected)]


def _split(url: str) -> SplitResult:
    """The URL's parts, all of them empty where it is none."""
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")
