"""The first signal is answered at once, and the second one ends the process where it is."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support import cache, spawn, wait_for, write_images
from xlsd_cache.encode import Encoder


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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("twice", [False, True])
def test_a_signal_is_answered_in_the_middle_of_a_batch(
    vae: Path, tmp_path: Path, number: signal.Signals, twice: bool
) -> None:
    write_images(tmp_path / "im", ["a.png", "b.png", "c.png"], width=64, height=64)
    log, flag, out = tmp_path / "log", tmp_path / "flag", tmp_path / "l"
    rest = (tmp_path / "im", "--out", out, "--vae", vae, "--resolution", 64, "--batch", 1)
    process = spawn(endless_build, flag, *rest, log=log)
    wait_for(flag.with_suffix(".begun").exists)
    os.kill(process.pid, number)
    wait_for(lambda: "\nxlsd-cache: stopping after the batch at hand" in log.read_text())
    if twice:
        os.kill(process.pid, number)
        process.join()
        assert process.exitcode == 128 + number
        assert log.read_text().endswith("\nxlsd-cache: stopped at once\n")
    else:
        flag.touch()
        process.join()
        assert process.exitcode == 1
        assert "xlsd-cache: stopped; every batch encoded so far is kept" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert cache("build", *rest) == 0
    assert cache("check", out) == 0
