"""The options of every command of xlsd-cache, a frozen dataclass each.

The command line and its help pages are generated from them; the base classes of `BuildOptions` are
the groups of its page.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, Suppress, arg

from xlsd_cache.console.option_checks import (
    CheckedOptions,
    Count,
    Every,
    Factor,
    File,
    Folder,
    Threads,
    Within,
)
from xlsd_cache.errors import UserError
from xlsd_cache.files.captions import Column
from xlsd_cache.images.decode import MAX_PIXELS, MOST_PIXELS
from xlsd_cache.vocabulary import RESERVED, Padding, Precision

Device = Literal["auto", "cuda", "cpu"]
Columns = Annotated[str, arg(metavar="COLUMNS")]
RowsPerShard = Annotated[int, Within(1, 2**20)]


@dataclass(frozen=True)
class SourceOptions(CheckedOptions):
    """Images."""

    source: Annotated[Positional[tuple[str, ...]], arg(metavar="IMAGES")] = ("images",)
    """Folders (searched recursively), archives (.tar, .tar.gz, .zip), and tables of images or of
    image paths (.parquet, .arrow, .jsonl, .json, .csv). Any number."""

    only: Annotated[tuple[str, ...], arg(metavar="NAME ...")] = ()
    """Use only these images: names (key, path in the source, or file name), patterns such as
    'good/*.png', or text files with one of them per line."""

    exclude: Annotated[tuple[str, ...], arg(metavar="NAME ...")] = ()
    """Skip these images, given as in --only, e.g. '*_mask.*'."""

    image_suffix: str | None = None
    """For samples of several images (webdataset): the suffix of the one to use, e.g. image.jpg for
    0000.image.jpg, whose caption is 0000.txt. Comma-separated. Default: every image is a sample."""

    max_megapixels: Annotated[float, Within(0, MOST_PIXELS / 1e6, above=True)] = MAX_PIXELS / 1e6
    """Reject larger images. Decoding takes up to 24 MiB of memory per megapixel."""

    allow_outside: bool = False
    """Allow rows of tables to name files outside the table's folder and the given sources."""

    rehash: bool = False
    """Read every image again and re-encode those whose content has changed. Without it, an image
    counts as unchanged if its size, mtime, inode and ctime are."""

    forget: Annotated[tuple[str, ...], arg(metavar="SOURCE ...")] = ()
    """Sources of earlier builds that no longer exist: drop their images from the store."""

    @property
    def image_suffixes(self) -> tuple[str, ...]:
        """Suffixes of the images to use, without the first dot; empty: every image."""
        return split_columns(self.image_suffix) if self.image_suffix else ()

    @property
    def max_pixels(self) -> int:
        """--max-megapixels, in pixels."""
        return round(self.max_megapixels * 1e6)


@dataclass(frozen=True)
class CaptionColumnOptions(CheckedOptions):
    """Captions."""

    captions: Columns = "auto"
    """Caption columns, comma-separated: the suffix of the text files next to the images (txt),
    json:FIELD of the .json next to them, jsonl:FIELD, csv:FIELD or parquet:FIELD of a table's row,
    or none. auto: txt, or the text or caption field of tables, whichever most images have."""

    @property
    def caption_columns(self) -> tuple[str, ...] | None:
        """Names of the caption columns; None for auto."""
        return None if self.captions == "auto" else columns_or_none(self.captions)


@dataclass(frozen=True)
class VaeOptions(CheckedOptions):
    """VAE."""

    vae: str = "sdxl"
    """sdxl, sdxl-fp16-fix, sd, taesdxl, a hub id ORG/NAME, a folder, or a .safetensors file."""

    vae_scaling_factor: Factor | None = None
    """Scaling factor of a .safetensors file without one: 0.13025 for SDXL's VAE, 0.18215 for
    SD's."""

    vae_padding: Padding = "zeros"
    """Padding of the VAE's convolutions; the store records it. reflect: only for EQ-VAEs trained
    with it."""

    precision: Precision = "fp32"
    """Precision of the VAE. fp32: TF32 off."""


