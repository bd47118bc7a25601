from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler

from xlsd_cache import UserError
from xlsd_train.diffusion import add_noise, alphas_cumprod, loss_of_each


def test_the_schedule_is_sd15s_formula(model: Path) -> None:
    config = dict(DDPMScheduler.load_config(model / "scheduler"))
    abar = alphas_cumprod(config)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    assert abar.shape == (1000,)
    assert torch.allclose(abar.double(), torch.cumprod(1 - betas, 0), rtol=1e-5)


def test_noise_is_added_as_diffusers_adds_it(model: Path) -> None:
    scheduler = DDPMScheduler.from_pretrained(model / "scheduler")
    torch.manual_seed(0)
    latents, noise = torch.randn(2, 64, 4, 8, 8)
    t = torch.randint(0, 1000, (64,))
    noisy = add_noise(latents, noise, t, scheduler.alphas_cumprod)
    assert torch.equal(noisy, scheduler.add_noise(latents, noise, t))


def test_the_loss_is_the_mean_squared_error_of_each_sample() -> None:
    torch.manual_seed(0)
    epsilon, noise = torch.randn(2, 5, 4, 8, 8)
    each = loss_of_each(epsilon, noise)
    assert each.shape == (5,)
    assert torch.allclose(each.mean(), torch.nn.functional.mse_loss(epsilon, noise))
    assert loss_of_each(epsilon.bfloat16(), noise).dtype == torch.float32


def test_other_predictions_are_refused(model: Path) -> None:
    config = {**DDPMScheduler.load_config(model / "scheduler"), "prediction_type": "v_prediction"}
    with pytest.raises(UserError, match="prediction_type v_prediction"):
        alphas_cumprod(config)
