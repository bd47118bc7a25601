"""Layers that begin anew, as they do when the VAE is swapped: a pure function of seed and name."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import nn

from xlsd_cache.dataset import rng as draw
from xlsd_cache.errors import UserError


def reinitialise(unet: nn.Module, names: Iterable[str], seed: int) -> None:
    """Draw these weights of the UNet anew, in place, by the law with which diffusers makes them.

    Which is torch's own for each kind of layer: a convolution's and a linear layer's weights and
    biases uniform within 1/sqrt(inputs), norms one and zero. Every layer draws from the seed and
    its name alone, whatever else is drawn. The model is on the CPU.
    """
    wanted = {name.removeprefix("unet.") for name in names}
    for path in sorted({name.rpartition(".")[0] for name in wanted}):
        module = unet.get_submodule(path)
        kept = {
            key: value.detach().clone()
            for key, value in module.named_parameters(recurse=False)
            if f"{path}.{key}" not in wanted
        }
        _draw(module, seed, path)
        with torch.no_grad():
            for key, value in kept.items():
                module.get_parameter(key).copy_(value)


def _draw(module: nn.Module, seed: int, path: str) -> None:
    reset = getattr(module, "reset_parameters", None)
    if reset is None:
        raise UserError(
            f"--reinit unet.{path} is a {type(module).__name__}, for which torch has no law to "
            f"begin with; name the convolutions, linear layers or norms in it"
        )
    (word,) = draw.words(seed, f"reinit/{path}", np.zeros(1, np.int64)).tolist()
    with torch.random.fork_rng(devices=[]):  # torch's own law draws from its global generator
        torch.default_generator.manual_seed(word - 2**63)
        reset()
