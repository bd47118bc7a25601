"""Which VAEs fit a store's latents: those with its encoder and padding, whatever their decoder."""

import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from xlsd_cache.encoding.vae import NAMES, Vae, load_vae
from xlsd_cache.errors import UserError
from xlsd_cache.store.identity import Identity, read_attributes, record_encoder, unknown_encoder

log = logging.getLogger("xlsd.cache.encoding")

# Trained with reflection padding, as their pages say: Anzhc's EQ-VAEs and what is trained on them.
REFLECT = re.compile(r"MS-LC-EQ|EQ-?B\d|Noobai11-?EQ|Pad.*\bEQ|NoobAI.*EQ-?VAE", re.IGNORECASE)
EQ_VAE = re.compile(r"\bEQ[-_ ]?(SDXL[-_ ]?)?VAE", re.IGNORECASE)  # some of the others may be


def vae_of(identity: Identity, spec: str | None = None, roots: Sequence[Path] = ()) -> Vae:
    """A VAE for the latents of the stores in `roots`: from where the build found it, or `spec`.

    Raises UserError where it is not to be had or has another encoder.
    """
    try:
        vae = load_vae(
            spec or _named(identity), identity.scaling_factor, padding=identity.vae_padding
        )
    except UserError as error:
        if spec is not None:
            raise
        raise UserError(
            f"the VAE that encoded {_told(roots)} is not where it was: {error}; give it, or one "
            f"with its encoder, as --vae"
        ) from error
    refuse_other_encoder(vae, identity, roots)
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


def refuse_other_encoder(vae: Vae, identity: Identity, roots: Sequence[Path]) -> None:
    """Raises UserError unless the VAE has the encoder of the stores' latents, or may not be known.

    What padding the VAE has is the caller's concern.
    """
    identity = proved(identity, vae, roots)
    same = identity.encoder_is(vae.sha256, vae.encoder_sha256)
    if same is None:
        raise UserError(unknown_encoder(_told(roots), identity, vae.name, vae.sha256))
    if not same:
        ours = identity.encoder_sha256 or identity.vae_sha256
        raise UserError(
            f"the VAE {vae.name} is not for the latents of {_told(roots)}: its encoder half "
            f"(encoder and quant_conv) is {vae.encoder_sha256[:12]}, and they were encoded with "
            f"{identity.vae_name}, {ours[:12]}; give that one, or one whose decoder alone differs"
        )


def proved(identity: Identity, vae: Vae, roots: Iterable[Path], record: bool = True) -> Identity:
    """The stores' identity with the hash of its encoder, if that is known or can be proved.

    It is proved by a VAE whose whole hash the stores have: this one, or the one that encoded them
    where it still lies there or in the hub's cache. Then it is recorded in the stores.
    """
    if identity.encoder_sha256:
        return identity
    known = vae if vae.sha256 == identity.vae_sha256 else original(identity)
    if known is None:
        return identity
    for root in roots if record else ():
        record_encoder(root, known.sha256, known.encoder_sha256)
    return replace(identity, encoder_sha256=known.encoder_sha256)


def original(identity: Identity) -> Vae | None:
    """The very VAE that encoded a store, if it is on this machine."""
    try:
        vae = load_vae(_named(identity), identity.scaling_factor, fetching=False)
    except UserError:
        return None
    return vae if vae.sha256 == identity.vae_sha256 else None


def stored_identity(out: Path, vae: Vae, dry_run: bool) -> Identity | None:
    """That of the store which this VAE is to add to, if there is one; says what a user may miss."""
    if warning := padding_warning(vae):
        log.warning(warning)
    if not (out / "latents.zarr" / "zarr.json").exists():
        return None
    stored = proved(read_attributes(out)[0], vae, [out], record=not dry_run)
    if stored.encoder_is(vae.sha256, vae.encoder_sha256) and (told := decoder_told(vae, stored)):
        log.info(told)
    return stored


def decoder_told(vae: Vae, identity: Identity) -> str:
    """What is to be said where the decoder is another than at encoding; else empty."""
    if vae.sha256 == identity.vae_sha256:
        return ""
    return (
        f"the decoder of {vae.name} is another than that of {identity.vae_name}, which encoded "
        f"these latents; the encoder is the same, so they are valid for both"
    )


def padding_warning(vae: Vae) -> str:
    """Where zeros pad a VAE that by its name was trained with reflection; else empty."""
    name = f"{vae.name} {vae.source} {vae.model.config.get('_name_or_path') or ''}"
    if vae.padding != "zeros" or not (REFLECT.search(name) or EQ_VAE.search(name)):
        return ""
    if REFLECT.search(name):
        told = "by its name was trained with reflection padding"
    else:
        told = "is named as an EQ-VAE, some of which were trained with reflection padding"
    return (
        f"the VAE {vae.name} {told}, and its convolutions are padded with zeros here: "
        f"if its page says so, add --vae-padding reflect"
    )


def _named(identity: Identity) -> str:
    """Where the VAE that encoded a store should be."""
    return identity.vae_name if identity.vae_name in NAMES else identity.vae_source


def _told(roots: Sequence[Path]) -> str:
    return " ".join(map(str, roots)) or "the store"
