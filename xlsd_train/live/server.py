"""`xlsd-train live`: serves the page of runs that go on, and what happens in them, read-only."""

import asyncio
import logging
import re
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from xlsd_cache.console.terminal import say
from xlsd_cache.errors import UserError
from xlsd_cache.pages.thumbnails import thumbnail
from xlsd_cache.runtime.bounded_files import read_regular
from xlsd_train.config.run_options import LiveConfig
from xlsd_train.live.follow import Position, follow, from_id, to_id
from xlsd_train.live.pace import progress
from xlsd_train.live.runs import Runs, is_gone
from xlsd_train.report.page import NAME, page
from xlsd_train.runs.layout import SAMPLES, STEP
from xlsd_train.runs.links import refuse_links_to

LOOPBACK = ["127.0.0.1", "localhost"]
MOST_NBYTES = 1 << 27  # of a picture
PICTURE = re.compile(r"[0-9]{2,6}\.(png|webp)")
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
# The page has a stricter policy of its own, with the hashes of its script and style.
OF_PAGE = "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"

log = logging.getLogger("xlsd.train.live")


def live(config: LiveConfig) -> None:
    """Serve until a signal. Raises UserError for a folder that is no run, and for a port in use."""
    runs = Runs([folder.absolute() for folder in config.runs])
    try:
        listening = socket.create_server((config.host, config.port))
    except OSError as error:
        raise UserError(
            f"cannot serve at {config.host}:{config.port}: {error.strerror or error}; give another "
            f"--port, or --port 0 for any free one"
        ) from error
    hosts = [config.host, *(LOOPBACK if config.host in LOOPBACK else [])]
    server: uvicorn.Server
    app = application(runs, hosts, lambda: server.should_exit)
    options = uvicorn.Config(
        app, log_config=None, access_log=False, lifespan="off", ws="none", http="h11",
        loop="asyncio", server_header=False, limit_concurrency=100, timeout_graceful_shutdown=3,
    )  # fmt: skip
    server = uvicorn.Server(options)
    with listening, suppress(KeyboardInterrupt):  # which uvicorn raises again at its end
        say(f"http://{config.host}:{listening.getsockname()[1]}/")
        sys.stdout.flush()  # a script may wait for it
        log.info("Ctrl-C ends it; the runs are only read")
        server.run(sockets=[listening])


def application(runs: Runs, hosts: Sequence[str], ends: Callable[[], bool]) -> Starlette:
    """The web application; requests for other hosts are refused."""
    pages = _Pages(runs, ends)
    return Starlette(
        routes=[
            Route("/", pages.page),
            Route("/events", pages.events),
            Route("/favicon.ico", lambda _: Response(status_code=204, headers=HEADERS)),
            Route("/samples/{run:int}/{step}/{name}", pages.picture),
        ],
        # A page elsewhere may name itself as a host that leads to this machine (DNS rebinding).
        middleware=[
            Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False),
            Middleware(_OwnOrigin),
        ],
    )


class _OwnOrigin:
    """Refuses requests that another page's script makes."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != headers.get("host"):
            await Response(status_code=403, headers=HEADERS)(scope, receive, send)
        else:
            await self._app(scope, receive, send)


@dataclass
class _Pages:
    runs: Runs
    ends: Callable[[], bool]
    _one: asyncio.Lock = field(default_factory=asyncio.Lock)
    _rendered: tuple[str, str] = ("", "")  # the newest page and the positions that it shows

    async def page(self, _: Request) -> Response:
        """The report of the runs as they are now."""
        async with self._one:  # readers that come together share it
            try:
                html = await run_in_threadpool(self._render, self.runs.look())
            except UserError as error:
                raise HTTPException(503, str(error), HEADERS) from error
        return HTMLResponse(html, headers=HEADERS | {"Content-Security-Policy": OF_PAGE})

    def _render(self, folders: list[Path]) -> str:
        # Before the logs are read: the page has all up to here, and perhaps some lines more.
        at = to_id([Position.of(folder) for folder in folders])
        if self._rendered[0] != at:
            runs = self.runs.read(folders)
            told = [{**progress(run), "gone": is_gone(run.folder)} for run in runs]
            live = {"from": at, "runs": told}
            self._rendered = at, page(runs, Path(NAME), live)
        return self._rendered[1]

    async def events(self, request: Request) -> Response:
        """What happens from a position on: that of the page, or of the event last seen."""
        text = request.headers.get("last-event-id") or request.query_params.get("from", "")
        begin = from_id(text, len(self.runs.look()))
        if begin is None:
            raise HTTPException(400, "no position of these runs; load the page again", HEADERS)

        async def gone() -> bool:
            return self.ends() or await request.is_disconnected()

        events = follow(self.runs.look, begin, gone)
        return StreamingResponse(events, media_type="text/event-stream", headers=HEADERS)

    async def picture(self, request: Request) -> Response:
        """A sample, .png, or its thumbnail, .webp."""
        run, step, name = (request.path_params[x] for x in ("run", "step", "name"))
        if run >= len(self.runs.folders) or not STEP.fullmatch(step) or not PICTURE.fullmatch(name):
            raise HTTPException(404, headers=HEADERS)
        folder, path = self.runs.folders[run], Path(SAMPLES, step, name)
        try:
            content = await run_in_threadpool(_picture, folder, path)
        except (OSError, UserError) as error:
            raise HTTPException(404, headers=HEADERS) from error
        if content is None:
            raise HTTPException(404, headers=HEADERS)
        kind = f"image/{path.suffix[1:]}"
        cached = {"Cache-Control": "private, max-age=60"}
        return Response(content, media_type=kind, headers=HEADERS | cached)


def _picture(run: Path, path: Path) -> bytes | None:
    for each in (path, path.with_suffix(".png")):  # a thumbnail is made from the sample
        refuse_links_to(run, each)
    if path.suffix == ".webp":
        return thumbnail((run / path).with_suffix(".png"), keep=False)
    return read_regular(run / path, MOST_NBYTES)
