import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from xlsd_train.checkpoints.complete import complete
from xlsd_train.config.train import TrainConfig


def begun(run: Path, config: TrainConfig, step: int, planned: int, **told: Any) -> TrainConfig:
    """Write the files of a run that the check reads; return the run's options."""
    asked = replace(config, out=run)
    (run / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    (run / "checkpoints" / f"step-{step:08d}" / "state.json").write_text("{}")
    record = {"config": asdict(asked.resolved()), "settings": {}, "planned_steps": planned, **told}
    record["stores"] = []
    (run / "config.json").write_text(json.dumps(record, default=str))
    drawn = run / "samples" / f"step-{step:08d}" / "00.png"
    drawn.parent.mkdir(parents=True)
    drawn.touch()
    return asked


def test_a_run_that_is_where_it_was_to_end_is_complete(tmp_path: Path) -> None:
    asked = begun(tmp_path, TrainConfig("unet", steps=10), 10, 10)
    told = complete(asked) or ""
    assert told.startswith(f"{tmp_path} is already complete: step 10 of 10, checkpoint {tmp_path}")
    assert told.endswith("to continue, raise --steps or --epochs")
    assert complete(replace(asked, sample_every=7, keep=1)), "neither changes a weight"
    shutil.rmtree(tmp_path / "samples")  # which a signal at the end left out
    assert complete(asked) is None
    assert complete(replace(asked, sample_every=0))
    assert (
        complete(replace(asked, sample_every=0, validate_every=5, validation_fraction=0.1)) is None
    )


@pytest.mark.parametrize(
    "settings", [{"steps": 20}, {"lr": 1e-3}, {"dry_run": True}, {"out": None}, {"epochs": 2.0}]
)
def test_with_other_settings_it_is_for_training_to_say(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    asked = begun(tmp_path, TrainConfig("unet", steps=10), 10, 10)
    if "epochs" in settings:
        settings = {**settings, "steps": None}
    assert complete(replace(asked, **settings)) is None


def test_one_that_was_stopped_early_says_how_it_goes_on(tmp_path: Path) -> None:
    asked = begun(tmp_path, TrainConfig("te", epochs=3.0, stop_after=5), 5, 30)
    assert (complete(asked) or "").endswith("to continue, leave out --stop-after or raise it")
    assert complete(replace(asked, stop_after=6)) is None
    assert complete(replace(asked, stop_after=None)) is None


def test_a_rate_that_has_come_down_does_not_go_on(tmp_path: Path) -> None:
    asked = begun(tmp_path, TrainConfig("unet", steps=10, scheduler="linear"), 10, 10)
    assert (complete(asked) or "").endswith(f"start a new run with --model {tmp_path}")


def test_what_was_adapted_is_asked_for_as_before(tmp_path: Path) -> None:
    adapted = {"batch": {"from": 32, "to": 8, "why": ""}}
    asked = begun(tmp_path, TrainConfig("unet", steps=10, batch=8), 10, 10, adapted=adapted)
    assert complete(replace(asked, batch=32))
    assert complete(asked) is None  # for training to compare


def test_what_is_no_run_or_has_no_checkpoint_is_not_complete(tmp_path: Path) -> None:
    asked = replace(TrainConfig("unet", steps=10), out=tmp_path / "none")
    assert complete(asked) is None
    asked = begun(tmp_path / "run", TrainConfig("unet", steps=10), 10, 10)
    (tmp_path / "run/config.json").write_text("{")
    assert complete(asked) is None
