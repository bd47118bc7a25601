"""Scale raw latents for the UNet and back: by the VAE's own factor, or by a store's statistics.

RUN/base/latents.json records the scaling that a run trains with, for later runs and for export.
The UNet's input is (raw - shift) * scale, by channel.
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
    normalized: bool  # by a store's statistics, not by the VAE's factor

    @classmethod
    def of(
        cls, shift: Sequence[float], scale: Sequence[float], normalized: bool
    ) -> "LatentScaling":
        """From one number for each channel."""
        shifts, scales = (torch.tensor(values).view(-1, 1, 1) for values in (shift, scale))
        return cls(shifts, scales, normalized)

    def __call__(self, raw: Tensor) -> Tensor:
        """The UNet's input, f32 [B, C, h, w], from raw latents of any dtype."""
        return (raw.float() - self.shift) * self.scale

    def raw(self, latents: Tensor) -> Tensor:
        """Raw latents, as the VAE decodes them."""
        return latents / self.scale + self.shift

    def to(self, device: torch.device) -> "LatentScaling":
        """The same scaling on a device."""
        return replace(self, shift=self.shift.to(device), scale=self.scale.to(device))

    def record(self) -> dict[str, Any]:
        """As JSON, without loss of precision."""
        shift, scale = (values.flatten().tolist() for values in (self.shift, self.scale))
        return {"normalized": self.normalized, "shift": shift, "scale": scale}


def vae_scaling(vae: Vae) -> LatentScaling:
    """The VAE's factor and shift, the same for all channels."""
    shift, scale = ([value] * vae.channels for value in (vae.shift_factor, vae.scaling_factor))
    return LatentScaling.of(shift, scale, normalized=False)


def scaling_by_statistics(stores: Mixture) -> LatentScaling:
    """To mean 0 and std 1 in each channel, over the stores' latents weighted by their use.

    Raises UserError if a channel is constant.
    """
    moments = stores.moments()
    if not all(moments.std):
        raise UserError(
            f"--normalize-latents: a channel of {stores.root} is constant (std by channel: "
            f"{moments.std}); leave the option out"
        )
    return LatentScaling.of(moments.mean, [1 / std for std in moments.std], normalized=True)


def save_scaling(scaling: LatentScaling, vae: Vae, base: Path) -> None:
    """Write latents.json to a run's `base` folder."""
    of = {"vae_sha256": vae.sha256, "encoder_sha256": vae.encoder_sha256, "padding": vae.padding}
    write_json(base / FILE, {**of, **scaling.record()})


def load_scaling(source: str, base: Path, vae: Vae, own: Callable[[], Vae]) -> LatentScaling:
    """The scaling that a run was trained with; `vae`'s own if it has no latents.json.

    `own` loads the VAE that the model was trained with. Raises UserError if the run was trained on
    normalised latents of another encoder than `vae`'s.
    """
    path = base / FILE
    if not path.exists():
        return vae_scaling(vae)
    record = read_latents_json(path)
    if not record["normalized"]:
        return vae_scaling(vae)
    if record.get("vae_sha256") != vae.sha256:
        encoder = record.get("encoder_sha256") or own().encoder_sha256  # older runs keep one hash
        if encoder != vae.encoder_sha256:
            raise UserError(
                f"{source} was trained on normalised latents of the encoder {encoder[:12]}, whose "
                f"statistics do not hold for {vae.name} ({vae.encoder_sha256[:12]}); use a store "
                f"or a VAE of that encoder, or another model"
            )
    return LatentScaling.of(record["shift"], record["scale"], normalized=True)
