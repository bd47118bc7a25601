"""The watcher as a process: what it takes over, what waits, and that nothing is lost."""

import gc
import json
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from threading import Event, Thread

import pytest
from PIL import Image

from benchmarks.lib.churn import Churn, difference, sums
from tests.support import cache, files, last_error, picture, spawn, wait_for, write_images
from tests.support.live import get
from tests.support.stores import latents_by_name, pause_batches
from tests.support.watching import SIZES, keys, watching
from xlsd_cache.store.identity import read_attributes
from xlsd_cache.store.manifest import Manifest

CHANGING = "[!s]*/**/*"  # a store's files, without staging and status.json


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Six pictures."""
    folder = tmp_path / "images"
    write_images(folder, [f"{i}.png" for i in range(6)], width=64, height=64)
    return folder


def build(images: Path, out: Path, vae: Path) -> int:
    return cache("build", images, "--out", out, "--vae", vae, *SIZES, "--batch", 1)


def test_the_store_equals_a_fresh_build_after_changes_and_kills(vae: Path, tmp_path: Path) -> None:
    churn, out = Churn(tmp_path / "images", longest_s=1.0), tmp_path / "latents"
    churn.run(0.5, 40)
    churning = Thread(target=churn.run, args=(6.0, 20.0))
    churning.start()
    rest = ("--min-new", 8, "--max-wait", "1s")
    for state in ("encoding", "planning"):
        with watching(churn.folder, out, vae, *rest) as it:
            it.reaches(state)
            it.kill()
    with watching(churn.folder, out, vae, *rest) as it:
        churning.join()
        for _ in range(2):
            it.passes()
            it.reaches("idle")
    assert len(churn.done) >= 8, churn.done
    assert read_attributes(out)[1] == 32  # a generation has few images
    fresh = tmp_path / "fresh"
    assert build(churn.folder, fresh, vae) == 0
    assert difference(out, fresh) == ""
    assert sums(out) == sums(fresh)
    assert cache("check", out) == 0
    # The comparison finds what differs.
    write_images(churn.folder, ["new.png"], 900, width=64, height=64)
    assert build(churn.folder, fresh, vae) == 0
    assert "new.png" in difference(out, fresh)
    for name in ("new.png", "new.txt"):
        (churn.folder / name).unlink()
    next(churn.folder.rglob("*.jpg")).with_suffix(".txt").write_text("other words")
    assert build(churn.folder, fresh, vae) == 0
    assert "captions differ" in difference(out, fresh)


@pytest.fixture
def busy() -> Iterator[list[Path]]:
    """Files that are written all the time: their times are never old."""
    paths, end = list[Path](), Event()

    def write() -> None:
        while not end.wait(0.02):
            for path in list(paths):
                os.utime(path)

    thread = Thread(target=write)
    thread.start()
    yield paths
    end.set()
    thread.join()


def test_half_written_files_are_not_there_yet(
    images: Path, vae: Path, tmp_path: Path, busy: list[Path]
) -> None:
    """Neither new nor rejected; a file that is replaced, or whose caption is, keeps its latent."""
    out = tmp_path / "latents"
    with watching(images, out, vae, "--settle", 1) as it:
        it.live(6)
        before = latents_by_name(out)
        whole = images / "new.png"
        Image.fromarray(picture(99, 64, 64)).save(whole)
        data = whole.read_bytes()
        whole.write_bytes(data[:-300])
        (images / "0.png").write_bytes(data[:-200])
        (images / "1.txt").write_text("half a cap")
        busy += [whole, images / "0.png", images / "1.txt"]
        write_images(images, ["quiet.png"], 200, width=64, height=64)
        it.wait(lambda told: told["sums"]["live"] == 7)
        told = it.passes()
        assert told["unsettled"] == 3
        assert (told["sums"]["scanned"], told["sums"]["rejected"]) == (7, {})
        now = latents_by_name(out)
        assert now.keys() == before.keys() | {"quiet.png"}
        assert all((now[name] == latent).all() for name, latent in before.items())
        assert captions(out)["1.png"] == "picture 1"
        busy.clear()
        whole.write_bytes(data)
        shutil.copy(images / "5.png", images / "0.png")
        (images / "1.txt").write_text("a whole caption")
        told = it.live(7)  # of 0.png and 5.png, now copies, one has the latent
        assert told["sums"]["duplicate"] == 1
    assert keys(out) >= {"1.png", "2.png", "3.png", "4.png", "new.png", "quiet.png"}
    assert captions(out)["1.png"] == "a whole caption"


def captions(out: Path) -> dict[str, str]:
    manifest = Manifest(out)
    lines = manifest.captions(manifest.generations()[-1]).to_pylist()
    return {line["key"].partition("/")[2]: line["text"] for line in lines}


def test_a_generation_waits_for_enough_images_or_for_the_oldest(
    images: Path, vae: Path, tmp_path: Path
) -> None:
    out = tmp_path / "latents"
    rest = ("--min-new", 5, "--max-wait", "1h")
    with watching(images, out, vae, *rest) as it:
        it.live(6)
        write_images(images, ["a.png", "b.png"], 100, width=64, height=64)
        (images / "0.png").unlink()
        (images / "1.txt").write_text("other")
        told = it.wait(lambda told: told["waiting"] == 4 and told["state"] == "waiting")
        assert (told["generation"], told["sums"]["live"]) == (0, 6)
        since = told["waiting_since"]
        it.kill()
    with watching(images, out, vae, *rest) as it:
        told = it.wait(lambda told: told["waiting"] == 4)
        assert told["waiting_since"] == since, "a kill must not begin the waiting again"
        (images / "2.png").unlink()
        it.wait(lambda told: told["generation"] == 1)
        it.live(6)
    assert keys(out) == {"1.png", "3.png", "4.png", "5.png", "a.png", "b.png"}
    with watching(images, out, vae, "--min-new", 5, "--max-wait", "1s") as it:
        it.live(6)
        write_images(images, ["c.png"], 110, width=64, height=64)
        assert it.live(7)["generation"] == 2


def test_nothing_is_written_while_nothing_changes(images: Path, vae: Path, tmp_path: Path) -> None:
    def times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in out.glob("**/*") if path.is_file()}

    out = tmp_path / "latents"
    (images / "bad.tar").write_bytes(bytes(range(256)) * 9)
    with watching(images, out, vae, "--http", "127.0.0.1:0") as it:
        it.live(6)
        it.passes(1)
        before = times()
        url = next(line for line in it.log.read_text().splitlines() if line.startswith("http"))
        assert json.loads(get(f"{url}status.json")[1])["pid"] == it.process.pid
        for path in ("", "metrics", "healthz"):
            assert get(f"{url}{path}")[0] == 200
        it.passes(3)
        it.stop()
    changed = {path.name for path, time_ns in times().items() if time_ns != before.get(path)}
    assert changed == {"status.json"}
    assert it.log.read_text().count("warning: cannot read") == 1


def test_a_source_that_vanishes_is_not_emptied(images: Path, vae: Path, tmp_path: Path) -> None:
    out, aside = tmp_path / "latents", tmp_path / "aside"
    with watching(images, out, vae) as it:
        it.live(6)
        it.passes()
        before = files(out, CHANGING)

        def is_refused(why: str) -> None:
            told = it.wait(lambda told: why in told["last_error"])
            assert told["state"] == "refused"
            it.passes()
            assert files(out, CHANGING) == before

        images.rename(aside)
        is_refused("no such file")
        images.mkdir()
        is_refused("no images in")
        images.rmdir()
        aside.rename(images)
        it.reaches("idle")
        (images / "0.png").unlink()
        it.live(5)
        before = files(out, CHANGING)
        for i in (1, 2, 3):
            (images / f"{i}.png").unlink()
        is_refused("3 of the 5 images of the source 'images' are gone")
        assert it.log.read_text().count("no such file or directory (watching goes on)") == 1
    # To drop the images is the user's decision.
    with watching(images, out, vae, "--forget", "images") as it:
        assert it.live(2)["sums"]["scanned"] == 2


@pytest.mark.slow
def test_a_folder_that_is_renamed_within_a_source_is_followed(vae: Path, tmp_path: Path) -> None:
    images, out = tmp_path / "images", tmp_path / "latents"
    write_images(images, [f"a/{i}.png" for i in range(4)], width=64, height=64)
    with watching(images, out, vae) as it:
        it.live(4)
        (images / "a").rename(images / "b")
        it.wait(lambda told: told["generation"] == 1)
        assert it.live(4)["encoded"] == 4
    assert keys(out) == {f"b/{i}.png" for i in range(4)}


def test_an_empty_folder_waits_for_its_first_image(vae: Path, tmp_path: Path) -> None:
    images, out = tmp_path / "images", tmp_path / "latents"
    images.mkdir()
    with watching(images, out, vae) as it:
        told = it.passes()
        assert (told["state"], told["generation"], told["failing_since"]) == ("waiting", -1, None)
        write_images(images, ["a.png", "b.png"], width=64, height=64)
        it.live(2)


def small_files(*args: object) -> int:
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, hard))
    return cache(*args)


def test_a_disk_that_fills_while_encoding_pauses(images: Path, vae: Path, tmp_path: Path) -> None:
    """Files may not grow beyond a size, until they may."""
    out = tmp_path / "latents"
    limit = resource.RLIMIT_FSIZE
    with watching(images, out, vae, command=small_files) as it:
        told = it.reaches("paused")
        assert "cannot write" in told["last_error"]
        assert "File too large" in told["last_error"]
        assert told["failing_since"]
        it.passes()
        assert it.log.read_text().count("cannot write") == 1
        hard = resource.prlimit(it.process.pid, limit)[1]
        resource.prlimit(it.process.pid, limit, (hard, hard))
        assert it.live(6)["failing_since"] is None
    fresh = tmp_path / "fresh"
    assert build(images, fresh, vae) == 0
    assert difference(out, fresh) == ""


def test_a_full_disk_pauses(images: Path, vae: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=512k", "none", str(disk)]
    if shutil.which("mount") is None or subprocess.run(words, check=False).returncode:
        pytest.skip("mounting needs root")
    filler = disk / "filler"
    try:
        with watching(images, disk / "latents", vae) as it:
            it.live(6)
            with filler.open("wb", 0) as file, pytest.raises(OSError, match="No space left"):
                while True:
                    file.write(bytes(4096))
            write_images(images, ["a.png"], 70, width=64, height=64)
            wait_for(lambda: "(watching goes on)" in it.log.read_text(), 120)
            filler.unlink()
            it.live(7)
        assert cache("check", disk / "latents") == 0
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def slow(*args: object) -> int:
    pause_batches(0.3)
    return cache(*args)


def test_sigterm_leaves_after_the_batch(images: Path, vae: Path, tmp_path: Path) -> None:
    out = tmp_path / "latents"
    with watching(images, out, vae, command=slow) as it:
        wait_for((out / "staging/64x64.0.jnl").exists)
        it.stop()
        assert it.log.read_text().count("stopping after this batch") == 1
    told = it.status()
    assert told["state"] == "stopped"
    assert 0 < told["encoded"] < 6
    with watching(images, out, vae) as it:
        assert it.live(6)["encoded"] + told["encoded"] == 6
        os.kill(it.process.pid, signal.SIGINT)  # while it waits
        it.process.join(60)
        assert it.process.exitcode == 0
        assert it.status()["state"] == "stopped"


def signals_itself(status: Path, *args: object) -> int:
    """Signals come where Python ignores exceptions."""

    def strike(phase: str, _: dict[str, int]) -> None:
        if phase == "stop" and status.exists() and '"idle"' in status.read_text():
            os.kill(os.getpid(), signal.SIGTERM)

    gc.callbacks.append(strike)
    return cache(*args)


def test_a_signal_that_python_ignores_ends_it(images: Path, vae: Path, tmp_path: Path) -> None:
    out = tmp_path / "latents"
    command = partial(signals_itself, out / "status.json")
    with watching(images, out, vae, command=command) as it:
        it.process.join(60)
        assert it.process.exitcode == 0
        assert "Exception ignored" in it.log.read_text()
    assert it.status()["state"] == "stopped"


def test_its_sums_are_those_of_a_build_after_it(images: Path, vae: Path, tmp_path: Path) -> None:
    out = tmp_path / "latents"
    with watching(images, out, vae) as it:
        assert it.live(6)["sums"]["encoded"] == 6
        assert build(images, out, vae) == 0
        told = it.wait(lambda told: told["sums"]["reused"] == 6)
        assert (told["generation"], told["sums"]["encoded"]) == (0, 0)


@pytest.mark.slow
def test_builds_run_next_to_it_and_a_second_watcher_does_not(
    images: Path, vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "latents"
    with watching(images, out, vae, "--min-new", 50, "--max-wait", "1h") as it:
        it.wait(lambda told: told["waiting"] == 6)
        assert cache("watch", images, "--out", out, "--vae", vae, *SIZES) == 1
        assert "another xlsd-cache watch" in last_error(capsys)
        log = tmp_path / "build.log"
        both = [spawn(build, images, out, vae, log=log) for _ in range(2)]
        for process in both:
            process.join()
            assert process.exitcode == 0, log.read_text()
        told = it.live(6)
        assert (told["waiting"], told["generations"]) == (0, 0)
        write_images(images, [f"n{i}.png" for i in range(50)], 100, width=64, height=64)
        it.live(56)


@pytest.mark.slow
def test_the_store_is_not_made_again_where_it_has_vanished(
    images: Path, vae: Path, tmp_path: Path
) -> None:
    out, aside = tmp_path / "latents", tmp_path / "aside"
    with watching(images, out, vae) as it:
        it.live(6)
        out.rename(aside)
        wait_for(lambda: "latents is gone; bring it back" in it.log.read_text(), 120)
        assert not out.exists()
        aside.rename(out)
        it.live(6)


def test_what_no_pass_could_do_is_refused_at_once(
    images: Path, vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rest = ("--out", tmp_path / "latents", "--vae", vae, *SIZES)
    assert cache("watch", tmp_path / "phtos", *rest) == 1
    assert "no such file or directory" in last_error(capsys)
    for words, told in (
        (("--max-wait", "5 apples"), "--max-wait '5 apples' is no time"),
        (("--http", "8787"), "--http '8787' is not HOST:PORT"),
        (("--http", "0.0.0.0:80"), "is no address that a browser can open"),
    ):
        assert cache("watch", images, *rest, *words) == 1
        assert told in last_error(capsys)
    assert not (tmp_path / "latents").exists()
    assert build(images, tmp_path / "latents", vae) == 0
    assert cache("watch", images, *rest, "--resolution", 128) == 1
    assert "resolution" in last_error(capsys)
