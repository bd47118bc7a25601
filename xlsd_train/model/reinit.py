"""Reinitialise layers of the UNet, e.g. after swapping the VAE; depends on seed and name alone."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import nn

from xlsd_cache.dataset import rng
from xlsd_cache.errors import UserError


def reinitialise(unet: nn.Module, names: Iterable[str], seed: int) -> None:
    """Reinitialise these weights of the UNet, in place and on the CPU, as diffusers does.

    That is torch's default for each type of layer: weights and biases of convolutions and linear
    layers uniform within 1/sqrt(inputs), norms one and zero. Each layer's random numbers depend on
    the seed and its name alone.
    """
    wanted = {name.removeprefix("unet.") for name in names}
    for path in sorted({name.rpartition(".")[0] for name in wanted}):
        module = unet.get_submodule(path)
        kept = {
            key: value.detach().clone()
            for key, value in module.named_parameters(recurse=False)
            if f"{path}.{key}" not in wanted
        }
        _reset(module, seed, path)
        with torch.no_grad():
            for key, value in kept.items():
                module.get_parameter(key).copy_(value)


def _reset(module: nn.Module, seed: int, path: str) -> None:
    reset = getattr(module, "reset_parameters", None)
    if reset is None:
        raise UserError(
            f"--reinit unet.{path} is a {type(module).__name__}, which has no default "
            f"initialisation; give the convolutions, linear layers or norms in it"
        )
    (word,) = rng.words(seed, f"reinit/{path}", np.zeros(1, np.int64)).tolist()
    with torch.random.fork_rng(devices=[]):  # reset_parameters draws from the global generator
        torch.default_generator.manual_seed(word - 2**63)
        reset()
