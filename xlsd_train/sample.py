"""Samples of the live model, by diffusers' own pipeline, that leave training untouched."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from xlsd_cache.durable import replacing
from xlsd_cache.ours import marking
from xlsd_train import draw
from xlsd_train.captions import Columns
from xlsd_train.config import TrainConfig
from xlsd_train.mixture import Store
from xlsd_train.model import Model
from xlsd_train.picture import Picture, draw_picture, pipeline_of, save_picture, sheet
from xlsd_train.prompts import read_lines, read_pictures
from xlsd_train.selection import Selection
from xlsd_train.thin import evenly

PROMPTS = 4  # taken from the store where no file is given
GRID_ROWS = 10


@dataclass(frozen=True)
class Sampler:
    """What to draw, the same at any step."""

    pictures: list[Picture]

    @property
    def prompts(self) -> list[str]:
        """Their prompts."""
        return [picture.prompt for picture in self.pictures]

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
            for i, asked in enumerate(self.pictures):
                with accelerator.autocast():
                    image = draw_picture(model, pipeline, asked)
                save_picture(image, target / f"{i:02d}.png", asked, training_step=step)
        finally:
            for part in (model.unet, model.text_encoder):
                part.train()
            model.vae.model.to("cpu")
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
        width = max(picture.width for picture in self.pictures)
        height = max(picture.height for picture in self.pictures)
        with replacing(path) as temporary:
            sheet(rows, width, height).save(temporary, "PNG", **marking("grid"))
        return path


def read_prompts(
    config: TrainConfig,
    store: Store,
    selection: Selection,
    columns: Columns,
    before: Mapping[str, Any] | None,
) -> list[Picture]:
    """What a run draws: the prompts of --sample-prompts, or captions of the selected samples.

    `before` is config.json of a run that goes on. One that older versions began knows no options in
    a line: where the file is still the one that it was, it draws what it drew. Raises UserError for
    a file without prompts, and for one that cannot be drawn.
    """
    width, height = sample_size(selection.sizes)
    default = Picture(
        "", "", config.seed, config.sample_steps, config.sample_guidance, width, height
    )
    path = config.sample_prompts
    if path is None:
        return _literal(_captions(config, store, selection, columns), default)
    if before and "samples" not in before:
        lines = read_lines(path, "--sample-prompts", comments=True)
        if lines == before.get("prompts"):
            return _literal(lines, default)
    return read_pictures(path, "--sample-prompts", default)


def _literal(prompts: list[str], default: Picture) -> list[Picture]:
    """Each prompt as it is written, from consecutive seeds."""
    return [
        replace(default, prompt=prompt, seed=default.seed + i) for i, prompt in enumerate(prompts)
    ]


def _captions(
    config: TrainConfig, store: Store, selection: Selection, columns: Columns
) -> list[str]:
    """Captions of selected samples, always the same."""
    parts, seed = config.parts(), config.seed
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
