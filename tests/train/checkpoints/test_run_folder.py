import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import cache, metrics, printed, train, write_images
from xlsd_cache.errors import UserError
from xlsd_train.checkpoints.run_folder import RunFolder
from xlsd_train.config.train import TrainConfig

Out = pytest.CaptureFixture[str]


def changed(arguments: list[object], option: str, value: object) -> list[object]:
    given = list(arguments)
    if option in given:
        given[given.index(option) + 1] = value
        return given
    return [*given, option, value]


def test_the_folder_tells_everything_about_the_run(
    arguments: list[object], tmp_path: Path, store: Path
) -> None:
    assert train(*arguments) == 0
    run = tmp_path / "run"
    told = json.loads((run / "config.json").read_text())
    assert told["config"]["batch"] == 4
    assert told["config"]["lr"] == 1e-3
    assert told["planned_steps"] == 6
    assert told["precision"].startswith("fp32: IEEE")
    assert told["stores"][0]["generation"] == 0
    assert told["settings"]["threads"] == 1
    assert told["settings"]["torch version"]
    assert set(told["model"]["sha256"]) == {"unet", "text_encoder", "vae"}
    assert told["command"][:3] == ["xlsd-train", "--phase", "unet"]
    lines = metrics(run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "loss_smoothed", "lr", "lr_effective", "grad_norm", "epoch"} < lines[0].keys()
    assert lines[-1]["images_seen"] / 8 == lines[-1]["epoch"]
    assert list((run / "tensorboard").iterdir())


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("--batch", 5, "--batch 4 (now 5)"),
        ("--lr", 2e-3, "--lr 0.001 (now 0.002)"),
        ("--seed", 1, "--seed 0 (now 1)"),
        ("--warmup", 2, "--warmup 0 (now 2), so that step 1 would have had another learning rate"),
        ("--scheduler", "linear", "--scheduler constant (now linear)"),
        ("--threads", 2, "--threads 1 (now 2)"),
        ("--precision", "tf32", "--precision fp32 (now tf32)"),
        ("--optimizer", "adamw", "--optimizer lion (now adamw)"),
        ("--caption-dropout", 0.5, "--caption-dropout 0.0 (now 0.5)"),
        ("--objective", "v", "--objective None (now v)"),
        ("--tokens", 248, "--tokens None (now 248)"),
        ("--reinit", "unet.conv_in", "--reinit None (now unet.conv_in)"),
        ("--vae", "taesdxl", "--vae None (now taesdxl)"),
        ("--model", "some/other", "(now some/other)"),
        ("--ema", None, "--ema False (now True)"),
        ("--loss-weight", "debiased", "--loss-weight none (now debiased)"),
        ("--timesteps", "stratified", "--timesteps uniform (now stratified)"),
    ],
)
def test_a_resume_with_other_settings_is_refused_naming_them(
    arguments: list[object], tmp_path: Path, capsys: Out, option: str, value: object, told: str
) -> None:
    assert train(*arguments, "--stop-after", 3) == 0
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    given = changed(arguments, option, value) if value is not None else [*arguments, option]
    assert train(*given) == 1
    sentence = capsys.readouterr().err.strip().splitlines()[-1]
    assert told in sentence
    assert "--out" in sentence
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before


