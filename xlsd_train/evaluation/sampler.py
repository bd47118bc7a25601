"""Samples of the live model, by diffusers' own pipeline, that leave training untouched."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from xlsd_cache.dataset import rng as draw
from xlsd_cache.dataset.selection import SampleStore, Selection
from xlsd_cache.runtime.atomic import replacing
from xlsd_cache.runtime.gpu_memory import give_back
from xlsd_cache.runtime.own_files import marking
from xlsd_cache.vocabulary import Bucket
from xlsd_train.config.train import TrainConfig
from xlsd_train.data.captions import CaptionColumns
from xlsd_train.evaluation.images import Picture, draw_picture, pipeline_of, save_picture, sheet
from xlsd_train.evaluation.prompts import read_lines, read_pictures
from xlsd_train.model.bundle import ModelBundle
from xlsd_train.runs.downsample import evenly
from xlsd_train.runs.layout import SAMPLES, grid_of, samples_of, steps_in
from xlsd_train.runs.record import RunRecord
from xlsd_train.step.distributed import ALONE, Processes

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

    def __call__(
        self,
        model: ModelBundle,
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
        asked = self.pictures
        with _drawing(model, accelerator.device):
            pipeline = pipeline_of(model)

            def work(i: int) -> Image.Image:
                with accelerator.autocast():
                    return draw_picture(model, pipeline, asked[i])

            images = processes.deal(len(asked), work, stopped)
        if images:
            target = samples_of(folder, step)
            target.mkdir(parents=True, exist_ok=True)
            for i, (image, picture) in enumerate(zip(images, asked, strict=True)):
                save_picture(image, target / f"{i:02d}.png", picture, training_step=step)
            self._grid(folder)
        return None if images is None else grid_of(folder)

    def _grid(self, run: Path) -> None:
        """Steps down, prompts across; of many steps some, the first and last among them."""
        there = list(steps_in(run / SAMPLES).items())
        rows = [
            [
                (f"step {step}: {prompt}", folder / f"{column:02d}.png")
                for column, prompt in enumerate(self.prompts)
            ]
            for step, folder in (there[i] for i in evenly(len(there), GRID_ROWS))
        ]
        width = max(picture.width for picture in self.pictures)
        height = max(picture.height for picture in self.pictures)
        with replacing(grid_of(run)) as temporary:
            sheet(rows, width, height).save(temporary, "PNG", **marking("grid"))


@contextmanager
def _drawing(model: ModelBundle, device: torch.device) -> Iterator[None]:
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
        give_back(device)


def read_prompts(
    config: TrainConfig,
    store: SampleStore,
    selection: Selection,
    columns: CaptionColumns,
    before: RunRecord | None,
) -> list[Picture]:
    """What a run draws: the prompts of --sample-prompts, or captions of the selected samples.

    `before` is the record of a run that is resumed. Runs of older versions know no options in a
    line: while the file is the same, they draw what they drew. Raises UserError for a file without
    prompts, and for a prompt that cannot be drawn.
    """
    width, height = sample_size(selection.sizes)
    default = Picture(
        "", "", config.seed, config.sample_steps, config.sample_guidance, width, height
    )
    path = config.sample_prompts
    if path is None:
        return _literal(_captions(config, store, selection, columns), default)
    if before and before.samples is None:
        lines = read_lines(path, "--sample-prompts", comments=True)
        if lines == before.prompts:
            return _literal(lines, default)
    return read_pictures(path, "--sample-prompts", default)


def _literal(prompts: list[str], default: Picture) -> list[Picture]:
    """Each prompt as it is written, from consecutive seeds."""
    return [
        replace(default, prompt=prompt, seed=default.seed + i) for i, prompt in enumerate(prompts)
    ]


def _captions(
    config: TrainConfig, store: SampleStore, selection: Selection, columns: CaptionColumns
) -> list[str]:
    """Captions of selected samples, always the same."""
    parts, seed = config.caption_edits(), config.seed
    texts = [store.samples[name] for name in columns.names]
    chosen: dict[str, None] = {}
    for number in draw.permutation(seed, "sample prompts", len(selection)):
        at = np.array([number])
        (row,) = selection.rows(store, at).tolist()
        words = draw.words(seed, "sample prompt", at)
        (text,) = columns.mix([[column[row].as_py()] for column in texts], words)
        line = next(iter((text or "").splitlines()), "")
        prompt = parts.deterministic.apply(line, 0, 0) if parts else line
        if prompt:
            chosen[prompt] = None
        if len(chosen) == PROMPTS:
            break
    return list(chosen) or [""]


def sample_size(sizes: Mapping[str, int]) -> tuple[int, int]:
    """(width, height) of the bucket with the most samples."""
    return Bucket.parse(max(sizes, key=lambda name: (sizes[name], name)))
