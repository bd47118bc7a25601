"""The pictures of the documentation: small, used, and drawn by steps that the pages still allow."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.demo.going import going
from benchmarks.demo.pictures import DRIVES, NBYTES, OWN_PATH, SCHEMES, TOTAL, draw, terminal
from tests.support import cache, train
from tests.support.browser import needed
from xlsd_cache.errors import UserError

DOCS = Path(__file__).parents[2] / "docs"
NAMES = {f"{name}-{scheme}.webp" for name in DRIVES for scheme in SCHEMES}


def test_every_picture_is_small_and_shown() -> None:
    there = {path.name: path.stat().st_size for path in (DOCS / "pictures").iterdir()}
    assert set(there) == NAMES
    assert max(there.values()) <= NBYTES
    assert sum(there.values()) <= TOTAL
    shown = [
        (alternative, (page.parent / target).resolve(), name, scheme)
        for page in DOCS.rglob("*.md")
        for alternative, target, name, scheme in re.findall(
            r"!\[([^]]*)\]\(([^)\s]*pictures/([\w-]+)-(?:light|dark)\.webp)#only-(light|dark)\)",
            page.read_text(encoding="utf-8"),
        )
    ]
    assert {path.name for _, path, _, _ in shown} == NAMES
    for alternative, path, name, scheme in shown:
        assert path == DOCS / "pictures" / f"{name}-{scheme}.webp"
        assert len(alternative.split()) > 5
        with Image.open(path) as image:
            dark = np.asarray(image.convert("L")).mean() < 128
        assert dark == (scheme == "dark")


def test_the_steps_that_draw_them_work(
    model: Path, store: Path, vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed("Chromium", bool(shutil.which("chromium") or shutil.which("google-chrome")))
    monkeypatch.chdir(tmp_path)
    for name, folder in (("model", model), ("vae", vae)):  # the pages show them as they were given
        Path(name).symlink_to(folder)
    shutil.copytree(store, "latents")
    arguments: list[Any] = [
        "--phase", "te", "--batch", 3, "--data", "latents", "--model", "model", "--steps", 4,
        "--warmup", 0, "--threads", 1, "--validate-every", 2, "--validation-fraction", 0.4,
        "--sample-every", 4, "--sample-steps", 1,
    ]  # fmt: skip
    assert train(*arguments, "--lr", "1e-4", "--out", "lr-1e-4") == 0
    run = Path("lr-1e-3")
    words = [*map(str, arguments), "--lr", "1e-3", "--stop-after", "2"]
    with going(words, run, step=4) as (lines, address):  # which a run of two steps does not reach
        assert lines[0] == f"run        {run}: new"
        assert "data       latents: " in "\n".join(lines)
        draw({"live": address, "terminal": terminal(lines)}, Path("drawn"), ("dark",))
    assert train(*arguments, "--lr", "1e-3", "--out", run) == 0
    assert train("report", "lr-1e-3", "lr-1e-4", "-o", "both.html") == 0
    assert cache("report", "latents", "--count", 2, "--vae", "vae", "-o", "store.html") == 0
    report = run / "report.html"
    pages = {"run": report, "sweep": Path("both.html"), "store": Path("store.html")}
    draw({name: it.absolute().as_uri() for name, it in pages.items()}, Path("drawn"), ("dark",))
    assert {path.name for path in Path("drawn").iterdir()} == {f"{it}-dark.webp" for it in DRIVES}
    report.write_text(report.read_text().replace("<h1>", "<h1>/home/me/runs "))
    with pytest.raises(UserError, match="/home/me/runs"):
        draw({"run": report.absolute().as_uri()}, Path("other"), ("light",))


def test_paths_of_a_machine_are_found() -> None:
    assert OWN_PATH.search("decoded with /tmp/a/vae")
    assert not OWN_PATH.search("article/tmp/x and images/s")
