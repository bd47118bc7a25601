"""One frozen dataclass for each command that is about models; their command lines are generated."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional

from xlsd_cache.console.option_checks import (
    Every,
    Factor,
    Folder,
    MayBeEmpty,
    Target,
    Within,
    check_options,
)
from xlsd_cache.errors import UserError
from xlsd_train.config.sd15 import HUB_ID

ExportFormat = Literal["diffusers", "single-file"]
ExportDtype = Literal["fp32", "fp16", "bf16"]


@dataclass(frozen=True)
class ExportConfig:
    """Write a model for other programs.

    As a folder of diffusers, or as one file with the names of SD1.5's own, which ComfyUI, A1111,
    Forge and diffusers' from_single_file load as an ordinary SD1.5: its VAE's scaling factor is
    folded into the weights. What was written is read back and compared before it has its name.
    """

    checkpoint: Positional[str]
    """A run (its newest checkpoint), a checkpoint, a pipeline folder, a single file or a hub id."""

    out: Positional[Annotated[Path, Target("folder or file")]]
    """The folder to make, or the .safetensors file."""

    format: ExportFormat = "diffusers"
    """diffusers: SD1.5's folders. single-file: one .safetensors under latent-diffusion's names."""

    dtype: ExportDtype = "fp32"
    """Of all weights."""

    scaling_factor: Factor | None = None
    """Fold the VAE to this factor. Default: 0.18215 for single-file; for diffusers its own."""

    vae: str | None = None
    """Put this VAE in, say with a decoder trained further; its encoder must be the model's."""

    model_ema: bool = False
    """Of a single file that holds both, take the UNet's moving averages."""

    tokenizer: str | None = None
    """A folder with vocab.json and merges.txt. Default: the model's; of a single file the hub's."""

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is loaded."""
        check_options(self)
        check_export_target(self.out, self.format)


@dataclass(frozen=True)
class SwapConfig:
    """Write SD1.5 with another VAE in it, untrained: where training with that VAE begins.

    A folder of diffusers, whose VAE's config says its own scaling factor.
    """

    out: Positional[Folder]
    """The folder to make."""

    model: str = HUB_ID
    """A hub id, pipeline folder, single file, checkpoint or run."""

    model_ema: bool = False
    """Of a single file that holds both, take the UNet's moving averages."""

    vae: str = "sdxl"
    """sdxl, sdxl-fp16-fix, sd, taesdxl, a hub id, a folder or a .safetensors file."""

    vae_scaling_factor: Factor | None = None
    """Of a --vae in a single file, which does not say it: 0.13025 for SDXL's, 0.18215 for SD's."""

    text_encoder: str | None = None
    """Take the text encoder from here: a hub id, a folder, say of LongCLIP, a file or a run."""

    tokenizer: str | None = None
    """A folder with vocab.json and merges.txt. Default: the model's; of a single file the hub's."""

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is loaded."""
        check_options(self)
        refuse_existing(self.out)


MOST_PIXELS = 4096  # of a side of a picture
Scheduler = Literal["dpm++", "dpm++-karras", "euler", "euler-a", "ddim", "unipc"]


@dataclass(frozen=True)
class SampleConfig:
    """Draw the same prompts from the same seeds with one model or several, and compare them.

    Writes a PNG for each picture, whose metadata say how it was made, OUT/grid.png (models down,
    prompts across) and OUT/index.html, one page that needs nothing else, with a slider between any
    two models. Each model draws with its own VAE.

    A line of --prompts may carry its own settings after the prompt, as in `a cat, solo --seed 5
    --steps 30 --guidance 4 --size 512x768 --negative blurry, text`: these five, in any order, each
    up to the next. kohya's --d --s --l --w --h --n mean the same.
    """

    models: Positional[tuple[str, ...]]
    """Runs, checkpoints, pipeline folders, single files or hub ids; NAME=... gives one a name."""

    prompts: Path
    """A text file of prompts, one a line; lines that begin with # are none."""

    out: Folder = Path("comparison")
    """The folder to make."""

    scheduler: Scheduler = "dpm++"
    """DPM++ 2M, the same with Karras' noise levels, Euler, Euler ancestral, DDIM, or UniPC."""

    steps: Annotated[int, Within(1, 1000)] = 20
    """Denoising steps a picture."""

    guidance: Annotated[float, Within(0, 1000)] = 7.5
    """Classifier-free guidance."""

    negative: Annotated[str, MayBeEmpty()] = ""
    """What pictures should not show."""

    size: str | None = None
    """Width and height in pixels, multiples of 8. Default: those of the run's own samples, of the
    first run that is named; 512x512 without one."""

    seed: Annotated[int, Within(0, 2**63 - 1)] = 0
    """Of the first prompt; each following one has the next."""

    tokenizer: str | None = None
    """A folder with vocab.json and merges.txt, for single files. Default: the hub's SD1.5's."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: the graphics card when there is one."""

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is loaded."""
        check_options(self)
        if self.size is not None:
            size_of(self.size, "--size")
        if not self.models:
            raise UserError("no model is named; give one or several, and --prompts FILE")
        refuse_existing(self.out)


@dataclass(frozen=True)
class ScoreConfig:
    """Score the pictures that `sample` drew: how well they fit their prompts, and real images.

    CLIP score: 2.5 max(cos, 0) of a picture and its prompt, the mean over pictures; higher fits
    better (torchmetrics' is 40 times it). CMMD, with --real: how far the pictures as a set are
    from real images; lower is nearer, 0 is none. Both with 95% intervals; models that have drawn
    the same prompts from the same seeds are compared picture by picture.

    CMMD wants hundreds of pictures of different prompts, and as many real images of the same kind.
    """

    folders: Positional[tuple[Path, ...]]
    """What `sample` made, a model's folder in it, or a run's samples; one or several."""

    real: Path | None = None
    """A folder of real images. Default: no CMMD."""

    clip: str = "openai/clip-vit-large-patch14-336"
    """Who judges: a hub id, or a folder with a CLIP. Only scores of the same CLIP compare."""

    most: Every = 10_000
    """Take so many of --real, drawn at random and always the same; 0: all."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: the graphics card when there is one."""

    json: bool = False
    """Print JSON."""

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is read."""
        check_options(self)
        if not self.folders:
            raise UserError("no folder of pictures is named; give what `xlsd-train sample` made")


def size_of(text: str, where: str) -> tuple[int, int]:
    """(width, height) of 512x768. Raises UserError for what no picture can be."""
    match = re.fullmatch(r"(\d{1,6})x(\d{1,6})", text)
    width, height = (int(match[1]), int(match[2])) if match else (0, 0)
    if not all(side % 8 == 0 and 0 < side <= MOST_PIXELS for side in (width, height)):
        raise UserError(
            f"{where}: {text!r} is no size in multiples of 8, up to {MOST_PIXELS}; give say 512x768"
        )
    return width, height


def check_export_target(out: Path, export_format: ExportFormat) -> None:
    """Raises UserError for a name that does not fit the format, or that is taken."""
    single = export_format == "single-file"
    if single and out.suffix != ".safetensors":
        raise UserError(
            f"{out} does not end in .safetensors, as single files do; rename it, or leave out "
            f"--format single-file"
        )
    if not single and out.suffix == ".safetensors":
        raise UserError(
            f"{out} is a file's name, and --format diffusers writes a folder; use --format "
            f"single-file, or give a folder"
        )
    refuse_existing(out)
    if single:
        for ending in (".md", ".samples.png"):  # the model card, and the run's samples
            refuse_existing(out.with_name(out.stem + ending))


def refuse_existing(out: Path) -> None:
    """Raises UserError where something that is not an empty folder has this name already."""
    there = out.exists() or out.is_symlink()
    if there and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists already and is not overwritten; remove it or name another")
