"""Is this the latent of this image? A guess without the VAE, at the cost of decoding a thumbnail.

A latent's pixel is nearly an affine function of the 8x8 pixels' mean colour. Its inverse, fitted by
least squares on a few proved pairs, makes a thumbnail of any latent, to correlate with the image's.

Measured with TAESDXL and the demo's VAE on 121 photos, fitted on 16, best of mirrored or not: the
lowest 0.1 % of right pairs, the lowest 1 % and the median, against the highest 0.1 % of wrong ones:

                    128 pixels              256 pixels              512 pixels
    demo's VAE      0.56 0.76 0.93 | 0.65   0.67 0.80 0.94 | 0.61   0.84 0.85 0.94 | 0.49
    TAESDXL         0.65 0.69 0.90 | 0.64   0.68 0.73 0.91 | 0.61   0.77 0.78 0.92 | 0.44

So what falls below SURE is looked at again, with the VAE, which decides: of right pairs 0 to 5 %,
of wrong ones all but 1 in 5,000 (the highest, 0.83, are photos of one scene). A latent scaled
otherwise makes a thumbnail of another contrast: of right pairs 0.56 to 3.5 times the image's.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from xlsd_cache.images.decode import Pixels

SURE = 0.75  # and more: this image's latent
CONTRAST = 4.0  # times the image's, or a 4th of it: scaled otherwise
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Thumbnails:
    """The affine map from a latent's channels to red, green and blue."""

    weights: Floats  # [C + 1, 3]; the last row is the offset

    @classmethod
    def fit(cls, pairs: Iterable[tuple[Floats, Pixels]]) -> "Thumbnails":
        """Of latents [C,h,w] and their images' thumbnails [h,w,3]."""
        both = list(pairs)
        inputs = np.concatenate([_pixels(latent) for latent, _ in both])
        colours = np.concatenate([thumbnail.reshape(-1, 3) for _, thumbnail in both])
        weights = np.linalg.lstsq(inputs, colours.astype(np.float32), rcond=None)[0]
        return cls(weights.astype(np.float32))

    def agree(self, latent: Floats, thumbnail: Pixels) -> bool:
        """Whether the latent [C,h,w] is surely of the image with this thumbnail [h,w,3]."""
        made = (_pixels(latent) @ self.weights).reshape(thumbnail.shape)
        made -= made.mean((0, 1))
        wanted = thumbnail - thumbnail.mean((0, 1))
        norms = float(np.linalg.norm(made)), float(np.linalg.norm(wanted))
        if not all(norms):
            return False
        like = max(float(np.vdot(made, wanted)), float(np.vdot(made[:, ::-1], wanted)))
        return (
            like / (norms[0] * norms[1]) >= SURE and 1 / CONTRAST < norms[0] / norms[1] < CONTRAST
        )


def _pixels(latent: Floats) -> Floats:
    """[h*w, C + 1], the last column ones."""
    flat = latent.reshape(len(latent), -1).T
    return np.column_stack([flat, np.ones(len(flat), np.float32)])
