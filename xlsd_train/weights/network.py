"""One network of a model: its config, and its weights by the names of SD1.5's folder, not read yet.

Whatever it comes from, a folder of diffusers or transformers, old or new, or a single file under
latent-diffusion's names: what training loads and what export writes both come from here.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel
from transformers.initialization import no_init_weights

from xlsd_cache.encoding.finite import count, is_finite, unfit
from xlsd_cache.encoding.network_config import plain_config
from xlsd_cache.encoding.vae import CLASSES
from xlsd_cache.errors import UserError, one_line
from xlsd_train.runs.json_files import load_object, misfit
from xlsd_train.weights import ldm_keys as names
from xlsd_train.weights.lazy_tensors import LazyTensor, open_tensors

NetworkKind = Literal["unet", "text_encoder", "vae"]
KINDS: tuple[NetworkKind, ...] = get_args(NetworkKind)
CLASSES_OF: dict[NetworkKind, tuple[str, ...]] = {
    "unet": ("UNet2DConditionModel",),
    "text_encoder": ("clip_text_model", "clip", "CLIPTextModel"),
    "vae": tuple(CLASSES),
}
MOST_WEIGHTS = 4 * 10**9  # of a part; SD1.5's UNet has 0.86 billion
INDEX = {"weight_map!": {str: str}}
LATENTS_JSON = {"normalized!": bool, "shift!": [float], "scale!": [float], "vae_sha256": str,
        "encoder_sha256": str, "padding": str}  # fmt: skip
# transformers 5 drops this from its names; SD1.5's file and every other program have it.
PREFIX = "text_model."
POSITIONS = f"{PREFIX}embeddings.position_embedding.weight"  # [tokens, width]
# Beside CLIP's text encoder in files of the whole of CLIP, or of older transformers.
_BESIDE = ("text_model.embeddings.position_ids", "vision_model.", "visual_projection.",
           "text_projection.", "logit_scale")  # fmt: skip


@dataclass(frozen=True)
class Network:
    """One network: its config.json, and its weights under the names that SD1.5's folder has."""

    kind: NetworkKind
    config: dict[str, Any]
    tensors: Mapping[str, LazyTensor]
    source: str  # for messages


def empty_network(kind: NetworkKind, config: Mapping[str, Any]) -> Any:
    """The network of a config, its weights without memory: their names and shapes.

    Raises UserError for a config of which none can be made.
    """
    try:
        with init_empty_weights(), no_init_weights():  # without memory nothing is to be drawn
            if kind == "unet":
                return UNet2DConditionModel.from_config(dict(config))
            if kind == "text_encoder":
                return CLIPTextModel(CLIPTextConfig.from_dict(dict(config)))
            return CLASSES[config.get("_class_name", "AutoencoderKL")].from_config(dict(config))
    except Exception as error:  # whatever the libraries stumble over in values of any kind
        told = one_line(error)
        raise UserError(
            f"the {kind.replace('_', ' ')}'s config makes no network: {told}; it is damaged, or "
            f"another model's"
        ) from error


def build_network(part: Network) -> Any:
    """The network with its weights, fp32 on the CPU, in evaluation mode.

    Raises UserError where a weight is not finite.
    """
    module = empty_network(part.kind, part.config)
    state = {
        name: stored.read().to(torch.float32, copy=True) for name, stored in part.tensors.items()
    }
    if bad := unfit(state):
        raise _not_finite(part, bad[0], state[bad[0]], len(bad) - 1)
    state = {name.removeprefix(PREFIX): value for name, value in state.items()}
    module.load_state_dict(state, assign=True)
    return module.eval()


def with_finite_check(part: Network) -> Network:
    """The same, of which reading raises UserError where a weight is not finite."""

    def read(name: str, stored: LazyTensor) -> Tensor:
        value = stored.read()
        if not is_finite(value):
            raise _not_finite(part, name, value)
        return value

    tensors = {
        name: replace(stored, read=partial(read, name, stored))
        for name, stored in part.tensors.items()
    }
    return replace(part, tensors=tensors)


