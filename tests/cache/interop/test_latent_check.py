"""Each imported latent is compared with its own image."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.support import cache, last_error, printed
from tests.support.peer_caches import encoded, image_files, write_safetensors
from tests.support.stores import holds, latents_by_name
from xlsd_cache.encoding.encoder import to_input

Out = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def cached(photos: Path, vae: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight images with latents next to them; not to be written to."""
    folder = Path(shutil.copytree(photos, tmp_path_factory.mktemp("cached") / "images"))
    write_safetensors(folder, image_files(folder), vae)
    return folder


@pytest.fixture
def images(cached: Path, tmp_path: Path) -> Path:
    """A copy of them."""
    return Path(shutil.copytree(cached, tmp_path / "images"))


def latents(images: Path) -> list[Path]:
    return sorted(images.glob("*.img_sdxl"))


def two(images: Path) -> tuple[Path, Path]:
    """Latents of different pictures in one bucket."""
    return images / "coffee.img_sdxl", images / "rocket.img_sdxl"


def swap(one: Path, other: Path) -> None:
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)


def written(images: Path, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """Image name -> latent, of the files as they are now."""
    return {
        image.name: load_file(image.with_suffix(".img_sdxl"))["latent"]
        for image in image_files(images)
        if image.stem not in without
    }


def rejected(out: Path) -> dict[str, str]:
    """Stem -> reason."""
    told = pq.read_table(out / "rejected.parquet").to_pylist()
    return {Path(row["key"]).stem: row["reason"] for row in told}


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--force",),
        pytest.param(("--compare", 2), marks=pytest.mark.slow),
        pytest.param(("--compare", 1), marks=pytest.mark.slow),
    ],
)
def test_two_swapped_latents_are_rejected_by_name_and_the_others_imported(
    images: Path, vae: Path, tmp_path: Path, capsys: Out, options: tuple[object, ...]
) -> None:
    pair = two(images)
    swap(*pair)
    wrong = tuple(path.stem for path in pair)
    asked = ("import", images, "--out", tmp_path / "l", "--vae", vae, *options)
    assert cache(*asked) == 0
    told = capsys.readouterr()
    assert (
        "8 scanned = 6 encoded + 0 reused + 0 duplicate + 2 rejected (not_its_image 2)" in told.out
    )
    assert f"rejected images/{wrong[0]}.img_sdxl: not_its_image: correlation" in told.err
    assert holds(tmp_path / "l", written(images, wrong))
    assert rejected(tmp_path / "l") == dict.fromkeys(wrong, "not_its_image")
    assert cache(*asked) == 0  # again, and nothing changes
    assert "8 scanned = 0 encoded + 6 reused + 0 duplicate + 2 rejected" in printed(capsys)
    swap(*pair)  # mended
    assert cache(*asked) == 0
    assert "8 scanned = 2 encoded + 6 reused" in printed(capsys)
    assert holds(tmp_path / "l", written(images))
    assert cache("check", tmp_path / "l") == 0


def test_what_has_no_image_among_others_takes_force(
    images: Path, vae: Path, tmp_path: Path, capsys: Out
) -> None:
    image_files(images)[0].unlink()
    gone = image_files(images)[0]
    gone.write_bytes(b"no image any more")
    asked = ("import", images, "--out", tmp_path / "l", "--vae", vae)
    assert cache(*asked) == 0
    assert "6 encoded + 0 reused + 0 duplicate + 2 rejected (not_compared 2)" in printed(capsys)
    assert cache(*asked) == 0
    assert "0 encoded + 6 reused + 0 duplicate + 2 rejected" in printed(capsys)
    assert cache(*asked, "--force") == 0
    assert "8 scanned = 2 encoded + 6 reused + 0 duplicate + 0 rejected" in printed(capsys)
    assert len(latents_by_name(tmp_path / "l")) == 8


@pytest.mark.parametrize("compare", [1, 8])
def test_one_latent_that_is_scaled_otherwise_is_rejected(
    images: Path, vae: Path, tmp_path: Path, compare: int
) -> None:
    path = latents(images)[2]
    save_file({"latent": load_file(path)["latent"] * 0.13025}, path)
    asked = ("import", images, "--out", tmp_path / "l", "--vae", vae, "--compare", compare)
    assert cache(*asked, "--force") == 0
    assert rejected(tmp_path / "l") == {path.stem: "other_scale"}
    assert holds(tmp_path / "l", written(images, (path.stem,)))


def test_images_of_one_colour_are_proved_and_told_apart(
    images: Path, vae: Path, tmp_path: Path
) -> None:
    for name, colour in (("black", 0), ("white", 255), ("grey", 128), ("gray", 60)):
        Image.new("RGB", (128, 128), (colour,) * 3).save(images / f"{name}.png")
        pixels = np.full((1, 128, 128, 3), colour, np.uint8)
        latent = encoded(vae, to_input(torch.from_numpy(pixels)), "sample")
        save_file({"latent": latent}, images / f"{name}.img_sdxl")
    swap(images / "black.img_sdxl", images / "white.img_sdxl")
    for compare in (4, 16):
        out = tmp_path / str(compare)
        assert cache("import", images, "--out", out, "--vae", vae, "--compare", compare) == 0
        assert rejected(out) == {"black": "not_its_image", "white": "not_its_image"}


def test_mirrored_latents_are_their_images(images: Path, vae: Path, tmp_path: Path) -> None:
    from tests.support.peer_caches import bucket_of, covered

    for image in image_files(images)[::2]:
        x, _ = covered(image, bucket_of(image), Image.Resampling.BICUBIC)
        save_file({"latent": encoded(vae, x.flip(3))}, image.with_suffix(".img_sdxl"))
    for compare in (1, 2):
        out = tmp_path / str(compare)
        assert cache("import", images, "--out", out, "--vae", vae, "--compare", compare) == 0
        assert holds(out, written(images))


def test_a_wrong_latent_added_to_a_store_is_rejected_and_nothing_else(
    images: Path, vae: Path, tmp_path: Path, capsys: Out
) -> None:
    pair = two(images)
    late = pair[0].read_bytes()
    pair[0].unlink()
    asked = ("import", images, "--out", tmp_path / "l", "--vae", vae)
    assert cache(*asked) == 0
    pair[0].write_bytes(pair[1].read_bytes())
    assert cache(*asked) == 0
    assert "8 scanned = 0 encoded + 7 reused + 0 duplicate + 1 rejected" in printed(capsys)
    pair[0].write_bytes(late)
    assert cache(*asked) == 0
    assert holds(tmp_path / "l", written(images))


def test_when_none_is_right_nothing_is_written(
    images: Path, vae: Path, tmp_path: Path, capsys: Out
) -> None:
    pair = two(images)
    for path in latents(images):
        if path not in pair:
            path.unlink()
    swap(*pair)
    asked = ("import", images, "--out", tmp_path / "l", "--vae", vae, "--force")
    assert cache(*asked) == 1
    assert "2 of 2 compared latents do not match their images" in last_error(capsys)
    assert not (tmp_path / "l").exists()


def test_a_dry_run_counts_what_would_be_imported(
    images: Path, vae: Path, tmp_path: Path, capsys: Out
) -> None:
    pair = two(images)
    swap(*pair)
    assert cache("import", images, "--out", tmp_path / "l", "--vae", vae, "--dry-run") == 0
    assert "to import: 6 latents" in printed(capsys)
    assert not (tmp_path / "l").exists()
