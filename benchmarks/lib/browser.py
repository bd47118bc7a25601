"""The Chromium that the system has; Playwright's own download is not needed."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, sync_playwright

from xlsd_cache.errors import UserError


@contextmanager
def chromium() -> Iterator[Browser]:
    """A headless browser for the block. Raises UserError where there is none."""
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        raise UserError("there is no Chromium; install it, e.g. `apt-get install chromium`")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()
