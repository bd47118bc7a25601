"""A picture: what is drawn, diffusers' own pipeline that draws it, and what its file says of it."""

import json
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
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from xlsd_cache.runtime.atomic import replacing
from xlsd_cache.runtime.own_files import MARK
from xlsd_train.config.model_options import MOST_PIXELS
from xlsd_train.data.captions import tokenize
from xlsd_train.model.bundle import ModelBundle

LABEL_HEIGHT = 16
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


def pipeline_of(model: ModelBundle, scheduler: str = "dpm++") -> Any:
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


@torch.no_grad()
def draw_picture(model: ModelBundle, pipeline: Any, asked: Picture) -> Image.Image:
    """Draw it, of the same states as in training; all noise is drawn on the CPU, for it alone."""
    ids = tokenize(model.tokenizer, [asked.prompt, asked.negative], model.tokens)
    # Each by itself, so that no prompt's states depend on another's.
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
    ).images
    decoded = model.vae.decode(model.scaling.to(latents.device).raw(latents))
    drawn: Image.Image = pipeline.image_processor.postprocess(decoded)[0]
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
    info.add_text(MARK, json.dumps(told, ensure_ascii=False))
    with replacing(path) as temporary:
        image.save(temporary, "PNG", pnginfo=info)


def sheet(rows: list[list[tuple[str, Path]]], width: int, height: int) -> Image.Image:
    """Rows of (label, PNG), each at most width x height pixels; a file not there leaves a gap."""
    height += LABEL_HEIGHT
    made = Image.new("RGB", (width * max(map(len, rows)), height * len(rows)), "white")
    write = ImageDraw.Draw(made)
    for down, cells in enumerate(rows):
        for across, (label, path) in enumerate(cells):
            x, y = across * width, down * height
            known = label[: width // 6].encode("latin-1", "replace").decode("latin-1")
            write.text((x + 2, y + 2), known, fill="black")  # in Pillow's own font
            if drawn := _drawn(path):
                drawn.thumbnail((width, height - LABEL_HEIGHT))  # one of an earlier, larger size
                made.paste(drawn, (x, y + LABEL_HEIGHT))
    return made


def _drawn(path: Path) -> Image.Image | None:
    """A picture of ours; None where there is none, or one larger than any that is drawn here."""
    try:
        with Image.open(path) as image:
            fits = image.format == "PNG" and max(image.size) <= MOST_PIXELS
            return image.convert("RGB") if fits else None
    except Exception:  # whatever a file that is none has Pillow stumble over
        return None
