"""CLIP score and CMMD of pictures, from CLIP's embeddings. Pure, and repeatable to the bit.

FID is left out on purpose: its estimate is biased by an amount that shrinks with the number of
pictures and differs between models, and is still large at thousands (Chong, Forsyth 2020,
arXiv 1911.07023). CMMD's estimate has no bias at any number.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from xlsd_train.evaluation.clip import Embeddings
from xlsd_train.runs.bootstrap import Estimate, weights

SIGMA, SCALE = 10.0, 1000.0  # of CMMD's kernel, and what makes it readable
LEAST = 10  # of either set: below it resamples may hold one image alone
BLOCK = 1024  # rows of the kernel's matrix that are in memory at once
Weights = NDArray[np.float64]  # [resamples, n], each row's sum 1


def clip_scores(images: Embeddings, texts: Embeddings) -> NDArray[np.float64]:
    """2.5 max(cos, 0) of each picture and its prompt (Hessel et al. 2021, arXiv 2104.08718)."""
    cosines: NDArray[np.float64] = np.sum(images * texts, axis=1)
    return 2.5 * np.maximum(cosines, 0)


@dataclass(frozen=True)
class Sample:
    """A set of images: its embeddings, and the mean kernel of two different ones of them."""

    embeddings: Embeddings
    weights: Weights  # the first row is the set itself, the others are its resamples
    within: NDArray[np.float64]

    @classmethod
    def of(cls, embeddings: Embeddings, purpose: str = "bootstrap") -> "Sample":
        """Sets of as many images, of the same purpose, are resampled alike."""
        count = len(embeddings)
        drawn = np.vstack([np.full((1, count), 1 / count), weights(count, purpose)])
        # An image is no second one beside itself, however often a resample holds it: k(x, x) = 1.
        itself = np.square(drawn).sum(axis=1)
        within = (_mean_kernel(embeddings, drawn, embeddings, drawn) - itself) / (1 - itself)
        return cls(embeddings, drawn, within)


def cmmd(drawn: Sample, real: Sample) -> Estimate:
    """1000 times the squared maximum mean discrepancy of two sets (arXiv 2401.09603).

    Its unbiased estimator (Gretton et al. 2012, JMLR 13, equation 3), as the paper says; the
    paper's own code has the biased one, which is higher by 1000 (1 - k) / n of each set, k being
    its mean kernel within. So this may be a little below 0 where the sets are alike.
    """
    between = _mean_kernel(drawn.embeddings, drawn.weights, real.embeddings, real.weights)
    found = SCALE * (drawn.within + real.within - 2 * between)
    return Estimate(float(found[0]), found[1:])


def _mean_kernel(
    x: Embeddings, x_weights: Weights, y: Embeddings, y_weights: Weights
) -> NDArray[np.float64]:
    """Mean of exp(-|x - y|^2 / (2 sigma^2)) over pairs, by each row of weights; |x| = |y| = 1."""
    total = np.zeros_like(y_weights)
    for start in range(0, len(x), BLOCK):
        rows = slice(start, start + BLOCK)
        kernel = np.exp((x[rows] @ y.T - 1) / SIGMA**2)  # |x - y|^2 = 2 - 2 x.y
        total += x_weights[:, rows] @ kernel
    means: NDArray[np.float64] = np.sum(total * y_weights, axis=1)
    return means
