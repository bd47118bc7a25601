"""`xlsd-train export`: a model for other programs, written a tensor at a time and read back."""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from xlsd_cache.encoding.vae import Vae, load_vae
from xlsd_cache.errors import UserError
from xlsd_cache.runtime.atomic import fsync_file, write_bytes, write_json
from xlsd_train.config import sd15
from xlsd_train.config.model_options import ExportConfig
from xlsd_train.export.ldm_config import ldm_config
from xlsd_train.export.model_card import History
from xlsd_train.export.other_programs import usage_notes, vae_notes
from xlsd_train.export.staging import appearing, missing_config, withdrawing, write_beside
from xlsd_train.model.loading import model_vae
from xlsd_train.model.text_encoder import copy_tokenizer
from xlsd_train.runs.json_files import load_object
from xlsd_train.weights.lazy_tensors import (
    LazyTensor,
    compare_tensors,
    in_memory,
    sha256_of,
    write_tensors,
)
from xlsd_train.weights.ldm_file import single_file
from xlsd_train.weights.locate import CONFIGS, ModelParts, fetch_missing, locate_model
from xlsd_train.weights.network import POSITIONS, PREFIX, Network, empty_network, with_finite_check
from xlsd_train.weights.vae_fold import SD15_FACTOR, ChannelNormalisation, fold

log = logging.getLogger("xlsd.train.export")

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
WEIGHTS = "diffusion_pytorch_model.safetensors"
MOST_GRID = 2**28  # bytes
FILES = {"unet": WEIGHTS, "vae": WEIGHTS, "text_encoder": "model.safetensors"}


def export_model(config: ExportConfig) -> Path:
    """Write the model and its card; prints each file's sha256. Returns `config.out`.

    Raises UserError for a model that is damaged, or that cannot be had in this form.
    """
    single = config.format == "single-file"
    found = locate_model(config.checkpoint, tokenizer=config.tokenizer, ema=config.model_ema)
    if config.vae is not None:
        found = with_decoder(found, config.vae)
    parts = fetch_missing(found, not single)
    return write_model(parts, config.out, single, config.dtype, config.scaling_factor)


def write_model(
    parts: ModelParts, out: Path, single: bool, dtype: str = "fp32", factor: float | None = None
) -> Path:
    """A whole model, as a single file or as a folder of diffusers, durably or not at all."""
    factor = SD15_FACTOR if single and factor is None else factor
    parts, folded, needed, noted = _prepared(parts, out.name, single, factor)
    history = History.of(parts.source, parts.checkpoint)
    title = out.stem if single else out.name
    metadata = history.metadata(title, folded, parts.scheduler)
    config = missing_config(out, _ldm_config(parts, out.name)) if single else None
    grid = f"{title}.samples.png" if single else "samples.png"
    write = _write_file if single else _write_folder
    written: list[Path] = []
    with _told(parts.source, out, dtype), withdrawing(written), appearing(out) as temporary:
        hashes = write(parts, temporary, out, DTYPES[dtype], metadata)
        card = history.card(
            title, folded, dtype, hashes, grid if history.grid else None, needed, noted
        )
        beside = {f"{title}.md" if single else "README.md": card.encode()}
        if history.grid is not None:
            beside[grid] = _grid(history.grid)
        if config is not None:
            beside[f"{title}.yaml"] = config.encode()
        write_beside(out.parent if single else temporary, beside, written)
    log.info(folded)
    for file, digest in hashes.items():
        path = out if single else out / file
        log.info(f"{path}: {path.stat().st_size / 1e6:.1f} MB, {dtype}, sha256 {digest}")
    if needed:
        log.info(needed)
    return out


def _prepared(
    parts: ModelParts, name: str, single: bool, factor: float | None
) -> tuple[ModelParts, str, str, list[str]]:
    """The parts as they are written; in words what was done, what programs need, what to note."""
    parts = _checked(parts)
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
    needed = usage_notes(name, parts.scheduler, tokens, single, parts.vae_padding == "reflect")
    return parts, folded, needed, vae_notes(own, factor or own, single)


