"""Samples of the live model, by diffusers' own pipeline, that leave training untouched."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from xlsd_cache import UserError
from xlsd_cache.durable import replacing
from xlsd_cache.store import LatentStore
from xlsd_train import draw
from xlsd_train.model import Model

PROMPTS = 4  # taken from the store where no file is given
GRID_ROWS, LABEL_HEIGHT = 10, 16


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
        device = accelerator.device
        scheduler: Any = DPMSolverMultistepScheduler.from_config(model.scheduler_config)
        pipeline: Any = StableDiffusionPipeline(
            vae=model.vae.model.to(device),
            text_encoder=model.text_encoder,
            tokenizer=model.tokenizer,
            unet=model.unet,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        target = folder / "samples" / f"step-{step:08d}"
        target.mkdir(parents=True, exist_ok=True)
        for part in (model.unet, model.text_encoder):
            part.eval()
        try:
            for i, prompt in enumerate(self.prompts):
                with accelerator.autocast():
                    latents = pipeline(
                        prompt,
                        width=self.width,
                        height=self.height,
                        num_inference_steps=self.steps,
                        guidance_scale=self.guidance,
                        generator=torch.Generator().manual_seed(self.seed + i),
                        output_type="latent",
                    ).images
                    decoded = model.vae.decode(model.scaling.raw(latents))
                image = pipeline.image_processor.postprocess(decoded)[0]
                self._save(image, target / f"{i:02d}.png", prompt, step, i)
        finally:
            for part in (model.unet, model.text_encoder):
                part.train()
            model.vae.model.to("cpu")
        return self._grid(folder / "samples")

    def _save(self, image: Image.Image, path: Path, prompt: str, step: int, i: int) -> None:
        told = {
            "prompt": prompt,
            "seed": self.seed + i,
            "steps": self.steps,
            "guidance": self.guidance,
            "scheduler": "DPM++ 2M",
            "training_step": step,
        }
        info = PngInfo()
        info.add_text("xlsd", json.dumps(told, ensure_ascii=False))
        with replacing(path) as temporary:
            image.save(temporary, "PNG", pnginfo=info)

    def _grid(self, samples: Path) -> Path:
        """Steps down, prompts across; of many steps some, the first and last among them."""
        folders = sorted(samples.glob("step-????????"))
        count = min(GRID_ROWS, len(folders))
        chosen = [folders[round(i * (len(folders) - 1) / max(1, count - 1))] for i in range(count)]
        width, height = self.width, self.height + LABEL_HEIGHT
        grid = Image.new("RGB", (width * len(self.prompts), height * count), "white")
        write = ImageDraw.Draw(grid)
        for row, folder in enumerate(chosen):
            for column, prompt in enumerate(self.prompts):
                x, y = column * width, row * height
                label = f"step {int(folder.name[5:])}: {prompt}"
                write.text((x + 2, y + 2), label[: width // 6], fill="black")
                path = folder / f"{column:02d}.png"
                if path.exists():
                    with Image.open(path) as image:
                        grid.paste(image.convert("RGB"), (x, y + LABEL_HEIGHT))
        path = samples / "grid.png"
        with replacing(path) as temporary:
            grid.save(temporary, "PNG")
        return path


def read_prompts(path: Path | None, store: LatentStore, column: str | None, seed: int) -> list[str]:
    """The prompts of a file, or captions of the store. Raises UserError for a file without any."""
    if path is not None:
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"cannot read --sample-prompts {path}: {error}; give a text file"
            ) from error
        prompts = [line.strip() for line in lines if line.strip()]
        if not prompts:
            raise UserError(f"--sample-prompts {path} is empty; write one prompt a line")
        return prompts
    if column is None:
        return [""]
    texts = store.samples[column]
    chosen: dict[str, None] = {}
    for i in map(int, draw.permutation(seed, "sample prompts", len(store))):
        lines = (texts[i].as_py() or "").splitlines()
        if lines:
            chosen[lines[0]] = None
        if len(chosen) == PROMPTS:
            break
    return list(chosen) or [""]


def sample_size(store: LatentStore) -> tuple[int, int]:
    """(width, height) of the store's fullest bucket."""
    bucket = max(store.buckets, key=lambda name: (len(store.buckets[name]), name))
    width, height = map(int, bucket.split("x"))
    return width, height
