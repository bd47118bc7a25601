"""Keeps the batch size of each GPU in the store, next to the journals of interrupted shards.

The bits of a latent may depend on how many images are encoded with it, and free memory, from which
the batch is chosen, changes. So the first build of a store on a GPU chooses, and all later ones on
GPUs of that name take the same, whatever is free then: an interrupted shard ends byte-equal. If the
batch no longer fits, it is encoded in halves, and that is kept too. Nothing depends on the file for
correctness: a shard that is continued with another batch has latents that differ by rounding.

    staging/encoder-CARD.json    {"batch": images a call, "full_at": pixels of a call that ran out
                                 of memory, or null}
"""

import logging
import math
import re
from pathlib import Path

from xlsd_cache.encoding.encoder import Encoder
from xlsd_cache.runtime.atomic import write_json
from xlsd_cache.runtime.bounded_files import read_json
from xlsd_cache.store.commit import planning
from xlsd_cache.store.manifest import Manifest

log = logging.getLogger("xlsd.cache.encoding")


def keep_batch(encoder: Encoder, manifest: Manifest, asked: int | None) -> None:
    """Give the encoder the batch that the store keeps for its GPU, and keep what it finds out.

    Another batch that the user has `asked` for replaces both numbers.
    """
    path = manifest.staging / f"encoder-{re.sub(r'[^A-Za-z0-9]+', '-', encoder.name)}.json"

    def keep() -> None:
        full_at = None if encoder.full_at == math.inf else encoder.full_at
        write_json(path, {"batch": encoder.batch, "full_at": full_at}, manifest.staging)

    with planning(manifest):  # of builds that begin together, the first chooses
        batch, full_at = _read(path)
        if batch is not None and asked in (None, batch):
            encoder.batch, encoder.full_at = batch, full_at
        if batch != encoder.batch:
            keep()
    encoder.on_full = keep
    if encoder.full_at < math.inf:
        log.info(
            f"calls of {encoder.full_at / 1e6:.2f} megapixels or more ran out of this GPU's memory "
            f"before and are halved; --batch with another number than {encoder.batch} tries again"
        )


def _read(path: Path) -> tuple[int | None, float]:
    """The kept batch and the limit in pixels; None and infinity where there are no sound ones."""
    try:
        value = read_json(path)
        batch, full_at = value["batch"], value["full_at"]
    except (OSError, ValueError, KeyError, TypeError):
        return None, math.inf
    if type(batch) is not int or batch < 1 or type(full_at) not in (int, type(None)):
        return None, math.inf
    return batch, full_at or math.inf
