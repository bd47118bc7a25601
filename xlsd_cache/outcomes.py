"""Reasons for rejecting an image, as they are written to the log and counted."""

from dataclasses import dataclass
from typing import Literal

Reason = Literal[
    "not_an_image", "unsupported", "truncated", "corrupt", "too_many_pixels", "too_many_bytes",
    "too_much_memory", "decoder_crashed", "decoder_hung", "vanished", "unreadable", "changed",
    "removed", "bad_name", "too_elongated", "too_small", "mask", "made_here", "duplicate",
    "non_finite", "overflow", "foreign", "unsafe", "other_shape", "other_size", "changed_image",
    "not_its_image", "not_quite_its_image", "not_compared", "other_scale"
]  # fmt: skip
REASONS: dict[Reason, str] = {  # what each means
    "not_an_image": "the file is empty, or its first bytes are no image format's",
    "unsupported": "an image, in a format or variant that is not decoded",
    "truncated": "the file ends before its picture does",
    "corrupt": "the file contradicts itself or its format",
    "too_many_pixels": "its header claims more than --max-megapixels",
    "too_many_bytes": "the file is larger than any image of that many pixels",
    "too_much_memory": "decoding it took more memory than it may",
    "decoder_crashed": "decoding it ended the process that did",
    "decoder_hung": "decoding it did not end in time",
    "vanished": "the file was there when scanned and not when read",
    "unreadable": "the system does not let the file be read",
    "changed": "the file is not what it was when scanned",
    "removed": "the file was removed or replaced after it was planned",
    "bad_name": "the file's name is not UTF-8",
    "too_elongated": "its ratio is beyond --max-ratio",
    "too_small": "it does not fill its bucket, and --upscale is off",
    "mask": "by its name, a mask or condition image of the image next to it",
    "made_here": "a picture that one of these programs drew",
    "duplicate": "the same bytes as another image",
    "non_finite": "the VAE gave NaN or infinity",
    "overflow": "a latent is beyond float16",
    # Of latents that other programs cached:
    "foreign": "it holds no latent under the names that known programs use",
    "unsafe": "its pickle asks to run code",
    "other_shape": "its latent has other channels than the VAE's",
    "other_size": "its latent's size is no bucket's",
    "changed_image": "its image has another size than when it was cached",
    "not_its_image": "it does not correlate with the VAE's latent of its image",
    "not_quite_its_image": "it correlates less with the latent of its image than it should",
    "not_compared": "no image is there to compare it with",
    "other_scale": "it is scaled otherwise than the other latents of its cache",
}
# The next build tries these again: by then the file may be readable.
RETRIED = frozenset[Reason]({"vanished", "unreadable", "changed"})
# These depend on --max-megapixels.
LIMITED = frozenset[Reason]({"too_many_pixels", "too_many_bytes"})
# The decoder failed; --rehash tries these again.
FAILURES = frozenset[Reason]({"decoder_crashed", "decoder_hung", "too_much_memory"})


@dataclass(frozen=True)
class Rejected:
    """Why an image is not in the store; `detail` concerns this image alone."""

    reason: Reason
    detail: str = ""
