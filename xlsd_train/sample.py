"""Samples of the live model, by diffusers' own pipeline, that leave training untouched."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from xlsd_cache import UserError
from xlsd_cache.durable import replacing
from xlsd_cache.ours import marking
from xlsd_train import draw
from xlsd_train.captions import Columns
from xlsd_train.mixture import Store
from xlsd_train.model import Model
from xlsd_train.parts import Parts
from xlsd_train.picture import Picture, draw_picture, pipeline_of, save_picture, sheet
from xlsd_train.processes import ALONE, Processes
from xlsd_train.selection import Selection
from xlsd_train.thin import evenly

PROMPTS = 4  # taken from the store where no file is given
GRID_ROWS = 10


@dataclass(frozen=True)
class Sampler:
    """What to draw, always the same: prompt i from seed + i, at any step."""

    prompts: list[str]
    width: int
    height: int
    steps: int
    guidance: float
    seed: int

    def __call__(
        self,
        model: Model,
        folder: Path,
        step: int,
        accelerator: Accelerator,
        processes: Processes = ALONE,
        stopped: Callable[[], bool] = bool,
    ) -> Path | None:
        """Draw every prompt into samples/step-N/ and renew samples/grid.png; returns the grid.

        The processes of a run draw a prompt each, in turn, and the first one writes them all; None
        where any was `stopped`, when nothing is written. The noise is drawn on the CPU from
        generators of its own, and the modules are back in training mode and the VAE off the card
        after.
        """
        asked = [
            Picture(prompt, "", self.seed + i, self.steps, self.guidance, self.width, self.height)
            for i, prompt in enumerate(self.prompts)
        ]
        with _drawing(model, accelerator.device):
            pipeline = pipeline_of(model)

            def work(i: int) -> Image.Image:
                with accelerator.autocast():
                    return draw_picture(model, pipeline, asked[i])

            images = processes.deal(len(asked), work, stopped)
        if images:
            target = _folder(folder, step)
            target.mkdir(parents=True, exist_ok=True)
            for i, (image, picture) in enumerate(zip(images, asked, strict=True)):
                save_picture(image, target / f"{i:02d}.png", picture, training_step=step)
            self._grid(folder / "samples")
        return None if images is None else folder / "samples" / "grid.png"

    def _grid(self, samples: Path) -> None:
        """Steps down, prompts across; of many steps some, the first and last among them."""
        folders = sorted(samples.glob("step-????????"))
        chosen = [folders[i] for i in evenly(len(folders), GRID_ROWS)]
        rows = [
            [
                (f"step {int(folder.name[5:])}: {prompt}", folder / f"{column:02d}.png")
                for column, prompt in enumerate(self.prompts)
            ]
            for folder in chosen
        ]
        with replacing(samples / "grid.png") as temporary:
            sheet(rows, self.width, self.height).save(temporary, "PNG", **marking("grid"))


@contextmanager
def _drawing(model: Model, device: torch.device) -> Iterator[None]:
    """The VAE on the device and the others not in training mode; as they were after."""
    model.vae.model.to(device)
    for part in (model.unet, model.text_encoder):
        part.eval()
    try:
        yield
    finally:
        for part in (model.unet, model.text_encoder):
            part.train()
        model.vae.model.to("cpu")


def has_samples(folder: Path, step: int) -> bool:
    """Whether a run drew samples after this step."""
    return any(_folder(folder, step).glob("*.png"))


def _folder(run: Path, step: int) -> Path:
    return run / "samples" / f"step-{step:08d}"


def read_lines(path: Path, option: str) -> list[str]:
    """The lines of a text file that hold anything. Raises UserError where there are none."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {option} {path}: {error}; give a text file") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{option} {path} is empty; write one prompt a line")
    return prompts


def read_prompts(
    path: Path | None,
    store: Store,
    selection: Selection,
    columns: Columns,
    parts: Parts | None,
    seed: int,
) -> list[str]:
    """The prompts of a file, or captions of the selected samples, in order.

    Raises UserError for a file without any.
    """
    if path is not None:
        return read_lines(path, "--sample-prompts")
    texts = [store.samples[name] for name in columns.names]
    chosen: dict[str, None] = {}
    for number in draw.permutation(seed, "sample prompts", len(selection)):
        at = np.array([number])
        (row,) = selection.rows(store, at).tolist()
        words = draw.words(seed, "sample prompt", at)
        (text,) = columns.mix([[column[row].as_py()] for column in texts], words)
        line = next(iter((text or "").splitlines()), "")
        prompt = parts.plain.apply(line, 0, 0) if parts else line
        if prompt:
            chosen[prompt] = None
        if len(chosen) == PROMPTS:
            break
    return list(chosen) or [""]


def sample_size(sizes: Mapping[str, int]) -> tuple[int, int]:
    """(width, height) of the bucket with the most samples."""
    bucket = max(sizes, key=lambda name: (sizes[name], name))
    width, height = map(int, bucket.split("x"))
    return width, height