@contextmanager
def _told(source: str, out: Path, dtype: str) -> Iterator[None]:
    """What can go wrong in writing, as a user is told it."""
    try:
        yield
    except OverflowError as error:
        remedy = "give --dtype bf16 or fp32" if dtype == "fp16" else "give another model"
        raise UserError(
            f"{source} has weights that {dtype} cannot hold: {error}; {remedy}"
        ) from error
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot export {source} to {out}: {error}; nothing was written there: mend that and "
            f"run the same again"
        ) from error


def _ldm_config(parts: ModelParts, name: str) -> str | None:
    assert parts.text_encoder is not None
    return ldm_config(parts.unet, parts.text_encoder, vae_in(parts), parts.scheduler, name)


def _checked(parts: ModelParts) -> ModelParts:
    """The same, of which reading raises UserError where a weight is not finite."""
    assert parts.text_encoder is not None
    encoder, vae = with_finite_check(parts.text_encoder), with_finite_check(vae_in(parts))
    return replace(parts, unet=with_finite_check(parts.unet), text_encoder=encoder, vae=vae)


def with_decoder(parts: ModelParts, spec: str) -> ModelParts:
    """The model with another VAE of the same encoder. Raises UserError where it has another."""
    own = vae_in(parts)
    vae = load_vae(spec, float(empty_network("vae", own.config).config["scaling_factor"]))
    new = vae_part(vae)
    factors = [
        ChannelNormalisation.of(empty_network("vae", part.config).config) for part in (own, new)
    ]
    if not has_encoder(parts, vae) or factors[0] != factors[1]:
        raise UserError(
            f"the VAE {spec} has another encoder half (encoder and quant_conv) or scaling factor "
            f"than the one with which {parts.source} was trained; give one whose decoder alone "
            f"differs, or put it in with `xlsd-train swap` and train"
        )
    return replace(parts, vae=new)


def vae_part(vae: Vae) -> Network:
    """A loaded VAE as a part of a model."""
    told = {name: value for name, value in vae.model.config.items() if not name.startswith("_")}
    tensors = {name: in_memory(value) for name, value in vae.model.state_dict().items()}
    return Network("vae", {"_class_name": vae.class_name, **told}, tensors, vae.source)


def has_encoder(parts: ModelParts, vae: Vae) -> bool:
    """Whether the model's own VAE has the encoder of this one."""
    return model_vae(parts.source, vae_in(parts)).encoder_sha256 == vae.encoder_sha256


def vae_in(parts: ModelParts) -> Network:
    """The model's VAE. Raises UserError where it has none."""
    if parts.vae is None:
        raise UserError(
            f"{parts.source} holds no VAE; put one in it: xlsd-train swap NEW --model "
            f"{parts.source} --vae sd, or sdxl if it was trained with that"
        )
    return parts.vae


def bake_clip_skip(parts: ModelParts) -> ModelParts:
    """With --clip-skip in the text encoder's weights: its last layers add nothing to their input.

    A layer adds to its input what its attention and its feed-forward project, and nothing else; so
    without those projections every program sees the states that were trained with.
    """
    part = parts.text_encoder
    assert part is not None
    layers = int(part.config["num_hidden_layers"])
    last = range(layers - parts.clip_skip, layers)
    ends = (
        "self_attn.out_proj.weight",
        "self_attn.out_proj.bias",
        "mlp.fc2.weight",
        "mlp.fc2.bias",
    )
    names = [f"{PREFIX}encoder.layers.{layer}.{end}" for layer in last for end in ends]
    nothing = {name: in_memory(torch.zeros(part.tensors[name].shape)) for name in names}
    tensors = {**part.tensors, **nothing}
    return replace(parts, text_encoder=replace(part, tensors=tensors))


