import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file
from scipy.linalg import orthogonal_procrustes  # type: ignore[import-untyped]
from torch import nn

from tests.support import train
from xlsd_train.align import FOLDED, Rotation
from xlsd_train.diffusion import alphas_cumprod
from xlsd_train.sd15 import SCHEDULER

Out = pytest.CaptureFixture[str]
UNET = "unet/diffusion_pytorch_model.safetensors"


def turned(seed: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """A random rotation of four channels."""
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(4, 4)))[0]


def test_a_known_rotation_is_found_and_a_noisy_one_is_scipys() -> None:
    rng, turn, shift = np.random.default_rng(0), turned(1), np.array([0.5, -1.0, 2.0, 0.1])
    new = rng.normal(size=(500, 4)) * [1.0, 0.5, 2.0, 0.7] + [3.0, 0.0, -1.0, 0.2]
    old = new @ turn.T + shift
    found = Rotation.fit(old, new)
    assert np.allclose(found.turn, turn, atol=1e-12)
    assert np.allclose(found.shift, shift, atol=1e-12)
    assert np.allclose(found.r2(old, new), 1)
    noisy = old + rng.normal(size=old.shape)
    theirs, _ = orthogonal_procrustes(new - new.mean(axis=0), noisy - noisy.mean(axis=0))
    assert np.allclose(Rotation.fit(noisy, new).turn, theirs.T, atol=1e-12)


def test_the_fold_is_the_rotation_around_the_network() -> None:
    torch.manual_seed(0)
    old, new = (
        nn.ModuleDict({"conv_in": nn.Conv2d(4, 8, 3, padding=1), "conv_out": nn.Conv2d(8, 4, 3)})
        .double()
        .requires_grad_(False)
        for _ in range(2)
    )
    rotation = Rotation(turned(2), np.array([0.3, -0.2, 0.1, 1.0]))
    signal = 0.6
    new.load_state_dict(rotation.fold(old.state_dict(), signal))
    assert set(old.state_dict()) == set(FOLDED)
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    turn = torch.from_numpy(rotation.turn)
    familiar = torch.einsum("ij,bjhw->bihw", turn, x)
    familiar += signal * torch.from_numpy(rotation.shift).view(-1, 1, 1)
    inside = (..., slice(1, -1), slice(1, -1))  # at the edge padding is 0, not the shift
    assert torch.allclose(
        new["conv_in"](x)[inside], old["conv_in"](familiar)[inside], atol=1e-12, rtol=0
    )
    seen = torch.randn(2, 8, 9, 9, dtype=torch.float64)
    back = torch.einsum("ij,bihw->bjhw", turn, old["conv_out"](seen))
    assert torch.allclose(new["conv_out"](seen), back, atol=1e-12, rtol=0)


@pytest.fixture
def other(model: Path, tmp_path: Path) -> Path:
    """The model's VAE, its latents turned: what the first gives, by a rotation and no more."""
    out = Path(shutil.copytree(model / "vae", tmp_path / "other"))
    vae = AutoencoderKL.from_pretrained(out)
    turn = torch.from_numpy(turned(3)).float()
    both = torch.eye(8)
    both[:4, :4] = turn
    both = both.view(8, 8, 1, 1)
    with torch.no_grad():
        quant, post = vae.quant_conv, vae.post_quant_conv
        quant.weight.copy_(torch.einsum("ijxy,jkxy->ikxy", both, quant.weight))
        quant.bias.copy_(both[:, :, 0, 0] @ quant.bias)
        post.weight.copy_(torch.einsum("ijxy,kj->ikxy", post.weight, turn))
    vae.save_pretrained(out)
    return out


@pytest.fixture
def images(photos: Path, tmp_path: Path) -> Path:
    """Three times the photos, and a file that is none."""
    for copy in "abc":
        shutil.copytree(photos, tmp_path / "images" / copy)
    (tmp_path / "images" / "broken.jpg").write_bytes(b"nothing")
    return tmp_path / "images"


