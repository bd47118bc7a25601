"""Encode images and captions once into a zarr store of raw VAE latents, and read them back.

    store = LatentStore.open("latents")
    dataset = LatentDataset(store, caption="txt")
    sampler = BucketBatchSampler(dataset, batch_size=16, seed=0)
    for batch in DataLoader(dataset, batch_sampler=sampler):
        ...  # batch["latents"], batch["caption"], batch["key"]

What is not in `__all__` is private. Nothing heavy is loaded before it is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from xlsd_cache.errors import UserError

if TYPE_CHECKING:
    from xlsd_cache.building.finish import finish
    from xlsd_cache.building.plan import BuildPlan, plan
    from xlsd_cache.building.worker import Outcome, Worker
    from xlsd_cache.commands.build import build
    from xlsd_cache.dataset.dataset import LatentDataset
    from xlsd_cache.dataset.sampler import BucketBatchSampler
    from xlsd_cache.options.build import BuildOptions
    from xlsd_cache.store.reader import LatentStore

__version__ = "0.1.0"

__all__ = [
    "BucketBatchSampler",
    "BuildOptions",
    "BuildPlan",
    "LatentDataset",
    "LatentStore",
    "Outcome",
    "UserError",
    "Worker",
    "__version__",
    "build",
    "finish",
    "plan",
]

_ROOMS = {
    "BucketBatchSampler": "dataset.sampler",
    "BuildOptions": "options.build",
    "BuildPlan": "building.plan",
    "LatentDataset": "dataset.dataset",
    "LatentStore": "store.reader",
    "Outcome": "building.worker",
    "Worker": "building.worker",
    "build": "commands.build",
    "finish": "building.finish",
    "plan": "building.plan",
}


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)
