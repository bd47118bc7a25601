import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.sessions import Open
from xlsd_cache.errors import UserError
from xlsd_train.checkpoints.checkpoint import load_optimizer, prune, save_checkpoint
from xlsd_train.optim.factory import numbers, set_numbers
from xlsd_train.runs.layout import checkpoints
from xlsd_train.training.session import Session


def stepped(open_run: Open, **settings: object) -> Session:
    session = open_run(**settings)
    session.take_step([session.source.make(session.batch_order.slot(0))], 1e-3)
    return session


def save(session: Session, step: int = 1) -> Path:
    optimizer = session.take_step.optimizer
    return save_checkpoint(
        session.run.folder, session.model, session.named, optimizer, {"step": step}
    )


@pytest.mark.parametrize("optimizer", ["lion", "dlion", "adamw"])
def test_what_is_saved_is_loaded_bit_for_bit(
    open_run: Open, tmp_path: Path, optimizer: str
) -> None:
    session = stepped(open_run, optimizer=optimizer)
    checkpoint = save(session)
    assert {path.name for path in checkpoint.iterdir()} == {
        "unet.safetensors", "text_encoder.safetensors", "optimizer.safetensors", "state.json"
    }  # fmt: skip
    weights = load_file(checkpoint / "unet.safetensors")
    assert all(torch.equal(v, session.named[f"unet.{k}"]) for k, v in weights.items())
    state = json.loads((checkpoint / "state.json").read_text())
    scalars = numbers(session.take_step.optimizer)
    assert bool(scalars) == (optimizer == "dlion")
    assert state == {"step": 1, **({"optimizer": scalars} if scalars else {})}
    other = open_run(optimizer=optimizer, out=tmp_path / "other")
    load_optimizer(checkpoint, other.named, other.take_step.optimizer)
    for name, parameter in session.named.items():
        ours = session.take_step.optimizer.state[parameter]
        theirs = other.take_step.optimizer.state[other.named[name]]
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert torch.equal(value, theirs[key]), key
    assert numbers(other.take_step.optimizer) == scalars


def test_the_numbers_of_dlion_survive_to_the_last_bit(open_run: Open, tmp_path: Path) -> None:
    session = stepped(open_run, optimizer="dlion")
    odd = {"d": 0.1 + 0.2, "k": 12_345_678, "numerator_weighted": -5e-324}
    set_numbers(session.take_step.optimizer, odd)
    checkpoint = save(session)
    other = open_run(optimizer="dlion", out=tmp_path / "other")
    load_optimizer(checkpoint, other.named, other.take_step.optimizer)
    assert numbers(other.take_step.optimizer) == odd


@pytest.mark.parametrize(
    ("saved", "resumed"), [("lion", "dlion"), ("dlion", "lion"), ("adamw", "dlion")]
)
def test_another_optimizers_state_is_refused(
    open_run: Open, tmp_path: Path, saved: str, resumed: str
) -> None:
    checkpoint = save(stepped(open_run, optimizer=saved))
    other = open_run(optimizer=resumed, out=tmp_path / "other")
    with pytest.raises(UserError, match="does not fit this run"):
        load_optimizer(checkpoint, other.named, other.take_step.optimizer)


def test_a_checkpoint_appears_whole_or_not(open_run: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    import xlsd_train.checkpoints.checkpoint as module

    session = stepped(open_run)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_json", full)
    with pytest.raises(OSError, match="No space"):
        save(session)
    assert checkpoints(session.run.folder) == []
    assert list((session.run.folder / "checkpoints").iterdir()) == []


def test_old_checkpoints_and_what_kills_left_are_pruned(open_run: Open) -> None:
    session = stepped(open_run)
    for step in (1, 2, 3, 4):
        save(session, step)
    folder = session.run.folder
    (folder / "checkpoints" / f".step-00000009.{os.getpid()}.tmp").mkdir()
    prune(folder, 0)
    assert [path.name[-1] for path in checkpoints(folder)] == ["1", "2", "3", "4"]
    prune(folder, 2)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [
        path.name for path in checkpoints(folder)
    ] or len(list((folder / "checkpoints").iterdir())) == 2
    assert [path.name[-1] for path in checkpoints(folder)] == ["3", "4"]


@pytest.mark.parametrize("damage", ["cut", "foreign", "shape"])
def test_a_damaged_optimizer_is_refused_by_name(open_run: Open, damage: str) -> None:
    session = stepped(open_run)
    checkpoint = save(session)
    path = checkpoint / "optimizer.safetensors"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-5])
    elif damage == "foreign":
        save_file({"other.weight/exp_avg": torch.zeros(3)}, path)
    else:
        save_file({"unet.conv_in.weight/exp_avg": torch.zeros(3)}, path)
    with pytest.raises(UserError, match="optimizer.safetensors does not fit this run"):
        load_optimizer(checkpoint, session.named, session.take_step.optimizer)
