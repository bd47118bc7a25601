"""Stores made without a build or changed after one, and a build slow enough to be interrupted."""

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.support import cache
from xlsd_cache.encoding.encoder import Encoder
from xlsd_cache.store.identity import Identity
from xlsd_cache.store.manifest import Manifest
from xlsd_cache.store.view import StoreView

IDENTITY = Identity("v", "v", "AutoencoderKL", "0" * 64, 0.13025, 0.0, 4, "float32", "fp32",
                    2, 512, "aspect", 4.0, False)  # fmt: skip


def empty_store(root: Path, rows_per_shard: int, dtype: str = "float32") -> StoreView:
    """The folders of a store, with nothing planned."""
    manifest = Manifest(root)
    manifest.make_folders()
    return StoreView(manifest, replace(IDENTITY, dtype=dtype), rows_per_shard)


def slow_build(*args: object) -> int:
    """`build` with a pause before each batch, so that a signal can interrupt one."""
    encode = Encoder.encode

    def slowly(self: Encoder, pixels: Any) -> Any:
        time.sleep(0.1)
        return encode(self, pixels)

    Encoder.encode = slowly  # type: ignore[method-assign]
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
