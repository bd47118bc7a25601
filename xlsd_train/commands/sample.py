"""`xlsd-train sample`: the same prompts and seeds drawn by several models, side by side."""

import gc
import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from xlsd_cache.console.progress import progress_bar
from xlsd_cache.errors import UserError
from xlsd_cache.runtime.atomic import replacing, write_bytes
from xlsd_cache.runtime.device import device_of, set_precision
from xlsd_cache.runtime.gpu_memory import is_full
from xlsd_cache.runtime.own_files import marking
from xlsd_train.commands.sample_page import page
from xlsd_train.config.model_options import SampleConfig, size_of
from xlsd_train.evaluation.images import Picture, draw_picture, pipeline_of, save_picture, sheet
from xlsd_train.evaluation.prompts import read_pictures, remarks
from xlsd_train.evaluation.sample_files import own_size
from xlsd_train.export.conversions import fold_vae, vae_in
from xlsd_train.model.loading import assemble, model_vae
from xlsd_train.runs.layout import GRID
from xlsd_train.weights.lazy_tensors import sha256_of
from xlsd_train.weights.locate import ModelParts, locate_model

log = logging.getLogger("xlsd.train.commands")

SHOWN = 60  # prompts in grid and page, which some hundreds, as `score` wants, would make gigabytes
# Of a model's scheduler what belongs to the model. Where steps fall and how they are taken is the
# same for all models compared, whatever their files say.
NOISE = (
    "num_train_timesteps beta_start beta_end beta_schedule trained_betas prediction_type "
    "rescale_betas_zero_snr steps_offset set_alpha_to_one use_flow_sigmas flow_shift"
).split()


def compare(config: SampleConfig) -> Path:
    """Draw everything, one model in memory at a time; returns OUT/index.html.

    Raises UserError before the first picture where a prompt or a model cannot be drawn.
    """
    device = device_of(config.device)
    log.info(set_precision("fp32"))
    names = _names(config.models)
    asked = read_pictures(config.prompts, "--prompts", _default(config, names))
    models = [
        locate_model(source, tokenizer=_tokenizer(source, config)) for source in names.values()
    ]
    for parts in models:
        vae_in(parts)
    config.out.mkdir(parents=True, exist_ok=True)
    files, said = [], set[str]()
    with progress_bar(total=len(models) * len(asked), unit="image") as bar:
        for number, (name, parts) in enumerate(zip(names, models, strict=True)):
            folder = config.out / f"{number}-{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}"
            folder.mkdir()
            files.append(_draw(name, parts, asked, folder, device, config.scheduler, bar, said))
    shown, files = asked[:SHOWN], [row[:SHOWN] for row in files]
    with replacing(config.out / GRID) as temporary:
        _grid(list(names), shown, files).save(temporary, "PNG", **marking("grid"))
    html = config.out / "index.html"
    write_bytes(html, page(list(names), shown, files).encode())
    log.info(f"pictures and grid {config.out / 'grid.png'}; to compare any two: {html}")
    if len(asked) > SHOWN:
        log.info(f"grid and page show the first {SHOWN} of {len(asked)} prompts")
    return html


def _draw(
    name: str,
    parts: ModelParts,
    asked: list[Picture],
    folder: Path,
    device: torch.device,
    scheduler: str,
    bar: Any,
    said: set[str],
) -> list[Path]:
    """One model's pictures."""
    # Diffusers' pipeline knows one factor: whatever else a VAE's latents need is folded into it.
    vae, _ = fold_vae(vae_in(parts), trained=parts.trained)
    noise = {name: parts.scheduler[name] for name in NOISE if name in parts.scheduler}
    if noise.get("rescale_betas_zero_snr"):
        noise["timestep_spacing"] = "trailing"  # the last timestep, all noise, must be among them
    whole = replace(parts, scheduler={**noise, "clip_sample": False}, checkpoint=None)
    model = assemble(whole, model_vae(parts.source, vae, parts.vae_padding))
    model.text_encoder.requires_grad_(False)
    pipeline = pipeline_of(model, scheduler).to(device)
    lines = dict.fromkeys(remarks(asked, model.tokenizer, model.tokens))
    for line in lines.keys() - said:
        log.info(line)
    said |= lines.keys()
    source = Path(parts.source)
    model_hash = sha256_of(source)[:10] if source.is_file() else None  # as A1111 writes it
    digits = max(2, len(str(len(asked) - 1)))
    paths = []
    for i, picture in enumerate(asked):
        path = folder / f"{i:0{digits}d}.png"
        try:
            image = draw_picture(model, pipeline, picture)
        except RuntimeError as error:
            if not is_full(error):
                raise
            raise UserError(
                f"a picture of {picture.width}x{picture.height} needs more memory than the card "
                f"has; give a smaller --size, or --device cpu"
            ) from error
        save_picture(image, path, picture, name, model_hash, source=_last(parts))
        paths.append(path)
        bar.update()
    del pipeline, model
    gc.collect()  # before the next one is loaded
    return paths


def _default(config: SampleConfig, names: dict[str, str]) -> Picture:
    """What is drawn where a prompt's line does not say otherwise."""
    sizes = {name: size for name, source in names.items() if (size := own_size(source))}
    run, size = next(iter(sizes.items()), ("", "512x512"))
    if config.size is None and sizes:
        others = [f"{name}'s are {own}" for name, own in sizes.items() if own != size]
        told = f"pictures of {size}, as the samples of {run} are"
        log.info("; ".join([told, *others, "--size chooses"]))
    width, height = size_of(config.size or size, "--size")
    return Picture(
        "", config.negative, config.seed, config.steps, config.guidance, width, height,
        config.scheduler,
    )  # fmt: skip


def _grid(models: list[str], asked: list[Picture], files: list[list[Path]]) -> Image.Image:
    """Models down, prompts across, each cell as large as the largest picture."""
    rows = [
        [(f"{model}: {picture.prompt}", path) for picture, path in zip(asked, row, strict=True)]
        for model, row in zip(models, files, strict=True)
    ]
    return sheet(rows, max(x.width for x in asked), max(x.height for x in asked))


def _names(models: tuple[str, ...]) -> dict[str, str]:
    """A name for each model, given as NAME=MODEL or the last part of where it lies -> the model."""
    names: dict[str, str] = {}
    for given in models:
        name, _, source = given.rpartition("=")
        named = bool(name) and not Path(given).exists()
        name, source = (name, source) if named else (Path(given).name or given, given)
        while name in names:
            name += "'"
        names[name] = source
    return names


def _tokenizer(source: str, config: SampleConfig) -> str | None:
    return config.tokenizer if Path(source).is_file() else None


def _last(parts: ModelParts) -> str:
    return Path(parts.source).name + (f"/{parts.checkpoint.name}" if parts.checkpoint else "")
