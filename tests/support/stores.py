"""Make a store without a build, change one, read its latents, and slow a build down."""

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.support import cache
from xlsd_cache.encoding.encoder import Encoder
from xlsd_cache.store.identity import Identity
from xlsd_cache.store.manifest import Manifest
from xlsd_cache.store.reader import LatentStore
from xlsd_cache.store.view import StoreView

IDENTITY = Identity("v", "v", "AutoencoderKL", "0" * 64, 0.13025, 0.0, 4, "float32", "fp32",
                    2, 512, "aspect", 4.0, False)  # fmt: skip


def empty_store(root: Path, rows_per_shard: int, dtype: str = "float32") -> StoreView:
    """The folders of a store, with nothing planned."""
    manifest = Manifest(root)
    manifest.make_folders()
    return StoreView(manifest, replace(IDENTITY, dtype=dtype), rows_per_shard)


def pause_batches(pause_s: float) -> None:
    """Pause before each batch that this process encodes, so that it can be stopped in one."""
    encode = Encoder.encode

    def slowly(self: Encoder, pixels: Any) -> Any:
        time.sleep(pause_s)
        return encode(self, pixels)

    Encoder.encode = slowly  # type: ignore[method-assign]


def slow_build(*args: object) -> int:
    """`build` with a pause before each batch."""
    pause_batches(0.1)
    return cache("build", *args)


def older(store: Path, target: Path, vae_source: Path | None = None) -> Path:
    """A copy of the store as an older version built it, with another vae_source if given."""
    shutil.copytree(store, target)
    path = target / "latents.zarr" / "zarr.json"
    header = json.loads(path.read_text())
    for name in ("encoder_sha256", "vae_padding"):
        del header["attributes"]["identity"][name]
    if vae_source:
        header["attributes"]["identity"]["vae_source"] = str(vae_source)
    path.write_text(json.dumps(header))
    (target / "index.arrow").unlink(missing_ok=True)  # it holds the other one's fingerprint
    return target


def latents_by_name(out: Path) -> dict[str, NDArray[Any]]:
    """Latent of every live sample by its key without the folder."""
    with LatentStore.open(out) as store:
        return {
            row["key"].partition("/")[2]: store.read(row["bucket"], [row["row"]])[0]
            for row in store.samples.to_pylist()
        }


def holds(out: Path, written: dict[str, Any]) -> bool:
    """Whether the store has exactly these latents, byte for byte."""
    got = latents_by_name(out)
    return got.keys() == written.keys() and all(
        np.asarray(written[key]).tobytes() == latent.tobytes() for key, latent in got.items()
    )
