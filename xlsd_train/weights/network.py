"""One network of a model: its config and lazy weights, under the keys of SD1.5's folders.

Reads folders of diffusers and transformers, old and new, and single files with latent-diffusion's
(LDM's) keys. Training loads networks from here and export writes them.
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

from xlsd_cache.encoding.finite import bad_values, is_finite, not_finite
from xlsd_cache.encoding.network_config import plain_config
from xlsd_cache.encoding.vae import CLASSES
from xlsd_cache.errors import UserError, one_line
from xlsd_train.runs.json_files import load_object, misfit
from xlsd_train.runs.layout import is_checkpoint
from xlsd_train.weights import ldm_keys
from xlsd_train.weights.lazy_tensors import LazyTensor, open_tensors

NetworkKind = Literal["unet", "text_encoder", "vae"]
KINDS: tuple[NetworkKind, ...] = get_args(NetworkKind)
CLASSES_OF: dict[NetworkKind, tuple[str, ...]] = {
    "unet": ("UNet2DConditionModel",),
    "text_encoder": ("clip_text_model", "clip", "CLIPTextModel"),
    "vae": tuple(CLASSES),
}
MOST_WEIGHTS = 4 * 10**9  # of a network; SD1.5's UNet has 0.86 billion
INDEX = {"weight_map!": {str: str}}
LATENTS_JSON = {"normalized!": bool, "shift!": [float], "scale!": [float], "vae_sha256": str,
        "encoder_sha256": str, "padding": str}  # fmt: skip
# transformers 5 drops this prefix of its keys; SD1.5's file and every other program have it.
PREFIX = "text_model."
LDM_PREFIX = {"unet": ldm_keys.UNET, "text_encoder": ldm_keys.TEXT_ENCODER, "vae": ldm_keys.VAE}
POSITIONS = f"{PREFIX}embeddings.position_embedding.weight"  # [tokens, width]
# Keys next to the text encoder's in files of a whole CLIP, or of older transformers.
_IGNORED = ("text_model.embeddings.position_ids", "vision_model.", "visual_projection.",
           "text_projection.", "logit_scale")  # fmt: skip


@dataclass(frozen=True)
class Network:
    """A network: its config.json, and its weights under the keys of SD1.5's folder."""

    kind: NetworkKind
    config: dict[str, Any]
    tensors: Mapping[str, LazyTensor]
    source: str  # for messages


def empty_network(kind: NetworkKind, config: Mapping[str, Any]) -> Any:
    """The module of a config, with weights on the meta device: keys and shapes only.

    Raises UserError for a config from which no network can be made.
    """
    try:
        with init_empty_weights(), no_init_weights():  # meta tensors need no initialisation
            if kind == "unet":
                return UNet2DConditionModel.from_config(dict(config))
            if kind == "text_encoder":
                return CLIPTextModel(CLIPTextConfig.from_dict(dict(config)))
            return CLASSES[config.get("_class_name", "AutoencoderKL")].from_config(dict(config))
    except Exception as error:  # the libraries raise errors of any kind for bad values
        why = one_line(error)
        raise UserError(
            f"no network can be made from the {kind.replace('_', ' ')}'s config: {why}; it is "
            f"damaged, or another model's"
        ) from error


def build_network(network: Network) -> Any:
    """The module with its weights, fp32 on the CPU, in evaluation mode.

    Raises UserError if a weight is not finite.
    """
    module = empty_network(network.kind, network.config)
    state = {
        name: tensor.read().to(torch.float32, copy=True) for name, tensor in network.tensors.items()
    }
    if bad := not_finite(state):
        raise _not_finite(network, bad[0], state[bad[0]], len(bad) - 1)
    state = {name.removeprefix(PREFIX): value for name, value in state.items()}
    module.load_state_dict(state, assign=True)
    return module.eval()


def with_finite_check(network: Network) -> Network:
    """The same network, whose weights raise UserError on reading if they are not finite."""

    def read(name: str, tensor: LazyTensor) -> Tensor:
        value = tensor.read()
        if not is_finite(value):
            raise _not_finite(network, name, value)
        return value

    tensors = {
        name: replace(tensor, read=partial(read, name, tensor))
        for name, tensor in network.tensors.items()
    }
    return replace(network, tensors=tensors)


