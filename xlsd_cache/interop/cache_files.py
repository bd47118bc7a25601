"""Other programs' latent caches: which files there are, and by which names each may be an image's.

What each writes, read in its public source; no code of theirs is here:

kohya-ss/sd-scripts, one `.npz` an image, beside it or in the same place below another folder
    library/strategy_sd.py `SdSdxlLatentsCachingStrategy.cache_batch_latents` keeps one draw,
    `latent_dist.sample()`, unscaled. library/strategy_base.py `save_latents_to_disk` writes it as
    float32 [C,h,w] under `latents` (`NAME.npz`) or, since 2025, under `latents_{h}x{w}`
    (`NAME_{W}x{H}_sd.npz`, several sizes in one file), with `original_size` (width, height).
    `latents_flipped` (`--flip_aug`) and `alpha_mask` may lie beside it and are not taken.
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
ostris/ai-toolkit, one safetensors file an image in `_latent_cache` beside it
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

# What each keeps of the posterior, by its source.
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
_INDEX_BYTES = 2**29  # of one


@dataclass(frozen=True)
class CacheFile:
    """One file of a peer's cache, not opened yet."""

    kind: str  # a key of KEEPS, by the file's name; `Held.kind` is by its content
    path: Path
    key: str  # CACHE_FOLDER_NAME/path/in/it
    image: str  # where an index says that the image is; empty without one
    size: int  # bytes
    mtime_ns: int
    variation: int = 0  # OneTrainer caches an image several times, each augmented anew


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
        before, passed_over = len(found.files), Counter[str]()
        for place, names in walk(root, passed_over):  # each linked folder once
            _find_in(found, root, Path(place), names)
        found.passed_over += sum(passed_over.values())
        if len(found.files) == before:
            raise UserError(
                f"no cached latents in {folder}: none of its files is an .npz of kohya's, a .pt of "
                f"OneTrainer's or SimpleTuner's, or a .safetensors; name the folder that holds them"
            )
    return found


def _find_in(found: Found, root: Path, folder: Path, names: list[str]) -> None:
    images = _index(folder, names) if set(names) & set(_INDEXES) else {}
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
    """Whether ai-toolkit puts files there; they say it themselves, if they were not stripped."""
    return path.parent.name == LATENT_CACHE


def image_names(file: CacheFile, kind: str, told: str) -> list[str]:
    """Where the latent's image may lie, the surest first: paths, most without a suffix.

    `kind` and `told`, the image's name where the file says it, are `Held`'s.
    """
    stem, folder = file.path.stem, file.path.parent
    if kind == "onetrainer":
        return [file.image]
    if kind == "ai-toolkit":
        folder = folder.parent if folder.name == LATENT_CACHE else folder
        hashed = _HASHED.fullmatch(stem)
        return [str(folder / (told or (hashed[1] if hashed else stem)))]
    return [str(folder / name) for name in (_kohya_names(stem) if kind == "kohya" else [stem])]


def _kohya_names(stem: str) -> list[str]:
    """With what kohya may have added to an image's name, and without: `_512x768_sd`."""
    names = [stem]
    if cut := re.fullmatch(r"(.+_\d+x\d+)_[a-z][a-z0-9_]*|(.+)_sdxl?", stem):
        names.append(cut[1] or cut[2])
    if cut := re.fullmatch(r"(.+)_\d+x\d+", names[-1]):
        names.append(cut[1])
    return names


def _index(folder: Path, names: list[str]) -> dict[str, str]:
    """Name of a `.pt` file -> its image, of a folder of OneTrainer's."""
    try:
        if "cache.json" in names:
            entries = read_json(folder / "cache.json", _INDEX_BYTES)["entries"]
            images: dict[str, str] = {}
            for image, entry in sorted(entries.items(), reverse=True):  # equal images share a file
                variants = entry.get("variants") or {"": entry}  # version 2 had only one
                images |= {v["cache_file"]: image for v in variants.values() if "cache_file" in v}
            return images
        data = io.BytesIO(read_regular(folder / "aggregate.pt", _INDEX_BYTES))
        told = torch.load(data, map_location="cpu", weights_only=True)
        items = dict(enumerate(told)) if isinstance(told, list) else told
        return {
            str(number): str(item["image_path"])
            for number, item in items.items()
            if isinstance(item, dict) and "image_path" in item
        }
    except Exception as error:  # whatever a malformed file makes the libraries stumble over
        name = "cache.json" if "cache.json" in names else "aggregate.pt"
        raise UserError(
            f"cannot read {folder / name}, which alone says whose latents lie beside it: "
            f"{one_line(error)}; restore it, or leave that folder out"
        ) from error
