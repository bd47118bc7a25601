import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.demo.pipeline import make_networks
from tests.support import files, train
from tests.support.averages import power_average, trajectory
from tests.support.sessions import Open
from xlsd_cache.errors import UserError
from xlsd_train.optim.ema import SIGMAS, Ema, keep_snapshots, snapshots
from xlsd_train.optim.ema_profiles import gamma_of
from xlsd_train.optim.pinned import BLOCK, packed, pinned, pinned_nbytes
from xlsd_train.runs.layout import checkpoints

Out = pytest.CaptureFixture[str]


@pytest.fixture
def arguments(model: Path, store: Path) -> list[object]:
    """A run of six steps that keeps averages and all checkpoints."""
    return [
        "--phase", "te", "--batch", 2, "--data", store, "--model", model, "--steps", 6,
        "--save-every", 1, "--sample-every", 0, "--lr", 1e-3, "--warmup", 0, "--threads", 1,
        "--keep", 0,
    ]  # fmt: skip


@pytest.mark.parametrize("every", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_averages_are_those_of_the_trajectory_through_a_resume(
    arguments: list[object], tmp_path: Path, every: int
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    given = (*arguments, "--ema", *(("--ema-every", every) if every > 1 else ()))
    assert train(*given, "--out", whole) == 0
    for stop in (3, 6):
        assert train(*given, "--out", parts, "--stop-after", stop) == 0
    last = "checkpoints/step-00000006/*"
    assert files(whole, last) == files(parts, last)
    kept = load_file(whole / "checkpoints/step-00000006/ema.safetensors")
    steps = trajectory(whole)
    for sigma in SIGMAS:
        for name, expected in power_average(steps, float(sigma), every).items():
            got = kept[f"{sigma}/{name}"].double()
            assert torch.allclose(got, expected, rtol=1e-5, atol=1e-6), name
    assert list(snapshots(whole)) == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_keeping_averages_changes_no_weight(arguments: list[object], tmp_path: Path) -> None:
    """Nor does measuring them; and both are validated along with the live weights."""
    common = (*arguments, "--validation-fraction", 0.4, "--seed", 3)
    common = (*common[: common.index("--steps") + 1], 2, *common[common.index("--steps") + 2 :])
    assert train(*common, "--out", tmp_path / "without") == 0
    with_ema = ("--ema", "--validate-every", 1, "--out", tmp_path / "with")
    assert train(*common, *with_ema) == 0
    for name in ("text_encoder", "optimizer"):
        last = f"checkpoints/step-00000002/{name}.safetensors"
        assert files(tmp_path / "without", last) == files(tmp_path / "with", last)
    lines = (tmp_path / "with/validation.jsonl").read_text().splitlines()
    told = [(line["step"], line["weights"]) for line in map(json.loads, lines)]
    three = ["live", "ema 0.05", "ema 0.10"]
    assert told == [(0, "live"), *((1, w) for w in three), *((2, w) for w in three)]
    means = [json.loads(line)["held_out"]["mean"] for line in lines]
    assert means[1] == means[2] == means[3]  # after one step the average is that step
    assert len(set(means[4:])) == 3


def test_an_average_is_in_place_only_for_a_while(open_run: Open) -> None:
    session = open_run(ema=True, phase="te")
    assert session.ema
    for step in (1, 2, 3):
        session.take_step([session.source.make(session.batch_order.slot(step))], 1e-3)
        session.average(step)
    live = {name: value.detach().clone() for name, value in session.named.items()}
    with pytest.raises(RuntimeError, match="out of"), session.ema.applied("0.10"):
        for name, value in session.named.items():
            assert torch.equal(value, session.ema.averages["0.10"][name])
        assert any(not torch.equal(live[name], value) for name, value in session.named.items())
        raise RuntimeError("out of something")
    assert all(torch.equal(live[name], value) for name, value in session.named.items())


@pytest.mark.parametrize("damage", ["gone", "cut", "foreign"])
def test_a_resume_without_its_averages_is_refused(
    arguments: list[object], tmp_path: Path, capsys: Out, damage: str
) -> None:
    run = tmp_path / "run"
    assert train(*arguments, "--ema", "--out", run, "--stop-after", 1) == 0
    path = run / "checkpoints/step-00000001/ema.safetensors"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-5])
    else:
        path.unlink()
    if damage == "foreign":
        save_file({"0.05/x": torch.zeros(1)}, path, {"step": "1"})
    assert train(*arguments, "--ema", "--out", run) == 1
    assert "ema.safetensors does not fit this run" in capsys.readouterr().err
    assert train(*arguments, "--out", run) == 0  # averages may end


