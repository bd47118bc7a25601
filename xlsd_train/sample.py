"""Samples of the live model, by diffusers' own pipeline, that leave training untouched."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from accelerate import Accelerator

from xlsd_cache import UserError
from xlsd_cache.durable import replacing
from xlsd_cache.full import give_back
from xlsd_cache.ours import marking
from xlsd_train import draw
from xlsd_train.captions import Columns
from xlsd_train.mixture import Store
from xlsd_train.model import Model
from xlsd_train.parts import Parts
from xlsd_train.picture import Picture, draw_picture, pipeline_of, save_picture, sheet
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

    def __call__(self, model: Model, folder: Path, step: int, accelerator: Accelerator) -> Path:
        """Draw every prompt into samples/step-N/ and renew samples/grid.png; returns the grid.

        The noise is drawn on the CPU from generators of its own, and the modules are back in
        training mode and the VAE off the card after.
        """
        model.vae.model.to(accelerator.device)
        pipeline = pipeline_of(model)
        target = folder / "samples" / f"step-{step:08d}"
        target.mkdir(parents=True, exist_ok=True)
        for part in (model.unet, model.text_encoder):
            part.eval()
        try:
            for i, prompt in enumerate(self.prompts):
                asked = Picture(
                    prompt, "", self.seed + i, self.steps, self.guidance, self.width, self.height
                )
                with accelerator.autocast():
                    image = draw_picture(model, pipeline, asked)
                save_picture(image, target / f"{i:02d}.png", asked, training_step=step)
        finally:
            for part in (model.unet, model.text_encoder):
                part.train()
            model.vae.model.to("cpu")
            give_back(accelerator.device)
        return self._grid(folder / "samples")

    def _grid(self, samples: Path) -> Path:
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
        path = samples / "grid.png"
        with replacing(path) as temporary:
            sheet(rows, self.width, self.height).save(temporary, "PNG", **marking("grid"))
        return path


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
