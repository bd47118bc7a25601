"""Write caches as other programs do, from encodings of the demo VAE.

xlsd_cache/interop/cache_files.py names the file and function that writes each format.
"""

import base64
import gzip
import hashlib
import io
import json
import uuid
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from xlsd_cache.encoding.encoder import to_input
from xlsd_cache.encoding.vae import Vae, load_vae

SUFFIXES = (".jpg", ".png")


def image_files(folder: Path) -> list[Path]:
    """The images of a folder, in name order."""
    return sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)


def size_of(image: Path) -> tuple[int, int]:
    """Width and height."""
    with Image.open(image) as picture:
        return picture.size


def bucket_of(image: Path) -> tuple[int, int]:
    """Width and height: a square for upright photos, twice as wide for the others."""
    width, height = size_of(image)
    return (128, 64) if width > 1.25 * height else (128, 128)


def covered(
    image: Path, bucket: tuple[int, int], resample: Image.Resampling, offset: Any = None
) -> tuple[Tensor, tuple[int, int]]:
    """The image scaled over the bucket and cropped, as all three do it: f32 [1,3,H,W] in [-1,1].

    Also the crop's offset (y, x) in the scaled image.
    """
    with Image.open(image) as file:
        picture = file.convert("RGB")
    scale = max(bucket[0] / picture.width, bucket[1] / picture.height)
    picture = picture.resize(
        (round(picture.width * scale), round(picture.height * scale)), resample
    )
    x, y = (picture.width - bucket[0]) // 2, (picture.height - bucket[1]) // 2
    y, x = offset or (y, x)
    pixels = np.asarray(picture.crop((x, y, x + bucket[0], y + bucket[1])))
    return to_input(torch.from_numpy(pixels[None].copy())), (y, x)


@lru_cache
def loaded(vae: Path) -> Vae:
    """A VAE, loaded once."""
    return load_vae(str(vae))


@torch.inference_mode()
def encoded(vae: Path, x: Tensor, draw: str = "mean", seed: int = 0) -> Tensor:
    """[4,h,w], unscaled."""
    posterior = loaded(vae).model.encode(x).latent_dist
    if draw == "mean":
        return torch.Tensor(posterior.mode()[0].contiguous())
    drawn = posterior.sample(torch.Generator().manual_seed(seed))
    return torch.Tensor(drawn[0].contiguous())


def write_kohya(
    out: Path, images: Sequence[Path], vae: Path, *, old: bool = False, more: Any = None
) -> dict[str, NDArray[Any]]:
    """`NAME_{W}x{H}_sdxl.npz`, or `NAME.npz` as before 2025; returns the latents by image name.

    `more` is a second bucket in the same file.
    """
    out.mkdir(parents=True, exist_ok=True)
    written = {}
    for seed, image in enumerate(images):
        size, arrays = size_of(image), dict[str, Any]()
        for bucket in (bucket_of(image), more):
            if bucket:
                x, _ = covered(image, bucket, Image.Resampling.BOX)  # cv2's INTER_AREA
                latent = encoded(vae, x, "sample", seed).float().numpy()
                key = "" if old else f"_{latent.shape[1]}x{latent.shape[2]}"
                arrays[f"latents{key}"] = latent
                arrays[f"original_size{key}"] = np.array(size)
                arrays[f"crop_ltrb{key}"] = np.array([0, 0, *bucket])
                arrays[f"latents_flipped{key}"] = latent[:, :, ::-1]
                written[image.name if bucket is not more else f"{image.name}~2"] = latent
        name = image.stem if old else f"{image.stem}_{size[0]:04d}x{size[1]:04d}_sdxl"
        np.savez(out / f"{name}.npz", **arrays)
    return written


def write_onetrainer(
    out: Path, images: Sequence[Path], vae: Path, *, layout: str = "list", variations: int = 1
) -> dict[str, Tensor]:
    """mgds' DiskCache (`list`, or with stable indices `dict`) or SmartDiskCache (`smart`).

    Every second image is mirrored and its crop moved, as random flips and crop jitter do.
    """
    group = out / "image" / hashlib.sha256(b"concept").hexdigest()
    written, entries, mark = {}, {}, uuid.uuid4().hex
    for variation in range(variations):
        folder = out if layout == "smart" else group / f"variation-{variation}"
        folder.mkdir(parents=True, exist_ok=True)
        aggregate = []
        for number, image in enumerate(images):
            bucket, odd = bucket_of(image), (number + variation) % 2
            x, offset = covered(image, bucket, Image.Resampling.BILINEAR, (0, 0) if odd else None)
            latent = encoded(vae, x.flip(3) if odd else x)
            item: dict[str, Any] = {
                "latent_image": latent,
                "original_resolution": size_of(image)[::-1],
                "crop_offset": offset,
            }
            told = {"crop_resolution": bucket[::-1], "image_path": str(image)}
            aggregate.append(told)
            if layout == "smart":
                size = f"{bucket[1]}x{bucket[0]}"
                name = f"{hashlib.sha256(image.name.encode()).hexdigest()[:12]}_{size}"
                variants = {size: {"cache_file": name}}
                entries[str(image)] = {"modeltype": "SD15", "mtime": 0.0, "variants": variants}
                torch.save({**item, **told}, folder / f"{name}_{variation + 1}.pt")
            else:
                stable = {"__version": "1", "__uuid": mark} if layout == "dict" else {}
                torch.save({**stable, **item}, folder / f"{number}.pt")
            key = image.name if not variation else f"{image.name}~{variation + 1}"
            written[key] = latent
        if layout == "list":
            torch.save(aggregate, folder / "aggregate.pt")
        elif layout == "dict":
            by_index = {str(number): item for number, item in enumerate(aggregate)}
            torch.save({"__version": "1", "__uuid": mark, **by_index}, folder / "aggregate.pt")
            (folder / "cache_state.json").write_text("{}")
    if layout == "smart":
        index = {"version": 3, "entries": entries, "hash_index": {}}
        (out / "cache.json").write_text(json.dumps(index))
    text = out / "text" / "group" / "variation-0"
    text.mkdir(parents=True)
    torch.save({"tokens": torch.arange(77), "text_encoder_hidden_state": torch.rand(77, 8)},
               text / "0.pt")  # fmt: skip
    torch.save([{"image_path": "a.jpg"}], text / "aggregate.pt")
    return written


