"""Resolve a model: a hub id, a folder, a single file, a run or one of its checkpoints.

A checkpoint of ours holds the trained networks' weights. The rest is stored once, in the run's
`base/`.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from xlsd_cache.encoding.hub import no_such, repository_of
from xlsd_cache.encoding.network_config import MOST_LAYERS
from xlsd_cache.errors import UserError
from xlsd_cache.runtime.bounded_files import parse_json
from xlsd_cache.vocabulary import Padding
from xlsd_train.config import sd15
from xlsd_train.runs.json_files import misfit
from xlsd_train.runs.layout import BASE, checkpoints, is_checkpoint, is_run_folder, run_of
from xlsd_train.runs.links import refuse_links
from xlsd_train.weights import ldm_keys
from xlsd_train.weights.hub import (
    FILES,
    NEEDED,
    TEXT_ENCODER_FILES,
    TEXT_ENCODER_NEEDED,
    VAE_FILES,
    fetch_model,
)
from xlsd_train.weights.identify import UNET_ALONE, identify, remedy
from xlsd_train.weights.lazy_tensors import open_tensors
from xlsd_train.weights.network import (
    CLASSES_OF,
    KINDS,
    PREFIX,
    Network,
    NetworkKind,
    check_shapes,
    checked_config,
    class_name_in,
    network_in_folder,
    network_in_ldm_file,
    network_of,
    read_config,
    read_json,
    read_latents_json,
)
from xlsd_train.weights.prediction_type import (
    file_scheduler,
    has_zero_snr,
    known_scheduler,
    prediction_type,
)
from xlsd_train.weights.vae_fold import ChannelNormalisation

log = logging.getLogger("xlsd.train.weights")

UNET, TEXT_ENCODER = "unet.safetensors", "text_encoder.safetensors"  # in a checkpoint
CONFIGS = "xlsd.configs"  # in the metadata of a single file that `export` wrote


@dataclass(frozen=True)
class ModelParts:
    """A model's networks, tokenizer and scheduler; None for what a single file lacks."""

    source: str  # as the user gave it
    unet: Network
    text_encoder: Network | None
    vae: Network | None
    tokenizer: Path | None  # a folder
    scheduler: dict[str, Any]
    checkpoint: Path | None = None  # of ours, in its run
    trained: ChannelNormalisation | None = None  # of latents; None: the VAE's own factor
    clip_skip: int = 0  # used in training here
    vae_padding: Padding | None = None  # used in training here: zeros | reflect


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
    parts = _locate(source, ema, vae)
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
        network = getattr(_locate(str(path), False, False), kind)
        assert isinstance(network, Network)
        return network
    if path.is_dir():
        return network_in_folder(kind, path / kind if (path / kind).is_dir() else path, str(path))
    if not path.is_file():
        raise UserError(f"{_flag(kind)} {no_such(source)}; give a folder or file")
    tensors, metadata = open_tensors(path)
    known = _configs(path, metadata)
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
        return _scheduler_in(unet / BASE)
    if is_checkpoint(unet):
        return _scheduler_in(run_of(unet) / BASE)
    return _scheduler_in(unet) or (_scheduler_in(unet.parent) if unet.name == "unet" else None)


def _scheduler_by_file(path: Path) -> dict[str, Any] | None:
    """A single file's scheduler config; for a UNet in a pipeline's folder, the pipeline's."""
    folder = path.parent.parent if path.parent.name == "unet" else path.parent
    tensors, metadata = open_tensors(path)
    own = _metadata_configs(metadata).get("scheduler")
    return file_scheduler(path, tensors, metadata, own, _scheduler_in(folder))


def _scheduler_in(folder: Path) -> dict[str, Any] | None:
    return _scheduler(folder) if (folder / "scheduler").is_dir() else None


def _locate(source: str, ema: bool, vae: bool) -> ModelParts:
    path = Path(source).expanduser()
    if is_run_folder(path):
        refuse_links(path)
        saved = checkpoints(path)
        if not saved:
            raise UserError(f"the run {source} has no checkpoint yet; train it further first")
        path = saved[-1]
    if is_checkpoint(path):
        return _in_checkpoint(path, source)
    if path.is_dir():
        return _in_folder(path, source)
    if path.is_file():
        return _in_file(path, source, ema)
    repository = None if path.exists() else repository_of(source)
    if repository is None:
        raise UserError(
            f"no model {no_such(source)}; give a pipeline folder, a single file, a checkpoint or a "
            f"hub id ORG/NAME"
        )
    own = VAE_FILES if vae else []
    return _in_folder(fetch_model(repository, FILES + own, NEEDED + own, "--model"), source)


