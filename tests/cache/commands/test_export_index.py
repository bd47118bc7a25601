import json
from pathlib import Path

import google_crc32c
import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest

from tests.support import cache, small_disk, spawn
from xlsd_cache.store.reader import LatentStore


def test_polars_reads_every_latent_by_its_offset(store: Path, tmp_path: Path) -> None:
    assert cache("export-index", store, tmp_path / "index.parquet") == 0
    table = pl.read_parquet(tmp_path / "index.parquet")
    with LatentStore.open(store) as ours:
        assert table["key"].to_list() == ours.samples["key"].to_pylist()
        assert table["txt"].to_list() == ours.samples["txt"].to_pylist()
        for row in table.iter_rows(named=True):
            with (store / row["shard"]).open("rb") as file:
                file.seek(row["offset"])
                data = file.read(row["nbytes"])
            latent = np.frombuffer(data, row["dtype"]).reshape(row["shape"])
            assert np.array_equal(latent, ours.read(row["bucket"], [row["row"]])[0])
            assert google_crc32c.value(data) == row["crc32c"]
        told = json.loads(pq.read_schema(tmp_path / "index.parquet").metadata[b"xlsd"])
        assert told["fingerprint"] == ours.fingerprint
        assert told["identity"]["scaling_factor"] == ours.identity.scaling_factor


def test_what_cannot_be_written_is_one_sentence(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cache("export-index", store, tmp_path / "gone" / "index.parquet") == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "cannot write" in line
    assert "index.parquet" in line
    log, out = tmp_path / "log", tmp_path / "index.parquet"
    assert cache("export-index", store, out) == 0
    before = out.read_bytes()
    process = spawn(small_disk, 500, "export-index", store, out, log=log)
    process.join()
    assert process.exitcode == 1
    assert "Traceback" not in log.read_text()
    assert "cannot write" in log.read_text()
    assert out.read_bytes() == before


def test_a_damaged_shard_is_said(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    copy = shutil.copytree(store, tmp_path / "latents")
    shard = copy / "latents.zarr/128x128/c.0.0.0.0"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert cache("export-index", copy, tmp_path / "index.parquet") == 1
    assert "xlsd-cache check" in capsys.readouterr().err
