"""Encodes units of a store's plan: any number of workers, in any processes, each with one VAE."""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal, cast

import numpy as np

from xlsd_cache.building.finish import writing_store
from xlsd_cache.building.settings import EncodeSettings
from xlsd_cache.console.progress import working
from xlsd_cache.encoding.compatibility import identity_of, load_vae_for, with_encoder_hash
from xlsd_cache.encoding.encoder import Encoder
from xlsd_cache.encoding.kept_batch import keep_batch
from xlsd_cache.encoding.pipeline import EncodePipeline
from xlsd_cache.encoding.vae import Vae
from xlsd_cache.errors import UserError
from xlsd_cache.images.buckets import Buckets
from xlsd_cache.images.decode import PREPROCESSING
from xlsd_cache.images.sandbox import check_memory, decoders
from xlsd_cache.planning.units import PlannedUnits, pending_units
from xlsd_cache.runtime.arrow import counts
from xlsd_cache.runtime.device import device_of, set_precision
from xlsd_cache.runtime.gpu_memory import free_on
from xlsd_cache.runtime.signals import StopSignal
from xlsd_cache.store.identity import check_compatible
from xlsd_cache.store.log_files import read_log
from xlsd_cache.store.manifest import ShardId
from xlsd_cache.store.view import StoreView
from xlsd_cache.vocabulary import Precision

log = logging.getLogger("xlsd.cache.building")
SETTINGS = "dtype precision preprocessing resolution buckets max_ratio upscale".split()


@dataclass(frozen=True)
class Outcome:
    """What became of a unit."""

    unit: str  # BUCKET.N
    # encoded: by this call; there: committed before, by whomever; held: by another process, which
    # encodes it now; stopped: by the stop signal, to be continued from its last batch
    status: Literal["encoded", "there", "held", "stopped"]
    images: int = 0  # with a latent, where it is committed
    rejected: dict[str, int] = field(default_factory=dict)  # reason -> images


class Worker:
    """Encodes units of the plan in `store`, whoever planned them. It never lists a source.

        with Worker("latents") as worker:
            for unit in plan.units:
                worker.encode(unit)

    The plan says with which VAE and how. A `vae`, loaded or by name, must have the same encoder:
    it is for a machine where the plan's VAE is somewhere else. A Worker may encode units of later
    plans too. The VAE is loaded for the first unit that is not there. Raises UserError where the
    store has no plan for workers.
    """

    def __init__(
        self,
        store: Path | str,
        vae: Vae | str | None = None,
        *,
        device: Literal["auto", "cuda", "cpu"] = "auto",
        workers: int | None = None,
    ) -> None:
        self.root = Path(store)
        self._view = StoreView.open(self.root)
        self._settings = EncodeSettings.read(self.root)
        self._workers = workers or os.cpu_count() or 4
        check_memory(self._settings.max_pixels, self._workers)
        self._device = device_of(device)
        self._vae = vae
        self._units: PlannedUnits | None = None  # of the view's generation

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *error: object) -> None:
        """Let go of the VAE."""
        self.__dict__.pop("_encoder", None)

    def encode(self, unit: str, stop: StopSignal | None = None) -> Outcome:
        """Encode one unit, from where a killed process left it, and commit it.

        Does nothing where the unit is committed or another process encodes it. Where `stop` is
        asked, it ends after the batch. Raises UserError for a unit that the plan has not, another
        VAE, and a full disk.
        """
        return self.encode_all([unit], stop)[0]

    def encode_all(
        self,
        units: Sequence[str],
        stop: StopSignal | None = None,
        *,
        waits: bool = False,
        advance: Callable[[int], None] = lambda _: None,
    ) -> list[Outcome]:
        """Encode units one after the other, images of the next decoded meanwhile.

        With `waits`, also those that other processes hold, should these be killed. `advance` is
        called after each batch with the number of images done.
        """
        stop = stop or StopSignal()
        asked = [self._parse(unit) for unit in units]
        todo = [unit for unit in asked if not self._view.manifest.commit(unit).exists()]
        if todo:
            with writing_store(self.root):
                self._encode(todo, stop, waits, advance)
        return [self._outcome(unit, unit in todo, stop) for unit in asked]

    def _encode(
        self, todo: list[ShardId], stop: StopSignal, waits: bool, advance: Callable[[int], None]
    ) -> None:
        units = self._planned(todo)
        decoding = self._workers, self._settings.max_pixels
        decoders(*decoding).start(units.count(todo))  # while the VAE loads and CUDA starts
        work = EncodePipeline(self._view, self._encoder, units, *decoding, advance)
        work.run(todo, stop, waits)
        if work.done and not stop.asked:
            log.info(f"time: {work.seconds:.2f} s: {work.shares()}")
        if work.rounding:
            rounding = float(np.sqrt(np.mean(np.square(work.rounding))))
            log.info(f"float16 rounding: {rounding:.1e} of the latents' spread")

    def _planned(self, todo: list[ShardId]) -> PlannedUnits:
        """The rows of these units. Raises UserError for a unit that is not in the newest plan."""
        newest = StoreView.open(self.root)
        if self._units is None or newest.generation != self._view.generation:
            self._view, self._settings = newest, EncodeSettings.read(self.root)
            self._units = None
        units = self._units
        if units is None or not units.spans.keys() >= set(todo):
            # Who asks for one unit will ask for others; another process may have just committed it.
            more = pending_units(newest) if len(todo) == 1 else []
            units = PlannedUnits.read(newest, {*todo, *more})
        if unknown := [unit for unit in todo if unit not in units.spans]:
            raise UserError(
                f"{self.root} has no unit {unknown[0].name}; `xlsd-cache plan` prints those that "
                f"are to be encoded"
            )
        self._units = units
        return units

    @cached_property
    def _encoder(self) -> Encoder:
        """The VAE on its device. Raises UserError where it is not the store's."""
        view, settings = self._view, self._settings
        precision = cast("Precision", view.identity.precision)
        log.info(set_precision(precision))
        vae = self._vae
        if not isinstance(vae, Vae):
            with working("loading the VAE"):
                vae = load_vae_for(view.identity, vae or settings.vae, [self.root])
        identity = view.identity
        ours = {name: getattr(identity, name) for name in SETTINGS}
        ours["preprocessing"] = PREPROCESSING
        stored = with_encoder_hash(identity, vae, [self.root])
        check_compatible(self.root, identity_of(vae, **ours), stored)
        shapes = identity.buckets, identity.resolution, identity.max_ratio, identity.upscale
        sizes = Buckets.make(*shapes).sizes
        largest = max(size.width * size.height for size in sizes)
        encoder = Encoder.fitted(vae, precision, self._device, settings.batch, largest)
        if free_on(self._device) is not None:
            keep_batch(encoder, view.manifest, settings.batch)
        log.info(encoder)
        return encoder

    def _parse(self, unit: str) -> ShardId:
        try:
            return ShardId.parse(unit)
        except ValueError:
            raise UserError(
                f"{unit!r} is no unit of a store; give BUCKET.N, e.g. 512x512.0"
            ) from None

    def _outcome(self, unit: ShardId, was_todo: bool, stop: StopSignal) -> Outcome:
        """Read from the commit record, so that every call gives the same numbers."""
        path = self._view.manifest.commit(unit)
        if not path.exists():
            return Outcome(unit.name, "stopped" if stop.asked else "held")
        rows = read_log(path, ["status", "reason"])
        rejected = counts(rows["reason"])
        images = rejected.pop("", 0)
        return Outcome(unit.name, "encoded" if was_todo else "there", images, rejected)
