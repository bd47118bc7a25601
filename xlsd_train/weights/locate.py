"""Where a model lies: a hub id, a folder, a single file, or what we trained before, in its parts.

A checkpoint of ours holds the trained networks' weights; all else lies once in its run's `base/`.
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
from xlsd_train.runs.layout import checkpoints
from xlsd_train.runs.links import refuse_links
from xlsd_train.weights import ldm_keys as names
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
CONFIGS = "xlsd.configs"  # in the metadata of a single file of ours


@dataclass(frozen=True)
class ModelParts:
    """A model in parts. What a single file lacks is None."""

    source: str  # as it was asked for
    unet: Network
    text_encoder: Network | None
    vae: Network | None
    tokenizer: Path | None  # a folder
    scheduler: dict[str, Any]
    checkpoint: Path | None = None  # of ours, in its run
    trained: ChannelNormalisation | None = None  # of latents, where it is not the VAE's own factor
    clip_skip: int = 0  # with which it was trained here
    vae_padding: Padding | None = None  # zeros | reflect, where it was trained here


def locate_model(
    source: str,
    *,
    unet: str | None = None,
    text_encoder: str | None = None,
    tokenizer: str | None = None,
    ema: bool = False,
    vae: bool = True,
) -> ModelParts:
    """The parts of the model that `source` names, with those replaced that are given by path.

    `ema` takes a single file's moving averages; `vae` says whether a hub's VAE is wanted. Raises
    UserError where there is no such model, or it is another architecture's.
    """
    if ema and not Path(source).expanduser().is_file():
        raise UserError(
            f"--model-ema: {source} is no single file, which alone holds moving averages; leave it "
            f"out"
        )
    found = _find(source, ema, vae)
    if unet is not None:
        found = _with_unet(found, locate_network("unet", unet, found.unet.config, "--unet"), unet)
    if text_encoder is not None:
        config = found.text_encoder.config if found.text_encoder else sd15.TEXT_ENCODER
        encoder, own = locate_text_encoder(text_encoder, config)
        found = replace(found, text_encoder=encoder, tokenizer=own or found.tokenizer)
    if tokenizer is not None:
        folder = Path(tokenizer).expanduser()
        inner = folder / "tokenizer"
        found = replace(found, tokenizer=inner if inner.is_dir() else folder)
    for part in (found.unet, found.text_encoder, found.vae):
        if part is not None:
            check_shapes(part)
    if found.text_encoder is not None:
        _agree(found.unet, found.text_encoder)
    return found


def fetch_missing(parts: ModelParts, tokenizer: bool = True) -> ModelParts:
    """The same with a text encoder and, if wanted, a tokenizer: the hub's SD1.5's where missing."""
    if parts.text_encoder is None:
        files = ["text_encoder/config.json", "text_encoder/model.safetensors"]
        folder = fetch_model(sd15.HUB_ID, files, files, "--text-encoder")
        part = network_in_folder("text_encoder", folder / "text_encoder", sd15.HUB_ID)
        log.info(f"{parts.source} holds no text encoder: {sd15.HUB_ID}'s is taken")
        check_shapes(part)
        parts = replace(parts, text_encoder=part)
    if parts.tokenizer is None and tokenizer:
        files = ["tokenizer/*"]
        folder = fetch_model(sd15.HUB_ID, files, files, "--tokenizer")
        parts = replace(parts, tokenizer=folder / "tokenizer")
    return parts


def locate_text_encoder(source: str, config: Mapping[str, Any]) -> tuple[Network, Path | None]:
    """That of --text-encoder, and the folder of the tokenizer that lies with it, if one does."""
    at = Path(source).expanduser()
    if not at.exists() and (repository := repository_of(source)):
        at = fetch_model(repository, TEXT_ENCODER_FILES, TEXT_ENCODER_NEEDED, "--text-encoder")
    return locate_network("text_encoder", str(at), config, "--text-encoder"), _tokenizer_of(at)


def _tokenizer_of(text_encoder: Path) -> Path | None:
    """The tokenizer that lies with a text encoder: a pipeline's, a whole CLIP's or a run's."""
    for base in (text_encoder, text_encoder / "base", text_encoder.parent.parent / "base"):
        for folder in (base / "tokenizer", base):
            if any((folder / name).is_file() for name in ("vocab.json", "tokenizer.json")):
                return folder
    return None


def _agree(unet: Network, text_encoder: Network) -> None:
    width = text_encoder.tensors[f"{PREFIX}embeddings.token_embedding.weight"].shape[1]
    listens = {it.shape[1] for name, it in unet.tensors.items() if "attn2.to_k." in name}
    if listens != {width}:
        raise UserError(
            f"the text encoder {text_encoder.source} is {width} wide and the UNet {unet.source} "
            f"listens to {max(listens)}; give parts of one kind of model"
        )