def _not_finite(network: Network, name: str, value: Tensor, others: int = 0) -> UserError:
    """Names the tensor, also by its key in the file, and what to do."""
    key = network.tensors[name].name
    where = f" ({key} in the file)" if key not in ("", name) else ""
    more = f", as do {others} more of its tensors" if others else ""
    checkpoint = Path(network.source).parent
    remedy = "download or make it again, or give another"
    if is_checkpoint(checkpoint):
        remedy = f"remove {checkpoint} to use the checkpoint before it, or give an earlier one"
    return UserError(
        f"{network.source}: {network.kind}'s {name}{where} has {bad_values(value)} that are nan or "
        f"infinite{more}; {remedy}"
    )


def network_in_ldm_file(
    kind: NetworkKind,
    config: Mapping[str, Any],
    tensors: Mapping[str, LazyTensor],
    source: str,
    ema: bool,
) -> Network | None:
    """A network of a single file, or None if the file has no weights of it."""
    prefix = LDM_PREFIX[kind]
    if not any(name.startswith(prefix) for name in tensors):
        return None
    averages = ema and kind == "unet"
    if averages and sum(name.startswith(ldm_keys.EMA) for name in tensors) < 100:
        raise UserError(f"{source} holds no moving averages; leave out --model-ema")
    module = empty_network(kind, config)
    taken = {}
    for name, (key, shape) in ldm_names(kind, module).items():
        keys = [ldm_keys.ema_name(key) if averages else prefix + key]
        if kind == "text_encoder":  # files of 2022 have the keys of an older transformers
            keys.append(prefix + key.removeprefix(PREFIX))
        for present in filter(tensors.__contains__, keys):
            tensor = tensors[present]
            fits = len(tensor.shape) != len(shape) and tensor.shape[: len(shape)] == shape
            taken[name] = tensor.reshaped(*shape) if fits else tensor
    return Network(kind, full_config(kind, module, config), taken, source)


def ldm_names(kind: NetworkKind, module: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Key in SD1.5's folder -> (LDM's key without prefix, shape in the folder) of each weight."""
    shapes = shapes_of(kind, module)
    if kind == "text_encoder":
        return {name: (name, shape) for name, shape in shapes.items()}
    config = module.config
    if kind == "vae":
        blocks = len(config.block_out_channels)
        return {name: (ldm_keys.vae_name(name, blocks), shape) for name, shape in shapes.items()}
    attended = ["CrossAttn" in block for block in config.up_block_types]
    layers = config.layers_per_block
    return {
        name: (ldm_keys.unet_name(name, layers, attended), shape) for name, shape in shapes.items()
    }


def shapes_of(kind: NetworkKind, module: Any) -> dict[str, tuple[int, ...]]:
    """Key in SD1.5's folder -> shape of each weight of a module."""
    prefix = PREFIX if kind == "text_encoder" else ""
    return {prefix + name: tuple(value.shape) for name, value in module.state_dict().items()}


