"""Store identity: the VAE and preprocessing of all latents in a store, kept in its zarr.json.

Latents depend on the encoder half of the VAE alone. Stores of older versions have only a hash of
the whole VAE. The encoder's is added in manifest/encoder.json once that VAE has been loaded, since
zarr.json never changes: the store's fingerprint covers it.
"""

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args

from xlsd_cache.errors import UserError
from xlsd_cache.runtime.atomic import write_json
from xlsd_cache.runtime.bounded_files import read_json
from xlsd_cache.vocabulary import Bucket, Padding

FORMAT = "xlsd-latents"
VERSION = 1
ENCODER = "manifest/encoder.json"  # in stores of older versions
_TEXT = 4096  # characters of a name, a path or a list of sizes
LABELS = {
    "encoder_sha256": "the VAE's encoder half (encoder and quant_conv)",
    "vae_sha256": "the VAE",
}


@dataclass(frozen=True)
class Identity:
    """All that a latent depends on except its image's content and crop."""

    vae_name: str
    vae_source: str
    vae_class: str
    vae_sha256: str  # of the weights as fp32
    scaling_factor: float
    shift_factor: float
    channels: int
    dtype: str  # float32 | float16
    precision: str  # fp32 | tf32 | bf16 of the encoding; unknown where imported
    preprocessing: int | str  # images.decode.PREPROCESSING; another program's name where imported
    resolution: int
    buckets: str  # aspect | square | sizes | imported
    max_ratio: float
    upscale: bool
    vae_padding: Padding = "zeros"  # of the VAE's convolutions
    encoder_sha256: str = ""  # of the encoder half alone; empty where unknown

    def shape(self, bucket: str) -> tuple[int, int, int]:
        """(C, h, w) of the latents of the bucket called WIDTHxHEIGHT."""
        return self.channels, *Bucket.parse(bucket).latent_size

    def nbytes(self, bucket: str) -> int:
        """Bytes of one latent of the bucket, as stored."""
        return math.prod(self.shape(bucket)) * (2 if self.dtype == "float16" else 4)

    def encoder_is(self, vae_sha256: str, encoder_sha256: str) -> bool | None:
        """Whether a VAE of these hashes has the encoder of these latents; None if unknown."""
        if vae_sha256 == self.vae_sha256:
            return True
        if not (self.encoder_sha256 and encoder_sha256):
            return None
        return encoder_sha256 == self.encoder_sha256

    def differences(self, other: "Identity") -> dict[str, tuple[Any, Any]]:
        """Fields in which latents are incompatible, with both values.

        The VAE's name and source do not count. The encoder is compared by `encoder_sha256` where
        both are known, else by the whole VAE's hash.
        """
        labels = {"vae_name", "vae_source", "vae_sha256", "encoder_sha256"}
        same = self.encoder_is(other.vae_sha256, other.encoder_sha256)
        if not same:
            labels.remove("vae_sha256" if same is None else "encoder_sha256")
        return {
            field.name: (getattr(self, field.name), getattr(other, field.name))
            for field in fields(self)
            if field.name not in labels and getattr(self, field.name) != getattr(other, field.name)
        }


def read_attributes(root: Path) -> tuple[Identity, int]:
    """The identity and rows per shard of the store in `root`. Raises UserError for no store."""
    path = root / "latents.zarr" / "zarr.json"
    try:
        attributes = read_json(path)["attributes"]
        if attributes["format"] != FORMAT:
            raise KeyError("format")
        version, rows_per_shard = attributes["version"], attributes["rows_per_shard"]
        if type(rows_per_shard) is not int or not 0 < rows_per_shard <= 2**20:
            raise ValueError(f"rows_per_shard is {str(rows_per_shard)[:40]!r}")
        known = {field.name for field in fields(Identity)}
        values = {name: it for name, it in attributes["identity"].items() if name in known}
        identity = Identity(**values)
        _check(identity)
    except FileNotFoundError:
        raise UserError(
            f"no latent store in {root}: {path} is missing; make one with "
            f"`xlsd-cache build IMAGES --out {root}`, or give another folder"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{root} is not a latent store: {path} was not written by xlsd-cache ({error}); give "
            f"another folder"
        ) from error
    if version != VERSION:
        raise UserError(
            f"{root} has store format {version}, but this version reads {VERSION}; install the "
            f"version of xlsd that wrote it"
        )
    return replace(identity, encoder_sha256=_recorded_encoder(root, identity)), rows_per_shard


