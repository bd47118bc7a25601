"""The model as training has it: UNet, text encoder, VAE, tokenizer; what of it trains."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import Parameter
from transformers import CLIPTokenizer

from xlsd_cache.encoding.compatibility import check_encoder, load_vae_for
from xlsd_cache.encoding.vae import Vae, tensors_sha256
from xlsd_cache.errors import UserError, one_line
from xlsd_cache.runtime.atomic import write_json
from xlsd_cache.store.reader import Identity
from xlsd_cache.vocabulary import Padding
from xlsd_train.config.inputs import Phase
from xlsd_train.config.sd15 import HUB_ID
from xlsd_train.config.weight_patterns import choose, split
from xlsd_train.model.latent_scaling import LatentScaling, load_scaling, save_scaling, vae_scaling
from xlsd_train.model.reinit import reinitialise
from xlsd_train.model.text_encoder import copy_tokenizer, hidden_states, skipped_layers, stretch
from xlsd_train.runs.layout import BASE, run_of
from xlsd_train.weights.locate import TEXT_ENCODER, UNET, ModelParts, fetch_missing, locate_model
from xlsd_train.weights.network import PREFIX, Network, build_network


@dataclass
class ModelBundle:
    """The parts, fp32 on the CPU until they are moved."""

    unet: Any  # UNet2DConditionModel
    text_encoder: Any  # CLIPTextModel
    vae: Vae
    tokenizer: Any  # CLIPTokenizer
    scheduler_config: dict[str, Any]
    source: str  # as it was asked for
    tokenizer_folder: Path
    scaling: LatentScaling  # between raw latents and what the UNet sees
    clip_skip: int = 0  # layers before the last whose states the UNet sees

    @property
    def tokens(self) -> int:
        """Length of the text encoder's input: 77 for CLIP-L."""
        return int(self.text_encoder.config.max_position_embeddings)

    def encode(self, input_ids: Tensor) -> Tensor:  # int64 [B, tokens] -> [B, tokens, width]
        """What the UNet sees of captions: in training, samples and validation alike."""
        return hidden_states(self.text_encoder, input_ids, self.clip_skip)

    def prepare(self, phase: Phase, train: str | None = None) -> dict[str, Parameter]:
        """Freeze what does not train; returns what does, by name: of the phase, or `--train` of it.

        Dropout would be random state that no resume restores, so there must be none.
        """
        trains = {"unet": phase != "te", "text_encoder": phase != "unet"}
        named: dict[str, Parameter] = {}
        for name, trained in trains.items():
            module = getattr(self, name)
            module.requires_grad_(trained).train()
            for layer in skipped_layers(self.text_encoder, self.clip_skip):
                layer.requires_grad_(False)  # no gradient reaches them
            if trained:
                parameters = module.named_parameters()
                named |= {f"{name}.{key}": p for key, p in parameters if p.requires_grad}
        if train is not None:
            named = _only(named, split(train, "--train", phase))
        modules = (*self.unet.modules(), *self.text_encoder.modules())
        rates = [module.p for module in modules if isinstance(module, torch.nn.Dropout)]
        if any((*rates, self.text_encoder.config.attention_dropout)):
            raise UserError(
                f"{self.source} has dropout; set it to 0 in its unet/config.json and "
                f"text_encoder/config.json, for a run with it could not be resumed exactly"
            )
        return named

    def reinitialise(self, named: dict[str, Parameter], phase: Phase, only: str, seed: int) -> None:
        """Draw anew the weights of `--reinit` among those that train."""
        names = choose(named, split(only, "--reinit", phase), "--reinit")
        reinitialise(self.unet, names, seed)

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

    def to(self, device: torch.device, channels_last: bool) -> None:
        """What trains and what it is fed through; the VAE stays where it is."""
        self.unet.to(device)
        if channels_last:
            self.unet.to(memory_format=torch.channels_last)
        self.text_encoder.to(device)
        self.scaling = self.scaling.to(device)

    def save_base(self, folder: Path, phase: Phase) -> None:
        """Everything that training does not change: a pipeline without its trained weights."""
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


def _only(named: dict[str, Parameter], patterns: list[str]) -> dict[str, Parameter]:
    """Those that patterns of SD1.5's names choose; the others are frozen."""
    names = {  # as the files have them, which users read
        name.replace("text_encoder.", f"text_encoder.{PREFIX}", 1): name for name in named
    }
    chosen = {names[name] for name in choose(names, patterns, "--train")}
    for name, parameter in named.items():
        parameter.requires_grad_(name in chosen)
    return {name: parameter for name, parameter in named.items() if name in chosen}