def full_config(kind: NetworkKind, module: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """A complete config.json, with the defaults that SD1.5's constants leave out."""
    if kind == "text_encoder":
        return {**module.config.to_dict(), "architectures": ["CLIPTextModel"]}
    config = {name: value for name, value in module.config.items() if not name.startswith("_")}
    return {"_class_name": type(module).__name__, **config, **given}


def network_of(
    kind: NetworkKind, config: Mapping[str, Any], tensors: dict[str, LazyTensor], source: str
) -> Network:
    """A network with diffusers' or transformers' own keys, old or new."""
    if kind == "text_encoder":
        if not any(name.startswith(PREFIX) for name in tensors):
            tensors = {PREFIX + name: tensor for name, tensor in tensors.items()}
        tensors = {name: it for name, it in tensors.items() if not name.startswith(_IGNORED)}
        positions = tensors.get(POSITIONS)
        if positions is not None:  # LongCLIP's 248, where only the file is given
            config = {**config, "max_position_embeddings": positions.shape[0]}
    if kind == "vae":
        shapes = shapes_of(kind, empty_network(kind, config))
        modern = {ldm_keys.modern_vae_name(name): tensor for name, tensor in tensors.items()}
        tensors = {  # the sdxl-vae of 2023 has 1x1 convolutions where diffusers has matrices
            name: it.reshaped(*shapes[name]) if it.shape[:2] == shapes.get(name) else it
            for name, it in modern.items()
        }
    return Network(kind, dict(config), tensors, source)


def network_in_folder(kind: NetworkKind, folder: Path, source: str) -> Network:
    """A network in its own folder, with its config.json."""
    return network_of(kind, read_config(kind, folder), _weights(folder, source), str(folder))


def _weights(folder: Path, source: str) -> dict[str, LazyTensor]:
    """A folder's weights: shards or one file; fp16, then a pickle, if there is nothing else."""
    for stem in ("diffusion_pytorch_model", "model"):
        path = folder / f"{stem}.safetensors.index.json"
        if path.is_file():
            index = read_json(path)
            files = set(index["weight_map"].values()) if not misfit(index, INDEX) else set()
            if not files or any(Path(file).name != file for file in files):
                raise UserError(f"{path} lists no files of its folder; give a whole model")
            return {
                k: v for file in sorted(files) for k, v in open_tensors(folder / file)[0].items()
            }
        for end in (".safetensors", ".fp16.safetensors", ".bin"):
            path = folder / (("pytorch_model" if end == ".bin" and stem == "model" else stem) + end)
            if path.is_file():
                return open_tensors(path)[0]
    raise UserError(f"{source} has no weights in {folder}; give a whole model")


def read_config(kind: NetworkKind, folder: Path) -> dict[str, Any]:
    """A network's config.json. Raises UserError if it is missing, or another class's."""
    config = read_json(folder / "config.json")
    if kind == "text_encoder" and isinstance(config.get("text_config"), dict):  # a whole CLIP's
        config = {**config["text_config"], "architectures": ["CLIPTextModel"]}
    return checked_config(kind, config, str(folder))


def class_name_in(kind: NetworkKind, config: Mapping[str, Any]) -> Any:
    """The class in a config; by default the network's own, but not for a VAE."""
    name = config.get("_class_name", None if kind == "vae" else CLASSES_OF[kind][0])
    return config.get("model_type", name) if kind == "text_encoder" else name


def checked_config(kind: NetworkKind, config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A network's config without keys that make a library load other code than its own.

    Raises UserError for another network's class, and for numbers that no such network has.
    """
    what = kind.replace("_", " ")
    name = class_name_in(kind, config)
    if name not in CLASSES_OF[kind]:
        raise UserError(
            f"{where} holds a {name}, which is not a supported {what.replace('vae', 'VAE')}; give "
            f"an {' or '.join(CLASSES_OF[kind])}"
        )
    return plain_config(config, f"{where} has a {what}")


def read_latents_json(path: Path) -> dict[str, Any]:
    """A run's latents.json. Raises UserError if it is missing or damaged."""
    record = read_json(path)
    if why := misfit(record, LATENTS_JSON):
        raise UserError(f"{path}: {why}; it is damaged, or not written by a run")
    if len(record["shift"]) != len(record["scale"]) or 0 in record["scale"]:
        raise UserError(f"{path} lacks a channel's scale; it is damaged, or not written by a run")
    return record


def read_json(path: Path, what: str = "model", remedy: str = "a whole model") -> dict[str, Any]:
    """A model's JSON file. Raises UserError if it is missing or damaged."""
    try:
        return load_object(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot load the {what}: {path} is missing or damaged ({error}); give {remedy}"
        ) from error


def check_shapes(network: Network) -> None:
    """Raises UserError if keys or shapes are not those of the network's config."""
    module = empty_network(network.kind, network.config)
    shapes = shapes_of(network.kind, module)
    weights = sum(math.prod(shape) for shape in shapes.values())
    if weights > MOST_WEIGHTS:
        raise UserError(
            f"{network.source} has {weights / 1e9:.3g} billion weights, and SD1.5's largest "
            f"network has 0.86; give an SD1.5"
        )
    missing = sorted(shapes.keys() - network.tensors.keys())
    if missing:
        raise UserError(
            f"{network.source} lacks {len(missing)} weights, e.g. {missing[0]}; give a whole model"
        )
    for name, tensor in network.tensors.items():
        if tensor.shape != shapes.get(name):
            wanted = f"not {shapes[name]}" if name in shapes else "and is unknown"
            raise UserError(
                f"{network.source} does not fit this model's {type(module).__name__}: {name} has "
                f"shape {tensor.shape}, {wanted}; it belongs to another model, or is damaged"
            )
