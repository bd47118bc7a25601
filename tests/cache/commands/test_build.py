import os
import resource
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.support import (
    cache,
    events_in,
    files,
    printed,
    spawn,
    sums,
    torchrun,
    wait_for,
    write_images,
)
from tests.support.stores import slow_build
from tests.support.vaes import tiny
from xlsd_cache.encoding.encoder import Encoder
from xlsd_cache.store.reader import LatentStore

Build = Callable[..., int]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Twelve pictures of three shapes, and some that cannot be encoded."""
    folder = tmp_path / "images"
    for shape, (width, height) in {"s": (160, 128), "w": (256, 80), "t": (70, 200)}.items():
        names = [f"{shape}{i}.png" for i in range(4)]
        write_images(folder, names, first_seed=ord(shape), width=width, height=height)
    write_images(folder, ["small.png"], width=20, height=20)
    shutil.copy(folder / "s0.png", folder / "zcopy.png")
    broken = (folder / "s1.png").read_bytes()
    (folder / "broken.png").write_bytes(broken[:-900])
    return folder


@pytest.fixture
def build(images: Path, vae: Path, tmp_path: Path) -> Build:
    """Build `images` into tmp_path/latents."""

    def run(*more: object) -> int:
        return cache("build", *arguments(images, tmp_path / "latents", vae), *more)

    return run


def arguments(images: Path, out: Path, vae: Path) -> tuple[object, ...]:
    return (images, "--out", out, "--vae", vae, "--resolution", 128, "--rows-per-shard", 4,
            "--batch", 3)  # fmt: skip


def test_every_image_ends_encoded_or_rejected_with_a_reason(
    build: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build() == 0
    said = printed(capsys)
    assert "15 scanned = 12 encoded + 0 reused + 1 duplicate + 2 rejected (too_small 1, tr" in said
    told = sums(tmp_path / "latents", capsys)
    assert (told["scanned"], told["encoded"], told["duplicate"], told["live"]) == (15, 12, 1, 12)
    assert told["rejected"] == {"too_small": 1, "truncated": 1}
    assert told["buckets"] == {"64x192": 4, "128x128": 4, "192x64": 4}
    rejected = pq.read_table(tmp_path / "latents/rejected.parquet").to_pylist()
    assert {(row["key"], row["reason"]) for row in rejected} == {
        ("images/broken.png", "truncated"),
        ("images/small.png", "too_small"),
        ("images/zcopy.png", "duplicate"),
    }


def test_a_second_run_encodes_nothing_and_changes_nothing(
    build: Build, tmp_path: Path, encoded: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert build() == 0
    first = files(tmp_path / "latents", "[!m]*/**/*")
    manifest = files(tmp_path / "latents", "manifest/*/*")
    encoded.clear()
    assert build("--batch", 2) == 0
    assert encoded == []
    assert files(tmp_path / "latents", "[!m]*/**/*") == first
    assert files(tmp_path / "latents", "manifest/*/*") == manifest
    told = sums(tmp_path / "latents", capsys)
    assert (told["encoded"], told["reused"], told["duplicate"]) == (0, 12, 1)


def test_only_new_and_changed_images_are_encoded(
    build: Build, images: Path, tmp_path: Path, encoded: list[int],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert build() == 0
    encoded.clear()
    write_images(images, ["new.png", "s2.png"], first_seed=500)
    (images / "s3.png").unlink()
    (images / "w0.png").rename(images / "w_renamed.png")
    (images / "w0.txt").rename(images / "w_renamed.txt")
    os.utime(images / "w1.png", ns=(5, 5))
    assert build() == 0
    assert sum(encoded) == 2
    told = sums(tmp_path / "latents", capsys)
    assert (told["scanned"], told["encoded"], told["reused"]) == (15, 2, 10)
    with LatentStore.open(tmp_path / "latents") as store:
        samples = {row["key"]: row for row in store.samples.to_pylist()}
        assert samples["images/w_renamed.png"]["txt"] == f"picture {ord('w')}"
        assert "images/s3.png" not in samples
        assert "images/w0.png" not in samples
        changed = samples["images/s2.png"]
        pixels = np.array(Image.open(images / "s2.png").crop((16, 0, 144, 128)))
        assert changed["row"] >= 4
        raw = store.read(changed["bucket"], [changed["row"]])
    assert np.abs(raw - encode_alone(tmp_path, pixels)).max() < 1e-4 * raw.std()
    assert cache("check", tmp_path / "latents", "--decode", 99) == 0


def encode_alone(tmp_path: Path, pixels: Any) -> Any:
    import torch

    from xlsd_cache.encoding.compatibility import load_vae_for
    from xlsd_cache.store.identity import read_attributes

    identity, _ = read_attributes(tmp_path / "latents")
    return Encoder(load_vae_for(identity), "fp32", torch.device("cpu")).encode(pixels[None])


def test_images_that_change_or_vanish_while_building_are_told_and_taken_up_later(
    build: Build, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    encode = Encoder.encode

    def meanwhile(self: Encoder, pixels: Any) -> Any:
        write_images(images, ["w0.png"], first_seed=900, width=256, height=80)
        (images / "w1.png").unlink(missing_ok=True)
        monkeypatch.undo()
        return encode(self, pixels)

    monkeypatch.setattr(Encoder, "encode", meanwhile)
    assert build("--workers", 1, "--batch", 1) == 0
    told = sums(tmp_path / "latents", capsys)
    assert told["rejected"] == {"changed": 1, "too_small": 1, "truncated": 1, "vanished": 1}
    assert build() == 0
    told = sums(tmp_path / "latents", capsys)
    assert told["rejected"] == {"too_small": 1, "truncated": 1}
    assert (told["encoded"], told["live"]) == (1, 11)


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("--resolution", 192, "resolution 128 and not 192"),
        ("--precision", "bf16", "precision fp32 and not bf16"),
        ("--store-dtype", "float16", "dtype float32 and not float16"),
        ("--buckets", "square", "buckets aspect and not square"),
        ("--max-ratio", 3.0, "max_ratio 4.0 and not 3.0"),
        ("--rows-per-shard", 8, "4 rows per shard"),
    ],
)
def test_another_identity_is_refused_naming_both_values(
    build: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    option: str, value: object, told: str,
) -> None:  # fmt: skip
    assert build() == 0
    before = files(tmp_path / "latents", "**/*")
    assert build(option, value) == 1
    sentence = capsys.readouterr().err.strip().splitlines()[-1]
    assert told in sentence
    assert "another --out" in sentence
    assert files(tmp_path / "latents", "**/*") == before


def test_another_vae_is_refused(
    build: Build, images: Path, vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build() == 0
    other = arguments(images, tmp_path / "latents", tiny(tmp_path / "tiny"))
    assert cache("build", *other) == 1
    assert "vae_class AutoencoderKL and not AutoencoderTiny" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("prepare", "told"),
    [
        ("foreign", "no latent store"),
        ("file", "is a file"),
        ("captions", "none of the"),
        ("nothing", "no images in"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(
    build: Build, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    prepare: str, told: str,
) -> None:  # fmt: skip
    out = tmp_path / "latents"
    if prepare == "foreign":
        (out / "mine").mkdir(parents=True)
    elif prepare == "file":
        out.write_text("mine")
    elif prepare == "captions":
        for path in images.glob("*.txt"):
            path.unlink()
    else:
        for path in images.glob("*.png"):
            path.unlink()
    before = sorted(tmp_path.rglob("*"))
    assert build() == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if "xlsd-cache:" in line]
    assert len(errors) == 1
    assert told in errors[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_images_may_go_without_captions_when_asked(build: Build, images: Path) -> None:
    for path in images.glob("*.txt"):
        path.unlink()
    assert build("--captions", "none") == 0


def test_a_dry_run_writes_nothing(build: Build, tmp_path: Path) -> None:
    assert build("--dry-run") == 0
    assert not (tmp_path / "latents").exists()


def test_nothing_usable_is_an_error(
    vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path / "in", ["a.png"], width=20, height=20)
    assert cache("build", *arguments(tmp_path / "in", tmp_path / "l", vae)) == 1
    assert "none of the 1 images could be encoded" in capsys.readouterr().err


def test_half_precision_is_measured_and_near(
    build: Build, tmp_path: Path, vae: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build() == 0
    half = tmp_path / "half"
    assert cache("build", *arguments(images, half, vae), "--store-dtype", "float16") == 0
    assert "float16 rounding: 2." in printed(capsys)  # about 2e-4 of the spread
    with LatentStore.open(tmp_path / "latents") as full, LatentStore.open(half) as rounded:
        for bucket, rows in full.buckets.items():
            exact = full.read(bucket, rows)
            assert rounded.read(bucket, rows).dtype == np.float16
            assert np.array_equal(rounded.read(bucket, rows), exact.astype(np.float16))


def test_values_that_cannot_be_stored_reject_the_image(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    encode = Encoder.encode
    seen: set[tuple[int, ...]] = set()

    def spoilt(self: Encoder, pixels: Any) -> Any:
        latents = encode(self, pixels)
        if pixels.shape not in seen:  # one of each shape
            latents[0, 0, 0, 0] = {0: np.nan, 1: 1e5}.get(len(seen), 0.0)
        seen.add(pixels.shape)
        return latents

    monkeypatch.setattr(Encoder, "encode", spoilt)
    assert build("--store-dtype", "float16", "--batch", 4) == 0
    told = sums(tmp_path / "latents", capsys)
    assert told["rejected"] == {"non_finite": 1, "overflow": 1, "too_small": 1, "truncated": 1}


def test_ctrl_c_leaves_a_store_that_goes_on(
    build: Build, images: Path, vae: Path, tmp_path: Path
) -> None:
    assert build() == 0
    expected = files(tmp_path / "latents", "latents.zarr/**/*")
    log, out = tmp_path / "log", tmp_path / "again"
    process = spawn(slow_build, *arguments(images, out, vae), "--json", log=log)
    wait_for(lambda: any((out / "staging").glob("*.jnl")))
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode == 1
    told = [event["event"] for event in events_in(log.read_text())]
    assert (told[0], told[-1]) == ("start", "stopped")
    assert "failed" not in told
    assert "xlsd-cache: stopped; every batch encoded so far is kept" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert cache("build", *arguments(images, out, vae)) == 0
    assert files(out, "latents.zarr/**/*") == expected


def small_disk(limit: int, *args: object) -> int:
    """`build` where no file may grow beyond `limit` bytes: writing fails as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return cache("build", *args)


