"""`xlsd-cache export-index`: a table of samples with the byte offsets of their latents."""

import contextlib
import json
import logging
from dataclasses import asdict

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from xlsd_cache.errors import UserError
from xlsd_cache.options.inspection import ExportIndexOptions
from xlsd_cache.runtime.atomic import write_parquet
from xlsd_cache.runtime.own_files import MARK, is_index, refuse_foreign, writing
from xlsd_cache.store.manifest import Manifest, ShardId
from xlsd_cache.store.reader import LatentStore
from xlsd_cache.store.shard import CorruptShard, ShardReader

log = logging.getLogger("xlsd.cache.commands")


def export_index(config: ExportIndexOptions) -> None:
    """Write the samples of the newest complete generation, sorted by (bucket, row).

    Raises UserError if the store has none, a shard's index is damaged, or `out` is not an exported
    index or cannot be written.
    """
    refuse_foreign(config.out, (".parquet",), is_index)
    with LatentStore.open(config.store) as store:
        table = with_places(store)
    told = {"identity": asdict(store.identity), "fingerprint": store.fingerprint}
    table = table.replace_schema_metadata({MARK: json.dumps(told)})
    with writing(config.out):
        write_parquet(config.out, table)
    log.info(f"{config.out}: {table.num_rows} samples, {config.out.stat().st_size / 2**20:.1f} MiB")


def with_places(store: LatentStore) -> pa.Table:
    """The samples with each latent's shard (file in the store), offset, nbytes, dtype and shape.

    `offset` is where the latent's bytes begin in the file, little-endian and C-contiguous. Their
    crc32c follows them, and is a column of the table too.
    """
    count = len(store)
    names: list[str] = []
    codes, offsets, sizes = (np.empty(count, np.int64) for _ in range(3))
    shapes = np.empty((count, 3), np.int32)
    for bucket, rows in store.buckets.items():
        at = store.sample_index(bucket, np.arange(len(rows)))
        shapes[at] = store.shape(bucket)
        sizes[at] = store.identity.nbytes(bucket)
        numbers = rows // store.rows_per_shard
        for number in np.unique(numbers).tolist():
            inside = numbers == number
            codes[at[inside]] = len(names)
            offsets[at[inside]] = _offsets(store, ShardId(bucket, number), rows[inside])
            names.append(Manifest(store.root).shard(ShardId(bucket, number)).as_posix())
    shards = [name.removeprefix(f"{store.root.as_posix()}/") for name in names]
    columns = {
        "shard": pa.DictionaryArray.from_arrays(codes, pa.array(shards, pa.string())),
        "offset": pa.array(offsets),
        "nbytes": pa.array(sizes),
        "dtype": pa.array([store.identity.dtype] * count, pa.string()),
        "shape": pa.FixedSizeListArray.from_arrays(shapes.reshape(-1), 3),
    }
    table = store.samples
    for name, values in columns.items():
        if name in table.column_names:  # a caption column, which keeps its name
            raise UserError(
                f"{store.root}: caption column {name!r} has the name of a column that export-index "
                f"adds; give the captions another name"
            )
        table = table.append_column(name, values)
    return table


def _offsets(store: LatentStore, unit: ShardId, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    nbytes = store.identity.nbytes(unit.bucket)
    path = Manifest(store.root).shard(unit)
    try:
        reader = ShardReader(path, store.rows_per_shard, nbytes)
    except (CorruptShard, OSError) as error:
        raise UserError(
            f"cannot read {path}: {error}; run `xlsd-cache check {store.root}` to see what is "
            f"damaged"
        ) from error
    with contextlib.closing(reader):
        return np.asarray(reader.offsets)[rows % store.rows_per_shard].astype(np.int64)
