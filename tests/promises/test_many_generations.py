"""A store that two processes build again and again, killed at any moment, while files change.

The log is folded meanwhile. All that is promised of a store holds with the fold and without it.
"""

import random
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support import cache, spawn, sums, wait_for, write_images
from tests.support.stores import holds, latents_by_name
from xlsd_cache.errors import UserError
from xlsd_cache.store import log_files
from xlsd_cache.store.manifest import Manifest
from xlsd_cache.store.reader import LatentStore

OPTIONS = ("--resolution", 64, "--buckets", "square", "--rows-per-shard", 4, "--batch", 1)


def keeps_building(*args: object) -> int:
    """Build until killed, and fold as often as can be."""
    log_files.TOGETHER = 2
    while True:
        assert cache("build", *args) == 0
        time.sleep(0.02)


def contents(out: Path) -> dict[str, tuple[str, str]]:
    """Key -> content hash and caption of every live sample."""
    with LatentStore.open(out) as store:
        rows = store.samples.select(["key", "content_hash", "txt"]).to_pylist()
    return {row["key"]: (row["content_hash"], row["txt"]) for row in rows}


def says(out: Path) -> list[object]:
    """Fingerprint and samples of the last generations that are complete."""
    told: list[object] = []
    for number in Manifest(out).generations()[-5:]:
        with suppress(UserError), LatentStore.open(out, number) as store:
            told += [store.fingerprint, store.samples]
    return told


def change(images: Path, names: list[str], rng: random.Random) -> None:
    """One file comes, gets other content, or goes."""
    if len(names) > 9 and rng.random() < 0.4:
        gone = images / names.pop(rng.randrange(len(names)))
        gone.unlink()
        gone.with_suffix(".txt").unlink()
        return
    name, ready = f"{rng.randrange(20):02d}.png", images.with_name("ready")
    write_images(ready, [name], first_seed=rng.randrange(1, 2**31), width=64, height=64)
    for suffix in (".txt", ".png"):  # complete when it appears
        (ready / name).with_suffix(suffix).replace((images / name).with_suffix(suffix))
    names[:] = sorted({*names, name})


@pytest.mark.slow
@pytest.mark.parametrize("kills", [6, 40])
def test_two_builders_are_killed_while_files_come_change_and_go(
    vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kills: int
) -> None:
    images, out, log = tmp_path / "images", tmp_path / "out", tmp_path / "log"
    args = ("--vae", vae, "--workers", 1, *OPTIONS)
    rng, names, manifest = random.Random(kills), list[str](), Manifest(out)

    def start() -> Any:
        return spawn(keeps_building, images, "--out", out, *args, log=log)

    write_images(images, ["first.png"], width=64, height=64)
    assert cache("build", images, "--out", out, *args) == 0
    first = contents(out), latents_by_name(out)
    running = [start(), start()]
    for _ in range(kills):
        for _ in range(3):  # generations
            newest = manifest.generations()[-1]
            change(images, names, rng)
            wait_for(lambda newest=newest: manifest.generations()[-1] > newest)  # type: ignore[misc]
        change(images, names, rng)
        time.sleep(rng.uniform(0, 0.3))
        victim = rng.randrange(2)
        assert running[victim].is_alive(), log.read_text()[-2000:]
        running[victim].kill()
        running[victim].join()
        running[victim] = start()
        with LatentStore.open(out) as store:  # a reader at any time
            assert store.read("64x64", store.buckets["64x64"]).shape[0] == len(store)
    for process in running:
        process.kill()
        process.join()
    assert cache("build", images, "--out", out, *args) == 0
    assert cache("build", images, "--out", tmp_path / "fresh", *args) == 0
    assert cache("check", out) == 0
    told = sums(out, capsys)
    assert told["scanned"] == len(names) + 1

    with capsys.disabled():
        print(f"\n{kills} kills, {len(manifest.generations())} generations")
    assert len(manifest.generations()) > 3 * kills
    assert any((out / "manifest" / "folded").iterdir())
    folded = says(out)
    shutil.rmtree(out / "manifest" / "folded")
    (out / "index.arrow").unlink(missing_ok=True)
    assert says(out) == folded
    assert contents(out) == contents(tmp_path / "fresh")
    assert holds(out, latents_by_name(tmp_path / "fresh"))
    with LatentStore.open(out, 0) as store:
        assert store.samples["key"].to_pylist() == list(first[0])
        assert store.read("64x64", [0]).tobytes() == next(iter(first[1].values())).tobytes()
