"""Options of `xlsd-cache import`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from xlsd_cache.console.option_checks import Count, Factor, Folder, Threads
from xlsd_cache.errors import UserError
from xlsd_cache.options.captions import Columns, check_columns, columns_or_none
from xlsd_cache.options.store import RowsPerShard
from xlsd_cache.options.work import Device, ProgressOptions
from xlsd_cache.vocabulary import Padding


@dataclass(frozen=True)
class ImportOptions(ProgressOptions):
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

    def check(self) -> None:
        """Raise UserError for what no import can use."""
        if not self.cache:
            raise UserError("CACHE is missing; give the folders of cached latents")
        check_columns("--captions", self.caption_columns)

    @property
    def caption_columns(self) -> tuple[str, ...]:
        """Names of the caption columns."""
        return columns_or_none(self.captions)
