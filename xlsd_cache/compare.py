"""Are these the VAE's latents of these images? Imported latents are taken at nobody's word.

A few latents are compared with fresh ones of the same crops (`alike`), and with what the VAE makes
of its own picture of them (`own`), which needs no image. Correlations are of deviations from each
channel's mean: channels differ in level whatever the image.

What was measured to set the limits, with the demo's VAE on 14 photos at 128, 256 and 512 pixels:
`alike` is 0.94-1.00 across Pillow's box, bilinear, bicubic and Lanczos filters, 0.46-0.96 when the
crop is off by 2%, -0.26-0.76 for another image, 0.66-0.90 for the VAE that the demo's was distilled
from. `own` is 0.78-0.95, and 0.28-0.66 when the channels are permuted.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray

from xlsd_cache.decode import Pixels
from xlsd_cache.encode import to_input
from xlsd_cache.vae import Vae

ALIKE = 0.9  # and more: the same image, crop and VAE, whatever the filter
OTHER = 0.5  # and less: another image
OWN = 0.6  # and more: the VAE decodes it to what it encodes to it again


@dataclass(frozen=True)
class Sample:
    """One latent to look at, with its image's pixels where the image is there."""

    key: str
    latent: NDArray[Any]  # [C,h,w] as the file holds it
    pixels: Pixels | None


@dataclass(frozen=True)
class Likeness:
    """What a latent has in common with the named VAE's own."""

    key: str
    alike: float | None  # correlation with a fresh latent of its image; None without the image
    scale: float  # how many times the VAE's own spread; guessed by scaling_factor without the image
    own: float  # correlation with encode(decode(latent))
    noise: float | None  # the posterior's standard deviation in units of the latent's spread

    def __str__(self) -> str:
        alike = "no image" if self.alike is None else f"correlation {self.alike:.3f}"
        noise = "" if self.noise is None else f", posterior's deviation {self.noise:.1e}"
        return f"{self.key}: {alike}, scale {self.scale:.3g}, own round trip {self.own:.3f}{noise}"


@dataclass(frozen=True)
class Verdict:
    """What the samples say together."""

    disproved: str = ""  # why these cannot be the VAE's latents of the images: never imported
    doubtful: tuple[str, ...] = ()  # what only the user can answer for: --force
    scaled: bool = False  # multiplied by the VAE's scaling factor


def compare(samples: Iterable[Sample], vae: Vae, device: torch.device) -> list[Likeness]:
    """Encode and decode each sample, one at a time, in fp32."""
    vae.model.to(device)
    return [_likeness(sample, vae, device) for sample in samples]


@torch.inference_mode()
def _likeness(sample: Sample, vae: Vae, device: torch.device) -> Likeness:
    latent = sample.latent.astype(np.float32)
    alike = noise = None
    # Raw latents times the factor have a spread near 1, by the factor's definition.
    factor = vae.scaling_factor
    guessed = factor if latent.std() < 0.3 / factor and latent.std() > 0.3 else 1.0
    scale = guessed
    if sample.pixels is not None:
        x = to_input(torch.from_numpy(np.stack([sample.pixels]))).to(device)
        # OneTrainer mirrors at random before it caches.
        fresh = [vae.encode(image).cpu().numpy()[0] for image in (x, x.flip(3))]
        alike = max(_correlation(latent, one) for one in fresh)
        scale = float(_deviations(latent).std() / max(1e-12, _deviations(fresh[0]).std()))
        if isinstance(vae.model, AutoencoderKL):
            spread = float(vae.model.encode(x).latent_dist.std.mean())
            noise = spread / max(1e-12, float(fresh[0].std()))
    raw = latent / factor + vae.shift_factor if _near(scale, factor) else latent
    again = vae.encode(vae.decode(torch.from_numpy(raw[None]).to(device)).clamp(-1, 1))
    return Likeness(sample.key, alike, scale, _correlation(raw, again.cpu().numpy()[0]), noise)


def judge(likenesses: list[Likeness], vae: Vae, kind: str, keeps: str) -> Verdict:
    """What is to be made of them, in sentences that say what was found."""
    name, factor = vae.name, vae.scaling_factor
    alike = [one.alike for one in likenesses if one.alike is not None]
    own = float(np.median([one.own for one in likenesses]))
    scale = float(np.median([one.scale for one in likenesses]))
    others = [one for one in likenesses if one.alike is not None and one.alike < OTHER]
    if own < OWN and min(alike, default=0.0) < ALIKE:
        told = f", and correlate {min(alike):.2f} with its latents of their images" if alike else ""
        return Verdict(
            f"these are not latents of {name}: through its own decoder and encoder they come back "
            f"with a correlation of {own:.2f} instead of {OWN} or more{told}; name their VAE"
        )
    if others:
        worst = ", ".join(f"{one.key} {one.alike:.2f}" for one in others)
        return Verdict(
            f"{len(others)} of {len(alike)} latents compared are not of their images (correlation "
            f"{worst}; {ALIKE} or more is right): the cache's mapping is shuffled or the images "
            f"were changed; make the cache anew, or build from the images"
        )
    scaled = not _near(scale, 1) and _near(scale, factor)
    if not scaled and not _near(scale, 1):
        return Verdict(
            f"these latents are {scale:.3g} times {name}'s own, neither 1 nor its scaling factor "
            f"{factor:g}: they are of another VAE or normalised; name their VAE"
        )
    doubts = []
    if keeps == "sample":
        noise = [one.noise for one in likenesses if one.noise is not None]
        told = f", here noise of {np.median(noise):.1e} of their spread" if noise else ""
        doubts.append(f"{kind} freezes one random draw of the posterior instead of its mean{told}")
    if scaled:
        doubts.append(
            f"they are scaled already ({scale:.4g} times the raw ones; the scaling factor is "
            f"{factor:g}) and would be divided by it"
        )
    if alike and min(alike) < ALIKE:
        doubts.append(
            f"they are like their images' latents but not equal (correlation {min(alike):.2f}, "
            f"{ALIKE} or more is right): another crop, another filter or a tuned VAE"
        )
    if not alike:
        doubts.append(
            "none of their images is there to compare them with (--images), so their origin is "
            "unknown"
        )
    return Verdict("", tuple(doubts), scaled)


def _near(value: float, wanted: float) -> bool:
    """Within 25%: resizing with a softer filter costs a few percent of the spread."""
    return 0.75 < value / wanted < 1.25


def _deviations(latent: NDArray[Any]) -> NDArray[Any]:
    deviations: NDArray[Any] = latent - latent.mean((1, 2), keepdims=True)
    return deviations


def _correlation(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Pearson's, of [C,h,w] latents after each channel's own mean is taken away."""
    a, b = _deviations(a.astype(np.float64)), _deviations(b.astype(np.float64))
    norm = np.sqrt(np.sum(a * a) * np.sum(b * b))
    return float(np.sum(a * b) / norm) if norm else 0.0
