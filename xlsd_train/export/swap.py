"""Replace a model's VAE, to start training with the new one."""

import logging
from dataclasses import replace
from pathlib import Path

from xlsd_cache.encoding.compatibility import padding_warning
from xlsd_cache.encoding.vae import load_vae
from xlsd_cache.errors import UserError
from xlsd_train.config.model_options import SwapConfig
from xlsd_train.export.conversions import has_encoder, vae_part
from xlsd_train.export.export import write_model
from xlsd_train.weights.locate import fetch_missing, locate_model

log = logging.getLogger("xlsd.train.export")


def swap(config: SwapConfig) -> Path:
    """Write the model with its new VAE to `config.out`. Raises UserError if they do not fit."""
    parts = locate_model(
        config.model, text_encoder=config.text_encoder, tokenizer=config.tokenizer,
        ema=config.model_ema, vae=False,
    )  # fmt: skip
    vae = load_vae(config.vae, config.vae_scaling_factor)
    channels = parts.unet.config.get("in_channels", 4)
    if vae.channels != channels:
        raise UserError(
            f"the UNet of {config.model} takes {channels} latent channels and the VAE {config.vae} "
            f"gives {vae.channels}; give another --vae"
        )
    if warning := padding_warning(vae):
        log.warning(warning)
    parts = fetch_missing(parts)
    same = parts.vae is not None and has_encoder(parts, vae)
    # A run's normalisation of its old VAE's latents does not hold for the new one's.
    merged = replace(
        parts, vae=vae_part(vae), checkpoint=None, trained=None,
        vae_padding=parts.vae_padding if same else None,
    )  # fmt: skip
    return write_model(merged, config.out, False)