def fold_vae(
    part: Network, factor: float | None = None, trained: ChannelNormalisation | None = None
) -> tuple[Network, str]:
    """The VAE for loaders that scale by `factor` alone, and in words what was done to it.

    None: its own factor; and trained with it. Raises UserError where nothing can be folded.
    """
    config = empty_network("vae", part.config).config  # with the defaults that older files rely on
    own = float(config["scaling_factor"])
    what = "normalisation of each channel" if trained else f"scaling factor {own:g}"
    trained = trained or ChannelNormalisation.of(config)
    factor = own if factor is None else factor
    if trained.is_factor(factor):
        return part, f"The VAE is unchanged: its scaling factor is {factor:g}."
    if part.config.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
        raise UserError(
            f"{part.source} is an {part.config['_class_name']}, into which no scaling factor "
            f"can be folded; export with --format diffusers and without --scaling-factor"
        )
    weights = {name: part.tensors[name].read() for name in part.tensors if "quant_conv" in name}
    folded = {name: in_memory(value) for name, value in fold(weights, trained, factor).items()}
    told = (
        f"The VAE's {what} is folded into its quant_conv and post_quant_conv, so that the factor "
        f"{factor:g} is right for it."
    )
    changed = {**part.config, "scaling_factor": factor, "shift_factor": None}
    return replace(part, config=changed, tensors={**part.tensors, **folded}), told


def _grid(path: Path) -> bytes:
    """A run's grid of samples. Raises UserError for what is too large to be one."""
    if path.stat().st_size > MOST_GRID:
        raise UserError(f"{path} is larger than a grid of samples can be; remove it")
    return path.read_bytes()


def _write_file(
    parts: ModelParts, temporary: Path, out: Path, dtype: torch.dtype, metadata: dict[str, str]
) -> dict[str, str]:
    assert parts.text_encoder is not None
    assert parts.vae is not None
    tensors = single_file(parts.unet, parts.text_encoder, parts.vae, parts.scheduler, dtype)
    configs = {part.kind: _config(part) for part in (parts.unet, parts.text_encoder, parts.vae)}
    known = json.dumps({**configs, "scheduler": parts.scheduler})
    told = {**metadata, "modelspec.implementation": "sgm", CONFIGS: known}
    return {out.name: _write_weights(temporary, tensors, told)}


def _write_folder(
    parts: ModelParts, temporary: Path, _: Path, dtype: torch.dtype, metadata: dict[str, str]
) -> dict[str, str]:
    told, hashes = {**metadata, "modelspec.implementation": "diffusers"}, {}
    temporary.mkdir(parents=True)
    for part in (parts.unet, parts.text_encoder, parts.vae):
        assert part is not None
        (temporary / part.kind).mkdir()
        config = _config(part)
        if part.kind == "text_encoder":
            config = {k: v for k, v in config.items() if k != "dtype"}
            config["torch_dtype"] = str(dtype).removeprefix("torch.")
        write_json(temporary / part.kind / "config.json", config)
        tensors = {
            name: stored.to(dtype, f"{part.kind}'s {name}") for name, stored in part.tensors.items()
        }
        file = f"{part.kind}/{FILES[part.kind]}"
        hashes[file] = _write_weights(temporary / file, tensors, told)
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


def _config(part: Network) -> dict[str, Any]:
    """Without the folder that a library may have noted there."""
    return {name: value for name, value in part.config.items() if name != "_name_or_path"}


def _write_weights(path: Path, tensors: Mapping[str, LazyTensor], metadata: dict[str, str]) -> str:
    """Write, force to the disk, read back and compare; returns the file's sha256."""
    write_tensors(path, tensors, metadata)
    fsync_file(path)
    compare_tensors(path, tensors)
    return sha256_of(path)


def _write_tokenizer(source: Path, target: Path, tokens: int) -> None:
    """vocab.json and merges.txt, which every program reads, and what lies beside them.

    Today's transformers may write both into tokenizer.json alone: they are taken out of it.
    """
    copy_tokenizer(source, target, tokens)
    if not (target / "vocab.json").exists() or not (target / "merges.txt").exists():
        try:
            model: dict[str, Any] = load_object(source / "tokenizer.json")["model"]
            pairs = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]
            vocabulary = json.dumps(model["vocab"], ensure_ascii=False)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"the tokenizer in {source} has neither vocab.json and merges.txt nor a "
                f"tokenizer.json of their kind ({error}); give a whole model"
            ) from error
        write_bytes(target / "vocab.json", vocabulary.encode())
        write_bytes(target / "merges.txt", "\n".join(["#version: 0.2", *pairs, ""]).encode())
