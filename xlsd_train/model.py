"""The model in parts: UNet, text encoder, VAE, tokenizer; where they come from and what trains.

`--model` names a pipeline folder, a hub id, or what we trained before. A checkpoint of ours holds
the UNet's and the text encoder's weights; everything else lies once in its run's `base/`.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Parameter
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from xlsd_cache import UserError
from xlsd_cache.durable import write_json
from xlsd_cache.store import Identity
from xlsd_cache.vae import Vae, load_vae, tensors_sha256, vae_of
from xlsd_train.config import Phase
from xlsd_train.latents import Scaling, load_scaling, save_scaling

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
# Of the hub's folder only what is used: no fp16 copies, no pickles.
FILES = (
    "model_index.json scheduler/*.json tokenizer/* text_encoder/config.json "
    "text_encoder/model.safetensors unet/config.json unet/diffusion_pytorch_model*.safetensors"
)
UNET, TEXT_ENCODER = "unet.safetensors", "text_encoder.safetensors"  # in a checkpoint
# transformers 5 drops this from its names; SD1.5's file and every other program have it.
PREFIX = "text_model."


@dataclass
class Model:
    """The parts, fp32 on the CPU until they are moved."""

    unet: Any  # UNet2DConditionModel
    text_encoder: Any  # CLIPTextModel
    vae: Vae
    tokenizer: Any  # CLIPTokenizer
    scheduler_config: dict[str, Any]
    source: str  # as it was asked for
    folder: Path  # with tokenizer/ and scheduler/ in it
    scaling: Scaling  # between raw latents and what the UNet sees

    @property
    def tokens(self) -> int:
        """Length of the text encoder's input: 77 for CLIP-L."""
        return int(self.text_encoder.config.max_position_embeddings)

    def prepare(self, phase: Phase, gradient_checkpointing: bool) -> dict[str, Parameter]:
        """Freeze what does not train; returns what does, by name.

        A frozen UNet stays in training mode: in eval mode diffusers drops gradient checkpointing,
        and the TE phase differentiates through it. Dropout would be random state that no resume
        restores, so there must be none.
        """
        trains = {"unet": phase != "te", "text_encoder": phase != "unet"}
        named: dict[str, Parameter] = {}
        for name, trained in trains.items():
            module = getattr(self, name)
            module.requires_grad_(trained).train()
            if trained:
                named |= {f"{name}.{key}": value for key, value in module.named_parameters()}
        modules = (*self.unet.modules(), *self.text_encoder.modules())
        rates = [module.p for module in modules if isinstance(module, torch.nn.Dropout)]
        if any((*rates, self.text_encoder.config.attention_dropout)):
            raise UserError(
                f"{self.source} has dropout; set it to 0 in its unet/config.json and "
                f"text_encoder/config.json, for a run with it could not be resumed exactly"
            )
        if gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
            if trains["text_encoder"]:
                encoder = self.text_encoder
                old = encoder.gradient_checkpointing_enable  # its name until transformers 5.x
                getattr(encoder, "activation_checkpointing_enable", old)({"use_reentrant": False})
        return named

    def sha256(self) -> dict[str, str]:
        """Hashes of the weights of each part."""
        return {
            "unet": tensors_sha256(self.unet.state_dict()),
            "text_encoder": tensors_sha256(self.text_encoder.state_dict()),
            "vae": self.vae.sha256,
        }

    def weights(self, name: str) -> dict[str, Tensor]:
        """The weights of `unet` or `text_encoder` under the names that SD1.5's files have."""
        state = {key: value.contiguous() for key, value in getattr(self, name).state_dict().items()}
        return {PREFIX + key: v for key, v in state.items()} if name == "text_encoder" else state

    def save_base(self, folder: Path, phase: Phase) -> None:
        """Everything that training does not change: a pipeline without its trained weights."""
        shutil.copytree(self.folder / "tokenizer", folder / "tokenizer")
        (folder / "scheduler").mkdir()
        write_json(folder / "scheduler" / "scheduler_config.json", self.scheduler_config)
        save_scaling(self.scaling, self.vae, folder)
        self.unet.save_config(folder / "unet")
        self.text_encoder.config.save_pretrained(folder / "text_encoder")
        self.vae.model.save_pretrained(folder / "vae")
        if phase == "te":
            save_file(self.weights("unet"), folder / UNET, {"format": "pt"})
        if phase == "unet":
            save_file(self.weights("text_encoder"), folder / TEXT_ENCODER, {"format": "pt"})


