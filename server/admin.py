"""The operator's own address (`admin_port`): metrics, dashboard and probes apart from where clients come in.

Lives on the event loop. One server listens on both addresses; the port that a connection came in on decides which
application answers, and nothing that a request says does (its Host, its path).
"""

from collections.abc import Sequence

from starlette.applications import Starlette
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from headrace.server.endpoint import exception_handlers
from headrace.server.guard import admin_guards
from headrace.server.request_log import OnRejected
from headrace.server.settings import ListenerSettings


def admin_app(settings: ListenerSettings, routes: Sequence[BaseRoute], on_rejected: OnRejected) -> Starlette:
    """The application of the operator's address. It asks for no key: who reaches the address may read."""
    app = Starlette(
        routes=routes,
        middleware=admin_guards(settings, on_rejected),
        exception_handlers=exception_handlers(on_rejected),
    )
    app.router.redirect_slashes = False
    return app


class ByPort:
    """Hands what came in on `admin_port` to `admin`, all else to `app`."""

    def __init__(self, app: ASGIApp, admin: ASGIApp, admin_port: int) -> None:
        self._app = app
        self._admin = admin
        self._admin_port = admin_port

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_admin = scope["type"] == "http" and scope["server"][1] == self._admin_port
        await (self._admin if is_admin else self._app)(scope, receive, send)
