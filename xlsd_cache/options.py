"""One frozen dataclass a command; the command line is generated from it."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from xlsd_cache.console.option_checks import (
    Count,
    Every,
    Factor,
    File,
    Folder,
    Threads,
    Within,
    check_options,
)
from xlsd_cache.errors import UserError
from xlsd_cache.files.captions import Column
from xlsd_cache.images.decode import MAX_PIXELS, MOST_PIXELS
from xlsd_cache.vocabulary import RESERVED, Padding, Precision


@dataclass(frozen=True)
class BuildOptions:
    """Encode every image once into a latent store, or bring an existing store up to date.

    Running it again does only what is missing: new and changed images are encoded, removed ones
    leave training, renamed ones keep their latent, duplicates are encoded once. It may be killed
    at any moment; the same command goes on where it was.
    """

    source: tyro.conf.Positional[tuple[str, ...]] = ("images",)
    """Folders, searched at every depth; archives (.tar, .tar.gz, .zip); tables of images or of
    their paths (.parquet, .arrow, .jsonl, .json, .csv); any number."""

    out: Folder = Path("latents")
    """The store. It alone is needed for training, and may be moved."""

    vae: str = "sdxl"
    """sdxl, sdxl-fp16-fix, sd, taesdxl, a hub id ORG/NAME, a folder, or a .safetensors file."""

    vae_scaling_factor: Factor | None = None
    """Only for a .safetensors file that does not say: 0.13025 for SDXL's VAE, 0.18215 for SD's."""

    vae_padding: Padding = "zeros"
    """How the VAE's convolutions pad. reflect: for the EQ-VAEs that were trained so, and only them.
    The store remembers it."""

    resolution: Annotated[int, Within(64, 2**14)] = 512
    """Buckets have at most resolution x resolution pixels. A multiple of 64."""

    buckets: str = "aspect"
    """aspect: every ratio in steps of 64 pixels; square; or a list of sizes, 512x512,512x768."""

    max_ratio: Annotated[float, Within(1, 100)] = 4.0
    """Images longer than this (long side over short side) are rejected."""

    upscale: bool = False
    """Enlarge images that are smaller than their bucket instead of rejecting them."""

    batch: Annotated[int, Within(1, 10**4)] | None = None
    """Images per VAE call. Default: on a CPU one to each core, on a card what fits, up to 32."""

    workers: Threads = os.cpu_count() or 4
    """Images that are read and decoded at once while the VAE works. Default: one a core."""

    precision: Precision = "fp32"
    """What the VAE computes in. fp32 has no TF32 anywhere."""

    store_dtype: Literal["float32", "float16"] = "float32"
    """float16 halves the disk; its rounding is 2e-4 of the latents' spread, measured and shown."""

    captions: str = "auto"
    """Caption columns, comma-separated: the suffix of the text file beside each image, as txt;
    json:FIELD of the .json beside it; jsonl:FIELD, csv:FIELD, parquet:FIELD of its row in a table;
    or none. auto: txt, or the text or caption field of tables, whichever most images have."""

    image_suffix: str | None = None
    """Of samples of several images, as webdataset has them, the one to use: image.jpg takes
    0000.image.jpg with the caption 0000.txt. Comma-separated. Default: every image is a sample."""

    only: tuple[str, ...] = ()
    """Images to use, and no others: names (key, path in the source, or file), patterns such as
    'good/*.png', or files of them, a line each."""

    exclude: tuple[str, ...] = ()
    """Images not to use, as with --only: '*_mask.*'."""

    allow_outside: bool = False
    """Let the rows of tables name files outside the table's folder and the named sources."""

    forget: tuple[str, ...] = ()
    """Names of earlier sources that are gone for good: their images leave training."""

    rehash: bool = False
    """Read every image again, and re-encode those whose content differs from what was encoded.
    Without it a file is unchanged if its size, mtime, inode and ctime are."""

    max_megapixels: Annotated[float, Within(0, MOST_PIXELS / 1e6, above=True)] = MAX_PIXELS / 1e6
    """Images of more megapixels are rejected. Decoding one may take 24 MiB a megapixel."""

    shard: str | None = None
    """i/n: this is process i of n that build one store together; each starts on its own part and
    helps the others at the end. Default: as torchrun or accelerate launch started it."""

    rows_per_shard: Annotated[int, Within(1, 2**20)] | None = None
    """Fixed when a store is made. Default: 256 under 30k images, 1024, 4096 above 4 million."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: the graphics card when there is one."""

    dry_run: bool = False
    """Scan and plan, say what would be done, and write nothing."""

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is read."""
        check_options(self)
        number, _, count = (self.shard or "0/1").partition("/")
        few = len(number) <= 6 and len(count) <= 6
        if not (few and number.isdecimal() and count.isdecimal() and int(number) < int(count)):
            raise UserError(f"--shard {self.shard!r} is not i/n with 0 <= i < n; write say 0/2")
        check_columns("--captions", self.caption_columns or ())

    @property
    def caption_columns(self) -> tuple[str, ...] | None:
        """The caption columns by name; None where the images decide."""
        return None if self.captions == "auto" else columns_or_none(self.captions)

    @property
    def max_pixels(self) -> int:
        """The largest image that is let in, in pixels."""
        return round(self.max_megapixels * 1e6)

    @property
    def image_suffixes(self) -> tuple[str, ...]:
        """What names of images end in, without the first dot; empty for whatever is an image."""
        return split_columns(self.image_suffix) if self.image_suffix else ()

    @property
    def part(self) -> tuple[int, int]:
        """This process's number and how many there are."""
        if self.shard is None:
            return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        number, _, count = self.shard.partition("/")
        return int(number), int(count)


