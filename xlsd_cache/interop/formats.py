"""Read the cache files of other trainers. Format and program are found by content alone."""

import gzip
import io
import json
import os
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.lib import format as npy
from numpy.typing import NDArray
from safetensors import safe_open

from xlsd_cache.errors import one_line
from xlsd_cache.interop.cache_files import CacheFile, is_ai_toolkits
from xlsd_cache.outcomes import Rejected
from xlsd_cache.runtime.bounded_files import require_regular

_FILE_BYTES = 2**29  # the largest .npz or .pt: their tables and pickles are read whole
_GZIPPED = 2**28  # the most bytes that a gzipped file may inflate to; a latent has some 10^5
_TEXT = re.compile(r"tokens|text_enc|.*prompt|.*text_embed")  # keys of OneTrainer's, SimpleTuner's


@dataclass(frozen=True)
class CachedLatent:
    """One latent in a cache file, as the file's header describes it."""

    kind: str  # a key of cache_files.KEEPS
    name: str  # the array's name in the file
    shape: tuple[int, ...]
    half: bool  # float16; everything else is read exactly as float32
    original: tuple[int, int] | None = None  # width, height of the image when it was cached
    offset: tuple[int, int] | None = None  # left, top of the crop in pixels of the scaled image
    scaled: tuple[int, int] | None = None  # its width, height; None: just covers the bucket
    upside_down: bool = False  # the image was flipped vertically before it was encoded
    image: str = ""  # the image's name, where the file records it
    ignored: tuple[str, ...] = ()  # other arrays of this latent in the file


# The latents in a file; None where it caches something else, such as text embeddings.
Contents = list[CachedLatent] | Rejected | None


def peek(file: CacheFile) -> Contents:
    """Read a file's header."""
    try:
        require_regular(file.path)
        form = _format(file.path)
        latents = list(_PEEK[form](file.path))
        if latents:
            return latents
        names = sorted(_names(form, file.path))
    except Exception as error:  # a malformed file may raise anything
        return _reason(error)
    if form == "torch" and any(_TEXT.match(name) for name in names):
        return None
    content = (
        f"holds {', '.join(names[:5])}" + (", ..." if names[5:] else "") if names else "is empty"
    )
    return Rejected("foreign", f"{content}: no latent under a name that a known program uses")


def read(file: CacheFile, latent: CachedLatent) -> NDArray[Any] | Rejected:
    """Read a latent, float16 or float32 [C, h, w], or say why it cannot be used."""
    try:
        require_regular(file.path)
        form = _format(file.path)
        if form == "npz":
            with np.load(file.path, allow_pickle=False) as arrays:
                array = arrays[latent.name]
        elif form == "torch":
            loaded = _load(file.path)
            array = _tensor(loaded if isinstance(loaded, torch.Tensor) else loaded[latent.name])
        else:
            with safe_open(file.path, "pt") as tensors:
                array = _tensor(tensors.get_tensor(latent.name))
    except Exception as error:  # see peek
        return _reason(error)
    if array.shape != latent.shape:
        return Rejected("changed", f"has shape {array.shape} now, had {latent.shape}")
    if not np.isfinite(array).all():
        return Rejected("non_finite", "contains NaN or infinity")
    return np.ascontiguousarray(array if latent.half else array.astype(np.float32))


def _format(path: Path) -> str:
    """`npz`, `torch` or `safetensors`, by the first bytes, else by the suffix."""
    with path.open("rb") as file:
        head = file.read(16)
        if head[8:9] != b"{" and os.fstat(file.fileno()).st_size > _FILE_BYTES:
            raise ValueError(f"larger than {_FILE_BYTES >> 20} MiB, too large for a latent")
    if head.startswith(b"PK\3\4"):
        with zipfile.ZipFile(path) as members:
            names = members.namelist()
        return "torch" if any(name.endswith("/data.pkl") for name in names) else "npz"
    if head.startswith((b"\x1f\x8b", b"\x80\2")):  # gzip; a pickle, as torch wrote before 1.6
        return "torch"
    if head[8:9] == b"{":
        return "safetensors"
    return {".npz": "npz", ".pt": "torch"}.get(path.suffix, "safetensors")


def _peek_npz(path: Path) -> Iterator[CachedLatent]:
    with zipfile.ZipFile(path) as arrays:
        names = arrays.namelist()
        for name in sorted(names):
            size = re.fullmatch(r"latents((?:_\d+x\d+)?)\.npy", name)
            if not size:
                continue
            with arrays.open(name) as file:
                npy.read_magic(file)
                shape, _, dtype = npy.read_array_header_1_0(file)
            original = None
            if f"original_size{size[1]}.npy" in names:
                with arrays.open(f"original_size{size[1]}.npy") as file:
                    original = _two_numbers(file)
            others = ("latents_flipped", "alpha_mask")
            yield CachedLatent(
                "kohya",
                name.removesuffix(".npy"),
                _floats(shape, dtype),
                dtype == "f2",
                original,
                ignored=tuple(other for other in others if f"{other}{size[1]}.npy" in names),
            )


