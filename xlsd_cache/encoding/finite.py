"""Finds NaN and infinity in weights: one pass, no temporary of their size, one device sync.

A tensor's norm is finite only if all its numbers are, and is computed at memory speed. The norm of
huge finite numbers may overflow, so tensors with a non-finite norm are checked again, exactly.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether every number of the tensor is finite."""
    return not not_finite({"": tensor})


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of the tensors that hold NaN or infinity, in order; integers never do."""
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
        values = torch.stack(list(norms)).tolist()  # device sync
        suspects |= {
            name for name, norm in zip(names, values, strict=True) if not math.isfinite(norm)
        }
    return [name for name in floats if name in suspects and not _all_finite(floats[name])]


def bad_values(tensor: Tensor) -> str:
    """How many values are NaN or infinite, as in `1 of 288 values`."""
    wide = _wide(tensor.detach())
    bad = wide.numel() - int(torch.isfinite(wide).sum())
    return f"{bad} of {wide.numel()} value{'s' if wide.numel() != 1 else ''}"


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype.itemsize == 1 else tensor  # float8 lacks most operations


def _all_finite(tensor: Tensor) -> bool:
    """Exact, without the temporaries that torch.isfinite makes."""
    return all(map(math.isfinite, torch.stack(tensor.aminmax()).tolist()))
