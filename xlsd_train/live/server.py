"""`xlsd-train live`: serves the page of runs that go on, and what happens in them, read-only."""

import asyncio
import logging
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response, StreamingResponse
from starlette.routing import Route

from xlsd_cache.console.terminal import say
from xlsd_cache.errors import UserError
from xlsd_cache.pages.server import HEADERS, OF_PAGE, guards, http_server, listen
from xlsd_cache.pages.thumbnails import thumbnail
from xlsd_cache.runtime.bounded_files import read_regular
from xlsd_train.config.run_options import LiveConfig
from xlsd_train.live.follow import Position, follow, from_id, to_id
from xlsd_train.live.runs import Runs, is_gone
from xlsd_train.report.pace import progress
from xlsd_train.report.page import NAME, page
from xlsd_train.runs.layout import SAMPLES, STEP
from xlsd_train.runs.links import refuse_links_to

RENEW_S = 30.0
MOST_NBYTES = 1 << 27  # of a picture
PICTURE = re.compile(r"[0-9]{2,6}\.(png|webp)")
log = logging.getLogger("xlsd.train.live")


def live(config: LiveConfig) -> None:
    """Serve until a signal. Raises UserError for a folder that is no run, and for a port in use."""
    runs = Runs(config.runs)
    host = f"[{config.host.strip('[]')}]" if ":" in config.host else config.host
    remedy = "give an address of this machine with --host, and a free --port (0: any)"
    listening = listen(host, config.port, remedy)
    server: uvicorn.Server
    app = application(runs, host, lambda: server.should_exit)
    server = http_server(app)
    for number in (signal.SIGINT, signal.SIGTERM):  # also before uvicorn has its own handlers
        signal.signal(number, server.handle_exit)
    with listening:
        say(f"http://{host}:{listening.getsockname()[1]}/")
        sys.stdout.flush()  # a script may wait for it
        log.info("Ctrl-C ends it; the runs are only read")
        server.run(sockets=[listening])


def application(runs: Runs, host: str, ends: Callable[[], bool]) -> Starlette:
    """The web application; requests for other hosts are refused."""
    pages = _Pages(runs, ends)
    return Starlette(
        routes=[
            Route("/", pages.page),
            Route("/events", pages.events),
            Route("/favicon.ico", lambda _: Response(status_code=204, headers=HEADERS)),
            Route("/samples/{run:int}/{step}/{name}", pages.picture),
        ],
        middleware=guards(host),
    )


@dataclass
class _Pages:
    runs: Runs
    ends: Callable[[], bool]
    _one: asyncio.Lock = field(default_factory=asyncio.Lock)
    # The positions that the newest page shows, the page, and when it was made.
    _rendered: tuple[str, str, float] = ("", "", 0.0)

    async def page(self, _: Request) -> Response:
        """The report of the runs as they are now."""
        async with self._one:  # readers that come together share it
            try:
                html = await run_in_threadpool(self._render, self.runs.look())
            except (OSError, UserError) as error:
                raise HTTPException(503, str(error), HEADERS) from error
        return HTMLResponse(html, headers=HEADERS | {"Content-Security-Policy": OF_PAGE})

    def _render(self, folders: list[Path]) -> str:
        # Before the logs are read: the page has all up to here, and perhaps some lines more.
        at = to_id([Position.of(folder) for folder in folders])
        # It says for how long a run has been quiet.
        if self._rendered[0] != at or time.monotonic() - self._rendered[2] > RENEW_S:
            runs = self.runs.read(folders)
            told = [{**progress(run), "gone": is_gone(run.folder)} for run in runs]
            live = {"from": at, "runs": told}
            self._rendered = at, page(runs, Path(NAME), live), time.monotonic()
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
