"""The page in a real browser, of a run that trains."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Page, expect

from tests.support import files, spawn, train, wait_for
from tests.support.browser import PICTURES, chromium, faults
from tests.support.live import serving
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
        expect(live).to_contain_text(re.compile(r"step \d+ of 45, about .* left"))
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


def test_the_page_says_when_the_server_is_gone(model: Path, store: Path, tmp_path: Path) -> None:
    given = [
        "--phase", "te", "--batch", 3, "--data", store, "--model", model, "--steps", 3, "--warmup",
        0, "--lr", 1e-3, "--threads", 1, "--sample-every", 0, "--out", tmp_path / "run",
    ]  # fmt: skip
    assert train(*given) == 0
    server = serving(tmp_path / "run")
    with followed(server.__enter__().url) as (page, _):
        live = page.locator("[data-live]")
        expect(live).to_have_text("Live · finished")
        server.__exit__(None, None, None)
        expect(live).to_contain_text("no connection", timeout=WAIT_MS)
        page.goto("about:blank")
