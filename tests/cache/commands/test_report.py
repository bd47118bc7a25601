"""The page of a store, in a real browser."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.lib.synthetic import REASONS, make_store
from tests.support import cache
from tests.support.browser import (
    LAYOUTS,
    Scheme,
    check_layout,
    chromium,
    opened,
)
from xlsd_cache.commands.preview import decoded
from xlsd_cache.encoding.compatibility import identity_of
from xlsd_cache.encoding.vae import load_vae
from xlsd_cache.store.reader import LatentStore
from xlsd_train.cli import COMMANDS
from xlsd_train.config.recipes import parse

HEAVY = ("torch", "diffusers", "transformers")
PICTURE_SUFFIXES = {".jpg", ".png", ".webp"}
HARM = "<script>window.harmed = true</script><img src=x onerror='window.harmed=true'>"


@pytest.fixture(scope="module")
def built(photos: Path, vae: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with tags, of which some images were rejected."""
    images = tmp_path_factory.mktemp("images") / "photos"
    shutil.copytree(photos, images)
    pictures = sorted(path for path in images.iterdir() if path.suffix in PICTURE_SUFFIXES)
    for number, path in enumerate(pictures):
        words = f"photo, {'even' if number % 2 == 0 else 'odd'}, number {number}"
        path.with_suffix(".txt").write_text(HARM if number == 0 else words)
    (images / "broken.jpg").write_bytes(pictures[1].read_bytes()[:700])
    shutil.copy(pictures[2], images / f"copy{pictures[2].suffix}")
    store = images.parent / "latents"
    assert cache("build", images, "--out", store, "--vae", vae, "--resolution", 128) == 0
    return store


@pytest.fixture(scope="module")
def made(built: Path) -> Path:
    assert cache("report", built) == 0
    return built / "report.html"


