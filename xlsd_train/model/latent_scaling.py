"""Raw latents <-> what the network sees: the VAE's own scaling, or one by a store's statistics.

RUN/base/latents.json keeps the one that a run's model is trained with, for later runs and for
export: the network sees (raw - shift) * scale, by channel.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xlsd_cache.encoding.vae import Vae
from xlsd_cache.errors import UserError
from xlsd_cache.runtime.atomic import write_json
from xlsd_train.data.mixture import Mixture
from xlsd_train.weights.network import read_latents_json

FILE = "latents.json"


@dataclass(frozen=True)
class LatentScaling:
    """(raw - shift) * scale, by channel."""

    shift: Tensor  # f32 [C, 1, 1]
    scale: Tensor  # f32 [C, 1, 1]
    normalized: bool  # by a store's statistics, and no longer the VAE's one factor

    @classmethod
    def of(
        cls, shift: Sequence[float], scale: Sequence[float], normalized: bool
    ) -> "LatentScaling":
        """From numbers by channel."""
        shifts, scales = (torch.tensor(values).view(-1, 1, 1) for values in (shift, scale))
        return cls(shifts, scales, normalized)

    def __call__(self, raw: Tensor) -> Tensor:
        """What the network sees, f32 [B, C, h, w]."""
        return (raw.float() - self.shift) * self.scale

    def raw(self, latents: Tensor) -> Tensor:
        """What the VAE decodes."""
        return latents / self.scale + self.shift

    def to(self, device: torch.device) -> "LatentScaling":
        """The same on a device."""
        return replace(self, shift=self.shift.to(device), scale=self.scale.to(device))

    def record(self) -> dict[str, Any]:
        """As JSON; the numbers come back exactly."""
        shift, scale = (values.flatten().tolist() for values in (self.shift, self.scale))
        return {"normalized": self.normalized, "shift": shift, "scale": scale}


def vae_scaling(vae: Vae) -> LatentScaling:
    """The VAE's one factor, for all channels."""
    shift, scale = ([value] * vae.channels for value in (vae.shift_factor, vae.scaling_factor))
    return LatentScaling.of(shift, scale, normalized=False)


def scaling_by_statistics(stores: Mixture) -> LatentScaling:
    """To mean 0 and spread 1 in every channel of the stores' latents, as often as each is used.

    Raises UserError where a channel never varies.
    """
    found = stores.moments()
    if not all(found.std):
        raise UserError(
            f"--normalize-latents: the channels of {stores.root} spread by {found.std}, and one "
            f"that never varies cannot be normalised; leave the option out"
        )
    return LatentScaling.of(found.mean, [1 / std for std in found.std], normalized=True)


def save_scaling(scaling: LatentScaling, vae: Vae, base: Path) -> None:
    """Write it beside a model's other parts."""
    of = {"vae_sha256": vae.sha256, "encoder_sha256": vae.encoder_sha256, "padding": vae.padding}
    write_json(base / FILE, {**of, **scaling.record()})


def load_scaling(source: str, base: Path, vae: Vae, own: Callable[[], Vae]) -> LatentScaling:
    """As the model was trained; the VAE's own for a model that was not trained here.

    `own` is the VAE that the model was trained with. Raises UserError where the model was trained
    on another encoder's normalised latents.
    """
    path = base / FILE
    if not path.exists():
        return vae_scaling(vae)
    told = read_latents_json(path)
    if not told["normalized"]:
        return vae_scaling(vae)
    if told.get("vae_sha256") != vae.sha256:
        encoder = told.get("encoder_sha256") or own().encoder_sha256  # older runs keep one hash
        if encoder != vae.encoder_sha256:
            raise UserError(
                f"{source} was trained on latents of the encoder {encoder[:12]}, normalised by "
                f"their statistics, which are not those of {vae.name}, {vae.encoder_sha256[:12]}; "
                f"give a store of that encoder as --data, or another --model"
            )
    return LatentScaling.of(told["shift"], told["scale"], normalized=True)
