"""Other programs' latent caches: which files there are, of which image, and the latents in them.

What each writes, read in its public source; no code of theirs is here:

kohya-ss/sd-scripts, one `.npz` an image, beside it or in the same place below another folder
    library/strategy_sd.py `SdSdxlLatentsCachingStrategy.cache_batch_latents` keeps one draw,
    `latent_dist.sample()`, unscaled. library/strategy_base.py `save_latents_to_disk` writes it as
    float32 [C,h,w] under `latents` (`NAME.npz`) or, since 2025, under `latents_{h}x{w}`
    (`NAME_{W}x{H}_sd.npz`, several sizes in one file), with `original_size` (width, height).
    `latents_flipped` and `alpha_mask` may lie beside it and are not taken.
Nerogar/OneTrainer, a folder of `.pt`
    `StableDiffusion(XL)BaseDataLoader._preparation_modules` keeps the mean
    (`SampleVAEDistribution(mode='mean')`), unscaled. mgds DiskCache writes
    `HASH/variation-V/{i}.pt`, {latent_image: [C,h,w], crop_offset: (y, x), ...}, and
    `aggregate.pt`, which alone knows the image: a list of {image_path, ...} or, with
    util/PersistentCacheState.py, a dictionary by i. SmartDiskCache writes `{name}_{V+1}.pt`, and
    `cache.json` gives the image of each name. Its text caches are `.pt` too, without latents.
ppbrown/ai-training (SD1.5 with the SDXL VAE), one safetensors file an image
    trainer/cache-utils/create_imgcache_sdxl.py keeps `latent_dist.mean`, "raw latent, no scaling",
    [C,h,w] under `latent`, in `NAME.img_sdxl` or another suffix.
"""

import json
import os
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy
from numpy.typing import NDArray
from safetensors import safe_open

from xlsd_cache import UserError
from xlsd_cache.decode import IMAGE_SUFFIXES, Rejected

# What each keeps of the posterior, by its source.
KEEPS = {"kohya": "sample", "onetrainer": "mean", "safetensors": "mean"}
_KOHYA = re.compile(r"(_\d+x\d+)?(_sd|_sdxl)?\.npz$")
_KOHYA_TEXT = ("_te.npz", "_te_outputs.npz")
_INDEXES = ("aggregate.pt", "cache.json")


@dataclass(frozen=True)
class CacheFile:
    """One file of a peer's cache, not opened yet."""

    kind: str  # a key of KEEPS
    path: Path
    key: str  # CACHE_FOLDER_NAME/path/in/it
    image: str  # where the image is said to be: a path, or one without its suffix
    size: int  # bytes
    mtime_ns: int
    variation: int = 0  # OneTrainer caches an image several times, each augmented anew


@dataclass(frozen=True)
class Held:
    """One latent that a cache file holds, told by the file's header."""

    name: str  # of the array in the file
    shape: tuple[int, ...]
    half: bool  # float16; all else is read as float32, exactly
    original: tuple[int, int] | None = None  # width, height of the image when it was cached
    offset: tuple[int, int] | None = None  # left, top of the crop in pixels of the scaled image


@dataclass
class Found:
    """What lies in the cache folders."""

    files: list[CacheFile] = field(default_factory=list)
    images: list[Path] = field(default_factory=list)  # the cache folders that hold images as well
    passed_over: int = 0


def find(folders: tuple[Path, ...]) -> Found:
    """All cache files below the folders. Raises UserError for a folder or an index not readable."""
    found = Found()
    for folder in folders:
        root = folder.expanduser().absolute()
        if not root.is_dir():
            raise UserError(f"no folder {folder}; name a folder of cached latents")
        before = len(found.files)
        for place, _, names in os.walk(root, onerror=_unreadable, followlinks=True):
            _find_in(found, root, Path(place), sorted(names))
        if len(found.files) == before:
            raise UserError(
                f"no cached latents in {folder}: none of its files is an .npz of kohya's, a .pt of "
                f"OneTrainer's or a .safetensors; name the folder that holds them"
            )
    return found


def _unreadable(error: OSError) -> None:
    raise UserError(
        f"cannot read the folder {error.filename}: {error.strerror}; make it readable or leave it "
        f"out, for what is in it would silently be missing"
    ) from error


def _find_in(found: Found, root: Path, folder: Path, names: list[str]) -> None:
    images = _index(folder) if set(names) & set(_INDEXES) else {}
    for name in names:
        path = folder / name
        if path.suffix.lower() in IMAGE_SUFFIXES:
            if root not in found.images:
                found.images.append(root)
            continue
        kind, image, variation = _told_by_name(path, images)
        if not kind:
            found.passed_over += 1
            continue
        try:
            status = path.stat()
        except FileNotFoundError:  # a broken link, or deleted while we were looking
            found.passed_over += 1
            continue
        key = f"{root.name}/{path.relative_to(root).as_posix()}"
        key = key.encode("utf-8", "backslashreplace").decode()
        found.files.append(
            CacheFile(kind, path, key, image, status.st_size, status.st_mtime_ns, variation)
        )


def _told_by_name(path: Path, images: dict[str, str]) -> tuple[str, str, int]:
    """(kind, image, variation); no kind for files that are no latents."""
    name = path.name
    if name in _INDEXES or name.endswith(_KOHYA_TEXT):
        return "", "", 0
    if path.suffix == ".npz":
        return "kohya", str(path.parent / _KOHYA.sub("", name)), 0
    if path.suffix == ".safetensors" or path.suffix.startswith(".img_"):
        return "safetensors", str(path.with_suffix("")), 0
    if path.suffix == ".pt":
        group, _, number = path.stem.rpartition("_")  # SmartDiskCache
        if group in images and number.isdecimal():
            return "onetrainer", images[group], int(number) - 1
        place = re.fullmatch(r"variation-(\d+)", path.parent.name)  # DiskCache
        return "onetrainer", images.get(path.stem, ""), int(place[1]) if place else 0
    return "", "", 0


