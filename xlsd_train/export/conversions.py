"""Changes to a model's networks for export: another VAE, folded scaling, baked clip skip."""

from dataclasses import replace

import torch

from xlsd_cache.encoding.vae import Vae, load_vae
from xlsd_cache.errors import UserError
from xlsd_train.model.loading import model_vae
from xlsd_train.weights.lazy_tensors import in_memory
from xlsd_train.weights.network import PREFIX, Network, empty_network
from xlsd_train.weights.parts import ModelParts
from xlsd_train.weights.vae_fold import ChannelNormalisation, fold


def with_decoder(parts: ModelParts, spec: str) -> ModelParts:
    """Replace the VAE by one with the same encoder. Raises UserError for another encoder."""
    own = empty_network("vae", vae_in(parts).config).config  # with the defaults of older files
    vae = load_vae(spec, float(own["scaling_factor"]))
    ours, new = (ChannelNormalisation.of(config) for config in (own, vae.model.config))
    if not has_encoder(parts, vae) or ours != new:
        raise UserError(
            f"the VAE {spec} has another encoder half (encoder and quant_conv) or scaling factor "
            f"than the one that {parts.source} was trained with; give one with another decoder "
            f"only, or swap it in with `xlsd-train swap` and train"
        )
    return replace(parts, vae=vae_part(vae))


def vae_part(vae: Vae) -> Network:
    """A loaded VAE as a network of a model."""
    config = {name: value for name, value in vae.model.config.items() if not name.startswith("_")}
    tensors = {name: in_memory(value) for name, value in vae.model.state_dict().items()}
    return Network("vae", {"_class_name": vae.class_name, **config}, tensors, vae.source)


def has_encoder(parts: ModelParts, vae: Vae) -> bool:
    """Whether the model's own VAE has the same encoder as this one."""
    return model_vae(parts.source, vae_in(parts)).encoder_sha256 == vae.encoder_sha256


def vae_in(parts: ModelParts) -> Network:
    """The model's VAE. Raises UserError if it has none."""
    if parts.vae is None:
        raise UserError(
            f"{parts.source} holds no VAE; add one with `xlsd-train swap NEW --model "
            f"{parts.source} --vae sd`, or sdxl if it was trained with that"
        )
    return parts.vae


def bake_clip_skip(parts: ModelParts) -> ModelParts:
    """Bake clip skip into the text encoder: zero its last layers' output projections.

    A layer only adds its attention's and its feed-forward's projections to its input. Without them
    it is the identity, so programs without clip skip get the states used in training.
    """
    encoder = parts.text_encoder
    assert encoder is not None
    layers = int(encoder.config["num_hidden_layers"])
    last = range(layers - parts.clip_skip, layers)
    ends = (
        "self_attn.out_proj.weight",
        "self_attn.out_proj.bias",
        "mlp.fc2.weight",
        "mlp.fc2.bias",
    )
    names = [f"{PREFIX}encoder.layers.{layer}.{end}" for layer in last for end in ends]
    zeros = {name: in_memory(torch.zeros(encoder.tensors[name].shape)) for name in names}
    tensors = {**encoder.tensors, **zeros}
    return replace(parts, text_encoder=replace(encoder, tensors=tensors))


def fold_vae(
    vae: Network, factor: float | None = None, trained: ChannelNormalisation | None = None
) -> tuple[Network, str]:
    """The VAE for programs that only scale by `factor`, and a sentence on what was folded.

    By default `factor` is the VAE's own, and it was `trained` with that. Raises UserError for a VAE
    that cannot be folded.
    """
    config = empty_network("vae", vae.config).config  # with the defaults that older files rely on
    own = float(config["scaling_factor"])
    what = "normalisation of each channel" if trained else f"scaling factor {own:g}"
    trained = trained or ChannelNormalisation.of(config)
    factor = own if factor is None else factor
    if trained.is_factor(factor):
        return vae, f"The VAE is unchanged: its scaling factor is {factor:g}."
    if vae.config.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
        raise UserError(
            f"{vae.source} is an {vae.config['_class_name']}, into which no scaling factor can be "
            f"folded; export with --format diffusers and without --scaling-factor"
        )
    weights = {name: vae.tensors[name].read() for name in vae.tensors if "quant_conv" in name}
    folded = {name: in_memory(value) for name, value in fold(weights, trained, factor).items()}
    sentence = (
        f"The VAE's {what} is folded into its quant_conv and post_quant_conv, so that the factor "
        f"{factor:g} is right for it."
    )
    changed = {**vae.config, "scaling_factor": factor, "shift_factor": None}
    return replace(vae, config=changed, tensors={**vae.tensors, **folded}), sentence
