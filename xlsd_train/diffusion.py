"""The diffusion itself. Pure: latents, noise and timesteps in, noisy latents and loss out.

DDPM (Ho, Jain, Abbeel 2020, arXiv 2006.11239): x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) epsilon
(eq. 4), trained by the plain mean squared error of the predicted epsilon (eq. 14).
"""

from typing import Any

from diffusers import DDPMScheduler
from torch import Tensor

from xlsd_cache import UserError


def alphas_cumprod(scheduler_config: dict[str, Any]) -> Tensor:
    """abar_t, f32 [T], of the model's own noise schedule; SD1.5's betas are scaled_linear.

    Raises UserError for a model that predicts something else than epsilon.
    """
    prediction = scheduler_config.get("prediction_type", "epsilon")
    if prediction != "epsilon":
        raise UserError(
            f"the model's scheduler says prediction_type {prediction}; only epsilon is trained "
            f"here: give an epsilon model as --model"
        )
    scheduler: Any = DDPMScheduler.from_config(scheduler_config)
    abar: Tensor = scheduler.alphas_cumprod
    return abar


def add_noise(latents: Tensor, noise: Tensor, timesteps: Tensor, abar: Tensor) -> Tensor:
    """x_t of scaled latents [B, C, h, w] at timesteps [B] (eq. 4)."""
    at = abar[timesteps].view(-1, 1, 1, 1)
    return at.sqrt() * latents + (1 - at).sqrt() * noise


def loss_of_each(epsilon: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error of each sample, f32 [B] (eq. 14)."""
    return (epsilon.float() - noise).square().mean(dim=(1, 2, 3))