def test_a_vae_that_is_but_turned_is_met_wholly(
    model: Path, other: Path, images: Path, tmp_path: Path, capsys: Out
) -> None:
    out = tmp_path / "aligned"
    given = ("--model", model, "--vae", other, "--images", images, "--device", "cpu")
    assert train("align", out, *given) == 0
    said = capsys.readouterr()
    assert "variance 1.000 1.000 1.000 1.000" in said.out
    assert "fitted on 12 images; on 12 others" in said.out
    assert "broken.jpg is left out" in said.out + said.err
    # What it draws on turned latents is what the old model draws on its own, turned.
    ours, theirs = (UNet2DConditionModel.from_pretrained(at / "unet") for at in (out, model))
    x, states = torch.randn(2, 4, 8, 8), torch.randn(2, 77, theirs.config.cross_attention_dim)
    turn = torch.from_numpy(turned(3)).float()
    with torch.no_grad():
        before = theirs(x, torch.tensor([10, 700]), states).sample
        after = ours(torch.einsum("ij,bjhw->bihw", turn, x), torch.tensor([10, 700]), states).sample
    assert torch.allclose(after, torch.einsum("ij,bjhw->bihw", turn, before), atol=1e-4)
    # All else is what swap writes.
    assert train("swap", tmp_path / "swapped", "--model", model, "--vae", other) == 0
    swapped, aligned = (load_file(at / UNET) for at in (tmp_path / "swapped", out))
    differ = {name for name in swapped if not torch.equal(swapped[name], aligned[name])}
    assert differ == {"conv_in.weight", "conv_in.bias", "conv_out.weight", "conv_out.bias"}


def test_the_losses_are_of_the_two_models_and_most_limits_the_images(
    model: Path, other: Path, images: Path, tmp_path: Path, capsys: Out
) -> None:
    given = ("--model", model, "--vae", other, "--images", images, "--most", 16)
    (images / "broken.jpg").unlink()
    assert train("align", tmp_path / "one", *given) == 0
    first = capsys.readouterr().out
    assert "fitted on 8 images; on 8 others" in first
    told = re.search(r"fixed noise: (\S+) by swap, (\S+) by align", first)
    assert told is not None
    # A model that is aligned already is told the same loss again, now as what a swap would give,
    # where the VAE that it is given is the one that it was aligned to, a bit apart.
    near = Path(shutil.copytree(other, tmp_path / "near"))
    vae = AutoencoderKL.from_pretrained(near)
    with torch.no_grad():
        vae.quant_conv.bias[0] += 1e-6
    vae.save_pretrained(near)
    given = ("--model", tmp_path / "one", "--vae", near, "--images", images, "--most", 16)
    assert train("align", tmp_path / "two", *given) == 0
    again = re.search(r"fixed noise: (\S+) by swap, (\S+) by align", capsys.readouterr().out)
    assert again is not None
    assert float(again[1]) == pytest.approx(float(told[2]), abs=2e-4)


def test_what_cannot_be_aligned_is_refused(
    model: Path, vae: Path, other: Path, photos: Path, tmp_path: Path, capsys: Out
) -> None:
    predicts_v = Path(shutil.copytree(model, tmp_path / "v"))
    path = predicts_v / "scheduler/scheduler_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "prediction_type": "v_prediction"}))
    many = tmp_path / "many"
    for copy in "ab":
        shutil.copytree(photos, many / copy)
    for words, told in (
        (("--vae", other, "--images", tmp_path / "none"), "is no folder"),
        (("--vae", other, "--images", photos), "holds 8 images; give 16 or more"),
        (("--vae", vae, "--images", many), "already; there is nothing to do"),
        (("--vae", other, "--images", many, "--model", predicts_v), "predicts v and align is for"),
        (("--vae", other, "--images", many, "--most", 2), "--most 2 is too few"),
    ):
        given = words if "--model" in words else (*words, "--model", model)
        assert train("align", tmp_path / "out", *given) == 1
        assert told in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_the_shift_is_weighted_by_the_mean_signal() -> None:
    """SD1.5's; what a bias can give is but the mean of what timesteps need."""
    assert float(alphas_cumprod(dict(SCHEDULER)).sqrt().mean()) == pytest.approx(0.5, abs=0.1)
