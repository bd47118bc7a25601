"""A resume compares only settings that could change a weight; without --force it is bit-exact."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support import files, metrics, printed, train
from xlsd_cache.errors import UserError
from xlsd_train.checkpoints.comparison import compare_settings
from xlsd_train.checkpoints.resume import differing
from xlsd_train.checkpoints.run_folder import RunFolder
from xlsd_train.config.train import TrainConfig
from xlsd_train.optim.lr_scheduler import first_other_rate
from xlsd_train.runs.record import EMPTY

Out = pytest.CaptureFixture[str]
STEPS = ("--steps", 6)
WARMUP = ("--warmup", 0)


@pytest.fixture(scope="module")
def words(store: Path) -> list[object]:
    """What every run here has but for its model, length, warm-up and folder."""
    return [
        "--phase", "unet", "--batch", 4, "--data", store, "--save-every", 2, "--sample-every", 0,
        "--lr", 1e-3, "--threads", 1, "--device", "cpu",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def begun(words: list[object], model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stands at step 2 of 6; not to be changed."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("begun") / "run"
    given = ("--model", model, *STEPS, *WARMUP, "--stop-after", 2, "--out", out)
    assert train(*words, *given) == 0
    return out


@pytest.fixture
def run(begun: Path, tmp_path: Path) -> Path:
    """A copy of the run, to resume."""
    return Path(shutil.copytree(begun, tmp_path / "run"))


def copied(model: Path, to: Path, part: str = "") -> Path:
    """A model, or one of its networks, that was moved."""
    return Path(shutil.copytree(model / part, to))


def other(model: Path) -> None:
    """Change one weight of a UNet."""
    (file,) = (model / "unet").glob("*.safetensors")
    tensors = load_file(file)
    tensors["conv_in.bias"] = tensors["conv_in.bias"] + 1e-3
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize(
    "more",
    [
        ("--model", "{model}/../nano/."),
        ("--model", "{copy}"),
        ("--model", "{gone}"),
        ("--text-encoder", "{copy}/text_encoder", "--tokenizer", "{copy}/tokenizer"),
        ("--unet", "{copy}/unet", "--vae", "{copy}/vae", "--model", "{gone}"),
        ("--warmup", "0%", "--steps", 600, "--caption", " txt=1 ", "--objective", "eps"),
        ("--warmup", "1", "--vram", 2),  # a warm-up whose only step is at the full rate
        ("--validation-images", 7, "--sample-every", 3, "--sample-steps", 3, "--keep", 1),
    ],
)
def test_what_changes_no_weight_goes_on(
    words: list[object], begun: Path, model: Path, tmp_path: Path, more: tuple[object, ...]
) -> None:
    places = {"model": model, "copy": tmp_path / "copy", "gone": tmp_path / "gone"}
    if any("{copy}" in str(word) for word in more):
        copied(model, places["copy"])
    given = [str(word).format(**places) for word in more]
    assert train(*words, *STEPS, *WARMUP, *given, "--out", begun, "--dry-run") == 0


def test_a_store_that_was_moved_goes_on(
    words: list[object], begun: Path, store: Path, tmp_path: Path
) -> None:
    given = [*words, *STEPS, *WARMUP, "--out", begun, "--dry-run"]
    given[given.index("--data") + 1] = shutil.copytree(store, tmp_path / "moved")
    assert train(*given) == 0


def test_another_model_is_refused_also_where_it_is_not_read(
    words: list[object], begun: Path, model: Path, tmp_path: Path, capsys: Out
) -> None:
    changed = copied(model, tmp_path / "changed")
    other(changed)
    for more in (("--model", changed), ("--unet", changed / "unet")):
        assert train(*words, *STEPS, *WARMUP, *more, "--out", begun, "--dry-run") == 1
        assert f"(now {more[1]}); leave that out" in capsys.readouterr().err


def test_the_same_command_without_its_model_goes_on_to_the_bit(
    words: list[object], run: Path, model: Path, tmp_path: Path
) -> None:
    whole = (*words, "--model", model, *STEPS, *WARMUP, "--out", tmp_path / "whole")
    assert train(*whole) == 0
    assert train(*words, *STEPS, *WARMUP, "--model", tmp_path / "gone", "--out", run) == 0
    assert metrics(run) == metrics(tmp_path / "whole")
    for pattern in ("checkpoints/step-00000006/*", "base/**/*"):
        assert files(run, pattern) == files(tmp_path / "whole", pattern)


def test_a_longer_plan_is_the_unbroken_longer_run_to_the_bit(
    words: list[object], model: Path, tmp_path: Path, capsys: Out
) -> None:
    given = (*words, "--model", model)
    assert train(*given, "--steps", 4, "--warmup", 1, "--out", tmp_path / "whole") == 0
    out = tmp_path / "run"
    assert train(*given, "--steps", 2, "--warmup", 1, "--out", out) == 0
    capsys.readouterr()
    assert train(*given, "--steps", 4, "--warmup", 1, "--out", out) == 0
    assert "planned 4 steps (before: 2)" in printed(capsys)
    assert metrics(out) == metrics(tmp_path / "whole")
    last = "checkpoints/step-00000004/*"
    assert files(out, last) == files(tmp_path / "whole", last)
    record = json.loads((out / "config.json").read_text())
    assert (record["planned_steps"], record["config"]["steps"], record["settings"]["steps"]) == (
        4, 4, 4
    )  # fmt: skip
    assert train(*given, "--steps", 3, "--warmup", 1, "--out", out) == 1
    assert "is at step 4 already" in capsys.readouterr().err


def test_a_plan_that_would_have_had_other_rates_is_refused(
    words: list[object], run: Path, capsys: Out
) -> None:
    for more in (("--warmup", "50%"), ("--warmup", 4), ("--steps", 60, "--warmup", "10%")):
        assert train(*words, *STEPS, *WARMUP, *more, "--out", run, "--dry-run") == 1
        told = capsys.readouterr().err
        assert "would have had another learning rate" in told
        assert f"--warmup 0 (now {more[-1]})" in told


@pytest.mark.parametrize(
    ("scheduler", "old", "new", "steps", "first"),
    [
        ("constant", (10, 4), (20, 4), 10, None),
        ("constant", (10, 1), (10, 2), 10, 1),
        ("constant", (10, 4), (10, 8), 0, None),
        ("constant", (4, 0.4), (8, 0.8), 4, None),
        ("linear", (10, 4), (20, 4), 4, None),  # still inside the warm-up
        ("linear", (10, 4), (20, 4), 9, 5),
        ("cosine", (10, 0), (20, 0), 9, 1),
        ("rex", (10, 0), (10, 0), 9, None),
    ],
)
def test_the_first_step_of_another_rate(
    scheduler: Any, old: tuple[int, float], new: tuple[int, float], steps: int, first: int | None
) -> None:
    config = TrainConfig(phase="unet", scheduler=scheduler)
    assert first_other_rate(config, old, new, steps) == first


def test_what_was_forced_is_the_runs_from_then_on(
    words: list[object], run: Path, capsys: Out
) -> None:
    given = [*words, *STEPS, *WARMUP, "--out", run]
    given[given.index("--lr") + 1] = 5e-4
    assert train(*given) == 1
    assert train(*given, "--force", "--stop-after", 4) == 0
    record = json.loads((run / "config.json").read_text())
    assert record["changed"] == [{"step": 2, "was": {"lr": 0.001}}]
    assert record["config"]["lr"] == record["settings"]["lr"] == 5e-4
    assert record["model"]["sha256"]["unet"]
    capsys.readouterr()
    assert train(*given) == 0, "the same command again needs no --force"
    assert train(*words, *STEPS, *WARMUP, "--out", run) == 1
    assert "--lr 0.0005 (now 0.001)" in capsys.readouterr().err


def test_what_a_checkpoint_cannot_do_is_not_forced(
    words: list[object], run: Path, capsys: Out
) -> None:
    for more in (("--optimizer", "adamw"), ("--train", "unet.conv_in"), ("--ema",)):
        assert train(*words, *STEPS, *WARMUP, *more, "--out", run, "--force", "--dry-run") == 1
        assert "which its checkpoint cannot continue with" in capsys.readouterr().err


def test_a_run_of_an_earlier_version_goes_on(words: list[object], run: Path) -> None:
    path = run / "config.json"
    record = json.loads(path.read_text())
    for name in ("timesteps", "noise_offset", "channels_last", "clip_skip", "ema", "card"):
        record["settings"].pop(name, None)
    record["settings"]["vram"] = None  # which was compared once
    for name in ("objective", "validation"):
        del record[name]
    path.write_text(json.dumps(record))
    assert train(*words, *STEPS, *WARMUP, "--out", run) == 0


def test_validation_may_begin_and_end(
    words: list[object], begun: Path, tmp_path: Path, capsys: Out
) -> None:
    given = (*words, *STEPS, *WARMUP)
    assert train(*given, "--validate-every", 2, "--out", begun, "--dry-run") == 1
    assert "was started without held-out images" in capsys.readouterr().err
    out, held = tmp_path / "run", ("--validate-every", 2, "--validation-fraction", 0.4)
    model = json.loads((begun / "config.json").read_text())["config"]["model"]
    assert train(*given, *held, "--model", model, "--stop-after", 2, "--out", out) == 0
    assert train(*given, "--out", out) == 0, "the fraction is the run's"


TAGS = {"tags": False, "max_tags": None, "drop_tags": None, "shuffle": "none"}


@pytest.mark.parametrize(
    ("old", "new", "names"),
    [
        ({"lr_floor": None}, {"lr_floor": 0.0}, []),
        ({"require_tags": "a, b"}, {"require_tags": "b,a"}, []),
        ({"require_tags": "a"}, {"require_tags": "a,b"}, ["require_tags"]),
        ({"train": "unet.a,unet.b"}, {"train": "unet.b, unet.a"}, []),
        ({**TAGS, "max_tags": 5}, {**TAGS, "max_tags": 5, "tags": True}, []),
        (TAGS, {**TAGS, "tags": True}, ["tags"]),
        ({"ema": True, "ema_every": 2}, {"ema": False, "ema_every": None}, []),
        ({"seed": 0}, {"seed": 0, "new thing": 1}, []),
        ({}, {"noise_offset": 0.0}, []),
        ({}, {"noise_offset": 0.1}, ["noise_offset"]),
        ({"steps": 1, "out": "x", "model": "y"}, {"steps": 2, "out": "z", "model": "w"}, []),
    ],
)
def test_settings_are_compared_by_what_they_do(
    old: dict[str, Any], new: dict[str, Any], names: list[str]
) -> None:
    assert list(differing(old, new)) == names


@pytest.mark.parametrize("wrote", ["settings", "machine"])
def test_another_card_is_another_rounding(tmp_path: Path, wrote: str) -> None:
    """Of earlier versions only the line for people names the card."""
    settings = {
        "batch": 4, "objective": None, "ema": False, "validation_images": 256, "card": "NVIDIA A"
    }  # fmt: skip
    config = TrainConfig(phase="unet")
    machine = {"card": "NVIDIA A"}
    before = replace(EMPTY, settings=dict(settings), machine=machine, batch=4)
    if wrote == "machine":
        del before.settings["card"]
    now = {**settings, "cudnn version": 92000}
    compare_settings(RunFolder(tmp_path, before), now, config, str)
    with pytest.raises(UserError, match="card NVIDIA A .now NVIDIA B."):
        compare_settings(RunFolder(tmp_path, before), {**now, "card": "NVIDIA B"}, config, str)
    before.settings["cudnn version"] = 91000
    with pytest.raises(UserError, match="cudnn version 91000 .now 92000."):
        compare_settings(RunFolder(tmp_path, before), now, config, str)