def _two_numbers(file: IO[bytes]) -> tuple[int, int]:
    """Read the two numbers of an .npy, whatever size its header claims."""
    data = file.read(4096)
    npy.read_magic(begun := io.BytesIO(data))
    if npy.read_array_header_1_0(begun)[0] != (2,):
        raise ValueError("original_size is not two numbers")
    width, height = npy.read_array(io.BytesIO(data), allow_pickle=False).tolist()
    return pixels(width), pixels(height)


def pixels(value: Any) -> int:
    """A number of pixels from a file. Raises ValueError for anything else."""
    number = int(value)
    if not 0 <= number < 2**31:
        raise ValueError(f"{str(value)[:40]} is not a number of pixels")
    return number


def _peek_torch(path: Path) -> Iterator[CachedLatent]:
    loaded = _load(path)
    if isinstance(loaded, torch.Tensor):
        loaded = {"latents": loaded}
    if not isinstance(loaded, dict):
        return
    kind, name = "onetrainer", "latent_image"
    if name not in loaded:
        kind, name = "simpletuner", "latents"
    latent = loaded.get(name)
    if not isinstance(latent, torch.Tensor):
        return
    height, width = loaded.get("original_resolution") or (0, 0)
    offset = loaded.get("crop_offset")  # (y, x)
    yield CachedLatent(
        kind,
        name,
        _floats(tuple(latent.shape), latent.dtype),
        latent.dtype == torch.float16,
        (pixels(width), pixels(height)) if width else None,
        (pixels(offset[1]), pixels(offset[0])) if offset else None,
    )


def _peek_safetensors(path: Path) -> Iterator[CachedLatent]:
    with safe_open(path, "pt") as tensors:
        if "latent" not in tensors.keys():  # noqa: SIM118 - not a dictionary
            return
        part, metadata = tensors.get_slice("latent"), tensors.metadata() or {}
        dtype = part.get_dtype()
    shape, half = _floats(tuple(part.get_shape()), dtype), dtype == "F16"
    if "latent_space_version" not in metadata:
        yield CachedLatent(
            "ai-toolkit" if is_ai_toolkits(path) else "safetensors", "latent", shape, half
        )
        return
    numbers = [
        pixels(json.loads(metadata.get(name, "0")) or 0)
        for name in ("crop_x", "crop_y", "scale_to_width", "scale_to_height")
    ]
    yield CachedLatent(
        "ai-toolkit",
        "latent",
        shape,
        half,
        offset=(numbers[0], numbers[1]) if all(numbers[2:]) else None,
        scaled=(numbers[2], numbers[3]) if all(numbers[2:]) else None,
        upside_down=metadata.get("flip_y") == "true",
        image=Path(metadata.get("filename", "")).name,
    )


_PEEK = {"npz": _peek_npz, "torch": _peek_torch, "safetensors": _peek_safetensors}


def _names(form: str, path: Path) -> list[str]:
    """The names of the arrays in the file."""
    if form == "npz":
        with zipfile.ZipFile(path) as arrays:
            return [name.removesuffix(".npy") for name in arrays.namelist()]
    if form == "torch":
        loaded = _load(path)
        if isinstance(loaded, dict):
            return [str(key) for key in loaded]
        return [f"a {type(loaded).__name__}"]
    with safe_open(path, "pt") as tensors:
        return list(tensors.keys())


def _load(path: Path) -> Any:
    """Load a torch file, memory-mapped: tensors and plain values only, never code."""
    # torch.load takes any file of that suffix for a safetensors file.
    if path.suffix != ".safetensors" and zipfile.is_zipfile(path):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    data = path.read_bytes()
    if data.startswith(b"\x1f\x8b"):
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            data = file.read(_GZIPPED)
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _tensor(tensor: torch.Tensor) -> NDArray[Any]:
    return tensor.numpy() if tensor.dtype == torch.float16 else tensor.float().numpy()


def _floats(shape: tuple[int, ...], dtype: Any) -> tuple[int, ...]:
    """The shape, if float32 holds the dtype exactly. Raises ValueError otherwise."""
    if str(dtype).removeprefix("torch.") not in {
        "float32", "float16", "bfloat16", "F32", "F16", "BF16",
    }:  # fmt: skip
        raise ValueError(f"the latent is {dtype}, neither float32 nor float16 nor bfloat16")
    return shape


def _reason(error: Exception) -> Rejected:
    if isinstance(error, FileNotFoundError):
        return Rejected("vanished", "deleted after the scan")
    if "weights_only" in str(error) and "operand" not in str(error):  # a damaged pickle
        return Rejected("unsafe", "the pickle would run code; it was not loaded")
    if isinstance(error, OSError) and error.errno:
        return Rejected("unreadable", _summary(error))
    return Rejected("corrupt", _summary(error))


def _summary(error: Exception) -> str:
    return one_line(f"{type(error).__name__}: {error}")
