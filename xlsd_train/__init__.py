"""Train Stable Diffusion 1.5's UNet and text encoder in fp32 on the latents of a store.

    train(TrainConfig(phase="unet", data=("latents",), out=Path("run"), steps=10_000))
    model = load_model("run")  # model.unet, model.text_encoder, model.vae.model, model.tokenizer
    export_model("run", "model.safetensors", format="single-file")
    write_report([Path("run")])

What is not in `__all__` is private. Nothing heavy is loaded before it is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xlsd_train.config.train import TrainConfig
    from xlsd_train.export.export import export_model
    from xlsd_train.model.loading import load_model
    from xlsd_train.optim.lion import DLion, Lion
    from xlsd_train.report.page import write_report
    from xlsd_train.training.loop import train

__all__ = ["DLion", "Lion", "TrainConfig", "export_model", "load_model", "train", "write_report"]

_ROOMS = {
    "DLion": "optim.lion",
    "Lion": "optim.lion",
    "TrainConfig": "config.train",
    "export_model": "export.export",
    "load_model": "model.loading",
    "train": "training.loop",
    "write_report": "report.page",
}


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)
