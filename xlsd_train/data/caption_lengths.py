"""How many captions exceed the text encoder's context length, and by how much."""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # a report describes recorded numbers, and need not load torch
    from xlsd_train.data.loader import BatchSource

LOOKED_AT = 10_000  # captions that are tokenised untruncated: two seconds on one core


def truncation(source: "BatchSource") -> dict[str, int]:
    """Token counts of all captions, or of a random sample of them in a large store."""
    lengths, limit = source.lengths(LOOKED_AT), source.captions.length
    over = lengths[lengths > limit] - limit
    return {
        "looked_at": len(lengths),
        "selected": len(source.dataset),
        "without": int((lengths == 0).sum()),
        "limit": limit,
        "cut": len(over),
        "over_median": int(np.median(over)) if len(over) else 0,
        "over_max": int(over.max(initial=0)),
    }


def describe_truncation(counts: dict[str, int]) -> str:
    """The same in a line, e.g. `captions: none of 100 exceeds 77 tokens`."""
    looked_at, selected, limit = (counts[name] for name in ("looked_at", "selected", "limit"))
    among = f"{looked_at}" if looked_at == selected else f"{looked_at} (a sample of {selected})"
    if counts["cut"]:
        line = (
            f"captions: {counts['cut']} of {among} exceed {limit} tokens and are truncated, by "
            f"{counts['over_median']} in the median and {counts['over_max']} at most"
        )
    else:
        line = f"captions: none of {among} exceeds {limit} tokens"
    return line + (f"; {counts['without']} images have no caption" if counts["without"] else "")
