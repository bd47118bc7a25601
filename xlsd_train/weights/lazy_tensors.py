"""Tensors on the disk, read one at a time and written one at a time.

So a model passes from one file to another in little more memory than its largest tensor. The
format is safetensors': eight bytes of length, a JSON header, the tensors without gaps.
"""

import hashlib
import json
import os
import re
import zipfile
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

from xlsd_cache.encoding.finite import count, is_finite
from xlsd_cache.errors import UserError, one_line
from xlsd_cache.runtime.atomic import fill_in
from xlsd_cache.runtime.bounded_files import parse_json

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
MOST_OLD = 2**34  # bytes of a pickle that has to be read whole
MOST_HEADER = 2**25  # bytes; SD1.5's has 130,000, and with much metadata some have millions
HASH, UNKNOWN = "modelspec.hash_sha256", "0x" + "_" * 64


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read when it is asked for."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    name: str = ""  # in its file

    @property
    def nbytes(self) -> int:
        """Its size on the disk."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def reshaped(self, *shape: int) -> "LazyTensor":
        """The same numbers in another shape."""
        return replace(self, shape=shape, read=lambda: self.read().reshape(shape))

    def to(self, dtype: torch.dtype, what: str = "") -> "LazyTensor":
        """In another dtype; integers stay.

        Reading raises OverflowError, which names `what`, where the dtype cannot hold a number.
        """
        if dtype == self.dtype or not self.dtype.is_floating_point:
            return self

        def read() -> Tensor:
            old = self.read()
            new = old.to(dtype)
            if not is_finite(new) and is_finite(old):
                most = old.abs().max().item()
                raise OverflowError(f"{what or self.name}, {count(new)}, the largest {most:g}")
            return new

        return replace(self, dtype=dtype, read=read)


def in_memory(tensor: Tensor) -> LazyTensor:
    """A tensor that is there already."""
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def open_tensors(path: Path) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """The tensors of a .safetensors file, or of a pickle that runs no code; and its metadata.

    Raises UserError for a file that is neither, is cut short, or could run code.
    """
    try:
        if not path.is_file():
            raise UserError(f"cannot read {path}: it is no file; give one of weights")
        if _is_pickle(path):
            return _open_pickle(path), {}
        check_length(path)
        with safe_open(path, "pt") as checked, path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header, was = parse_json(file.read(length)), os.fstat(file.fileno())
            stored = {}
            for name in checked.keys():  # noqa: SIM118 - it is no mapping
                it = header[name]
                shape, dtype = tuple(it["shape"]), DTYPES[it["dtype"]]
                read = partial(_read, path, was, 8 + length + it["data_offsets"][0], shape, dtype)
                stored[name] = LazyTensor(shape, dtype, read, name)
            return stored, dict(checked.metadata() or {})
    except (OSError, ValueError, SafetensorError, KeyError) as error:
        raise UserError(
            f"cannot read {path}: {_why(path, error)}; fetch or write it anew"
        ) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a .safetensors file of our own. Raises ValueError for what is none."""
    if not path.is_file():
        raise ValueError("it is missing")
    check_length(path)
    try:
        found: dict[str, Tensor] = load_file(path)
    except (SafetensorError, KeyError, RuntimeError) as error:
        raise ValueError(_why(path, error)) from error
    return found


def write_tensors(
    path: Path, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str]
) -> None:
    """Write a .safetensors file, holding one tensor at a time.

    The metadata gains modelspec.hash_sha256, of all that follows the header. Raises what reading
    a tensor raises, and leaves half a file then: write under a temporary name.
    """
    # Wider ones first, so that each begins at a multiple of its own size; then as given.
    order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {**metadata, HASH: UNKNOWN}}
    end = 0
    for name in order:
        it, begin = tensors[name], end
        end += it.nbytes
        about = {"dtype": CODES[it.dtype], "shape": it.shape, "data_offsets": [begin, end]}
        header[name] = about
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
    """Read a file back with safetensors itself; RuntimeError where it is not these, bit for bit."""
    written, _ = open_tensors(path)
    if written.keys() != tensors.keys():
        raise RuntimeError(f"{path} holds other names than were written")
    for name, there in written.items():
        ours = tensors[name]
        same = (there.shape, there.dtype) == (ours.shape, ours.dtype)
        # By their hashes, so that never two of them are in memory.
        if not same or _digest(there.read()) != _digest(ours.read()):
            raise RuntimeError(f"{path}: {name} is not what was written")


