"""Export a model for other programs: written tensor by tensor, then read back and compared."""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError

from xlsd_cache.errors import UserError
from xlsd_cache.runtime.atomic import fsync_file, replacing_folder, write_bytes, write_json
from xlsd_train.config import sd15
from xlsd_train.config.model_options import ExportDtype, ExportFormat, check_export_target
from xlsd_train.export.conversions import bake_clip_skip, fold_vae, vae_in, with_decoder
from xlsd_train.export.ldm_config import ldm_config
from xlsd_train.export.ldm_file import single_file
from xlsd_train.export.model_card import ModelCard
from xlsd_train.export.other_programs import usage_notes, vae_notes
from xlsd_train.export.sidecars import missing_config, withdrawing, write_sidecars
from xlsd_train.model.text_encoder import copy_tokenizer
from xlsd_train.runs.history import checkpoint_history
from xlsd_train.runs.json_files import load_object
from xlsd_train.weights.lazy_tensors import LazyTensor, compare_tensors, sha256_of, write_tensors
from xlsd_train.weights.locate import fetch_missing, locate_model
from xlsd_train.weights.network import POSITIONS, Network, empty_network, with_finite_check
from xlsd_train.weights.parts import CONFIGS, ModelParts
from xlsd_train.weights.vae_fold import SD15_FACTOR

log = logging.getLogger("xlsd.train.export")

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
WEIGHTS = "diffusion_pytorch_model.safetensors"
MOST_GRID = 2**28  # bytes
FILES = {"unet": WEIGHTS, "vae": WEIGHTS, "text_encoder": "model.safetensors"}


def export_model(
    checkpoint: str | Path,
    out: str | Path,
    *,
    format: ExportFormat = "diffusers",  # noqa: A002 - the option's name
    dtype: ExportDtype = "fp32",
    scaling_factor: float | None = None,
    vae: str | Path | None = None,
    model_ema: bool = False,
    tokenizer: str | Path | None = None,
) -> Path:
    """Write a model for other programs, read it back and compare; logs each file's sha256.

    Args:
        checkpoint: a run (its newest checkpoint), a checkpoint, a pipeline folder, a single file or
            a hub id.
        out: the folder to make, or the .safetensors file; nothing is overwritten.
        format: `diffusers` for a pipeline folder, `single-file` for a .safetensors file with
            latent-diffusion's keys and a model card next to it.
        dtype: of all weights: fp32, fp16 or bf16.
        scaling_factor: fold the VAE's latent scaling so that this factor is right; by default
            0.18215 in a single file, and the VAE's own in a folder.
        vae: replaces the VAE; its encoder must be the model's, its decoder may be another.
        model_ema: take the UNet's moving averages from a single file that has both.
        tokenizer: replaces the tokenizer: a folder with vocab.json and merges.txt.

    Returns:
        `out`. It appears complete, or not at all.

    Raises:
        UserError: there is no such model, it is damaged, it does not fit the format or dtype, or
            the disk is full.

    """
    out = Path(out)
    if scaling_factor is not None and not 0 < scaling_factor < float("inf"):
        raise UserError(f"--scaling-factor {scaling_factor} is not a number above 0")
    known_of = {"format": (format, get_args(ExportFormat)), "dtype": (dtype, DTYPES)}
    for name, (value, known) in known_of.items():
        if value not in known:
            raise UserError(f"--{name} {value!r} is unknown; give {' or '.join(known)}")
    check_export_target(out, format)
    single = format == "single-file"
    given = None if tokenizer is None else str(tokenizer)
    parts = locate_model(str(checkpoint), tokenizer=given, ema=model_ema)
    if vae is not None:
        parts = with_decoder(parts, str(vae))
    return write_model(fetch_missing(parts, not single), out, single, dtype, scaling_factor)


