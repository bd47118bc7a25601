"""Test whether latents are the VAE's latents of these images, before they are imported.

A few latents are compared with freshly encoded ones of the same crops (`alike`), and with the VAE's
round trip of themselves (`own`), which needs no image. All others are compared by thumbnails.py,
and freshly encoded where that is not conclusive. Correlations are of deviations from each channel's
mean, because channel means differ whatever the image. An image of one colour has no deviations but
noise, so a latent whose difference from the fresh one is small against the VAE's usual spread
counts as alike too.

Measurements behind the limits, with TAESDXL and the demo's VAE on 8 and 14 photos at 64 to 512
pixels: `alike` is 0.94 to 1.00 across Pillow's box, bilinear, bicubic and Lanczos filters, 0.46 to
0.96 when the crop is off by 2%, -0.26 to 0.76 for another image, 0.66 to 0.90 between the two VAEs,
of which one was distilled from the other. `own` is 0.66 to 0.95, and 0.28 to 0.74 with permuted
channels. A better VAE scores higher in both, so where the image is available, its fresh latent
makes the round trip as well. Of 121 photos at 128 to 512 pixels, 99.9 % of wrong pairs correlate by
at most 0.42, all by at most 0.76.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray

from xlsd_cache.encoding.encoder import to_input
from xlsd_cache.encoding.vae import Vae
from xlsd_cache.images.decode import Pixels
from xlsd_cache.outcomes import Rejected

# Correlations.
ALIKE = 0.9  # from here on: the same image, crop and VAE, whatever the filter
SAME = 0.94  # from here on: this VAE, and the cache's images are not shuffled
OTHER = 0.5  # below: another image
PROVED_OTHER = 0.8  # below: another image, where most of the cache's latents are alike
SMALL = 0.1  # up to here, in units of the VAE's spread: a difference that no other image has
OWN = 0.6  # from here on: the latent survives the VAE's round trip
DISPROVED = frozenset({"not_its_image", "other_scale"})
JUDGED = DISPROVED | {"not_compared", "not_quite_its_image"}
NO_IMAGE = Rejected("not_compared", "its image is missing or unreadable; --force imports it")
ROUNDS = 4  # latents that make the round trip, which tests the VAE and not the image
MOST_NAMED = 5
USUAL = 0.85  # times the fresh latent's round trip, from here on: the same VAE


@dataclass(frozen=True)
class Compared:
    """One latent to compare, with its image's pixels if the image is available."""

    key: str
    latent: NDArray[Any]  # [C, h, w] as stored in the cache
    pixels: Pixels | None


@dataclass(frozen=True)
class Likeness:
    """How a cached latent compares with the VAE's own."""

    key: str
    alike: float | None  # correlation with a fresh latent of its image; None without the image
    scale: float  # ratio of its spread to the VAE's; without the image a guess, 1 or the factor
    own: float | None  # correlation with encode(decode(latent)); None where not measured
    usual: float | None  # the same for a fresh latent of the image
    noise: float | None  # the posterior's standard deviation in units of the latent's spread
    mirrored: bool = False  # it is the latent of the mirrored image

    def __str__(self) -> str:
        alike = "no image" if self.alike is None else f"correlation {self.alike:.3f}"
        own = "" if self.own is None else f", own round trip {self.own:.3f}"
        noise = "" if self.noise is None else f", posterior's deviation {self.noise:.1e}"
        return f"{self.key}: {alike}, scale {self.scale:.3g}{own}{noise}"


@dataclass(frozen=True)
class CacheVerdict:
    """The conclusion from all samples of a cache."""

    disproved: str = ""  # why these cannot be the VAE's latents of the images: never imported
    doubtful: tuple[str, ...] = ()  # reasons that only --force overrides
    scaled: bool = False  # multiplied by the VAE's scaling factor
    limit: float = PROVED_OTHER  # a latent less alike is not of its image


def compare(
    samples: Iterable[Compared], vae: Vae, device: torch.device, rounds: int = ROUNDS
) -> list[Likeness]:
    """Encode each sample's image, one at a time, in fp32; the first `rounds` make round trips."""
    vae.model.to(device)
    return [_likeness(one, vae, device, number < rounds) for number, one in enumerate(samples)]


@torch.inference_mode()
def _likeness(sample: Compared, vae: Vae, device: torch.device, rounds: bool) -> Likeness:
    latent = sample.latent.astype(np.float32)
    alike = own = usual = noise = None
    mirrored = False
    # The scaling factor is defined so that raw latents times it have a spread near 1.
    factor = vae.scaling_factor
    guessed = factor if latent.std() < 0.3 / factor and latent.std() > 0.3 else 1.0
    scale = guessed
    if sample.pixels is not None:
        x = to_input(torch.from_numpy(np.stack([sample.pixels]))).to(device)
        nearest = vae.encode(x).cpu().numpy()[0]
        alike = _correlation(latent, nearest)
        if alike < ALIKE:  # OneTrainer mirrors some images before it caches them
            other = vae.encode(x.flip(3)).cpu().numpy()[0]
            mirrored = _correlation(latent, other) > alike
            nearest = other if mirrored else nearest
            alike = _correlation(latent, nearest)
        scale = float(_deviations(latent).std() / max(1e-12, _deviations(nearest).std()))
        for times, raw in ((1.0, latent), (factor, latent / factor + vae.shift_factor)):
            apart = factor * float(np.sqrt(np.mean((raw - nearest) ** 2)))
            if apart <= SMALL and 1 - apart > alike:
                alike, scale = 1 - apart, times
        if rounds:
            usual = _correlation(nearest, _again(nearest, vae, device))
        if rounds and isinstance(vae.model, AutoencoderKL):
            spread = float(vae.model.encode(x).latent_dist.std.mean())
            noise = spread / max(1e-12, float(nearest.std()))
    if rounds:
        raw = latent / factor + vae.shift_factor if _near(scale, factor) else latent
        own = _correlation(raw, _again(raw, vae, device))
    return Likeness(sample.key, alike, scale, own, usual, noise, mirrored)


