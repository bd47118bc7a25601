"""Options of the commands that read a store: info, check, preview, report and export-index."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from xlsd_cache.console.option_checks import CheckedOptions, Every, File, Within
from xlsd_cache.errors import UserError
from xlsd_cache.options.store import StoreArgument
from xlsd_cache.options.work import Device


@dataclass(frozen=True, kw_only=True)
class DecoderOptions(CheckedOptions):
    """Decoding."""

    vae: str | None = None
    """VAE to decode with, if the store's has moved: one with the same encoder."""

    device: Device = "auto"
    """auto: the GPU if there is one."""


@dataclass(frozen=True)
class InfoOptions(StoreArgument):
    """Show what is in a store: counts, buckets, size, VAE, latent statistics, rejected images."""

    store: Positional[Path] = Path("latents")

    tags: Every = 20
    """Show this many of the most frequent tags of each column of tags."""

    json: bool = False
    """Print JSON."""


@dataclass(frozen=True)
class CheckOptions(DecoderOptions, StoreArgument):
    """Verify a store: all shards present, checksums correct, values finite, counts consistent.

    Lists the images whose latents are corrupt, and then exits with status 1. With --repair, the
    status is 0 if the store is correct again, and 1 if `xlsd-cache build` must re-encode images.
    """

    store: Positional[Path] = Path("latents")

    decode: Every = 0
    """Decode this many samples and compare them with their images, next to the VAE's own
    round-trip error."""

    repair: bool = False
    """Rebuild what can be derived from verified data. The next build re-encodes the rest."""

    json: bool = False
    """Print JSON, with the names of all affected images."""

    device: Device = "auto"
    """auto: the GPU if there is one."""


@dataclass(frozen=True)
class StoreReportOptions(DecoderOptions, StoreArgument):
    """Write a self-contained HTML page about a store: buckets, sizes, captions, decoded latents.

    Pictures of rejected images are shown where they decode. Needs the store's VAE, but for
    --count 0.
    """

    out: Annotated[File | None, arg(aliases=["-o"])] = None
    """The page, .html. Default: STORE/report.html."""

    count: Annotated[int, Within(0, 200)] = 48
    """Number of samples to decode, chosen at random."""

    seed: Annotated[int, Within(0, 2**63 - 1)] = 0
    """Seed of the random choice."""


@dataclass(frozen=True)
class PreviewOptions(DecoderOptions, StoreArgument):
    """Draw a contact sheet of decoded latents, with caption, bucket and crop: what training sees.

    Needs the store and its VAE, not the images.
    """

    out: Positional[File]
    """Image file to write: .png, .jpg or .webp."""

    count: Annotated[int, Within(1, 10**4)] = 24
    """Number of samples, chosen at random."""

    rows: str | None = None
    """Show these samples instead: BUCKET:ROW,BUCKET:ROW, e.g. 512x512:0,512x512:7."""

    tags: str | None = None
    """Choose among samples whose caption has all of these comma-separated tags, e.g. woman,solo."""

    caption: Annotated[str | None, arg(metavar="COLUMN")] = None
    """Caption column to show, and to search for --tags. Default: the first."""

    seed: Annotated[int, Within(0, 2**63 - 1)] = 0
    """Seed of the random choice."""

    columns: Annotated[int, Within(1, 100)] = 6
    """Images per row."""

    thumbnail: Annotated[int, Within(64, 4096)] = 256
    """Longer side of each image, in pixels."""

    def check(self) -> None:
        """Raise UserError for what cannot be drawn."""
        if self.out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
            raise UserError(f"{self.out} is not an image name; end it in .png, .jpg or .webp")
        if self.rows and self.tags:
            raise UserError("--rows and --tags both choose samples; give one of them")


@dataclass(frozen=True)
class ExportIndexOptions(StoreArgument):
    """Write the table of samples as one parquet file for pandas, polars or duckdb.

    It has all captions and, for each latent, its shard file, byte offset and length, dtype and
    shape: all that another program needs to read the latents.
    """

    out: Positional[File]
    """Parquet file to write."""
