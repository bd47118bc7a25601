"""Headless Chromium for tests of pages: no page may fetch anything, or print to the console."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest
from playwright.sync_api import Locator, Page, sync_playwright

ROOT = Path(__file__).parents[2]
AXE = ROOT / "web/node_modules/axe-core/axe.min.js"  # `npm --prefix web ci` installs it
PICTURES = ROOT / "pictures"  # screenshots, to be looked at
Scheme = Literal["light", "dark"]
LAYOUTS: list[tuple[int, Scheme]] = [(w, s) for w in (1400, 400) for s in ("light", "dark")]
LUMINANCE = """element => {
    const [r, g, b] = getComputedStyle(element).backgroundColor.match(/\\d+/g);
    return (+r + +g + +b) / 3;
}"""


def needed(what: str, present: bool) -> None:
    """Skip a test that lacks a tool; where XLSD_BROWSER is set, as in CI, fail."""
    if not present:
        (pytest.fail if os.environ.get("XLSD_BROWSER") else pytest.skip)(f"there is no {what}")


@contextmanager
def chromium() -> Iterator[Any]:
    """The browser that the system has."""
    path = shutil.which("chromium") or shutil.which("google-chrome")
    needed("Chromium, which `apt-get install chromium` installs", path is not None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def opened(
    browser: Any, path: Path, width: int = 1400, scheme: Scheme = "light",
    originals: Path | None = None, **options: Any,
) -> Iterator[Page]:  # fmt: skip
    """A page that was opened; at the end, it must have fetched nothing and printed nothing.

    Only files in `originals` may be opened.
    """
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, **options
    )
    page, printed, fetched = context.new_page(), [], []
    page.on("console", lambda message: printed.append(message.text))
    page.on("pageerror", lambda error: printed.append(str(error)))
    context.on("request", lambda request: fetched.append(request.url))
    page.goto(path.as_uri())
    yield page
    assert printed == []
    allowed = ("data:", *([f"{originals.as_uri()}/"] if originals else []))
    assert [url for url in fetched if not url.startswith(allowed)] == [path.as_uri()]
    context.close()


def faults(page: Page) -> list[str]:
    """What axe-core finds wrong with a page's accessibility."""
    needed("axe-core, which `npm --prefix web ci` installs", AXE.exists())
    page.evaluate(AXE.read_text(encoding="utf-8"))
    found = page.evaluate("axe.run()")
    return [f"{it['id']}: {it['nodes'][0]['html']}" for it in found["violations"]]


def check_layout(page: Page, name: str, scheme: Scheme) -> None:
    """A page in PICTURES; with all details open it is accessible, and as light as its scheme."""
    PICTURES.mkdir(exist_ok=True)
    page.screenshot(path=PICTURES / f"{name}.png", full_page=True)
    for details in page.locator("details").all():
        details.locator("summary").click()
    assert faults(page) == []
    light = page.locator("body").evaluate(LUMINANCE)
    assert light > 200 if scheme == "light" else light < 60


def drag(page: Page, element: Locator) -> None:
    """Drag from the middle of an element to 80% of its width."""
    box = element.bounding_box()
    assert box is not None
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] / 2, middle)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.8, middle, steps=5)
    page.mouse.up()
