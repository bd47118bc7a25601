"""Options of what a run starts from: data, captions, the model, and which of its weights train."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from xlsd_cache.console.option_checks import CheckedOptions, Count, Every, Share, Within
from xlsd_cache.errors import UserError
from xlsd_train.config.weight_patterns import split
from xlsd_train.data.caption_edits import CaptionEdits, Shuffle, require_and_forbid, tag_list

Phase = Literal["unet", "te", "both"]
DEFAULT_DATA = ("latents",)


@dataclass(frozen=True, kw_only=True)
class TrainableOptions(CheckedOptions):
    """What trains."""

    phase: Phase = field(kw_only=False)
    """What trains: unet (the text encoder frozen), te (the UNet frozen), or both."""

    train: str | None = None
    """Train only parameters whose name matches, e.g. unet.attn2,unet.conv_in. Default: all."""

    reinit: str | None = None
    """Reinitialise these UNet parameters at the start of the run. Patterns as in --train."""

    def check(self) -> None:
        """Raise UserError for patterns of weights that the phase does not train."""
        if self.train is not None:
            parts = {name.partition(".")[0] for name in split(self.train, "--train", self.phase)}
            if self.phase == "both" and len(parts) == 1:
                raise UserError(
                    f"--train {self.train} selects one network and --phase both trains two; use "
                    f"--phase {'unet' if 'unet' in parts else 'te'}"
                )
        for pattern in split(self.reinit, "--reinit", self.phase) if self.reinit else []:
            if not pattern.startswith("unet"):
                raise UserError(
                    f"--reinit {pattern} is part of the text encoder, which a VAE swap does not "
                    f"affect; leave it out"
                )


@dataclass(frozen=True, kw_only=True)
class DataOptions(CheckedOptions):
    """Data."""

    data: tuple[str, ...] = DEFAULT_DATA
    """Latent stores made by `xlsd-cache build`, e.g. photos:3 cc12m. With a weight of 3, each
    image of a store is used three times per epoch."""

    require_tags: str | None = None
    """Train only on samples that have all of these tags, A,B. Exact match of whole tags."""

    forbid_tags: str | None = None
    """Skip samples that have any of these tags, A,B. Exact match of whole tags."""

    def check(self) -> None:
        """Raise UserError for no store, and for a tag that is both required and forbidden."""
        if not self.data:
            raise UserError("--data names no store; give one or several, or leave it out")
        self.selected_tags()

    def selected_tags(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """(required, forbidden) tags of the samples to train on."""
        return require_and_forbid(self.require_tags, self.forbid_tags)


@dataclass(frozen=True, kw_only=True)
class CaptionOptions(CheckedOptions):
    """Captions."""

    caption: str | None = None
    """Caption column, or a weighted mix: txt=3,jsonl:wd=1. Default: the store's only column."""

    tags: bool = False
    """Treat captions as comma-separated tags and drop duplicates. Implied by other tag options."""

    drop_tags: str | None = None
    """Remove these tags, A,B, from captions. Exact match of whole tags."""

    underscores_to_spaces: bool = False
    """Replace underscores in tags longer than three characters, which keeps faces like ^_^."""

    shuffle: Shuffle = "none"
    """Shuffle a caption's tags, or its sentences (split at full stops), each time it is used."""

    keep_first: Every = 0
    """Keep this many leading tags (or sentences) in place; --tag-dropout spares them too."""

    tag_dropout: Share = 0.0
    """Probability of dropping each tag, 0 to 1."""

    max_tags: Count | None = None
    """Keep at most this many tags, after shuffling. Default: all."""

    caption_dropout: Share = 0.0
    """Probability of an empty caption, 0 to 1, for classifier-free guidance."""

    def check(self) -> None:
        """Raise UserError for edits that do not go together."""
        self.caption_edits()

    def caption_edits(self) -> CaptionEdits | None:
        """How captions are edited; None: not at all.

        Raises UserError for options that do not go together.
        """
        of_tags = {
            "--tags": self.tags,
            "--drop-tags": self.drop_tags is not None,
            "--underscores-to-spaces": self.underscores_to_spaces,
            "--tag-dropout": self.tag_dropout,
            "--max-tags": self.max_tags is not None,
        }
        given = [option for option, value in of_tags.items() if value]
        if self.shuffle == "sentences" and given:
            raise UserError(
                f"--shuffle sentences does not go with {given[0]}, which edits tags; use --shuffle "
                f"tags, or leave {given[0]} out"
            )
        edits = CaptionEdits(
            sentences=self.shuffle == "sentences",
            drop=frozenset(tag_list("--drop-tags", self.drop_tags)),
            spaces=self.underscores_to_spaces,
            keep_first=self.keep_first,
            dropout=self.tag_dropout,
            shuffle=self.shuffle != "none",
            most=self.max_tags,
        )
        return edits if given or edits.shuffle else None


@dataclass(frozen=True, kw_only=True)
class ModelOptions(CheckedOptions):
    """Model."""

    model: str | None = None
    """Hub id, folder, single file, checkpoint or run. Default: SD1.5 with the store's VAE."""

    model_ema: bool = False
    """Load the moving averages of a single file that holds both."""

    unet: str | None = None
    """Load the UNet from this folder, file, checkpoint or run. Default: --model."""

    text_encoder: str | None = None
    """Load the text encoder from this hub id (e.g. LongCLIP's), folder, file or run. Default:
    --model."""

    tokenizer: str | None = None
    """Folder with vocab.json and merges.txt. Default: that of --text-encoder, else of --model."""

    vae: str | None = None
    """Replace the VAE of --model where it is not the store's: sdxl, a hub id, a folder or a file.
    Default: --model's own."""

    tokens: Literal[248] | None = None
    """Extend a text encoder of 77 tokens to 248, as LongCLIP does. Default: its own length."""

    clip_skip: Annotated[int, Within(0, 100)] = 0
    """Skip this many last layers of the text encoder. A1111 counts from 1: its 2 is 1 here."""
