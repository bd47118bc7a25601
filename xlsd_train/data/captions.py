"""Captions of a batch: chosen, edited and dropped by position alone, then tokenised.

A column is drawn by weight, then one of its lines, which are alternatives. Its parts are filtered
and shuffled, and the whole caption may be dropped.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from xlsd_cache.dataset import rng
from xlsd_cache.errors import UserError
from xlsd_train.data.caption_edits import CaptionEdits

if TYPE_CHECKING:  # `tags` reads columns, and need not load torch
    from torch import Tensor

Texts = Sequence[str | None]


@dataclass(frozen=True)
class CaptionColumns:
    """The caption columns of a run, and the weight with which each is drawn."""

    names: tuple[str, ...]
    weights: tuple[float, ...]  # a column of weight 0 is never shown, only searched for tags

    @classmethod
    def parse(cls, option: str | None, columns: Sequence[str], data: object) -> "CaptionColumns":
        """`txt`, or a mix `txt=3,jsonl:wd=1`, of a store `data` with these columns.

        A column's name may itself contain `=`. Raises UserError for a column that the store does
        not have, and if none is given and the store does not have exactly one.
        """
        if option is None:
            return cls((_only(columns, data),), (1.0,))
        mix: dict[str, float] = {}
        for piece in option.split(","):
            name, weight = _weighed(piece.strip(), columns)
            if name not in columns:
                raise UserError(
                    f"{data} has no caption column {name!r} (it has "
                    f"{', '.join(columns) or 'none'}); give another, or run `xlsd-cache build` "
                    f"with --captions {name}"
                )
            if name in mix:
                raise UserError(f"--caption {option} has {name} twice; give it one weight")
            mix[name] = weight
        if not sum(mix.values()):
            raise UserError(f"--caption {option} has no weight above 0; raise one")
        return cls(tuple(mix), tuple(mix.values()))

    def mix(self, texts: Sequence[Texts], words: rng.Words) -> list[str | None]:
        """Draw one of each sample's texts [columns][n] by weight, among those that it has."""
        if len(texts) == 1:
            return list(texts[0])
        drawn = rng.unit(words).tolist()
        return [
            self._pick(sample, u) for sample, u in zip(zip(*texts, strict=True), drawn, strict=True)
        ]

    def _pick(self, sample: Sequence[str | None], u: float) -> str | None:
        choices = [
            (text, weight)
            for text, weight in zip(sample, self.weights, strict=True)
            if text and weight
        ]
        left = u * sum(weight for _, weight in choices)
        for text, weight in choices:
            left -= weight
            if left < 0:
                return text
        return choices[-1][0] if choices else None  # the sum of the weights was rounded


def _weighed(piece: str, columns: Sequence[str]) -> tuple[str, float]:
    name, equals, number = piece.rpartition("=")
    if piece in columns or not equals:
        return piece, 1.0
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not 0 <= weight <= 1e6:
        raise UserError(
            f"--caption {piece}: {number!r} is no weight; give a number, e.g. {name or 'txt'}=3, "
            f"or the name alone"
        )
    return name, weight


def _only(columns: Sequence[str], data: object) -> str:
    if len(columns) == 1:
        return columns[0]
    raise UserError(
        f"{data} has the caption columns {', '.join(columns)}; choose one with --caption"
        if columns
        else f"{data} has no captions; run `xlsd-cache build` with --captions again"
    )


@dataclass(frozen=True)
class Captions:
    """Turns captions into token ids."""

    tokenizer: Any  # CLIPTokenizer
    length: int  # tokens, including the two special ones: 77 for CLIP-L
    seed: int
    dropout: float  # probability of an empty caption, for classifier-free guidance
    edits: CaptionEdits | None = None  # None leaves a caption as it is written

    def tokens(self, texts: Texts, positions: NDArray[np.int64]) -> "Tensor":
        """int64 [n, length] for the samples at these positions of the run; None is empty."""
        return self.tokenize(self.choose(texts, positions))

    def choose(self, texts: Texts, positions: NDArray[np.int64]) -> list[str]:
        """One line of each caption, edited; "" with the probability `dropout`."""
        dropped = rng.uniform(self.seed, "caption dropout", positions) < self.dropout
        lines = self.lines(texts, positions)
        return ["" if drop else line for line, drop in zip(lines, dropped.tolist(), strict=True)]

    def lines(self, texts: Texts, positions: NDArray[np.int64]) -> list[str]:
        """The same without dropping whole captions."""
        words = rng.words(self.seed, "caption line", positions)
        chosen = []
        for text, word in zip(texts, words.tolist(), strict=True):
            lines = (text or "").splitlines() or [""]
            chosen.append(lines[word % len(lines)])
        if self.edits is None:
            return chosen
        order = rng.words(self.seed, "tag order", positions).tolist()
        dropped = rng.words(self.seed, "tag dropout", positions).tolist()
        return list(map(self.edits.apply, chosen, order, dropped))

    def tokenize(self, texts: list[str]) -> "Tensor":
        """int64 [n, length], truncated or padded; special tokens in the text are removed."""
        return tokenize(self.tokenizer, texts, self.length)


def token_counts(tokenizer: Any, texts: list[str]) -> NDArray[np.int64]:
    """Tokens of each text without truncation, including the two special ones."""
    encoded = tokenizer(_plain(tokenizer, texts), verbose=False)
    return np.array([len(ids) for ids in encoded["input_ids"]], np.int64)


def tokenize(tokenizer: Any, texts: list[str], length: int) -> "Tensor":
    """int64 [n, length]; the same for training and sampling."""
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
