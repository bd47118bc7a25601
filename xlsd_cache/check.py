"""`xlsd-cache check`: read everything back, and decode some of it beside its image."""

import hashlib
from typing import Any

import google_crc32c
import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from xlsd_cache import UserError
from xlsd_cache.accounting import account
from xlsd_cache.config import CheckConfig
from xlsd_cache.decode import Pixels, Rejected, decode
from xlsd_cache.identity import bucket_shape, read_attributes
from xlsd_cache.index import cached_view, make_view
from xlsd_cache.locate import read_source
from xlsd_cache.manifest import Manifest, Unit
from xlsd_cache.shard import CorruptShard, ShardReader
from xlsd_cache.store import LatentStore
from xlsd_cache.vae import Vae, vae_of

TOLERATED_DB = 0.5  # below the VAE's own round trip: float16 and other kernels cost far less


def check(config: CheckConfig) -> bool:
    """Print every problem found, with the images it concerns; True when there is none."""
    root = config.store.expanduser()
    identity, rows_per_shard = read_attributes(root)
    manifest = Manifest(root)
    generations = manifest.generations()
    if not generations:
        raise UserError(f"{root} is not planned yet; run `xlsd-cache build` to finish it")
    problems = []
    counts, _ = account(manifest, generations[-1], rows_per_shard, frozenset())
    print(counts)  # refuses to print sums that are wrong
    if counts.pending:
        problems.append(f"{counts.pending} images are not encoded yet; run the build again")
    view = make_view(manifest, generations[-1], rows_per_shard)
    cached = cached_view(root, generations[-1])
    if cached is not None and (
        cached.fingerprint != view.fingerprint or not cached.samples.equals(view.samples)
    ):
        problems.append(f"{root / 'index.arrow'} is stale; delete it, it is made anew")
    keys = {
        (row["bucket"], row["row"]): row["key"]
        for row in view.samples.select(["bucket", "row", "key"]).to_pylist()
    }
    for unit in tqdm(sorted(manifest.committed()), "checking", unit="shard"):
        shape = bucket_shape(unit.bucket, identity.channels)
        problems += _check_shard(manifest, unit, shape, identity.dtype, rows_per_shard, keys)
    if config.decode and not problems:
        with LatentStore(root, identity, rows_per_shard, view) as store:
            vae = vae_of(identity, config.vae)
            problems += _check_decoded(store, vae, config)
    for problem in problems:
        print(f"WRONG: {problem}")
    print(f"{len(problems)} problems" if problems else f"all {counts.live} latents are right")
    return not problems


def _check_shard(
    manifest: Manifest,
    unit: Unit,
    shape: tuple[int, int, int],
    dtype: str,
    rows_per_shard: int,
    keys: dict[tuple[str, int], str],
) -> list[str]:
    """What is wrong with one committed shard. Rows of images that left training count as well."""
    latent = np.empty(shape, dtype)
    commits = manifest.commits({unit}).to_pylist()
    try:
        reader = ShardReader(manifest.shard(unit), rows_per_shard, latent.nbytes)
    except (CorruptShard, OSError) as error:
        rows = [row["key"] for row in commits if row["status"] == "encoded"]
        return [f"{error}: {len(rows)} latents are lost, of {', '.join(rows[:5])} ..."]
    problems = []
    for row in commits:
        if row["status"] != "encoded":
            continue
        key = keys.get((unit.bucket, row["row"]), row["key"])
        try:
            reader.read_into(row["row"] % rows_per_shard, latent.reshape(-1).view(np.uint8))
        except CorruptShard as error:
            problems.append(f"{key}: {error}")
            continue
        if google_crc32c.value(latent.reshape(-1).view(np.uint8)) != row["crc32c"]:
            problems.append(f"{key}: {unit.bucket} row {row['row']} is not what was committed")
        elif not np.isfinite(latent).all():
            problems.append(f"{key}: {unit.bucket} row {row['row']} holds NaN or infinity")
    reader.close()
    return problems


def _check_decoded(store: LatentStore, vae: Vae, config: CheckConfig) -> list[str]:
    """Compare decoded latents with their images, and with what diffusers makes of those itself.

    diffusers' own image processor scales the pixels here, so a latent made from pixels in another
    range than the VAE's [-1, 1] cannot pass.
    """
    device = torch.device(
        "cuda"
        if config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
        else "cpu"
    )
    vae.model.to(device)
    processor = VaeImageProcessor()
    chosen = np.unique(np.linspace(0, len(store) - 1, min(config.decode, len(store))).astype(int))
    problems, ours, own, gone = [], [], [], 0
    for index in tqdm(chosen, "decoding", unit="image"):
        sample = store.samples.slice(int(index), 1).to_pylist()[0]
        pixels = _pixels(sample)
        if pixels is None:
            gone += 1
            continue
        raw = torch.from_numpy(store.read(sample["bucket"], [sample["row"]])).float()
        x = processor.preprocess(Image.fromarray(pixels))
        with torch.inference_mode():
            stored = vae.decode(raw.to(device)).cpu()
            round_trip = vae.decode(vae.encode(x.to(device))).cpu()
        ours.append(_psnr(stored, x))
        own.append(_psnr(round_trip, x))
        if ours[-1] < own[-1] - TOLERATED_DB:
            problems.append(
                f"{sample['key']}: its latent decodes to {ours[-1]:.1f} dB of the image, the VAE's "
                f"own round trip gives {own[-1]:.1f} dB"
            )
    if gone:
        print(f"{gone} of {len(chosen)} images are gone or changed, and were not compared")
    if ours:
        print(
            f"decoded {len(ours)}: PSNR {np.mean(ours):.2f} dB (least {min(ours):.2f}), the VAE's "
            f"own round trip {np.mean(own):.2f} dB"
        )
    return problems


def _pixels(sample: dict[str, Any]) -> Pixels | None:
    """The sample's image as it went into the VAE, if it is still there."""
    try:
        data = read_source(sample["source"])
    except OSError:
        return None
    if hashlib.sha256(data).hexdigest() != sample["content_hash"]:
        return None
    width, height = map(int, sample["bucket"].split("x"))
    upright = sample["width"], sample["height"]
    pixels = decode(data, upright, tuple(sample["crop"]), (width, height))
    return None if isinstance(pixels, Rejected) else pixels


def _psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [-1, 1]."""
    error: NDArray[np.float64] = ((a.clamp(-1, 1) - b) / 2).double().numpy()
    return float(-10 * np.log10(np.mean(np.square(error)) + 1e-12))
