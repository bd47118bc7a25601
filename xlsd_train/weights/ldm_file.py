"""A model as latent-diffusion's single file: all names and shapes; nothing is read here."""

from typing import Any

import torch
from diffusers import DDPMScheduler

from xlsd_train.weights import ldm_keys as names
from xlsd_train.weights.lazy_tensors import LazyTensor, in_memory
from xlsd_train.weights.network import POSITIONS, Network, empty_network, ldm_names
from xlsd_train.weights.prediction_type import V_PRED, ZTSNR, has_zero_snr, prediction_type

# Where noise is all there is, other programs (ComfyUI, A1111) have this for 0, whose SNR has no
# logarithm and whose sigma no number.
LAST_ALPHA_BAR = 4.8973451890853435e-08
_PREFIX = {"unet": names.UNET, "vae": names.VAE, "text_encoder": names.TEXT_ENCODER}


def single_file(
    unet: Network,
    text_encoder: Network,
    vae: Network,
    scheduler: dict[str, Any],
    dtype: torch.dtype,
) -> dict[str, LazyTensor]:
    """The tensors of v1-5-pruned-emaonly.safetensors but its two counters of a moving average.

    And `marks`, where it predicts v.
    Networks in `dtype`; what is no network stays as it is: the text encoder's position_ids and the
    noise schedule, which other programs make themselves or take from here.
    """
    tensors: dict[str, LazyTensor] = {}
    for part in (unet, text_encoder, vae):
        for name, (key, _) in ldm_names(part.kind, empty_network(part.kind, part.config)).items():
            stored = part.tensors[name].to(dtype, f"{part.kind}'s {name}")
            if part.kind == "vae" and names.is_vae_conv(name):
                stored = stored.reshaped(*stored.shape, 1, 1)
            tensors[_PREFIX[part.kind] + key] = stored
    positions = text_encoder.tensors[POSITIONS].shape[0]
    ids = torch.arange(positions).view(1, -1)
    tensors[f"{names.TEXT_ENCODER}text_model.embeddings.position_ids"] = in_memory(ids)
    said = schedule(scheduler) | marks(scheduler)
    return tensors | {name: in_memory(value) for name, value in said.items()}


def marks(scheduler: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The empty tensors by whose names programs know what a file predicts; none for eps and flow.

    Forge, ComfyUI (for SDXL) and others look whether the names are there, and at nothing else.
    """
    v = prediction_type(scheduler) == "v_prediction"
    names = [V_PRED] * v + [ZTSNR] * (v and has_zero_snr(scheduler))
    return {name: torch.zeros(0) for name in names}


def schedule(scheduler: dict[str, Any]) -> dict[str, torch.Tensor]:
    """LDM's buffers of a noise schedule, f32 [T] each, from diffusers' config of it; all finite.

    Its register_schedule (ddpm.py) after Ho, Jain, Abbeel 2020, arXiv 2006.11239: posterior
    variance and mean are eq. 6 and 7.
    """
    made: Any = DDPMScheduler.from_config(scheduler)
    beta = made.betas.double()  # from here in f64: 1 - bar is small at first
    whole = (1 - beta).cumprod(0)
    bar = whole.clamp(min=LAST_ALPHA_BAR)
    before = torch.cat([torch.ones(1, dtype=torch.float64), bar[:-1]])
    beta = torch.where(bar == whole, beta, 1 - bar / before)
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
