"""Helpers that several test modules share; here, to run the real commands and look at the result.

Commands run in this process, or in processes that can be killed.
"""

import json
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

import xlsd_cache.cli
import xlsd_train.cli

# Forked from a server that has imported everything: a process in milliseconds, killed for real.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["tests.support.preload"])


def cache(*args: object) -> int:
    """`xlsd-cache` in this process."""
    return xlsd_cache.cli.main([str(arg) for arg in args])


def small_disk(limit: int, *args: object) -> int:
    """A command where no file may grow beyond `limit` bytes: writing fails as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return cache(*args)


def train(*args: object) -> int:
    """`xlsd-train` in this process."""
    return xlsd_train.cli.main([str(arg) for arg in args])


def spawn(target: Callable[..., Any], *args: object, log: Path) -> Any:
    """Start `target` in a process of its own, its output going to `log`."""
    process = _processes.Process(target=_call, args=(target, args, log))
    process.start()
    return process


def _call(target: Callable[..., Any], args: tuple[object, ...], log: Path) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where the tests run under nohup
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    import torch

    torch.set_num_threads(1)
    try:
        code = target(*args)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def torchrun(processes: int, module: str, *args: object) -> None:
    """Several processes of one command line, as torchrun starts them; each must succeed."""
    process = start_torchrun(processes, "-m", module, *args)
    _, err = process.communicate()
    assert process.returncode == 0, err[-3000:]


def start_torchrun(processes: int, *words: object) -> subprocess.Popen[str]:
    """Start torchrun with these words after its own; its output goes to pipes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    launcher += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": ""}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*launcher, *map(str, words)], env=environment, **pipes)


def together(processes: int, target: Callable[..., Any], *args: object, log: Path) -> list[Any]:
    """Start `target` in processes of one run, as a launcher would; each has a log of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        spawn(_ranked, rank, processes, port, target, *args, log=log.with_suffix(f".{rank}"))
        for rank in range(processes)
    ]


def _ranked(rank: int, processes: int, port: int, target: Callable[..., Any], *args: object) -> Any:
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in told.items()}, MASTER_ADDR="127.0.0.1")
    return target(*args)


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Until it holds; an AssertionError when it does not within the time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def metrics(run: Path) -> list[dict[str, Any]]:
    """A run's metrics, without what the machine's speed and memory decide."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        for name in ("images_per_s", "wait_s", "peak_gib"):
            assert line.pop(name) >= 0
    return lines


def files(folder: Path, pattern: str) -> dict[str, bytes]:
    """Relative path -> bytes of the files that match."""
    found = sorted(path for path in folder.glob(pattern) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def picture(seed: int, width: int = 160, height: int = 128) -> NDArray[np.uint8]:
    """A smooth random picture: content that compresses and resizes like a photo's."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def write_images(folder: Path, names: Sequence[str], first_seed: int = 0, **size: int) -> None:
    """Write pictures of consecutive seeds under these names, each with a caption."""
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(first_seed + i, **size)).save(path)
        path.with_suffix(".txt").write_text(f"picture {first_seed + i}\n")


def sums(out: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What `info --json` says of a store; its sums must be right."""
    capsys.readouterr()
    assert cache("info", out, "--json") == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert told["scanned"] == (
        told["encoded"] + told["reused"] + told["duplicate"] + sum(told["rejected"].values())
    )
    return told


def events_in(text: str) -> list[dict[str, Any]]:
    """The events that a command printed with --json, among other lines."""
    return [json.loads(line) for line in text.splitlines() if line.startswith('{"event": ')]


def printed(capsys: pytest.CaptureFixture[str]) -> str:
    """What a command printed since the last look: its results, then its log."""
    out, err = capsys.readouterr()
    return out + err


def last_error(capsys: pytest.CaptureFixture[str]) -> str:
    """The last line that a command wrote to stderr."""
    return capsys.readouterr().err.strip().splitlines()[-1]