def _not_finite(part: Network, name: str, value: Tensor, others: int = 0) -> UserError:
    """What is wrong with a part: which tensor, as its file calls it too, and what to do."""
    there = part.tensors[name].name
    where = f", {there} in the file," if there not in ("", name) else ""
    more = f", and so have {others} more of its tensors" if others else ""
    checkpoint = Path(part.source).parent
    remedy = "fetch or make it anew, or give another"
    if (checkpoint / "state.json").is_file():
        remedy = (
            f"remove {checkpoint}, so that the checkpoint before it counts, or name an earlier one"
        )
    return UserError(
        f"{part.source}: {part.kind}'s {name}{where} has {count(value)} that are nan or "
        f"infinite{more}; {remedy}"
    )


def network_in_ldm_file(
    kind: NetworkKind,
    config: Mapping[str, Any],
    tensors: Mapping[str, LazyTensor],
    source: str,
    ema: bool,
) -> Network | None:
    """A part of a single file, or None where it holds nothing of it."""
    prefix = {"unet": names.UNET, "text_encoder": names.TEXT_ENCODER, "vae": names.VAE}[kind]
    if not any(name.startswith(prefix) for name in tensors):
        return None
    averages = ema and kind == "unet"
    if averages and sum(name.startswith(names.EMA) for name in tensors) < 100:
        raise UserError(f"{source} holds no moving averages; leave out --model-ema")
    network = empty_network(kind, config)
    taken, ldm = {}, ldm_names(kind, network)
    for name, (key, shape) in ldm.items():
        keys = [names.ema_name(key) if averages else prefix + key]
        if kind == "text_encoder":  # files of 2022 have the names of an older transformers
            keys.append(prefix + key.removeprefix(PREFIX))
        for there in filter(tensors.__contains__, keys):
            stored = tensors[there]
            fits = len(stored.shape) != len(shape) and stored.shape[: len(shape)] == shape
            taken[name] = stored.reshaped(*shape) if fits else stored
    return Network(kind, full_config(kind, network, config), taken, source)


def ldm_names(kind: NetworkKind, network: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name in SD1.5's folder -> (LDM's name without prefix, shape in the folder) of each weight."""
    shapes = shapes_of(kind, network)
    if kind == "text_encoder":
        return {name: (name, shape) for name, shape in shapes.items()}
    config = network.config
    if kind == "vae":
        count = len(config.block_out_channels)
        return {name: (names.vae_name(name, count), shape) for name, shape in shapes.items()}
    attended = ["CrossAttn" in block for block in config.up_block_types]
    layers = config.layers_per_block
    return {
        name: (names.unet_name(name, layers, attended), shape) for name, shape in shapes.items()
    }


def shapes_of(kind: NetworkKind, network: Any) -> dict[str, tuple[int, ...]]:
    """Name in SD1.5's folder -> shape of each weight of a network."""
    prefix = PREFIX if kind == "text_encoder" else ""
    return {prefix + name: tuple(value.shape) for name, value in network.state_dict().items()}


