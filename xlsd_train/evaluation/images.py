"""Generates one image with diffusers' own pipeline, and saves it with its settings as metadata."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from xlsd_cache.pages.lettering import wrapped
from xlsd_cache.runtime.atomic import replacing
from xlsd_cache.runtime.own_files import MARK
from xlsd_train.config.model_options import MOST_PIXELS
from xlsd_train.data.captions import tokenize
from xlsd_train.model.bundle import ModelBundle

LINES = 40  # of a column's name in a grid
# Name on the command line -> A1111's name, diffusers' scheduler, its options.
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
    """Prompt and settings of one image; the same model gives the same pixels every time."""

    prompt: str
    negative: str
    seed: int
    steps: int
    guidance: float
    width: int
    height: int
    scheduler: str = "dpm++"

    def parameters(self, model: str | None = None, model_hash: str | None = None) -> str:
        """The text of a PNG's `parameters` chunk, in A1111's format."""
        settings = {
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
            for name, value in settings.items()
            if value is not None
        }
        lines = [self.prompt, ", ".join(f"{name}: {value}" for name, value in quoted.items())]
        if self.negative:
            lines.insert(1, f"Negative prompt: {self.negative}")
        return "\n".join(lines)


def pipeline_of(model: ModelBundle, scheduler: str = "dpm++") -> Any:
    """Diffusers' own pipeline with the model's current weights and one of SCHEDULERS."""
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


@torch.no_grad()
def draw_picture(
    model: ModelBundle, pipeline: Any, asked: Picture, told: Callable[[int], None] = lambda _: None
) -> Image.Image:
    """Generate one image, encoding prompts as training does; noise comes from its own CPU seed.

    `told` gets the number of each denoising step that is done.
    """

    def step_done(_: Any, index: int, *__: Any) -> dict[str, Any]:
        told(index + 1)
        return {}  # no tensor is replaced

    ids = tokenize(model.tokenizer, [asked.prompt, asked.negative], model.tokens)
    # One by one, so that no prompt's hidden states depend on the other's.
    states, negative = (model.encode(one[None].to(model.unet.device)) for one in ids)
    latents = pipeline(
        prompt_embeds=states,
        negative_prompt_embeds=negative,
        width=asked.width,
        height=asked.height,
        num_inference_steps=asked.steps,
        guidance_scale=asked.guidance,
        generator=torch.Generator().manual_seed(asked.seed),
        output_type="latent",
        callback_on_step_end=step_done,
    ).images
    decoded = model.vae.decode(model.scaling.to(latents.device).raw(latents))
    image: Image.Image = pipeline.image_processor.postprocess(decoded)[0]
    return image


def save_picture(
    image: Image.Image,
    path: Path,
    asked: Picture,
    model: str | None = None,
    model_hash: str | None = None,
    **more: Any,
) -> None:
    """Write a PNG with its settings as metadata: in A1111's format, and as JSON."""
    settings = {
        "prompt": asked.prompt,
        "negative": asked.negative,
        "seed": asked.seed,
        "steps": asked.steps,
        "guidance": asked.guidance,
        "scheduler": SCHEDULERS[asked.scheduler][0],
        **more,
    }
    info = PngInfo()
    info.add_text("parameters", asked.parameters(model, model_hash))
    info.add_text(MARK, json.dumps(settings, ensure_ascii=False))
    with replacing(path) as temporary:
        image.save(temporary, "PNG", pnginfo=info)


def make_grid(
    columns: Sequence[str], rows: Sequence[tuple[str, Sequence[Path]]], width: int, height: int
) -> Image.Image:
    """PNGs in cells of width x height pixels, below the columns' names and right of the rows'.

    A missing file leaves a gap.
    """
    points = max(14, min(width, height) // 22)
    font, gap, leading = ImageFont.load_default(points), points // 2, round(points * 1.3)
    names = [name for name, _ in rows]
    longest = max((font.getlength(name) for name in names), default=0)
    side = min(round(longest) + 1, max(width // 2, 8 * points))
    top = [wrapped(name, font, width - gap, LINES) for name in columns]
    left, above = side + 2 * gap, leading * max(map(len, top), default=0) + gap
    size = left + width * len(columns), above + height * len(rows)
    grid = Image.new("RGB", size, "white")
    canvas = ImageDraw.Draw(grid)

    def write(x: int, y: int, lines: list[str]) -> None:
        for i, line in enumerate(lines):
            canvas.text((x + gap, y + i * leading), line, "black", font)

    for column, lines in enumerate(top):
        write(left + column * width, 0, lines)
    for row, (name, paths) in enumerate(rows):
        lines = wrapped(name, font, side, height // leading)
        write(0, above + row * height + (height - leading * len(lines)) // 2, lines)
        for column, path in enumerate(paths):
            if image := _read_image(path):
                image.thumbnail((width, height))  # an earlier sample may be larger
                grid.paste(image, (left + column * width, above + row * height))
    return grid


def _read_image(path: Path) -> Image.Image | None:
    """A PNG of at most MOST_PIXELS a side; None if there is none."""
    try:
        with Image.open(path) as image:
            fits = image.format == "PNG" and max(image.size) <= MOST_PIXELS
            return image.convert("RGB") if fits else None
    except Exception:  # a damaged file may raise anything in Pillow
        return None
