"""The first signal stops after the batch, and says so at once; a second Ctrl-C stops at once."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support import cache, spawn, wait_for, write_images
from xlsd_cache.encoding.encoder import Encoder
from xlsd_cache.runtime.signals import StopSignal
from xlsd_cache.store.reader import LatentStore


def endless_build(flag: Path, *args: object) -> int:
    """`build` whose batch ends when the flag is there."""
    encode = Encoder.encode

    def slowly(self: Encoder, pixels: Any) -> Any:
        flag.with_suffix(".begun").touch()
        while not flag.exists():
            time.sleep(0.01)
        return encode(self, pixels)

    Encoder.encode = slowly  # type: ignore[method-assign]
    return cache("build", *args)


@pytest.mark.parametrize(
    ("numbers", "ends"),
    [
        ([signal.SIGINT], False),
        ([signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGINT], True),
        ([signal.SIGTERM, signal.SIGTERM, signal.SIGHUP, signal.SIGTERM], False),
        ([signal.SIGHUP, signal.SIGHUP, signal.SIGINT], False),
    ],
)
def test_a_signal_is_answered_in_the_middle_of_a_batch(
    vae: Path, tmp_path: Path, numbers: list[signal.Signals], ends: bool
) -> None:
    write_images(tmp_path / "im", ["a.png", "b.png", "c.png"], width=64, height=64)
    log, flag, out = tmp_path / "log", tmp_path / "flag", tmp_path / "l"
    rest = (tmp_path / "im", "--out", out, "--vae", vae, "--resolution", 64, "--batch", 1)
    process = spawn(endless_build, flag, *rest, log=log)
    wait_for(flag.with_suffix(".begun").exists)
    children = psutil.Process(process.pid).children(recursive=True)
    assert children, "images are decoded in processes of their own"
    for number in numbers:  # as systemd does: to all
        for each in (process, *children):
            os.kill(each.pid, number)
        wait_for(lambda: "\nxlsd-cache: stopping after this batch" in log.read_text())
    if ends:
        process.join(10)
        if process.exitcode is None:  # it came between Python's look at signals and its next wait
            os.kill(process.pid, signal.SIGINT)
            process.join()
        assert process.exitcode == 128 + signal.SIGINT
        assert log.read_text().endswith("\nxlsd-cache: stopped at once\n")
    else:
        flag.touch()
        process.join()
        assert process.exitcode == 1
        assert "xlsd-cache: stopped; every batch encoded so far is kept" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert cache("build", *rest) == 0
    assert len(LatentStore.open(out)) == 3, "no image is refused for a signal to its decoder"


def test_what_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            ignored = not stop.asked
            os.kill(os.getpid(), signal.SIGTERM)
            assert ignored
            assert stop.hurries
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
