"""Read a whole model: a hub id, a folder, a single file, a run or one of its checkpoints.

A checkpoint of ours holds the trained networks' weights. The rest is stored once, in the run's
`base/`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
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
from xlsd_train.weights.hub import FILES, NEEDED, VAE_FILES, fetch_model
from xlsd_train.weights.identify import UNET_ALONE, identify, remedy
from xlsd_train.weights.lazy_tensors import open_tensors
from xlsd_train.weights.network import (
    KINDS,
    Network,
    checked_config,
    network_in_folder,
    network_in_ldm_file,
    network_of,
    read_config,
    read_json,
    read_latents_json,
)
from xlsd_train.weights.prediction_type import file_scheduler, known_scheduler
from xlsd_train.weights.vae_fold import ChannelNormalisation

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


def read_model(source: str, ema: bool, vae: bool) -> ModelParts:
    """The parts of the model `source`; see `locate.locate_model`."""
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
    configs |= configs_of(path, metadata)
    own = configs.pop("scheduler", None)
    networks = {
        name: network_in_ldm_file(name, config, tensors, source, ema)  # type: ignore[arg-type]
        for name, config in configs.items()
    }
    unet, folder = networks["unet"], path.parent / "tokenizer"
    assert unet is not None
    tokenizer = folder if folder.is_dir() else None
    nearby = scheduler_in(path.parent)
    scheduler = file_scheduler(path, tensors, metadata, own, nearby) or sd15.SCHEDULER
    return ModelParts(source, unet, networks["text_encoder"], networks["vae"], tokenizer, scheduler)


def configs_of(path: Path, metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Configs of a single file's networks, from its metadata or the folder that it is in."""
    if CONFIGS in metadata:
        return metadata_configs(metadata)
    folders = {kind: path.parent / kind for kind in KINDS}
    return {
        kind: read_config(kind, folder)
        for kind, folder in folders.items()
        if (folder / "config.json").is_file()
    }


def metadata_configs(metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
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


def scheduler_in(folder: Path) -> dict[str, Any] | None:
    """The scheduler config of a pipeline's folder, if there is one."""
    return _scheduler(folder) if (folder / "scheduler").is_dir() else None


def _scheduler(folder: Path) -> dict[str, Any]:
    path = folder / "scheduler" / "scheduler_config.json"
    return known_scheduler(read_json(path), str(path))