def _in_checkpoint(checkpoint: Path, source: str) -> ModelParts:
    run = run_of(checkpoint)
    refuse_links(run)
    base = run / BASE
    networks = {}
    for kind, file in (("unet", UNET), ("text_encoder", TEXT_ENCODER)):
        path = checkpoint / file
        tensors, _ = open_tensors(path)
        networks[kind] = network_of(kind, read_config(kind, base / kind), tensors, str(path))  # type: ignore[arg-type]
    vae = network_in_folder("vae", base / "vae", source)
    trained, padding = _latents(base / "latents.json")
    return ModelParts(
        source, networks["unet"], networks["text_encoder"], vae, base / "tokenizer",
        _scheduler(base), checkpoint, trained, _clip_skip(base / "captions.json"), padding,
    )  # fmt: skip


def _latents(path: Path) -> tuple[ChannelNormalisation | None, Padding]:
    """The normalisation of latents, (raw - shift) * scale, and the VAE's padding in training."""
    if not path.is_file():
        return None, "zeros"
    record = read_latents_json(path)
    padding: Padding = record.get("padding", "zeros")
    if not record["normalized"]:
        return None, padding
    scales = tuple(1 / scale for scale in record["scale"])
    return ChannelNormalisation(tuple(record["shift"]), scales), padding


def _clip_skip(path: Path) -> int:
    """The clip skip that a run trained with."""
    if not path.is_file():
        return 0
    skip = read_json(path).get("clip_skip")
    if not isinstance(skip, int) or not 0 <= skip < MOST_LAYERS:
        raise UserError(f"{path} has no valid clip_skip: it is damaged, or not written by a run")
    return skip


def _in_folder(folder: Path, source: str) -> ModelParts:
    if not (folder / "unet").is_dir():
        raise UserError(
            f"{source} is no model: it has neither unet/, as a pipeline folder has, nor "
            f"state.json, as a checkpoint has; give a folder with one of them"
        )
    unet = network_in_folder("unet", folder / "unet", source)
    text_encoder = network_in_folder("text_encoder", folder / "text_encoder", source)
    has_vae = (folder / "vae").is_dir()
    vae = network_in_folder("vae", folder / "vae", source) if has_vae else None
    return ModelParts(source, unet, text_encoder, vae, folder / "tokenizer", _scheduler(folder))


def _in_file(path: Path, source: str, ema: bool) -> ModelParts:
    """A single file with LDM's keys; a tokenizer/ and scheduler/ next to it count too."""
    tensors, metadata = open_tensors(path)
    kind = identify(tensors)
    whole = any(name.startswith(ldm_keys.UNET) for name in tensors)
    if not whole or kind not in (None, UNET_ALONE):
        actual = kind or "of unknown kind"
        raise UserError(f"{source} is no SD1.5 in a single file: it is {actual}" + remedy(kind))
    configs = {"unet": sd15.UNET, "text_encoder": sd15.TEXT_ENCODER, "vae": sd15.VAE}
    configs |= _configs(path, metadata)
    own = configs.pop("scheduler", None)
    networks = {
        name: network_in_ldm_file(name, config, tensors, source, ema)  # type: ignore[arg-type]
        for name, config in configs.items()
    }
    unet, folder = networks["unet"], path.parent / "tokenizer"
    assert unet is not None
    tokenizer = folder if folder.is_dir() else None
    nearby = _scheduler_in(path.parent)
    scheduler = file_scheduler(path, tensors, metadata, own, nearby) or sd15.SCHEDULER
    return ModelParts(source, unet, networks["text_encoder"], networks["vae"], tokenizer, scheduler)


def _configs(path: Path, metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Configs of a single file's networks, from its metadata or the folder that it is in."""
    if CONFIGS in metadata:
        return _metadata_configs(metadata)
    folders = {kind: path.parent / kind for kind in KINDS}
    return {
        kind: read_config(kind, folder)
        for kind, folder in folders.items()
        if (folder / "config.json").is_file()
    }


def _metadata_configs(metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The configs that our exports store in the header. Raises UserError for any others."""
    try:
        configs = parse_json(metadata.get(CONFIGS, "{}"))
        why = misfit(configs, {str: dict}) or ", ".join(configs.keys() - {*KINDS, "scheduler"})
    except ValueError as error:
        configs, why = {}, str(error)
    if why:
        raise UserError(
            f"the file's metadata {CONFIGS} was not written by export: {why}; export it again"
        )
    checked = {
        kind: checked_config(kind, config, f"the file's metadata {CONFIGS}")
        for kind, config in configs.items()
        if kind != "scheduler"
    }
    if "scheduler" in configs:
        checked["scheduler"] = known_scheduler(configs["scheduler"], "the file's metadata")
    return checked


def _scheduler(folder: Path) -> dict[str, Any]:
    path = folder / "scheduler" / "scheduler_config.json"
    return known_scheduler(read_json(path), str(path))