def _again(raw: NDArray[Any], vae: Vae, device: torch.device) -> NDArray[Any]:
    """encode(decode(latent)), [C,h,w]."""
    picture = vae.decode(torch.from_numpy(raw[None]).to(device)).clamp(-1, 1)
    again: NDArray[Any] = vae.encode(picture).cpu().numpy()[0]
    return again


def judge(likenesses: Sequence[Likeness], vae: Vae, kind: str, keeps: str) -> CacheVerdict:
    """Draw the conclusion from all samples together."""
    name, factor = vae.name, vae.scaling_factor
    compared = [one for one in likenesses if one.alike is not None]
    alike = [one.alike for one in compared if one.alike is not None]
    unsure = max(alike, default=0.0) < SAME
    own = float(np.median([one.own for one in likenesses if one.own is not None]))
    seen = [one for one in compared if one.alike is not None and one.alike >= OTHER]
    likely = sorted(one for one in alike if one >= OTHER)
    # Where over a third are only somewhat alike, the crop or the filter differs, not the image.
    third = min(len(likely) - 1, max(1, len(likely) // 3))
    usually = likely[third] if likely else 0.0
    scale = float(np.median([one.scale for one in seen or likenesses]))
    usual = [one.usual for one in likenesses if one.usual is not None]
    wanted = USUAL * float(np.median(usual)) if usual else OWN
    unlike = [one for one in compared if one.alike is not None and one.alike < ALIKE]
    worst = ", ".join(f"{one.key} {one.alike:.2f}" for one in unlike[:MOST_NAMED])
    worst += ", ..." if unlike[MOST_NAMED:] else ""
    if own < wanted and unsure:
        and_alike = f", with fresh latents of their images {min(alike):.2f}" if alike else ""
        return CacheVerdict(
            f"these are not latents of {name}: correlation after its decoder and encoder "
            f"{own:.2f}, expected {wanted:.2f} or more{and_alike}. Give the VAE that made them."
        )
    if alike and unsure and np.median(alike) < OTHER:
        return CacheVerdict(
            f"{len(unlike)} of {len(alike)} compared latents do not match their images "
            f"(correlation {worst}; expected {ALIKE} or more): the cache's images are shuffled or "
            f"were changed. Recreate the cache, or build from the images."
        )
    scaled = not _near(scale, 1) and _near(scale, factor)
    if not scaled and not _near(scale, 1):
        return CacheVerdict(
            f"these latents are {scale:.3g} times {name}'s, neither 1 nor its scaling factor "
            f"{factor:g}: they are normalised or another VAE's. Give the VAE that made them."
        )
    doubts = []
    if keeps == "sample":
        noise = [one.noise for one in likenesses if one.noise is not None]
        size = f", noise of {np.median(noise):.1e} of their spread" if noise else ""
        doubts.append(f"{kind} stores a random sample of the posterior, not its mean{size}")
    if scaled:
        doubts.append(
            f"they are already scaled ({scale:.4g} times the raw ones; scaling factor {factor:g}) "
            f"and would be divided by the factor"
        )
    if seen and usually < ALIKE:
        doubts.append(
            f"{len(unlike)} of {len(alike)} compared do not quite match their images (correlation "
            f"{worst}; expected {ALIKE} or more): another crop, a changed image or a tuned VAE"
        )
    if not alike:
        doubts.append(
            "none of their images was found (--images gives their folder), so nothing could be "
            "compared"
        )
    limit = PROVED_OTHER if usually >= ALIKE else OTHER
    return CacheVerdict("", tuple(doubts), scaled, limit)


def refusal(one: Likeness, vae: Vae, limit: float, scaled: bool) -> Rejected | None:
    """Why this latent is rejected, or None.

    `limit` and `scaled` are the cache's. Only the reasons in DISPROVED overrule --force.
    """
    if one.alike is None:
        return NO_IMAGE
    found = f"correlation {one.alike:.2f} with {vae.name}'s latent of that crop of its image"
    if one.alike < limit:
        return Rejected("not_its_image", f"{found}, expected {ALIKE} or more")
    if not 0.5 < one.scale / (vae.scaling_factor if scaled else 1) < 2:
        return Rejected("other_scale", f"{one.scale:.3g} times {vae.name}'s latent of its image")
    if one.alike < ALIKE:
        return Rejected(
            "not_quite_its_image", f"{found}, expected {ALIKE} or more; --force imports it"
        )
    return None


def _near(value: float, wanted: float) -> bool:
    """Within 25%: resizing with a softer filter costs a few percent of the spread."""
    return 0.75 < value / wanted < 1.25


def _deviations(latent: NDArray[Any]) -> NDArray[Any]:
    deviations: NDArray[Any] = latent - latent.mean((1, 2), keepdims=True)
    return deviations


def _correlation(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Pearson's correlation of [C, h, w] latents after each channel's mean is subtracted."""
    a, b = _deviations(a.astype(np.float64)), _deviations(b.astype(np.float64))
    norm = np.sqrt(np.sum(a * a) * np.sum(b * b))
    return float(np.sum(a * b) / norm) if norm else 0.0
