"""The array of live rows that plain zarr readers use lists committed rows only."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import zarr
from numpy.typing import NDArray

from tests.support import cache, files, spawn, wait_for, write_images
from tests.support.stores import slow_build
from xlsd_cache.store.manifest import Manifest
from xlsd_cache.store.reader import LatentStore

Out = pytest.CaptureFixture[str]


def live(store: Path) -> dict[str, NDArray[np.int64]]:
    """As zarr-python alone reads it, and tensorstore."""
    group: Any = zarr.open_group(store / "latents.zarr", mode="r")
    found = {name: np.flatnonzero(group[f"live/{name}"][:]) for name, _ in group.arrays()}
    for name, array in group.arrays():
        path = f"{store}/latents.zarr/live/{name}/"
        kvstore = {"driver": "file", "path": path}
        other = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}).result()
        assert other.shape == array.shape[:1]
        assert np.array_equal(np.flatnonzero(other.read().result()), found[name])
    return found


def of_store(store: Path) -> dict[str, NDArray[np.int64]]:
    with LatentStore.open(store) as opened:
        return opened.buckets


def same(store: Path) -> bool:
    """Whether plain readers see what ours does; a bucket without live rows is none of ours."""
    plain, ours = live(store), of_store(store)
    assert {name for name, rows in plain.items() if len(rows)} == ours.keys()
    return all(np.array_equal(plain[name], rows) for name, rows in ours.items())


@pytest.fixture
def arguments(tmp_path: Path, vae: Path) -> tuple[object, ...]:
    write_images(tmp_path / "im", [f"{i}.png" for i in range(6)], width=64, height=64)
    write_images(tmp_path / "im", ["w0.png"], 9, width=128, height=64)
    return (tmp_path / "im", "--out", tmp_path / "l", "--vae", vae, "--buckets", "64x64,128x64",
            "--rows-per-shard", 4, "--batch", 1)  # fmt: skip


def test_plain_readers_see_what_comes_changes_and_goes(
    arguments: tuple[object, ...], tmp_path: Path
) -> None:
    images, out = tmp_path / "im", tmp_path / "l"
    assert cache("build", *arguments) == 0
    assert same(out)
    group: Any = zarr.open_group(out / "latents.zarr", mode="r")
    assert {name for name, _ in group.arrays()} == {"64x64", "128x64"}
    assert "live latent" in group["live"].attrs["about"]
    (images / "0.png").unlink()
    (images / "w0.png").unlink()
    write_images(images, ["1.png", "new.png"], 50, width=64, height=64)
    assert cache("build", *arguments) == 0
    assert same(out)
    assert len(live(out)["128x64"]) == 0
    assert sum(map(len, live(out).values())) == 6
    assert cache("check", out) == 0
    moved = shutil.copytree(out, tmp_path / "moved")
    assert same(moved)


def test_a_store_of_an_earlier_version_gets_them_at_its_next_build(
    arguments: tuple[object, ...], tmp_path: Path
) -> None:
    out = tmp_path / "l"
    assert cache("build", *arguments) == 0
    whole = files(out, "latents.zarr/**/*")
    shutil.rmtree(out / "latents.zarr/live")
    assert cache("check", out) == 0
    assert cache("build", *arguments) == 0
    assert files(out, "latents.zarr/**/*") == whole


@pytest.mark.parametrize("damage", ["wrong", "garbled", "gone", "metadata"])
def test_check_finds_what_is_wrong_and_repairs_it(
    arguments: tuple[object, ...], tmp_path: Path, capsys: Out, damage: str
) -> None:
    out = tmp_path / "l"
    assert cache("build", *arguments) == 0
    folder = out / "latents.zarr/live/64x64"
    if damage == "wrong":
        zarr.open_array(folder, mode="r+")[0] = False
    elif damage == "garbled":
        (folder / "c.0").write_bytes(b"none")
    else:
        (folder / {"gone": "c.0", "metadata": "zarr.json"}[damage]).unlink()
    capsys.readouterr()
    assert cache("check", out, "--json") == 1
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert (problem["kind"], problem["where"]) == ("live", "latents.zarr/live/64x64")
    assert cache("check", out, "--repair") == 0
    assert same(out)
    assert cache("check", out) == 0


def test_a_lost_latent_is_not_live(
    arguments: tuple[object, ...], tmp_path: Path, capsys: Out
) -> None:
    out = tmp_path / "l"
    assert cache("build", *arguments) == 0
    shard = out / "latents.zarr/64x64/c.0.0.0.0"
    data = bytearray(shard.read_bytes())
    data[5] ^= 1
    shard.write_bytes(data)
    assert cache("check", out, "--repair") == 1  # one is to be encoded again
    assert len(live(out)["64x64"]) == 5
    assert cache("build", *arguments) == 0
    assert same(out)


def test_an_interrupted_build_calls_no_row_live_that_is_not_committed(
    arguments: tuple[object, ...], tmp_path: Path
) -> None:
    out = tmp_path / "l"
    assert cache("build", *arguments) == 0
    before = live(out)
    write_images(tmp_path / "im", [f"n{i}.png" for i in range(20)], 70, width=64, height=64)
    process = spawn(slow_build, *arguments, log=tmp_path / "log")
    wait_for(lambda: len(Manifest(out).committed()) > 3)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert all(np.array_equal(rows, before[name]) for name, rows in live_of_old(out).items())
    assert cache("build", *arguments) == 0
    assert same(out)


def live_of_old(store: Path) -> dict[str, NDArray[np.int64]]:
    """The same where arrays have grown and what is said of them has not."""
    group: Any = zarr.open_group(store / "latents.zarr", mode="r")
    return {name: np.flatnonzero(array[:]) for name, array in group["live"].arrays()}
