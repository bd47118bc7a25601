"""After kill -9 at any moment, with several workers, only the batches in progress are done again.

pytest -m slow tests/promises/test_kills.py      a hundred kills, minutes
"""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from tests.support import (
    cache,
    files,
    spawn,
    start_torchrun,
    sums,
    wait_for,
    write_images,
)
from xlsd_cache.encoding.encoder import Encoder
from xlsd_cache.store.manifest import Manifest
from xlsd_cache.store.reader import LatentStore

Start = Callable[[int], Any]


def worker(counter: Path, seconds: float, *args: object) -> int:
    """`build`, slowed by up to `seconds` a call, that leaves a byte for every image it encodes."""
    encode = Encoder.encode
    file = os.open(counter, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def counting(self: Encoder, pixels: Any) -> Any:
        os.write(file, b"." * len(pixels))
        time.sleep(random.uniform(0, seconds))  # as a larger VAE would take, so that kills hit it
        return encode(self, pixels)

    Encoder.encode = counting  # type: ignore[method-assign]
    return cache("build", *args)


def size_of(path: Path) -> int:
    """Bytes, none where there is no file yet."""
    return path.stat().st_size if path.exists() else 0


def kill_at_work(kills: int, counters: list[Path], start: Start) -> int:
    """Keep a worker a counter running and kill each soon after it began to encode.

    The first ones anywhere, the planning and the start included. Returns how many of the `kills`
    found their victim alive. Kills those that are left at the end.
    """
    at_work, running, killed = 0, dict[int, Any](), 0
    doomed: dict[int, float] = {}  # when to kill those that have begun
    before = [0] * len(counters)
    while killed < kills:
        for part in set(range(len(counters))) - running.keys():
            before[part] = size_of(counters[part])
            running[part] = start(part)
            if killed < len(counters):
                doomed[part] = time.monotonic() + random.uniform(0.0, 3.0)
        for part, process in list(running.items()):
            ended = not process.is_alive()
            if part not in doomed and (ended or size_of(counters[part]) > before[part]):
                doomed[part] = time.monotonic() + random.uniform(0.0, 0.3)
            if time.monotonic() > doomed.get(part, float("inf")):
                at_work += not ended
                process.kill()
                process.join()
                del running[part], doomed[part]
                killed += 1
        time.sleep(0.01)
    for process in running.values():
        process.kill()
        process.join()
    return at_work


def run_to_the_end(workers: int, start: Start, log: Path) -> None:
    """All workers once more, undisturbed."""
    for process in [start(part) for part in range(workers)]:
        process.join()
        assert process.exitcode == 0, log.read_text()[-2000:]


@pytest.mark.parametrize("kills", [9, pytest.param(30, marks=pytest.mark.slow)])
def test_kills_with_three_workers(
    vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kills: int
) -> None:
    """Killed at random moments, the store ends byte-equal; a kill costs at most one batch."""
    images, batch = tmp_path / "images", 4
    names = [f"{i:03d}.png" for i in range(200)]
    write_images(images, names[:130], width=128, height=128)
    write_images(images, names[130:], first_seed=130, width=200, height=66)
    (images / "broken.png").write_bytes((images / "000.png").read_bytes()[:-300])
    rest = ("--vae", vae, "--resolution", 128, "--rows-per-shard", 16, "--batch", batch)
    assert cache("build", images, "--out", tmp_path / "whole", *rest) == 0
    expected = files(tmp_path / "whole", "latents.zarr/**/*")

    random.seed(0)
    out, log = tmp_path / "killed", tmp_path / "log"
    counters = [tmp_path / f"counter-{part}" for part in range(3)]

    def start(part: int) -> Any:
        options = ("--out", out, *rest, "--shard", f"{part}/3")
        return spawn(worker, counters[part], 0.3, images, *options, log=log)

    at_work = kill_at_work(kills, counters, start)
    run_to_the_end(3, start, log)
    assert at_work >= kills * 5 // 6, "most kills must hit a build at work"
    assert files(out, "latents.zarr/**/*") == expected
    extra = sum(map(size_of, counters)) - len(names)
    with capsys.disabled():
        print(f"\n{kills} kills, {at_work} of them at work, cost {extra} encodings")
    assert 0 < extra <= (kills + 2) * batch  # two more are killed when these are
    assert cache("check", out, "--decode", 3) == 0
    told = sums(out, capsys)
    assert (told["scanned"], told["live"], told["rejected"]) == (201, 200, {"truncated": 1})
    assert {path.name for path in (out / "staging").iterdir()} == {"plan.lock"}


@pytest.mark.slow
def test_a_hundred_kills_with_four_workers_while_images_come_change_and_go(
    vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One image a batch, so that what each latent must be does not depend on its neighbours."""
    images, log, out = tmp_path / "images", tmp_path / "log", tmp_path / "killed"
    write_images(images, [f"{i:04d}.png" for i in range(1400)], width=64, height=64)
    write_images(images, [f"w{i:03d}.png" for i in range(600)], 1400, width=130, height=64)
    rest = ("--vae", vae, "--buckets", "64x64,128x64", "--rows-per-shard", 64, "--batch", 1)
    counters = [tmp_path / f"counter-{part}" for part in range(4)]

    def start(part: int) -> Any:
        options = ("--out", out, *rest, "--shard", f"{part}/4")
        return spawn(worker, counters[part], 0.05, images, *options, log=log)

    random.seed(0)
    at_work, seed = 0, 10_000
    for turn in range(10):
        at_work += kill_at_work(10, counters, start)
        names = sorted(path.name for path in images.glob("*.png"))
        removed, changed = random.sample(names, 10), random.sample(names, 10)
        added = [f"new{turn}-{i}.png" for i in range(10)]
        for name in removed:
            (images / name).unlink()
        changed = [name for name in changed if name not in removed]
        write_images(images, changed + added, seed, width=64, height=64)
        seed += 20
    run_to_the_end(4, start, log)
    assert cache("build", images, "--out", tmp_path / "whole", *rest) == 0
    with LatentStore.open(out) as ours, LatentStore.open(tmp_path / "whole") as theirs:
        latents = [
            {
                sample["key"]: store.read(sample["bucket"], [sample["row"]])
                for sample in store.samples.to_pylist()
            }
            for store in (ours, theirs)
        ]
    assert {key.partition("/")[2] for key in latents[0]} == {
        path.name for path in images.glob("*.png")
    }
    assert all(np.array_equal(latent, latents[1][key]) for key, latent in latents[0].items())
    manifest = Manifest(out)
    status = manifest.commits(manifest.committed())["status"].to_pylist()
    extra = sum(map(size_of, counters)) - status.count("encoded")
    with capsys.disabled():
        print(f"\n100 kills, {at_work} of them at work, cost {extra} of {len(status)} encodings")
    assert 0 < extra <= 10 * (10 + 3)  # three more are killed at the end of every turn
    assert at_work >= 80
    assert cache("check", out) == 0
    sums(out, capsys)
    assert {path.name for path in (out / "staging").iterdir()} == {"plan.lock"}


@pytest.mark.slow
def test_torchrun_restarts_builders_and_a_stop_of_all_loses_nothing(
    vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rank is killed, then all get SIGTERM as from systemd, then two plain builders finish."""
    images, batch = tmp_path / "images", 4
    counters = [tmp_path / f"counter-{rank}" for rank in range(2)]
    write_images(images, [f"{i:03d}.png" for i in range(96)], width=64, height=64)
    rest = ("--vae", vae, "--resolution", 64, "--rows-per-shard", 8, "--batch", batch)
    assert cache("build", images, "--out", tmp_path / "whole", *rest) == 0
    script = tmp_path / "builder.py"
    script.write_text(
        "import os, sys\nfrom pathlib import Path\n"
        "from tests.promises.test_kills import worker\n"
        "from tests.support import wait_for\n"
        "counter = Path(sys.argv[1], 'counter-' + os.environ['RANK'])\n"
        "counter.touch()\n"  # both begin together, else the first leaves nothing to the second
        "wait_for(lambda: len(list(Path(sys.argv[1]).glob('counter-*'))) == 2)\n"
        "sys.exit(worker(counter, 0.4, *sys.argv[2:]))\n"
    )
    words = (images, "--out", tmp_path / "killed", *rest)
    launcher = start_torchrun(2, "--max-restarts", 3, script, tmp_path, *words)
    try:
        wait_for(lambda: size_of(counters[1]) > 0)
        first = psutil.Process(launcher.pid).children()
        first[1].kill()
        wait_for(lambda: not any(rank.is_running() for rank in first))
        begun = size_of(counters[1])
        wait_for(lambda: size_of(counters[1]) > begun)
        assert launcher.poll() is None
        everyone = [*psutil.Process(launcher.pid).children(recursive=True)]
        for process in everyone:  # the launcher too, and the processes that decode
            process.send_signal(signal.SIGTERM)
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait() != 0
        psutil.wait_procs(everyone, timeout=30)
        assert not [process for process in everyone if process.is_running()]
    finally:
        launcher.kill()
        launcher.communicate()
    assert 0 < sum(map(size_of, counters)) < 96

    def start(number: int) -> Any:
        return spawn(worker, counters[number], 0.0, *words, log=tmp_path / "log")

    run_to_the_end(2, start, tmp_path / "log")
    extra = sum(map(size_of, counters)) - 96
    with capsys.disabled():
        print(f"\na rank killed and all stopped, cost {extra} encodings")
    assert 0 <= extra <= batch  # of the killed rank
    ours = files(tmp_path / "killed", "latents.zarr/**/*")
    assert ours == files(tmp_path / "whole", "latents.zarr/**/*")
    assert cache("check", tmp_path / "killed") == 0
