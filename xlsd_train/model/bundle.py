"""A model in memory: UNet, text encoder, VAE and tokenizer; which of its parameters train."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import Parameter

from xlsd_cache.encoding.vae import Vae, tensors_sha256
from xlsd_cache.errors import UserError
from xlsd_cache.runtime.atomic import write_json
from xlsd_train.config.inputs import Phase
from xlsd_train.config.weight_patterns import choose, split
from xlsd_train.model.latent_scaling import LatentScaling, save_scaling
from xlsd_train.model.reinit import reinitialise
from xlsd_train.model.text_encoder import copy_tokenizer, hidden_states, skipped_layers
from xlsd_train.weights.network import PREFIX
from xlsd_train.weights.parts import TEXT_ENCODER, UNET


@dataclass(kw_only=True)
class Networks:
    """What a training step runs: UNet and text encoder."""

    unet: Any  # UNet2DConditionModel
    text_encoder: Any  # CLIPTextModel
    source: str  # as the user gave it
    scaling: LatentScaling  # between raw latents and the UNet's input
    clip_skip: int = 0  # the UNet is conditioned on the states this many layers before the last

    @property
    def tokens(self) -> int:
        """Context length of the text encoder: 77 for CLIP-L."""
        return int(self.text_encoder.config.max_position_embeddings)

    def encode(self, input_ids: Tensor) -> Tensor:  # int64 [B, tokens] -> [B, tokens, width]
        """The UNet's conditioning, the same in training, sampling and validation."""
        return hidden_states(self.text_encoder, input_ids, self.clip_skip)

    def prepare(self, phase: Phase, train: str | None = None) -> dict[str, Parameter]:
        """Freeze what does not train; returns what does, by name: the phase's, or `train` of them.

        Raises UserError for a model with dropout, whose random state no checkpoint restores.
        """
        networks = {"unet": phase != "te", "text_encoder": phase != "unet"}
        named: dict[str, Parameter] = {}
        for name, trained in networks.items():
            module = getattr(self, name)
            module.requires_grad_(trained).train()
            for layer in skipped_layers(self.text_encoder, self.clip_skip):
                layer.requires_grad_(False)  # no gradient reaches them
            if trained:
                parameters = module.named_parameters()
                named |= {f"{name}.{key}": p for key, p in parameters if p.requires_grad}
        if train is not None:
            named = _freeze_others(named, split(train, "--train", phase))
        modules = (*self.unet.modules(), *self.text_encoder.modules())
        rates = [module.p for module in modules if isinstance(module, torch.nn.Dropout)]
        if any((*rates, self.text_encoder.config.attention_dropout)):
            raise UserError(
                f"{self.source} has dropout, with which a run cannot be resumed exactly; set it to "
                f"0 in its unet/config.json and text_encoder/config.json"
            )
        return named

    def reinitialise(self, named: dict[str, Parameter], phase: Phase, only: str, seed: int) -> None:
        """Reinitialise the parameters of `named` that the patterns `only` match."""
        names = choose(named, split(only, "--reinit", phase), "--reinit")
        reinitialise(self.unet, names, seed)


@dataclass(kw_only=True)
class ModelBundle(Networks):
    """A model's networks in fp32, on the CPU until `to` moves them."""

    vae: Vae  # its network is `vae.model`, an AutoencoderKL
    tokenizer: Any  # CLIPTokenizer
    scheduler_config: dict[str, Any]
    tokenizer_folder: Path

    def sha256(self) -> dict[str, str]:
        """SHA-256 of each network's weights."""
        return {
            "unet": tensors_sha256(self.unet.state_dict()),
            "text_encoder": tensors_sha256(self.text_encoder.state_dict()),
            "vae": self.vae.sha256,
        }

    def weights(self, name: str) -> dict[str, Tensor]:
        """The state dict of `unet` or `text_encoder`, with the keys of SD1.5's files."""
        state = {key: value.contiguous() for key, value in getattr(self, name).state_dict().items()}
        return {PREFIX + key: v for key, v in state.items()} if name == "text_encoder" else state

    def to(self, device: torch.device, channels_last: bool) -> None:
        """Move the UNet and the text encoder; the VAE stays where it is."""
        self.unet.to(device)
        if channels_last:
            self.unet.to(memory_format=torch.channels_last)
        self.text_encoder.to(device)
        self.scaling = self.scaling.to(device)

    def save_base(self, folder: Path, phase: Phase) -> None:
        """Write everything that training does not change: a pipeline less the trained weights."""
        copy_tokenizer(self.tokenizer_folder, folder / "tokenizer", self.tokens)
        (folder / "scheduler").mkdir()
        write_json(folder / "scheduler" / "scheduler_config.json", self.scheduler_config)
        write_json(folder / "captions.json", {"clip_skip": self.clip_skip})
        save_scaling(self.scaling, self.vae, folder)
        self.unet.save_config(folder / "unet")
        self.text_encoder.config.save_pretrained(folder / "text_encoder")
        self.vae.model.save_pretrained(folder / "vae")
        if phase == "te":
            save_file(self.weights("unet"), folder / UNET, {"format": "pt"})
        if phase == "unet":
            save_file(self.weights("text_encoder"), folder / TEXT_ENCODER, {"format": "pt"})


def _freeze_others(named: dict[str, Parameter], patterns: list[str]) -> dict[str, Parameter]:
    """Keep those that patterns of SD1.5's keys match; freeze the others."""
    names = {  # the keys in the files, which users see
        name.replace("text_encoder.", f"text_encoder.{PREFIX}", 1): name for name in named
    }
    chosen = {names[name] for name in choose(names, patterns, "--train")}
    for name, parameter in named.items():
        parameter.requires_grad_(name in chosen)
    return {name: parameter for name, parameter in named.items() if name in chosen}