def _check(identity: Identity) -> None:
    """Raise ValueError for a value that no build writes: these numbers size buffers."""
    for field in fields(identity):
        value, kinds = getattr(identity, field.name), get_args(field.type) or (field.type,)
        kinds = tuple(type(kind) if isinstance(kind, str) else kind for kind in kinds)
        if type(value) not in (*kinds, *([int] if float in kinds else [])) or (
            isinstance(value, str) and len(value) > _TEXT
        ):
            raise ValueError(f"{field.name} is {str(value)[:40]!r}")
    for name, sound in (
        ("channels", 0 < identity.channels <= 64),
        ("dtype", identity.dtype in ("float32", "float16")),
        ("scaling_factor", 0 < abs(identity.scaling_factor) < math.inf),
        ("shift_factor", abs(identity.shift_factor) < math.inf),
        ("vae_padding", identity.vae_padding in get_args(Padding)),
    ):
        if not sound:
            raise ValueError(f"{name} is {str(getattr(identity, name))[:40]!r}")


def _recorded_encoder(root: Path, identity: Identity) -> str:
    """The encoder's hash, from zarr.json or added later; empty where unknown."""
    if not identity.encoder_sha256:
        with suppress(OSError, ValueError, KeyError, TypeError):
            added = read_json(root / ENCODER)
            if added["vae_sha256"] == identity.vae_sha256:
                return str(added["encoder_sha256"])
    return identity.encoder_sha256


def record_encoder(root: Path, vae_sha256: str, encoder_sha256: str) -> None:
    """Add the encoder's hash to a store that has only that of the whole VAE.

    Does nothing where the store has another VAE or this hash already, or cannot be written to.
    """
    stored, _ = read_attributes(root)
    if stored.vae_sha256 == vae_sha256 and not stored.encoder_sha256:
        staging = root / "staging"
        if (root / "manifest").is_symlink():
            return
        with suppress(OSError):
            hashes = {"vae_sha256": vae_sha256, "encoder_sha256": encoder_sha256}
            write_json(root / ENCODER, hashes, staging if staging.is_dir() else None)


def check_compatible(out: Path, identity: Identity, stored: Identity | None = None) -> None:
    """Raise UserError where latents of this identity cannot be written to the folder `out`.

    That is where `out` holds other files, or a store of another identity. `stored` is the store's
    identity where more is known than it records.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give a folder for the store")
    if not is_store(out):
        other = next(_foreign_files(out), None)
        if other is not None:
            raise UserError(
                f"--out {out} holds {other!r} and no latent store; give an empty or new folder"
            )
        return
    stored = stored or read_attributes(out)[0]
    differences = stored.differences(identity)
    if set(differences) == {"vae_sha256"}:
        raise UserError(unknown_encoder(out, stored, identity.vae_name, identity.vae_sha256))
    if differences:
        listed = ", ".join(
            f"{LABELS.get(name, name)} {_short(old)} and not {_short(new)}"
            for name, (old, new) in differences.items()
        )
        raise UserError(
            f"{out} was built with {listed}; latents of both kinds cannot be mixed: use the "
            f"store's settings, or another --out"
        )


def choose_rows_per_shard(out: Path, wanted: int | None, images: int, few: int = 256) -> int:
    """Rows per shard of the store in `out`; of a new one, `wanted` or a number that fits `images`.

    `few` is that of a small store: each generation puts its images into new shards, so a store that
    grows by a few images at a time needs fewer rows in each. Raises UserError where the store has
    another number than `wanted`.
    """
    if not is_store(out):
        return wanted or (few if images < 30_000 else 1024 if images <= 4_000_000 else 4096)
    _, rows_per_shard = read_attributes(out)
    if wanted not in (None, rows_per_shard):
        raise UserError(
            f"{out} has {rows_per_shard} rows per shard, which cannot change; leave out "
            f"--rows-per-shard {wanted}, or use another --out"
        )
    return rows_per_shard


def is_store(out: Path) -> bool:
    """Whether a store was begun here."""
    return (out / "latents.zarr" / "zarr.json").exists()


def _foreign_files(out: Path) -> Iterator[str]:
    """Files that a killed first build cannot have left: it leaves its folders and a few files.

    A user's own folder may be called `captions`.
    """
    ours = {"latents.zarr", "manifest", "captions", "staging"}
    if (out / "staging" / "watch.lock").exists():
        ours.add("status.json")
    for path in sorted(out.iterdir()) if out.exists() else ():
        if path.name not in ours:
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


def unknown_encoder(root: Path | str, stored: Identity, name: str, vae_sha256: str) -> str:
    """The message where a VAE cannot be compared with the encoder of an older version's store."""
    given = stored.vae_name if "/" not in stored.vae_name else "ORIGINAL"
    return (
        f"whether the VAE {name} ({vae_sha256[:12]}) has the encoder of {root} is not known: an "
        f"older version built that store and recorded only a hash of the whole VAE, "
        f"{stored.vae_name} ({stored.vae_sha256[:12]}), which is not at {stored.vae_source}; load "
        f"that VAE once, `xlsd-cache preview {root} preview.png --vae {given}`, and retry"
    )


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text  # a hash
