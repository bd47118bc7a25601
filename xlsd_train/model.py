"""The model as training has it: UNet, text encoder, VAE, tokenizer; what of it trains."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import Parameter
from transformers import CLIPTokenizer

from xlsd_cache import UserError
from xlsd_cache.store import Identity
from xlsd_cache.vae import Vae, tensors_sha256, vae_of
from xlsd_train.config import Phase
from xlsd_train.find import TEXT_ENCODER, UNET, Parts, completed, find
from xlsd_train.network import PREFIX, Part, build
from xlsd_train.sd15 import HUB_ID


@dataclass
class Model:
    """The parts, fp32 on the CPU until they are moved."""

    unet: Any  # UNet2DConditionModel
    text_encoder: Any  # CLIPTextModel
    vae: Vae
    tokenizer: Any  # CLIPTokenizer
    scheduler_config: dict[str, Any]
    source: str  # as it was asked for
    tokenizer_folder: Path

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
        shutil.copytree(self.tokenizer_folder, folder / "tokenizer")
        (folder / "scheduler").mkdir()
        scheduler = json.dumps(self.scheduler_config, indent=2) + "\n"
        (folder / "scheduler" / "scheduler_config.json").write_text(scheduler)
        self.unet.save_config(folder / "unet")
        self.text_encoder.config.save_pretrained(folder / "text_encoder")
        self.vae.model.save_pretrained(folder / "vae")
        if phase == "te":
            save_file(self.weights("unet"), folder / UNET, {"format": "pt"})
        if phase == "unet":
            save_file(self.weights("text_encoder"), folder / TEXT_ENCODER, {"format": "pt"})


def load_model(
    spec: str | None,
    vae_spec: str | None,
    identity: Identity,
    *,
    unet: str | None = None,
    text_encoder: str | None = None,
    tokenizer: str | None = None,
    ema: bool = False,
) -> Model:
    """The model of `--model` and `--vae`, with parts of it replaced, its VAE the store's.

    Raises UserError where there is none, it is no SD1.5-like model, or cannot decode the store.
    """
    own_vae = spec is not None and vae_spec is None
    parts = find(
        spec or HUB_ID,
        unet=unet,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        ema=ema,
        vae=own_vae,
    )
    channels = parts.unet.tensors["conv_in.weight"].shape[1]
    if channels != identity.channels:
        raise UserError(
            f"the UNet of {parts.source} takes {channels} latent channels and the store holds "
            f"{identity.channels}; give another --model or --data"
        )
    if own_vae and parts.vae is not None:
        return assemble(parts, _store_vae(parts.source, parts.vae, identity))
    return assemble(parts, vae_of(identity, vae_spec))


def assemble(parts: Parts, vae: Vae) -> Model:
    """The model with its weights read. Raises UserError where a part is not to be had."""
    parts = completed(parts)
    assert parts.text_encoder is not None
    assert parts.tokenizer is not None
    try:
        tokenizer = CLIPTokenizer.from_pretrained(parts.tokenizer)
    except (OSError, ValueError, KeyError, TypeError) as error:
        told = " ".join(str(error).split())[:300]
        raise UserError(
            f"cannot load the model {parts.source}: its tokenizer, {parts.tokenizer}, fails: "
            f"{told}; name a folder with vocab.json and merges.txt as --tokenizer"
        ) from error
    unet, text_encoder = build(parts.unet), build(parts.text_encoder)
    # Diffusers' pipelines cut prompts to what the tokenizer says, which is 77 whatever reads them.
    tokenizer.model_max_length = text_encoder.config.max_position_embeddings
    return Model(unet, text_encoder, vae, tokenizer, parts.scheduler, parts.source, parts.tokenizer)


def model_vae(source: str, part: Part) -> Vae:
    """A model's own VAE."""
    model = build(part).requires_grad_(False)
    return Vae(source, part.source, model, tensors_sha256(model.state_dict()))


def _store_vae(source: str, part: Part, identity: Identity) -> Vae:
    """The model's own VAE, which must be the store's."""
    vae = model_vae(source, part)
    if vae.sha256 != identity.vae_sha256:
        raise UserError(
            f"{source} has the VAE {vae.sha256[:12]} (scaling factor {vae.scaling_factor:g}), and "
            f"the store was encoded with {identity.vae_name}, {identity.vae_sha256[:12]} (scaling "
            f"factor {identity.scaling_factor:g}), whose latents it cannot decode; add --vae "
            f"{identity.vae_name} to swap that one in, or give another --data"
        )
    return vae
