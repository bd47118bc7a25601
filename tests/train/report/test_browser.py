"""The report in a real browser: what it shows, and that mouse, keys and theme work."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from playwright.sync_api import expect

from tests.support import train
from tests.support.browser import (
    LUMINANCE,
    Scheme,
    check_layout,
    chromium,
    drag,
    opened,
)

HARM = '</script><script>window.harmed = true</script><img src=x onerror="window.harmed=true">'
LAYOUTS: list[tuple[str, int, Scheme]] = [
    ("one", 1400, "light"), ("one", 1400, "dark"), ("one", 400, "light"), ("one", 400, "dark"),
    ("both", 1400, "light"), ("both", 400, "dark"),
]  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def pages(model: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A report of one run, and one of two with different rates."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("reports")
    (folder / "prompts.txt").write_text(f"{HARM}\na cat, " + "solo" * 30 + "\n")
    arguments = [
        "--phase", "te", "--batch", 3, "--data", store, "--model", model, "--steps", 12,
        "--warmup", 0, "--threads", 1, "--save-every", 6, "--validate-every", 4, "--keep", 0,
        "--validation-fraction", 0.4, "--sample-every", 4, "--sample-steps", 1,
        "--sample-prompts", folder / "prompts.txt",
    ]  # fmt: skip
    for rate in ("0.001", "0.0001"):
        assert train(*arguments, "--lr", rate, "--out", folder / f"lr-{rate}") == 0
    both = folder / "both.html"
    assert train("report", folder / "lr-0.001", folder / "lr-0.0001", "-o", both) == 0
    return {"one": folder / "lr-0.001/report.html", "both": both}


@pytest.mark.parametrize(("name", "width", "scheme"), LAYOUTS)
def test_every_layout_is_accessible(
    browser: Any, pages: dict[str, Path], name: str, width: int, scheme: Scheme
) -> None:
    with opened(browser, pages[name], width, scheme) as page:
        check_layout(page, f"report-{name}-{width}-{scheme}", scheme)


@pytest.mark.parametrize("name", ["one", "both"])
def test_nothing_overflows_a_small_phone(browser: Any, pages: dict[str, Path], name: str) -> None:
    with opened(browser, pages[name], 360) as page:
        for details in page.locator("details").all():
            details.locator("summary").click()
        assert page.evaluate("document.documentElement.scrollWidth") == 360


def test_a_hostile_caption_stays_text(browser: Any, pages: dict[str, Path]) -> None:
    with opened(browser, pages["one"]) as page:
        assert page.locator("[data-prompt]").text_content() == HARM
        assert page.evaluate("window.harmed") is None


def test_roles_names_and_headings(browser: Any, pages: dict[str, Path]) -> None:
    with opened(browser, pages["one"]) as page:
        assert page.get_by_role("main").count() == page.get_by_role("heading", level=1).count() == 1
        charts = page.get_by_role("img", name="Chart: ")
        assert charts.count() == 7
        assert "each step" in str(charts.first.get_attribute("aria-label"))
        assert page.get_by_role("slider", name="Step of B").count() == 1
        assert page.get_by_role("navigation").get_by_role("link").count() == 4
        assert page.locator("#live").get_attribute("aria-live") == "polite"
        assert page.get_by_role("button", name=f"step 8: {HARM}").count() == 1


def test_slider_arrows_and_cells_choose_the_step(browser: Any, pages: dict[str, Path]) -> None:
    with opened(browser, pages["one"]) as page:
        tag, slider = page.locator("[data-tag-b]"), page.get_by_role("slider", name="Step of B")
        facts, shown = page.locator("[data-facts]"), page.locator(".stage [data-b]")
        assert tag.text_content() == "B step 12"
        newest = shown.get_attribute("src")
        page.keyboard.press("ArrowLeft")  # of the whole page
        assert tag.text_content() == "B step 8"
        assert shown.get_attribute("src") != newest
        slider.fill("1")
        assert tag.text_content() == "B step 4"
        assert "step 4" in facts.inner_text()
        assert " images · epoch " in facts.inner_text()
        assert "Held-out loss" in facts.inner_text()
        assert "step 4" in str(page.locator("#live").text_content())
        cell = page.get_by_role("button", name=f"step 0: {HARM}")
        cell.click()
        assert tag.text_content() == "B step 0"
        page.keyboard.press("ArrowDown")
        assert str(page.locator("[data-prompt]").text_content()).startswith("a cat")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("a")
        assert page.locator("[data-tag-a]").text_content() == "A step 4"
        original = page.locator("[data-original]").evaluate("it => it.href")
        assert original == (pages["one"].parent / "samples/step-00000004/01.png").as_uri()


def test_dragging_compares_and_a_click_enlarges(browser: Any, pages: dict[str, Path]) -> None:
    with opened(browser, pages["one"], originals=pages["one"].parent / "samples") as page:
        stage, dialog = page.locator(".stage"), page.get_by_role("dialog")
        stage.scroll_into_view_if_needed()
        box = stage.bounding_box()
        assert box is not None
        drag(page, stage)
        share = "it => parseFloat(it.style.getPropertyValue('--share'))"
        dragged = stage.evaluate(share)
        assert dragged == pytest.approx(80, abs=3)
        assert dialog.count() == 0
        page.get_by_role("slider", name="Share of the picture").press("ArrowLeft")
        assert stage.evaluate(share) == dragged - 1
        page.mouse.click(box["x"] + box["width"] * 0.3, box["y"] + box["height"] / 2)
        assert dialog.locator(".stage").count() == 1
        assert stage.evaluate(share) == dragged - 1
        page.keyboard.press("Escape")
        expect(page.locator(".view .stage")).to_have_count(1)  # the event comes later
        page.get_by_role("radio", name="difference").check()
        blend = "it => getComputedStyle(it).mixBlendMode"
        assert page.locator(".stage [data-b]").evaluate(blend) == "difference"


def test_an_enlarged_sample_is_the_original_where_it_lies_next_to_the_page(
    browser: Any, pages: dict[str, Path]
) -> None:
    folder = pages["one"].parent / "samples"
    assert "connect-src" not in pages["one"].read_text()
    with opened(browser, pages["one"], originals=folder) as page:
        shown = page.locator(".stage [data-b]")
        page.get_by_role("button", name="Enlarge").click()
        for step in (12, 8):
            original = f"{folder.as_uri()}/step-{step:08d}/00.png"
            expect(shown).to_have_attribute("src", original)
            assert shown.evaluate("it => it.complete && it.naturalWidth > 0")
            page.keyboard.press("ArrowLeft")


def test_a_page_that_was_moved_alone_enlarges_its_thumbnails(
    browser: Any, pages: dict[str, Path], tmp_path: Path
) -> None:
    moved = tmp_path / "moved.html"
    moved.write_bytes(pages["one"].read_bytes())
    context = browser.new_context()
    page = context.new_page()
    page.goto(moved.as_uri())
    shown = page.locator(".stage [data-b]")
    small = str(shown.get_attribute("src"))
    with page.expect_event("requestfailed"):
        page.get_by_role("button", name="Enlarge").click()
    assert shown.get_attribute("src") == small
    assert page.get_by_role("dialog").locator(".stage").count() == 1
    context.close()


def test_hover_zoom_and_keys_are_common_to_all_charts(browser: Any, pages: dict[str, Path]) -> None:
    with opened(browser, pages["one"]) as page:
        first = page.locator(".plot").first
        over, axis = first.locator(".u-over"), page.locator(".plot")
        over.hover(position={"x": 300, "y": 60})
        tip = first.locator(".tip")
        words = tip.inner_text()
        for part in ("step ", " images", "epoch ", "each step: ", "smoothed ", "held-out: "):
            assert part in words
        lines = page.locator(".u-cursor-x").evaluate_all(
            "all => all.filter(it => it.getBoundingClientRect().x > 0).length"
        )
        assert lines == axis.count()  # the cursor is in every chart
        before = [chart.screenshot() for chart in axis.all()]
        over.scroll_into_view_if_needed()
        box = over.bounding_box()
        assert box is not None
        page.mouse.move(box["x"] + 200, box["y"] + 50)
        page.mouse.down()
        page.mouse.move(box["x"] + 500, box["y"] + 50, steps=4)
        page.mouse.up()
        page.mouse.move(0, 0)
        zoomed = [chart.screenshot() for chart in axis.all()]
        assert all(one != other for one, other in zip(before, zoomed, strict=True))
        page.get_by_role("button", name="Whole run").click()
        page.mouse.move(0, 0)
        first.focus()
        page.keyboard.press("End")
        assert "step 12" in str(page.locator("#live").text_content())
        page.keyboard.press("Home")
        assert "step 1 " in str(page.locator("#live").text_content())


def test_axis_smoothing_and_legend(browser: Any, pages: dict[str, Path]) -> None:
    with opened(browser, pages["both"]) as page:
        chart = page.locator(".plot").first
        changes: list[Callable[[], None]] = [
            lambda: page.get_by_role("radio", name="epochs").check(),
            lambda: page.get_by_label("Smoothing").fill("2"),
            lambda: page.get_by_role("checkbox", name="log").check(),
            lambda: page.get_by_role("button", name="lr-0.001", exact=True).click(),
        ]
        for change in changes:
            before = chart.screenshot()
            change()
            assert chart.screenshot() != before
        assert page.get_by_label("Smoothing").locator("xpath=..").inner_text().endswith("7 steps")
        page.get_by_label("B: step and run").select_option("lr-0.001, step 8")
        assert page.locator("[data-tag-b]").text_content() == "B lr-0.001, step 8"


def test_the_theme_follows_the_reader_and_paper_is_light(
    browser: Any, pages: dict[str, Path]
) -> None:
    with opened(browser, pages["one"]) as page:
        body, chart = page.locator("body"), page.locator(".plot").first
        light = chart.screenshot()
        page.emulate_media(color_scheme="dark")
        assert body.evaluate(LUMINANCE) < 60
        assert chart.screenshot() != light
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        assert body.evaluate(LUMINANCE) > 200
        assert page.pdf()[:4] == b"%PDF"


def test_without_javascript_the_words_and_small_charts_remain(
    browser: Any, pages: dict[str, Path]
) -> None:
    with opened(browser, pages["one"], java_script_enabled=False) as page:
        assert page.locator("#verdict").inner_text()
        assert page.locator(".bands svg polyline").count() == 10
        assert page.locator(".pairs img").count() == 4
        assert "need JavaScript" in page.locator("#samples noscript").inner_text()
        assert not page.locator("button:visible, input:visible, select:visible").count()
        words = "getComputedStyle(document.querySelector('.plot'), '::before').content"
        assert page.evaluate(words).startswith('"Chart: Loss. each step')


def test_forced_colours_keep_lines_apart(browser: Any, pages: dict[str, Path]) -> None:
    with opened(browser, pages["both"], forced_colors="active") as page:
        colours = page.locator(".legend [data-run] i").evaluate_all(
            "all => all.map(it => getComputedStyle(it).borderTopColor)"
        )
        assert len(set(colours)) == 2


def test_a_double_click_resets_the_zoom_and_chooses_no_step(
    browser: Any, pages: dict[str, Path]
) -> None:
    with opened(browser, pages["one"]) as page:
        over, b = page.locator(".u-over").first, page.locator("[data-tag-b]")
        over.dblclick(position={"x": 20, "y": 50})
        page.wait_for_timeout(400)
        expect(b).to_have_text("B step 12")
        over.click(position={"x": 20, "y": 50})
        expect(b).to_have_text("B step 0")


def test_a_missing_picture_is_told_and_the_other_keeps_its_shape(
    browser: Any, pages: dict[str, Path], tmp_path: Path
) -> None:
    run = shutil.copytree(pages["one"].parent, tmp_path / "run")
    (run / "samples/step-00000000/00.png").unlink()
    assert train("report", run) == 0
    with opened(browser, run / "report.html") as page:
        assert page.locator("[data-tag-a]").text_content() == "A step 0, no picture"
        shape = "[...document.querySelectorAll('.stage, .stage [data-b]')].map(it => {0})"
        stage, _ = page.evaluate(shape.replace("{0}", "it.clientWidth / it.clientHeight"))
        _, picture = page.evaluate(shape.replace("{0}", "it.naturalWidth / it.naturalHeight"))
        assert abs(stage - picture) < 0.02


def test_runs_of_other_prompts_show_both(
    browser: Any, pages: dict[str, Path], tmp_path: Path
) -> None:
    run = shutil.copytree(pages["one"].parent, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "prompts": ["a dog", "a bird"]}))
    assert train("report", pages["one"].parent, run, "-o", tmp_path / "two.html") == 0
    with opened(browser, tmp_path / "two.html") as page:
        assert page.locator("[data-prompt]").text_content() == f"A: {HARM}\nB: a dog"


def test_the_command_is_copied(browser: Any, pages: dict[str, Path]) -> None:
    with opened(browser, pages["one"]) as page:
        button = page.locator("[data-copy]")
        button.click()
        expect(button).to_have_text(re.compile("Copied|Selected"))
