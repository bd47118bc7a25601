import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.vaes import tiny
from xlsd_cache.encoding.compatibility import load_vae_for
from xlsd_cache.encoding.vae import load_vae, tensors_sha256
from xlsd_cache.errors import UserError
from xlsd_cache.store.reader import LatentStore

WEIGHTS = "diffusion_pytorch_model.safetensors"


def test_one_vae_is_the_same_in_whatever_it_comes(model: Path, vae: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    AutoencoderKL.from_pretrained(vae).save_pretrained(half)
    state = {key: value.half().float() for key, value in load_file(half / WEIGHTS).items()}
    save_file(state, half / WEIGHTS, {"format": "pt"})
    folder = load_vae(str(vae))
    assert load_vae(str(model)).sha256 == folder.sha256  # a pipeline's folder
    assert load_vae(str(vae / WEIGHTS)).sha256 == folder.sha256  # a file next to its config.json
    assert load_vae(str(half)).sha256 != folder.sha256
    assert (folder.scaling_factor, folder.shift_factor, folder.channels) == (0.13025, 0.0, 4)
    assert all(weight.dtype == torch.float32 for weight in folder.model.parameters())
    assert not any(weight.requires_grad for weight in folder.model.parameters())


def test_half_precision_files_load_as_fp32_of_the_same_values(vae: Path, tmp_path: Path) -> None:
    shutil.copytree(vae, tmp_path / "vae")
    rounded = {key: value.half() for key, value in load_file(vae / WEIGHTS).items()}
    save_file(rounded, tmp_path / "vae" / WEIGHTS, {"format": "pt"})
    loaded = load_vae(str(tmp_path / "vae"))
    assert loaded.sha256 == tensors_sha256({k: v.float() for k, v in rounded.items()})


def test_autoencoder_tiny_gives_its_own_latents(tmp_path: Path) -> None:
    loaded = load_vae(str(tiny(tmp_path / "tiny")))
    x = torch.rand(2, 3, 64, 128) * 2 - 1
    with torch.inference_mode():
        assert torch.equal(loaded.encode(x), loaded.model.encode(x).latents)
        assert loaded.decode(loaded.encode(x)).shape == x.shape
    assert (loaded.class_name, loaded.scaling_factor) == ("AutoencoderTiny", 1.0)


def ldm_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' names of the SD and SDXL VAE in CompVis's latent-diffusion style."""
    attention = {
        "group_norm": "norm",
        "to_q": "q",
        "to_k": "k",
        "to_v": "v",
        "to_out.0": "proj_out",
    }
    out = {}
    for key, value in state.items():
        name = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        name = name.replace("mid_block.resnets.0", "mid.block_1")
        name = name.replace("mid_block.resnets.1", "mid.block_2")
        if "mid_block.attentions.0" in name:
            name = name.replace("mid_block.attentions.0", "mid.attn_1")
            for old, new in attention.items():
                name = name.replace(f"attn_1.{old}.", f"attn_1.{new}.")
            if value.dim() == 2:
                value = value[:, :, None, None]
        for i in range(4):
            name = name.replace(f"down_blocks.{i}.resnets", f"down.{i}.block")
            name = name.replace(f"down_blocks.{i}.downsamplers.0", f"down.{i}.downsample")
            name = name.replace(f"up_blocks.{i}.resnets", f"up.{3 - i}.block")
            name = name.replace(f"up_blocks.{i}.upsamplers.0", f"up.{3 - i}.upsample")
        out[name] = value.contiguous()
    return out


def test_a_single_file_in_the_original_layout_needs_only_its_scaling_factor(tmp_path: Path) -> None:
    torch.manual_seed(0)
    full = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
    )
    assert sum(weight.numel() for weight in full.parameters()) == 83_653_863
    expected = tensors_sha256(full.state_dict())
    file = tmp_path / "sdxl_vae.safetensors"
    save_file(ldm_names(full.state_dict()), file)
    with pytest.raises(UserError, match="--vae-scaling-factor"):
        load_vae(str(file))
    loaded = load_vae(str(file), scaling_factor=0.13025)
    assert loaded.sha256 == expected
    assert loaded.scaling_factor == 0.13025
    save_file(dict(list(ldm_names(full.state_dict()).items())[:50]), file)
    with pytest.raises(UserError, match="lacks weights"):
        load_vae(str(file), scaling_factor=0.13025)


def test_the_name_sdxl_is_the_hubs_repository(vae: Path, photos: Path, tmp_path: Path) -> None:
    """With a hub cache as the hub's own client lays it out, and no network."""
    repository = tmp_path / "hub" / "models--stabilityai--sdxl-vae"
    commit = "0" * 40
    shutil.copytree(vae, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}

    def build(name: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "xlsd_cache", "build", "--vae", name, "--resolution", "128"],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip

    shutil.copytree(photos, tmp_path / "images")  # the default source
    done = build("sdxl")
    assert done.returncode == 0, done.stderr
    with LatentStore.open(tmp_path / "latents") as store:  # the default store
        assert store.identity.vae_name == "sdxl"
        assert store.identity.vae_source == "stabilityai/sdxl-vae"


def test_a_folder_that_lacks_weights_is_refused(vae: Path, tmp_path: Path) -> None:
    shutil.copytree(vae, tmp_path / "vae")
    state = load_file(vae / WEIGHTS)
    state.pop("quant_conv.weight")
    save_file(state, tmp_path / "vae" / WEIGHTS, {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks weights, quant_conv\.weight"):
        load_vae(str(tmp_path / "vae"))


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("nothing", "nothing: no such file or directory; give one of sdxl"),
        ("./a/b", "./a/b: no such file or directory"),
        ("weights.ckpt", "can run code"),
        ("empty", "cannot load the VAE"),
        ("unet", "UNet2DConditionModel, which is no VAE"),
        ("broken.safetensors", "cannot load the VAE"),
    ],
)
def test_what_is_no_vae_is_refused_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Path, spec: str, told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.ckpt").write_bytes(b"pickle")
    (tmp_path / "empty").mkdir()
    shutil.copytree(model / "unet", tmp_path / "unet")
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(UserError, match=told) as error:
        load_vae(spec, scaling_factor=1.0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"layers_per_block": 10**9}, {"layers_per_block": "two"}, {"block_out_channels": [10**9]},
        {"block_out_channels": "many"}, {"norm_num_groups": 0}, {"in_channels": {}},
        {"down_block_types": ["os.system"]}, {"quantization_config": {"load_in_4bit": True}},
        {"act_fn": ["silu"] * 10**5}, {"scaling_factor": [1]}, {"scaling_factor": 0},
        {"shift_factor": float("nan")},
    ],
    ids=str,
)  # fmt: skip
def test_a_config_that_makes_no_vae_is_one_sentence(
    vae: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    """Whatever a stranger wrote there; nothing is built for ever, and no code is looked for."""
    copy = shutil.copytree(vae, tmp_path / "vae")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError) as error:
        load_vae(str(copy))
    assert "\n" not in str(error.value)


def test_a_stores_vae_is_known_by_its_weights(store: Path, vae: Path, tmp_path: Path) -> None:
    with LatentStore.open(store) as ours:
        assert load_vae_for(ours.identity).sha256 == ours.identity.vae_sha256
        shutil.copytree(vae, tmp_path / "copy")
        assert (
            load_vae_for(ours.identity, str(tmp_path / "copy")).sha256 == ours.identity.vae_sha256
        )
        with pytest.raises(UserError, match="its encoder half"):
            load_vae_for(ours.identity, str(tiny(tmp_path / "tiny")))


def test_the_shipped_vae_says_what_it_is() -> None:
    from benchmarks.demo.pipeline import VAE

    assert sum(path.stat().st_size for path in VAE.iterdir()) < 2 * 2**20
    assert json.loads((VAE / "config.json").read_text())["scaling_factor"] == 0.13025
