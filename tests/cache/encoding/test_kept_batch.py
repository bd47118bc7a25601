"""A build on a GPU, of which only the free memory is simulated: it runs on the CPU."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support import cache, files, printed, spawn, wait_for, write_images
from tests.support.stores import latents_by_name, pause_batches
from xlsd_cache.encoding.vae import Vae

ALL = 10**6
SIDE = 64
KEPT = "encoder-the-CPU.json"


def build(
    out: Path, room: float, most: int = ALL, attempts: Path | None = None, *options: object
) -> int:
    """Build where `room` images fit by the numbers, and really at most `most` at once.

    The sizes of all calls that are tried are appended to `attempts`.
    """
    with pytest.MonkeyPatch.context() as patch:
        folder = out.parent
        width = json.loads((folder / "vae" / "config.json").read_text())["block_out_channels"][0]
        free = room * 6 * 4 * SIDE**2 * width / 0.7
        for place in ("encoding.encoder", "building.worker"):
            patch.setattr(f"xlsd_cache.{place}.free_on", lambda _: free)
        encode = Vae.encode

        def limited(self: Vae, x: Tensor) -> Tensor:
            if attempts:
                with attempts.open("a") as file:
                    file.write(f"{len(x)} ")
            if len(x) > most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return encode(self, x)

        patch.setattr(Vae, "encode", limited)
        return cache("build", folder / "images", "--out", out, "--vae", folder / "vae",
                     "--resolution", SIDE, "--captions", "none", "--workers", 2,
                     *options)  # fmt: skip


def slow_build(*args: Any) -> int:
    """A build with a pause before each batch, to be killed in."""
    pause_batches(0.2)
    return build(*args)


@pytest.fixture
def folder(vae: Path, tmp_path: Path) -> Path:
    """With `images`, 44 of one size, and `vae`."""
    (tmp_path / "vae").symlink_to(vae)
    write_images(tmp_path / "images", [f"{i:02d}.png" for i in range(44)], width=SIDE, height=SIDE)
    (tmp_path / "images" / "03.png").write_bytes(b"not an image")
    return tmp_path


def tried(path: Path) -> list[int]:
    """The sizes of all calls; the file is removed."""
    sizes = [int(size) for size in path.read_text().split()]
    path.unlink()
    return sizes


@pytest.mark.parametrize(("later", "most"), [(1.5, ALL), (1000, 4)])
def test_a_killed_build_ends_byte_equal_whatever_memory_is_free_later(
    folder: Path, later: float, most: int
) -> None:
    """Batches of 8 then too, and in the same halves where the first ones did not fit."""
    calls = folder / "calls"
    assert build(folder / "whole", 8.5, most, calls) == 0
    sizes = tried(calls)
    assert max(sizes) == 8
    out = folder / "killed"
    process = spawn(slow_build, out, 8.5, most, log=folder / "log")
    wait_for(lambda: any(path.stat().st_size for path in out.glob("staging/*.jnl")))
    process.kill()
    process.join()
    assert not list(out.glob("manifest/commit/*"))
    assert build(out, later, most, calls) == 0
    again = tried(calls)
    assert len(again) < len(sizes)
    assert max(again) == (8 if most == ALL else 4)  # kept: that 8 do not fit
    assert files(out, "latents.zarr/**/*") == files(folder / "whole", "latents.zarr/**/*")


def test_what_did_not_fit_is_halved_in_later_builds_too(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, calls = folder / "latents", folder / "calls"
    assert build(folder / "other", 4.5) == 0
    capsys.readouterr()
    assert build(out, 8.5, 4, calls) == 0
    assert printed(capsys).count("do not fit the GPU's memory: halving the batch") == 1
    assert 1 <= tried(calls).count(8) <= 2  # in flight
    ours, theirs = latents_by_name(out), latents_by_name(folder / "other")
    assert ours.keys() == theirs.keys()
    for name, latent in ours.items():
        assert np.abs(latent - theirs[name]).max() < 1e-5 * latent.std()

    write_images(
        folder / "images", [f"new{i:02d}.png" for i in range(16)], 100, width=SIDE, height=SIDE
    )
    assert build(out, 1000, 4, calls) == 0
    assert max(tried(calls)) == 4
    assert "0.03 megapixels or more ran out of this GPU's memory before" in printed(capsys)
    assert {path.name for path in (out / "staging").iterdir()} == {"plan.lock", KEPT}


def test_another_batch_is_tried_when_asked_for_and_kept(folder: Path) -> None:
    out, calls = folder / "latents", folder / "calls"
    kept = out / "staging" / KEPT
    assert build(out, 8.5, 4) == 0
    assert json.loads(kept.read_text()) == {"batch": 8, "full_at": 8 * SIDE**2}
    full_at = 8 * SIDE**2
    for number, (asked, room, content, largest) in enumerate(
        (
            (["--batch", 8], 1000, {"batch": 8, "full_at": full_at}, 4),
            (["--batch", 6], 1.5, {"batch": 6, "full_at": None}, 6),
            ([], 1.5, {"batch": 6, "full_at": None}, 6),
        )
    ):
        write_images(folder / "images", [f"{number}{i}.png" for i in range(9)], 50 + 9 * number,
                     width=SIDE, height=SIDE)  # fmt: skip
        assert build(out, room, ALL, calls, *asked) == 0
        assert json.loads(kept.read_text()) == content
        assert max(tried(calls)) == largest
    kept.write_text('{"batch": "8", "full_at": -1}')  # by whatever
    write_images(folder / "images", ["last.png"], 99, width=SIDE, height=SIDE)
    assert build(out, 2.5) == 0
    assert json.loads(kept.read_text()) == {"batch": 2, "full_at": None}


def test_nothing_is_kept_on_a_cpu(store: Path) -> None:
    assert not list((store / "staging").glob("encoder-*"))
