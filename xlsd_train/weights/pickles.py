"""Read weights from pickles without running code: older .ckpt and .bin files."""

import re
import zipfile
from collections.abc import Container
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xlsd_cache.errors import UserError

MOST_OLD = 2**34  # bytes of a pickle in the older format, which is read at once
MOST_PICKLED = 2**25  # bytes of the zip format's pickle, which lists tensors as a header does


def is_pickle(path: Path) -> bool:
    """Whether torch.save wrote the file, in its zip format or the older one."""
    with path.open("rb") as file:
        head = file.read(9)
    # A safetensors header begins with { after its length, and no pickle has one there.
    return head[:4] == b"PK\x03\x04" or (head[:1] == b"\x80" and head[8:] != b"{")


def read_pickle(path: Path, dtypes: Container[torch.dtype]) -> dict[str, Tensor]:
    """The tensors in a pickle, which may be nested in `state_dict`. Runs no code.

    Raises UserError for a pickle of anything else, and for tensors of other dtypes.
    """
    try:
        state = _unpickled(path)
    except Exception as error:  # an untrusted file can make the unpickler raise anything
        names = re.search(r"GLOBAL (\S+)", str(error))
        why = f"it holds {names[1]}, so loading it" if names else "it is damaged, or loading it"
        raise UserError(
            f"{path} is a pickle of more than weights: {why} could run code; use the model's "
            f".safetensors file"
        ) from error
    while isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    items = state.items() if isinstance(state, dict) else ()
    tensors = {str(name): value for name, value in items if isinstance(value, Tensor)}
    for name, value in tensors.items():
        if value.layout != torch.strided or value.device.type != "cpu" or value.dtype not in dtypes:
            raise UserError(
                f"{path}: {name} is not a plain tensor but {value.layout} of {value.dtype} on "
                f"{value.device}; use the model's .safetensors file"
            )
    return tensors


def _unpickled(path: Path) -> Any:
    """What torch.save wrote, loaded by an unpickler of tensors and plain values only.

    Tensors of the zip format are memory-mapped. Raises errors of any kind for a damaged file.
    """
    with path.open("rb") as file:
        if file.read(1) == b"\x80":  # the older format
            if path.stat().st_size > MOST_OLD:
                raise ValueError(f"it is larger than {MOST_OLD} bytes")
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    total = sum(member.file_size for member in members)
    pickled = max((m.file_size for m in members if m.filename.endswith(".pkl")), default=0)
    compressed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
    if compressed or total > path.stat().st_size or pickled > MOST_PICKLED:  # torch only stores
        raise ValueError("it claims more than it holds")
    if path.suffix == ".safetensors":  # torch.load goes by the suffix
        with path.open("rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
