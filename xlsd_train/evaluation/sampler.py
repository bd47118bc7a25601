"""Generates sample images during training, without changing anything that training depends on."""

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
from xlsd_cache.pages.thumbnails import save_thumbnail
from xlsd_cache.runtime.atomic import replacing
from xlsd_cache.runtime.gpu_memory import give_back
from xlsd_cache.runtime.own_files import marking
from xlsd_cache.vocabulary import Bucket
from xlsd_train.config.train import TrainConfig
from xlsd_train.data.captions import CaptionColumns
from xlsd_train.evaluation.images import Picture, draw_picture, make_grid, pipeline_of, save_picture
from xlsd_train.evaluation.prompts import read_lines, read_pictures
from xlsd_train.model.bundle import ModelBundle
from xlsd_train.runs.downsample import evenly
from xlsd_train.runs.layout import SAMPLES, grid_of, picture_name, samples_of, steps_in
from xlsd_train.runs.record import RunRecord
from xlsd_train.step.distributed import ALONE, Processes, Progress, silent

PROMPTS = 4  # captions taken from the store without --sample-prompts
GRID_ROWS = 10


@dataclass(frozen=True)
class Sampler:
    """Generates the same pictures at every sampled step."""

    pictures: list[Picture]

    @property
    def prompts(self) -> list[str]:
        """The prompts, in the pictures' order."""
        return [picture.prompt for picture in self.pictures]

    def __call__(
        self,
        model: ModelBundle,
        folder: Path,
        step: int,
        accelerator: Accelerator,
        processes: Processes = ALONE,
        stopped: Callable[[], bool] = bool,
        progress: Progress = silent,
    ) -> Path | None:
        """Write an image per prompt to samples/step-N/, update samples/grid.png, return its path.

        The processes of a run share the prompts in turn, and the first process writes all images.
        If any process was `stopped`, nothing is written and None returned. Noise comes from CPU
        generators of its own. Afterwards modules are in training mode and the VAE is on the CPU.
        """
        pictures = self.pictures
        with _sampling(model, accelerator.device):
            pipeline = pipeline_of(model)

            def work(i: int) -> Image.Image:
                def told(done: int) -> None:
                    progress(i + 1, len(pictures), f"step {done}/{pictures[i].steps}")

                told(0)
                with accelerator.autocast():
                    return draw_picture(model, pipeline, pictures[i], told)

            images = processes.deal(len(pictures), work, stopped)
        if images:
            target = samples_of(folder, step)
            target.mkdir(parents=True, exist_ok=True)
            for i, (image, picture) in enumerate(zip(images, pictures, strict=True)):
                path = target / picture_name(i)
                save_picture(image, path, picture, training_step=step)
                save_thumbnail(image, path)
            self._grid(folder)
        return None if images is None else grid_of(folder)

    def _grid(self, run: Path) -> None:
        """Steps down, prompts across; of more than GRID_ROWS steps, evenly spaced ones."""
        steps = list(steps_in(run / SAMPLES).items())
        rows = [
            (f"step {step}", [folder / picture_name(i) for i in range(len(self.prompts))])
            for step, folder in (steps[i] for i in evenly(len(steps), GRID_ROWS))
        ]
        width = max(picture.width for picture in self.pictures)
        height = max(picture.height for picture in self.pictures)
        with replacing(grid_of(run)) as temporary:
            make_grid(self.prompts, rows, width, height).save(temporary, "PNG", **marking("grid"))


@contextmanager
def _sampling(model: ModelBundle, device: torch.device) -> Iterator[None]:
    """Put the VAE on the device and the other modules in eval mode; undo both afterwards."""
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
    """The pictures of a run: from --sample-prompts, or from captions of the selected samples.

    `before` is the record of the run that is resumed. Older versions knew no options in a line: a
    run of theirs keeps its pictures while the file is unchanged. Raises UserError for a file
    without prompts or with invalid settings.
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
    """A picture for each prompt, taken literally, with consecutive seeds."""
    return [
        replace(default, prompt=prompt, seed=default.seed + i) for i, prompt in enumerate(prompts)
    ]


def _captions(
    config: TrainConfig, store: SampleStore, selection: Selection, columns: CaptionColumns
) -> list[str]:
    """Up to PROMPTS different captions of the selected samples, chosen by the run's seed."""
    edits, seed = config.caption_edits(), config.seed
    texts = [store.samples[name] for name in columns.names]
    chosen: dict[str, None] = {}
    for number in draw.permutation(seed, "sample prompts", len(selection)):
        at = np.array([number])
        (row,) = selection.rows(store, at).tolist()
        words = draw.words(seed, "sample prompt", at)
        (text,) = columns.mix([[column[row].as_py()] for column in texts], words)
        line = next(iter((text or "").splitlines()), "")
        prompt = edits.deterministic.apply(line, 0, 0) if edits else line
        if prompt:
            chosen[prompt] = None
        if len(chosen) == PROMPTS:
            break
    return list(chosen) or [""]


def sample_size(sizes: Mapping[str, int]) -> tuple[int, int]:
    """(width, height) of the bucket with the most samples; of equal ones, the last by name."""
    return Bucket.parse(max(sizes, key=lambda name: (sizes[name], name)))