def full_config(kind: NetworkKind, network: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json should say: all of it, where SD1.5's constants leave out the defaults."""
    if kind == "text_encoder":
        return {**network.config.to_dict(), "architectures": ["CLIPTextModel"]}
    told = {name: value for name, value in network.config.items() if not name.startswith("_")}
    return {"_class_name": type(network).__name__, **told, **given}


def network_of(
    kind: NetworkKind, config: Mapping[str, Any], tensors: dict[str, LazyTensor], source: str
) -> Network:
    """A part under diffusers' or transformers' own names, old or new."""
    if kind == "text_encoder":
        if not any(name.startswith(PREFIX) for name in tensors):
            tensors = {PREFIX + name: stored for name, stored in tensors.items()}
        tensors = {name: it for name, it in tensors.items() if not name.startswith(_BESIDE)}
        length = tensors.get(POSITIONS)
        if length is not None:  # LongCLIP's 248, where only the file is given
            config = {**config, "max_position_embeddings": length.shape[0]}
    if kind == "vae":
        shapes = shapes_of(kind, empty_network(kind, config))
        modern = {names.modern_vae_name(name): stored for name, stored in tensors.items()}
        tensors = {  # the sdxl-vae of 2023 has 1x1 convolutions where diffusers has matrices
            name: it.reshaped(*shapes[name]) if it.shape[:2] == shapes.get(name) else it
            for name, it in modern.items()
        }
    return Network(kind, dict(config), tensors, source)


def network_in_folder(kind: NetworkKind, folder: Path, source: str) -> Network:
    """A part in a folder of its own, with its config.json."""
    return network_of(kind, read_config(kind, folder), _weights(folder, source), str(folder))


def _weights(folder: Path, source: str) -> dict[str, LazyTensor]:
    """Of a folder of diffusers or transformers: one file or several, fp16 or a pickle at last."""
    for stem in ("diffusion_pytorch_model", "model"):
        index = folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            told = read_json(index)
            files = set(told["weight_map"].values()) if not misfit(told, INDEX) else set()
            if not files or any(Path(file).name != file for file in files):
                raise UserError(f"{index} lists no files of its folder; give a whole model")
            return {
                k: v for file in sorted(files) for k, v in open_tensors(folder / file)[0].items()
            }
        for end in (".safetensors", ".fp16.safetensors", ".bin"):
            path = folder / (("pytorch_model" if end == ".bin" and stem == "model" else stem) + end)
            if path.is_file():
                return open_tensors(path)[0]
    raise UserError(f"{source} holds no weights in {folder}; give a whole model")


def read_config(kind: NetworkKind, folder: Path) -> dict[str, Any]:
    """The config.json of a part. Raises UserError where it is missing, or another class's."""
    config = read_json(folder / "config.json")
    if kind == "text_encoder" and isinstance(config.get("text_config"), dict):  # of a whole CLIP
        config = {**config["text_config"], "architectures": ["CLIPTextModel"]}
    return checked_config(kind, config, str(folder))


def class_name_in(kind: NetworkKind, config: Mapping[str, Any]) -> Any:
    """What a config says that it is of; where it does not, the part's own class, but no VAE's."""
    named = config.get("_class_name", None if kind == "vae" else CLASSES_OF[kind][0])
    return config.get("model_type", named) if kind == "text_encoder" else named


def checked_config(kind: NetworkKind, config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A part's config without what could have a library load other code than its own.

    Raises UserError for another class than the part's, and for numbers that no such network has.
    """
    what = kind.replace("_", " ")
    named = class_name_in(kind, config)
    if named not in CLASSES_OF[kind]:
        raise UserError(
            f"{where} holds a {named}, which is no {what.replace('vae', 'VAE')} known here; give "
            f"an {' or '.join(CLASSES_OF[kind])}"
        )
    return plain_config(config, f"{where} has a {what}")


def read_latents_json(path: Path) -> dict[str, Any]:
    """A run's latents.json. Raises UserError where it is missing or damaged."""
    told = read_json(path)
    if why := misfit(told, LATENTS_JSON):
        raise UserError(f"{path} is not as a run writes it: {why}; it is damaged or no run's")
    if len(told["shift"]) != len(told["scale"]) or 0 in told["scale"]:
        raise UserError(f"{path} has no scale for each channel; it is damaged or no run's")
    return told


def read_json(path: Path) -> dict[str, Any]:
    """A model's JSON file. Raises UserError where it is missing or damaged."""
    try:
        return load_object(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot load the model: {path} is missing or damaged ({error}); give a whole model"
        ) from error


def check_shapes(part: Network) -> None:
    """Raises UserError where names or shapes are not those of the part's config."""
    network = empty_network(part.kind, part.config)
    shapes = shapes_of(part.kind, network)
    what = type(network).__name__
    weights = sum(math.prod(shape) for shape in shapes.values())
    if weights > MOST_WEIGHTS:
        raise UserError(
            f"{part.source} has {weights / 1e9:.3g} billion weights, and SD1.5's largest part has "
            f"0.86; give an SD1.5"
        )
    missing = sorted(shapes.keys() - part.tensors.keys())
    if missing:
        raise UserError(
            f"{part.source} lacks {len(missing)} weights, {missing[0]} among them; give a whole "
            f"model"
        )
    for name, stored in part.tensors.items():
        if stored.shape != shapes.get(name):
            there = f"of shape {shapes[name]}" if name in shapes else "unknown"
            raise UserError(
                f"{part.source} does not fit this model's {what}: {name} has shape "
                f"{stored.shape} and is {there} there; it belongs to another model, or is damaged"
            )