def _index(folder: Path) -> dict[str, str]:
    """Name of a `.pt` file -> its image, of a folder of OneTrainer's."""
    try:
        if (folder / "cache.json").exists():
            entries = json.loads((folder / "cache.json").read_bytes())["entries"]
            images: dict[str, str] = {}
            for image, entry in sorted(entries.items(), reverse=True):  # equal images share a file
                variants = entry.get("variants") or {"": entry}  # version 2 had only one
                images |= {v["cache_file"]: image for v in variants.values() if "cache_file" in v}
            return images
        told = torch.load(folder / "aggregate.pt", map_location="cpu", weights_only=True)
        items = dict(enumerate(told)) if isinstance(told, list) else told
        return {
            str(number): str(item["image_path"])
            for number, item in items.items()
            if isinstance(item, dict) and "image_path" in item
        }
    except Exception as error:  # whatever a malformed file makes the libraries stumble over
        name = "cache.json" if (folder / "cache.json").exists() else "aggregate.pt"
        raise UserError(
            f"cannot read {folder / name}, which alone says whose latents lie beside it: "
            f"{_told(error)}; restore it, or leave that folder out"
        ) from error


def peek(file: CacheFile) -> list[Held] | Rejected | None:
    """What latents a file holds, by its header; None for one of other things (OneTrainer's texts).

    Never raises for what the file holds, and never runs code that is in it.
    """
    if not file.size:
        return Rejected("corrupt", "the file is empty")
    try:
        with np.errstate(all="ignore"):
            return list(_PEEK[file.kind](file.path)) or _no_latent(file)
    except Exception as error:  # see _index
        return _reason(error)


def read(file: CacheFile, held: Held) -> NDArray[Any] | Rejected:
    """The latent, float16 or float32 [C,h,w]. Never raises for what the file holds."""
    try:
        if file.kind == "kohya":
            with np.load(file.path, allow_pickle=False) as arrays:
                latent = arrays[held.name]
        elif file.kind == "onetrainer":
            latent = _tensor(_load(file.path)[held.name])
        else:
            with safe_open(file.path, "pt") as tensors:
                latent = _tensor(tensors.get_tensor(held.name))
    except Exception as error:  # see _index
        return _reason(error)
    if latent.shape != held.shape:
        return Rejected("changed", f"holds {latent.shape} now and not {held.shape}")
    if not np.isfinite(latent).all():
        return Rejected("non_finite", "holds NaN or infinity")
    return np.ascontiguousarray(latent if held.half else latent.astype(np.float32))


def _peek_kohya(path: Path) -> Iterator[Held]:
    with zipfile.ZipFile(path) as arrays:
        for name in sorted(arrays.namelist()):
            size = re.fullmatch(r"latents((?:_\d+x\d+)?)\.npy", name)
            if not size:
                continue
            with arrays.open(name) as file:
                npy.read_magic(file)
                shape, _, dtype = npy.read_array_header_1_0(file)
            original = None
            if f"original_size{size[1]}.npy" in arrays.namelist():
                with arrays.open(f"original_size{size[1]}.npy") as file:
                    width, height = npy.read_array(file, allow_pickle=False).tolist()
                original = int(width), int(height)
            yield Held(name.removesuffix(".npy"), _floats(shape, dtype), dtype == "f2", original)


def _peek_onetrainer(path: Path) -> Iterator[Held]:
    told = _load(path)
    if not isinstance(told, dict) or not isinstance(told.get("latent_image"), torch.Tensor):
        return
    latent = told["latent_image"]
    height, width = told.get("original_resolution") or (0, 0)
    offset = told.get("crop_offset")  # (y, x)
    yield Held(
        "latent_image",
        _floats(tuple(latent.shape), latent.dtype),
        latent.dtype == torch.float16,
        (int(width), int(height)) if width else None,
        (int(offset[1]), int(offset[0])) if offset else None,
    )


def _peek_safetensors(path: Path) -> Iterator[Held]:
    with safe_open(path, "pt") as tensors:
        if "latent" in tensors.keys():  # noqa: SIM118 - it is no dictionary
            part = tensors.get_slice("latent")
            dtype = part.get_dtype()
            yield Held("latent", _floats(tuple(part.get_shape()), dtype), dtype == "F16")


_PEEK = {
    "kohya": _peek_kohya,
    "onetrainer": _peek_onetrainer,
    "safetensors": _peek_safetensors,
}


def _no_latent(file: CacheFile) -> Rejected | None:
    """What to say of a file without a latent."""
    if file.kind == "onetrainer":
        told = _load(file.path)
        if isinstance(told, dict) and any(k.startswith(("tokens", "text_enc")) for k in told):
            return None
    return Rejected("foreign", "holds no latent under the names that its program uses")


def _load(path: Path) -> Any:
    """A torch file's content, mapped; only tensors and plain values, never code."""
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


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
    if "weights_only" in str(error):
        return Rejected("unsafe", "its pickle asks to run code; it was not run")
    if isinstance(error, OSError) and error.errno:
        return Rejected("unreadable", _told(error))
    return Rejected("corrupt", _told(error))


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
