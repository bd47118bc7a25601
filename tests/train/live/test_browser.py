"""The page in a real browser, of a run that trains."""

import json
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Page, expect

from tests.support import files, spawn, train, wait_for
from tests.support.browser import PICTURES, chromium, faults
from tests.support.live import append, serving
from tests.support.sessions import slow_train

WAIT_MS = 180_000


@contextmanager
def followed(url: str) -> Iterator[tuple[Page, list[str]]]:
    """The live page and the addresses that it loaded; nothing may be printed or come from afar."""
    with chromium() as browser:
        context = browser.new_context(viewport={"width": 1400, "height": 900})
        page, printed, fetched, loaded = context.new_page(), [], [], list[str]()
        page.on("console", lambda it: printed.append(f"{it.text} {it.location}"))
        page.on("pageerror", lambda error: printed.append(str(error)))
        page.on("framenavigated", lambda frame: loaded.append(frame.url))
        context.on("request", lambda request: fetched.append(request.url))
        page.goto(url)
        yield page, loaded
        assert printed == []
        assert [it for it in fetched if not it.startswith((url, "data:"))] == []
        context.close()


def test_new_points_and_samples_appear_while_a_run_trains(
    model: Path, store: Path, tmp_path: Path
) -> None:
    run, plain = tmp_path / "run", tmp_path / "plain"
    given = [
        "--phase", "te", "--batch", 3, "--data", store, "--model", model, "--steps", 1000,
        "--stop-after", 45, "--warmup", 0, "--lr", 1e-3, "--threads", 1, "--sample-every", 15,
        "--sample-steps", 1, "--validate-every", 15, "--validation-fraction", 0.4,
    ]  # fmt: skip
    process = spawn(slow_train, *given, "--out", run, log=tmp_path / "log")
    log = run / "metrics.jsonl"
    wait_for(lambda: log.exists() and len(log.read_bytes().splitlines()) >= 2)
    with serving(run) as it, followed(it.url) as (page, loaded):
        tag, live = page.locator("[data-tag-b]"), page.locator("[data-live]")
        assert process.is_alive()
        before = str(tag.text_content())
        expect(tag).not_to_have_text(before, timeout=WAIT_MS)
        step = int(re.sub(r"\D", "", str(tag.text_content())))
        drawn = run / f"samples/step-{step:08d}/00.png"
        late = time.time() - drawn.stat().st_mtime
        print(f"the samples of step {step} were shown {late:.2f} s later")
        # On a slow machine the run may be over by now.
        expect(live).to_contain_text(re.compile(r"step \d+ of 45, about .* left|finished"))
        PICTURES.mkdir(exist_ok=True)
        page.screenshot(path=PICTURES / "live.png", full_page=True)
        expect(live).to_contain_text("finished", timeout=WAIT_MS)
        process.join()
        assert process.exitcode == 0, (tmp_path / "log").read_text()
        expect(tag).to_have_text("B step 45", timeout=WAIT_MS)
        expect(page.get_by_role("heading", level=1)).to_contain_text("45 steps", timeout=WAIT_MS)
        assert page.locator(".stage [data-b]").evaluate("it => it.complete && it.naturalWidth > 0")
        assert page.get_by_role("button", name="step 45: ").count() >= 1
        assert faults(page) == []
        page.wait_for_timeout(5000)  # the last exchange is over
        page.get_by_role("button", name="Copy").click()  # in a part that was exchanged
        expect(page.get_by_role("button", name=re.compile("Copied|Selected"))).to_have_count(1)
        assert len(loaded) == 1, "the page was loaded again"
    # The run's bits are those of a run that nobody looks at.
    assert train(*given, "--out", plain) == 0
    for pattern in ("checkpoints/*/*", "samples/step*/*", "validation/*"):
        assert files(run, pattern) == files(plain, pattern)


def begin(folder: Path, rate: str) -> Path:
    """A run of eight steps that has taken three: a copy of one, which appears at once."""
    run = Path(shutil.copytree(folder / "run", folder / f"lr-{rate}"))
    record = json.loads((run / "config.json").read_text())
    record["config"]["lr"], record["planned_steps"] = float(rate), 8
    (run / "config.json").write_text(json.dumps(record))
    return run.rename(folder / "sweep" / run.name)


def sample(run: Path, step: int) -> None:
    """Samples of another step appear."""
    shutil.copytree(run / "samples/step-00000003", run / f"samples/step-{step:08d}")
    (run / "samples/grid.png").touch()


