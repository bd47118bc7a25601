"""Caches of ai-toolkit and SimpleTuner, sizes in file names, and files of an unexpected format."""

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
from tests.support.peer_caches import (
    covered,
    encoded,
    image_files,
    write_ai_toolkit,
    write_kohya,
    write_onetrainer,
    write_safetensors,
    write_simpletuner,
)
from tests.support.stores import latents_by_name
from xlsd_cache.store.identity import read_attributes
from xlsd_cache.store.reader import LatentStore

Out = pytest.CaptureFixture[str]


@pytest.fixture
def images(photos: Path, tmp_path: Path) -> Path:
    """A copy of the photos, whose caches may lie next to them."""
    return Path(shutil.copytree(photos, tmp_path / "images"))


def divided(out: Path, written: dict[str, Any]) -> bool:
    """Whether the store holds these scaled latents, divided by the factor."""
    got = latents_by_name(out)
    return got.keys() == written.keys() and all(
        np.array_equal(latent, written[key].float().numpy() / np.float32(0.13025))
        for key, latent in got.items()
    )


def captions(out: Path) -> dict[str, str | None]:
    with LatentStore.open(out) as store:
        return {Path(row["key"]).name: row["txt"] for row in store.samples.to_pylist()}


@pytest.mark.parametrize("options", [{}, {"flip_y": True, "zoom": 1.3}])
def test_ai_toolkits_latents_find_their_images_and_crops(
    images: Path, vae: Path, tmp_path: Path, capsys: Out, options: dict[str, Any]
) -> None:
    shutil.copy(images / "rocket.jpg", images / "rocket.png")  # the metadata tells which
    written = write_ai_toolkit(
        [i for i in image_files(images) if i.name != "rocket.png"], vae, **options
    )
    (images / "rocket.png").write_bytes((images / "cat.png").read_bytes())
    text = images / "_t_e_cache" / "cat_0123456789012345678901.safetensors"
    text.parent.mkdir()
    save_file({"text_embed": torch.zeros(7, 8)}, text)
    asked = ("import", images / "_latent_cache", "--vae", vae, "--out", tmp_path / "l")
    assert cache(*asked) == 1
    told = capsys.readouterr()
    assert "found 8 latents of ai-toolkit (sample of the posterior), 8 with their image" in told.err
    assert "ai-toolkit stores a random sample of the posterior" in told.err
    assert "they are already scaled (0.13" in told.err
    assert cache(*asked, "--force") == 0
    assert divided(tmp_path / "l", written)
    assert (
        read_attributes(tmp_path / "l")[0].preprocessing == "ai-toolkit sample divided by 0.13025"
    )
    assert captions(tmp_path / "l")["rocket.jpg"] == (images / "rocket.txt").read_text().strip()
    assert cache("import", images, "--vae", vae, "--out", tmp_path / "m", "--force") == 0
    assert divided(tmp_path / "m", written)  # the folder of texts is passed over


def test_ai_toolkits_latents_without_metadata_are_paired_by_the_name_less_its_hash(
    images: Path, vae: Path, tmp_path: Path
) -> None:
    written = write_ai_toolkit(image_files(images), vae)
    for path in (images / "_latent_cache").iterdir():
        save_file(load_file(path), path)
    shutil.copy(images / "cat_wide.png", images / "coffee.png")  # two images of one name
    written.pop("coffee.jpg")
    asked = ("import", images / "_latent_cache", "--vae", vae, "--out", tmp_path / "l", "--force")
    assert cache(*asked) == 0
    got = latents_by_name(tmp_path / "l")
    (lonely,) = got.keys() - written.keys()
    assert lonely.startswith("coffee_")
    assert captions(tmp_path / "l")[lonely] is None
    assert got.keys() - {lonely} == written.keys()


def test_a_wrong_latent_of_ai_toolkits_is_rejected_even_when_forced(
    images: Path, vae: Path, tmp_path: Path
) -> None:
    write_ai_toolkit(image_files(images), vae)
    one, other = (
        next((images / "_latent_cache").glob(f"{n}_?????????????????????*"))
        for n in ("coffee", "rocket")
    )
    save_file(load_file(one), other)
    asked = ("import", images / "_latent_cache", "--vae", vae, "--out", tmp_path / "l", "--force")
    assert cache(*asked) == 0
    (row,) = pq.read_table(tmp_path / "l/rejected.parquet").to_pylist()
    assert row["reason"] == "not_its_image"
    assert Path(row["key"]).name == other.name


@pytest.mark.parametrize("options", [{}, {"zipped": True}, {"hashed": False}])
def test_simpletuners_latents_find_their_images_and_crops(
    images: Path, vae: Path, tmp_path: Path, capsys: Out, options: dict[str, Any]
) -> None:
    written = write_simpletuner(tmp_path / "vae", image_files(images), vae, **options)
    torch.save({"prompt_embeds": torch.zeros(7, 8), "pooled": 1}, tmp_path / "vae" / "0a.pt")
    asked: tuple[object, ...] = (
        "import", tmp_path / "vae", "--vae", vae, "--out", tmp_path / "l"
    )  # fmt: skip
    assert cache(*asked) == 1
    told = capsys.readouterr()
    assert (
        "found 8 latents of simpletuner (sample of the posterior), 0 with their image" in told.err
    )
    assert "simpletuner stores a random sample" in told.err
    assert "none of their images was found" in told.err
    asked = (*asked, "--images", images, "--force")
    assert cache(*asked) == 0
    assert divided(tmp_path / "l", written)
    assert captions(tmp_path / "l")["cat.png"] == (images / "cat.txt").read_text().strip()
    table = images / "aspect_ratio_bucket_metadata_a.json"
    table.write_text("{")
    assert cache(*asked) == 1
    assert f"cannot read {table}, SimpleTuner's table of crops" in last_error(capsys)


