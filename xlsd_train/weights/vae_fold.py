"""Fold the normalisation of latents into a VAE's 1x1 convolutions. Pure.

The UNet is trained on u = (raw - mean) / std of each channel; SDXL's VAE has mean 0 and
std 1 / 0.13025. Programs other than diffusers use the factor f = 0.18215 for all SD1.5-like models:
u = f raw', raw' = u / f. A VAE whose raw latents are raw' = (raw - mean) / (f std) decodes
correctly there. It differs from the original in four tensors: `quant_conv`, the encoder's last
layer, gives the posterior's mean and log variance, and `post_quant_conv` is the decoder's first
(Rombach et al. 2022, arXiv 2112.10752; diffusers' AutoencoderKL). Both are linear, so folding is
exact up to rounding.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xlsd_cache.errors import UserError

SD15_FACTOR = 0.18215  # what loaders of single files assume
FOLDED = ("quant_conv.weight", "quant_conv.bias", "post_quant_conv.weight", "post_quant_conv.bias")


@dataclass(frozen=True)
class ChannelNormalisation:
    """The normalisation of raw latents in training, by channel: (raw - mean) / std."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "ChannelNormalisation":
        """From a VAE's config: (raw - shift_factor) * scaling_factor."""
        channels = int(config["latent_channels"])
        shift, factor = config.get("shift_factor") or 0.0, config["scaling_factor"]
        return cls((float(shift),) * channels, (1 / float(factor),) * channels)

    def is_factor(self, factor: float) -> bool:
        """Whether it equals scaling by this factor, so that nothing has to be folded."""
        return not any(self.mean) and all(abs(std * factor - 1) < 1e-9 for std in self.std)


def fold(
    state: Mapping[str, Tensor], trained: ChannelNormalisation, factor: float
) -> dict[str, Tensor]:
    """The FOLDED tensors, f64, of a VAE for programs that only scale by `factor`.

    `state` has the original ones: quant_conv [2C, 2C, 1, 1] and [2C], post_quant_conv
    [C, C, 1, 1] and [C]. Raises UserError for a VAE that lacks these layers.
    """
    missing = [name for name in FOLDED if name not in state]
    if missing:
        raise UserError(
            f"the VAE has no {missing[0]} to fold its scaling factor into; export with --format "
            f"diffusers, which keeps the factor in the VAE's config"
        )
    weight, bias, post_weight, post_bias = (state[name].double() for name in FOLDED)
    mean = torch.tensor(trained.mean, dtype=torch.float64)
    scale = torch.tensor(trained.std, dtype=torch.float64) * factor  # raw' = (raw - mean) / scale
    channels = len(scale)
    rows = torch.cat([scale, torch.ones(channels, dtype=torch.float64)])  # log variance: bias only
    shift = torch.cat([mean / scale, 2 * scale.log()])
    return {
        "quant_conv.weight": weight / rows.view(-1, 1, 1, 1),
        "quant_conv.bias": bias / rows - shift,
        "post_quant_conv.weight": post_weight * scale.view(1, -1, 1, 1),
        "post_quant_conv.bias": post_bias + post_weight[:, :, 0, 0] @ mean,
    }