def write_safetensors(
    out: Path, images: Sequence[Path], vae: Path, *, suffix: str = ".img_sdxl", dtype: Any = None
) -> dict[str, Tensor]:
    """One file an image, key `latent`, as ppbrown's trainer caches them."""
    out.mkdir(parents=True, exist_ok=True)
    written = {}
    for image in images:
        x, _ = covered(image, bucket_of(image), Image.Resampling.BICUBIC)
        latent = encoded(vae, x).to(dtype or torch.float32)
        save_file({"latent": latent}, out / f"{image.stem}{suffix}")
        written[image.name] = latent
    return written


def write_ai_toolkit(
    images: Sequence[Path], vae: Path, *, flip_y: bool = False, zoom: float = 1.0
) -> dict[str, Tensor]:
    """`_latent_cache/{stem}_{hash}.safetensors` next to each image, scaled and bfloat16.

    With `zoom`, the image is scaled to more than cover the bucket, and cropped off its centre.
    """
    written = {}
    for seed, image in enumerate(images):
        (width, height), bucket = size_of(image), bucket_of(image)
        scale = max(bucket[0] / width, bucket[1] / height) * zoom
        scaled = round(width * scale), round(height * scale)
        part = 2 if zoom == 1 else 3
        x, y = (scaled[0] - bucket[0]) // part, (scaled[1] - bucket[1]) // part
        with Image.open(image) as file:
            picture = file.convert("RGB").resize(scaled, Image.Resampling.BICUBIC)
        picture = picture.crop((x, y, x + bucket[0], y + bucket[1]))
        if flip_y:
            picture = picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
        pixels = to_input(torch.from_numpy(np.asarray(picture)[None].copy()))
        latent = (encoded(vae, pixels, "sample", seed) * 0.13025).to(torch.bfloat16)
        told: dict[str, Any] = {
            "filename": image.name,
            "scale_to_width": scaled[0],
            "scale_to_height": scaled[1],
            "crop_x": x,
            "crop_y": y,
            "crop_width": bucket[0],
            "crop_height": bucket[1],
            "latent_space_version": "sdxl",
            "latent_version": 1,
        }
        told |= {"flip_y": True} if flip_y else {}
        md5 = hashlib.md5(json.dumps(told, sort_keys=True).encode(), usedforsecurity=False)
        name = f"{image.stem}_{base64.urlsafe_b64encode(md5.digest()).decode().rstrip('=')}"
        metadata = {
            key: value if isinstance(value, str) else json.dumps(value)
            for key, value in told.items()
        }
        folder = image.parent / "_latent_cache"
        folder.mkdir(exist_ok=True)
        save_file({"latent": latent}, folder / f"{name}.safetensors", {**metadata, "format": "pt"})
        written[image.name] = latent
    return written


def write_simpletuner(
    out: Path, images: Sequence[Path], vae: Path, *, hashed: bool = True, zipped: bool = False
) -> dict[str, Tensor]:
    """`sha256(stem).pt`, a bare scaled tensor; and the table of crops among the images."""
    out.mkdir(parents=True, exist_ok=True)
    written, table = {}, {}
    for seed, image in enumerate(images):
        (width, height), bucket = size_of(image), bucket_of(image)
        scale = max(bucket[0] / width, bucket[1] / height)
        x, offset = covered(image, bucket, Image.Resampling.LANCZOS, (0, 0))
        latent = encoded(vae, x, "sample", seed) * 0.13025
        stem = hashlib.sha256(image.stem.encode()).hexdigest() if hashed else image.stem
        data = io.BytesIO()
        torch.save(latent, data)
        content = data.getvalue()
        (out / f"{stem}.pt").write_bytes(gzip.compress(content) if zipped else content)
        table[f"/where/it/was/{image.name}"] = {
            "original_size": [width, height],
            "crop_coordinates": offset,
            "intermediary_size": [round(width * scale), round(height * scale)],
            "target_size": bucket,
        }
        written[image.name] = latent
    (images[0].parent / "aspect_ratio_bucket_metadata_a.json").write_text(json.dumps(table))
    return written