def write_model(
    parts: ModelParts, out: Path, single: bool, dtype: str = "fp32", factor: float | None = None
) -> Path:
    """Write a whole model, as a single file or a diffusers folder, durably or not at all."""
    factor = SD15_FACTOR if single and factor is None else factor
    parts, folded, usage, notes = _prepare(parts, out.name, single, factor)
    history = checkpoint_history(parts.checkpoint)
    title = out.stem if single else out.name
    card = ModelCard(title, parts.source, folded, history)
    metadata = card.metadata(parts.scheduler)
    config = missing_config(out, _ldm_config(parts, out.name)) if single else None
    grid = f"{title}.samples.png" if single else "samples.png"
    write = _write_file if single else _write_folder
    written: list[Path] = []
    with (
        _as_user_error(parts.source, out, dtype),
        withdrawing(written),
        replacing_folder(out) as tmp,
    ):
        hashes = write(parts, tmp, out, DTYPES[dtype], metadata)
        text = card.markdown(dtype, hashes, grid if history.grid else None, usage, notes)
        sidecars = {f"{title}.md" if single else "README.md": text.encode()}
        if history.grid is not None:
            sidecars[grid] = _grid(history.grid)
        if config is not None:
            sidecars[f"{title}.yaml"] = config.encode()
        write_sidecars(out.parent if single else tmp, sidecars, written)
    log.info(folded)
    for file, digest in hashes.items():
        path = out if single else out / file
        log.info(f"{path}: {path.stat().st_size / 1e6:.1f} MB, {dtype}, sha256 {digest}")
    if usage:
        log.info(usage)
    return out


def _prepare(
    parts: ModelParts, name: str, single: bool, factor: float | None
) -> tuple[ModelParts, str, str, list[str]]:
    """The parts to write, and for the card: what was folded, how to use it, notes on the VAE."""
    parts = _with_finite_check(parts)
    own = float(empty_network("vae", vae_in(parts).config).config["scaling_factor"])
    vae, folded = fold_vae(vae_in(parts), factor, parts.trained)
    parts = replace(parts, vae=vae)
    if parts.clip_skip:
        parts = bake_clip_skip(parts)
        folded += (
            f" The text encoder's last layers, {parts.clip_skip} by --clip-skip, hand on what they "
            f"get: leave programs' own clip skip off."
        )
    if parts.vae_padding == "reflect":
        folded += (
            " Its convolutions pad by reflection, which no model file can say: set padding_mode to "
            "reflect in the program that decodes, or pictures have artefacts at their edges."
        )
    assert parts.text_encoder is not None
    tokens = parts.text_encoder.tensors[POSITIONS].shape[0]
    usage = usage_notes(name, parts.scheduler, tokens, single, parts.vae_padding == "reflect")
    return parts, folded, usage, vae_notes(own, factor or own, single)


@contextmanager
def _as_user_error(source: str, out: Path, dtype: str) -> Iterator[None]:
    """Raise what can go wrong in writing as UserError."""
    try:
        yield
    except OverflowError as error:
        remedy = "use --dtype bf16 or fp32" if dtype == "fp16" else "give another model"
        raise UserError(
            f"{source} has weights that {dtype} cannot hold: {error}; {remedy}"
        ) from error
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot export {source} to {out}: {error}; nothing was written: solve this and export "
            f"again"
        ) from error


def _ldm_config(parts: ModelParts, name: str) -> str | None:
    assert parts.text_encoder is not None
    return ldm_config(parts.unet, parts.text_encoder, vae_in(parts), parts.scheduler, name)


def _with_finite_check(parts: ModelParts) -> ModelParts:
    """The same parts, whose weights raise UserError on reading if they are not finite."""
    assert parts.text_encoder is not None
    encoder, vae = with_finite_check(parts.text_encoder), with_finite_check(vae_in(parts))
    return replace(parts, unet=with_finite_check(parts.unet), text_encoder=encoder, vae=vae)


def _grid(path: Path) -> bytes:
    """A run's sample grid. Raises UserError for a file that is too large."""
    if path.stat().st_size > MOST_GRID:
        raise UserError(f"{path} is larger than a sample grid's {MOST_GRID} bytes; remove it")
    return path.read_bytes()


