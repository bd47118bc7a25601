"""The baseline: the training step of diffusers' example script.

A reimplementation of examples/text_to_image/train_text_to_image.py of diffusers 0.42: the VAE
encodes the images, the text encoder the captions, noise and timesteps are drawn, the UNet predicts,
gradients are computed with gradient checkpointing, and the optimizer steps. Clipping, EMA, logging
and reading files are left out, in favour of the baseline.
"""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler
from torch import Tensor
from torch.nn import functional as F

from benchmarks.demo.pipeline import VAE
from xlsd_cache.errors import UserError
from xlsd_train.config import sd15
from xlsd_train.config.train import TrainConfig
from xlsd_train.model.bundle import ModelBundle


@dataclass
class PlainLoop:
    """A callable that trains one step. `model` has to be prepared for its phase.

    With a `vae`, `pixels` f32 [B, 3, H, W] are encoded in every step. Without one, the scaled
    `latents` f32 [B, 4, h, w] are used.
    """

    model: ModelBundle
    optimizer: torch.optim.Optimizer
    mixed: bool  # bf16 autocast
    input_ids: Tensor  # int64 [B, tokens]
    latents: Tensor
    pixels: Tensor | None = None
    vae: Any = None

    def __post_init__(self) -> None:
        self._scheduler = DDPMScheduler.from_config(self.model.scheduler_config)

    def __call__(self) -> Tensor:
        """Update the weights. Returns the loss, a scalar on the device."""
        unet, text_encoder = self.model.unet, self.model.text_encoder
        with torch.autocast(self.latents.device.type, torch.bfloat16, enabled=self.mixed):
            latents = self.latents if self.vae is None else self._encode()
            noise = torch.randn_like(latents)
            timesteps = torch.randint(0, 1000, (len(latents),), device=latents.device)
            noisy = self._scheduler.add_noise(latents, noise, timesteps)
            states = text_encoder(self.input_ids, return_dict=False)[0]
            predicted = unet(noisy, timesteps, states, return_dict=False)[0]
            loss = F.mse_loss(predicted.float(), noise.float(), reduction="mean")
        torch.autograd.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    @torch.no_grad()
    def _encode(self) -> Tensor:
        """Encode one image at a time: SDXL's VAE needs 20 GiB for 32 images at once."""
        latents: Tensor = self.vae.encode(self.pixels).latent_dist.sample()
        return latents * float(self.vae.config.scaling_factor)


def checkpointing(model: ModelBundle, on: bool) -> None:
    """Turn gradient checkpointing of the UNet, and of a text encoder that trains, on or off."""
    text_encoder = model.text_encoder
    trains = any(parameter.requires_grad for parameter in text_encoder.parameters())
    if on:
        model.unet.enable_gradient_checkpointing()
        if trains:
            text_encoder.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
    else:
        model.unet.disable_gradient_checkpointing()
        text_encoder.gradient_checkpointing_disable()
        # Enabling makes the embeddings' output require a gradient, which disabling leaves.
        text_encoder.disable_input_require_grads()


def optimizer_of(config: TrainConfig, model: ModelBundle) -> torch.optim.Optimizer:
    """The library's optimizer for these options, with a rate so small that no loss diverges."""
    import dadaptation
    import lion_pytorch

    parameters = [p for m in (model.unet, model.text_encoder) for p in m.parameters()]
    trained = [p for p in parameters if p.requires_grad]
    made: torch.optim.Optimizer
    shared: dict[str, Any] = {
        "lr": 1e-9,
        "betas": config.betas,
        "weight_decay": config.weight_decay,
    }
    if config.optimizer == "lion":
        made = lion_pytorch.Lion(trained, **shared)
    elif config.optimizer == "dlion":
        made = dadaptation.DAdaptLion(trained, **shared)
    elif config.optimizer == "adamw":
        made = torch.optim.AdamW(trained, **shared)
    else:
        raise UserError(
            f"--against diffusers does not support --optimizer {config.optimizer}; "
            "use lion, dlion or adamw"
        )
    return made


def vae_of(model: str, device: str) -> Any:
    """For sd15 a VAE of SDXL's size with random weights, for other models the demo's VAE."""
    if model == "sd15":
        vae: Any = AutoencoderKL.from_config({**sd15.VAE, "scaling_factor": 0.13025})
    else:
        vae = AutoencoderKL.from_pretrained(VAE)
    vae.enable_slicing()
    return vae.requires_grad_(False).to(device)