def sha256_of(path: Path) -> str:
    """Of the whole file, as model sites list it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(
    path: Path, was: os.stat_result, at: int, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """A tensor of a file whose header is known, which to parse for each would take a second.

    Read, for pages of a file that stays mapped would count as our memory. Raises OSError where it
    is another file by now.
    """
    tensor = torch.empty(shape, dtype=dtype)
    with path.open("rb", buffering=0) as file:
        now = os.fstat(file.fileno())
        if (now.st_ino, now.st_size, now.st_mtime_ns) != (was.st_ino, was.st_size, was.st_mtime_ns):
            raise OSError(f"{path} was replaced while it was read")
        file.seek(at)
        left = _bytes(tensor).data
        while left and (count := file.readinto(left)):
            left = left[count:]
        if left:
            raise OSError(f"{path} was cut short while it was read")
    return tensor


def _bytes(tensor: Tensor) -> NDArray[np.uint8]:
    bare: NDArray[np.uint8] = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return bare


def _digest(tensor: Tensor) -> bytes:
    return hashlib.sha256(_bytes(tensor).data).digest()


def check_length(path: Path) -> None:
    """Raises ValueError for a header longer than its file, or than any; nothing else is read."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(100)
    if told := _other(head):
        raise ValueError(told)
    length = int.from_bytes(head[:8], "little")
    if len(head) < 9 or not head[8:].lstrip().startswith(b"{"):
        raise ValueError("it is no .safetensors file, or its header is cut short")
    if length > min(size - 8, MOST_HEADER):
        most = "and it has {size}" if length > size - 8 else "more than any has"
        raise ValueError(
            f"its header claims {length} bytes, {most.format(size=size)}, so it is cut short or "
            f"damaged"
        )


def _other(head: bytes) -> str:
    """What a file is by its first bytes, where people often have it in place of weights."""
    if head.startswith(b"version https://git-lfs"):
        return "it is a pointer of git LFS and not the file itself"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "it is a web page"
    return ""


def _is_pickle(path: Path) -> bool:
    """Whether torch.save wrote it, in its zip format or the older one."""
    with path.open("rb") as file:
        head = file.read(9)
    # A safetensors header begins with { after its length, and no pickle has one there.
    return head[:4] == b"PK\x03\x04" or (head[:1] == b"\x80" and head[8:] != b"{")


def _open_pickle(path: Path) -> dict[str, LazyTensor]:
    try:
        held = _loaded(path)
    # The bytes of a stranger have the unpickler raise errors of all kinds.
    except Exception as error:
        names = re.search(r"GLOBAL (\S+)", str(error))
        told = f"it holds {names[1]}, so" if names else "damaged, or"
        raise UserError(
            f"{path} is a pickle that is no bare weights: {told} loading it could run code; give "
            f"the .safetensors of it"
        ) from error
    while isinstance(held, dict) and isinstance(held.get("state_dict"), dict):
        held = held["state_dict"]
    items = held.items() if isinstance(held, dict) else ()
    tensors = {str(name): value for name, value in items if isinstance(value, Tensor)}
    for name, value in tensors.items():
        if value.layout != torch.strided or value.device.type != "cpu" or value.dtype not in CODES:
            raise UserError(
                f"{path}: {name} is no plain tensor but {value.layout} of {value.dtype} on "
                f"{value.device}; give the .safetensors of it"
            )
    return {name: replace(in_memory(value), name=name) for name, value in tensors.items()}


def _loaded(path: Path) -> Any:
    """What torch saved there, by an unpickler that makes tensors and plain values only.

    Of the zip format the tensors stay on the disk until they are read. Raises whatever damage makes
    it stumble over.
    """
    with path.open("rb") as file:
        if file.read(1) == b"\x80":  # the older format
            if path.stat().st_size > MOST_OLD:
                raise ValueError("it is larger than any of its kind")
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    held = sum(member.file_size for member in members)
    pickled = max((it.file_size for it in members if it.filename.endswith(".pkl")), default=0)
    packed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
    if packed or held > path.stat().st_size or pickled > MOST_HEADER:  # torch packs nothing
        raise ValueError("it claims more than it holds")
    if path.suffix == ".safetensors":  # whose suffix torch.load believes
        with path.open("rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _why(path: Path, error: Exception) -> str:
    """In words: what a broken file is, as far as its first bytes and its length tell."""
    if not isinstance(error, SafetensorError):
        return one_line(error)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = parse_json(file.read(length))
            spans = [it["data_offsets"][1] for name, it in header.items() if name[:2] != "__"]
            needs = 8 + length + max(spans, default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return f"it is no .safetensors file, or its header is damaged ({error})"
    if needs <= size:
        return f"its header is damaged ({error})"
    return f"its header speaks of {needs} bytes and it has {size}, so it is cut short or damaged"
