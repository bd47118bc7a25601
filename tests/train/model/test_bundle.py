import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from benchmarks.demo.pipeline import make_pipeline
from tests.support import train
from tests.support.vaes import tiny
from xlsd_cache.errors import UserError
from xlsd_cache.store.reader import Identity, LatentStore
from xlsd_train.model.loading import load_bundle

UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT_ENCODER = "text_encoder/model.safetensors"


@pytest.fixture(scope="module")
def identity(store: Path) -> Identity:
    with LatentStore.open(store) as ours:
        return ours.identity


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    """A pipeline folder to be spoilt."""
    return Path(shutil.copytree(model, tmp_path / "copy"))


def test_a_pipeline_folder_loads_every_weight_as_it_is(model: Path, identity: Identity) -> None:
    loaded = load_bundle(str(model), None, identity)
    for name, file in (("unet", UNET), ("text_encoder", TEXT_ENCODER)):
        on_disk = load_file(model / file)
        assert on_disk.keys() == loaded.weights(name).keys()
        assert all(torch.equal(value, on_disk[key]) for key, value in loaded.weights(name).items())
    assert loaded.tokens == 77
    assert loaded.vae.sha256 == identity.vae_sha256


def test_half_precision_pipelines_train_in_fp32(copy: Path, identity: Identity) -> None:
    for file in (UNET, TEXT_ENCODER):
        half = {key: value.half() for key, value in load_file(copy / file).items()}
        save_file(half, copy / file, {"format": "pt"})
    config = json.loads((copy / "text_encoder/config.json").read_text())
    config["dtype"] = "float16"
    (copy / "text_encoder/config.json").write_text(json.dumps(config))
    loaded = load_bundle(str(copy), None, identity)
    for part in (loaded.unet, loaded.text_encoder):
        assert {value.dtype for value in part.parameters()} == {torch.float32}


def test_weights_have_sd15s_names(tmp_path: Path, identity: Identity) -> None:
    """The preset with exactly SD1.5's key sets: 686 of the UNet, 196 of the text encoder."""
    make_pipeline(tmp_path / "keys", "keys", ["a cat"])
    loaded = load_bundle(str(tmp_path / "keys"), None, identity)
    unet, text_encoder = loaded.weights("unet"), loaded.weights("text_encoder")
    assert (len(unet), len(text_encoder)) == (686, 196)
    assert "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight" in unet
    assert all(name.startswith("text_model.") for name in text_encoder)
    assert "text_model.encoder.layers.11.self_attn.q_proj.weight" in text_encoder
    assert "text_model.final_layer_norm.weight" in text_encoder


def test_a_checkpoint_of_ours_is_a_model(model: Path, store: Path, tmp_path: Path) -> None:
    """A UNet run, then a text encoder run on it: each part comes from where it was trained."""
    common = ("--batch", 4, "--data", store, "--sample-every", 0, "--lr", 1e-3, "--warmup", 0)
    first, second = tmp_path / "unet", tmp_path / "te"
    assert train("--phase", "unet", "--steps", 2, "--model", model, "--out", first, *common) == 0
    checkpoint = first / "checkpoints" / "step-00000002"
    assert (
        train("--phase", "te", "--steps", 2, "--model", checkpoint, "--out", second, *common) == 0
    )
    with LatentStore.open(store) as ours:
        last = load_bundle(str(second), None, ours.identity)  # a run is its newest checkpoint
    trained = load_file(checkpoint / "unet.safetensors")
    assert all(torch.equal(value, trained[key]) for key, value in last.weights("unet").items())
    initial = load_file(model / TEXT_ENCODER)
    changed = [k for k, v in last.weights("text_encoder").items() if not torch.equal(v, initial[k])]
    assert len(changed) > 20
    # What is frozen takes no space a checkpoint: it is the same file.
    frozen = second / "checkpoints" / "step-00000002" / "unet.safetensors"
    assert frozen.stat().st_ino == (second / "base" / "unet.safetensors").stat().st_ino
    loaded = UNet2DConditionModel.from_config(
        UNet2DConditionModel.load_config(second / "base/unet")
    )
    loaded.load_state_dict(load_file(frozen))


def test_another_vae_is_refused_unless_the_stores_is_swapped_in(
    copy: Path, model: Path, identity: Identity
) -> None:
    """An SD1.5 with its own VAE, and a store of another: the article's starting point."""
    shutil.rmtree(copy / "vae")
    tiny(copy / "vae")
    with pytest.raises(UserError, match="its encoder half .* but they were encoded with") as error:
        load_bundle(str(copy), None, identity)
    assert "add --vae" in str(error.value)
    assert load_bundle(str(copy), str(model), identity).vae.sha256 == identity.vae_sha256
    with pytest.raises(UserError, match="its encoder half"):
        load_bundle(str(copy), str(copy), identity)


