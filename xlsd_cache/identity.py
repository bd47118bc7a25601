"""What a latent is valid for, beside its image: kept in the store, and never mixed with another."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from xlsd_cache import UserError

FORMAT = "xlsd-latents"
VERSION = 1
DOWNSCALE = 8  # pixels a latent, of every VAE known here


@dataclass(frozen=True)
class Identity:
    """What a latent is valid for, beside its image's content and crop. Kept in zarr.json."""

    vae_name: str
    vae_source: str
    vae_class: str
    vae_sha256: str  # of the weights as fp32
    scaling_factor: float
    shift_factor: float
    channels: int
    dtype: str  # float32 | float16, as stored
    precision: str  # fp32 | tf32 | bf16, as encoded; unknown where imported
    preprocessing: int | str  # xlsd_cache.decode.PREPROCESSING; a peer's name where imported
    resolution: int
    buckets: str  # aspect | square | sizes | imported
    max_ratio: float
    upscale: bool

    def differences(self, other: "Identity") -> dict[str, tuple[Any, Any]]:
        """Fields that forbid mixing latents, with both values; the VAE's weights tell, not names.

        `resolution` and `max_ratio` count as they are given, even where they change no bucket.
        """
        labels = {"vae_name", "vae_source"}
        return {
            field.name: (getattr(self, field.name), getattr(other, field.name))
            for field in fields(self)
            if field.name not in labels and getattr(self, field.name) != getattr(other, field.name)
        }


def read_attributes(root: Path) -> tuple[Identity, int]:
    """The identity and the rows per shard of the store in `root`. Raises UserError for no store."""
    path = root / "latents.zarr" / "zarr.json"
    try:
        attributes = json.loads(path.read_bytes())["attributes"]
        if attributes["format"] != FORMAT:
            raise KeyError("format")
        version = attributes["version"]
    except FileNotFoundError:
        raise UserError(
            f"no latent store in {root}: {path} is missing; make one with "
            f"`xlsd-cache build IMAGES --out {root}`, or name another folder"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{root} is not a latent store: {path} is not one of ours ({error}); name another"
        ) from error
    if version != VERSION:
        raise UserError(
            f"{root} has store format {version}, this program reads {VERSION}; install the "
            f"version of xlsd that wrote it"
        )
    return Identity(**attributes["identity"]), int(attributes["rows_per_shard"])


def bucket_shape(bucket: str, channels: int) -> tuple[int, int, int]:
    """(C, h, w) of the latents of the bucket called WIDTHxHEIGHT."""
    width, height = map(int, bucket.split("x"))
    return channels, height // DOWNSCALE, width // DOWNSCALE


def agree(out: Path, identity: Identity, wanted: int | None, images: int) -> int:
    """Rows per shard of the store in `out`, or of the one to be made there for so many images.

    Raises UserError for a folder that holds something else, and for a store of another identity or
    another number of rows than `wanted`, naming both values.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder for the store")
    if not (out / "latents.zarr" / "zarr.json").exists():
        other = next(_foreign(out), None)
        if other is not None:
            raise UserError(
                f"--out {out} holds {other!r} and no latent store; name an empty or new folder"
            )
        return wanted or (256 if images < 30_000 else 1024 if images <= 4_000_000 else 4096)
    stored, rows_per_shard = read_attributes(out)
    differences = stored.differences(identity)
    if differences:
        told = ", ".join(
            f"{name} {_short(old)} and not {_short(new)}"
            for name, (old, new) in differences.items()
        )
        raise UserError(
            f"{out} was built with {told}; latents of both kinds must not mix: give --out another "
            f"folder, or the same settings again"
        )
    if wanted not in (None, rows_per_shard):
        raise UserError(
            f"{out} has {rows_per_shard} rows a shard for ever; leave out --rows-per-shard "
            f"{wanted}, or give --out another folder"
        )
    return rows_per_shard


def _foreign(out: Path) -> Iterator[str]:
    """What no first build of ours left that was killed early: that has its folders, and few files.

    A user's folder may well be called `captions`.
    """
    for path in sorted(out.iterdir()) if out.exists() else ():
        if path.name not in {"latents.zarr", "manifest", "captions", "staging"}:
            yield path.name
        elif path.name != "staging":
            yield from (str(it.relative_to(out)) for it in path.rglob("*") if not it.is_dir())
        else:
            suffixes = {".lock", ".tmp", ".planning"}
            yield from (f"staging/{it.name}" for it in path.iterdir() if it.suffix not in suffixes)


def attributes_of(identity: Identity, rows_per_shard: int) -> dict[str, Any]:
    """The attributes of the store's zarr group."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "latents": "posterior mean, unscaled; the UNet sees (x - shift_factor) * scaling_factor",
        "rows_per_shard": rows_per_shard,
        "identity": asdict(identity),
    }


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text  # a hash
