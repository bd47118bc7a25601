"""Free disk space is checked before the first batch."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support import cache, printed, write_images
from xlsd_cache.planning.disk_space import LOG_NBYTES, bytes_to_write
from xlsd_cache.planning.log_state import uncommitted
from xlsd_cache.store.view import StoreView

Out = pytest.CaptureFixture[str]


def test_what_is_to_be_written_is_what_is_written(vae: Path, tmp_path: Path, capsys: Out) -> None:
    images, out = tmp_path / "im", tmp_path / "l"
    write_images(images, [f"{i}.png" for i in range(5)], width=64, height=64)
    write_images(images, ["w.png"], 9, width=128, height=64)
    rest = (images, "--out", out, "--vae", vae, "--buckets", "64x64,128x64", "--rows-per-shard", 4)
    assert cache("build", *rest, "--dry-run") == 0
    assert " to write, " in printed(capsys)
    assert cache("build", *rest) == 0
    store = StoreView.open(out)
    manifest, rows_per_shard = store.manifest, store.rows_per_shard
    shards = {path: path.stat().st_size for path in out.glob("latents.zarr/*x*/c.*")}
    plan = manifest.live(0)
    assert uncommitted(manifest, plan, rows_per_shard).num_rows == 0
    shutil.move(out / "latents.zarr", tmp_path / "away")
    shutil.rmtree(out / "manifest/commit")
    places = uncommitted(manifest, plan, rows_per_shard)
    expected = sum(shards.values()) + 6 * LOG_NBYTES
    assert bytes_to_write(store, places) == expected
    (out / "staging/128x64.0.part").write_bytes(bytes(500))  # as an interrupted build leaves
    assert bytes_to_write(store, places) == expected - 500
    capsys.readouterr()


@pytest.mark.slow
def test_too_small_a_disk_is_refused_with_both_numbers(vae: Path, tmp_path: Path) -> None:
    """On a real one of 256 KiB, which takes a mount of one's own."""
    mount = "mount -t tmpfs -o size=256k none"
    inside = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c")
    disk = tmp_path / "disk"
    disk.mkdir()
    tried = subprocess.run([*inside, f"{mount} '{disk}'"], capture_output=True, check=False)
    if tried.returncode:
        pytest.skip("no mount namespaces here")
    write_images(tmp_path / "im", [f"{i}.png" for i in range(90)], width=128, height=128)
    build = f"'{sys.executable}' -m xlsd_cache build '{tmp_path}/im' --vae '{vae}' --resolution 128"
    build += f" --out '{disk}/l' --rows-per-shard 4 --captions none"
    script = f"""{mount} '{disk}' || exit 99
        {build} --dry-run && exit 98
        {build} && exit 97
        ls '{disk}'/l/latents.zarr/*/c.* 2>/dev/null && exit 96
        true"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*inside, script], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    refused = [line for line in done.stderr.splitlines() if line.startswith("xlsd-cache: too")]
    assert len(refused) == 2
    assert all(" KiB to write, " in line and " KiB free on the disk" in line for line in refused)


def test_a_disk_that_is_nearly_full_is_refused_before_anything_is_written(
    vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path / "im", ["a.png"], width=128, height=128)
    full = SimpleNamespace(total=2**30, used=2**30 - 99, free=99)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    build = ("build", tmp_path / "im", "--out", tmp_path / "l", "--vae", vae, "--resolution", 128)
    for more in ((), ("--dry-run",)):
        assert cache(*build, *more) == 1
        assert "too little room: " in capsys.readouterr().err
    assert not list(tmp_path.glob("l/manifest/plan/*"))
