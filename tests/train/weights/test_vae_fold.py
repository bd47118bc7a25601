from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from xlsd_cache.errors import UserError
from xlsd_train.weights.vae_fold import FOLDED, SD15_FACTOR, ChannelNormalisation, fold

SDXL = ChannelNormalisation((0.0,) * 4, (1 / 0.13025,) * 4)
PER_CHANNEL = ChannelNormalisation((0.4, -1.3, 2.5, -0.2), (7.1, 0.6, 12.0, 3.3))


def pair(vae: Path, trained: ChannelNormalisation) -> tuple[AutoencoderKL, AutoencoderKL]:
    """The VAE, and the one for loaders that know only 0.18215, in float64."""
    ours, folded = (AutoencoderKL.from_pretrained(vae).double() for _ in range(2))
    state = ours.state_dict()
    folded.load_state_dict({**state, **fold(state, trained, SD15_FACTOR)})
    return ours, folded


@pytest.mark.parametrize("trained", [SDXL, PER_CHANNEL])
def test_encoding_is_equal_in_mean_and_log_variance(
    vae: Path, trained: ChannelNormalisation
) -> None:
    ours, folded = pair(vae, trained)
    mean, std = (
        torch.tensor(x, dtype=torch.float64).view(-1, 1, 1) for x in (trained.mean, trained.std)
    )
    pixels = torch.rand(2, 3, 64, 96, dtype=torch.float64) * 2 - 1
    with torch.inference_mode():
        here, there = ours.encode(pixels).latent_dist, folded.encode(pixels).latent_dist
    assert torch.allclose(there.mean * SD15_FACTOR, (here.mean - mean) / std, rtol=0, atol=1e-12)
    expected = here.logvar - 2 * (std * SD15_FACTOR).log()
    assert torch.allclose(there.logvar, expected, rtol=0, atol=1e-12)
    assert not torch.allclose(there.mean, here.mean, atol=0.1)


@pytest.mark.parametrize("trained", [SDXL, PER_CHANNEL])
def test_decoding_is_equal(vae: Path, trained: ChannelNormalisation) -> None:
    ours, folded = pair(vae, trained)
    mean, std = (
        torch.tensor(x, dtype=torch.float64).view(-1, 1, 1) for x in (trained.mean, trained.std)
    )
    latents = torch.randn(2, 4, 8, 12, dtype=torch.float64)  # as the UNet gives them
    with torch.inference_mode():
        here = ours.decode(latents * std + mean).sample
        there = folded.decode(latents / SD15_FACTOR).sample
        unfolded = ours.decode(latents / SD15_FACTOR).sample
    assert torch.allclose(there, here, rtol=0, atol=1e-12)
    assert (unfolded - here).abs().max() > 0.1


def test_a_vae_that_has_the_factor_is_left_alone(vae: Path) -> None:
    state = AutoencoderKL.from_pretrained(vae).state_dict()
    same = ChannelNormalisation.of({"latent_channels": 4, "scaling_factor": SD15_FACTOR})
    assert same.is_factor(SD15_FACTOR)
    assert not SDXL.is_factor(SD15_FACTOR)
    assert not PER_CHANNEL.is_factor(SD15_FACTOR)
    for name, value in fold(state, same, SD15_FACTOR).items():
        assert torch.allclose(value, state[name].double(), rtol=1e-12)


def test_the_config_says_shift_and_factor() -> None:
    config = {"latent_channels": 2, "scaling_factor": 0.5, "shift_factor": 0.25}
    assert ChannelNormalisation.of(config) == ChannelNormalisation((0.25, 0.25), (2.0, 2.0))


def test_a_vae_without_these_layers_is_refused(vae: Path) -> None:
    state = AutoencoderKL.from_pretrained(vae).state_dict()
    del state[FOLDED[2]]
    with pytest.raises(UserError, match=r"no post_quant_conv.weight.*--format diffusers"):
        fold(state, SDXL, SD15_FACTOR)
