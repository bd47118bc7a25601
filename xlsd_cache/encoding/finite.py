"""Whether weights are finite: one pass over them, no temporary of their size, one wait for a card.

A norm is finite only where every number is, and is computed at the memory's speed; that of huge
finite numbers may overflow, so what a norm suspects is looked at again, exactly.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether every number of a tensor is."""
    return not unfit({"": tensor})


def unfit(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of those that hold nan or infinity, in their order; integers never do."""
    floats = {
        name: _wide(value.detach())
        for name, value in tensors.items()
        if value.is_floating_point() and value.numel()
    }
    kinds: dict[Any, list[str]] = {}
    for name, value in floats.items():
        kinds.setdefault((value.device, value.dtype), []).append(name)
    suspects = set()
    for names in kinds.values():
        norms = torch._foreach_norm([floats[name] for name in names])  # noqa: SLF001
        told = torch.stack(list(norms)).tolist()  # waits for the device
        suspects |= {
            name for name, norm in zip(names, told, strict=True) if not math.isfinite(norm)
        }
    return [name for name in floats if name in suspects and not _exactly(floats[name])]


def count(tensor: Tensor) -> str:
    """How many of its numbers are not finite, as `1 of 288 values`."""
    wide = _wide(tensor.detach())
    bad = wide.numel() - int(torch.isfinite(wide).sum())
    return f"{bad} of {wide.numel()} value{'s' if wide.numel() != 1 else ''}"


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype.itemsize == 1 else tensor  # for eight bits little works


def _exactly(tensor: Tensor) -> bool:
    """Without the temporaries that torch.isfinite makes."""
    return all(map(math.isfinite, torch.stack(tensor.aminmax()).tolist()))
