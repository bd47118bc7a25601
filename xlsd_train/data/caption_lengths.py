"""How captions fit the text encoder: how many are cut, and by how much. Told before a run."""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # a report says what was told, and need not wait for torch
    from xlsd_train.data.loader import BatchSource

LOOKED_AT = 10_000  # captions that are tokenised whole: two seconds on one core


def truncation(source: "BatchSource") -> dict[str, int]:
    """In tokens, of as many captions as are looked at: all, or random ones of a large store."""
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


def describe_truncation(found: dict[str, int]) -> str:
    """The same in a line for people."""
    looked, selected = found["looked_at"], found["selected"]
    among = f"all {looked}" if looked == selected else f"{looked} looked at of {selected}"
    line = f"captions: of {among}, {found['cut']} are longer than {found['limit']} tokens"
    if found["cut"]:
        line += f" and cut, by {found['over_median']} in the median and {found['over_max']} at most"
    return line + (f"; {found['without']} images have none" if found["without"] else "")
