"""Find the latent caches of other trainers, and the image names that each file may belong to.

What each trainer writes, as its public source says (no code of theirs is here):

kohya-ss/sd-scripts, one `.npz` an image, next to it or at the same path in another folder
    library/strategy_sd.py `SdSdxlLatentsCachingStrategy.cache_batch_latents` keeps one draw,
    `latent_dist.sample()`, unscaled. library/strategy_base.py `save_latents_to_disk` writes it as
    float32 [C,h,w] under `latents` (`NAME.npz`) or, since 2025, under `latents_{h}x{w}`
    (`NAME_{W}x{H}_sd.npz`, several sizes in one file), with `original_size` (width, height).
    `latents_flipped` (`--flip_aug`) and `alpha_mask` may be in the file too and are ignored.
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
ostris/ai-toolkit, one safetensors file an image in a folder `_latent_cache` next to it
    toolkit/stable_diffusion_model.py `encode_images` keeps one draw, `latent_dist.sample()`, less
    the shift and times the scaling factor. toolkit/dataloader_mixins.py `_cache_one_latent` writes
    it as [C,h,w] under `latent`, in the model's dtype. `get_latent_path` names the file
    `{stem}_{hash}.safetensors`: the md5 of `get_latent_info_dict`, base64url, 22 characters that
    may be `_`. That dictionary is the file's metadata too: filename, scale_to_width and _height,
    crop_x, crop_y (in the scaled image), flip_x, flip_y. `_t_e_cache` and `_clip_vision_cache` hold
    no latents.
bghira/SimpleTuner, a folder of `.pt` with the folders of the images
    simpletuner/helpers/caching/vae.py `encode_images` keeps one draw, `latent_dist.sample()`, and
    models/common.py `VaeLatentScalingMixin.scale_vae_latents_for_cache` scales it.
    `_write_latents_in_batch` writes the bare tensor [C,h,w], or for other media a dictionary with
    `latents`; data_backend/base.py `_compress_torch` may gzip the file.
    `generate_vae_cache_filename` names it `sha256(stem).pt`, or `{stem}.pt`. Where it was cropped
    only `aspect_ratio_bucket_metadata_{id}.json` knows, in the images' folder: by image path,
    original_size, intermediary_size and crop_coordinates (top, left), see cropping.py. Its text
    caches are dictionaries of prompt_embeds.
"""

import io
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

from xlsd_cache.errors import UserError, one_line
from xlsd_cache.files.folders import IMAGE_SUFFIXES, walk
from xlsd_cache.runtime.bounded_files import read_json, read_regular

# What each trainer stores of the posterior.
KEEPS = {
    "kohya": "sample",
    "onetrainer": "mean",
    "safetensors": "mean",
    "ai-toolkit": "sample",
    "simpletuner": "sample",
}
LATENT_CACHE = "_latent_cache"  # ai-toolkit's folder, in that of the images
_HASHED = re.compile(r"(.+)_[A-Za-z0-9_-]{22}")  # ai-toolkit's name
_NO_LATENTS = ("_t_e_cache", "_clip_vision_cache")  # ai-toolkit's other folders
_KOHYA_TEXT = ("_te.npz", "_te_outputs.npz")
_INDEXES = ("aggregate.pt", "cache.json")
_INDEX_BYTES = 2**29  # the largest index that is read


@dataclass(frozen=True)
class CacheFile:
    """One file of another trainer's cache, not opened yet."""

    kind: str  # a key of KEEPS, by the file's name; `CachedLatent.kind` is by its content
    path: Path
    key: str  # CACHE_FOLDER_NAME/path/in/it
    image: str  # the image's path as an index gives it; empty without an index
    size: int  # bytes
    mtime_ns: int
    variation: int = 0  # OneTrainer caches an image several times, each augmented differently


@dataclass
class CacheListing:
    """The files of the cache folders."""

    files: list[CacheFile] = field(default_factory=list)
    image_folders: list[Path] = field(default_factory=list)  # cache folders that also hold images
    passed_over: int = 0


def list_caches(folders: tuple[Path, ...]) -> CacheListing:
    """List all cache files below the folders.

    Raises UserError for a folder without latents, and for an index that cannot be read.
    """
    listing = CacheListing()
    for folder in folders:
        root = folder.expanduser().absolute()
        if not root.is_dir():
            raise UserError(f"{folder}: no such directory")
        before, passed_over = len(listing.files), Counter[str]()
        for place, names in walk(root, passed_over):  # each linked folder once
            _list_folder(listing, root, Path(place), names)
        listing.passed_over += sum(passed_over.values())
        if len(listing.files) == before:
            raise UserError(
                f"{folder}: no cached latents (kohya's .npz, OneTrainer's or SimpleTuner's .pt, or "
                f".safetensors); give the folder that holds them"
            )
    return listing


