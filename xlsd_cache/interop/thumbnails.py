"""Check that a latent belongs to an image without the VAE, by comparing thumbnails.

A latent's pixel is nearly an affine function of the mean colour of 8x8 pixels. Its inverse, fitted
by least squares on a few verified pairs, turns any latent into a thumbnail, which is correlated
with the image's.

Measured with TAESDXL and the demo's VAE on 121 photos, fitted on 16, the better of mirrored or not:
the lowest 0.1 % of right pairs, the lowest 1 % and the median, against the highest 0.1 % of wrong
ones:

                    128 pixels              256 pixels              512 pixels
    demo's VAE      0.56 0.76 0.93 | 0.65   0.67 0.80 0.94 | 0.61   0.84 0.85 0.94 | 0.49
    TAESDXL         0.65 0.69 0.90 | 0.64   0.68 0.73 0.91 | 0.61   0.77 0.78 0.92 | 0.44

So pairs below SURE are compared with the VAE, which decides: 0 to 5 % of right pairs, and all but 1
in 5,000 of wrong ones (the highest, 0.83, are photos of one scene). A latent with another scale
gives a thumbnail of another contrast; right pairs have 0.56 to 3.5 times the image's.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from xlsd_cache.images.decode import Pixels

SURE = 0.75  # correlation from which the pair is right
CONTRAST = 4.0  # ratio to the image's, either way, from which the latent has another scale
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Thumbnails:
    """The affine map from a latent's channels to red, green and blue."""

    weights: Floats  # [C + 1, 3]; the last row is the offset

    @classmethod
    def fit(cls, pairs: Iterable[tuple[Floats, Pixels]]) -> "Thumbnails":
        """Fit it to latents [C,h,w] and their images' thumbnails [h,w,3]."""
        both = list(pairs)
        inputs = np.concatenate([_pixels(latent) for latent, _ in both])
        colours = np.concatenate([thumbnail.reshape(-1, 3) for _, thumbnail in both])
        weights = np.linalg.lstsq(inputs, colours.astype(np.float32), rcond=None)[0]
        return cls(weights.astype(np.float32))

    def agree(self, latent: Floats, thumbnail: Pixels) -> bool:
        """Whether the latent [C,h,w] surely belongs to the image with this thumbnail [h,w,3]."""
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
