"""The page of `sample` in a real browser."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import expect

from tests.support.browser import (
    LAYOUTS,
    Scheme,
    check_layout,
    chromium,
    drag,
    faults,
    opened,
)
from xlsd_train.evaluation.images import Picture
from xlsd_train.report.comparison import comparison

HARM = '</script><script>window.harmed = true</script><img src=x onerror="window.harmed=true">'
LONG = "a photograph of a red fox in the snow, looking at the camera, soft evening light, " * 3
MODELS = ["base", "runs/fox at step 4000 <b>", "third"]
SHARE = "it => parseFloat(it.style.getPropertyValue('--share'))"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


def written(folder: Path, models: list[str]) -> Path:
    pictures = [
        Picture(prompt, negative, seed, 20, 7.5, 96, 64)
        for prompt, negative, seed in ((HARM, "", 1), (LONG, "blurry", 2), ("", "", 3))
    ]
    files = [[folder / f"{i}-{j}.png" for j in range(len(pictures))] for i in range(len(models))]
    for i, row in enumerate(files):
        for j, path in enumerate(row):
            Image.new("RGB", (96, 64), (60 + 60 * i, 90 + 50 * j, 150)).save(path)
    page = folder / f"{len(models)}.html"
    page.write_text(comparison(models, pictures, files), encoding="utf-8")
    return page


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("comparison"), MODELS)


@pytest.mark.parametrize(("width", "scheme"), LAYOUTS)
def test_every_layout_is_accessible(browser: Any, made: Path, width: int, scheme: Scheme) -> None:
    with opened(browser, made, width, scheme) as page:
        check_layout(page, f"comparison-{width}-{scheme}", scheme)


def test_texts_are_whole_and_stay_text(browser: Any, made: Path) -> None:
    with opened(browser, made, 360) as page:
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        assert page.evaluate("window.harmed") is None
        captions = page.locator("figcaption").all_inner_texts()
        assert HARM in captions[0]
        assert LONG.strip() in captions[1]
        assert "negative: blurry" in captions[1]
        assert "20 steps" not in captions[1]  # common to all: said once
        assert "96x64, 20 steps, guidance 7.5" in page.locator("#compare").inner_text()
        header = page.locator("thead th").all_inner_texts()
        assert header == ["model", HARM, LONG.strip(), "(no prompt)"]
        assert page.locator("tbody th").all_inner_texts() == MODELS


def test_pictures_have_the_models_and_prompts_as_names(browser: Any, made: Path) -> None:
    with opened(browser, made) as page:
        for name in (f"A, base: {HARM}", f"B, {MODELS[1]}: {HARM}", "A, base: (no prompt)"):
            assert page.get_by_role("img", name=name).count() == 1
        page.get_by_label("B: model").select_option("third")
        assert page.get_by_role("img", name="B, third: (no prompt)").count() == 1
        assert "B third" in str(page.locator("#live").text_content())
        page.keyboard.press("Escape")
        page.locator("h1").click()
        page.keyboard.press("x")
        assert page.get_by_role("img", name="A, third: (no prompt)").count() == 1


def test_dragging_on_one_picture_moves_all_dividers(browser: Any, made: Path) -> None:
    with opened(browser, made) as page:
        stages = page.locator(".stage")
        drag(page, stages.nth(1))
        shares = stages.evaluate_all(f"all => all.map({SHARE})")
        assert shares == [shares[0]] * 3
        assert shares[0] == pytest.approx(80, abs=3)
        slider = page.get_by_role("slider", name="Share of the picture that shows A: (no prompt)")
        slider.press("ArrowLeft")
        assert stages.evaluate_all(f"all => all.map({SHARE})") == [shares[0] - 1] * 3


def test_a_picture_is_enlarged_by_click_key_and_cell(browser: Any, made: Path) -> None:
    with opened(browser, made) as page:
        dialog = page.get_by_role("dialog")
        button = page.get_by_role("button", name="Enlarge: (no prompt)")
        button.press("Enter")
        assert dialog.locator(".stage").count() == 1
        page.keyboard.press("Escape")
        expect(button).to_be_focused()
        expect(page.locator(".stages .stage")).to_have_count(3)
        page.get_by_role("button", name=f"third: {HARM}").click()
        assert dialog.get_by_role("img", name=f"B, third: {HARM}").count() == 1
        page.keyboard.press("Escape")
        page.keyboard.press("d")
        blend = "it => getComputedStyle(it).mixBlendMode"
        assert page.locator(".stage [data-b]").first.evaluate(blend) == "difference"


def test_one_model_has_pictures_and_nothing_to_compare(browser: Any, tmp_path: Path) -> None:
    with opened(browser, written(tmp_path, ["alone"])) as page:
        assert page.get_by_role("img", name="A, alone: (no prompt)").count() == 1
        assert page.locator("select, table, [name=mode]").count() == 0
        assert faults(page) == []
