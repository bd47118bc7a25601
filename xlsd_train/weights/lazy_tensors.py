"""Lazy tensors: read from and written to safetensors files one at a time.

Copying a model between files needs little more memory than its largest tensor. The format is
safetensors': eight bytes of length, a JSON header, then the tensors without gaps.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from xlsd_cache.encoding.finite import bad_values, is_finite
from xlsd_cache.errors import UserError, one_line
from xlsd_cache.runtime.atomic import fill_in
from xlsd_cache.runtime.bounded_files import parse_json
from xlsd_train.weights.pickles import is_pickle, read_pickle

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
MOST_HEADER = 2**25  # bytes; SD1.5's has 130,000, and files with much metadata have millions
HASH, UNKNOWN = "modelspec.hash_sha256", "0x" + "_" * 64


@dataclass(frozen=True)
class LazyTensor:
    """A tensor whose values are read on demand."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    name: str = ""  # in its file

    @property
    def nbytes(self) -> int:
        """Size on disk."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def reshaped(self, *shape: int) -> "LazyTensor":
        """The same values in another shape."""
        return replace(self, shape=shape, read=lambda: self.read().reshape(shape))

    def to(self, dtype: torch.dtype, what: str = "") -> "LazyTensor":
        """Cast to another dtype; integer tensors are left alone.

        Reading raises OverflowError, with `what` in its message, if a value overflows the dtype.
        """
        if dtype == self.dtype or not self.dtype.is_floating_point:
            return self

        def read() -> Tensor:
            original = self.read()
            cast = original.to(dtype)
            if not is_finite(cast) and is_finite(original):
                largest = original.abs().max().item()
                raise OverflowError(
                    f"{what or self.name}, {bad_values(cast)}, the largest {largest:g}"
                )
            return cast

        return replace(self, dtype=dtype, read=read)


def in_memory(tensor: Tensor) -> LazyTensor:
    """Wrap a tensor that is in memory."""
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def open_tensors(path: Path) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """The tensors and metadata of a .safetensors file, or of a pickle that runs no code.

    Raises UserError for a file that is neither, is truncated, or could run code.
    """
    try:
        if not path.is_file():
            raise UserError(f"cannot read {path}: no such file; give a file of weights")
        if is_pickle(path):
            held = read_pickle(path, CODES).items()
            return {name: replace(in_memory(value), name=name) for name, value in held}, {}
        check_length(path)
        with safe_open(path, "pt") as checked, path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header, stat = parse_json(file.read(length)), os.fstat(file.fileno())
            tensors = {}
            for name in checked.keys():  # noqa: SIM118 - it is no mapping
                entry = header[name]
                shape, dtype = tuple(entry["shape"]), DTYPES[entry["dtype"]]
                offset = 8 + length + entry["data_offsets"][0]
                read = partial(_read, path, stat, offset, shape, dtype)
                tensors[name] = LazyTensor(shape, dtype, read, name)
            return tensors, dict(checked.metadata() or {})
    except (OSError, ValueError, SafetensorError, KeyError) as error:
        raise UserError(
            f"cannot read {path}: {_why(path, error)}; download or write it again"
        ) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a .safetensors file of our own. Raises ValueError for any other file."""
    if not path.is_file():
        raise ValueError("it is missing")
    check_length(path)
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, KeyError, RuntimeError) as error:
        raise ValueError(_why(path, error)) from error
    return tensors


def write_tensors(
    path: Path, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str]
) -> None:
    """Write a .safetensors file, holding one tensor at a time.

    Adds modelspec.hash_sha256, of everything after the header, to the metadata. Raises what
    reading a tensor raises and then leaves a partial file, so write under a temporary name.
    """
    # Wider dtypes first, so that each tensor is aligned to its element size; then as given.
    order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {**metadata, HASH: UNKNOWN}}
    end = 0
    for name in order:
        tensor, begin = tensors[name], end
        end += tensor.nbytes
        header[name] = {
            "dtype": CODES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            data = _bytes(tensors[name].read())
            digest.update(data.data)
            file.write(data.data)
    fill_in(path, 8 + text.index(UNKNOWN.encode()), b"0x" + digest.hexdigest().encode())


def compare_tensors(path: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """Read a file back and compare bit for bit. Raises RuntimeError for any difference."""
    written, _ = open_tensors(path)
    if written.keys() != tensors.keys():
        raise RuntimeError(f"{path} holds other names than were written")
    for name, actual in written.items():
        expected = tensors[name]
        same = (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
        # By hash, so that only one of the two is in memory at a time.
        if not same or _digest(actual.read()) != _digest(expected.read()):
            raise RuntimeError(f"{path}: {name} is not what was written")


def sha256_of(path: Path) -> str:
    """SHA-256 of the whole file, as model sites list it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(
    path: Path, stat: os.stat_result, offset: int, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """Read one tensor at its offset; parsing the header for each would take a second.

    Not mapped: pages of a mapped file count as our memory. Raises OSError if the file was replaced.
    """
    tensor = torch.empty(shape, dtype=dtype)
    with path.open("rb", buffering=0) as file:
        now = os.fstat(file.fileno())
        if any(
            getattr(now, field) != getattr(stat, field)
            for field in ("st_ino", "st_size", "st_mtime_ns")
        ):
            raise OSError(f"{path} was replaced while it was read")
        file.seek(offset)
        left = _bytes(tensor).data
        while left and (count := file.readinto(left)):
            left = left[count:]
        if left:
            raise OSError(f"{path} was truncated while it was read")
    return tensor


def _bytes(tensor: Tensor) -> NDArray[np.uint8]:
    bare: NDArray[np.uint8] = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return bare


def _digest(tensor: Tensor) -> bytes:
    return hashlib.sha256(_bytes(tensor).data).digest()


def check_length(path: Path) -> None:
    """Raises ValueError for a header longer than its file or than any; reads nothing else."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(100)
    if other := _other_format(head):
        raise ValueError(other)
    length = int.from_bytes(head[:8], "little")
    if len(head) < 9 or not head[8:].lstrip().startswith(b"{"):
        raise ValueError("it is no .safetensors file, or its header is truncated")
    if length > min(size - 8, MOST_HEADER):
        limit = f"the file has {size}" if length > size - 8 else f"the limit is {MOST_HEADER}"
        raise ValueError(f"its header claims {length} bytes ({limit}): it is truncated or damaged")


def _other_format(head: bytes) -> str:
    """By a file's first bytes, what people often have in place of weights; "" for the rest."""
    if head.startswith(b"version https://git-lfs"):
        return "it is a git LFS pointer, not the file itself"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "it is a web page"
    return ""


def _why(path: Path, error: Exception) -> str:
    """What is wrong with a .safetensors file, by its header and its length."""
    if not isinstance(error, SafetensorError):
        return one_line(error)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = parse_json(file.read(length))
            ends = [entry["data_offsets"][1] for key, entry in header.items() if key[:2] != "__"]
            needs = 8 + length + max(ends, default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return f"it is no .safetensors file, or its header is damaged ({error})"
    if needs <= size:
        return f"its header is damaged ({error})"
    return f"its header describes {needs} bytes and the file has {size}: truncated or damaged"