def test_snapshots_outlive_their_checkpoints_and_are_thinned(
    arguments: list[object], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    given = list(arguments)
    given[given.index("--keep") + 1] = 1
    assert train(*given, "--ema", "--ema-snapshots", 4, "--out", run, "--stop-after", 5) == 0
    assert [path.name[-1] for path in checkpoints(run)] == ["5"]
    assert list(snapshots(run)) == [1, 2, 4, 5] or list(snapshots(run)) == [1, 3, 4, 5]
    # The newest takes no more space than the checkpoint's own.
    newest = run / "checkpoints/step-00000005/ema.safetensors"
    assert newest.stat().st_ino == snapshots(run)[5].stat().st_ino
    before = files(run, "ema/*")
    keep_snapshots(run, checkpoints(run), 4)
    assert files(run, "ema/*") == before
    shutil.copy(newest, run / "ema/step-00000009.safetensors")  # of a kill after its checkpoint
    assert train(*given, "--ema", "--ema-snapshots", 4, "--out", run) == 0
    assert max(snapshots(run)) == 6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the copies overlap on CUDA cards only")
def test_on_a_card_the_averages_are_those_of_each_step() -> None:
    weight = torch.nn.Parameter(torch.zeros(2**22, device="cuda"))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    ema = Ema({"w": weight})
    optimizer.register_step_pre_hook(ema.before_update)
    for step in range(1, 21):
        weight.grad = torch.full_like(weight, -1.0)
        optimizer.step()  # the weights are the step's number
        ema.update(step)
    ema.finish()
    counts = np.diff((np.arange(21) / 20) ** (gamma_of(0.05) + 1))
    expected = float(counts @ np.arange(1, 21))
    assert torch.allclose(ema.averages["0.05"]["w"], torch.tensor(expected))
    ema.close()


def test_another_models_snapshot_is_refused(tmp_path: Path) -> None:
    ema = Ema({"w": torch.nn.Parameter(torch.zeros(3))})
    ema.update(1)
    ema.save(tmp_path)
    other = Ema({"v": torch.nn.Parameter(torch.zeros(3))})
    with pytest.raises(UserError, match="does not fit this run"):
        other.load(tmp_path)


def test_what_is_pinned_wastes_little() -> None:
    """SD1.5's UNet in shape, every block rounded up to a power of two as torch does it."""
    with torch.device("meta"):
        unet, _ = make_networks("sd15", 1000)
    named = dict(unet.named_parameters())
    sizes = {name: p.numel() for name, p in named.items()}
    blocks = packed(sizes, BLOCK)
    assert sorted(name for block in blocks for name in block) == sorted(sizes)
    taken = [sum(sizes[name] for name in block) for block in blocks]
    rounded = sum(1 << (n - 1).bit_length() for n in taken)
    assert max(taken) <= BLOCK
    assert 4 * sum(sizes.values()) <= pinned_nbytes(sizes) == 4 * rounded
    assert rounded < 1.03 * sum(sizes.values())
    assert packed({"a": 9, "b": 2, "c": 3}, 4) == [["a"], ["c"], ["b"]]


def test_what_is_pinned_has_the_shapes_and_none_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty
    monkeypatch.setattr(
        "torch.empty", lambda n, dtype, pin_memory, device: empty(n, dtype=dtype, device=device)
    )
    named = {"a": torch.zeros(3, 2).T, "b": torch.zeros(()), "c": torch.zeros(2, 2, 2)}
    found = pinned(named)
    for value, name in enumerate(named):
        assert found[name].shape == named[name].shape
        assert found[name].stride() == named[name].stride()
        found[name].fill_(value)
    assert all((found[name] == value).all() for value, name in enumerate(named))
