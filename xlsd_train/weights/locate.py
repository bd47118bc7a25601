"""Resolve a model and the parts that replace its own: a UNet, a text encoder, a tokenizer."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from xlsd_cache.encoding.hub import no_such, repository_of
from xlsd_cache.errors import UserError
from xlsd_train.config import sd15
from xlsd_train.runs.layout import BASE, is_checkpoint, is_run_folder, run_of
from xlsd_train.weights import ldm_keys
from xlsd_train.weights.hub import TEXT_ENCODER_FILES, TEXT_ENCODER_NEEDED, fetch_model
from xlsd_train.weights.identify import identify
from xlsd_train.weights.lazy_tensors import open_tensors
from xlsd_train.weights.network import (
    CLASSES_OF,
    PREFIX,
    Network,
    NetworkKind,
    check_shapes,
    class_name_in,
    network_in_folder,
    network_in_ldm_file,
    network_of,
    read_config,
    read_json,
)
from xlsd_train.weights.parts import (
    ModelParts,
    configs_of,
    metadata_configs,
    read_model,
    scheduler_in,
)
from xlsd_train.weights.prediction_type import file_scheduler, has_zero_snr, prediction_type

log = logging.getLogger("xlsd.train.weights")


def locate_model(
    source: str,
    *,
    unet: str | None = None,
    text_encoder: str | None = None,
    tokenizer: str | None = None,
    ema: bool = False,
    vae: bool = True,
) -> ModelParts:
    """The parts of the model `source`, with the given ones replaced.

    `ema` takes a single file's moving averages; `vae` says whether the hub's VAE is downloaded.
    Raises UserError if there is no such model, or it has another architecture.
    """
    if ema and not Path(source).expanduser().is_file():
        raise UserError(
            f"--model-ema: only single files hold moving averages, and {source} is none; leave it "
            f"out"
        )
    parts = read_model(source, ema, vae)
    if unet is not None:
        parts = _with_unet(parts, locate_network("unet", unet, parts.unet.config), unet)
    if text_encoder is not None:
        config = parts.text_encoder.config if parts.text_encoder else sd15.TEXT_ENCODER
        encoder, own = locate_text_encoder(text_encoder, config)
        parts = replace(parts, text_encoder=encoder, tokenizer=own or parts.tokenizer)
    if tokenizer is not None:
        folder = Path(tokenizer).expanduser()
        inner = folder / "tokenizer"
        parts = replace(parts, tokenizer=inner if inner.is_dir() else folder)
    for network in (parts.unet, parts.text_encoder, parts.vae):
        if network is not None:
            check_shapes(network)
    if parts.text_encoder is not None:
        _check_widths(parts.unet, parts.text_encoder)
    return parts


def fetch_missing(parts: ModelParts, tokenizer: bool = True) -> ModelParts:
    """Add a missing text encoder, and a tokenizer if wanted: SD1.5's, downloaded from the hub."""
    if parts.text_encoder is None:
        files = ["text_encoder/config.json", "text_encoder/model.safetensors"]
        folder = fetch_model(sd15.HUB_ID, files, files, "--text-encoder")
        encoder = network_in_folder("text_encoder", folder / "text_encoder", sd15.HUB_ID)
        log.info(f"{parts.source} holds no text encoder: using that of {sd15.HUB_ID}")
        check_shapes(encoder)
        parts = replace(parts, text_encoder=encoder)
    if parts.tokenizer is None and tokenizer:
        files = ["tokenizer/*"]
        folder = fetch_model(sd15.HUB_ID, files, files, "--tokenizer")
        parts = replace(parts, tokenizer=folder / "tokenizer")
    return parts


def locate_text_encoder(source: str, config: Mapping[str, Any]) -> tuple[Network, Path | None]:
    """A text encoder, and the folder of the tokenizer stored with it, if there is one."""
    path = Path(source).expanduser()
    if not path.exists() and (repository := repository_of(source)):
        path = fetch_model(repository, TEXT_ENCODER_FILES, TEXT_ENCODER_NEEDED, "--text-encoder")
    return locate_network("text_encoder", str(path), config), _tokenizer_of(path)


