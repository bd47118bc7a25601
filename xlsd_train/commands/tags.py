"""`xlsd-train tags STORE`: which tags captions have, and what a selection by tags leaves."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from xlsd_cache.console.terminal import say, say_json
from xlsd_cache.dataset.selection import Selection, select
from xlsd_cache.store.reader import LatentStore
from xlsd_train.config.run_options import TagsConfig
from xlsd_train.data.caption_edits import require_and_forbid
from xlsd_train.data.captions import CaptionColumns
from xlsd_train.data.selection import filter_by_tags

AT_ONCE = 1 << 24  # entries of the index that are counted together: bounds the memory


def tags(config: TagsConfig) -> None:
    """Print the counts. Raises UserError where no sample is left or a column is not there."""
    with LatentStore.open(config.store) as store:
        columns = CaptionColumns.parse(config.caption, store.caption_columns, config.store)
        require, forbid = require_and_forbid(config.require_tags, config.forbid_tags)
        tagged = filter_by_tags(store, columns.names, require, forbid)
        selection = select(store, tagged.mask)
        counts = {name: tag_counts(store, name, selection) for name in columns.names}
    told = {
        "images": selection.of,
        "selected": len(selection),
        "buckets": selection.sizes,
        "different": {name: len(found) for name, found in counts.items()},
        "tags": {
            name: dict(list(found.items())[: config.most or None]) for name, found in counts.items()
        },
    }
    if config.json:
        say_json(told)
    else:
        _table(told, tagged.unknown)


def tag_counts(store: LatentStore, column: str, selection: Selection) -> dict[str, int]:
    """How many of the selected samples have each tag, the most frequent first; none is left out."""
    tags = store.tags(column)
    if selection.chosen is None:
        return tags.counts()
    mask = np.zeros(len(store), np.bool_)
    mask[selection.rows(store, np.arange(len(selection)))] = True
    counts = _counts(mask, tags.postings.values.to_numpy(), tags.postings.offsets.to_numpy())
    order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    names = tags.names.take(order).to_pylist()
    return dict(zip(names, counts[order].tolist(), strict=True))


def _counts(
    mask: NDArray[np.bool_], samples: NDArray[np.int32], offsets: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Of each list of samples, from one offset to the next, how many are in the mask."""
    before = np.zeros(len(offsets), np.int64)  # in the mask, up to each offset
    total = 0
    for start in range(int(offsets[0]), int(offsets[-1]), AT_ONCE):
        sums = np.cumsum(mask[samples[start : start + AT_ONCE]])
        inside = (offsets > start) & (offsets <= start + len(sums))
        before[inside] = total + sums[offsets[inside] - start - 1]
        total += int(sums[-1])
    return np.diff(before)


def _table(told: dict[str, Any], unknown: tuple[str, ...]) -> None:
    print(f"{told['selected']} of {told['images']} images")
    say("buckets: " + ", ".join(f"{name} {n}" for name, n in told["buckets"].items()))
    for tag in unknown:
        say(f"no image has the tag {tag!r} that --forbid-tags names")
    for name, found in told["tags"].items():
        more = told["different"][name] - len(found)
        print()
        say(f"{told['different'][name]} tags in {name}", end="")
        print(f", the most frequent {len(found)}:" if more else ":")
        width = max((len(str(count)) for count in found.values()), default=0)
        for tag, count in found.items():
            say(f"  {count:>{width}}  {count / told['selected']:>6.1%}  {tag}")
