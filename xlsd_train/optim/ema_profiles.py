"""Power-function averages of weights over training. Pure.

Karras, Aittala, Lehtinen, Hellsten, Aila, Laine: Analyzing and improving the training dynamics of
diffusion models (2024, arXiv 2312.02696), sections 3.1 and 3.2. At time t the weights of time s
count p(s) = (gamma + 1) s^gamma / t^(gamma + 1) (eq. 1). Such averages, kept at several times with
two exponents, span a space in which any other one is found by least squares (section 3.2).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

WIDEST = 12**-0.5  # sigma_rel of gamma 0: all of training weighs the same


class Profile(NamedTuple):
    """How much each moment of training counts."""

    gamma: float
    time: float  # in steps, from the start of the run


def sigma_of(gamma: float) -> float:
    """The profile's standard deviation relative to the time, sigma_rel (eq. 3)."""
    return float((gamma + 1) ** 0.5 / ((gamma + 2) * (gamma + 3) ** 0.5))


def gamma_of(sigma_rel: float) -> float:
    """The exponent of a sigma_rel below WIDEST: eq. 3 squared is a cubic, its largest root."""
    t = sigma_rel**-2
    roots = np.roots([1, 7, 16 - t, 12 - t])
    return float(roots[np.isreal(roots)].real.max())


def kept(gamma: float, before: int, now: int) -> float:
    """beta: what the average of time `before` still weighs at time `now` (eq. 2 for one step).

    Over several steps at once the weights count as if they had been those of `now` throughout.
    """
    return float((before / now) ** (gamma + 1))


def inner(a: Profile, b: Profile) -> float:
    """The integral of the product of two profiles, for least squares."""
    first, last = sorted((a, b), key=lambda profile: profile.time)
    scale = (first.gamma + 1) * (last.gamma + 1) / (first.gamma + last.gamma + 1)
    return float(scale * (first.time / last.time) ** last.gamma / last.time)


def coefficients(
    kept_ones: Sequence[Profile], wanted: Profile
) -> tuple[NDArray[np.float64], float]:
    """(what each kept average counts in the wanted one, relative error of the profile made so).

    Least squares over profiles, as in the paper, with one condition more: the counts sum to 1.
    Without it a few kept averages leave a sum of say 0.99, which would shrink every weight by more
    than all of a fine-tuning moves it. The error is that of the L2 norm, 0 for a perfect match.
    """
    gram = np.array([[inner(a, b) for b in kept_ones] for a in kept_ones])
    right = np.array([inner(a, wanted) for a in kept_ones])
    # The stationary point of the squared error with a Lagrange multiplier for the sum. In units of
    # the wanted profile's norm; profiles of close times are nearly alike, and what rounding alone
    # would decide is left out.
    norm, ones = inner(wanted, wanted), np.ones((len(kept_ones), 1))
    system = np.block([[gram / norm, ones], [ones.T, np.zeros((1, 1))]])
    found = np.linalg.lstsq(system, np.append(right / norm, 1.0), rcond=1e-12)[0][:-1]
    left = 1 - 2 * (right @ found) / norm + found @ gram @ found / norm
    return found, float(np.sqrt(max(left, 0.0)))


def superfluous(times: Sequence[int], most: int) -> list[int]:
    """Which of some times, ascending, to give up so that `most` are left, as evenly as may be."""
    left = list(times)
    while len(left) > max(most, 2):
        gaps = [after - before for before, after in zip(left, left[2:], strict=False)]
        left.pop(1 + gaps.index(min(gaps)))
    return [time for time in times if time not in left]
