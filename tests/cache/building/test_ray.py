"""`build --ray`. What needs Ray itself runs where it is installed.

pytest -m slow tests/cache/building/test_ray.py      a cluster of three nodes, minutes
"""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import cache, files, last_error, wait_for, write_images

ROOT = Path(__file__).parents[3]


@pytest.fixture
def arguments(vae: Path, tmp_path: Path) -> tuple[object, ...]:
    """A build of 160 images in 20 units, without a store."""
    write_images(tmp_path / "im", [f"{i:03d}.png" for i in range(160)], width=64, height=64)
    options = ("--resolution", 64, "--rows-per-shard", 8, "--batch", 4, "--workers", 1)
    return (tmp_path / "im", "--vae", vae, *options)


def test_without_ray_the_command_that_installs_it_is_said(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "ray", None)  # as where it is not installed
    assert cache("build", photos, "--out", tmp_path / "l", "--ray", "local") == 1
    assert last_error(capsys).endswith("; `pip install 'xlsd[ray]'`")
    assert not (tmp_path / "l").exists()
    assert cache("build", photos, "--out", tmp_path / "l", "--ray", "auto", "--shard", "0/2") == 1
    assert "--ray and --shard both share out the work" in last_error(capsys)


def ray_build(*arguments: object) -> subprocess.Popen[str]:
    """Start a build in a process of its own, as Ray needs one."""
    words = [sys.executable, "-m", "xlsd_cache", "build", *map(str, arguments)]
    told = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": ""}
    pipe = subprocess.PIPE
    return subprocess.Popen(words, env={**os.environ, **told}, stdout=pipe, stderr=pipe, text=True)


@pytest.mark.slow
def test_an_address_without_a_cluster_is_refused_at_once(photos: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        for address in (f"127.0.0.1:{closed.getsockname()[1]}", "auto", "nowhere"):
            process = ray_build(photos, "--out", tmp_path / "l", "--ray", address)
            _, err = process.communicate(timeout=120)
            assert process.returncode == 1
            last = err.strip().splitlines()[-1]
            assert last.startswith(f"xlsd-cache: --ray {address}: "), err
            assert "give HOST:PORT as `ray start --head` prints it, auto, or local" in last
    assert not (tmp_path / "l").exists()


@pytest.mark.slow
def test_a_stop_leaves_a_store_that_any_build_continues(
    arguments: tuple[object, ...], tmp_path: Path
) -> None:
    """By SIGTERM to the driver of a cluster on this machine; the rest is built without Ray."""
    pytest.importorskip("ray")
    out = tmp_path / "l"
    process = ray_build(*arguments, "--out", out, "--ray", "local", "--json")
    assert process.stdout is not None
    events = []
    for line in process.stdout:
        events.append(json.loads(line))
        if events[-1].get("images", 0) < 160 and events[-1]["event"] == "progress":
            process.send_signal(signal.SIGTERM)
            break
    rest, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert f"stopped; every batch encoded so far is kept in {out}. Run the same" in err
    last = [json.loads(line) for line in rest.splitlines()][-1]
    assert last["event"] in {"stopped", "failed"}
    locks = list((out / "staging").glob("64x64.*.lock"))
    wait_for(lambda: all(is_free(lock) for lock in locks))  # the actors have ended
    commits = {path: path.stat().st_mtime_ns for path in (out / "manifest/commit").iterdir()}
    assert 0 < len(commits) < 20
    assert cache("build", *arguments, "--out", out) == 0
    assert all(path.stat().st_mtime_ns == then for path, then in commits.items())
    assert cache("build", *arguments, "--out", tmp_path / "whole") == 0
    assert files(out, "latents.zarr/**/*") == files(tmp_path / "whole", "latents.zarr/**/*")


def is_free(lock: Path) -> bool:
    """Whether no process holds it."""
    import fcntl

    try:
        with lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
    return True


@pytest.mark.slow
def test_a_node_and_the_driver_are_killed_and_nothing_else_is_encoded_twice(
    tmp_path: Path,
) -> None:
    pytest.importorskip("ray")
    report = tmp_path / "report.json"
    words = ("--images", "320", "--rows-per-shard", "16", "--json", str(report))
    done = subprocess.run(
        [sys.executable, "benchmarks/cache/ray_cluster.py", *words],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(report.read_text())["rows"]
    assert [row["what"] for row in rows if row["table"] == "event"][:2] == [
        "a node killed, another joins", "the driver killed, and started again"
    ]  # fmt: skip
    targets = [row for row in rows if row["table"] == "target"]
    assert len(targets) == 6
    assert not [row for row in targets if not row["met"]], done.stdout
