"""Draw the pictures of the documentation: pages of real runs, in Chromium, light and dark.

    make article pictures

Each of DRIVES opens a page and brings it into the state that its picture shows. A picture on which
a path of this machine can be read is refused.
"""

import io
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import tyro
from PIL import Image
from playwright.sync_api import Page, sync_playwright

from xlsd_cache.errors import UserError
from xlsd_cache.runtime.atomic import write_bytes

NBYTES, TOTAL = 150_000, 1_000_000  # at most, of a picture and of all
WIDTH, HEIGHT, MARGIN = 1200, 820, 20  # pixels; the margin is at both sides
OWN_PATH = re.compile(r"(?<![\w.])/(?:home|root|tmp|work|Users|mnt)/\S*")  # of one machine
VISIBLE = """() => {
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    const range = document.createRange(), found = [];
    while (walker.nextNode()) {
        range.selectNodeContents(walker.currentNode);
        const box = range.getBoundingClientRect();
        if (box.height && box.top < innerHeight) found.push(walker.currentNode.data);
    }
    return found.join("\\n");
}"""  # the text of the first screen
Scheme = Literal["light", "dark"]
SCHEMES: tuple[Scheme, ...] = ("light", "dark")


def first_screen(page: Page) -> Any:
    """What a page shows before anyone scrolls."""
    return page


def samples(page: Page) -> Any:
    """The timeline: two steps of one prompt compared."""
    page.locator(".stage [data-divider]").fill("45")
    return page.locator("#samples")


def curves(page: Page) -> Any:
    """The loss of each step, smoothed, and of held-out images."""
    return page.locator("#curves .chart.large")


def verdict(page: Page) -> Any:
    """The change of the held-out loss by noise."""
    return page.locator("#bands")


def rates(page: Page) -> Any:
    """Learning rates, compared image by image."""
    return page.locator("#differences")


DRIVES: dict[str, tuple[str, Callable[[Page], Any]]] = {  # picture -> page, and what it shows
    "report": ("run", first_screen),
    "timeline": ("run", samples),
    "curves": ("run", curves),
    "by-noise": ("run", verdict),
    "sweep": ("sweep", rates),
    "store": ("store", first_screen),
}


def drive(browser: Any, path: Path, steps: Callable[[Page], Any], scheme: Scheme) -> bytes:
    """A screenshot of the page at `path` after `steps`, as PNG."""
    context = browser.new_context(
        viewport={"width": WIDTH, "height": HEIGHT}, color_scheme=scheme, reduced_motion="reduce"
    )
    page = context.new_page()
    page.goto(path.as_uri())
    shown = steps(page)
    page.wait_for_timeout(300)  # charts are drawn in the next frame
    words = page.evaluate(VISIBLE) if shown is page else shown.inner_text()
    if found := OWN_PATH.search(words):
        raise UserError(f"{path} shows the path {found[0]}; make it with relative paths")
    if shown is page:
        drawn: bytes = page.screenshot()
    else:
        box = shown.bounding_box()
        clip = {
            "x": box["x"] - MARGIN,
            "y": box["y"] + page.evaluate("scrollY"),
            "width": box["width"] + 2 * MARGIN,
            "height": box["height"],
        }
        drawn = page.screenshot(full_page=True, clip=clip)
    context.close()
    return drawn


def small(picture: bytes) -> bytes:
    """The picture as WebP."""
    file = io.BytesIO()
    Image.open(io.BytesIO(picture)).convert("RGB").save(file, "WEBP", quality=84, method=6)
    return file.getvalue()


def draw(pages: dict[str, Path], out: Path, schemes: tuple[Scheme, ...] = SCHEMES) -> None:
    """Write NAME-light.webp and NAME-dark.webp of every picture whose page is given."""
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        raise UserError("there is no Chromium; install it, e.g. `apt-get install chromium`")
    drawn = {}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        for name, (of, steps) in DRIVES.items():
            for scheme in schemes if of in pages else ():
                picture = small(drive(browser, pages[of].absolute(), steps, scheme))
                if len(picture) > NBYTES:
                    raise UserError(f"{name}-{scheme}.webp has {len(picture)} bytes, over {NBYTES}")
                drawn[f"{name}-{scheme}.webp"] = picture
        browser.close()
    out.mkdir(parents=True, exist_ok=True)
    for name, picture in drawn.items():
        write_bytes(out / name, picture)
        print(f"{out / name}: {len(picture):,} bytes")


def main(run: Path, sweep: Path, store: Path, out: Path = Path("docs/pictures")) -> None:
    """Draw the pictures of three pages: the report of a run, that of a sweep, that of a store."""
    draw({"run": run, "sweep": sweep, "store": store}, out)


if __name__ == "__main__":
    tyro.cli(main)
