"""NaN and infinite values are reported by component, tensor and file."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support import train
from tests.support.sessions import Open
from xlsd_cache.encoding.vae import load_vae
from xlsd_cache.errors import UserError
from xlsd_cache.store.reader import Identity, LatentStore
from xlsd_train.checkpoints.checkpoint import load_optimizer, save_checkpoint
from xlsd_train.model.loading import load_bundle
from xlsd_train.optim.ema import keep_snapshots
from xlsd_train.runs.layout import checkpoints
from xlsd_train.training.session import Session
from xlsd_train.weights.locate import locate_model
from xlsd_train.weights.network import build_network, with_finite_check

Out = pytest.CaptureFixture[str]
UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT_ENCODER = "text_encoder/model.safetensors"
BAD = {  # component -> its file in a folder, a tensor in it, the same one in a single file
    "unet": (UNET, "conv_in.weight", "model.diffusion_model.input_blocks.0.0.weight"),
    "vae": (VAE, "decoder.conv_in.bias", "first_stage_model.decoder.conv_in.bias"),
    "text_encoder": (
        TEXT_ENCODER,
        "text_model.final_layer_norm.weight",
        "cond_stage_model.transformer.text_model.final_layer_norm.weight",
    ),
}


@pytest.fixture(scope="module")
def identity(store: Path) -> Identity:
    with LatentStore.open(store) as ours:
        return ours.identity


@pytest.fixture(scope="module")
def single(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model in a single file."""
    out = tmp_path_factory.mktemp("single") / "one.safetensors"
    assert train("export", model, out, "--format", "single-file") == 0
    return out


def spoil(path: Path, name: str, value: float = float("nan"), half: bool = False) -> Path:
    held = {key: x.half() if half else x.clone() for key, x in load_file(path).items()}
    held[name].view(-1)[-1] = value
    save_file(held, path, {"format": "pt"})
    return path


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("kind", BAD)
def test_a_folder_is_refused_by_its_tensor(
    model: Path, tmp_path: Path, identity: Identity, kind: str, half: bool
) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    file, name, _ = BAD[kind]
    spoil(copy / file, name, float("-inf"), half)
    with pytest.raises(UserError, match=f"/{kind}: {kind}'s {name} has 1 of .* that are nan or"):
        load_bundle(str(copy), None, identity)


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("kind", BAD)
def test_a_single_file_is_refused_by_both_names(
    single: Path, model: Path, tmp_path: Path, kind: str, pickled: bool
) -> None:
    path = tmp_path / ("one.ckpt" if pickled else "one.safetensors")
    ignored = shutil.ignore_patterns("*.safetensors")
    for part in BAD:
        shutil.copytree(model / part, tmp_path / part, ignore=ignored)
    _, name, theirs = BAD[kind]
    held = {key: value.clone() for key, value in load_file(single).items()}
    held[theirs].view(-1)[0] = float("nan")
    torch.save({"state_dict": held}, path) if pickled else save_file(held, path)
    parts = locate_model(str(path))
    told = re.escape(f"{kind}'s {name} ({theirs} in the file) has 1 of")
    with pytest.raises(UserError, match=told):
        build_network(getattr(parts, kind))
    with pytest.raises(UserError, match=told):  # as export reads it
        for stored in with_finite_check(getattr(parts, kind)).tensors.values():
            stored.read()


def test_parts_of_their_own_are_refused(model: Path, tmp_path: Path, identity: Identity) -> None:
    for kind, option in (("unet", "unet"), ("text_encoder", "text_encoder")):
        copy = Path(shutil.copytree(model / kind, tmp_path / kind))
        path = spoil(copy / Path(BAD[kind][0]).name, BAD[kind][1])
        with pytest.raises(UserError, match=f"{kind}'s {BAD[kind][1]} has 1 of"):
            load_bundle(str(model), None, identity, **{option: str(path)})  # type: ignore[arg-type]
    vae = Path(shutil.copytree(model / "vae", tmp_path / "vae"))
    spoil(vae / Path(VAE).name, BAD["vae"][1])
    with pytest.raises(UserError, match=f"{BAD['vae'][1]} has 1 of"):
        load_vae(str(vae))


