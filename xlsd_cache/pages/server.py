"""Serves pages over HTTP, and refuses requests that pages elsewhere make."""

import socket
from urllib.parse import urlsplit

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from xlsd_cache.errors import UserError

LOOPBACK = ("127.0.0.1", "localhost")
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
# Pages have a stricter policy of their own, with the hashes of their script and style.
OF_PAGE = "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"


def listen(host: str, port: int, remedy: str) -> socket.socket:
    """A listening socket; IPv6 has colons. Raises UserError where it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host.strip("[]"), port), family=family)
    except OSError as error:
        raise UserError(
            f"cannot serve at {host}:{port}: {error.strerror or error}; {remedy}"
        ) from error


def guards(host: str) -> list[Middleware]:
    """Refuses requests for other hosts, and those that another page's script makes.

    A page elsewhere may name itself as a host that leads to this machine (DNS rebinding).
    """
    hosts = list(LOOPBACK) if host in LOOPBACK else [host.lower()]  # as browsers send it
    return [
        Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False),
        Middleware(_OwnOrigin),
    ]


class _OwnOrigin:
    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != headers.get("host"):
            await Response(status_code=403, headers=HEADERS)(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def http_server(app: Starlette) -> uvicorn.Server:
    """A server of a web application, to be run with a listening socket."""
    options = uvicorn.Config(
        app, log_config=None, access_log=False, lifespan="off", ws="none", http="h11",
        loop="asyncio", server_header=False, limit_concurrency=100, timeout_graceful_shutdown=3,
    )  # fmt: skip
    return uvicorn.Server(options)
