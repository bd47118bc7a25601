"""What decides a run's bits besides its options: device, threads, stores and library versions."""

import platform
import sys
from importlib.metadata import version
from typing import Any

import psutil
import torch

from xlsd_train.config.train import FREE, TrainConfig
from xlsd_train.data.mixture import Mixture

NUMERIC = ("torch", "diffusers", "transformers", "numpy")  # they decide the bits


def resume_settings(config: TrainConfig, stores: Mixture, device: torch.device) -> dict[str, Any]:
    """What a resume must share with the run for bit-equal results.

    The number of processes is not among them: they split one batch, and sums are equal up to
    rounding.
    """
    given = {name: value for name, value in config.to_json().items() if name not in FREE}
    given.pop("data")  # stores may move: their fingerprints are compared
    given["betas"] = list(config.betas or ())
    return {
        **given,
        "device": device.type,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "stores": " ".join(
            f"{part.store.fingerprint[:16]}:{float(part.weight):g}" for part in stores.parts
        ),
        **{f"{name} version": version(name) for name in NUMERIC},
        **(_card(device) if device.type == "cuda" else {}),
    }


def _card(device: torch.device) -> dict[str, Any]:
    """Other GPUs and other versions of cuDNN use other kernels, which round differently."""
    return {
        "card": torch.cuda.get_device_name(device),
        "cudnn version": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
    }


def machine(device: torch.device) -> dict[str, Any]:
    """Facts about the machine, for people."""
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "host": platform.node(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "card": card,
        "cuda": torch.version.cuda,
    }


def peak_gib(device: torch.device) -> float:
    """Peak memory so far in GiB: of torch's allocator on a GPU, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return float(psutil.Process().memory_info().peak_wset) / 2**30
    unit = 2**30 if sys.platform == "darwin" else 2**20  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