@dataclass(frozen=True)
class CaptionsOptions:
    """Add caption columns to a store, or replace them, without touching a latent.

    A caption file is for the image beside it, a table's row for the image that it names. Captions
    that lie elsewhere are matched with all images, by path in the source, by url, or by a file name
    that one image has. A column that `build` reads as well is replaced by its next run.
    """

    store: tyro.conf.Positional[Path]
    """The store's folder."""

    source: Annotated[tuple[str, ...], tyro.conf.arg(name="from")]
    """Where the captions are: folders, archives and tables, as for `build`."""

    columns: str
    """Columns, comma-separated, as with build --captions: txt, json:FIELD, jsonl:FIELD, ..."""

    clear_missing: bool = False
    """Take a column's captions from the images that have none of it in these sources."""

    dry_run: bool = False
    """Say what would change, and write nothing."""

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is read."""
        check_options(self)
        check_columns("--columns", self.caption_columns)

    @property
    def caption_columns(self) -> tuple[str, ...]:
        """The caption columns by name."""
        return split_columns(self.columns)


def columns_or_none(captions: str) -> tuple[str, ...]:
    """The names in --captions of a command that may do without any."""
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
                f"{option} {column!r} cannot be a caption column; name the suffix of the text "
                f"files beside the images, say txt, or json:FIELD, jsonl:FIELD, parquet:FIELD"
            ) from None


@dataclass(frozen=True)
class InfoOptions:
    """Say what is in a store: counts, buckets, bytes, VAE, latent statistics, what was rejected."""

    store: tyro.conf.Positional[Path] = field(default=Path("latents"))
    """The store's folder."""

    tags: Every = 20
    """How many of the most frequent tags to show of a column that holds tags."""

    json: bool = False
    """Print JSON for programs."""

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is read."""
        check_options(self)


@dataclass(frozen=True)
class CheckOptions:
    """Read everything back: shards present, checksums right, values finite, counts adding up.

    Exits non-zero when anything is wrong, and names the images. With --repair, exits zero when the
    store is right again, and non-zero when `xlsd-cache build` has to encode what was damaged.
    """

    store: tyro.conf.Positional[Path] = field(default=Path("latents"))
    """The store's folder."""

    decode: Every = 0
    """Decode this many samples and compare them with their images and the VAE's own round trip."""

    vae: str | None = None
    """The VAE to decode with: another with the same encoder, or the store's where it lies now."""

    repair: bool = False
    """Mend what can be proved right, and have the next build encode exactly what cannot."""

    json: bool = False
    """Print JSON for programs, with the names of all images concerned."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: the graphics card when there is one."""

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is read."""
        check_options(self)


@dataclass(frozen=True)
class ImportOptions:
    """Take other programs' cached latents into a store, so that nothing is encoded twice.

    kohya's .npz, OneTrainer's and SimpleTuner's .pt, ai-toolkit's and single .safetensors, each
    kind into a store of its own, to which no build adds: they were resized otherwise. Every latent
    whose image is there is first compared with it; one that is not its image's is rejected by name,
    and the others are imported. Running it again imports only what is new; nothing leaves the store
    by it.
    """

    cache: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of cached latents, searched at every depth."""

    vae: str
    """The VAE that made them: sdxl, sd, a hub id ORG/NAME, a folder, or a .safetensors file."""

    out: Folder = Path("latents")
    """The store."""

    images: Path | None = None
    """Where the images and their captions are. Default: beside the latents, or where OneTrainer's
    cache says that they were. SimpleTuner's caches need it."""

    captions: str = "txt"
    """Caption columns, comma-separated, as for `build`. `none`."""

    force: bool = False
    """Import what cannot be proved: random draws in place of means (kohya, ai-toolkit,
    SimpleTuner), latents without images to compare them with, other crops, and scaled latents,
    which are divided by the factor. Latents of another VAE or of other images are refused all the
    same."""

    compare: Count = 16
    """Latents to encode again and compare, and to send through the VAE's round trip. All others are
    compared by thumbnails made of the latents, and encoded again where those do not fit."""

    vae_scaling_factor: Factor | None = None
    """Only for a .safetensors file that does not say: 0.13025 for SDXL's VAE, 0.18215 for SD's."""

    vae_padding: Padding = "zeros"
    """How the VAE's convolutions padded when these latents were made, as for `build`."""

    workers: Threads = 4
    """Threads that read the cache files."""

    rows_per_shard: Annotated[int, Within(1, 2**20)] | None = None
    """Fixed when a store is made, as for `build`."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Of the comparison. auto: the graphics card when there is one."""

    dry_run: bool = False
    """Find and compare, say what would be done, and write nothing."""

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is read."""
        if not self.cache:
            raise UserError("no CACHE folder is given; name the folders of cached latents")
        check_options(self)
        check_columns("--captions", self.caption_columns)

    @property
    def caption_columns(self) -> tuple[str, ...]:
        """The caption columns by name."""
        return columns_or_none(self.captions)


@dataclass(frozen=True)
class PreviewOptions:
    """Draw a contact sheet of decoded latents: what training sees, with caption, bucket and crop.

    The images are not needed, only the store and its VAE.
    """

    store: tyro.conf.Positional[Path]
    """The store's folder."""

    out: tyro.conf.Positional[File]
    """The picture to write: .png, .jpg or .webp."""

    count: Annotated[int, Within(1, 10**4)] = 24
    """How many samples to draw, chosen at random."""

    rows: str | None = None
    """These samples instead: BUCKET:ROW,BUCKET:ROW, say 512x512:0,512x512:7."""

    tags: str | None = None
    """Only samples whose caption has all of these tags: woman,solo. Exact, between commas."""

    caption: str | None = None
    """The caption column to show and to look for tags in. Default: the first."""

    seed: Annotated[int, Within(0, 2**63 - 1)] = 0
    """Another seed chooses other samples."""

    columns: Annotated[int, Within(1, 100)] = 6
    """Pictures side by side."""

    thumbnail: Annotated[int, Within(64, 4096)] = 256
    """Pixels that the longer side of a picture takes."""

    vae: str | None = None
    """The VAE to decode with: another with the same encoder, or the store's where it lies now."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: the graphics card when there is one."""

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is read."""
        check_options(self)
        if self.out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
            raise UserError(f"{self.out} is no picture's name; end it in .png, .jpg or .webp")
        if self.rows and self.tags:
            raise UserError("--rows and --tags both choose samples; give one of them")


@dataclass(frozen=True)
class ExportIndexOptions:
    """Write the samples table as one parquet file that pandas, polars and duckdb read.

    With all captions, and for each latent its shard file, byte offset and length, dtype and shape:
    enough for any program to read latents without this one.
    """

    store: tyro.conf.Positional[Path]
    """The store's folder."""

    out: tyro.conf.Positional[File]
    """The file to write."""

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is read."""
        check_options(self)
