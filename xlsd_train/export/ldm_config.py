"""NAME.yaml: latent-diffusion's (LDM's) config of a single file. Pure.

If it is next to NAME.safetensors, A1111 builds its model from it and Forge reads `parameterization`
in it. Without one both assume that an SD1.5-like model predicts noise. The keys are the arguments
of LDM's classes (CompVis/latent-diffusion, Stability-AI/stablediffusion).
"""

from typing import Any

import yaml  # type: ignore[import-untyped]

from xlsd_train.weights.network import POSITIONS, Network, empty_network
from xlsd_train.weights.prediction_type import prediction_type

# diffusers' beta schedules -> LDM's, whose `linear` is linear in the square roots
_BETAS = {"scaled_linear": "linear", "linear": "sqrt_linear", "squaredcos_cap_v2": "cosine"}


def ldm_config(
    unet: Network, text_encoder: Network, vae: Network, scheduler: dict[str, Any], name: str
) -> str | None:
    """The file's text for v-prediction, else None: eps is the default, and LDM has no flow."""
    if prediction_type(scheduler) != "v_prediction":
        return None
    networks = {part.kind: empty_network(part.kind, part.config).config for part in (unet, vae)}
    model = {
        "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
        "params": {
            "parameterization": "v",
            "beta_schedule": _BETAS.get(scheduler.get("beta_schedule", "linear"), "linear"),
            "linear_start": scheduler.get("beta_start", 0.0001),
            "linear_end": scheduler.get("beta_end", 0.02),
            "timesteps": scheduler.get("num_train_timesteps", 1000),
            "num_timesteps_cond": 1,
            "log_every_t": 200,
            "first_stage_key": "jpg",
            "cond_stage_key": "txt",
            "image_size": networks["unet"].sample_size or 64,
            "channels": networks["unet"].in_channels,
            "cond_stage_trainable": False,
            "conditioning_key": "crossattn",
            "scale_factor": float(networks["vae"].scaling_factor),
            "use_ema": False,
            "unet_config": _unet(networks["unet"]),
            "first_stage_config": _vae(networks["vae"]),
            "cond_stage_config": _text_encoder(text_encoder),
        },
    }
    about = f"# {name} predicts v. A1111 and Forge read this file: keep it beside that one.\n"
    text: str = yaml.safe_dump({"model": model}, sort_keys=False)
    return about + text


def _unet(config: Any) -> dict[str, Any]:
    widths, blocks = config.block_out_channels, config.down_block_types
    heads = config.num_attention_heads or config.attention_head_dim
    return {
        "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
        "params": {
            "image_size": 32,  # required by LDM, but unused
            "in_channels": config.in_channels,
            "out_channels": config.out_channels,
            "model_channels": widths[0],
            # The downsampling factors of levels with attention.
            "attention_resolutions": [2**i for i, x in enumerate(blocks) if "Attn" in x][::-1],
            "num_res_blocks": config.layers_per_block,
            "channel_mult": [width // widths[0] for width in widths],
            "num_heads": heads if isinstance(heads, int) else heads[0],
            "use_spatial_transformer": True,
            "transformer_depth": 1,
            "context_dim": config.cross_attention_dim,
            "use_checkpoint": False,
            "legacy": False,
        },
    }


def _vae(config: Any) -> dict[str, Any]:
    widths = config.block_out_channels
    return {
        "target": "ldm.models.autoencoder.AutoencoderKL",
        "params": {
            "embed_dim": config.latent_channels,
            "ddconfig": {
                "double_z": True,
                "z_channels": config.latent_channels,
                "resolution": 256,
                "in_channels": config.in_channels,
                "out_ch": config.out_channels,
                "ch": widths[0],
                "ch_mult": [width // widths[0] for width in widths],
                "num_res_blocks": config.layers_per_block,
                "attn_resolutions": [],
                "dropout": 0.0,
            },
            "lossconfig": {"target": "torch.nn.Identity"},
        },
    }


def _text_encoder(network: Network) -> dict[str, Any]:
    """LDM takes the last layer's states: clip skip is already baked into the weights."""
    config = {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"}
    tokens = network.tensors[POSITIONS].shape[0]
    return {**config, "params": {"max_length": tokens}} if tokens != 77 else config
