"""CPU memory that a GPU reads and writes while it computes: pinned, in few large blocks."""

from collections.abc import Mapping

import torch
from torch import Tensor

BLOCK = 2**26  # elements of pinned memory at once, 256 MiB


def pinned(named: Mapping[str, Tensor], pin: bool = True) -> dict[str, Tensor]:
    """Uninitialised f32 tensors of these shapes and strides in pinned memory.

    Torch rounds pinned memory up to a power of two, so they share blocks of that size. Tensors of
    equal strides are copied asynchronously, without a temporary. Without `pin`: in other memory.
    """
    sizes = {name: tensor.numel() for name, tensor in named.items()}
    views: dict[str, Tensor] = {}
    for block in packed(sizes, BLOCK):
        room = sum(sizes[name] for name in block)
        memory = torch.empty(room, dtype=torch.float32, pin_memory=pin, device="cpu")
        parts = torch.split(memory, [sizes[name] for name in block])
        for name, part in zip(block, parts, strict=True):
            views[name] = part.as_strided(named[name].shape, named[name].stride())
    return {name: views[name] for name in named}


def pinned_nbytes(sizes: Mapping[str, int]) -> int:
    """Bytes that `pinned` takes for f32 tensors of these numbers of elements."""
    blocks = [4 * sum(sizes[name] for name in block) for block in packed(sizes, BLOCK)]
    return sum(1 << (nbytes - 1).bit_length() for nbytes in blocks)


def packed(sizes: Mapping[str, int], room: int) -> list[list[str]]:
    """Names in blocks of up to `room` elements, largest first; a larger one gets its own block."""
    blocks: list[list[str]] = []
    free: list[int] = []
    for name in sorted(sizes, key=lambda x: -sizes[x]):
        block = next((i for i, left in enumerate(free) if sizes[name] <= left), len(free))
        if block == len(free):
            blocks.append([])
            free.append(room)
        blocks[block].append(name)
        free[block] -= sizes[name]
    return blocks
