"""Draw the pictures of the documentation: pages of real runs, in Chromium, light and dark.

    make article pictures

Each of DRIVES opens a page and brings it into the state that its picture shows. Two are of a run
that goes on meanwhile: its live page, and the terminal that it runs in. A picture on which a path
of this machine can be read is refused.
"""

import html
import io
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import tyro
from PIL import Image
from playwright.sync_api import Page

import xlsd_cache.pages
from benchmarks.demo.going import going
from benchmarks.lib.browser import chromium
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


def following(page: Page) -> Any:
    """A run that goes on, and when it will end."""
    page.get_by_text(re.compile("^Live · step|^Live · finished")).wait_for()
    return page


def text(page: Page) -> Any:
    """Lines of a terminal."""
    return page.locator("pre")


DRIVES: dict[str, tuple[str, Callable[[Page], Any]]] = {  # picture -> page, and what it shows
    "report": ("run", first_screen),
    "timeline": ("run", samples),
    "curves": ("run", curves),
    "by-noise": ("run", verdict),
    "sweep": ("sweep", rates),
    "store": ("store", first_screen),
    "live": ("live", following),
    "terminal": ("terminal", text),
}
GOING = """--recipe phase2-unet --lr 3e-4 --batch 4 --steps 700 --warmup 20 --sample-steps 10
    --sample-guidance 3 --sample-every 20 --validation-fraction 0.15 --validate-every 20"""


def terminal(lines: list[str]) -> str:
    """The address of a page that shows the lines."""
    style = Path(xlsd_cache.pages.__path__[0], "built", "page.css").read_text(encoding="utf-8")
    look = "display: inline-block; margin: 20px; padding: 14px 18px; font: 14px/1.5 monospace"
    shown = html.escape("\n".join(lines))
    page = f'<!doctype html><style>{style}</style><pre class="card" style="{look}">{shown}</pre>'
    return f"data:text/html;charset=utf-8,{quote(page)}"


def drive(browser: Any, address: str, steps: Callable[[Page], Any], scheme: Scheme) -> bytes:
    """A screenshot of the page at `address` after `steps`, as PNG."""
    context = browser.new_context(
        viewport={"width": WIDTH, "height": HEIGHT}, color_scheme=scheme, reduced_motion="reduce"
    )
    page = context.new_page()
    page.goto(address)
    shown = steps(page)
    page.wait_for_timeout(300)  # charts are drawn in the next frame
    words = page.evaluate(VISIBLE) if shown is page else shown.inner_text()
    if found := OWN_PATH.search(words):
        raise UserError(f"{address[:99]} shows the path {found[0]}; make it with relative paths")
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
    """The picture as WebP; text is smaller without loss."""
    found = []
    for options in ({"quality": 84}, {"lossless": True}):
        file = io.BytesIO()
        Image.open(io.BytesIO(picture)).convert("RGB").save(file, "WEBP", method=6, **options)
        found.append(file.getvalue())
    return min(found, key=len)


def draw(pages: dict[str, str], out: Path, schemes: tuple[Scheme, ...] = SCHEMES) -> None:
    """Write NAME-light.webp and NAME-dark.webp of every picture whose page's address is given."""
    drawn = {}
    with chromium() as browser:
        for name, (of, steps) in DRIVES.items():
            for scheme in schemes if of in pages else ():
                picture = small(drive(browser, pages[of], steps, scheme))
                if len(picture) > NBYTES:
                    raise UserError(f"{name}-{scheme}.webp has {len(picture)} bytes, over {NBYTES}")
                drawn[f"{name}-{scheme}.webp"] = picture
    out.mkdir(parents=True, exist_ok=True)
    for name, picture in drawn.items():
        write_bytes(out / name, picture)
        print(f"{out / name}: {len(picture):,} bytes")


def main(article: Path = Path("article"), out: Path = Path("docs/pictures")) -> None:
    """Draw the pictures of what `make article` made, and of a run that is started for them."""
    folders = {"run": article / "phase1", "sweep": article / "sweep", "store": article / "narrow"}
    pages = {name: (it / "report.html").absolute().as_uri() for name, it in folders.items()}
    data = ["--data", str(article / "broad"), str(article / "narrow")]
    words, run = [*GOING.split(), *data, "--model", str(article / "te")], article / "going"
    shutil.rmtree(run, ignore_errors=True)
    with going(words, run, step=60) as (lines, address):
        draw({**pages, "live": address, "terminal": terminal(lines)}, out)


if __name__ == "__main__":
    tyro.cli(main)
