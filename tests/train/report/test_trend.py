import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import xlsd_train.report.summary
import xlsd_train.report.trend
from xlsd_train.report.trend import Trend, shown_validations, trend
from xlsd_train.runs.bootstrap import summary
from xlsd_train.runs.history import histories
from xlsd_train.runs.validation_log import save_losses


def of(folder: Path, levels: dict[int, float], images: int = 60) -> Trend | None:
    """The trend of a run whose held-out losses have these means; images differ much more."""
    store: dict[str, Any] = {"path": "x", "fingerprint": "f", "generation": 1, "images": 1}
    record = {"settings": {}, "config": {}, "stores": [{**store, "selected": 1}]}
    (folder / "config.json").write_text(json.dumps(record))
    rng = np.random.default_rng(0)
    each = rng.normal(0, 0.1, (images, 10))
    lines = []
    for step, level in levels.items():
        losses = (level + each + rng.normal(0, 0.002, each.shape)).astype(np.float32)
        save_losses(folder, step, {"live/held_out": losses, "live/training": losses})
        lines.append({"step": step, "weights": "live", **summary(losses, losses)})
    (folder / "validation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return trend(histories([folder])[0])


@pytest.mark.parametrize(
    ("levels", "state", "words"),
    [
        ((1.0, 0.9, 0.8, 0.7, 0.6), "falling", "since step 300"),
        ((1.0, 0.8, 0.7, 0.7, 0.7), "levelled off", "no measurable change since step 200"),
        ((1.0, 0.8, 0.7, 0.8, 0.9), "rising", "above step 200"),
        ((1.0, 0.7, 0.69, 0.68, 0.70), "rising", "above step 300"),
        ((1.0, 0.9), "unknown", "Too few validations"),
    ],
)
def test_the_verdict_is_about_the_whole_curve(
    tmp_path: Path, levels: tuple[float, ...], state: str, words: str
) -> None:
    found = of(tmp_path, {100 * i: level for i, level in enumerate(levels)})
    assert found is not None
    assert (found.state, words in found.verdict) == (state, True), found.verdict


def test_small_changes_show_because_images_are_paired(tmp_path: Path) -> None:
    """The intervals of the losses overlap: they are 0.05 wide."""
    found = of(tmp_path, {0: 1.0, 100: 0.996, 200: 0.992})
    assert found is not None
    assert found.change[-1].high < 0
    assert found.change[-1].mean == pytest.approx(-0.008, abs=0.001)
    assert all(band[-1].low < -0.008 < band[-1].high for band in found.bands)


def test_of_many_validations_the_best_finite_one_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(xlsd_train.report.trend, "MEASURED", 4)
    of(tmp_path, {0: math.nan, **{100 * i: 1.0 for i in range(1, 12)}, 500: 0.5}, images=8)
    shown = [line["step"] for line in shown_validations(histories([tmp_path])[0], "live")]
    assert (shown[0], shown[-1], 500 in shown, len(shown)) == (0, 1100, True, 4)


@pytest.mark.parametrize("levels", [(1.0, 0.9, 0.8, math.nan), (1.0, math.nan), (math.nan,)])
def test_a_newest_validation_that_is_not_finite_is_a_divergence(
    tmp_path: Path, levels: tuple[float, ...]
) -> None:
    of(tmp_path, {100 * i: level for i, level in enumerate(levels)})
    (run,) = histories([tmp_path])
    last = 100 * (len(levels) - 1)
    said = f"It diverged: at step {last} the held-out loss is not finite."
    assert xlsd_train.report.summary.summary(run, trend(run), going=True).verdict[-1] == said


def test_of_one_validation_there_is_no_trend(tmp_path: Path) -> None:
    assert of(tmp_path, {0: 1.0}) is None


def test_damaged_losses_are_left_out(tmp_path: Path) -> None:
    found = of(tmp_path, {0: 1.0, 100: float("nan"), 200: 0.8, 300: 0.7})
    assert found is not None
    assert (found.steps, found.state) == ([0, 200, 300], "falling")