def _list_folder(listing: CacheListing, root: Path, folder: Path, names: list[str]) -> None:
    images = _index(folder, names) if set(names) & set(_INDEXES) else {}
    for name in names:
        path = folder / name
        if path.suffix.lower() in IMAGE_SUFFIXES:
            if root not in listing.image_folders:
                listing.image_folders.append(root)
            continue
        kind, image, variation = _kind_by_name(path, images)
        if not kind:
            listing.passed_over += 1
            continue
        try:
            status = path.stat()
        except FileNotFoundError:  # a broken link, or deleted since it was listed
            listing.passed_over += 1
            continue
        key = f"{root.name}/{path.relative_to(root).as_posix()}"
        key = key.encode("utf-8", "backslashreplace").decode()
        listing.files.append(
            CacheFile(kind, path, key, image, status.st_size, status.st_mtime_ns, variation)
        )


def _kind_by_name(path: Path, images: dict[str, str]) -> tuple[str, str, int]:
    """(kind, image, variation) of a file; the kind is empty for files without latents."""
    name = path.name
    if name in _INDEXES or name.endswith(_KOHYA_TEXT) or path.parent.name in _NO_LATENTS:
        return "", "", 0
    if path.suffix == ".npz":
        return "kohya", "", 0
    if path.suffix == ".safetensors" or path.suffix.startswith(".img_"):
        return ("ai-toolkit" if is_ai_toolkits(path) else "safetensors"), "", 0
    if path.suffix == ".pt":
        group, _, number = path.stem.rpartition("_")  # SmartDiskCache
        if group in images and number.isdecimal():
            return "onetrainer", images[group], int(number) - 1
        place = re.fullmatch(r"variation-(\d+)", path.parent.name)  # DiskCache
        return "onetrainer", images.get(path.stem, ""), int(place[1]) if place else 0
    return "", "", 0


def is_ai_toolkits(path: Path) -> bool:
    """Whether the path is one of ai-toolkit's. Its metadata says so too, unless it was stripped."""
    return path.parent.name == LATENT_CACHE


def image_names(file: CacheFile, kind: str, name: str) -> list[str]:
    """Paths, most without suffix, at which the latent's image may be, the likeliest first.

    `kind` and `name` are those of the CachedLatent.
    """
    stem, folder = file.path.stem, file.path.parent
    if kind == "onetrainer":
        return [file.image]
    if kind == "ai-toolkit":
        folder = folder.parent if folder.name == LATENT_CACHE else folder
        hashed = _HASHED.fullmatch(stem)
        return [str(folder / (name or (hashed[1] if hashed else stem)))]
    return [str(folder / name) for name in (_kohya_names(stem) if kind == "kohya" else [stem])]


def _kohya_names(stem: str) -> list[str]:
    """The stem as it is, and without what kohya may have appended, e.g. `_512x768_sd`."""
    names = [stem]
    if cut := re.fullmatch(r"(.+_\d+x\d+)_[a-z][a-z0-9_]*|(.+)_sdxl?", stem):
        names.append(cut[1] or cut[2])
    if cut := re.fullmatch(r"(.+)_\d+x\d+", names[-1]):
        names.append(cut[1])
    return names


def _index(folder: Path, names: list[str]) -> dict[str, str]:
    """Map the `.pt` files of a OneTrainer folder to their images, by its index."""
    try:
        if "cache.json" in names:
            entries = read_json(folder / "cache.json", _INDEX_BYTES)["entries"]
            images: dict[str, str] = {}
            for image, entry in sorted(entries.items(), reverse=True):  # equal images share a file
                variants = entry.get("variants") or {"": entry}  # version 2 had only one
                images |= {v["cache_file"]: image for v in variants.values() if "cache_file" in v}
            return images
        data = io.BytesIO(read_regular(folder / "aggregate.pt", _INDEX_BYTES))
        index = torch.load(data, map_location="cpu", weights_only=True)
        items = dict(enumerate(index)) if isinstance(index, list) else index
        return {
            str(number): str(item["image_path"])
            for number, item in items.items()
            if isinstance(item, dict) and "image_path" in item
        }
    except Exception as error:  # a malformed file may raise anything
        name = "cache.json" if "cache.json" in names else "aggregate.pt"
        raise UserError(
            f"cannot read {folder / name}, the only index of the latents next to it: "
            f"{one_line(error)}. Restore it, or leave that folder out."
        ) from error