def locate_network(
    kind: NetworkKind, source: str, config: Mapping[str, Any], option: str
) -> Network:
    """One part from a folder, a run or a file of its own; a file without a config has `config`."""
    path = Path(source).expanduser()
    if (path / "checkpoints").is_dir() or (path / "state.json").is_file():
        part = getattr(_find(str(path), False, False), kind)
        assert isinstance(part, Network)
        return part
    if path.is_dir():
        return network_in_folder(kind, path / kind if (path / kind).is_dir() else path, str(path))
    if not path.is_file():
        raise UserError(f"{option} {no_such(source)}; name a folder or file")
    tensors, metadata = open_tensors(path)
    known = _configs(path, metadata)
    if kind in known:
        config = known[kind]
    elif (
        (beside := path.parent / "config.json").is_file()
        and class_name_in(kind, read_json(beside))
        in CLASSES_OF[kind]  # else it lies there for others
    ):
        config = read_config(kind, path.parent)
    prefix = {"unet": names.UNET, "text_encoder": names.TEXT_ENCODER, "vae": names.VAE}[kind]
    if kind == "unet" and "input_blocks.0.0.weight" in tensors:
        tensors = {prefix + name: stored for name, stored in tensors.items()}
    if part := network_in_ldm_file(kind, config, tensors, str(path), ema=False):
        return part
    mark = "conv_in.weight" if kind == "unet" else "embeddings.token_embedding.weight"
    if not {mark, PREFIX + mark} & tensors.keys():
        told = identify(tensors) or "unknown here"
        raise UserError(f"{option} {path} holds no {kind.replace('_', ' ')}: it is {told}")
    return network_of(kind, config, tensors, str(path))


def _with_unet(found: ModelParts, unet: Network, source: str) -> ModelParts:
    """The model with another UNet, and with the scheduler that lies with that, if one does.

    What is predicted is the UNet's. Warns where that is not the model's.
    """
    theirs = _scheduler_of(Path(source).expanduser())
    found = replace(found, unet=unet)
    if theirs is None:
        return found
    ours = found.scheduler
    if all(of(theirs) == of(ours) for of in (prediction_type, has_zero_snr)):
        return found
    log.warning(
        f"--unet {source} predicts {prediction_type(theirs)} and {found.source} "
        f"{prediction_type(ours)}: the UNet's own noise schedule is taken"
    )
    return replace(found, scheduler=theirs)


def _scheduler_of(unet: Path) -> dict[str, Any] | None:
    """What a UNet's folder, file or run says of its scheduler; None where it says nothing."""
    if unet.is_file() and unet.suffix in (".safetensors", ".ckpt", ".pt", ".bin"):
        inside = unet.parent / "state.json"
        return _scheduler_of(unet.parent) if inside.is_file() else _scheduler_by_file(unet)
    if (unet / "checkpoints").is_dir():
        return _beside(unet / "base")
    if (unet / "state.json").is_file():
        return _beside(unet.parent.parent / "base")
    return _beside(unet) or (_beside(unet.parent) if unet.name == "unet" else None)


def _scheduler_by_file(path: Path) -> dict[str, Any] | None:
    """A single file's; of a UNet in a pipeline's folder, the pipeline's."""
    folder = path.parent.parent if path.parent.name == "unet" else path.parent
    tensors, metadata = open_tensors(path)
    return file_scheduler(path, tensors, metadata, _own_scheduler(metadata), _beside(folder))


def _beside(folder: Path) -> dict[str, Any] | None:
    return _scheduler(folder) if (folder / "scheduler").is_dir() else None


