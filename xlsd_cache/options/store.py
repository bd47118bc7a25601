"""Options of what a store holds: VAE, sizes, dtype. And the argument of a store that exists."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional

from xlsd_cache.console.option_checks import CheckedOptions, Factor, Folder, Within
from xlsd_cache.vocabulary import Padding, Precision

RowsPerShard = Annotated[int, Within(1, 2**20)]


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
class StoreArgument(CheckedOptions):
    """Store."""

    store: Positional[Path]
    """The store's folder."""
