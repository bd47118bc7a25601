"""A model as latent-diffusion's single file: all names and shapes; nothing is read here."""

from typing import Any

import torch
from diffusers import DDPMScheduler

from xlsd_train import names
from xlsd_train.network import POSITIONS, Part, empty, ldm_names
from xlsd_train.tensors import Stored, in_memory

_PREFIX = {"unet": names.UNET, "vae": names.VAE, "text_encoder": names.TEXT_ENCODER}


def single_file(
    unet: Part, text_encoder: Part, vae: Part, scheduler: dict[str, Any], dtype: torch.dtype
) -> dict[str, Stored]:
    """The tensors of v1-5-pruned-emaonly.safetensors but its two counters of a moving average.

    Networks in `dtype`; what is no network stays as it is: the text encoder's position_ids and the
    noise schedule, which other programs make themselves or take from here.
    """
    tensors: dict[str, Stored] = {}
    for part in (unet, text_encoder, vae):
        for name, (key, _) in ldm_names(part.kind, empty(part.kind, part.config)).items():
            stored = part.tensors[name].to(dtype)
            if part.kind == "vae" and names.is_vae_conv(name):
                stored = stored.reshaped(*stored.shape, 1, 1)
            tensors[_PREFIX[part.kind] + key] = stored
    positions = text_encoder.tensors[POSITIONS].shape[0]
    ids = torch.arange(positions).view(1, -1)
    tensors[f"{names.TEXT_ENCODER}text_model.embeddings.position_ids"] = in_memory(ids)
    return tensors | {name: in_memory(value) for name, value in schedule(scheduler).items()}


def schedule(scheduler: dict[str, Any]) -> dict[str, torch.Tensor]:
    """LDM's buffers of a noise schedule, f32 [T] each, from diffusers' config of it.

    Its register_schedule (ddpm.py) after Ho, Jain, Abbeel 2020, arXiv 2006.11239: posterior
    variance and mean are eq. 6 and 7.
    """
    made: Any = DDPMScheduler.from_config(scheduler)
    beta = made.betas.double()  # from here in f64: 1 - bar is small at first
    bar = (1 - beta).cumprod(0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), bar[:-1]])
    variance = beta * (1 - before) / (1 - bar)
    buffers = {
        "betas": beta,
        "alphas_cumprod": bar,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": bar.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - bar).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - bar).log(),
        "sqrt_recip_alphas_cumprod": (1 / bar).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / bar - 1).sqrt(),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
        "posterior_mean_coef1": beta * before.sqrt() / (1 - bar),
        "posterior_mean_coef2": (1 - before) * (1 - beta).sqrt() / (1 - bar),
    }
    return {name: value.float() for name, value in buffers.items()}