def _own_scheduler(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """What our exports keep in their header."""
    return _told(metadata).get("scheduler")


def _find(source: str, ema: bool, vae: bool) -> ModelParts:
    path = Path(source).expanduser()
    if (path / "checkpoints").is_dir():
        refuse_links(path)
        found = checkpoints(path)
        if not found:
            raise UserError(f"the run {source} has no checkpoint yet; train it further first")
        path = found[-1]
    if (path / "state.json").is_file():
        return _in_checkpoint(path, source)
    if path.is_dir():
        return _in_folder(path, source)
    if path.is_file():
        return _in_file(path, source, ema)
    repository = None if path.exists() else repository_of(source)
    if repository is None:
        raise UserError(
            f"no model {no_such(source)}; name a pipeline folder, a single file, a checkpoint or a "
            f"hub id ORG/NAME"
        )
    own = VAE_FILES if vae else []
    return _in_folder(fetch_model(repository, FILES + own, NEEDED + own, "--model"), source)


def _in_checkpoint(checkpoint: Path, source: str) -> ModelParts:
    refuse_links(checkpoint.parent.parent)
    base = checkpoint.parent.parent / "base"
    parts = {}
    for kind, file in (("unet", UNET), ("text_encoder", TEXT_ENCODER)):
        path = checkpoint / file
        tensors, _ = open_tensors(path)
        parts[kind] = network_of(kind, read_config(kind, base / kind), tensors, str(path))  # type: ignore[arg-type]
    vae = network_in_folder("vae", base / "vae", source)
    return ModelParts(
        source, parts["unet"], parts["text_encoder"], vae, base / "tokenizer", _scheduler(base),
        checkpoint, _trained(base / "latents.json"), _clip_skip(base / "captions.json"),
        _padding(base / "latents.json"),
    )  # fmt: skip


def _trained(path: Path) -> ChannelNormalisation | None:
    """What a run says that it made of raw latents, (raw - shift) * scale of each channel."""
    if not path.is_file() or not (told := read_latents_json(path))["normalized"]:
        return None
    return ChannelNormalisation(tuple(told["shift"]), tuple(1 / scale for scale in told["scale"]))


def _padding(path: Path) -> Padding:
    """What a run says that its VAE's convolutions pad with."""
    told: Padding = read_latents_json(path).get("padding", "zeros") if path.is_file() else "zeros"
    return told


def _clip_skip(path: Path) -> int:
    """What a run says that its --clip-skip was."""
    if not path.is_file():
        return 0
    skip = read_json(path).get("clip_skip")
    if not isinstance(skip, int) or not 0 <= skip < MOST_LAYERS:
        raise UserError(f"{path} says no clip_skip; it is damaged or no run's")
    return skip


def _in_folder(folder: Path, source: str) -> ModelParts:
    if not (folder / "unet").is_dir():
        raise UserError(
            f"{source} is no model: it has no unet/ as a pipeline folder and no state.json as "
            f"a checkpoint; name a folder that has"
        )
    unet = network_in_folder("unet", folder / "unet", source)
    text_encoder = network_in_folder("text_encoder", folder / "text_encoder", source)
    has_vae = (folder / "vae").is_dir()
    vae = network_in_folder("vae", folder / "vae", source) if has_vae else None
    return ModelParts(source, unet, text_encoder, vae, folder / "tokenizer", _scheduler(folder))


def _in_file(path: Path, source: str, ema: bool) -> ModelParts:
    """A single file under LDM's names; what it lacks may lie beside it as in a pipeline folder."""
    tensors, metadata = open_tensors(path)
    kind = identify(tensors)
    whole = any(name.startswith(names.UNET) for name in tensors)
    if not whole or kind not in (None, UNET_ALONE):
        told = kind or "unknown here"
        raise UserError(f"{source} is no SD1.5 in a single file: it is {told}" + remedy(kind))
    configs = {"unet": sd15.UNET, "text_encoder": sd15.TEXT_ENCODER, "vae": sd15.VAE}
    configs |= _configs(path, metadata)
    own = configs.pop("scheduler", None)
    found = {
        name: network_in_ldm_file(name, config, tensors, source, ema)  # type: ignore[arg-type]
        for name, config in configs.items()
    }
    unet, beside = found["unet"], path.parent / "tokenizer"
    assert unet is not None
    tokenizer = beside if beside.is_dir() else None
    scheduler = file_scheduler(path, tensors, metadata, own, _beside(path.parent)) or sd15.SCHEDULER
    return ModelParts(source, unet, found["text_encoder"], found["vae"], tokenizer, scheduler)


def _configs(path: Path, metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """What a single file's metadata, or the folder in which it lies, says of its parts."""
    if CONFIGS in metadata:
        return _told(metadata)
    beside = {kind: path.parent / kind for kind in KINDS}
    return {k: read_config(k, at) for k, at in beside.items() if (at / "config.json").is_file()}


def _told(metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """What our exports keep in their header, of each part. Raises UserError for anything else."""
    try:
        told = parse_json(metadata.get(CONFIGS, "{}"))
        why = misfit(told, {str: dict}) or ", ".join(told.keys() - {*KINDS, "scheduler"})
    except ValueError as error:
        told, why = {}, str(error)
    if why:
        raise UserError(f"the file's metadata {CONFIGS} is none of ours: {why}; export it anew")
    plain = {
        kind: checked_config(kind, config, f"the file's metadata {CONFIGS}")
        for kind, config in told.items()
        if kind != "scheduler"
    }
    if "scheduler" in told:
        plain["scheduler"] = known_scheduler(told["scheduler"], "the file's metadata")
    return plain


def _scheduler(folder: Path) -> dict[str, Any]:
    path = folder / "scheduler" / "scheduler_config.json"
    return known_scheduler(read_json(path), str(path))
