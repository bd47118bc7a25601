"""Captions of a batch: chosen, changed and dropped by position alone, then tokenised.

A column is chosen by weight, then one of its lines, which are alternatives; then its parts are
filtered and shuffled, and all of it may be left out.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from xlsd_cache.dataset import rng as draw
from xlsd_cache.errors import UserError
from xlsd_train.data.caption_edits import CaptionEdits

if TYPE_CHECKING:  # `tags` reads columns, and need not wait for torch
    from torch import Tensor

Texts = Sequence[str | None]


@dataclass(frozen=True)
class CaptionColumns:
    """The caption columns of a run, and how often each is taken."""

    names: tuple[str, ...]
    weights: tuple[float, ...]  # one of weight 0 is never shown, only looked at for tags

    @classmethod
    def parse(cls, given: str | None, there: Sequence[str], data: object) -> "CaptionColumns":
        """`txt`, or a mix `txt=3,jsonl:wd=1`, of a store that has the columns `there`.

        A name may hold `=` itself: what is a column's whole name is that column. Raises UserError
        for columns that are not there, and where none is named and there is not exactly one.
        """
        if given is None:
            return cls((_only(there, data),), (1.0,))
        mix: dict[str, float] = {}
        for piece in given.split(","):
            name, weight = _weighed(piece.strip(), there)
            if name not in there:
                raise UserError(
                    f"{data} has no caption column {name!r} (it has {', '.join(there) or 'none'}); "
                    f"name another, or run `xlsd-cache build` with --captions {name}"
                )
            if name in mix:
                raise UserError(f"--caption {given} names {name} twice; give it one weight")
            mix[name] = weight
        if not sum(mix.values()):
            raise UserError(f"--caption {given} has no weight above 0; raise one")
        return cls(tuple(mix), tuple(mix.values()))

    def mix(self, texts: Sequence[Texts], words: draw.Words) -> list[str | None]:
        """Of each sample one of its texts [columns][n], by weight, among those that it has."""
        if len(texts) == 1:
            return list(texts[0])
        drawn = draw.unit(words).tolist()
        return [
            self._pick(sample, u) for sample, u in zip(zip(*texts, strict=True), drawn, strict=True)
        ]

    def _pick(self, sample: Sequence[str | None], u: float) -> str | None:
        there = [
            (text, weight)
            for text, weight in zip(sample, self.weights, strict=True)
            if text and weight
        ]
        left = u * sum(weight for _, weight in there)
        for text, weight in there:
            left -= weight
            if left < 0:
                return text
        return there[-1][0] if there else None  # the sum of the weights was rounded


def _weighed(piece: str, there: Sequence[str]) -> tuple[str, float]:
    name, equals, number = piece.rpartition("=")
    if piece in there or not equals:
        return piece, 1.0
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not 0 <= weight <= 1e6:
        raise UserError(
            f"--caption {piece}: {number!r} is no weight; write say {name or 'txt'}=3, or the name "
            f"alone"
        )
    return name, weight


def _only(there: Sequence[str], data: object) -> str:
    if len(there) == 1:
        return there[0]
    raise UserError(
        f"{data} has the caption columns {', '.join(there)}; choose one with --caption"
        if there
        else f"{data} has no captions; run `xlsd-cache build` with --captions again"
    )


@dataclass(frozen=True)
class Captions:
    """How captions become token ids."""

    tokenizer: Any  # CLIPTokenizer
    length: int  # tokens, the two special ones included: 77 for CLIP-L
    seed: int
    dropout: float  # how often a caption is left empty, for classifier-free guidance
    parts: CaptionEdits | None = None  # None leaves a caption as it is written

    def tokens(self, texts: Texts, positions: NDArray[np.int64]) -> "Tensor":
        """int64 [n, length] of the samples at these positions of the run. None counts as empty."""
        return self.tokenize(self.choose(texts, positions))

    def choose(self, texts: Texts, positions: NDArray[np.int64]) -> list[str]:
        """One line of each caption, its parts as they are to be, or nothing by dropout."""
        dropped = draw.uniform(self.seed, "caption dropout", positions) < self.dropout
        lines = self.lines(texts, positions)
        return ["" if drop else line for line, drop in zip(lines, dropped.tolist(), strict=True)]

    def lines(self, texts: Texts, positions: NDArray[np.int64]) -> list[str]:
        """The same without dropout of whole captions."""
        word = draw.words(self.seed, "caption line", positions)
        chosen = []
        for text, pick in zip(texts, word.tolist(), strict=True):
            lines = (text or "").splitlines() or [""]
            chosen.append(lines[pick % len(lines)])
        if self.parts is None:
            return chosen
        order = draw.words(self.seed, "tag order", positions).tolist()
        dropped = draw.words(self.seed, "tag dropout", positions).tolist()
        return list(map(self.parts.apply, chosen, order, dropped))

    def tokenize(self, texts: list[str]) -> "Tensor":
        """int64 [n, length], cut or padded. A special token spelt out in a caption is taken out."""
        return tokenize(self.tokenizer, texts, self.length)

    def lengths(self, texts: list[str]) -> NDArray[np.int64]:
        """How many tokens each would be, the two special ones included, if none were cut."""
        return token_counts(self.tokenizer, texts)


def token_counts(tokenizer: Any, texts: list[str]) -> NDArray[np.int64]:
    """How many tokens each text is, the two special ones included, if none were cut."""
    encoded = tokenizer(_plain(tokenizer, texts), verbose=False)
    return np.array([len(ids) for ids in encoded["input_ids"]], np.int64)


def tokenize(tokenizer: Any, texts: list[str], length: int) -> "Tensor":
    """int64 [n, length]; of training and of samples alike."""
    import torch

    if not texts:
        return torch.empty((0, length), dtype=torch.int64)
    encoded = tokenizer(
        _plain(tokenizer, texts), padding="max_length", truncation=True, max_length=length
    )
    return torch.tensor(encoded["input_ids"], dtype=torch.int64)


def _plain(tokenizer: Any, texts: list[str]) -> list[str]:
    special = "|".join(re.escape(str(token)) for token in tokenizer.all_special_tokens)
    return [re.sub(special, " ", text) for text in texts]
