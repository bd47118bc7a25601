"""What a peer's cache file holds: its format and its program are told by its content alone."""

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

_FILE_BYTES = 2**29  # of an .npz or .pt: their tables and pickles are read whole
_GZIPPED = 2**28  # bytes that a gzipped file may inflate to: a latent has some hundred thousand
_TEXT = re.compile(r"tokens|text_enc|.*prompt|.*text_embed")  # keys of OneTrainer's, SimpleTuner's


@dataclass(frozen=True)
class Held:
    """One latent that a cache file holds, told by the file's header."""

    kind: str  # a key of peers.KEEPS
    name: str  # of the array in the file
    shape: tuple[int, ...]
    half: bool  # float16; all else is read as float32, exactly
    original: tuple[int, int] | None = None  # width, height of the image when it was cached
    offset: tuple[int, int] | None = None  # left, top of the crop in pixels of the scaled image
    scaled: tuple[int, int] | None = None  # width, height of that; where not told, it fills barely
    upside_down: bool = False  # the latent is of the image flipped vertically
    image: str = ""  # the image's name, where the file tells it
    beside: tuple[str, ...] = ()  # what else the file holds of this latent and is not taken


# The latents in a file, by its header; None where it is a cache of something else.
Contents = list[Held] | Rejected | None


def peek(file: CacheFile) -> Contents:
    """What a file holds."""
    try:
        require_regular(file.path)
        form = _format(file.path)
        held = list(_PEEK[form](file.path))
        if held:
            return held
        names = sorted(_names(form, file.path))
    except Exception as error:  # whatever a malformed file makes the libraries stumble over
        return _reason(error)
    if form == "torch" and any(_TEXT.match(name) for name in names):
        return None
    told = f"holds {', '.join(names[:5])}" + (", ..." if names[5:] else "") if names else "is empty"
    return Rejected("foreign", f"{told}: no latent under the names that known programs use")


def read(file: CacheFile, held: Held) -> NDArray[Any] | Rejected:
    """The latent, float16 or float32 [C,h,w], as the file holds it; or why it cannot be used."""
    try:
        require_regular(file.path)
        form = _format(file.path)
        if form == "npz":
            with np.load(file.path, allow_pickle=False) as arrays:
                latent = arrays[held.name]
        elif form == "torch":
            told = _load(file.path)
            latent = _tensor(told if isinstance(told, torch.Tensor) else told[held.name])
        else:
            with safe_open(file.path, "pt") as tensors:
                latent = _tensor(tensors.get_tensor(held.name))
    except Exception as error:  # see peek
        return _reason(error)
    if latent.shape != held.shape:
        return Rejected("changed", f"holds {latent.shape} now and not {held.shape}")
    if not np.isfinite(latent).all():
        return Rejected("non_finite", "holds NaN or infinity")
    return np.ascontiguousarray(latent if held.half else latent.astype(np.float32))


def _format(path: Path) -> str:
    """`npz`, `torch` or `safetensors`, by the first bytes; by the name where they tell nothing."""
    with path.open("rb") as file:
        head = file.read(16)
        if head[8:9] != b"{" and os.fstat(file.fileno()).st_size > _FILE_BYTES:
            raise ValueError(f"it has more than {_FILE_BYTES >> 20} MiB, as no latents have")
    if head.startswith(b"PK\3\4"):
        with zipfile.ZipFile(path) as members:
            names = members.namelist()
        return "torch" if any(name.endswith("/data.pkl") for name in names) else "npz"
    if head.startswith((b"\x1f\x8b", b"\x80\2")):  # gzip; a pickle, as torch wrote before 1.6
        return "torch"
    if head[8:9] == b"{":
        return "safetensors"
    return {".npz": "npz", ".pt": "torch"}.get(path.suffix, "safetensors")


def _peek_npz(path: Path) -> Iterator[Held]:
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
            yield Held(
                "kohya",
                name.removesuffix(".npy"),
                _floats(shape, dtype),
                dtype == "f2",
                original,
                beside=tuple(other for other in others if f"{other}{size[1]}.npy" in names),
            )