@pytest.fixture(scope="module")
def large(vae: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of 100 buckets, 10,000 tags, long captions in two columns, 3,000 rejected images."""
    tmp_path = tmp_path_factory.mktemp("large")
    store, sides = tmp_path / "latents", range(64, 144, 8)
    identity = identity_of(
        load_vae(str(vae)), dtype="float32", precision="fp32", preprocessing=1, resolution=128,
        buckets="aspect", max_ratio=2.5, upscale=False,
    )  # fmt: skip
    shares = {f"{width}x{height}": 0.01 for width in sides for height in sides}
    make_store(store, 12_000, 512, identity=identity, shares=shares, readable=True, rejected=3_000)
    with LatentStore.open(store) as opened_store:
        keys = opened_store.samples["key"].to_pylist()
        assert len(opened_store.tags("txt").names) > 9_000
    long = json.dumps("A sentence of <many> words & signs, on Grüße. " * 100)
    table = tmp_path / "long.jsonl"
    table.write_text("".join(f'{{"path": "/data/{key}", "long": {long}}}\n' for key in keys[::3]))
    assert cache("captions", store, "--from", table, "--columns", "jsonl:long") == 0
    assert cache("report", store, "--count", 96) == 0
    return store / "report.html"


@pytest.fixture(scope="module")
def browser(made: Path, large: Path) -> Iterator[Any]:
    """After the builds, which run an event loop, as Playwright does."""
    with chromium() as found:
        yield found


@pytest.mark.parametrize(("width", "scheme"), LAYOUTS)
def test_every_layout_is_accessible(browser: Any, made: Path, width: int, scheme: Scheme) -> None:
    with opened(browser, made, width, scheme) as page:
        check_layout(page, f"store-{width}-{scheme}", scheme)


def test_the_numbers_are_those_of_info(browser: Any, made: Path, built: Path, capsys: Any) -> None:
    assert cache("info", built, "--json") == 0
    about = json.loads(capsys.readouterr().out)
    with opened(browser, made, 360) as page:
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        assert (
            f"{about['live']} images in {len(about['buckets'])}" in page.locator("h1").inner_text()
        )
        buckets = page.get_by_role("region", name="Buckets").locator("tr").all_inner_texts()
        assert {name: int(n) for name, n in (it.split() for it in buckets)} == about["buckets"]
        cells = page.locator("#channels tbody tr").nth(1).locator("td").all_inner_texts()
        assert cells[0] == f"{about['latents']['mean'][1]:+.3f}"
        assert cells[1] == f"{about['latents']['std'][1]:.3f}"
        tags = page.get_by_role("region", name="Tags of txt", exact=True).locator("tr")
        assert "photo" in tags.first.inner_text()


def test_tags_that_occur_together(browser: Any, made: Path) -> None:
    with opened(browser, made) as page:
        rows = page.locator(".heat tr").all_inner_texts()
        table = [row.split("\t") for row in rows]
        column = table[0].index("photo")
        shares = {row[0]: row[column] for row in table[1:]}
        assert shares["photo"] == shares["even"] == shares["odd"] == "100%"
        (even,) = [row for row in table if row[0] == "even"]
        assert even[table[0].index("odd")] == "0%"


def test_rejected_images_have_reasons_and_pictures(browser: Any, made: Path) -> None:
    with opened(browser, made) as page:
        rejected = page.locator("#rejected")
        names = rejected.locator("h3").all_inner_texts()
        assert "duplicate" in names
        assert len(names) == 2
        copy = rejected.locator("figure", has_text="copy")
        assert copy.locator("img").evaluate("it => it.naturalWidth") > 100
        broken = rejected.locator("figure", has_text="broken")
        assert broken.locator("img").count() == 0
        assert "not decoded" in broken.inner_text()


def test_the_sheet_is_filtered_by_tags_and_captions_stay_text(browser: Any, made: Path) -> None:
    with opened(browser, made) as page:
        sheet = page.locator("#sheet")
        figures = sheet.locator("figure")
        total = figures.count()
        assert f"1 to {total} of {total}" in sheet.locator("output").inner_text()
        assert sheet.locator("figcaption", has_text=HARM).count() == 1
        assert page.evaluate("window.harmed") is None
        assert figures.first.locator("img").evaluate("it => it.naturalWidth") >= 64
        sheet.get_by_label("Tags").fill("photo, even")
        assert 0 < figures.count() < total
        assert all("even" in text for text in figures.all_inner_texts())
        assert "1 to " in str(page.locator("#live").text_content())
        sheet.get_by_label("Tags").fill("eve")
        assert figures.count() == 0  # a tag is matched whole


def test_many_pictures_are_paged(browser: Any, made: Path, tmp_path: Path) -> None:
    """The same page with its pictures eight times."""
    html = made.read_text(encoding="utf-8")
    start = html.index('id="data">') + len('id="data">')
    data = json.loads(html[start : html.index("</script>", start)])
    begin = html.index("data-pictures>") + len("data-pictures>")
    pictures = json.loads(html[begin : html.index("</script>", begin)])
    count = len(pictures)
    for old, new in ((data, {**data, "samples": data["samples"] * 8}), (pictures, pictures * 8)):
        was = html[start : html.index("</script>", start)] if old is data else ""
        was = was or html[begin : html.index("</script>", begin)]
        html = html.replace(was, json.dumps(new).replace("<", "\\u003c"))
        begin = html.index("data-pictures>") + len("data-pictures>")
    many = tmp_path / "many.html"
    many.write_text(html, encoding="utf-8")
    with opened(browser, many) as page:
        sheet = page.locator("#sheet")
        said, forward = sheet.locator("output"), page.get_by_role("button", name="Next")
        assert sheet.get_by_role("button", name="Previous").get_attribute("aria-disabled") == "true"
        forward.press("Enter")
        assert f"25 to 48 of {8 * count}" in said.inner_text()
        page.keyboard.press("ArrowLeft")
        assert f"1 to 24 of {8 * count}" in said.inner_text()
        for _ in range(count):  # more than there are pages
            page.keyboard.press("ArrowRight")
        assert f"to {8 * count} of {8 * count}" in said.inner_text()
        assert forward.get_attribute("aria-disabled") == "true"
        forward.press("Enter")
        assert f"to {8 * count} of {8 * count}" in said.inner_text()
        assert forward.evaluate("it => it === document.activeElement")  # the keyboard is not lost


def test_the_same_seed_gives_the_same_page(built: Path, tmp_path: Path) -> None:
    def page(name: str, *options: object) -> str:
        path = tmp_path / f"{name}.html"
        assert cache("report", built, "-o", path, "--count", 5, *options) == 0
        return path.read_text(encoding="utf-8").partition("</h1>")[2]  # the size on disk is in it

    first = page("first")
    assert page("again") == first
    assert page("other", "--seed", 1) != first
    (built / "rejected.parquet").rename(tmp_path / "aside")  # then they are counted from the log
    try:
        assert page("counted") == first
    finally:
        (tmp_path / "aside").rename(built / "rejected.parquet")


def test_its_next_command_is_possible(browser: Any, made: Path, built: Path) -> None:
    with opened(browser, made) as page:
        words = shlex.split(page.locator("[data-copy]").get_attribute("data-copy") or "")
    assert words[0] == "xlsd-train"
    config = parse(COMMANDS["run"].options, words[1:], "xlsd-train")
    assert config.data == (str(built),)


def test_pictures_decoded_together_are_those_decoded_alone(built: Path, vae: Path) -> None:
    with LatentStore.open(built) as store:
        bucket, rows = max(store.buckets.items(), key=lambda it: len(it[1]))
        raw, loaded, cpu = store.read(bucket, rows[:4]), load_vae(str(vae)), torch.device("cpu")
        together = decoded(loaded, raw, cpu)
        assert len(together) == len(raw) > 1
        for latent, picture in zip(raw, together, strict=True):
            (alone,) = decoded(loaded, latent[None], cpu)
            difference = np.asarray(alone).astype(int) - np.asarray(picture)
            assert abs(difference).max() <= 1


def test_a_store_with_much_of_everything_has_a_small_page(browser: Any, large: Path) -> None:
    html = large.read_text(encoding="utf-8")
    pictures = re.findall(r"data:image[^\"]*", html)
    assert len(pictures) == 96
    assert len(html.encode()) - sum(map(len, pictures)) < 500_000
    with opened(browser, large, 360) as page:
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        assert "3000 rejected" in page.locator("#counts").inner_text()
        assert page.locator("#rejected h3").count() == len(REASONS)
        assert page.locator("#rejected figure").count() == 6 * len(REASONS)
        of_both = page.locator("#sheet figure", has=page.locator("b", has_text="long")).first
        assert of_both.locator("b").all_inner_texts() == ["jsonl:long", "txt"]
        page.locator("#sheet").get_by_label("Tags").fill(
            "signs, on"
        )  # a tag of no image, but words of long ones
        assert "none" not in page.locator("#sheet output").inner_text()


def test_without_pictures_it_is_small_and_needs_no_vae(built: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert cache("report", built, "-o", page, "--count", 0, "--vae", tmp_path / "none") == 0
    html = page.read_text(encoding="utf-8")
    assert "data-gallery" not in html.split("<script>")[0]
    pictures = sum(map(len, html.split('src="data:')[1:]))
    assert len(html) - pictures < 500_000


def test_another_file_is_not_overwritten(built: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.html"
    mine.write_text("<p>mine</p>")
    assert cache("report", built, "-o", mine, "--count", 0) == 1
    assert mine.read_text() == "<p>mine</p>"
    assert cache("report", tmp_path, "--count", 0) == 1


def test_without_pictures_no_torch_is_loaded(built: Path, tmp_path: Path) -> None:
    words = ["report", str(built), "--count", "0", "-o", str(tmp_path / "page.html")]
    code = f"import sys, xlsd_cache.cli; assert xlsd_cache.cli.main({words}) == 0; "
    look = f"{code}print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert (tmp_path / "page.html").exists()