def test_a_full_disk_is_said_and_loses_nothing(images: Path, vae: Path, tmp_path: Path) -> None:
    log, out = tmp_path / "log", tmp_path / "l"
    process = spawn(small_disk, 9000, *arguments(images, out, vae), log=log)
    process.join()
    said = [line for line in log.read_text().splitlines() if line.startswith("xlsd-cache:")]
    assert process.exitcode == 1
    assert len(said) == 1
    assert "File too large. What is committed is safe" in said[0]
    assert "Traceback" not in log.read_text()
    assert cache("build", *arguments(images, out, vae)) == 0
    assert cache("check", out) == 0


def test_a_decoding_process_that_dies_costs_nothing(
    images: Path, vae: Path, tmp_path: Path, build: Build
) -> None:
    """By no image's fault: another process takes over, also from one that has just begun."""
    log, out = tmp_path / "log", tmp_path / "killed"
    process = spawn(slow_build, *arguments(images, out, vae), "--workers", 1, log=log)
    killed = set[int]()
    while process.is_alive():
        with suppress(psutil.NoSuchProcess):  # it has just ended
            for child in psutil.Process(process.pid).children():
                if len(killed) < 3 and child.pid not in killed:
                    killed.add(child.pid)
                    time.sleep(0.02 + 0.3 * len(killed))
                    child.kill()
        time.sleep(0.01)
    assert process.exitcode == 0, log.read_text()[-2000:]
    assert killed
    assert build() == 0
    ours = files(out, "latents.zarr/**/*")
    assert ours == files(tmp_path / "latents", "latents.zarr/**/*")


