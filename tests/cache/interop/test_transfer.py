import json
import os
import random
import shutil
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.support import cache, events_in, files, spawn, wait_for
from tests.support.peer_caches import image_files, write_safetensors
from tests.support.stores import holds
from xlsd_cache.interop import transfer
from xlsd_cache.store.shard import ShardWriter


@pytest.fixture
def images(photos: Path, tmp_path: Path) -> Path:
    """A copy of the photos, to write next to."""
    return Path(shutil.copytree(photos, tmp_path / "images"))


def slow_import(counter: Path, *args: object) -> int:
    """`import`, a few latents at a time with a moment before each; counts what it writes."""
    append = ShardWriter.append

    def slowly(self: ShardWriter, rows: Any, latents: Any) -> None:
        time.sleep(random.uniform(0, 0.1))
        with counter.open("ab") as file:
            file.write(b"." * len(rows))
        append(self, rows, latents)

    ShardWriter.append = slowly  # type: ignore[method-assign]
    transfer.BATCH = 4
    return cache(*args)


def test_ctrl_c_leaves_a_store_that_goes_on(
    images: Path, vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = write_safetensors(images, image_files(images), vae)
    counter, log, out = tmp_path / "counter", tmp_path / "log", tmp_path / "l"
    asked = ("import", images, "--vae", vae, "--rows-per-shard", 2, "--out", out, "--json")
    process = spawn(slow_import, counter, *asked, log=log)
    wait_for(partial(grown, counter, 0))
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode == 1
    first, *_, last = events_in(log.read_text())
    assert (first["event"], first["latents"]) == ("start", 8)
    assert last["event"] == "stopped"
    assert last["error"].startswith("stopped; every batch imported so far is kept")
    for image in image_files(images):
        image.unlink()  # what was planned was compared
    assert cache(*asked) == 0
    assert holds(out, written)
    *_, step, done = events_in(capsys.readouterr().out)
    assert (step["event"], done["event"]) == ("progress", "done")
    assert step["latents"] == step["total"] <= 8
    assert done["scanned"] == 8


def test_kill_9_eight_times(images: Path, vae: Path, tmp_path: Path) -> None:
    """Killed at random moments, an import ends byte-equal; a kill costs at most one batch."""
    latents = [load_file(path)["latent"] for path in saved(images, vae)]
    cached = tmp_path / "many"
    cached.mkdir()
    for number in range(100):
        one = latents[number % 8] * (1 + number / 1000)
        save_file({"latent": one}, cached / f"{number}.safetensors")
    asked = ("import", cached, "--vae", vae, "--force", "--compare", 8, "--rows-per-shard", 16)
    assert cache(*asked, "--out", tmp_path / "whole") == 0
    out, counter, log = tmp_path / "killed", tmp_path / "counter", tmp_path / "log"
    random.seed(0)
    kills = 0
    while kills < 8:
        before = size(counter)
        process = spawn(slow_import, counter, *asked, "--out", out, log=log)
        wait_for(partial(grown, counter, before))
        time.sleep(random.uniform(0, 0.15))
        kills += process.is_alive()
        process.kill()
        process.join()
        assert len(list((out / "manifest/commit").iterdir())) < 7, "every kill must hit it at work"
    process = spawn(slow_import, counter, *asked, "--out", out, log=log)
    process.join()
    assert process.exitcode == 0, log.read_text()[-2000:]
    assert files(out, "latents.zarr/**/*") == files(tmp_path / "whole", "latents.zarr/**/*")
    assert counter.stat().st_size <= 100 + 4 * kills
    assert cache("check", out) == 0
    assert {path.name for path in (out / "staging").iterdir()} == {"plan.lock"}
    told = json.loads((out / "manifest/accounting.json").read_text())
    assert told["encoded"] + told["reused"] == told["scanned"] == 100


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def grown(path: Path, before: int) -> bool:
    return size(path) > before


def saved(images: Path, vae: Path) -> list[Path]:
    write_safetensors(images, image_files(images), vae)
    return sorted(images.glob("*.img_sdxl"))
