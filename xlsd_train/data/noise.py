"""Noise and timesteps of training samples, as pure functions of (seed, position)."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xlsd_cache.dataset.batch_order import Slot
from xlsd_cache.dataset.rng import Words, permutation, uniform, words


@dataclass(frozen=True)
class Noising:
    """How a batch's noise and timesteps are drawn."""

    first: int  # the objective's first timestep
    count: int  # of the objective's timesteps
    stratified: bool = False  # timesteps spread evenly over each batch
    offset: float = 0.0  # std of the noise's mean by channel

    def timesteps(
        self, seed: int, slot: Slot, places: NDArray[np.int64]
    ) -> Tensor:  # int64 [n], of these places in the batch
        """Timesteps at these places of a batch, the same for any number of processes."""
        if self.stratified:
            size = len(slot.ordinals)
            drawn = stratified_timesteps(seed, slot.number, size, places, self.count)
        else:
            drawn = timesteps(seed, slot.images_before + places, self.count)
        return drawn + self.first


def noise(
    seed: int, positions: NDArray[np.int64], shape: tuple[int, ...], offset: float = 0.0
) -> Tensor:
    """Standard normal f32 [n, *shape], each sample from its own generator.

    Adds `offset` times a normal number for each channel, constant over the image (Guttenberg,
    Diffusion with offset noise, 2023). Drawn on the CPU: the same for every device, and free in
    the loader's thread.
    """
    out = _normal(words(seed, "noise", positions), shape)
    if offset:
        channels = (shape[0], *(1 for _ in shape[1:]))
        out += offset * _normal(words(seed, "noise offset", positions), channels)
    return out


def _normal(drawn: Words, shape: tuple[int, ...]) -> Tensor:
    out = torch.empty((len(drawn), *shape))
    for target, word in zip(out, drawn.tolist(), strict=True):
        generator = torch.Generator().manual_seed(word - 2**63)
        torch.randn(shape, generator=generator, out=target)
    return out


def timesteps(seed: int, positions: NDArray[np.int64], count: int) -> Tensor:
    """Timesteps int64 [n], uniform over 0..count-1 (modulo bias below 1e-16)."""
    drawn = words(seed, "timestep", positions) % np.uint64(count)
    return torch.from_numpy(drawn.astype(np.int64))


def stratified_timesteps(
    seed: int, batch: int, size: int, places: NDArray[np.int64], count: int
) -> Tensor:
    """Timesteps int64 at some places in a batch of `size`, one from each of `size` equal strata.

    The strata are assigned to places in random order: at each place all timesteps are equally
    likely, and any part of the batch is mixed. Stratified sampling, as in arXiv 2107.00630, I.1.
    """
    strata = permutation(seed, f"strata/{batch}", size)[places]
    within = uniform(seed, f"stratum/{batch}", places)
    drawn = ((strata + within) * (count / size)).astype(np.int64)
    return torch.from_numpy(np.minimum(drawn, count - 1))  # rounding can reach the end
