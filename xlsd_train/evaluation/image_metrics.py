"""CLIP score and CMMD of images, from CLIP embeddings. Pure functions, bit-exactly repeatable.

FID is left out on purpose: its estimate has a bias that shrinks with the number of images, differs
between models, and is still large at thousands of images (Chong, Forsyth 2020, arXiv 1911.07023).
CMMD's estimate is unbiased at any number.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from xlsd_train.evaluation.clip import Embeddings
from xlsd_train.runs.bootstrap import Estimate, weights

SIGMA, SCALE = 10.0, 1000.0  # of CMMD's kernel; of its values, as in the paper
LEAST = 10  # images of either set: a resample of fewer may consist of one image
BLOCK = 1024  # rows of the kernel matrix in memory at once
Weights = NDArray[np.float64]  # [resamples, n]; each row sums to 1


def clip_scores(images: Embeddings, texts: Embeddings) -> NDArray[np.float64]:
    """2.5 max(cos, 0) of each image and its prompt (Hessel et al. 2021, arXiv 2104.08718)."""
    cosines: NDArray[np.float64] = np.sum(images * texts, axis=1)
    return 2.5 * np.maximum(cosines, 0)


@dataclass(frozen=True)
class ImageSet:
    """Embeddings of a set of images, with its resamples for a bootstrap."""

    embeddings: Embeddings
    weights: Weights  # the first row is the set itself, the others are its resamples
    within: NDArray[np.float64]  # [resamples]: mean kernel of two different images of the set

    @classmethod
    def of(cls, embeddings: Embeddings, purpose: str = "bootstrap") -> "ImageSet":
        """Resample a set; sets of the same size and purpose get the same resamples."""
        count = len(embeddings)
        rows = np.vstack([np.full((1, count), 1 / count), weights(count, purpose)])
        # Pairs of an image with itself do not count, however often a resample has it: k(x, x) = 1.
        diagonal = np.square(rows).sum(axis=1)
        within = (_mean_kernel(embeddings, rows, embeddings, rows) - diagonal) / (1 - diagonal)
        return cls(embeddings, rows, within)


def cmmd(generated: ImageSet, real: ImageSet) -> Estimate:
    """1000 times the squared maximum mean discrepancy of two sets (arXiv 2401.09603).

    The unbiased estimator (Gretton et al. 2012, JMLR 13, equation 3), as the paper says. The
    paper's own code has the biased one, which is higher by 1000 (1 - k) / n for each set, where k
    is its mean kernel within. For similar sets the unbiased estimate may be slightly below 0.
    """
    between = _mean_kernel(generated.embeddings, generated.weights, real.embeddings, real.weights)
    values = SCALE * (generated.within + real.within - 2 * between)
    return Estimate(float(values[0]), values[1:])


def _mean_kernel(
    x: Embeddings, x_weights: Weights, y: Embeddings, y_weights: Weights
) -> NDArray[np.float64]:
    """Mean of exp(-|x - y|^2 / (2 sigma^2)) over pairs, for each row of weights; |x| = |y| = 1."""
    total = np.zeros_like(y_weights)
    for start in range(0, len(x), BLOCK):
        rows = slice(start, start + BLOCK)
        kernel = np.exp((x[rows] @ y.T - 1) / SIGMA**2)  # |x - y|^2 = 2 - 2 x.y
        total += x_weights[:, rows] @ kernel
    means: NDArray[np.float64] = np.sum(total * y_weights, axis=1)
    return means
