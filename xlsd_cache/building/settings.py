"""What a plan leaves for its workers, in the store: `encode` needs no options and no source."""

from dataclasses import asdict, dataclass
from pathlib import Path

from xlsd_cache.errors import UserError
from xlsd_cache.images.header import MOST_PIXELS
from xlsd_cache.runtime.atomic import write_json
from xlsd_cache.runtime.bounded_files import read_json
from xlsd_cache.store.manifest import Manifest

_LONGEST = 4096  # characters of a VAE's name


@dataclass(frozen=True)
class EncodeSettings:
    """The options of a plan that its units are encoded with, besides the store's identity."""

    vae: str  # short name, hub id or absolute path
    batch: int | None  # images a call, where the user has chosen
    max_pixels: int  # of an image

    @classmethod
    def read(cls, root: Path) -> "EncodeSettings":
        """Those of the last plan. Raises UserError where there are none, or they are damaged."""
        try:
            settings = cls(**read_json(_path(root)))
            settings.check()
        except FileNotFoundError:
            raise UserError(
                f"{root} has no plan that workers can read: an import or an older version wrote "
                f"it; run `xlsd-cache plan IMAGES --out {root}`"
            ) from None
        except (OSError, ValueError, TypeError) as error:
            raise UserError(
                f"cannot read {_path(root)} ({error}); `xlsd-cache plan IMAGES --out {root}` "
                f"writes it again"
            ) from error
        return settings

    def check(self) -> None:
        """Raise ValueError for a value that no plan writes."""
        for name, sound in (
            ("vae", type(self.vae) is str and 0 < len(self.vae) <= _LONGEST),
            ("batch", self.batch is None or (type(self.batch) is int and 0 < self.batch <= 10**4)),
            ("max_pixels", type(self.max_pixels) is int and 0 < self.max_pixels <= MOST_PIXELS),
        ):
            if not sound:
                raise ValueError(f"its {name} is {str(getattr(self, name))[:40]!r}")

    def write(self, manifest: Manifest) -> None:
        """Record the settings, unless they are recorded."""
        try:
            if EncodeSettings.read(manifest.root) == self:
                return
        except UserError:
            pass
        write_json(_path(manifest.root), asdict(self), manifest.staging)


def _path(root: Path) -> Path:
    return root / "manifest" / "encode.json"
