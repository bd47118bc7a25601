"""A model as latent-diffusion's single file: all keys and shapes, without reading any weights."""

from typing import Any

import torch
from diffusers import DDPMScheduler

from xlsd_train.weights import ldm_keys
from xlsd_train.weights.lazy_tensors import LazyTensor, in_memory
from xlsd_train.weights.network import LDM_PREFIX, POSITIONS, Network, empty_network, ldm_names
from xlsd_train.weights.prediction_type import V_PRED, ZTSNR, has_zero_snr, prediction_type

# At zero terminal SNR other programs (ComfyUI, A1111) use this in place of 0, whose log SNR and
# sigma are infinite.
LAST_ALPHA_BAR = 4.8973451890853435e-08


def single_file(
    unet: Network,
    text_encoder: Network,
    vae: Network,
    scheduler: dict[str, Any],
    dtype: torch.dtype,
) -> dict[str, LazyTensor]:
    """The tensors of v1-5-pruned-emaonly.safetensors except its two EMA counters; `marks` for v.

    The networks are in `dtype`. The text encoder's position_ids and the noise schedule, which
    other programs compute or read from here, keep their own.
    """
    tensors: dict[str, LazyTensor] = {}
    for network in (unet, text_encoder, vae):
        kind = network.kind
        for name, (key, _) in ldm_names(kind, empty_network(kind, network.config)).items():
            tensor = network.tensors[name].to(dtype, f"{kind}'s {name}")
            if kind == "vae" and ldm_keys.is_vae_conv(name):
                tensor = tensor.reshaped(*tensor.shape, 1, 1)
            tensors[LDM_PREFIX[kind] + key] = tensor
    positions = text_encoder.tensors[POSITIONS].shape[0]
    ids = torch.arange(positions).view(1, -1)
    tensors[f"{ldm_keys.TEXT_ENCODER}text_model.embeddings.position_ids"] = in_memory(ids)
    buffers = noise_schedule(scheduler) | marks(scheduler)
    return tensors | {name: in_memory(value) for name, value in buffers.items()}


def marks(scheduler: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Empty tensors whose keys mark a v-prediction model; none for eps and flow.

    Forge, ComfyUI (for SDXL) and others only test whether the keys exist.
    """
    v = prediction_type(scheduler) == "v_prediction"
    keys = [V_PRED] * v + [ZTSNR] * (v and has_zero_snr(scheduler))
    return {key: torch.zeros(0) for key in keys}


def noise_schedule(scheduler: dict[str, Any]) -> dict[str, torch.Tensor]:
    """LDM's buffers of a noise schedule, f32 [T] each and finite, from diffusers' config.

    Its register_schedule (ddpm.py) after Ho, Jain, Abbeel 2020, arXiv 2006.11239: posterior
    variance and mean are eq. 6 and 7.
    """
    ddpm: Any = DDPMScheduler.from_config(scheduler)
    beta = ddpm.betas.double()  # f64 from here on: 1 - bar is small at first
    exact = (1 - beta).cumprod(0)
    bar = exact.clamp(min=LAST_ALPHA_BAR)
    before = torch.cat([torch.ones(1, dtype=torch.float64), bar[:-1]])
    beta = torch.where(bar == exact, beta, 1 - bar / before)
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