@dataclass(frozen=True)
class SizeOptions(CheckedOptions):
    """Sizes."""

    resolution: Annotated[int, Within(64, 2**14)] = 512
    """Buckets have at most resolution x resolution pixels. A multiple of 64."""

    buckets: str = "aspect"
    """aspect: all aspect ratios in steps of 64 pixels. square: one bucket. Or a list of sizes:
    512x512,512x768."""

    max_ratio: Annotated[float, Within(1, 100)] = 4.0
    """Reject images whose long side is more than this many times the short side."""

    upscale: bool = False
    """Enlarge images that are smaller than their bucket instead of rejecting them."""


@dataclass(frozen=True)
class StoreOptions(CheckedOptions):
    """Store."""

    out: Folder = Path("latents")
    """The store's folder. Training needs nothing else, and it can be moved."""

    store_dtype: Literal["float32", "float16"] = "float32"
    """float16 halves the size. Its rounding error is 2e-4 of the latents' standard deviation."""

    rows_per_shard: RowsPerShard | None = None
    """Latents per shard file, fixed when the store is created. Default: 256 below 30k images, 1024,
    or 4096 above 4 million."""


@dataclass(frozen=True)
class WorkOptions(CheckedOptions):
    """Running."""

    batch: Annotated[int, Within(1, 10**4)] | None = None
    """Images per VAE call. Default: on a CPU one per core, on a GPU what fits, up to 16, and then
    the same in every build of the store."""

    workers: Threads = os.cpu_count() or 4
    """Images to read and decode at once while the VAE works. Default: one per core."""

    dry_run: bool = False
    """Scan and plan, print what would be done, and write nothing."""

    quiet: bool = False
    """Show no progress bars: only lines, as without a terminal."""

    json: bool = False
    """Print events on stdout, a JSON object per line: start, progress, and done, stopped or failed.
    No bars."""


def part_of(shard: str | None) -> tuple[int, int]:
    """(I, N) of --shard I/N; by default this process of torchrun's or accelerate's."""
    if shard is None:
        return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    number, _, count = shard.partition("/")
    return int(number), int(count)


