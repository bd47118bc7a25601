"""`xlsd-train sample`: images of several models from the same prompts and seeds, side by side."""

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
from xlsd_train.config.model_options import SampleConfig, size_of
from xlsd_train.evaluation.images import Picture, draw_picture, make_grid, pipeline_of, save_picture
from xlsd_train.evaluation.prompts import read_pictures, remarks
from xlsd_train.evaluation.sample_files import own_size
from xlsd_train.export.conversions import fold_vae, vae_in
from xlsd_train.model.loading import assemble, model_vae
from xlsd_train.report.comparison import comparison
from xlsd_train.runs.layout import GRID
from xlsd_train.weights.lazy_tensors import sha256_of
from xlsd_train.weights.locate import locate_model
from xlsd_train.weights.parts import ModelParts

log = logging.getLogger("xlsd.train.commands")

SHOWN = 60  # prompts in grid and page: hundreds, as `score` needs, would make gigabytes
# The scheduler's settings that belong to the model. Step spacing and solver are the same for all
# models compared, whatever their configs say.
NOISE = (
    "num_train_timesteps beta_start beta_end beta_schedule trained_betas prediction_type "
    "rescale_betas_zero_snr steps_offset set_alpha_to_one use_flow_sigmas flow_shift"
).split()


def compare(config: SampleConfig) -> Path:
    """Generate all images, one model in memory at a time; return OUT/index.html.

    Raises UserError before the first image for a bad prompt or model.
    """
    device = device_of(config.device)
    log.info(set_precision("fp32"))
    names = _names(config.models)
    pictures = read_pictures(config.prompts, "--prompts", _default(config, names))
    models = [
        locate_model(source, tokenizer=_tokenizer(source, config)) for source in names.values()
    ]
    for parts in models:
        vae_in(parts)
    config.out.mkdir(parents=True, exist_ok=True)
    files, logged = [], set[str]()
    with progress_bar(total=len(models) * len(pictures), unit="image") as bar:
        for number, (name, parts) in enumerate(zip(names, models, strict=True)):
            folder = config.out / f"{number}-{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}"
            folder.mkdir()
            files.append(
                _generate(name, parts, pictures, folder, device, config.scheduler, bar, logged)
            )
    shown, files = pictures[:SHOWN], [row[:SHOWN] for row in files]
    with replacing(config.out / GRID) as temporary:
        _grid(list(names), shown, files).save(temporary, "PNG", **marking("grid"))
    html = config.out / "index.html"
    write_bytes(html, comparison(list(names), shown, files).encode())
    log.info(f"grid: {config.out / 'grid.png'}; any two models compared: {html}")
    if len(pictures) > SHOWN:
        log.info(f"grid and page show the first {SHOWN} of {len(pictures)} prompts")
    return html


def _generate(
    name: str,
    parts: ModelParts,
    pictures: list[Picture],
    folder: Path,
    device: torch.device,
    scheduler: str,
    bar: Any,
    logged: set[str],
) -> list[Path]:
    """Write one model's images; return their paths. `logged` has the remarks logged so far."""
    # Diffusers' pipeline knows only a scaling factor: other latent scaling is folded into the VAE.
    vae, _ = fold_vae(vae_in(parts), trained=parts.trained)
    noise = {name: parts.scheduler[name] for name in NOISE if name in parts.scheduler}
    if noise.get("rescale_betas_zero_snr"):
        noise["timestep_spacing"] = "trailing"  # must include the last timestep, pure noise
    whole = replace(parts, scheduler={**noise, "clip_sample": False}, checkpoint=None)
    model = assemble(whole, model_vae(parts.source, vae, parts.vae_padding))
    model.text_encoder.requires_grad_(False)
    pipeline = pipeline_of(model, scheduler).to(device)
    lines = dict.fromkeys(remarks(pictures, model.tokenizer, model.tokens))
    for line in lines.keys() - logged:
        log.info(line)
    logged |= lines.keys()
    source = Path(parts.source)
    model_hash = sha256_of(source)[:10] if source.is_file() else None  # as A1111 writes it
    digits = max(2, len(str(len(pictures) - 1)))
    paths = []
    for i, picture in enumerate(pictures):
        path = folder / f"{i:0{digits}d}.png"
        try:
            image = draw_picture(model, pipeline, picture)
        except RuntimeError as error:
            if not is_full(error):
                raise
            raise UserError(
                f"an image of {picture.width}x{picture.height} needs more memory than the GPU has; "
                f"give a smaller --size, or --device cpu"
            ) from error
        save_picture(image, path, picture, name, model_hash, source=_source_name(parts))
        paths.append(path)
        bar.update()
    del pipeline, model
    gc.collect()  # before the next model is loaded
    return paths


def _default(config: SampleConfig, names: dict[str, str]) -> Picture:
    """The settings of a prompt whose line has none."""
    sizes = {name: size for name, source in names.items() if (size := own_size(source))}
    run, size = next(iter(sizes.items()), ("", "512x512"))
    if config.size is None and sizes:
        others = [f"{name} has {own}" for name, own in sizes.items() if own != size]
        sentence = ", ".join([f"images of {size}, as the samples of {run}", *others])
        log.info(f"{sentence}; change it with --size")
    width, height = size_of(config.size or size, "--size")
    return Picture(
        "", config.negative, config.seed, config.steps, config.guidance, width, height,
        config.scheduler,
    )  # fmt: skip


def _grid(models: list[str], pictures: list[Picture], files: list[list[Path]]) -> Image.Image:
    """Models down, prompts across, each cell as large as the largest image."""
    prompts, rows = [picture.prompt for picture in pictures], zip(models, files, strict=True)
    return make_grid(
        prompts, list(rows), max(x.width for x in pictures), max(x.height for x in pictures)
    )


def _names(models: tuple[str, ...]) -> dict[str, str]:
    """Name -> model, for models given as NAME=MODEL, or as MODEL, named by its last path part."""
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


def _source_name(parts: ModelParts) -> str:
    return Path(parts.source).name + (f"/{parts.checkpoint.name}" if parts.checkpoint else "")
