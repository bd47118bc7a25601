"""Shows the status to browsers and monitors: a page, JSON, metrics, health. Nothing is written."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from threading import Thread

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from xlsd_cache.console.terminal import say
from xlsd_cache.outcomes import REASONS
from xlsd_cache.pages.render import render
from xlsd_cache.pages.server import HEADERS, OF_PAGE, guards, http_server, listen
from xlsd_cache.watching.metrics import exposition, registry
from xlsd_cache.watching.status import STATES, Status

_REFRESH_S = 5


@contextmanager
def serving(
    host: str, port: int, name: str, status: Callable[[], Status], patience_s: float
) -> Iterator[None]:
    """Serve in a thread within the block. Raises UserError where the port is taken."""
    remedy = f"give another port, or --http {host}:0 for any free one"
    with listen(host, port, remedy) as listening:
        server = http_server(application(host, name, status, patience_s))
        thread = Thread(target=server.run, args=([listening],), daemon=True, name="http")
        thread.start()
        say(f"http://{host}:{listening.getsockname()[1]}/")
        sys.stdout.flush()  # a script may wait for it
        try:
            yield
        finally:
            server.should_exit = True
            thread.join(10)


def application(host: str, name: str, status: Callable[[], Status], patience_s: float) -> Starlette:
    """The web application about the store `name`; unhealthy where it fails for `patience_s`."""
    metrics = registry(status)

    def page(_: Request) -> Response:
        headers = {"Content-Security-Policy": OF_PAGE, "Refresh": str(_REFRESH_S)}
        return HTMLResponse(html(name, status(), patience_s), headers=HEADERS | headers)

    def as_json(_: Request) -> Response:
        return JSONResponse(status().as_json(), headers=HEADERS)

    def as_metrics(_: Request) -> Response:
        return Response(exposition(metrics), headers=HEADERS, media_type=CONTENT_TYPE_LATEST)

    def health(_: Request) -> Response:
        why = status().ailment(patience_s)
        return PlainTextResponse(f"{why or 'ok'}\n", 503 if why else 200, HEADERS)

    routes = {"/": page, "/status.json": as_json, "/metrics": as_metrics, "/healthz": health}
    return Starlette(
        routes=[Route(path, answer) for path, answer in routes.items()], middleware=guards(host)
    )


def html(name: str, now: Status, patience_s: float) -> str:
    """The page."""
    sums = now.sums or {}
    rows = [
        ("waiting for a generation", f"{now.waiting:,} images"),
        ("oldest of them", f"{now.oldest_waiting_s:.0f} s"),
        ("still being written", f"{now.unsettled:,} images"),
        ("newest generation", "none" if now.generation < 0 else str(now.generation)),
        ("encoded since the start", f"{now.encoded:,} images, {now.images_per_s:.3g} images/s"),
        ("passes since the start", f"{now.passes:,}, of which {now.failed_passes:,} failed"),
        ("last pass that did not fail", _time(now.last_pass)),
        ("running since", f"{_time(now.started)}, process {now.pid} on {now.host}"),
        ("version", now.version),
    ]
    rejected = [(it, count, REASONS.get(it, "")) for it, count in sums.get("rejected", {}).items()]
    return render(
        "xlsd_cache.pages", "watch.html", name=name, now=now, meaning=STATES[now.state],
        sums=sums, rows=rows, rejected=rejected, ailment=now.ailment(patience_s), data={},
    )  # fmt: skip


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "none yet"
    return datetime.fromtimestamp(seconds).astimezone().isoformat(" ", "seconds")