def _two_numbers(file: IO[bytes]) -> tuple[int, int]:
    """The two numbers in an .npy; its header may claim any number of them."""
    data = file.read(4096)
    npy.read_magic(begun := io.BytesIO(data))
    if npy.read_array_header_1_0(begun)[0] != (2,):
        raise ValueError("its original_size is not two numbers")
    width, height = npy.read_array(io.BytesIO(data), allow_pickle=False).tolist()
    return pixels(width), pixels(height)


def pixels(told: Any) -> int:
    """A side or a place in pixels as a file tells it. Raises ValueError for what is neither."""
    number = int(told)
    if not 0 <= number < 2**31:
        raise ValueError(f"{str(told)[:40]} are no pixels of an image")
    return number


def _peek_torch(path: Path) -> Iterator[Held]:
    told = _load(path)
    if isinstance(told, torch.Tensor):
        told = {"latents": told}
    if not isinstance(told, dict):
        return
    kind, name = "onetrainer", "latent_image"
    if name not in told:
        kind, name = "simpletuner", "latents"
    latent = told.get(name)
    if not isinstance(latent, torch.Tensor):
        return
    height, width = told.get("original_resolution") or (0, 0)
    offset = told.get("crop_offset")  # (y, x)
    yield Held(
        kind,
        name,
        _floats(tuple(latent.shape), latent.dtype),
        latent.dtype == torch.float16,
        (pixels(width), pixels(height)) if width else None,
        (pixels(offset[1]), pixels(offset[0])) if offset else None,
    )


def _peek_safetensors(path: Path) -> Iterator[Held]:
    with safe_open(path, "pt") as tensors:
        if "latent" not in tensors.keys():  # noqa: SIM118 - it is no dictionary
            return
        part, told = tensors.get_slice("latent"), tensors.metadata() or {}
        dtype = part.get_dtype()
    shape, half = _floats(tuple(part.get_shape()), dtype), dtype == "F16"
    if "latent_space_version" not in told:
        yield Held("ai-toolkit" if is_ai_toolkits(path) else "safetensors", "latent", shape, half)
        return
    numbers = [
        pixels(json.loads(told.get(name, "0")) or 0)
        for name in ("crop_x", "crop_y", "scale_to_width", "scale_to_height")
    ]
    yield Held(
        "ai-toolkit",
        "latent",
        shape,
        half,
        offset=(numbers[0], numbers[1]) if all(numbers[2:]) else None,
        scaled=(numbers[2], numbers[3]) if all(numbers[2:]) else None,
        upside_down=told.get("flip_y") == "true",
        image=Path(told.get("filename", "")).name,
    )


_PEEK = {"npz": _peek_npz, "torch": _peek_torch, "safetensors": _peek_safetensors}


def _names(form: str, path: Path) -> list[str]:
    """What the file holds, by name."""
    if form == "npz":
        with zipfile.ZipFile(path) as arrays:
            return [name.removesuffix(".npy") for name in arrays.namelist()]
    if form == "torch":
        told = _load(path)
        return (
            [str(key) for key in told] if isinstance(told, dict) else [f"a {type(told).__name__}"]
        )
    with safe_open(path, "pt") as tensors:
        return list(tensors.keys())


def _load(path: Path) -> Any:
    """A torch file's content, mapped; only tensors and plain values, never code."""
    # By that name torch would take it for what it is not.
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
    """The shape, of an array that fp32 holds exactly. Raises ValueError for another."""
    if str(dtype).removeprefix("torch.") not in {
        "float32", "float16", "bfloat16", "F32", "F16", "BF16",
    }:  # fmt: skip
        raise ValueError(f"its latent is of {dtype}, neither float32 nor float16 nor bfloat16")
    return shape


def _reason(error: Exception) -> Rejected:
    if isinstance(error, FileNotFoundError):
        return Rejected("vanished", "gone between the scan and its reading")
    if "weights_only" in str(error) and "operand" not in str(error):  # that is a damaged pickle
        return Rejected("unsafe", "its pickle asks to run code; it was not run")
    if isinstance(error, OSError) and error.errno:
        return Rejected("unreadable", _told(error))
    return Rejected("corrupt", _told(error))


def _told(error: Exception) -> str:
    return one_line(f"{type(error).__name__}: {error}")