def _check_shard(shard: str | None) -> None:
    number, _, count = (shard or "0/1").partition("/")
    few = len(number) <= 6 and len(count) <= 6
    if not (few and number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise UserError(f"--shard {shard!r} is not I/N with 0 <= I < N; e.g. 0/2")


@dataclass(frozen=True)
class ProcessOptions(CheckedOptions):
    """Process."""

    device: Device = "auto"
    """auto: the GPU if there is one."""

    shard: Annotated[str | None, arg(metavar="I/N")] = None
    """This is process I of N (from 0) that build one store together. Each starts with its own part
    and then helps the others. Default: as set by torchrun or accelerate launch."""

    ray: Annotated[str | None, arg(metavar="ADDRESS")] = None
    """Encode on the GPUs of a Ray cluster: HOST:PORT, auto, or local to start one here. All its
    nodes need the store and the sources at the same paths. Needs `pip install 'xlsd[ray]'`."""

    @property
    def part(self) -> tuple[int, int]:
        """(this process's number, number of processes)."""
        return part_of(self.shard)


@dataclass(frozen=True)
class PlanOptions(
    WorkOptions, StoreOptions, SizeOptions, VaeOptions, CaptionColumnOptions, SourceOptions
):
    """Plan what `build` would encode, and print its units for `xlsd-cache encode`.

    A unit is one shard file, called BUCKET.N. Options are those of `build`. Re-running updates the
    plan to the sources.
    """

    few_rows = 256  # rows per shard of a new store of few images

    def check(self) -> None:
        """Raise UserError for what cannot be a caption column."""
        check_columns("--captions", self.caption_columns or ())


@dataclass(frozen=True)
class BuildOptions(ProcessOptions, PlanOptions):
    """Encode images once into a store of latents, or update an existing store.

    Re-running updates the store: new and changed images are encoded, deleted ones dropped, renamed
    ones keep their latents, and duplicates are encoded once. It may be interrupted at any moment;
    the same command continues.
    """

    def check(self) -> None:
        """Raise UserError for what no build can use."""
        PlanOptions.check(self)
        _check_shard(self.shard)
        if self.ray and self.shard:
            raise UserError("--ray and --shard both share out the work; give one of them")


@dataclass(frozen=True)
class EncodeOptions(CheckedOptions):
    """Encode units of a plan: all, a part, or some by name. Sources are not scanned.

    Any number of processes may encode one store. A unit that is encoded already, or that another
    process encodes, is left alone. A unit that was interrupted is continued from its last batch.
    """

    store: Positional[Path]
    """The store's folder."""

    units: Annotated[str | None, arg(metavar="BUCKET.N,...")] = None
    """Encode these units, comma-separated, as `xlsd-cache plan` prints them."""

    shard: Annotated[str | None, arg(metavar="I/N")] = None
    """Encode part I of N (from 0) of all units. Default: as set by torchrun, else all."""

    vae: str | None = None
    """The VAE, if the plan's is somewhere else on this machine: one with the same encoder."""

    device: Device = "auto"
    """auto: the GPU if there is one."""

    workers: Threads = os.cpu_count() or 4
    """Images to read and decode at once while the VAE works. Default: one per core."""

    quiet: bool = False
    """Show no progress bars: only lines, as without a terminal."""

    json: bool = False
    """Print events on stdout, a JSON object per line: progress, and unit, stopped or failed. No
    bars."""

    @property
    def unit_names(self) -> tuple[str, ...]:
        """The names in --units, each once."""
        return tuple(dict.fromkeys(self.units.split(","))) if self.units else ()

    def check(self) -> None:
        """Raise UserError for what chooses no units."""
        _check_shard(self.shard)
        if self.units and self.shard:
            raise UserError("--units and --shard both choose units; give one of them")


@dataclass(frozen=True)
class FinishOptions(CheckedOptions):
    """Finish a store whose units are all encoded: sums, index, table of rejected images.

    While units are pending, it lists them, writes nothing and exits with status 1.
    """

    store: Positional[Path]
    """The store's folder."""


@dataclass(frozen=True)
class WatchingOptions(CheckedOptions):
    """Watching."""

    every: Annotated[float, Within(0.1, 86400)] = 60.0
    """Seconds between two looks at the sources. Changes on this machine's disks are noticed at
    once, those made by other machines by looking."""

    settle: Annotated[float, Within(0, 86400)] = 10.0
    """Seconds without a change after which a file counts as complete. Until then a new image is not
    there yet, and one that is replaced keeps its latent."""

    min_new: Count = 256
    """Update the store once so many images are new, changed or removed."""

    max_wait: Annotated[str, arg(metavar="TIME")] = "30m"
    """Update the store once a change has waited for so long, whatever --min-new is: 90s, 30m, 12h,
    1d."""

    http: Annotated[str | None, arg(metavar="HOST:PORT")] = None
    """Serve a page, /status.json, /metrics (Prometheus) and /healthz, e.g. at 127.0.0.1:8787, to
    all who reach it, without a password."""

    @property
    def max_wait_s(self) -> float:
        """--max-wait in seconds. Raises UserError for what is no time."""
        match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([smhd])", self.max_wait, re.ASCII)
        if match is None:
            raise UserError(
                f"--max-wait {self.max_wait!r} is no time; give a number with a unit, e.g. 30m"
            )
        return float(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]

    @property
    def address(self) -> tuple[str, int]:
        """--http as host and port. Raises UserError for another form."""
        host, _, port = (self.http or "").rpartition(":")
        if not (host and re.fullmatch(r"\d{1,5}", port, re.ASCII) and int(port) < 2**16):
            raise UserError(f"--http {self.http!r} is not HOST:PORT; e.g. 127.0.0.1:8787")
        if host in {"0.0.0.0", "[::]", "*"}:  # noqa: S104 - refused
            raise UserError(
                f"--http {self.http} is no address that a browser can open; give the one that "
                f"readers use, e.g. 192.168.1.5:8787"
            )
        return host, int(port)


@dataclass(frozen=True)
class WatchOptions(WatchingOptions, BuildOptions):
    """Keep a store up to date with its sources: a build whenever enough has changed.

    Runs next to a downloader until it is stopped. The VAE stays loaded. Files that are still being
    written wait. A source that vanishes, or of which more than half is suddenly gone, is not
    emptied: the store stays as it is until the source is back. A full disk pauses. OUT/status.json
    says how it goes. A `build` of the same store may run at the same time.
    """

    few_rows = 32  # a shard may get the few new images of a generation, and no more

    rows_per_shard: RowsPerShard | None = None
    """Latents per shard file, fixed when the store is created. Default: 32 below 30k images, 1024,
    or 4096 above 4 million."""

    shard: Annotated[str | None, Suppress] = None
    ray: Annotated[str | None, Suppress] = None
    dry_run: Annotated[bool, Suppress] = False
    rehash: Annotated[bool, Suppress] = False

    def check(self) -> None:
        """Raise UserError for what no watcher can use."""
        super().check()
        _ = self.max_wait_s, self.http and self.address


@dataclass(frozen=True)
class CaptionsOptions(CheckedOptions):
    """Add caption columns to a store, or replace them. Latents are not touched.

    A caption file belongs to the image next to it, a table's row to the image that it names.
    Captions from another place are matched with the store's images by path in the source, URL, or
    a file name that only one image has. `build` replaces a column that it reads too.
    """

    store: Positional[Path]
    """The store's folder."""

    source: Annotated[tuple[str, ...], arg(name="from", metavar="SOURCE ...")]
    """Where the captions are: folders, archives and tables, as for `build`."""

    columns: Columns
    """Columns, comma-separated, as in build --captions: txt, json:FIELD, jsonl:FIELD, ..."""

    clear_missing: bool = False
    """Remove a column's caption from images that have none in these sources."""

    dry_run: bool = False
    """Print what would change, and write nothing."""

    def check(self) -> None:
        """Raise UserError for what cannot be a column."""
        check_columns("--columns", self.caption_columns)

    @property
    def caption_columns(self) -> tuple[str, ...]:
        """Names of the caption columns."""
        return split_columns(self.columns)


def columns_or_none(captions: str) -> tuple[str, ...]:
    """The column names in --captions, where `none` means no column."""
    return () if captions == "none" else split_columns(captions)


def split_columns(columns: str) -> tuple[str, ...]:
    """The names in a comma-separated list, each once."""
    return tuple(dict.fromkeys(column.strip().lstrip(".") for column in columns.split(",")))


def check_columns(option: str, columns: tuple[str, ...]) -> None:
    """Raise UserError for a name that cannot be a caption column."""
    for column in columns:
        try:
            if column in RESERVED:
                raise ValueError(column)
            Column.parse(column)
        except ValueError:
            raise UserError(
                f"{option} {column!r} cannot be a caption column; use the suffix of the text files "
                f"next to the images (txt), or json:FIELD, jsonl:FIELD, parquet:FIELD"
            ) from None


@dataclass(frozen=True)
class InfoOptions(CheckedOptions):
    """Show what is in a store: counts, buckets, size, VAE, latent statistics, rejected images."""

    store: Positional[Path] = Path("latents")
    """The store's folder."""

    tags: Every = 20
    """Show this many of the most frequent tags of each column of tags."""

    json: bool = False
    """Print JSON."""


@dataclass(frozen=True)
class CheckOptions(CheckedOptions):
    """Verify a store: all shards present, checksums correct, values finite, counts consistent.

    Lists the images whose latents are corrupt, and then exits with status 1. With --repair, the
    status is 0 if the store is correct again, and 1 if `xlsd-cache build` must re-encode images.
    """

    store: Positional[Path] = Path("latents")
    """The store's folder."""

    decode: Every = 0
    """Decode this many samples and compare them with their images, next to the VAE's own
    round-trip error."""

    vae: str | None = None
    """VAE to decode with, if the store's has moved: one with the same encoder."""

    repair: bool = False
    """Rebuild what can be derived from verified data. The next build re-encodes the rest."""

    json: bool = False
    """Print JSON, with the names of all affected images."""

    device: Device = "auto"
    """auto: the GPU if there is one."""


@dataclass(frozen=True)
class ImportOptions(CheckedOptions):
    """Import latents cached by other programs, so that nothing is encoded twice.

    Reads kohya's .npz, OneTrainer's and SimpleTuner's .pt, ai-toolkit's and single .safetensors.
    Each kind needs a store of its own, which `build` cannot extend, because their images were
    resized differently. A latent is first compared with its image: those that do not fit are
    rejected and listed, the others imported. Re-running imports only new latents and drops none.
    """

    cache: Positional[tuple[Path, ...]]
    """Folders of cached latents, searched recursively."""

    vae: str
    """VAE that encoded them: sdxl, sd, a hub id ORG/NAME, a folder, or a .safetensors file."""

    out: Folder = Path("latents")
    """The store's folder."""

    images: Annotated[Path | None, arg(metavar="FOLDER")] = None
    """Folder of the images and captions; required for SimpleTuner's caches. Default: next to the
    latents, or the place recorded in OneTrainer's cache."""

    captions: Columns = "txt"
    """Caption columns, comma-separated, as for `build`, or none."""

    force: bool = False
    """Import what cannot be verified: random draws instead of means (kohya, ai-toolkit,
    SimpleTuner), latents without images, other crops, and scaled latents (which are divided by the
    factor). Latents of another VAE or of other images are refused even so."""

    compare: Count = 16
    """Number of latents to verify by re-encoding and by the VAE's round trip. The others are
    compared by thumbnails made from the latents, and re-encoded where these do not match."""

    vae_scaling_factor: Factor | None = None
    """Scaling factor of a .safetensors file without one: 0.13025 for SDXL's VAE, 0.18215 for
    SD's."""

    vae_padding: Padding = "zeros"
    """Padding of the VAE's convolutions when these latents were made, as for `build`."""

    workers: Threads = 4
    """Threads that read the cache files."""

    rows_per_shard: RowsPerShard | None = None
    """Latents per shard file, fixed when the store is created, as for `build`."""

    device: Device = "auto"
    """Device of the comparison. auto: the GPU if there is one."""

    dry_run: bool = False
    """Search and compare, print what would be done, and write nothing."""

    quiet: bool = False
    """Show no progress bars: only lines, as without a terminal."""

    json: bool = False
    """Print events on stdout, a JSON object per line: start, progress, and done, stopped or failed.
    No bars."""

    def check(self) -> None:
        """Raise UserError for what no import can use."""
        if not self.cache:
            raise UserError("CACHE is missing; give the folders of cached latents")
        check_columns("--captions", self.caption_columns)

    @property
    def caption_columns(self) -> tuple[str, ...]:
        """Names of the caption columns."""
        return columns_or_none(self.captions)


@dataclass(frozen=True)
class StoreReportOptions(CheckedOptions):
    """Write a self-contained HTML page about a store: buckets, sizes, captions, decoded latents.

    Pictures of rejected images are shown where they decode. Needs the store's VAE, but for
    --count 0.
    """

    store: Positional[Path]
    """The store's folder."""

    out: Annotated[File | None, arg(aliases=["-o"])] = None
    """The page, .html. Default: STORE/report.html."""

    count: Annotated[int, Within(0, 200)] = 48
    """Number of samples to decode, chosen at random."""

    seed: Annotated[int, Within(0, 2**63 - 1)] = 0
    """Seed of the random choice."""

    vae: str | None = None
    """VAE to decode with, if the store's has moved: one with the same encoder."""

    device: Device = "auto"
    """auto: the GPU if there is one."""


@dataclass(frozen=True)
class PreviewOptions(CheckedOptions):
    """Draw a contact sheet of decoded latents, with caption, bucket and crop: what training sees.

    Needs the store and its VAE, not the images.
    """

    store: Positional[Path]
    """The store's folder."""

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

    vae: str | None = None
    """VAE to decode with, if the store's has moved: one with the same encoder."""

    device: Device = "auto"
    """auto: the GPU if there is one."""

    def check(self) -> None:
        """Raise UserError for what cannot be drawn."""
        if self.out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
            raise UserError(f"{self.out} is not an image name; end it in .png, .jpg or .webp")
        if self.rows and self.tags:
            raise UserError("--rows and --tags both choose samples; give one of them")


@dataclass(frozen=True)
class ExportIndexOptions(CheckedOptions):
    """Write the table of samples as one parquet file for pandas, polars or duckdb.

    It has all captions and, for each latent, its shard file, byte offset and length, dtype and
    shape: all that another program needs to read the latents.
    """

    store: Positional[Path]
    """The store's folder."""

    out: Positional[File]
    """Parquet file to write."""
