"""Captions of a batch: chosen and dropped by position alone, then tokenised."""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xlsd_train import draw


@dataclass(frozen=True)
class Captions:
    """How captions become token ids."""

    tokenizer: Any  # CLIPTokenizer
    length: int  # tokens, the two special ones included: 77 for CLIP-L
    seed: int
    dropout: float  # how often a caption is left empty, for classifier-free guidance

    def tokens(self, texts: list[str | None], positions: NDArray[np.int64]) -> Tensor:
        """int64 [n, length] of the samples at these positions of the run. None counts as empty."""
        return self.tokenize(self.choose(texts, positions))

    def choose(self, texts: list[str | None], positions: NDArray[np.int64]) -> list[str]:
        """One line of each caption (each line is an alternative), or nothing by dropout."""
        dropped = draw.uniform(self.seed, "caption dropout", positions) < self.dropout
        word = draw.words(self.seed, "caption line", positions)
        chosen = []
        for text, drop, pick in zip(texts, dropped.tolist(), word.tolist(), strict=True):
            lines = (text or "").splitlines() or [""]
            chosen.append("" if drop else lines[pick % len(lines)])
        return chosen

    def tokenize(self, texts: list[str]) -> Tensor:
        """int64 [n, length], cut or padded. A special token spelt out in a caption is taken out."""
        if not texts:
            return torch.empty((0, self.length), dtype=torch.int64)
        special = "|".join(re.escape(str(token)) for token in self.tokenizer.all_special_tokens)
        plain = [re.sub(special, " ", text) for text in texts]
        encoded = self.tokenizer(
            plain, padding="max_length", truncation=True, max_length=self.length
        )
        return torch.tensor(encoded["input_ids"], dtype=torch.int64)
