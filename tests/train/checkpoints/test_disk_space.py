"""Free disk space is checked before a run; the error says what to remove."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from tests.support import printed, train
from tests.support.sessions import Open
from xlsd_cache.runtime.disk import held_bytes
from xlsd_train.checkpoints.disk_space import _state_nbytes, needed
from xlsd_train.config.train import TrainConfig
from xlsd_train.optim.factory import make_optimizer

resource = pytest.importorskip("resource")
Out = pytest.CaptureFixture[str]


@pytest.fixture
def arguments(arguments: list[object]) -> list[object]:
    return [*arguments, "--device", "cpu"]


@pytest.mark.parametrize("optimizer", ["lion", "dlion", "adamw"])
def test_optimizers_state_is_as_large_as_told(optimizer: Any) -> None:
    config = TrainConfig(phase="unet", optimizer=optimizer).resolved()
    layers = nn.ModuleList([nn.Linear(64, 48), nn.Conv2d(8, 16, 3)])
    found = make_optimizer(config, layers.parameters())
    tensors = [x for state in found.state.values() for x in state.values() if hasattr(x, "nbytes")]
    nbytes = sum(x.nbytes for x in tensors if x.dim())
    assert _state_nbytes(config, dict(layers.named_parameters())) == nbytes


def test_checkpoints_are_as_large_as_told(
    open_run: Open, arguments: list[object], tmp_path: Path
) -> None:
    given: dict[str, Any] = {"ema": True, "save_every": 2, "keep": 1, "ema_snapshots": 4}
    assert train(*arguments, "--ema", "--keep", 1) == 0
    run = tmp_path / "run"
    (checkpoint,) = (run / "checkpoints").iterdir()
    nbytes = sum(path.stat().st_size for path in checkpoint.iterdir() if path.name[0] != "t")
    session = open_run(out=tmp_path / "other", steps=6, sample_every=0, **given)
    room = needed(session.config, session.run, session.model, session.named, 6, [])
    assert nbytes <= room.checkpoint <= 1.2 * nbytes + 2**18
    assert (room.first, room.most) == (2, 2)
    assert room.averages == sum(2 * 2 * p.nbytes for p in session.named.values()) / 2
    base = sum(path.stat().st_size for path in (run / "base").rglob("*.safetensors"))
    assert 0.9 * base <= room.base <= base


def test_samples_losses_and_logs_take_no_more_than_told(
    open_run: Open, arguments: list[object], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    looks: dict[str, Any] = {"sample_every": 5, "validate_every": 5, "validation_fraction": 0.4}
    words = [x for name, value in looks.items() for x in (f"--{name.replace('_', '-')}", value)]
    given = [*arguments, *words, "--steps", 60, "--save-every", 60, "--sample-steps", 1]
    assert train(*given, "--optimizer", "dlion", "--lr", 0.01) == 0
    session = open_run(out=tmp_path / "other", steps=60, optimizer="dlion", lr=0.01, **looks)
    needs = session.config, session.run, session.model, session.named, 60
    told = needed(*needs, session.sampler.pictures).others
    wrote = ("metrics.jsonl", "validation.jsonl", "validation", "samples", "tensorboard")
    nbytes = sum(
        path.stat().st_size
        for name in wrote
        for path in [run / name, *(run / name).rglob("*")]
        if path.is_file() and path.name != "grid.png"
    )
    logs = sum(path.stat().st_size for path in run.glob("tensorboard/*"))
    assert nbytes <= told
    assert logs + (run / "metrics.jsonl").stat().st_size > 60 * 600  # STEP_NBYTES is not far off


def test_too_little_room_is_refused_before_anything_is_written(
    arguments: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Out
) -> None:
    full = SimpleNamespace(total=2**40, used=0, free=99)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    assert train(*arguments) == 1
    told = capsys.readouterr().err
    assert "not enough disk space for the first " in told
    assert "lower --keep 3" in told
    assert not (tmp_path / "run").exists()
    assert train(*arguments, "--force", "--dry-run") == 0
    assert "will be full before the run ends" in capsys.readouterr().err
    full.free = 2**39
    assert train(*arguments, "--dry-run") == 0
    said = printed(capsys)
    assert "512.00 GiB free on the disk" in said
    assert "warning" not in said
    full.total = 0  # a file system that does not know
    full.free = 0
    assert train(*arguments, "--dry-run") == 0


@pytest.fixture
def largest_file() -> Iterator[Any]:
    """Files may grow to so many bytes: what the system refuses beyond is as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda nbytes: resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_when_the_disk_fills_the_newest_checkpoint_stands(
    arguments: list[object], tmp_path: Path, largest_file: Any, capsys: Out
) -> None:
    run = tmp_path / "run"
    assert train(*arguments, "--stop-after", 4) == 0
    old, newest = sorted((run / "checkpoints").iterdir())
    killed = run / "checkpoints" / ".step-00000006.1.tmp"
    killed.mkdir()
    capsys.readouterr()
    largest_file((newest / "unet.safetensors").stat().st_size // 2)
    assert train(*arguments) == 1
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("xlsd-train:")]
    assert f"the newest checkpoint is {newest}; remove {old} (" in line
    assert line.endswith(f"then run the same command with --out {run}")
    assert sorted((run / "checkpoints").iterdir()) == [old, newest], "nothing partial is left"
    largest_file(resource.RLIM_INFINITY)
    shutil.rmtree(old)
    assert train(*arguments) == 0


def test_a_disk_that_is_full_at_the_start_leaves_no_half_of_a_run(
    arguments: list[object], tmp_path: Path, largest_file: Any, capsys: Out
) -> None:
    largest_file(2**14)  # config.json fits, the model does not
    assert train(*arguments) == 1
    told = capsys.readouterr().err
    assert "is full: " in told
    assert "there is no checkpoint; remove other files from that disk" in told
    assert not list((tmp_path / "run").glob("base*"))
    largest_file(resource.RLIM_INFINITY)
    assert train(*arguments) == 0


def test_what_has_another_name_frees_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_bytes(bytes(100))
    assert held_bytes(tmp_path / "a") == 100
    (tmp_path / "y").hardlink_to(tmp_path / "a" / "x")
    assert held_bytes(tmp_path / "a") == 0