@pytest.mark.slow
def test_the_default_model_is_the_hubs_sd15_with_the_stores_vae(
    model: Path, store: Path, tmp_path: Path
) -> None:
    """`xlsd-train --phase unet --batch 4` alone, with a hub cache as the hub's client has it."""
    repository = tmp_path / "hub" / "models--stable-diffusion-v1-5--stable-diffusion-v1-5"
    commit = "1" * 40
    ignored = shutil.ignore_patterns("vae")
    shutil.copytree(model, repository / "snapshots" / commit, ignore=ignored)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(store, tmp_path / "latents")
    done = subprocess.run(
        [sys.executable, "-m", "xlsd_train", "--phase", "unet", "--batch", "4", "--stop-after", "1",
         "--sample-every", "0"],
        env={**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("unet-")
    assert (run / "checkpoints/step-00000001/unet.safetensors").exists()
    assert "planned 1000000 steps" in done.stderr
    assert "warm-up over 200 steps to 5e-06" in done.stderr


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        ("gone", "no model"),
        ("empty", "is no model"),
        ("truncated", "truncated or damaged"),
        ("missing", "lacks 1 weights, e.g. conv_in.weight"),
        ("no tokenizer", "cannot load the model"),
        ("channels", "takes 9 latent channels and the store holds 4"),
    ],
)
def test_what_is_no_model_is_refused_in_one_sentence(
    copy: Path, identity: Identity, spoil: str, told: str
) -> None:
    if spoil == "gone":
        copy = copy / "nothing"
    elif spoil == "empty":
        copy = copy / "scheduler"
    elif spoil == "truncated":
        (copy / UNET).write_bytes((copy / UNET).read_bytes()[:-1000])
    elif spoil == "missing":
        state = load_file(copy / UNET)
        state.pop("conv_in.weight")
        save_file(state, copy / UNET, {"format": "pt"})
    elif spoil == "no tokenizer":
        shutil.rmtree(copy / "tokenizer")
    else:
        unet = UNet2DConditionModel.load_config(copy / "unet")
        UNet2DConditionModel.from_config({**unet, "in_channels": 9}).save_pretrained(copy / "unet")
    with pytest.raises(UserError, match=told) as error:
        load_bundle(str(copy), None, identity)
    assert "\n" not in str(error.value)


def test_dropout_is_refused(copy: Path, identity: Identity) -> None:
    config = json.loads((copy / "text_encoder/config.json").read_text())
    config["attention_dropout"] = 0.1
    (copy / "text_encoder/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="has dropout"):
        load_bundle(str(copy), None, identity).prepare("unet")


def test_saved_text_encoders_load_in_transformers(
    model: Path, identity: Identity, tmp_path: Path
) -> None:
    loaded = load_bundle(str(model), None, identity)
    loaded.text_encoder.config.save_pretrained(tmp_path)
    save_file(loaded.weights("text_encoder"), tmp_path / "model.safetensors", {"format": "pt"})
    again, told = CLIPTextModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not told["missing_keys"]
    for name, value in again.named_parameters():
        assert torch.equal(value, loaded.text_encoder.get_parameter(name))


def test_patterns_choose_what_trains_and_freeze_the_rest(model: Path, identity: Identity) -> None:
    loaded = load_bundle(str(model), None, identity)
    named = loaded.prepare("unet", "unet.attn2,unet.conv_in")
    every = {f"unet.{name}" for name, _ in loaded.unet.named_parameters()}
    wanted = {name for name in every if ".attn2." in name or name.startswith("unet.conv_in.")}
    assert named.keys() == wanted
    assert 2 < len(wanted) < len(every) / 2
    for part in ("unet", "text_encoder"):
        for name, parameter in getattr(loaded, part).named_parameters():
            assert parameter.requires_grad == (f"{part}.{name}" in wanted)
    te = loaded.prepare("te", "text_encoder.text_model.encoder.layers.0,text_encoder.layers.1")
    assert {name.split(".")[3] for name in te} == {"0", "1"}
    with pytest.raises(UserError, match="--train unet.attn3 matches no parameter; did you mean"):
        loaded.prepare("unet", "unet.attn3")


@pytest.mark.parametrize("given", ["model", "vae"])
def test_a_vae_that_scales_otherwise_than_the_store_says_is_refused(
    model: Path, identity: Identity, tmp_path: Path, given: str
) -> None:
    """The same weights and another factor: training would see other latents, in silence."""
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    config = json.loads((copy / "vae/config.json").read_text())
    (copy / "vae/config.json").write_text(json.dumps({**config, "scaling_factor": 0.18215}))
    spec, vae = (copy, None) if given == "model" else (model, str(copy / "vae"))
    with pytest.raises(UserError, match=r"scaling factor is 0\.18215 .*, and the store's 0\.13025"):
        load_bundle(str(spec), vae, identity)
