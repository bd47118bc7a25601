"""Options of the commands about models: one frozen dataclass per command."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional

from xlsd_cache.console.option_checks import (
    CheckedOptions,
    Every,
    Factor,
    Folder,
    MayBeEmpty,
    Target,
    Within,
)
from xlsd_cache.errors import UserError
from xlsd_train.config.sd15 import HUB_ID

ExportFormat = Literal["diffusers", "single-file"]
ExportDtype = Literal["fp32", "fp16", "bf16"]


@dataclass(frozen=True)
class ExportConfig(CheckedOptions):
    """Write a model for other programs.

    Either a diffusers folder, or a single file with SD1.5's original keys, which ComfyUI, A1111,
    Forge and diffusers' from_single_file load as an ordinary SD1.5: the VAE's scaling factor is
    folded into its weights. The result is read back and compared before it gets its name.
    """

    checkpoint: Positional[str]
    """A run (its newest checkpoint), a checkpoint, a pipeline folder, a single file or a hub id."""

    out: Positional[Annotated[Path, Target("folder or file")]]
    """The folder to create, or the .safetensors file."""

    format: ExportFormat = "diffusers"
    """diffusers: a folder. single-file: one .safetensors file with latent-diffusion's keys."""

    dtype: ExportDtype = "fp32"
    """Data type of all weights."""

    scaling_factor: Factor | None = None
    """Fold the VAE to this scaling factor. Default: 0.18215 for single-file, else its own."""

    vae: str | None = None
    """Use this VAE, e.g. with a fine-tuned decoder; its encoder must be the model's. Default: the
    model's own."""

    model_ema: bool = False
    """Load the moving averages of a single file that holds both."""

    tokenizer: str | None = None
    """Folder with vocab.json and merges.txt. Default: the model's; for a single file the hub's."""

    def check(self) -> None:
        """Refuse what cannot work before anything is loaded."""
        check_export_target(self.out, self.format)


@dataclass(frozen=True)
class SwapConfig(CheckedOptions):
    """Write SD1.5 with another VAE, untrained: the starting point for training with that VAE.

    The result is a diffusers folder whose VAE config holds the VAE's own scaling factor.
    """

    out: Positional[Folder]
    """The folder to create."""

    model: str = HUB_ID
    """A hub id, pipeline folder, single file, checkpoint or run."""

    model_ema: bool = False
    """Load the moving averages of a single file that holds both."""

    vae: str = "sdxl"
    """sdxl, sdxl-fp16-fix, sd, taesdxl, a hub id, a folder or a .safetensors file."""

    vae_scaling_factor: Factor | None = None
    """Scaling factor of a --vae in a single file: 0.13025 for SDXL's, 0.18215 for SD's."""

    text_encoder: str | None = None
    """Load the text encoder from this hub id, folder (e.g. of LongCLIP), file or run. Default:
    --model."""

    tokenizer: str | None = None
    """Folder with vocab.json and merges.txt. Default: the model's; for a single file the hub's."""

    def check(self) -> None:
        """Refuse what cannot work before anything is loaded."""
        refuse_existing(self.out)


MOST_PIXELS = 4096  # per side of an image
Scheduler = Literal["dpm++", "dpm++-karras", "euler", "euler-a", "ddim", "unipc"]


@dataclass(frozen=True)
class SampleConfig(CheckedOptions):
    """Sample the same prompts with the same seeds from one model or several, and compare them.

    Writes a PNG per image with its settings in the metadata, OUT/grid.png (models down, prompts
    across), and OUT/index.html, a self-contained page with a slider between any two models. Each
    model uses its own VAE.

    A line of --prompts may have its own settings after the prompt, e.g. `a cat, solo --seed 5
    --steps 30 --guidance 4 --size 512x768 --negative blurry, text`, in any order. kohya's --d --s
    --l --w --h --n are understood too.
    """

    models: Positional[tuple[str, ...]]
    """Runs, checkpoints, pipeline folders, single files or hub ids; NAME=MODEL names one."""

    prompts: Path
    """Text file with one prompt per line; lines that start with # are comments."""

    out: Folder = Path("comparison")
    """The folder to create."""

    scheduler: Scheduler = "dpm++"
    """DPM++ 2M, the same with Karras' noise schedule, Euler, Euler ancestral, DDIM, or UniPC."""

    steps: Annotated[int, Within(1, 1000)] = 20
    """Denoising steps per image."""

    guidance: Annotated[float, Within(0, 1000)] = 7.5
    """Classifier-free guidance scale."""

    negative: Annotated[str, MayBeEmpty()] = ""
    """Negative prompt."""

    size: str | None = None
    """Width and height in pixels, multiples of 8. Default: that of the first run's own samples, or
    512x512 without a run."""

    seed: Annotated[int, Within(0, 2**63 - 1)] = 0
    """Seed of the first prompt; each following prompt has the next."""

    tokenizer: str | None = None
    """Folder with vocab.json and merges.txt, for single files. Default: that of SD1.5, from the
    hub."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: the GPU if there is one."""

    def check(self) -> None:
        """Refuse what cannot work before anything is loaded."""
        if self.size is not None:
            size_of(self.size, "--size")
        if not self.models:
            raise UserError("no model is given; give one or several, and --prompts FILE")
        refuse_existing(self.out)


@dataclass(frozen=True)
class ScoreConfig(CheckedOptions):
    """Score the images of `sample`: how well they fit their prompts, and real images.

    CLIP score: 2.5 max(cos, 0) of an image and its prompt, averaged over images; higher is better
    (torchmetrics' is 40 times this). CMMD, with --real: the distance of all images, as a set, from
    real images; lower is better. Both have 95% intervals. Models with the same prompts and seeds
    are compared image by image.

    CMMD needs hundreds of images of different prompts, and as many real images of the same kind.
    """

    folders: Positional[tuple[Path, ...]]
    """Output folders of `sample`, folders of one model in them, or samples of runs."""

    real: Path | None = None
    """Folder of real images. Default: no CMMD."""

    clip: str = "openai/clip-vit-large-patch14-336"
    """Hub id or folder of the CLIP. Only scores of the same CLIP are comparable."""

    most: Every = 10_000
    """Use at most this many images of --real, a fixed random subset. 0: all."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: the GPU if there is one."""

    json: bool = False
    """Print JSON."""

    def check(self) -> None:
        """Refuse what cannot work before anything is read."""
        if not self.folders:
            raise UserError(
                "no folder of images is given; give the output folder of `xlsd-train sample`"
            )


def size_of(text: str, where: str) -> tuple[int, int]:
    """(width, height) of 512x768. Raises UserError for a size that no image can have."""
    match = re.fullmatch(r"(\d{1,6})x(\d{1,6})", text)
    width, height = (int(match[1]), int(match[2])) if match else (0, 0)
    if not all(side % 8 == 0 and 0 < side <= MOST_PIXELS for side in (width, height)):
        raise UserError(
            f"{where}: {text!r} is not WIDTHxHEIGHT in multiples of 8, up to {MOST_PIXELS}; give "
            f"e.g. 512x768"
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
    """Raises UserError for a path that exists, unless it is an empty folder."""
    exists = out.exists() or out.is_symlink()
    if exists and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists already and is not overwritten; remove it or use another")
