"""Precompute: photos and captions in, a zarr store of raw VAE latents out, once."""

from typing import Literal

__version__ = "0.1.0"

Precision = Literal["fp32", "tf32", "bf16"]
Padding = Literal["zeros", "reflect"]  # of a VAE's convolutions


class UserError(Exception):
    """A mistake the user can mend. Its one sentence says what, where, the value and the remedy.

    The command lines catch it, print it and exit non-zero; any other exception is our own bug.
    """