def _write_file(
    parts: ModelParts, temporary: Path, out: Path, dtype: torch.dtype, metadata: dict[str, str]
) -> dict[str, str]:
    assert parts.text_encoder is not None
    assert parts.vae is not None
    tensors = single_file(parts.unet, parts.text_encoder, parts.vae, parts.scheduler, dtype)
    networks = (parts.unet, parts.text_encoder, parts.vae)
    configs: dict[str, Any] = {network.kind: _config(network) for network in networks}
    text = json.dumps({**configs, "scheduler": parts.scheduler})
    metadata = {**metadata, "modelspec.implementation": "sgm", CONFIGS: text}
    return {out.name: _write_weights(temporary, tensors, metadata)}


def _write_folder(
    parts: ModelParts, temporary: Path, _: Path, dtype: torch.dtype, metadata: dict[str, str]
) -> dict[str, str]:
    metadata, hashes = {**metadata, "modelspec.implementation": "diffusers"}, {}
    temporary.mkdir(parents=True)
    for network in (parts.unet, parts.text_encoder, parts.vae):
        assert network is not None
        kind, config = network.kind, _config(network)
        (temporary / kind).mkdir()
        if kind == "text_encoder":
            config = {k: v for k, v in config.items() if k != "dtype"}
            config["torch_dtype"] = str(dtype).removeprefix("torch.")
        write_json(temporary / kind / "config.json", config)
        tensors = {
            name: tensor.to(dtype, f"{kind}'s {name}") for name, tensor in network.tensors.items()
        }
        file = f"{kind}/{FILES[kind]}"
        hashes[file] = _write_weights(temporary / file, tensors, metadata)
    assert parts.tokenizer is not None
    assert parts.text_encoder is not None
    tokens = parts.text_encoder.tensors[POSITIONS].shape[0]
    _write_tokenizer(parts.tokenizer, temporary / "tokenizer", tokens)
    (temporary / "scheduler").mkdir()
    write_json(temporary / "scheduler" / "scheduler_config.json", parts.scheduler)
    index = {**sd15.INDEX, "_diffusers_version": version("diffusers")}
    index["scheduler"] = ["diffusers", parts.scheduler.get("_class_name", "PNDMScheduler")]
    assert parts.vae is not None
    index["vae"] = ["diffusers", parts.vae.config.get("_class_name", "AutoencoderKL")]
    write_json(temporary / "model_index.json", index)
    return hashes


def _config(network: Network) -> dict[str, Any]:
    """A network's config without a local path that a library may have put there."""
    return {name: value for name, value in network.config.items() if name != "_name_or_path"}


def _write_weights(path: Path, tensors: Mapping[str, LazyTensor], metadata: dict[str, str]) -> str:
    """Write, sync, read back and compare; returns the file's sha256."""
    write_tensors(path, tensors, metadata)
    fsync_file(path)
    compare_tensors(path, tensors)
    return sha256_of(path)


def _write_tokenizer(source: Path, target: Path, tokens: int) -> None:
    """Write vocab.json and merges.txt, which every program reads, and the tokenizer's other files.

    Recent transformers may only write tokenizer.json, which contains both.
    """
    copy_tokenizer(source, target, tokens)
    if not (target / "vocab.json").exists() or not (target / "merges.txt").exists():
        try:
            model: dict[str, Any] = load_object(source / "tokenizer.json")["model"]
            pairs = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]
            vocabulary = json.dumps(model["vocab"], ensure_ascii=False)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"the tokenizer in {source} has neither vocab.json and merges.txt nor a BPE "
                f"tokenizer.json ({error}); give a whole model"
            ) from error
        write_bytes(target / "vocab.json", vocabulary.encode())
        write_bytes(target / "merges.txt", "\n".join(["#version: 0.2", *pairs, ""]).encode())
