"""Profiles of power-function averages of weights over training. Pure.

Karras, Aittala, Lehtinen, Hellsten, Aila, Laine: Analyzing and improving the training dynamics of
diffusion models (2024, arXiv 2312.02696), sections 3.1 and 3.2. At time t the weights of time s
have the factor p(s) = (gamma + 1) s^gamma / t^(gamma + 1) (eq. 1). Averages with two exponents,
saved at several times, span a space in which least squares finds any other one (section 3.2).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Profile(NamedTuple):
    """How much each time of training contributes to an average."""

    gamma: float
    time: float  # in steps, from the start of the run


def gamma_of(sigma_rel: float) -> float:
    """The exponent of a profile's standard deviation relative to the time, sigma_rel.

    sigma_rel is below 12**-0.5, a uniform average's. Eq. 3 squared is a cubic: its largest root.
    """
    t = sigma_rel**-2
    roots = np.roots([1, 7, 16 - t, 12 - t])
    return float(roots[np.isreal(roots)].real.max())


def kept(gamma: float, before: int, now: int) -> float:
    """beta: the factor of the average of time `before` in that of time `now` (eq. 2 for one step).

    Over several steps at once, as if the weights had been those of `now` all the time.
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
    """(coefficient of each saved average in the wanted one, relative error of their profile).

    Least squares over profiles, as in the paper, with one more condition: coefficients sum to 1.
    Otherwise a few averages give a sum of e.g. 0.99, which would shrink every weight by more than
    all of a fine-tuning changes it. The error is in the L2 norm, 0 for a perfect match.
    """
    gram = np.array([[inner(a, b) for b in kept_ones] for a in kept_ones])
    right = np.array([inner(a, wanted) for a in kept_ones])
    # The stationary point of the squared error with a Lagrange multiplier for the sum, in units of
    # the wanted profile's norm. Profiles of close times are nearly equal; rcond drops what rounding
    # alone would decide.
    norm, ones = inner(wanted, wanted), np.ones((len(kept_ones), 1))
    system = np.block([[gram / norm, ones], [ones.T, np.zeros((1, 1))]])
    solution = np.linalg.lstsq(system, np.append(right / norm, 1.0), rcond=1e-12)[0][:-1]
    squared = 1 - 2 * (right @ solution) / norm + solution @ gram @ solution / norm
    return solution, float(np.sqrt(max(squared, 0.0)))


def superfluous(times: Sequence[int], most: int) -> list[int]:
    """Which of the ascending times to remove so that `most` are left, as even as possible."""
    left = list(times)
    while len(left) > max(most, 2):
        gaps = [after - before for before, after in zip(left, left[2:], strict=False)]
        left.pop(1 + gaps.index(min(gaps)))
    return [time for time in times if time not in left]
