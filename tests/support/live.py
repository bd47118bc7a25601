"""A real `xlsd-train live` in a process of its own, a reader of its events, and logs that grow."""

import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

LINE = {"loss": 0.25, "lr": 1e-3, "lr_effective": 1e-3, "grad_norm": 1.5, "images_per_s": 3.25}


def append(run: Path, first: int, count: int, end: str = "\n") -> None:
    """Steps as a run logs them; without `end` the last one is unfinished."""
    steps = range(first, first + count)
    lines = [{"step": step, "images_seen": 3 * step, "epoch": step / 1.5, **LINE} for step in steps]
    with (run / "metrics.jsonl").open("a") as log:
        log.write("\n".join(map(json.dumps, lines)) + end)


class Event(NamedTuple):
    """A server-sent event."""

    id: str
    name: str
    data: dict[str, Any]


class Served(NamedTuple):
    """A server that runs."""

    url: str
    pid: int


@contextmanager
def serving(
    *runs: Path, code: str = "pass", host: str = "127.0.0.1", at: str = "127.0.0.1"
) -> Iterator[Served]:
    """The server at any free port, which runs `code` first; it must end by SIGINT."""
    program = f"import sys, xlsd_train.cli; {code}; sys.exit(xlsd_train.cli.main())"
    words = [sys.executable, "-c", program, "live", *map(str, runs), "--port", "0", "--host", host]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        try:
            url = process.stdout.readline().decode().strip()
            assert url.startswith(f"http://{at}:"), process.stderr.read().decode()
            yield Served(url, process.pid)
        finally:
            process.send_signal(2)
            _, told = process.communicate(timeout=30)
        assert process.returncode in {0, 130}, told.decode()
        assert b"Traceback" not in told
        assert b"Exception" not in told


def get(url: str, method: str = "GET", **headers: str) -> tuple[int, bytes, dict[str, str]]:
    """Status, content and headers."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, headers=named, method=method), timeout=60
        ) as answer:
            told = {name.title(): value for name, value in answer.headers.items()}
            return answer.status, answer.read(), told
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read(), dict(error.headers)


@contextmanager
def events(url: str, begin: str, last: str = "") -> Iterator[Iterator[Event]]:
    """Events from a position on, or after the event `last`; at the end the reader goes away."""
    headers = {"Last-Event-ID": last} if last else {}
    request = urllib.request.Request(f"{url}events?from={begin}", headers=headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        yield _parse(answer)


def _parse(lines: Iterator[bytes]) -> Iterator[Event]:
    fields: dict[str, str] = {}
    for line in lines:
        name, _, value = line.decode().rstrip("\n").partition(": ")
        if name:
            fields[name] = value
        elif "event" in fields:
            yield Event(fields["id"], fields["event"], json.loads(fields["data"]))
            fields = {}


def begin_of(page: bytes) -> str:
    """The position that a page says it shows."""
    return page.decode().partition('"live": {"from": "')[2].partition('"')[0]
