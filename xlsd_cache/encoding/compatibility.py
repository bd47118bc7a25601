"""Checks that a VAE fits a store's latents: its encoder and padding must match, not its decoder."""

import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from xlsd_cache.encoding.vae import NAMES, Vae, load_vae
from xlsd_cache.errors import UserError
from xlsd_cache.store.identity import (
    Identity,
    is_store,
    read_attributes,
    record_encoder,
    unknown_encoder,
)

log = logging.getLogger("xlsd.cache.encoding")

# Trained with reflection padding, by their model cards: Anzhc's EQ-VAEs and their derivatives.
REFLECT = re.compile(r"MS-LC-EQ|EQ-?B\d|Noobai11-?EQ|Pad.*\bEQ|NoobAI.*EQ-?VAE", re.IGNORECASE)
EQ_VAE = re.compile(r"\bEQ[-_ ]?(SDXL[-_ ]?)?VAE", re.IGNORECASE)  # of the others, some may be


def load_vae_for(identity: Identity, spec: str | None = None, roots: Sequence[Path] = ()) -> Vae:
    """Load a VAE for the latents of the stores in `roots`: `spec`, or the one that encoded them.

    Raises UserError where it cannot be loaded or has another encoder.
    """
    try:
        vae = load_vae(
            spec or _source(identity), identity.scaling_factor, padding=identity.vae_padding
        )
    except UserError as error:
        if spec is not None:
            raise
        raise UserError(
            f"cannot load the VAE that encoded {_names(roots)}: {error}; give it, or a VAE with "
            f"the same encoder, as --vae"
        ) from error
    check_encoder(vae, identity, roots)
    return vae


def identity_of(vae: Vae, **settings: Any) -> Identity:
    """Identity of latents that this VAE encoded; `settings` are the fields that it does not set."""
    return Identity(
        vae_name=vae.name,
        vae_source=vae.source,
        vae_class=vae.class_name,
        vae_sha256=vae.sha256,
        scaling_factor=vae.scaling_factor,
        shift_factor=vae.shift_factor,
        channels=vae.channels,
        vae_padding=vae.padding,
        encoder_sha256=vae.encoder_sha256,
        **settings,
    )


def check_encoder(vae: Vae, identity: Identity, roots: Sequence[Path]) -> None:
    """Raise UserError where the VAE's encoder is not the stores', or that cannot be decided.

    The padding is not checked.
    """
    identity = with_encoder_hash(identity, vae, roots)
    same = identity.encoder_is(vae.sha256, vae.encoder_sha256)
    if same is None:
        raise UserError(unknown_encoder(_names(roots), identity, vae.name, vae.sha256))
    if not same:
        ours = identity.encoder_sha256 or identity.vae_sha256
        raise UserError(
            f"the VAE {vae.name} does not fit the latents of {_names(roots)}: its encoder half "
            f"(encoder and quant_conv) is {vae.encoder_sha256[:12]}, but they were encoded with "
            f"{identity.vae_name}, {ours[:12]}; give that VAE, or one that differs only in its "
            f"decoder"
        )


def with_encoder_hash(
    identity: Identity, vae: Vae, roots: Iterable[Path], record: bool = True
) -> Identity:
    """The stores' identity with `encoder_sha256` filled in, where it can be.

    Stores of older versions have only the hash of the whole VAE. A VAE of that hash gives the
    encoder's: `vae`, or the original if it is still on this machine. It is then recorded there.
    """
    if identity.encoder_sha256:
        return identity
    known = vae if vae.sha256 == identity.vae_sha256 else original_vae(identity)
    if known is None:
        return identity
    for root in roots if record else ():
        record_encoder(root, known.sha256, known.encoder_sha256)
    return replace(identity, encoder_sha256=known.encoder_sha256)


def original_vae(identity: Identity) -> Vae | None:
    """The VAE that encoded a store, if it is on this machine; nothing is downloaded."""
    try:
        vae = load_vae(_source(identity), identity.scaling_factor, fetching=False)
    except UserError:
        return None
    return vae if vae.sha256 == identity.vae_sha256 else None


def stored_identity(out: Path, vae: Vae, dry_run: bool) -> Identity | None:
    """The identity of the store in `out`, None where there is none.

    Logs a warning for a VAE of doubtful padding, and a note for one with another decoder.
    """
    if warning := padding_warning(vae):
        log.warning(warning)
    if not is_store(out):
        return None
    stored = with_encoder_hash(read_attributes(out)[0], vae, [out], record=not dry_run)
    notice = decoder_notice(vae, stored)
    if notice and stored.encoder_is(vae.sha256, vae.encoder_sha256):
        log.info(notice)
    return stored


def decoder_notice(vae: Vae, identity: Identity) -> str:
    """A sentence for a VAE whose decoder differs from that at encoding; else empty."""
    if vae.sha256 == identity.vae_sha256:
        return ""
    return (
        f"the decoder of {vae.name} is another than that of {identity.vae_name}, which encoded "
        f"these latents; the encoder is the same, so they are valid for both"
    )


def padding_warning(vae: Vae) -> str:
    """A sentence for a zero-padded VAE that by its name was trained with reflection; else empty."""
    name = f"{vae.name} {vae.source} {vae.model.config.get('_name_or_path') or ''}"
    if vae.padding != "zeros" or not (REFLECT.search(name) or EQ_VAE.search(name)):
        return ""
    if REFLECT.search(name):
        reason = "by its name was trained with reflection padding"
    else:
        reason = "is named as an EQ-VAE, some of which were trained with reflection padding"
    return (
        f"the VAE {vae.name} {reason}, but its convolutions are padded with zeros here; if its "
        f"model card says reflection, add --vae-padding reflect"
    )


def _source(identity: Identity) -> str:
    """Where to load the VAE that encoded a store from."""
    return identity.vae_name if identity.vae_name in NAMES else identity.vae_source


def _names(roots: Sequence[Path]) -> str:
    return " ".join(map(str, roots)) or "the store"
