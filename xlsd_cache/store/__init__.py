"""The latent store on the disk: a zarr v3 group of shards, and its log.

Written: `shard` (latents), `commit` (one shard's record), `manifest` (the log), `zarr_files` (what
plain zarr readers need). Read: `log_files` reads many small files of the log as one, `index` folds
the log into a snapshot, `reader` opens it as `LatentStore`, `tag_index` finds samples by tag.
`identity` says which latents are compatible, `view` holds a store's files, identity and generation
together. The tables' columns stand in `xlsd_cache.schema`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xlsd_cache.store.reader import LatentStore

__all__ = ["LatentStore"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.reader"), name)
