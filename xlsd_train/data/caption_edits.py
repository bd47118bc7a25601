"""Caption augmentation: split into tags or sentences, then filter, shuffle, drop and join them.

Pure functions of the text and of random bits that the caller draws by position.
"""

import re
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from xlsd_cache.dataset import rng
from xlsd_cache.errors import UserError

Shuffle = Literal["tags", "sentences", "none"]
FACE = 3  # tags of up to so many characters are emoticons like ^_^, whose underscores stay


@dataclass(frozen=True)
class CaptionEdits:
    """Edits of a caption's parts, applied in the order of the fields."""

    sentences: bool = False  # split at full stops; else into tags, at commas
    drop: frozenset[str] = frozenset()  # tags to remove, as written in the caption
    spaces: bool = False  # replace the underscores of tags
    keep_first: int = 0  # so many of the rest stay first and in order
    dropout: float = 0.0  # probability of dropping each of the others
    shuffle: bool = False  # the others
    most: int | None = None  # keep at most so many parts, those of keep_first included

    def __post_init__(self) -> None:
        """Raises UserError for combinations that have no effect or leave nothing."""
        if not 0 <= self.dropout <= 1:
            raise UserError(f"--tag-dropout {self.dropout:g} is not within 0 to 1")
        if self.keep_first and not (self.shuffle or self.dropout):
            raise UserError(
                f"--keep-first {self.keep_first} has no effect without --shuffle tags or "
                f"--tag-dropout; add one, or leave it out"
            )
        if self.most is not None and self.keep_first >= self.most:
            raise UserError(
                f"--keep-first {self.keep_first} leaves no room for other tags in --max-tags "
                f"{self.most}; lower --keep-first or raise --max-tags"
            )

    @property
    def deterministic(self) -> "CaptionEdits":
        """The same edits without the random ones."""
        return replace(self, keep_first=0, dropout=0.0, shuffle=False)

    def apply(self, text: str, order: int, dropped: int) -> str:
        """The edited caption; `order` and `dropped` are 64 random bits each."""
        parts = [part for part in self.split(text) if part not in self.drop]
        if self.spaces:
            parts = [spaced(part) for part in parts]
        parts = list(dict.fromkeys(parts))  # duplicates go
        kept, others = parts[: self.keep_first], parts[self.keep_first :]
        numbers = np.arange(len(others))
        if self.dropout:
            stays = rng.unit(rng.splitmix64(dropped, numbers)) >= self.dropout
            numbers = numbers[stays]
        if self.shuffle:
            words = rng.splitmix64(order, numbers)
            numbers = numbers[np.argsort(words, kind="stable")]
        return self.join((kept + [others[i] for i in numbers.tolist()])[: self.most])

    def split(self, text: str) -> list[str]:
        """Split tags at commas, sentences at full stops before white space."""
        pieces = re.split(r"\.(?=\s|$)", text) if self.sentences else text.split(",")
        return [part for piece in pieces if (part := piece.strip())]

    def join(self, parts: list[str]) -> str:
        """Join parts into a caption."""
        if not self.sentences:
            return ", ".join(parts)
        return " ".join(part if part[-1] in "!?" else f"{part}." for part in parts)


def spaced(tag: str) -> str:
    """A tag with spaces for underscores unless it is an emoticon, as taggers' own scripts do."""
    return tag.replace("_", " ") if len(tag) > FACE else tag


def tag_list(option: str, value: str | None) -> tuple[str, ...]:
    """The tags of an option `A,B`, without duplicates. Raises UserError if there are none."""
    if value is None:
        return ()
    tags = dict.fromkeys(tag for piece in value.split(",") if (tag := piece.strip()))
    if not tags:
        raise UserError(f"{option} {value!r} has no tags; give a list, e.g. {option} woman,solo")
    return tuple(tags)


def require_and_forbid(
    require: str | None, forbid: str | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The tags of --require-tags and --forbid-tags. Raises UserError for a tag in both."""
    required, forbidden = tag_list("--require-tags", require), tag_list("--forbid-tags", forbid)
    if both := [tag for tag in required if tag in forbidden]:
        raise UserError(
            f"--require-tags and --forbid-tags both contain {both[0]!r}, which leaves no sample; "
            f"remove it from one"
        )
    return required, forbidden
