import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from tests.support import train
from tests.support.vaes import tiny
from xlsd_cache.store.reader import LatentStore
from xlsd_train.model.loading import load_bundle

Out = pytest.CaptureFixture[str]
PARTS = ("unet/diffusion_pytorch_model", "text_encoder/model")


@pytest.fixture
def theirs(model: Path, tmp_path: Path) -> Path:
    """A pipeline with another VAE, as SD1.5 is before."""
    copy = Path(shutil.copytree(model, tmp_path / "theirs"))
    shutil.rmtree(copy / "vae")
    tiny(copy / "vae")
    return copy


def test_the_merge_is_the_model_with_the_other_vae(
    theirs: Path, model: Path, vae: Path, store: Path, tmp_path: Path
) -> None:
    out = tmp_path / "merge"
    assert train("swap", out, "--model", theirs, "--vae", vae) == 0
    for part in PARTS:
        ours, before = (load_file(at / f"{part}.safetensors") for at in (out, theirs))
        assert all(torch.equal(value, before[name]) for name, value in ours.items())
    assert json.loads((out / "vae/config.json").read_text())["scaling_factor"] == 0.13025
    with LatentStore.open(store) as latents:  # training takes it as it is
        assert load_bundle(str(out), None, latents.identity).vae.scaling_factor == 0.13025
    pipeline = StableDiffusionPipeline.from_pretrained(out)
    assert pipeline.vae.config.scaling_factor == 0.13025


def test_a_single_file_vae_and_another_text_encoder(
    theirs: Path, model: Path, vae: Path, tmp_path: Path, capsys: Out
) -> None:
    shutil.copytree(model / "text_encoder", tmp_path / "te")
    state = load_file(tmp_path / "te/model.safetensors")
    save_file({name: value + 1 for name, value in state.items()}, tmp_path / "te/model.safetensors")
    out, file = tmp_path / "merge", vae / "diffusion_pytorch_model.safetensors"
    options = ("--model", theirs, "--vae", file, "--vae-scaling-factor", 0.13025)
    assert train("swap", out, *options, "--text-encoder", tmp_path / "te") == 0
    made = load_file(out / "text_encoder/model.safetensors")
    assert all(torch.equal(value, state[name] + 1) for name, value in made.items())


def test_a_longer_text_encoder_has_a_tokenizer_that_reads_as_much(
    theirs: Path, model: Path, vae: Path, tmp_path: Path
) -> None:
    """Diffusers' pipelines cut prompts to what the tokenizer's config says."""
    state = load_file(model / "text_encoder/model.safetensors")
    position = "text_model.embeddings.position_embedding.weight"
    state[position] = torch.randn(248, state[position].shape[1])
    save_file(state, tmp_path / "long.safetensors")
    out = tmp_path / "merge"
    options = ("--model", theirs, "--vae", vae, "--text-encoder", tmp_path / "long.safetensors")
    assert train("swap", out, *options) == 0
    pipeline = StableDiffusionPipeline.from_pretrained(out)
    assert pipeline.tokenizer.model_max_length == 248
    shown = pipeline.encode_prompt("cat " * 100, "cpu", 1, False)[0]
    assert shown.shape[1] == 248


def test_a_vae_file_that_does_not_say_its_factor_needs_it(
    theirs: Path, vae: Path, tmp_path: Path, capsys: Out
) -> None:
    file = tmp_path / "alone" / "vae.safetensors"
    file.parent.mkdir()
    shutil.copy(vae / "diffusion_pytorch_model.safetensors", file)
    options = ("--model", theirs, "--vae", file)
    assert train("swap", tmp_path / "new", *options) == 1
    assert "--vae-scaling-factor" in capsys.readouterr().err
    assert train("swap", tmp_path / "new", *options, "--vae-scaling-factor", 0.13025) == 1
    assert "cannot load the VAE" in capsys.readouterr().err  # it is smaller than SDXL's


def test_what_cannot_be_merged_is_refused(theirs: Path, tmp_path: Path, capsys: Out) -> None:
    assert train("swap", theirs, "--model", theirs) == 1
    assert "exists already" in capsys.readouterr().err
    assert train("swap", tmp_path / "new", "--model", theirs, "--vae", "nowhere") == 1
    assert "no VAE nowhere: no such file" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_what_a_run_made_of_its_latents_is_not_folded_into_another_vae(
    model: Path, vae: Path, store: Path, tmp_path: Path
) -> None:
    run, out = tmp_path / "run", tmp_path / "merge"
    options = ("--phase", "unet", "--batch", 4, "--data", store, "--model", model, "--steps", 1)
    assert train(*options, "--normalize-latents", "--sample-every", 0, "--out", run) == 0
    assert train("swap", out, "--model", run, "--vae", vae) == 0
    made, given = (load_file(x / "diffusion_pytorch_model.safetensors") for x in (out / "vae", vae))
    assert all(torch.equal(made[name], value) for name, value in given.items())
