"""Converts any colour space, bit depth and transparency to 8-bit sRGB on white.

Pillow's `convert("RGB")` silently gets these wrong. Done in two steps, because the image is resized
between them: as 8-bit samples, in its own colour space and with its transparency.
"""

import io

import numpy as np
from PIL import Image, ImageCms

_SRGB = ImageCms.createProfile("sRGB")


class UnsupportedSamples(ValueError):
    """Samples whose range is unknown, so that black and white are."""


def eight_bit(image: Image.Image) -> Image.Image:
    """Convert to a mode with 8 bits per sample, which Pillow resizes correctly.

    Raises UnsupportedSamples for values outside 0..65535.
    """
    mode = image.mode
    if mode.startswith("I;16") or mode in ("I", "F"):
        samples = np.asarray(image)
        top = float(samples.max())
        if not (samples.min() >= 0 and top <= 65535):  # NaN is neither
            raise UnsupportedSamples(f"mode {mode} with values outside 0..65535")
        # Integers are 16-bit. Floats are 0..1 unless they exceed 1, then 0..255, or exceed 255.
        white = 65535 if mode != "F" or top > 255 else 255 if top > 1 else 1
        scaled = samples.astype(np.float32)  # exact, and half as large as numpy's default
        scaled *= 255 / white
        grey = Image.fromarray(np.rint(scaled, out=scaled).astype(np.uint8))
        key = image.info.get("transparency")
        if isinstance(key, int):  # one grey value is transparent
            opaque = Image.fromarray(np.where(samples == key, 0, 255).astype(np.uint8))
            return Image.merge("LA", (grey, opaque))
        return grey
    if image.has_transparency_data:
        return image if mode in ("RGBA", "LA") else image.convert("RGBA")
    return image if mode in ("L", "RGB", "CMYK", "LAB") else image.convert("RGB")


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert to sRGB and composite alpha on white.

    An ICC profile that is broken or does not fit the mode is ignored.
    """
    return _on_white(_to_srgb(image, profile))


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    if image.mode == "LAB":
        return _convert(image, ImageCms.createProfile("LAB"), "RGB")
    target = "RGBA" if image.mode in ("RGBA", "LA") else "RGB"
    if profile and image.mode != "LA":
        try:
            return _convert(image, ImageCms.ImageCmsProfile(io.BytesIO(profile)), target)
        except (ImageCms.PyCMSError, OSError):
            pass
    return image.convert(target)


def _convert(image: Image.Image, source: object, mode: str) -> Image.Image:
    converted = ImageCms.profileToProfile(image, source, _SRGB, outputMode=mode)  # type: ignore[arg-type]
    assert converted is not None  # only in-place conversion returns None
    if image.mode == "RGBA":  # LittleCMS leaves alpha undefined
        converted.putalpha(image.getchannel("A"))
    return converted


def _on_white(image: Image.Image) -> Image.Image:
    """Alpha composited on white."""
    if image.mode != "RGBA":
        return image
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")