def test_several_runs_grow_end_vanish_and_appear(model: Path, store: Path, tmp_path: Path) -> None:
    given = [
        "--phase", "te", "--batch", 3, "--data", store, "--model", model, "--steps", 3, "--warmup",
        0, "--lr", 1e-3, "--threads", 1, "--sample-every", 3, "--sample-steps", 1,
        "--validate-every", 3, "--validation-fraction", 0.4, "--out", tmp_path / "run",
    ]  # fmt: skip
    assert train(*given) == 0
    (tmp_path / "sweep").mkdir()
    one, two = begin(tmp_path, "1e-3"), begin(tmp_path, "1e-4")
    with serving(tmp_path / "sweep") as it, followed(it.url) as (page, loaded):
        live, said, plot = page.locator("[data-live]"), page.locator("#live"), page.locator(".plot")
        expect(live).to_have_text(
            re.compile("^Live · lr-1e-3: step 3 of 8.* · lr-1e-4: step 3 of 8")
        )
        expect(page.locator("#standings tbody tr")).to_have_count(2)
        expect(page.get_by_role("heading", level=1)).to_have_text("lr: 0.001, 0.0001")
        for run in (one, two):
            append(run, 4, 2)
            sample(run, 5)
        expect(live).to_contain_text("lr-1e-3: step 5 of 8", timeout=WAIT_MS)
        expect(live).to_contain_text("lr-1e-4: step 5 of 8")
        for name in ("lr-1e-3", "lr-1e-4"):
            cell = page.get_by_role("button", name=re.compile(f"^{name}, step 5: "))
            expect(cell.first).to_be_attached(timeout=WAIT_MS)
        drawn = set()
        for unit in ("steps", "images", "epochs", "time"):
            page.get_by_role("radio", name=unit).check()
            drawn.add(plot.first.screenshot())
            plot.first.focus()
            page.keyboard.press("End")
            words = str(said.text_content())
            assert words.startswith("step 5 · 15 images · epoch 3.333 · ")
            assert "lr-1e-3, each step: 0.25; smoothed " in words
            assert "lr-1e-4, held-out: " in words
        assert len(drawn) == 4
        plot.nth(3).locator(".u-over").hover()
        expect(plot.nth(3).locator(".tip")).to_contain_text(re.compile("lr-1e-4, .*: "))
        page.get_by_role("button", name="Enlarge").click()
        expect(page.locator(".stage [data-b]")).to_have_attribute("src", re.compile(r"/00\.png$"))
        page.keyboard.press("Escape")
        append(one, 6, 3)
        expect(live).to_contain_text("lr-1e-3: finished", timeout=WAIT_MS)
        expect(live).to_contain_text("lr-1e-4: step 5 of 8")
        two.rename(tmp_path / "elsewhere")
        expect(live).to_contain_text("lr-1e-4: deleted", timeout=WAIT_MS)
        page.wait_for_timeout(3000)  # the exchange is over
        assert len(loaded) == 1, "the page was loaded again"
        three = begin(tmp_path, "3e-4")
        expect(live).to_contain_text("lr-3e-4: step 3 of 8", timeout=WAIT_MS)
        append(three, 4, 1)
        expect(live).to_contain_text("lr-3e-4: step 4 of 8", timeout=WAIT_MS)
        expect(page.locator("#standings tbody tr")).to_have_count(3)
        assert len(loaded) == 2


def test_charts_are_drawn_in_sight_and_the_page_says_when_the_server_is_gone(
    model: Path, store: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    given = [
        "--phase", "te", "--batch", 3, "--data", store, "--model", model, "--steps", 9,
        "--stop-after", 3, "--warmup", 0, "--lr", 1e-3, "--threads", 1, "--sample-every", 0,
    ]  # fmt: skip
    assert train(*given, "--out", run) == 0
    record = json.loads((run / "config.json").read_text())
    record["config"]["stop_after"] = None
    (run / "config.json").write_text(json.dumps(record))
    server = serving(run)
    with followed(server.__enter__().url) as (page, _):
        page.set_viewport_size({"width": 1400, "height": 300})
        live, last = page.locator("[data-live]"), page.locator(".plot").last
        expect(live).to_contain_text("step 3 of 9")
        picture = "it => it.querySelector('canvas').toDataURL()"
        before = last.evaluate(picture)
        append(run, 4, 3)
        expect(live).to_contain_text("step 6 of 9", timeout=WAIT_MS)
        page.wait_for_timeout(3000)  # the exchange is over
        assert last.evaluate(picture) == before
        last.scroll_into_view_if_needed()
        page.wait_for_function(
            "([it, before]) => it.querySelector('canvas').toDataURL() !== before",
            arg=[last.element_handle(), before],
        )
        first = page.locator(".plot").first
        first.focus()
        page.keyboard.press("End")
        expect(first.locator(".tip")).to_contain_text("step 6")
        append(run, 7, 3)
        expect(live).to_contain_text("finished", timeout=WAIT_MS)
        page.wait_for_timeout(3000)
        expect(first.locator(".tip")).to_contain_text("step 6")  # where the keys chose
        server.__exit__(None, None, None)
        expect(live).to_contain_text("no connection", timeout=WAIT_MS)
        page.goto("about:blank")
