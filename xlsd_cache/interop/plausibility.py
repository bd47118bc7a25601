"""Are these the VAE's latents of these images? Imported latents are taken at nobody's word.

A few latents are compared with fresh ones of the same crops (`alike`), and with what the VAE makes
of its own picture of them (`own`), which needs no image; all others by thumbnails.py, and with a
fresh one where that is not sure. Correlations are of deviations from each channel's mean: channels
differ in level whatever the image. An image of one colour has no deviations but noise, so a latent
that differs from the fresh one by little of the VAE's usual spread is alike as well.

What was measured to set the limits, with TAESDXL and the demo's VAE on 8 and 14 photos at 64 to 512
pixels: `alike` is 0.94-1.00 across Pillow's box, bilinear, bicubic and Lanczos filters, 0.46-0.96
when the crop is off by 2%, -0.26-0.76 for another image, 0.66-0.90 between the two VAEs, of which
one was distilled from the other. `own` is 0.66-0.95, and 0.28-0.74 with the channels permuted: the
better VAE gives more of either, so where the image is there, its own latent is sent round as well.
Of 121 photos at 128 to 512 pixels, 99.9 % of wrong pairs are alike by at most 0.42, all by 0.76.
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

ALIKE = 0.9  # and more: the same image, crop and VAE, whatever the filter
SAME = 0.94  # and more: surely this VAE, and the cache's mapping is not shuffled
OTHER = 0.5  # and less: another image
PROVED_OTHER = 0.8  # and less: another image, where most of the cache's latents are alike
SMALL = 0.1  # and less: a difference, in units of the VAE's spread, that no image makes
OWN = 0.6  # and more: the VAE decodes it to what it encodes to it again
DISPROVED = frozenset({"not_its_image", "other_scale"})
JUDGED = DISPROVED | {"not_compared", "not_quite_its_image"}
NO_IMAGE = Rejected("not_compared", "its image is not there, or cannot be read; --force imports it")
ROUNDS = 4  # latents that are decoded and encoded again: it tells of the VAE, not of the image
MOST_NAMED = 5
USUAL = 0.85  # of what its own latent of the image gives, and more: the same


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
    own: float | None  # correlation with encode(decode(latent)), where that was asked for
    usual: float | None  # the same of a fresh latent of the image
    noise: float | None  # the posterior's standard deviation in units of the latent's spread
    mirrored: bool = False  # it is alike to the latent of the mirrored image

    def __str__(self) -> str:
        alike = "no image" if self.alike is None else f"correlation {self.alike:.3f}"
        own = "" if self.own is None else f", own round trip {self.own:.3f}"
        noise = "" if self.noise is None else f", posterior's deviation {self.noise:.1e}"
        return f"{self.key}: {alike}, scale {self.scale:.3g}{own}{noise}"


@dataclass(frozen=True)
class Verdict:
    """What the samples say together."""

    disproved: str = ""  # why these cannot be the VAE's latents of the images: never imported
    doubtful: tuple[str, ...] = ()  # what only the user can answer for: --force
    scaled: bool = False  # multiplied by the VAE's scaling factor
    limit: float = PROVED_OTHER  # less alike, a latent is not of its image


def compare(
    samples: Iterable[Sample], vae: Vae, device: torch.device, rounds: int = ROUNDS
) -> list[Likeness]:
    """Encode each sample's image, one at a time, in fp32; `rounds` of them make round trips."""
    vae.model.to(device)
    return [_likeness(one, vae, device, number < rounds) for number, one in enumerate(samples)]


@torch.inference_mode()
def _likeness(sample: Sample, vae: Vae, device: torch.device, rounds: bool) -> Likeness:
    latent = sample.latent.astype(np.float32)
    alike = own = usual = noise = None
    mirrored = False
    # Raw latents times the factor have a spread near 1, by the factor's definition.
    factor = vae.scaling_factor
    guessed = factor if latent.std() < 0.3 / factor and latent.std() > 0.3 else 1.0
    scale = guessed
    if sample.pixels is not None:
        x = to_input(torch.from_numpy(np.stack([sample.pixels]))).to(device)
        nearest = vae.encode(x).cpu().numpy()[0]
        alike = _correlation(latent, nearest)
        if alike < ALIKE:  # OneTrainer mirrors at random before it caches
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


def judge(likenesses: Sequence[Likeness], vae: Vae, kind: str, keeps: str) -> Verdict:
    """What is to be made of them together, in sentences that say what was found."""
    name, factor = vae.name, vae.scaling_factor
    compared = [one for one in likenesses if one.alike is not None]
    alike = [one.alike for one in compared if one.alike is not None]
    unsure = max(alike, default=0.0) < SAME
    own = float(np.median([one.own for one in likenesses if one.own is not None]))
    seen = [one for one in compared if one.alike is not None and one.alike >= OTHER]
    likely = sorted(one for one in alike if one >= OTHER)
    # Where more than a third are alike only somewhat, it is the crop or the filter, not the image.
    third = min(len(likely) - 1, max(1, len(likely) // 3))
    usually = likely[third] if likely else 0.0
    scale = float(np.median([one.scale for one in seen or likenesses]))
    usual = [one.usual for one in likenesses if one.usual is not None]
    wanted = USUAL * float(np.median(usual)) if usual else OWN
    unlike = [one for one in compared if one.alike is not None and one.alike < ALIKE]
    worst = ", ".join(f"{one.key} {one.alike:.2f}" for one in unlike[:MOST_NAMED])
    worst += ", ..." if unlike[MOST_NAMED:] else ""
    if own < wanted and unsure:
        told = f", and correlate {min(alike):.2f} with its latents of their images" if alike else ""
        return Verdict(
            f"these are not latents of {name}: through its own decoder and encoder they come back "
            f"with a correlation of {own:.2f} instead of {wanted:.2f} or more{told}; name their VAE"
        )
    if alike and unsure and np.median(alike) < OTHER:
        return Verdict(
            f"{len(unlike)} of {len(alike)} latents compared are not of their images (correlation "
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
    if seen and usually < ALIKE:
        doubts.append(
            f"{len(unlike)} of {len(alike)} compared are not quite their images' (correlation "
            f"{worst}; {ALIKE} or more is right): another crop, a changed image or a tuned VAE"
        )
    if not alike:
        doubts.append(
            "none of their images is there to compare them with (--images), so their origin is "
            "unknown"
        )
    limit = PROVED_OTHER if usually >= ALIKE else OTHER
    return Verdict("", tuple(doubts), scaled, limit)


def refusal(one: Likeness, vae: Vae, limit: float, scaled: bool) -> Rejected | None:
    """Why this latent is not taken for its image's, if it is not.

    `limit` and `scaled` are the cache's. Only the reasons in DISPROVED stand against --force.
    """
    if one.alike is None:
        return NO_IMAGE
    told = f"correlates {one.alike:.2f} with {vae.name}'s latent of that crop of its image"
    if one.alike < limit:
        return Rejected("not_its_image", f"{told}; {ALIKE} or more is right")
    if not 0.5 < one.scale / (vae.scaling_factor if scaled else 1) < 2:
        return Rejected("other_scale", f"{one.scale:.3g} times {vae.name}'s latent of its image")
    if one.alike < ALIKE:
        return Rejected(
            "not_quite_its_image", f"{told}; {ALIKE} or more is right; --force imports it"
        )
    return None


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
