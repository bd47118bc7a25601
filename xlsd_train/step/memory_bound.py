"""The functions between a layer's convolutions and matmuls, whose time is that of memory access."""

import torch
from torch import Tensor
from torch.nn import Conv2d, GroupNorm
from torch.nn import functional as F


class MemoryBound:
    """As diffusers' modules compute them; `compile.Compiled` fuses each one into a kernel."""

    def conv(self, m: Conv2d, x: Tensor) -> Tensor:
        """The convolution, whose output goes to `add_bias` or `add`."""
        out: Tensor = m(x)
        return out

    def add_bias(self, m: Conv2d, x: Tensor, shift: Tensor) -> Tensor:  # noqa: ARG002
        """Output x [B, C, H, W] of `conv(m, ...)`, shifted by [B, C]."""
        return x + shift[:, :, None, None]

    def add(self, m: Conv2d, x: Tensor, residual: Tensor) -> Tensor:  # noqa: ARG002
        """Output of `conv(m, ...)` plus a residual."""
        return residual + x

    def norm_silu(self, m: GroupNorm, x: Tensor) -> Tensor:
        """GroupNorm and SiLU."""
        return F.silu(m(x))

    def geglu(self, x: Tensor) -> Tensor:
        """The first half of the last dimension, times GELU of the second."""
        value, gate = x.chunk(2, -1)
        return value * F.gelu(gate)


EAGER = MemoryBound()


def in_grad_mode(chosen: MemoryBound) -> MemoryBound:
    """`chosen` where a gradient may be taken; validation and samples run eagerly."""
    return chosen if torch.is_grad_enabled() else EAGER
