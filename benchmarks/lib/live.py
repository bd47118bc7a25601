"""`xlsd-train live` in a process of its own, and a browser with its page."""

import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from playwright.sync_api import Page

from benchmarks.lib.browser import chromium


@contextmanager
def serving(run: Path, code: str = "") -> Iterator[tuple[str, psutil.Process]]:
    """`xlsd-train live` in a process of its own, which runs `code` on its module `follow`."""
    program = f"import sys, xlsd_train.cli, xlsd_train.live.follow as it; {code}"
    program += "\nsys.exit(xlsd_train.cli.main())"
    words = [sys.executable, "-c", program, "live", str(run), "--port", "0"]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        assert process.stdout
        try:
            yield process.stdout.readline().decode().strip(), psutil.Process(process.pid)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait()


@contextmanager
def browsing(url: str, first: str = "") -> Iterator[Page]:
    """Chromium with the page, which runs the script `first` before its own. Raises UserError."""
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        if first:
            page.add_init_script(first)
        page.goto(url)
        yield page


def get(url: str) -> bytes:
    """The page."""
    with urllib.request.urlopen(url, timeout=600) as answer:
        return bytes(answer.read())
