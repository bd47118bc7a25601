"""Load a model into memory: `load_model` for anyone, `load_bundle` for training on a store."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from transformers import CLIPTokenizer

from xlsd_cache.encoding.compatibility import check_encoder, load_vae_for
from xlsd_cache.encoding.vae import Vae, load_vae
from xlsd_cache.errors import UserError, one_line
from xlsd_cache.store.reader import Identity
from xlsd_cache.vocabulary import Padding
from xlsd_train.config.sd15 import HUB_ID
from xlsd_train.model.bundle import ModelBundle
from xlsd_train.model.latent_scaling import load_scaling, vae_scaling
from xlsd_train.model.text_encoder import stretch
from xlsd_train.runs.layout import BASE, run_of
from xlsd_train.weights.locate import fetch_missing, locate_model
from xlsd_train.weights.network import Network, build_network
from xlsd_train.weights.parts import ModelParts


def load_model(
    source: str | Path,
    *,
    unet: str | Path | None = None,
    text_encoder: str | Path | None = None,
    tokenizer: str | Path | None = None,
    vae: str | Path | None = None,
    model_ema: bool = False,
) -> ModelBundle:
    """Load a model: its UNet, text encoder, VAE and tokenizer.

    Args:
        source: a run (its newest checkpoint), a checkpoint, a pipeline folder, a single file or a
            hub id.
        unet: replaces the model's UNet: a folder, file or run.
        text_encoder: replaces its text encoder: a hub id, folder, file or run.
        tokenizer: replaces its tokenizer: a folder with vocab.json and merges.txt.
        vae: replaces its VAE: a short name such as `sdxl`, a hub id, a folder or a file.
        model_ema: take the UNet's moving averages from a single file that has both.

    Returns:
        The networks in `unet`, `text_encoder` and `vae.model`: float32, on the CPU, in evaluation
        mode. `scaling` maps raw latents [B, C, H/8, W/8] to the UNet's input and back; `encode`
        maps token ids, int64 [B, tokens], to its conditioning, float32 [B, tokens, width].

    Raises:
        UserError: there is no such model, or a part is missing, damaged, or does not fit.

    """
    text = {"unet": unet, "text_encoder": text_encoder, "tokenizer": tokenizer}
    given = {name: None if value is None else str(value) for name, value in text.items()}
    parts = locate_model(str(source), **given, ema=model_ema, vae=vae is None)
    if vae is not None:
        padding = parts.vae_padding or "zeros"
        return assemble(parts, load_vae(str(vae), padding=padding))
    if parts.vae is None:
        raise UserError(
            f"{source} holds no VAE; give one as --vae, e.g. sdxl, or sd for SD1.5's own"
        )
    return assemble(parts, model_vae(parts.source, parts.vae, parts.vae_padding))


def load_bundle(
    source: str | None,
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
    """Load the model to train on the stores `roots`, which have this identity.

    The VAE is `vae_spec`, or `source`'s own, or the store's if neither is given; its encoder must
    be the store's. `tokens` stretches a text encoder with a shorter context. Raises UserError if
    there is no such model, it is not SD1.5-like, or its VAE cannot decode the store.
    """
    own_vae = source is not None and vae_spec is None
    parts = locate_model(
        source or HUB_ID,
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
            f"{stores[1]:g}); correct its config.json, or give the right VAE as --vae"
        )
    return assemble(parts, vae, tokens)


def assemble(parts: ModelParts, vae: Vae, tokens: int | None = None) -> ModelBundle:
    """Read the weights of a model's parts. Raises UserError if a part cannot be loaded."""
    parts = fetch_missing(parts)
    assert parts.text_encoder is not None
    assert parts.tokenizer is not None
    try:
        tokenizer = CLIPTokenizer.from_pretrained(
            parts.tokenizer, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the library raises errors of any kind for damaged files
        raise UserError(
            f"cannot load the model {parts.source}: its tokenizer {parts.tokenizer} fails: "
            f"{one_line(error, 300)}; give a folder with vocab.json and merges.txt as --tokenizer"
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
            f"the tokenizer {parts.tokenizer} has {len(tokenizer)} tokens and the text encoder "
            f"{parts.text_encoder.source} only {known}; give the text encoder's own as --tokenizer"
        )
    if tokens is not None:
        stretch(text_encoder, tokens)
    # Diffusers' pipelines truncate prompts to the tokenizer's length: 77, whatever the encoder's.
    tokenizer.model_max_length = text_encoder.config.max_position_embeddings
    return ModelBundle(
        unet=unet, text_encoder=text_encoder, source=parts.source, scaling=scaling,
        clip_skip=parts.clip_skip, vae=vae, tokenizer=tokenizer, scheduler_config=parts.scheduler,
        tokenizer_folder=parts.tokenizer,
    )  # fmt: skip


def model_vae(source: str, network: Network, padding: Padding | None = None) -> Vae:
    """A model's own VAE."""
    module = build_network(network).requires_grad_(False)
    return Vae.of(source, network.source, module, padding or "zeros")


def _own_vae(parts: ModelParts, network: Network, identity: Identity, roots: Sequence[Path]) -> Vae:
    """The model's own VAE. Raises UserError if its encoder or padding is not the store's."""
    if parts.vae_padding not in (None, identity.vae_padding):
        raise UserError(
            f"{parts.source} was trained on latents of a VAE that pads with {parts.vae_padding}, "
            f"and the store was encoded with {identity.vae_padding}; give another --data or --model"
        )
    vae = model_vae(parts.source, network, identity.vae_padding)
    try:
        check_encoder(vae, identity, roots)
    except UserError as error:
        raise UserError(
            f"{error}; its scaling factor is {vae.scaling_factor:g} and the store's "
            f"{identity.scaling_factor:g}: add --vae {identity.vae_name} to swap that one in, or "
            f"give another --data"
        ) from error
    return vae