def load_model(spec: str | None, vae_spec: str | None, identity: Identity) -> Model:
    """The model named by `--model` and `--vae`, its VAE checked to be the store's.

    Raises UserError where there is none, it is no SD1.5-like pipeline, or cannot decode the store.
    """
    source = spec or SD15
    folder, checkpoint = _locate(source)
    try:
        if checkpoint is not None:
            unet, text_encoder = _from_checkpoint(folder, checkpoint)
        else:
            unet, text_encoder = _from_pipeline(folder, source)
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        scheduler_config = dict(DDPMScheduler.load_config(folder, subfolder="scheduler"))
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, TypeError) as error:
        told = " ".join(str(error).split())[:300]
        raise UserError(
            f"cannot load the model {source}: {told}; give an SD1.5 pipeline folder, hub id or "
            f"checkpoint as --model"
        ) from error
    channels = unet.config.in_channels
    if channels != identity.channels:
        raise UserError(
            f"the UNet of {source} takes {channels} latent channels and the store holds "
            f"{identity.channels}; give another --model or --data"
        )
    vae = _vae(source, spec, vae_spec, folder, identity)
    scaling = load_scaling(source, folder, vae)
    return Model(unet, text_encoder, vae, tokenizer, scheduler_config, source, folder, scaling)


def _vae(
    source: str, spec: str | None, vae_spec: str | None, folder: Path, identity: Identity
) -> Vae:
    """The model's own VAE, or the one swapped in; either must be the store's."""
    if vae_spec is not None or spec is None:
        return vae_of(identity, vae_spec)
    if not (folder / "vae").is_dir():  # a hub id, of which the VAE was not fetched so far
        _fetch(source, ("vae/config.json", "vae/diffusion_pytorch_model.safetensors"))
    vae = load_vae(str(folder), subfolder="vae")
    if vae.sha256 != identity.vae_sha256:
        raise UserError(
            f"{source} has the VAE {vae.sha256[:12]} (scaling factor {vae.scaling_factor:g}), and "
            f"the store was encoded with {identity.vae_name}, {identity.vae_sha256[:12]} (scaling "
            f"factor {identity.scaling_factor:g}), whose latents it cannot decode; add --vae "
            f"{identity.vae_name} to swap that one in, or give another --data"
        )
    return vae


def _locate(source: str) -> tuple[Path, Path | None]:
    """(pipeline folder or base, checkpoint or None) of a model's name."""
    path = Path(source).expanduser()
    if (path / "checkpoints").is_dir():
        found = sorted((path / "checkpoints").glob("step-*"))
        if not found:
            raise UserError(f"the run {source} has no checkpoint yet; train it further first")
        path = found[-1]
    if (path / "state.json").is_file():
        return path.parent.parent / "base", path
    if path.is_dir():
        if not (path / "unet").is_dir():
            raise UserError(
                f"{source} is no model: it has no unet/ as a pipeline folder and no state.json as "
                f"a checkpoint; name a folder that has"
            )
        return path, None
    if path.exists() or path.is_absolute() or source.count("/") != 1 or source.startswith("."):
        raise UserError(
            f"no model {source}: it is neither a folder that exists nor a hub id ORG/NAME; name a "
            f"pipeline folder, a checkpoint or a hub id"
        )
    return _fetch(source, tuple(FILES.split())), None


def _fetch(source: str, files: tuple[str, ...]) -> Path:
    try:
        return Path(snapshot_download(source, allow_patterns=list(files)))
    except (OSError, ValueError, RuntimeError) as error:  # what the hub's client raises
        told = " ".join(str(error).split())[:200]
        raise UserError(
            f"cannot fetch the model {source} from the hub: {told}; check the name and the "
            f"network, or give a local folder as --model"
        ) from error


def _from_pipeline(folder: Path, source: str) -> tuple[Any, Any]:
    unet, told = UNet2DConditionModel.from_pretrained(
        folder, subfolder="unet", torch_dtype=torch.float32, output_loading_info=True
    )
    missing = list(told["missing_keys"])
    text_encoder, told = CLIPTextModel.from_pretrained(
        folder / "text_encoder", dtype=torch.float32, output_loading_info=True
    )
    missing += list(told["missing_keys"])
    if missing:
        raise UserError(
            f"{source} lacks {len(missing)} weights, {missing[0]} among them; give a whole model"
        )
    return unet, text_encoder


def _from_checkpoint(base: Path, checkpoint: Path) -> tuple[Any, Any]:
    unet = UNet2DConditionModel.from_config(
        UNet2DConditionModel.load_config(base, subfolder="unet")
    )
    text_encoder = CLIPTextModel(CLIPTextConfig.from_pretrained(base / "text_encoder"))
    load_weights(unet, checkpoint / UNET)
    load_weights(text_encoder, checkpoint / TEXT_ENCODER)
    return unet, text_encoder


def load_weights(module: Any, path: Path) -> None:
    """Load a checkpoint's file into a module, every name and shape as it must be.

    Raises UserError where the file is another model's, or is damaged.
    """
    try:
        state = {key.removeprefix(PREFIX): value for key, value in load_file(path).items()}
        module.load_state_dict(state)
    except (OSError, RuntimeError, SafetensorError) as error:
        told = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path} does not fit this model's {type(module).__name__}: {told}; it belongs to "
            f"another model, or is damaged"
        ) from error
