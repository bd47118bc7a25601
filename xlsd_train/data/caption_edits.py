"""A caption taken apart into tags or sentences, which are filtered, shuffled, left out, and joined.

Pure functions of the text and of random bits that the caller draws by position.
"""

import re
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from xlsd_cache.errors import UserError

Shuffle = Literal["tags", "sentences", "none"]
FACE = 3  # tags of so few characters are faces like ^_^, whose underscores are no spaces


@dataclass(frozen=True)
class CaptionEdits:
    """What becomes of a caption's parts, in the order of the fields."""

    sentences: bool = False  # split by full stop; else tags, split by comma
    drop: frozenset[str] = frozenset()  # tags as they are written in the caption
    spaces: bool = False  # for the underscores of tags
    keep_first: int = 0  # of those left: stay in front, in their order, whatever follows
    dropout: float = 0.0  # how often each of the others is left out
    shuffle: bool = False  # the others
    most: int | None = None  # parts, the first ones; those kept among them

    def __post_init__(self) -> None:
        """Refuse what has no effect or no result, naming the options."""
        if not 0 <= self.dropout <= 1:
            raise UserError(f"--tag-dropout {self.dropout:g} is not within 0 to 1")
        if self.keep_first and not (self.shuffle or self.dropout):
            raise UserError(
                f"--keep-first {self.keep_first} changes nothing where the order stays; add "
                f"--shuffle tags or --tag-dropout, or leave it out"
            )
        if self.most is not None and self.keep_first >= self.most:
            raise UserError(
                f"--keep-first {self.keep_first} leaves no room for others within --max-tags "
                f"{self.most}; lower the one or raise the other"
            )

    @property
    def plain(self) -> "CaptionEdits":
        """The same without what is random."""
        return replace(self, keep_first=0, dropout=0.0, shuffle=False)

    def apply(self, text: str, order: int, dropped: int) -> str:
        """The caption as it is trained on; `order` and `dropped` are 64 random bits each."""
        from xlsd_cache.dataset import (
            rng as draw,  # late: options are checked by this file before torch is there
        )

        parts = [part for part in self.split(text) if part not in self.drop]
        if self.spaces:
            parts = [spaced(part) for part in parts]
        parts = list(dict.fromkeys(parts))  # each once, where it comes first
        kept, others = parts[: self.keep_first], parts[self.keep_first :]
        numbers = np.arange(len(others))
        if self.dropout:
            stays = draw.unit(draw.splitmix64(dropped, numbers)) >= self.dropout
            numbers = numbers[stays]
        if self.shuffle:
            words = draw.splitmix64(order, numbers)
            numbers = numbers[np.argsort(words, kind="stable")]
        return self.join((kept + [others[i] for i in numbers.tolist()])[: self.most])

    def split(self, text: str) -> list[str]:
        """Tags stand between commas; a sentence ends at a full stop before white space."""
        pieces = re.split(r"\.(?=\s|$)", text) if self.sentences else text.split(",")
        return [part for piece in pieces if (part := piece.strip())]

    def join(self, parts: list[str]) -> str:
        """A caption of these parts."""
        if not self.sentences:
            return ", ".join(parts)
        return " ".join(part if part[-1] in "!?" else f"{part}." for part in parts)


def spaced(tag: str) -> str:
    """A tag with spaces for underscores, unless it is a face; as taggers' own scripts do it."""
    return tag.replace("_", " ") if len(tag) > FACE else tag


def tag_list(option: str, given: str | None) -> tuple[str, ...]:
    """The tags of an option `A,B`, each once. Raises UserError where it names none."""
    if given is None:
        return ()
    tags = dict.fromkeys(tag for piece in given.split(",") if (tag := piece.strip()))
    if not tags:
        raise UserError(f"{option} {given!r} names no tag; write say {option} woman,solo")
    return tuple(tags)


def require_and_forbid(
    require: str | None, forbid: str | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The tags of --require-tags and --forbid-tags. Raises UserError for a tag that is in both."""
    required, forbidden = tag_list("--require-tags", require), tag_list("--forbid-tags", forbid)
    if both := [tag for tag in required if tag in forbidden]:
        raise UserError(
            f"--require-tags and --forbid-tags both name {both[0]!r}, so that no sample is left; "
            f"take it out of one"
        )
    return required, forbidden