@pytest.mark.slow
def test_torchrun_shares_one_store_between_its_processes(
    images: Path, vae: Path, tmp_path: Path, build: Build
) -> None:
    assert build() == 0
    torchrun(2, "xlsd_cache", "build", *arguments(images, tmp_path / "two", vae))
    theirs = files(tmp_path / "two", "latents.zarr/**/*")
    assert theirs == files(tmp_path / "latents", "latents.zarr/**/*")
    assert cache("check", tmp_path / "two") == 0


def test_larger_images_are_let_in_when_asked_and_stay(
    build: Build, images: Path, tmp_path: Path, encoded: list[int],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert build("--max-megapixels", 0.02) == 0  # 70x200 is less, all others are more
    assert sums(tmp_path / "latents", capsys)["rejected"]["too_many_pixels"] == 10
    encoded.clear()
    assert build() == 0
    assert sum(encoded) == 8
    assert sums(tmp_path / "latents", capsys)["rejected"] == {"too_small": 1, "truncated": 1}
    encoded.clear()
    assert build("--max-megapixels", 0.02) == 0
    assert encoded == []
    told = sums(tmp_path / "latents", capsys)
    assert (told["live"], told["rejected"]) == (12, {"too_small": 1, "truncated": 1})
    assert cache("check", tmp_path / "latents", "--decode", 12) == 0


def test_what_large_images_may_take_of_memory_is_said_before(
    build: Build,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory = psutil.virtual_memory()._replace(total=8 * 2**30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    assert build("--max-megapixels", 256, "--workers", 2, "--dry-run") == 0
    said = capsys.readouterr()
    assert "decoding one may take 6.0 GiB, 2 at once 12.0 GiB" in said.err
    assert "--workers 1 is safe" in said.err
    assert build("--max-megapixels", 500) == 1
    assert "may take 11.7 GiB, and this machine has 8.0 GiB" in capsys.readouterr().err
    for wrong, told in (
        (0, "not above 0"),
        (-1, "not above 0"),
        ("nan", "not a number"),
        (2148, "more than 2147"),
    ):
        assert build("--max-megapixels", wrong) == 1
        assert f"--max-megapixels {wrong} is {told}" in capsys.readouterr().err
    assert not (tmp_path / "latents").exists()
