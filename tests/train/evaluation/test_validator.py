import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from tests.support import files, metrics, printed, train
from tests.support.sessions import Open
from xlsd_train.runs.bootstrap import Losses, summary
from xlsd_train.runs.layout import checkpoints
from xlsd_train.runs.validation_log import (
    BANDS,
    Candidate,
    best_of,
    describe_best,
    describe_checkpoints,
    read_losses,
    save_losses,
)

Out = pytest.CaptureFixture[str]
LIVE = {"live": nullcontext()}


@pytest.fixture
def arguments(model: Path, store: Path) -> list[object]:
    """A run of four steps with three of eight photos held out."""
    return [
        "--phase", "unet", "--batch", 3, "--data", store, "--model", model, "--steps", 4,
        "--save-every", 2, "--sample-every", 0, "--lr", 1e-3, "--warmup", 0, "--threads", 1,
        "--validation-fraction", 0.4, "--keep", 0, "--seed", 3,
    ]  # fmt: skip


def left(run: Path) -> tuple[Any, ...]:
    """What validation leaves."""
    return (run / "validation.jsonl").read_bytes(), files(run, "validation/*")


def test_validating_changes_no_weight_and_numbers_are_bit_equal_after_a_resume(
    arguments: list[object], tmp_path: Path, capsys: Out
) -> None:
    whole, parts, quiet = tmp_path / "whole", tmp_path / "parts", tmp_path / "quiet"
    assert train(*arguments, "--validate-every", 2, "--out", whole) == 0
    said = printed(capsys)
    for stop in (1, 4):
        given = ("--validate-every", 2, "--out", parts, "--stop-after", stop)
        assert train(*arguments, *given) == 0
    assert train(*arguments, "--out", quiet) == 0
    last = "checkpoints/step-00000004/*"
    assert files(whole, last) == files(quiet, last) == files(parts, last)
    assert metrics(whole) == metrics(quiet) == metrics(parts)
    assert not (quiet / "validation.jsonl").exists()
    lines, kept = left(whole)
    ours = [json.loads(line) for line in lines.splitlines()]
    theirs = [json.loads(line) for line in left(parts)[0].splitlines()]
    assert [line["step"] for line in ours] == [0, 2, 4]
    assert [line for line in theirs if line["step"] != 1] == ours
    assert kept.items() <= left(parts)[1].items()
    assert "best on held-out images: step " in said
    assert "validation 3 held-out images and 3 training images" in said