def kohya(images: Path, name: str, image: str, vae: Path, size: bool = False) -> None:
    """A file of that name with the latent of `image`."""
    x, _ = covered(images / image, (64, 64), Image.Resampling.BOX)
    latent = encoded(vae, x, "sample").numpy()
    with Image.open(images / image) as picture:
        original = np.array(picture.size)
    mark = "_8x8" if size else ""
    arrays: dict[str, Any] = {f"latents{mark}": latent, f"original_size{mark}": original}
    np.savez(images / f"{name}.npz", **arrays)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_size_is_part_of_the_name_where_an_image_has_it(
    vae: Path, photos: Path, tmp_path: Path, elsewhere: bool
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    shown = {"photo": "coffee", "photo_64x64": "rocket", "photo_512x768": "cat",
             "photo_512x768_flux": "astronaut_face", "b_0096x0096": "cat_wide"}  # fmt: skip
    for number, (name, photo) in enumerate(shown.items()):
        (source,) = photos.glob(f"{photo}.*g")
        with Image.open(source) as picture:
            picture.resize((96, 96)).save(
                images / f"{name}.{'jpg' if number % 2 else 'png'}", quality=95
            )
        (images / f"{name}.txt").write_text(name)
    files = {path.stem: path.name for path in images.glob("*.*g")}
    for name, image in (
        ("photo", "photo"),
        ("photo_64x64", "photo_64x64"),  # as kohya wrote before 2025
        ("photo_512x768_sd", "photo_512x768"),
        ("photo_0096x0096_sdxl", "photo"),  # as kohya writes now
        ("photo_64x64_0096x0096_sdxl", "photo_64x64"),
        ("photo_512x768_flux", "photo_512x768_flux"),
        ("b_0096x0096_0096x0096_sd", "b_0096x0096"),
        ("b_0096x0096_sd", "b_0096x0096"),
    ):
        kohya(images, name, files[image], vae, size=name.endswith(("sd", "sdxl")))
    cached = images
    if elsewhere:
        cached = tmp_path / "cached"
        cached.mkdir()
        for path in images.glob("*.npz"):
            path.rename(cached / path.name)
    asked = ("import", cached, "--images", images, "--vae", vae, "--out", tmp_path / "l", "--force")
    assert cache(*asked) == 0
    with LatentStore.open(tmp_path / "l") as store:
        got = sorted(row["txt"] for row in store.samples.to_pylist())
    assert got == sorted([*shown, "photo", "photo_64x64", "b_0096x0096"])


def test_of_two_possible_names_the_image_decides(photos: Path, vae: Path, tmp_path: Path) -> None:
    for name, photo in (("a", "coffee.jpg"), ("a_0096x0096", "rocket.jpg")):
        with Image.open(photos / photo) as picture:
            picture.resize((96, 96)).save(tmp_path / f"{name}.png")
    asked = ("import", tmp_path, "--vae", vae, "--force", "--captions", "none", "--out")
    for of in ("a", "a_0096x0096"):
        kohya(tmp_path, "a_0096x0096_sd", f"{of}.png", vae, size=True)
        assert cache(*asked, tmp_path.parent / f"{tmp_path.name}_{of}") == 0
        assert latents_by_name(tmp_path.parent / f"{tmp_path.name}_{of}").keys() == {f"{of}.png"}


def test_flipped_latents_and_masks_are_passed_over_with_their_number(
    images: Path, vae: Path, tmp_path: Path, capsys: Out
) -> None:
    write_kohya(images, image_files(images)[:3], vae, more=(64, 64))
    path = next(images.glob("*.npz"))
    with np.load(path) as arrays:
        np.savez(path, **arrays, alpha_mask_8x8=np.zeros((64, 64)))
    asked = ("import", images, "--vae", vae, "--out", tmp_path / "l", "--force")
    assert cache(*asked) == 0
    told = capsys.readouterr().err
    assert "ignored 6 flipped latents (latents_flipped)" in told
    assert "ignored 1 alpha masks (alpha_mask)" in told


@pytest.mark.parametrize("kind", ["kohya", "onetrainer", "safetensors", "simpletuner"])
@pytest.mark.parametrize("suffix", [".npz", ".pt", ".safetensors"])
def test_a_file_is_called_by_what_it_holds(
    images: Path, vae: Path, tmp_path: Path, capsys: Out, kind: str, suffix: str
) -> None:
    made = tmp_path / "made"
    some = image_files(images)[:1]
    if kind == "kohya":
        write_kohya(made, some, vae, old=True)
    elif kind == "onetrainer":
        write_onetrainer(made, some, vae, layout="smart")
    elif kind == "safetensors":
        write_safetensors(made, some, vae)
    else:
        write_simpletuner(made, some, vae)
    (path,) = (p for p in made.iterdir() if p.is_file() and p.suffix != ".json")
    cached = tmp_path / "cached"
    cached.mkdir()
    shutil.copy(path, cached / f"a{suffix}")
    cache("import", cached, "--vae", vae, "--out", tmp_path / "l", "--dry-run")
    assert f"found 1 latents of {kind} (" in printed(capsys)


def test_kinds_are_told_apart_by_content(
    images: Path, vae: Path, tmp_path: Path, capsys: Out
) -> None:
    write_onetrainer(tmp_path / "c", image_files(images)[:2], vae, layout="smart")
    torch.save(torch.zeros(4, 8, 8), tmp_path / "c" / "other.pt")
    assert cache("import", tmp_path / "c", "--vae", vae, "--out", tmp_path / "l") == 1
    assert "caches of onetrainer and simpletuner, e.g." in last_error(capsys)
