"""Samples of the live model, by diffusers' own pipeline, that leave training untouched."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from xlsd_cache import UserError
from xlsd_cache.durable import replacing
from xlsd_cache.store import LatentStore
from xlsd_train import draw
from xlsd_train.model import Model

PROMPTS = 4  # taken from the store where no file is given
GRID_ROWS, LABEL_HEIGHT = 10, 16


# Name on the command line -> A1111's, diffusers' scheduler, its options.
SCHEDULERS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "dpm++": ("DPM++ 2M", DPMSolverMultistepScheduler, {}),
    "dpm++-karras": ("DPM++ 2M Karras", DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "euler": ("Euler", EulerDiscreteScheduler, {}),
    "euler-a": ("Euler a", EulerAncestralDiscreteScheduler, {}),
    "ddim": ("DDIM", DDIMScheduler, {}),
    "unipc": ("UniPC", UniPCMultistepScheduler, {}),
}


@dataclass(frozen=True)
class Picture:
    """What is drawn: with a model it gives the same pixels every time."""

    prompt: str
    negative: str
    seed: int
    steps: int
    guidance: float
    width: int
    height: int
    scheduler: str = "dpm++"

    def parameters(self, model: str | None = None, model_hash: str | None = None) -> str:
        """As A1111 and programs after it read from a PNG's text chunk of that name."""
        told = {
            "Steps": self.steps,
            "Sampler": SCHEDULERS[self.scheduler][0],
            "CFG scale": f"{self.guidance:g}",
            "Seed": self.seed,
            "Size": f"{self.width}x{self.height}",
            "Model hash": model_hash,
            "Model": model,
        }
        quoted = {
            name: json.dumps(value) if set(',":\n') & set(str(value)) else value
            for name, value in told.items()
            if value is not None
        }
        lines = [self.prompt, ", ".join(f"{name}: {value}" for name, value in quoted.items())]
        if self.negative:
            lines.insert(1, f"Negative prompt: {self.negative}")
        return "\n".join(lines)


def pipeline_of(model: Model, scheduler: str = "dpm++") -> Any:
    """Diffusers' own pipeline of the model as it stands, with one of SCHEDULERS."""
    _, kind, options = SCHEDULERS[scheduler]
    pipeline: Any = StableDiffusionPipeline(
        vae=model.vae.model,
        text_encoder=model.text_encoder,
        tokenizer=model.tokenizer,
        unet=model.unet,
        scheduler=kind.from_config(model.scheduler_config, **options),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw_picture(pipeline: Any, asked: Picture) -> Image.Image:
    """Draw it; all noise comes from a generator of its own on the CPU."""
    drawn: Image.Image = pipeline(
        asked.prompt,
        negative_prompt=asked.negative,
        width=asked.width,
        height=asked.height,
        num_inference_steps=asked.steps,
        guidance_scale=asked.guidance,
        generator=torch.Generator().manual_seed(asked.seed),
    ).images[0]
    return drawn


def save_picture(
    image: Image.Image,
    path: Path,
    asked: Picture,
    model: str | None = None,
    model_hash: str | None = None,
    **about: Any,
) -> None:
    """Write a PNG that says how it was made: in A1111's words, and as JSON."""
    told = {
        "prompt": asked.prompt,
        "negative": asked.negative,
        "seed": asked.seed,
        "steps": asked.steps,
        "guidance": asked.guidance,
        "scheduler": SCHEDULERS[asked.scheduler][0],
        **about,
    }
    info = PngInfo()
    info.add_text("parameters", asked.parameters(model, model_hash))
    info.add_text("xlsd", json.dumps(told, ensure_ascii=False))
    with replacing(path) as temporary:
        image.save(temporary, "PNG", pnginfo=info)


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
                    image = draw_picture(pipeline, asked)
                save_picture(image, target / f"{i:02d}.png", asked, training_step=step)
        finally:
            for part in (model.unet, model.text_encoder):
                part.train()
            model.vae.model.to("cpu")
        return self._grid(folder / "samples")

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


def read_prompts(path: Path | None, store: LatentStore, column: str | None, seed: int) -> list[str]:
    """The prompts of a file, or captions of the store. Raises UserError for a file without any."""
    if path is not None:
        return read_lines(path, "--sample-prompts")
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
