"""A store's files together with what its latents are: what most functions of the cache take."""

from dataclasses import dataclass
from pathlib import Path

from xlsd_cache.errors import UserError
from xlsd_cache.store.identity import Identity, read_attributes
from xlsd_cache.store.manifest import Manifest, ShardId
from xlsd_cache.store.shard import ShardReader


@dataclass(frozen=True)
class StoreView:
    """A store at one generation of its log."""

    manifest: Manifest
    identity: Identity
    rows_per_shard: int
    generation: int = -1  # -1 before the first

    @classmethod
    def open(cls, root: Path) -> "StoreView":
        """The newest generation, encoded or not. Raises UserError where there is none."""
        identity, rows_per_shard = read_attributes(root)
        generations = Manifest(root).generations()
        if not generations:
            raise UserError(f"{root} is not planned yet; run `xlsd-cache build` to finish it")
        return cls(Manifest(root), identity, rows_per_shard, generations[-1])

    def open_shard(self, unit: ShardId) -> ShardReader:
        """A reader of one shard. Raises CorruptShard and OSError."""
        nbytes = self.identity.nbytes(unit.bucket)
        return ShardReader(self.manifest.shard(unit), self.rows_per_shard, nbytes)

    def relative(self, path: Path) -> str:
        """A file's path within the store."""
        return path.relative_to(self.manifest.root).as_posix()
