"""Training with a VAE whose decoder was fine-tuned, and with one that pads by reflection."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support import cache, printed, train
from tests.support.sessions import Open
from tests.support.stores import older
from tests.support.vaes import changed
from xlsd_cache.encoding.vae import load_vae
from xlsd_cache.errors import UserError
from xlsd_cache.store.reader import LatentStore
from xlsd_train.data.mixture import open_mixture
from xlsd_train.evaluation.images import pipeline_of
from xlsd_train.model.loading import load_bundle
from xlsd_train.weights.locate import locate_model

VAE = "vae/diffusion_pytorch_model.safetensors"
COMMON = ("--phase", "unet", "--batch", 4, "--sample-every", 0, "--threads", 1)


def with_vae(model: Path, vae: Path, target: Path) -> Path:
    """A pipeline folder with another VAE."""
    shutil.copytree(model, target, ignore=shutil.ignore_patterns("vae"))
    shutil.copytree(vae, target / "vae")
    return target


@pytest.fixture
def new(vae: Path, tmp_path: Path) -> Path:
    """The VAE with another decoder."""
    return changed(vae, tmp_path / "new", "decoder.")


def test_a_models_own_decoder_draws_its_samples(
    model: Path, new: Path, store: Path, tmp_path: Path, open_run: Open,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    theirs = with_vae(model, new, tmp_path / "model")
    caplog.set_level("INFO", logger="xlsd")
    session = open_run(model=str(theirs))
    assert session.model.vae.sha256 == load_vae(str(new)).sha256
    assert "the decoder of" in caplog.text
    with LatentStore.open(store) as ours:
        assert (
            load_bundle(str(model), str(new), ours.identity).vae.sha256 == session.model.vae.sha256
        )
        other = with_vae(model, changed(new, tmp_path / "other", "quant_conv."), tmp_path / "bad")
        with pytest.raises(UserError, match=r"its encoder half \(encoder and quant_conv\)"):
            load_bundle(str(other), None, ours.identity)


def test_a_run_keeps_its_decoder_and_export_and_swap_take_another(
    model: Path, new: Path, vae: Path, store: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    theirs, run = with_vae(model, new, tmp_path / "model"), tmp_path / "run"
    given = (*COMMON, "--model", theirs, "--data", store, "--out", run, "--normalize-latents")
    assert train(*given, "--steps", 2, "--stop-after", 1) == 0
    assert train(*given, "--steps", 2) == 0
    newer = changed(vae, tmp_path / "newer", "post_quant_conv.")
    expected = {"own": load_file(new / VAE[4:]), "given": load_file(newer / VAE[4:])}
    assert train("export", run, tmp_path / "own") == 0
    assert train("export", run, tmp_path / "given", "--vae", newer) == 0
    assert train("swap", tmp_path / "swapped", "--model", run, "--vae", newer) == 0
    convs = ("quant_conv", "post_quant_conv")
    normalised = {f"{conv}.{kind}" for conv in convs for kind in ("weight", "bias")}
    # As swap's purpose is to begin training, what the run made of latents is not folded there.
    for name, of, folded in (
        ("own", "own", normalised), ("given", "given", normalised), ("swapped", "given", set())
    ):  # fmt: skip
        found = load_file(tmp_path / name / VAE)
        assert {
            k for k, value in found.items() if not torch.equal(value, expected[of][k])
        } == folded
    other = changed(vae, tmp_path / "other", "encoder.")
    capsys.readouterr()
    assert train("export", run, tmp_path / "bad", "--vae", other) == 1
    assert "has another encoder half" in capsys.readouterr().err
    assert not (tmp_path / "bad").exists()
    assert train("swap", tmp_path / "fresh", "--model", run, "--vae", other) == 0
    found = load_file(tmp_path / "fresh" / VAE)
    assert all(torch.equal(v, found[k]) for k, v in load_file(other / VAE[4:]).items())


def test_a_run_on_an_older_store_goes_on_and_its_encoder_becomes_known(
    model: Path, new: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, run = older(store, tmp_path / "latents", vae_source=tmp_path / "gone"), tmp_path / "run"
    given = (*COMMON, "--data", out, "--steps", 2)
    theirs = with_vae(model, new, tmp_path / "model")
    assert train(*given, "--model", theirs, "--out", tmp_path / "never") == 1
    assert "is not known: an older version built that store" in capsys.readouterr().err
    assert train(*given, "--model", model, "--out", run, "--stop-after", 1) == 0
    assert (out / "manifest" / "encoder.json").is_file()
    assert train(*given, "--model", model, "--out", run) == 0  # the fingerprint is as it was
    assert train(*given, "--model", theirs, "--out", tmp_path / "now", "--dry-run") == 0


def test_older_runs_know_the_whole_vae_alone(
    model: Path, new: Path, vae: Path, store: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    given = (*COMMON, "--model", model, "--data", store, "--normalize-latents", "--steps", 1)
    assert train(*given, "--out", run) == 0
    path = run / "base" / "latents.json"
    told = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in told.items() if k != "encoder_sha256"}))
    with LatentStore.open(store) as ours:
        loaded = load_bundle(str(run), str(new), ours.identity)
        assert loaded.scaling.normalized
        assert loaded.vae.sha256 == load_vae(str(new)).sha256


def test_stores_of_one_encoder_are_mixed_whatever_their_decoders(
    new: Path, vae: Path, store: Path, photos: Path, tmp_path: Path
) -> None:
    build = ("build", photos, "--resolution", 128, "--batch", 4, "--out")
    later, reflected = tmp_path / "later", tmp_path / "reflected"
    assert cache(*build, later, "--vae", new) == 0
    old = older(store, tmp_path / "old")
    lost = older(store, tmp_path / "lost", vae_source=tmp_path / "gone")
    with pytest.raises(UserError, match=f"encoder of {lost} is not known"):
        open_mixture([str(later), str(lost)])
    for stores in ([store, later], [old, later], [later, old], [later, store, lost]):
        with open_mixture([str(path) for path in stores]) as mixed:
            assert len(mixed) == 8 * len(stores)
            assert mixed.identity.encoder_sha256
    (old / "manifest" / "encoder.json").unlink()
    with open_mixture([str(old), str(store)]) as mixed:  # one says it for both
        assert mixed.identity.encoder_sha256 == load_vae(str(vae)).encoder_sha256
    assert cache(*build, reflected, "--vae", vae, "--vae-padding", "reflect") == 0
    with pytest.raises(UserError, match=r"vae_padding zeros.*\(reflect\); their latents must not"):
        open_mixture([str(store), str(reflected)])


def test_a_reflecting_stores_runs_draw_with_reflection_and_exports_say_so(
    model: Path, vae: Path, store: Path, photos: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out, run = tmp_path / "latents", tmp_path / "run"
    build = ("build", photos, "--resolution", 128, "--batch", 4, "--out", out, "--vae", vae)
    assert cache(*build, "--vae-padding", "reflect") == 0
    with LatentStore.open(out) as ours:
        for own in (None, str(vae)):
            modules = pipeline_of(load_bundle(str(model), own, ours.identity)).vae.modules()
            convs = [m for m in modules if isinstance(m, torch.nn.Conv2d) and any(m.padding)]
            assert convs
            assert {conv.padding_mode for conv in convs} == {"reflect"}
    given = (*COMMON, "--model", model, "--data", out, "--out", run, "--steps", 1)
    assert train(*given) == 0
    assert locate_model(str(run)).vae_padding == "reflect"
    with LatentStore.open(out) as ours:
        assert load_bundle(str(run), None, ours.identity).vae.padding == "reflect"
    with LatentStore.open(store) as ours, pytest.raises(UserError, match="that pads with reflect"):
        load_bundle(str(run), None, ours.identity)
    capsys.readouterr()
    assert train("export", run, tmp_path / "exported") == 0
    assert "set padding_mode to reflect in the program" in printed(capsys)
    assert "padding_mode" in (tmp_path / "exported" / "README.md").read_text()
    assert train("export", model, tmp_path / "plain") == 0
    assert "padding_mode" not in printed(capsys)