def load_bundle(
    spec: str | None,
    vae_spec: str | None,
    identity: Identity,
    *,
    unet: str | None = None,
    text_encoder: str | None = None,
    tokenizer: str | None = None,
    ema: bool = False,
    tokens: int | None = None,
    roots: Sequence[Path] = (),
) -> ModelBundle:
    """The model of `--model` and `--vae`, with parts of it replaced, its VAE's encoder the store's.

    `tokens` stretches a text encoder that reads fewer; `roots` are the stores of that identity.
    Raises UserError where there is none, it is no SD1.5-like model, or cannot decode the store.
    """
    own_vae = spec is not None and vae_spec is None
    parts = locate_model(
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
        vae = _own_vae(parts, parts.vae, identity, roots)
    else:
        vae = load_vae_for(identity, vae_spec, roots)
    ours, stores = ((x.scaling_factor, x.shift_factor) for x in (vae, identity))
    if ours != stores:
        raise UserError(
            f"{vae.source} has the store's encoder by its weights, but its scaling factor is "
            f"{ours[0]:g} (shift {ours[1]:g}), and the store's {stores[0]:g} (shift "
            f"{stores[1]:g}); mend its config.json, or name the right one as --vae"
        )
    return assemble(parts, vae, tokens)


def assemble(parts: ModelParts, vae: Vae, tokens: int | None = None) -> ModelBundle:
    """The model with its weights read. Raises UserError where a part is not to be had."""
    parts = fetch_missing(parts)
    assert parts.text_encoder is not None
    assert parts.tokenizer is not None
    try:
        tokenizer = CLIPTokenizer.from_pretrained(
            parts.tokenizer, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # what damaged files make the library stumble over
        told = one_line(error, 300)
        raise UserError(
            f"cannot load the model {parts.source}: its tokenizer, {parts.tokenizer}, fails: "
            f"{told}; name a folder with vocab.json and merges.txt as --tokenizer"
        ) from error
    if parts.checkpoint is not None:
        base = run_of(parts.checkpoint) / BASE
        assert parts.vae is not None
        scaling = load_scaling(parts.source, base, vae, partial(model_vae, "", parts.vae))
    else:
        scaling = vae_scaling(vae)
    unet, text_encoder = build_network(parts.unet), build_network(parts.text_encoder)
    if len(tokenizer) > (known := text_encoder.config.vocab_size):
        raise UserError(
            f"the tokenizer {parts.tokenizer} has {len(tokenizer)} words and the text encoder "
            f"{parts.text_encoder.source} knows {known}; name the one that belongs to it as "
            f"--tokenizer"
        )
    if tokens is not None:
        stretch(text_encoder, tokens)
    # Diffusers' pipelines cut prompts to what the tokenizer says, which is 77 whatever reads them.
    tokenizer.model_max_length = text_encoder.config.max_position_embeddings
    return ModelBundle(
        unet, text_encoder, vae, tokenizer, parts.scheduler, parts.source, parts.tokenizer,
        scaling, parts.clip_skip,
    )  # fmt: skip


def model_vae(source: str, part: Network, padding: Padding | None = None) -> Vae:
    """A model's own VAE."""
    return Vae.of(
        source, part.source, build_network(part).requires_grad_(False), padding or "zeros"
    )


def _own_vae(parts: ModelParts, part: Network, identity: Identity, roots: Sequence[Path]) -> Vae:
    """The model's own VAE, whose encoder and padding must be the store's."""
    if parts.vae_padding not in (None, identity.vae_padding):
        raise UserError(
            f"{parts.source} was trained on latents of a VAE that pads with {parts.vae_padding}, "
            f"and the store was encoded with {identity.vae_padding}; give another --data or --model"
        )
    vae = model_vae(parts.source, part, identity.vae_padding)
    try:
        check_encoder(vae, identity, roots)
    except UserError as error:
        raise UserError(
            f"{error}; its scaling factor is {vae.scaling_factor:g} and the store's "
            f"{identity.scaling_factor:g}: add --vae {identity.vae_name} to swap that one in, or "
            f"give another --data"
        ) from error
    return vae
