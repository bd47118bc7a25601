"""Aspect-ratio buckets: the size of an image -> its bucket and crop box, or a rejection."""

import math
from dataclasses import dataclass

from xlsd_cache.errors import UserError
from xlsd_cache.outcomes import Rejected
from xlsd_cache.vocabulary import Bucket

STEP = 64  # pixels: the VAE's 8 times the UNet's three halvings


@dataclass(frozen=True)
class Placement:
    """An image's bucket, and the crop that is resized to it.

    `crop` is (left, top, right, bottom) in pixels of the upright image, with fractions: resizing
    this box equals covering the bucket and cropping the rest, without an intermediate rounding.
    """

    bucket: Bucket
    crop: tuple[float, float, float, float]


@dataclass(frozen=True)
class Buckets:
    """The bucket sizes of one store."""

    sizes: tuple[Bucket, ...]
    max_ratio: float
    upscale: bool

    @classmethod
    def make(cls, spec: str, resolution: int, max_ratio: float, upscale: bool) -> "Buckets":
        """Create the buckets of `spec`: aspect, square, or a list of sizes 512x512,512x768."""
        if spec == "square":
            sizes = {_given_size(f"{resolution}x{resolution}")}
        elif spec == "aspect":
            sizes = _aspect_sizes(resolution, max_ratio)
        else:
            sizes = {_given_size(name) for name in spec.split(",")}
        return cls(tuple(sorted(sizes)), max_ratio, upscale)

    def place(self, width: int, height: int) -> Placement | Rejected:
        """Choose the bucket with the nearest log aspect ratio, and a centred crop.

        The size is that of the upright image. Of two equally near buckets, the larger is taken.
        Rejects `too_elongated` and `too_small`.
        """
        ratio = max(width, height) / min(width, height)
        if ratio > self.max_ratio:
            detail = f"{width}x{height} has ratio {ratio:.1f} > {self.max_ratio:g} (--max-ratio)"
            return Rejected("too_elongated", detail)
        bucket = min(
            self.sizes,
            key=lambda b: (
                abs(math.log(width * b.height / (height * b.width))),
                -b.width * b.height,
                b,
            ),
        )
        scale = max(bucket.width / width, bucket.height / height)
        if scale > 1 and not self.upscale:
            detail = f"{width}x{height} does not fill its bucket {bucket.name} (--upscale)"
            return Rejected("too_small", detail)
        left = (width - bucket.width / scale) / 2
        top = (height - bucket.height / scale) / 2
        left, top = max(0.0, left), max(0.0, top)  # rounding may leave -1e-14
        return Placement(bucket, (left, top, width - left, height - top))


def _given_size(name: str) -> Bucket:
    """Parse a size in --buckets. Raises UserError if it is invalid."""
    try:
        bucket = Bucket.parse(name.strip())
    except ValueError:
        message = f"--buckets {name!r} is not a size WIDTHxHEIGHT, e.g. 512x768"
        raise UserError(message) from None
    if bucket.width % STEP or bucket.height % STEP:
        raise UserError(
            f"--buckets {bucket.name} is not in multiples of {STEP} pixels, which the UNet's three "
            f"halvings of 8-pixel latents need; round it"
        )
    return bucket


def _aspect_sizes(resolution: int, max_ratio: float) -> set[Bucket]:
    """For each width, the tallest bucket with at most resolution² pixels, and its transpose."""
    if resolution % STEP or resolution <= 0:
        raise UserError(f"--resolution {resolution} is not a positive multiple of {STEP}; round it")
    sizes = set()
    for width in range(STEP, int(resolution * max(1.0, max_ratio)) + 1, STEP):
        height = resolution**2 // width // STEP * STEP
        if height and max(width, height) <= max_ratio * min(width, height):
            sizes |= {Bucket(width, height), Bucket(height, width)}
    return sizes
