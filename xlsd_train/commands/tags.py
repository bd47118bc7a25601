"""`xlsd-train tags`: counts the tags of a store's captions, or of the samples a filter selects."""

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

AT_ONCE = 1 << 24  # entries of the index counted at once, to bound the memory


def tags(config: TagsConfig) -> None:
    """Print the counts. Raises UserError if no sample is left or a column does not exist."""
    with LatentStore.open(config.store) as store:
        columns = CaptionColumns.parse(config.caption, store.caption_columns, config.store)
        require, forbid = require_and_forbid(config.require_tags, config.forbid_tags)
        filtered = filter_by_tags(store, columns.names, require, forbid)
        selection = select(store, filtered.mask)
        counts = {name: tag_counts(store, name, selection) for name in columns.names}
    results = {
        "images": selection.of,
        "selected": len(selection),
        "buckets": selection.sizes,
        "different": {name: len(tags) for name, tags in counts.items()},
        "tags": {
            name: dict(list(tags.items())[: config.most or None]) for name, tags in counts.items()
        },
    }
    if config.json:
        say_json(results)
    else:
        _print_table(results, filtered.unknown)


def tag_counts(store: LatentStore, column: str, selection: Selection) -> dict[str, int]:
    """Tag -> number of selected samples that have it; all tags, the most frequent first."""
    tags = store.tags(column)
    if selection.chosen is None:
        return tags.counts()
    mask = np.zeros(len(store), np.bool_)
    mask[selection.rows(store, np.arange(len(selection)))] = True
    postings = tags.postings
    counts = _counts(mask, postings.values.to_numpy(), postings.offsets.to_numpy())
    order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    names = tags.names.take(order).to_pylist()
    return dict(zip(names, counts[order].tolist(), strict=True))


def _counts(
    mask: NDArray[np.bool_], samples: NDArray[np.int32], offsets: NDArray[np.int64]
) -> NDArray[np.int64]:
    """For each list of samples, from one offset to the next, how many are in the mask."""
    before = np.zeros(len(offsets), np.int64)  # in the mask, up to each offset
    total = 0
    for start in range(int(offsets[0]), int(offsets[-1]), AT_ONCE):
        sums = np.cumsum(mask[samples[start : start + AT_ONCE]])
        inside = (offsets > start) & (offsets <= start + len(sums))
        before[inside] = total + sums[offsets[inside] - start - 1]
        total += int(sums[-1])
    return np.diff(before)


def _print_table(results: dict[str, Any], unknown: tuple[str, ...]) -> None:
    say(f"{results['selected']} of {results['images']} images")
    say("buckets: " + ", ".join(f"{name} {n}" for name, n in results["buckets"].items()))
    for tag in unknown:
        say(f"--forbid-tags: no image has the tag {tag!r}")
    for name, counts in results["tags"].items():
        different = results["different"][name]
        say()
        shown = f", the most frequent {len(counts)}" if different > len(counts) else ""
        say(f"{different} tags in {name}{shown}:")
        width = max((len(str(count)) for count in counts.values()), default=0)
        for tag, count in counts.items():
            say(f"  {count:>{width}}  {count / results['selected']:>6.1%}  {tag}")