def _tokenizer_of(text_encoder: Path) -> Path | None:
    """The tokenizer stored with a text encoder: a pipeline's, a whole CLIP's or a run's."""
    for base in (text_encoder, text_encoder / BASE, run_of(text_encoder) / BASE):
        for folder in (base / "tokenizer", base):
            if any((folder / name).is_file() for name in ("vocab.json", "tokenizer.json")):
                return folder
    return None


def _check_widths(unet: Network, text_encoder: Network) -> None:
    width = text_encoder.tensors[f"{PREFIX}embeddings.token_embedding.weight"].shape[1]
    widths = {it.shape[1] for name, it in unet.tensors.items() if "attn2.to_k." in name}
    if widths != {width}:
        raise UserError(
            f"the text encoder {text_encoder.source} is {width} wide and the UNet {unet.source} "
            f"takes {max(widths)}; use a text encoder and a UNet of the same model type"
        )


def locate_network(kind: NetworkKind, source: str, config: Mapping[str, Any]) -> Network:
    """One network, from a folder, a run or its own file; `config` is for a file without one."""
    path = Path(source).expanduser()
    if is_run_folder(path) or is_checkpoint(path):
        network = getattr(read_model(str(path), False, False), kind)
        assert isinstance(network, Network)
        return network
    if path.is_dir():
        return network_in_folder(kind, path / kind if (path / kind).is_dir() else path, str(path))
    if not path.is_file():
        raise UserError(f"{_flag(kind)} {no_such(source)}; give a folder or file")
    tensors, metadata = open_tensors(path)
    known = configs_of(path, metadata)
    if kind in known:
        config = known[kind]
    elif (
        (neighbour := path.parent / "config.json").is_file()
        and class_name_in(kind, read_json(neighbour)) in CLASSES_OF[kind]  # not another file's
    ):
        config = read_config(kind, path.parent)
    if kind == "unet" and "input_blocks.0.0.weight" in tensors:
        tensors = {ldm_keys.UNET + name: tensor for name, tensor in tensors.items()}
    if network := network_in_ldm_file(kind, config, tensors, str(path), ema=False):
        return network
    mark = "conv_in.weight" if kind == "unet" else "embeddings.token_embedding.weight"
    if not {mark, PREFIX + mark} & tensors.keys():
        actual = identify(tensors) or "of unknown kind"
        raise UserError(f"{_flag(kind)} {path} holds no {kind.replace('_', ' ')}: it is {actual}")
    return network_of(kind, config, tensors, str(path))


def _flag(kind: NetworkKind) -> str:
    return f"--{kind.replace('_', '-')}"


def _with_unet(parts: ModelParts, unet: Network, source: str) -> ModelParts:
    """Replace the UNet, and the scheduler with the one stored with it, if there is one.

    The scheduler says what the UNet predicts. Warns if that differs from the model's.
    """
    theirs = _scheduler_of(Path(source).expanduser())
    parts = replace(parts, unet=unet)
    if theirs is None:
        return parts
    ours = parts.scheduler
    if all(of(theirs) == of(ours) for of in (prediction_type, has_zero_snr)):
        return parts
    log.warning(
        f"the UNet {source} predicts {prediction_type(theirs)} and {parts.source} "
        f"{prediction_type(ours)}: using the UNet's own noise schedule"
    )
    return replace(parts, scheduler=theirs)


def _scheduler_of(unet: Path) -> dict[str, Any] | None:
    """The scheduler config stored with a UNet's folder, file or run, if there is one."""
    if unet.is_file() and unet.suffix in (".safetensors", ".ckpt", ".pt", ".bin"):
        inside = is_checkpoint(unet.parent)
        return _scheduler_of(unet.parent) if inside else _scheduler_by_file(unet)
    if is_run_folder(unet):
        return scheduler_in(unet / BASE)
    if is_checkpoint(unet):
        return scheduler_in(run_of(unet) / BASE)
    return scheduler_in(unet) or (scheduler_in(unet.parent) if unet.name == "unet" else None)


def _scheduler_by_file(path: Path) -> dict[str, Any] | None:
    """A single file's scheduler config; for a UNet in a pipeline's folder, the pipeline's."""
    folder = path.parent.parent if path.parent.name == "unet" else path.parent
    tensors, metadata = open_tensors(path)
    own = metadata_configs(metadata).get("scheduler")
    return file_scheduler(path, tensors, metadata, own, scheduler_in(folder))
