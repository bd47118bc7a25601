"""`xlsd-train swap`: a model with another VAE in it, as training with that VAE begins."""

from dataclasses import replace
from pathlib import Path

from xlsd_cache import UserError
from xlsd_cache.vae import load_vae
from xlsd_train.export import write_model
from xlsd_train.find import completed, find
from xlsd_train.model_commands import SwapConfig
from xlsd_train.network import Part
from xlsd_train.tensors import in_memory


def swap(config: SwapConfig) -> Path:
    """Write the merge; returns `config.out`. Raises UserError where parts do not fit."""
    parts = find(
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
    told = {name: value for name, value in vae.model.config.items() if not name.startswith("_")}
    tensors = {name: in_memory(value) for name, value in vae.model.state_dict().items()}
    part = Part("vae", {"_class_name": vae.class_name, **told}, tensors, vae.source)
    # What a run made of its old VAE's latents says nothing of the new one's.
    merged = replace(completed(parts), vae=part, checkpoint=None, trained=None)
    return write_model(merged, config.out, False)