@pytest.mark.slow
def test_lines_after_the_checkpoint_are_removed_on_resume(
    arguments: list[object], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    given = (*arguments, "--validate-every", 2, "--out", run)
    assert train(*given) == 0
    expected = left(run)
    shutil.rmtree(run / "checkpoints/step-00000004")
    with (run / "validation.jsonl").open("ab") as file:
        file.write(b'{"step": 5, "torn')
    assert train(*given) == 0
    assert left(run) == expected
    shutil.rmtree(run / "checkpoints")  # killed before its first checkpoint: from the start
    assert train(*given) == 0
    assert left(run) == expected


def test_a_line_says_what_was_measured(arguments: list[object], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(*arguments, "--validate-every", 4, "--out", run) == 0
    lines = [json.loads(x) for x in (run / "validation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 4]
    for line in lines:
        assert line["weights"] == "live"
        losses = load_file(run / f"validation/step-{line['step']:08d}.safetensors")
        for name in ("held_out", "training"):
            told, found = line[name], losses[f"live/{name}"]
            assert found.shape == (3, BANDS)
            assert told["mean"] == pytest.approx(found.mean(), rel=1e-6)
            assert told["low"] <= told["mean"] <= told["high"]
            assert [b["mean"] for b in told["bands"]] == pytest.approx(found.mean(axis=0).tolist())
        assert line["gap"]["mean"] == pytest.approx(
            line["held_out"]["mean"] - line["training"]["mean"]
        )
    keys = json.loads((run / "config.json").read_text())["validation"]
    assert len(set(keys["held_out"]) | set(keys["training"])) == 6
    assert metrics(run)[-1]["images_seen"] == lines[-1]["images_seen"]


@pytest.mark.parametrize("weighting", ["none", "min-snr"])
def test_losses_are_the_steps_own_unweighted(open_run: Open, weighting: Any) -> None:
    session = open_run(
        validate_every=1, validation_fraction=0.4, batch=3, loss_weight=weighting,
        caption_dropout=0.5, noise_offset=0.1, seed=3,
    )  # fmt: skip
    assert session.validator
    step, found = session.take_step, session.validator(session.take_step, LIVE)
    assert found
    whole = list(session.validator.batches("held_out"))
    assert sum(len(batch.timesteps) for batch in whole) == 3 * BANDS
    timesteps = torch.cat([batch.timesteps for batch in whole]).view(-1, BANDS)
    assert torch.equal(timesteps // 100, torch.arange(10).expand(3, 10))
    assert len(set(timesteps[:, 0].tolist())) == 3
    expected = []
    for batch in whole:
        assert abs(float(batch.noise.mean())) < 0.05
        assert all(len(set(ids.tolist())) > 3 for ids in batch.input_ids), "no caption is dropped"
        with torch.no_grad():
            noisy = step.objective.corrupt(
                session.model.scaling(batch.latents), batch.noise, batch.timesteps
            )[0]
            states = step.model.encode(batch.input_ids)
            predicted = session.model.unet(noisy, batch.timesteps, states).sample
        expected.append((predicted - batch.noise).square().mean(dim=(1, 2, 3)))
    assert np.array_equal(found["live/held_out"].ravel(), torch.cat(expected).numpy())


def test_validation_does_not_depend_on_the_runs_seed(open_run: Open, tmp_path: Path) -> None:
    found = []
    for seed in (0, 1):
        session = open_run(
            validate_every=1, validation_fraction=0.4, batch=3, seed=seed, out=tmp_path / str(seed)
        )
        assert session.validator
        losses = session.validator(session.take_step, LIVE)
        assert losses
        found.append(losses["live/held_out"])
    assert np.array_equal(found[0], found[1])


def losses(mean: float) -> Losses:
    return np.random.default_rng(0).normal(mean, 0.1, (50, BANDS)).astype(np.float32)


def test_the_best_checkpoint_and_those_tied_with_it_are_named(tmp_path: Path) -> None:
    for step, mean in ((0, 2.0), (10, 1.0), (20, 1.0), (30, 3.0)):
        found = {"live/held_out": losses(mean), "live/training": losses(0)}
        save_losses(tmp_path, step, found | ({"ema 0.10/held_out": losses(1.5)} if step else {}))
    assert read_losses(tmp_path, 99) == {}
    found_best = best_of(tmp_path, (0, 10, 20, 30, 99))
    assert found_best
    assert found_best.best == (10, "live")
    alike: list[Candidate] = [(20, "live")]
    assert found_best.tied == alike
    assert describe_best(found_best).endswith("; statistically tied: step 20")
    worse = best_of(tmp_path, (0, 30))
    assert worse
    assert worse.best == (30, "ema 0.10")
    assert describe_best(worse).startswith("best on held-out images: step 30 ema 0.10, loss 1.4973")
    untrained = best_of(tmp_path, (0,))
    assert untrained
    assert "that is the model it started from" in describe_best(untrained)
    assert best_of(tmp_path, (99,)) is None


def test_the_verdict_says_what_it_does_not_cover(tmp_path: Path) -> None:
    """A newest checkpoint that was not validated, and a better step that was not saved."""
    log = tmp_path / "validation.jsonl"
    for step, mean in ((0, 2.0), (10, 1.0), (20, 1.5)):
        found = {"live/held_out": losses(mean), "live/training": losses(mean)}
        save_losses(tmp_path, step, found)
        line = {"step": step, "weights": "live", **summary(*found.values())}
        with log.open("a") as file:
            file.write(json.dumps(line) + "\n")
    assert describe_checkpoints(tmp_path / "none", [5]) is None
    untrained = describe_checkpoints(tmp_path, [])
    assert untrained
    assert untrained.startswith("held-out loss of the model it started from: 1.99")
    assert "so there is no best one" in untrained
    assert "step 10, loss 0.99731, was lower, but has no checkpoint" in untrained
    assert describe_checkpoints(tmp_path, [15]) == untrained
    whole = describe_checkpoints(tmp_path, [10, 20])
    assert whole
    assert whole.startswith("best on held-out images: step 10, loss 0.997")
    assert "measured" not in whole
    assert "lower" not in whole
    later = describe_checkpoints(tmp_path, [10, 25])
    assert later
    assert later.endswith("step 25, the newest checkpoint, was not validated")
    lost = describe_checkpoints(tmp_path, [20])
    assert lost
    assert lost.startswith("best on held-out images: step 20")
    assert lost.endswith("; step 10, loss 0.99731, was lower, but has no checkpoint")


def test_the_best_checkpoint_is_kept(arguments: list[object], tmp_path: Path, capsys: Out) -> None:
    """Training that makes it worse from step 2 on, and --keep 1: step 2 stays."""
    given = list(arguments)
    for option, value in (("--keep", 1), ("--lr", 3e-2), ("--steps", 6)):
        given[given.index(option) + 1] = value
    run = tmp_path / "run"
    assert train(*given, "--validate-every", 2, "--out", run) == 0
    best = best_of(run, range(2, 7))
    assert best
    kept = [path.name for path in checkpoints(run)]
    assert best.best[0] < 6
    assert kept == [f"step-{best.best[0]:08d}", "step-00000006"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--validate-every", 1, "--validation-fraction", 0), "has nothing to measure"),
        (("--validate-every", 1, "--validation-fraction", 1), "--validation-fraction 1 is not"),
        (("--validate-every", 1, "--validation-fraction", 0.001), "holds out 0 of the 8 images"),
        (("--validate-every", -1), "--validate-every -1 is less than 0"),
        (("--validate-every", 1, "--validation-images", 0), "--validation-images 0"),
        (("--validation-fraction", 0.8), "holds out every selected image"),
    ],
)
def test_too_few_images_are_refused(
    arguments: list[object], tmp_path: Path, capsys: Out, options: tuple[object, ...], told: str
) -> None:
    at = arguments.index("--validation-fraction")
    given = arguments[:at] + arguments[at + 2 :]
    assert train(*given, *options, "--out", tmp_path / "run") == 1
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_fewer_images_can_be_measured(open_run: Open) -> None:
    session = open_run(
        validate_every=1, validation_fraction=0.4, validation_images=2, batch=3, seed=3
    )
    assert session.validator
    assert {len(keys) for keys in session.validator.keys().values()} == {2}