def test_all_of_a_parts_bad_tensors_are_counted(model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    held = load_file(copy / UNET)
    names = [name for name in held if name.startswith("conv_")]
    save_file({k: v * float("nan") if k in names else v for k, v in held.items()}, copy / UNET)
    with pytest.raises(UserError, match=f"as do {len(names) - 1} more of its tensors"):
        build_network(locate_model(str(copy)).unet)


@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize(
    ("value", "dtype", "told"),
    [
        (float("nan"), "fp32", "unet's conv_in.weight has 1 of 576 values that are nan"),
        (float("inf"), "fp16", "unet's conv_in.weight has 1 of 576 values that are nan"),
        (-70000.0, "fp16", "conv_in.weight, 1 of 576 values, the largest 70000; use --dtype bf16"),
    ],
)  # fmt: skip
def test_export_refuses_by_name_and_leaves_nothing(
    model: Path, tmp_path: Path, capsys: Out, single: bool, value: float, dtype: str, told: str
) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    spoil(copy / UNET, "conv_in.weight", value)
    out = tmp_path / "out" / ("one.safetensors" if single else "folder")
    options = ("--format", "single-file") if single else ()
    assert train("export", copy, out, "--dtype", dtype, *options) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert told in line
    assert not list(out.parent.iterdir())


def stepped(open_run: Open, **settings: Any) -> Session:
    session = open_run(**settings)
    session.take_step([session.source.make(session.batch_order.slot(0))], 1e-3)
    return session


def save(session: Session, step: int) -> Path:
    optimizer, run = session.take_step.optimizer, session.run.folder
    return save_checkpoint(
        run, session.model, session.named, optimizer, {"step": step}, session.ema
    )


@pytest.mark.parametrize("where", ["weight", "state", "average", "number"])
def test_no_checkpoint_holds_what_is_not_finite(open_run: Open, where: str) -> None:
    session = stepped(open_run, ema=where == "average", optimizer="dlion")
    first = save(session, 1)
    name, parameter = next(iter(session.named.items()))
    optimizer = session.take_step.optimizer
    with torch.no_grad():
        if where == "weight":
            parameter.view(-1)[3] = float("nan")
            told = rf"{name} \(1 of {parameter.numel()} values\); nothing was saved"
        elif where == "state":
            optimizer.state[parameter]["exp_avg"].view(-1)[0] = float("inf")
            told = rf"{name}/exp_avg \(1 of"
        elif where == "average":
            assert session.ema
            session.ema.averages["0.10"][name].view(-1)[0] = float("nan")
            told = f"0.10/{name}"
        else:
            optimizer.param_groups[0]["d"] = float("inf")
            told = "the optimizer's d"
    with pytest.raises(UserError, match=told) as caught:
        save(session, 2)
    assert f"to resume from {first}" in str(caught.value)
    assert "a --d-max below the last d and --force" in str(caught.value)
    assert list((session.run.folder / "checkpoints").iterdir()) == [first]


def test_without_a_checkpoint_none_is_spoken_of(open_run: Open) -> None:
    session = stepped(open_run)
    next(iter(session.named.values())).data.fill_(float("nan"))
    with pytest.raises(UserError, match="start again with a lower --lr and another --out") as found:
        save(session, 1)
    assert "resume" not in str(found.value)
    assert checkpoints(session.run.folder) == []


def two_checkpoints(open_run: Open) -> Session:
    """A run as an older version may have left it: of two steps, with their snapshots."""
    session = open_run(ema=True)
    for step in (1, 2):
        session.take_step([session.source.make(session.batch_order.slot(step - 1))], 1e-3)
        session.average(step)
        save(session, step)
    keep_snapshots(session.run.folder, checkpoints(session.run.folder), 9)
    return session


def with_nan(path: Path, name: str) -> None:
    held = {key: value.clone() for key, value in load_file(path).items()}
    held[name].view(-1)[0] = float("nan")
    path.unlink()  # a snapshot has two names
    save_file(held, path, {"step": "2"})


def test_an_older_versions_checkpoint_is_refused_by_name(open_run: Open, store: Path) -> None:
    session = two_checkpoints(open_run)
    run = session.run.folder
    _, newest = checkpoints(run)
    remedy = f"remove {newest}"
    with_nan(newest / "optimizer.safetensors", "unet.conv_in.weight/exp_avg")
    with pytest.raises(UserError, match="unet.conv_in.weight/exp_avg has 1 of") as found:
        load_optimizer(newest, session.named, session.take_step.optimizer)
    assert remedy in str(found.value)
    with_nan(newest / "ema.safetensors", "0.05/unet.conv_in.weight")
    assert session.ema
    with pytest.raises(UserError, match="0.05/unet.conv_in.weight is not finite") as found:
        session.ema.load(newest)
    assert remedy in str(found.value)
    with_nan(newest / "unet.safetensors", "conv_in.weight")
    with pytest.raises(UserError, match="unet's conv_in.weight has 1 of") as found:
        open_run(out=run, ema=True, data=store)
    assert remedy in str(found.value)


def test_a_checkpoint_that_is_removed_as_told_leaves_the_one_before(open_run: Open) -> None:
    session = two_checkpoints(open_run)
    run = session.run.folder
    session.run.close()
    shutil.rmtree(checkpoints(run)[-1])
    again = open_run(out=run, ema=True)
    assert again.run.state()["step"] == 1
    again.run.close()
    lower = open_run(out=run, ema=True, lr=1e-7, force=True)  # what a save that fails advises
    assert lower.run.state()["step"] == 1


def test_a_snapshot_with_nan_is_named_by_ema(open_run: Open, tmp_path: Path, capsys: Out) -> None:
    run = two_checkpoints(open_run).run.folder
    snapshot = run / "ema/step-00000002.safetensors"
    with_nan(snapshot, "0.05/unet.conv_in.bias")
    capsys.readouterr()
    assert train("ema", run, tmp_path / "average", "--sigma-rel", 0.07) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{snapshot}: 0.05/unet.conv_in.bias has 1 of" in line
    assert not (tmp_path / "average").exists()
