import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support import files, printed, train
from tests.support.averages import power_average, trajectory

Out = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def run(model: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve steps of the text encoder, with a snapshot of each. Read-only."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("ema") / "run"
    assert train(
        "--phase", "te", "--batch", 2, "--data", store, "--model", model, "--steps", 12,
        "--save-every", 1, "--sample-every", 0, "--lr", 1e-3, "--warmup", 0, "--threads", 1,
        "--keep", 0, "--ema", "--out", folder,
    ) == 0  # fmt: skip
    return folder


@pytest.mark.parametrize("step", [9, 12])
def test_any_length_is_made_afterwards(run: Path, tmp_path: Path, step: int, capsys: Out) -> None:
    """Against the average of the same trajectory, computed directly."""
    out = tmp_path / "average"
    assert train("ema", run, out, "--sigma-rel", 0.15, "--step", step) == 0
    assert "error of the fitted profile" in printed(capsys)
    steps = trajectory(run)[:step]
    expected = power_average(steps, 0.15)
    got = load_file(out / f"checkpoints/step-{step:08d}/text_encoder.safetensors")
    worst, moved = 0.0, 0.0
    for file_name, value in got.items():
        name = file_name.replace("text_model.", "text_encoder.", 1)
        worst = max(worst, float((value.double() - expected[name]).abs().max()))
        moved = max(moved, float((steps[-1][name] - expected[name]).abs().max()))
    assert worst < 0.03 * moved
    unet = "checkpoints/step-00000012/unet.safetensors"
    assert files(out, "checkpoints/*/unet.safetensors").popitem()[1] == (run / unet).read_bytes()
    told = json.loads((out / f"checkpoints/step-{step:08d}/state.json").read_text())
    assert told["ema"]["sigma_rel"] == 0.15
    assert told["ema"]["error"] < 0.1


def test_a_length_that_was_kept_is_the_snapshot(run: Path, tmp_path: Path) -> None:
    assert train("ema", run, tmp_path / "average") == 0
    kept = load_file(run / "checkpoints/step-00000012/ema.safetensors")
    got = load_file(tmp_path / "average/checkpoints/step-00000012/text_encoder.safetensors")
    for name, value in got.items():
        expected = kept["0.10/" + name.replace("text_model.", "text_encoder.", 1)]
        assert torch.allclose(value, expected, rtol=1e-4, atol=1e-6), name


def test_the_average_is_a_model(run: Path, store: Path, tmp_path: Path) -> None:
    out = tmp_path / "average"
    assert train("ema", run, out, "--sigma-rel", 0.07) == 0
    assert train(
        "--phase", "unet", "--batch", 2, "--data", store, "--model", out, "--steps", 1,
        "--sample-every", 1, "--sample-steps", 2, "--out", tmp_path / "next",
    ) == 0  # fmt: skip
    trained = load_file(tmp_path / "next/checkpoints/step-00000001/text_encoder.safetensors")
    made = load_file(out / "checkpoints/step-00000012/text_encoder.safetensors")
    assert all(torch.equal(value, made[name]) for name, value in trained.items())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--sigma-rel", 0.3), "--sigma-rel 0.3 is more than 0.288"),
        (("--sigma-rel", 0), "--sigma-rel 0 is not above 0"),
        (("--step", 13), "--step 13 is not from 1 to 12"),
        (("--step", 0), "--step 0 is not from 1 to 12"),
    ],
)
def test_bad_lengths_and_steps_are_refused(
    run: Path, tmp_path: Path, capsys: Out, options: tuple[object, ...], told: str
) -> None:
    assert train("ema", run, tmp_path / "average", *options) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert told in line
    assert not (tmp_path / "average").exists()


def test_runs_without_snapshots_and_folders_that_exist_are_refused(
    run: Path, tmp_path: Path, capsys: Out
) -> None:
    assert train("ema", tmp_path / "nowhere", tmp_path / "average") == 1
    assert "has no EMA snapshots; train it with --ema" in capsys.readouterr().err
    assert train("ema", run, tmp_path) == 1
    assert "exists already" in capsys.readouterr().err
