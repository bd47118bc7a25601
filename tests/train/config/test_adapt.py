import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support import cache, metrics, printed, train, write_images
from xlsd_cache.errors import UserError
from xlsd_train.config.adapt import adapt, chosen
from xlsd_train.config.train import TrainConfig
from xlsd_train.data.mixture import Mixture, open_mixture
from xlsd_train.data.selection import held_out_mask

Out = pytest.CaptureFixture[str]
ALL: frozenset[str] = frozenset()  # nobody gave anything


@pytest.fixture(scope="module")
def many(vae: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of sixty pictures."""
    folder = tmp_path_factory.mktemp("many")
    write_images(folder / "images", [f"{i}.png" for i in range(60)], width=64, height=64)
    options = ("--vae", vae, "--resolution", 64, "--batch", 20)
    assert cache("build", folder / "images", "--out", folder / "latents", *options) == 0
    return folder / "latents"


@pytest.fixture
def sixty(many: Path) -> Iterator[Mixture]:
    with open_mixture([str(many)]) as opened:
        yield opened


@pytest.fixture
def eight(store: Path) -> Iterator[Mixture]:
    with open_mixture([str(store)]) as opened:
        yield opened


def config(**settings: Any) -> TrainConfig:
    return TrainConfig("unet", **settings).resolved()


def held(store: Mixture, share: float) -> int:
    return int(held_out_mask(store, share).sum())


def test_more_is_held_out_of_few_images(sixty: Mixture) -> None:
    """The result is deterministic: the same for part of the store and for another seed."""
    asked = config(validate_every=5, batch=4)
    found, changes = adapt(asked, sixty, ALL, None)
    share = found.validation_fraction or 0.0
    assert share in {0.05, 0.1, 0.2}
    assert held(sixty, share) >= 4
    assert held(sixty, 0.01) < 4
    assert changes["validation_fraction"]["why"].startswith(
        f"--validation-fraction {share:g} in place of 0.01, for so few images: {held(sixty, share)}"
    )
    assert adapt(config(validate_every=50, batch=2, seed=7), sixty, ALL, None)[0] == config(
        validate_every=50, batch=2, seed=7, validation_fraction=share
    )


def test_what_was_given_stays(sixty: Mixture, eight: Mixture) -> None:
    given = config(validate_every=5, validation_fraction=0.001, batch=64, require_tags="x")
    every = frozenset({"validation_fraction", "batch", "require_tags", "validate_every"})
    for store in (sixty, eight):
        assert adapt(given, store, every, None) == (given, {})  # asked for: for the run to refuse
    given = config(validate_every=5, validation_fraction=0.001, batch=64)
    assert adapt(given, eight, every, None) == (given, {})
    fits = config(batch=8)
    assert adapt(fits, eight, ALL, None) == (fits, {})


def test_too_few_are_not_measured_unless_that_was_asked_for(eight: Mixture) -> None:
    asked = config(validate_every=5, batch=2)
    found, changes = adapt(asked, eight, ALL, None)
    assert (found.validate_every, found.validation_fraction) == (0, 0.0)
    assert "8 images are too few to hold any out" in changes["validate_every"]["why"]
    found, _ = adapt(asked, eight, frozenset({"validate_every"}), None)
    assert 2 <= held(eight, found.validation_fraction or 0.0) <= 6
    tags = eight.samples["txt"][0].as_py().split(", ")
    one = config(validate_every=5, require_tags=",".join(tags))
    with pytest.raises(UserError, match="--validate-every 5 is not possible: the 1 images"):
        adapt(one, eight, frozenset({"validate_every", "require_tags"}), None)


def test_a_batch_is_no_larger_than_what_trains(eight: Mixture) -> None:
    found, changes = adapt(config(), eight, ALL, None)
    assert (found.batch, changes["batch"]["from"]) == (8, 32)
    found, _ = adapt(config(validate_every=5), eight, frozenset({"validate_every"}), None)
    assert found.batch == 8 - held(eight, found.validation_fraction or 0.0)
    assert adapt(config(batch="auto"), eight, ALL, None)[1] == {}


def test_a_recipes_tags_that_no_image_has_choose_nothing(eight: Mixture) -> None:
    found, changes = adapt(config(require_tags="no,such", batch=2), eight, ALL, None)
    assert found.require_tags is None
    assert "no image of" in changes["require_tags"]["why"]


def test_a_run_goes_on_with_what_it_began_with(sixty: Mixture, eight: Mixture) -> None:
    asked = config(validate_every=5)
    found, changes = adapt(asked, sixty, ALL, None)
    assert adapt(asked, eight, ALL, changes) == (found, changes), "whatever the store holds now"
    assert adapt(asked, eight, ALL, {}) == (asked, {}), "older versions changed nothing"


def test_what_somebody_chose_is_known() -> None:
    recipe = TrainConfig("unet", recipe="phase1-unet", batch=32, validate_every=5000, warmup="200")
    assert chosen(recipe, ["xlsd-train", "--recipe", "phase1-unet"]) == {"recipe"}
    assert {"batch", "recipe"} == chosen(recipe, ["xlsd-train", "--batch=32", "--recipe", "x"])
    assert chosen(TrainConfig("unet", batch=31), []) == {"batch"}
    assert chosen(TrainConfig("unet"), []) == set()


def test_a_run_of_few_images_trains_says_so_and_goes_on(
    many: Path, model: Path, tmp_path: Path, capsys: Out
) -> None:
    run = tmp_path / "run"
    words = ["--recipe", "phase1-unet", "--data", many, "--model", model, "--out", run]
    words += ["--steps", 4, "--sample-every", 0, "--device", "cpu", "--threads", 1]
    assert train(*words, "--stop-after", 1) == 0
    told = printed(capsys)
    assert " in place of 0.01, for so few images: " in told
    assert (
        "warm-up over 0.4 steps to 1 (a tenth of the run, which is shorter than the recipe's 200)"
        in told
    )
    record = json.loads((run / "config.json").read_bytes())
    share = record["adapted"]["validation_fraction"]["to"]
    assert record["config"]["validation_fraction"] == record["settings"]["validation_fraction"]
    assert record["config"]["validation_fraction"] == share
    held_out_keys = record["validation"]["held_out"]
    assert len(held_out_keys) >= 4
    assert train(*words) == 0
    assert f"--validation-fraction {share:g} in place of 0.01" in printed(capsys)
    assert len(metrics(run)) == 4
    assert train(*words, "--seed", 1) == 1
    assert "started with --seed 0" in capsys.readouterr().err
    assert train(*words) == 0
    (line,) = printed(capsys).splitlines()
    assert line.startswith(f"{run} is already complete: step 4 of 4, checkpoint {run}")
    assert np.isfinite(record["warmup_steps"])