def test_force_goes_on_and_says_what_differs(
    arguments: list[object], tmp_path: Path, capsys: Out
) -> None:
    assert train(*arguments, "--stop-after", 3) == 0
    assert train(*changed(arguments, "--lr", 2e-3), "--force") == 0
    assert "--lr 0.001 (now 0.002)" in printed(capsys)
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_a_grown_store_is_seen_as_it_was_and_a_remade_one_is_refused(
    arguments: list[object], tmp_path: Path, vae: Path, capsys: Out
) -> None:
    images, data = tmp_path / "images", tmp_path / "l"
    write_images(images, [f"{i}.png" for i in range(9)])
    build = ("build", images, "--out", data, "--vae", vae, "--resolution", 128)
    assert cache(*build) == 0
    given = changed(arguments, "--data", data)
    assert train(*given) == 0
    expected = metrics(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    assert train(*given, "--stop-after", 3) == 0
    write_images(images, ["new.png", "0.png"], first_seed=70)
    assert cache(*build) == 0
    assert train(*given) == 0
    assert metrics(tmp_path / "run") == expected
    shutil.rmtree(data)
    assert cache(*build) == 0
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000006")  # a finished run asks for no store
    assert train(*given) == 1
    assert "stores " in capsys.readouterr().err


def test_lines_that_outran_the_checkpoint_are_cut(arguments: list[object], tmp_path: Path) -> None:
    assert train(*arguments) == 0
    expected, path = metrics(tmp_path / "run"), tmp_path / "run/metrics.jsonl"
    for step in (5, 6):
        shutil.rmtree(tmp_path / f"run/checkpoints/step-0000000{step}", ignore_errors=True)
    with path.open("ab") as file:
        file.write(b'{"step": 7, "torn')
    assert train(*arguments) == 0
    assert metrics(tmp_path / "run") == expected


def test_folders_that_hold_something_else_are_refused(
    arguments: list[object], tmp_path: Path, capsys: Out
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    assert train(*arguments) == 1
    assert "not a run" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]
    (tmp_path / "run" / "config.json").write_text("{")
    assert train(*arguments) == 1
    assert "cannot read" in capsys.readouterr().err


def test_two_processes_do_not_train_in_one_folder(
    arguments: list[object], tmp_path: Path, capsys: Out
) -> None:
    from filelock import FileLock

    assert train(*arguments, "--stop-after", 1) == 0
    with FileLock(tmp_path / "run" / ".lock"):
        assert train(*arguments) == 1
    assert "another process is training" in capsys.readouterr().err


def test_a_run_killed_before_its_first_checkpoint_begins_again_from_the_same_model(
    arguments: list[object], tmp_path: Path, model: Path, capsys: Out
) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "model"))
    given = changed(arguments, "--model", copy)
    assert train(*given) == 0
    expected = metrics(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert train(*given) == 0
    assert metrics(tmp_path / "run") == expected
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    from benchmarks.demo.pipeline import make_pipeline

    make_pipeline(copy, "nano", ["another model"], seed=5)
    shutil.copytree(model / "tokenizer", copy / "tokenizer", dirs_exist_ok=True)
    shutil.copytree(model / "text_encoder", copy / "text_encoder", dirs_exist_ok=True)
    assert train(*given) == 1
    assert "whose weights differ" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("--batch", 9, "--batch 9 is larger than the 8 images"),
        ("--caption", "tags", "no caption column 'tags' (it has txt)"),
        ("--warmup", 7, "--warmup 7 is 7 steps, longer than the planned 6"),
        ("--model", "nowhere", "no model nowhere"),
        ("--vae", "nowhere", "no VAE nowhere"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(
    arguments: list[object], tmp_path: Path, capsys: Out, option: str, value: object, told: str
) -> None:
    assert train(*changed(arguments, option, value)) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert told in line
    assert not (tmp_path / "run").exists()


def test_a_store_without_captions_is_refused(
    arguments: list[object], photos: Path, vae: Path, tmp_path: Path, capsys: Out
) -> None:
    out = tmp_path / "l"
    none = ("--resolution", 128, "--captions", "none")
    assert cache("build", photos, "--out", out, "--vae", vae, *none) == 0
    assert train(*changed(arguments, "--data", out)) == 1
    assert "has no captions" in capsys.readouterr().err


def test_a_dry_run_says_everything_and_writes_nothing(
    arguments: list[object], tmp_path: Path, capsys: Out
) -> None:
    assert train(*arguments, "--dry-run") == 0
    said = printed(capsys)
    assert "planned 6 steps" in said
    assert "bucket 192x64 has 3 images" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_progress_in_a_log_file_does_not_fill_it(arguments: list[object]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "xlsd_train", *map(str, changed(arguments, "--steps", 40))],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "step 40 of 40" in done.stdout + done.stderr
    told = [line for line in done.stderr.splitlines() if "images/s" in line or "loss" in line]
    assert len(told) < 20  # samples, losses, epochs; none a step


@pytest.mark.parametrize("phase", ["unet", "te"])
def test_a_short_run_has_a_short_warm_up_by_default(
    arguments: list[object], phase: str, capsys: Out
) -> None:
    at = arguments.index("--warmup")
    short = changed(arguments[:at] + arguments[at + 2 :], "--phase", phase)
    assert train(*changed(short, "--steps", 50), "--dry-run") == 0
    assert "warm-up over 5 steps" in printed(capsys)


def test_a_checkpoint_of_another_model_is_refused(
    arguments: list[object], tmp_path: Path, photos: Path, capsys: Out
) -> None:
    from benchmarks.demo.pipeline import make_pipeline, read_captions
    from xlsd_train.runs.layout import checkpoints

    assert train(*arguments, "--stop-after", 2) == 0
    make_pipeline(tmp_path / "demo", "demo", read_captions(photos))
    other = changed(changed(arguments, "--model", tmp_path / "demo"), "--out", tmp_path / "other")
    assert train(*other, "--stop-after", 2) == 0
    (mine,), (theirs,) = checkpoints(tmp_path / "run"), checkpoints(tmp_path / "other")
    shutil.copy(theirs / "unet.safetensors", mine / "unet.safetensors")
    assert train(*arguments) == 1
    assert "does not fit this model's UNet2DConditionModel" in capsys.readouterr().err


def test_default_folders_are_named_by_phase_and_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = RunFolder.open(TrainConfig(phase="te"))
    assert run.folder.parent == Path("runs")
    assert run.folder.name.startswith("te-20")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file"):
        RunFolder.open(TrainConfig(phase="te", out=tmp_path / "file"))
