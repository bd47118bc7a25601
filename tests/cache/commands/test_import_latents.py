import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.support import cache, files, last_error, metrics, printed, train
from tests.support.peer_caches import (
    bucket_of,
    covered,
    encoded,
    image_files,
    write_kohya,
    write_onetrainer,
    write_safetensors,
)
from tests.support.stores import holds, latents_by_name
from xlsd_cache.images.decode import PREPROCESSING
from xlsd_cache.store.identity import read_attributes
from xlsd_cache.store.reader import LatentStore

Out = pytest.CaptureFixture[str]


@pytest.fixture
def images(photos: Path, tmp_path: Path) -> Path:
    """A copy of the photos, whose caches may lie next to them."""
    return Path(shutil.copytree(photos, tmp_path / "images"))


def test_safetensors_come_over_byte_equal_and_train(
    images: Path, vae: Path, model: Path, tmp_path: Path, capsys: Out
) -> None:
    written = write_safetensors(images, image_files(images), vae)
    out = tmp_path / "latents"
    assert cache("import", images, "--out", out, "--vae", vae) == 0
    told = printed(capsys)
    assert "found 8 latents of safetensors (mean of the posterior), 8 with their image" in told
    assert "compared 8 of 8 latents" in told
    assert "8 scanned = 8 encoded + 0 reused + 0 duplicate + 0 rejected" in told
    assert holds(out, written)
    with LatentStore.open(out) as store:
        assert store.caption_columns == ("txt",)
        sample = store.samples.to_pylist()[0]
        caption = (images / Path(sample["key"]).name).with_suffix(".txt")
        assert sample["txt"] == caption.read_text().strip()
        assert len(sample["content_hash"]) == 64
    assert cache("check", out) == 0
    assert train("--phase", "unet", "--batch", 2, "--data", out, "--model", model, "--steps", 1,
                 "--sample-every", 0, "--threads", 1, "--out", tmp_path / "run") == 0  # fmt: skip
    assert len(metrics(tmp_path / "run")) == 1


@pytest.mark.parametrize("old", [False, True])
def test_kohyas_draws_are_refused_with_their_noise_and_taken_when_forced(
    images: Path, vae: Path, tmp_path: Path, capsys: Out, old: bool
) -> None:
    more = None if old else (64, 64)
    written = write_kohya(images, image_files(images), vae, old=old, more=more)
    out = tmp_path / "latents"
    asked = ("import", images, "--out", out, "--vae", vae)
    assert cache(*asked) == 1
    told = last_error(capsys)
    assert "kohya stores a random sample of the posterior, not its mean, noise" in told
    assert "--force" in told
    assert not out.exists()
    assert cache(*asked, "--force") == 0
    assert holds(out, written)
    assert read_attributes(out)[0].preprocessing == "kohya sample"
    assert "imported: kohya sample" in (out / "latents.zarr/zarr.json").read_text()


@pytest.mark.parametrize(("layout", "variations"), [("list", 2), ("dict", 1), ("smart", 1)])
def test_onetrainers_caches_find_their_images_wherever_they_lie(
    images: Path, vae: Path, tmp_path: Path, capsys: Out, layout: str, variations: int
) -> None:
    written = write_onetrainer(
        tmp_path / "cache", image_files(images), vae, layout=layout, variations=variations
    )
    out = tmp_path / "latents"
    assert cache("import", tmp_path / "cache", "--out", out, "--vae", vae, "--compare", 8) == 0
    assert f"found {len(written)} latents of onetrainer" in printed(capsys)
    assert holds(out, written)
    images.rename(tmp_path / "moved")
    asked = ("import", tmp_path / "cache", "--vae", vae, "--out", tmp_path / "again")
    assert cache(*asked) == 1
    assert "none of their images was found" in last_error(capsys)
    assert cache(*asked, "--images", tmp_path / "moved") == 0
    assert holds(tmp_path / "again", written)


def test_half_precision_stays_half_and_bfloat16_becomes_float32(
    images: Path, vae: Path, tmp_path: Path
) -> None:
    for dtype, wanted in ((torch.float16, np.float16), (torch.bfloat16, np.float32)):
        cached = tmp_path / str(dtype)
        written = write_safetensors(cached, image_files(images), vae, dtype=dtype)
        out = tmp_path / f"{dtype}.store"
        assert cache("import", cached, "--images", images, "--vae", vae, "--out", out) == 0
        got = latents_by_name(out)
        assert {latent.dtype for latent in got.values()} == {np.dtype(wanted)}
        for key, latent in got.items():
            assert np.array_equal(latent, written[key].float().numpy().astype(wanted))


def test_a_second_run_imports_nothing_whether_the_images_are_there_or_not(
    images: Path, vae: Path, tmp_path: Path, capsys: Out
) -> None:
    write_safetensors(images, image_files(images), vae)
    out = tmp_path / "latents"
    asked = ("import", images, "--out", out, "--vae", vae)
    assert cache(*asked) == 0
    before = files(out, "latents.zarr/**/*") | files(out, "manifest/*/*")
    capsys.readouterr()
    assert cache(*asked) == 0
    told = printed(capsys)
    assert "8 scanned = 0 encoded + 8 reused" in told
    assert "compared" not in told
    for image in image_files(images):
        image.unlink()
    assert cache(*asked) == 0
    assert "8 scanned = 0 encoded + 8 reused" in printed(capsys)
    assert files(out, "latents.zarr/**/*") | files(out, "manifest/*/*") == before


def test_new_and_changed_files_are_imported_and_nothing_leaves(
    images: Path, vae: Path, tmp_path: Path, capsys: Out
) -> None:
    some = image_files(images)
    written = write_safetensors(tmp_path / "a", some[:4], vae)
    rest = ("--images", images, "--out", tmp_path / "latents", "--vae", vae)
    assert cache("import", tmp_path / "a", *rest) == 0
    shutil.rmtree(tmp_path / "a")
    written |= write_safetensors(tmp_path / "b", some[4:], vae)
    capsys.readouterr()
    assert cache("import", tmp_path / "b", *rest) == 0
    assert "8 scanned = 4 encoded + 4 reused" in printed(capsys)
    assert holds(tmp_path / "latents", written)
    os.utime(tmp_path / "b" / f"{some[7].stem}.img_sdxl", ns=(5, 5))
    assert cache("import", tmp_path / "b", *rest) == 0
    assert "8 scanned = 1 encoded + 7 reused" in printed(capsys)
    assert holds(tmp_path / "latents", written)
    assert cache("check", tmp_path / "latents") == 0


def test_latents_wait_for_images_that_come_later(
    images: Path, vae: Path, tmp_path: Path, capsys: Out
) -> None:
    write_safetensors(tmp_path / "c", image_files(images), vae)
    asked = ("import", tmp_path / "c", "--out", tmp_path / "latents", "--vae", vae)
    assert cache(*asked, "--force") == 0
    plan = pq.read_table(tmp_path / "latents/manifest/plan/000000.parquet")
    assert "c/cat.img_sdxl" in plan["key"].to_pylist()
    capsys.readouterr()
    assert cache(*asked, "--images", images) == 0
    assert "8 scanned = 0 encoded + 8 reused" in printed(capsys)
    with LatentStore.open(tmp_path / "latents") as store:
        assert "images/cat.png" in store.samples["key"].to_pylist()
        assert store.samples["txt"].null_count == 0


def test_build_never_adds_to_imported_latents(
    images: Path, vae: Path, tmp_path: Path, capsys: Out
) -> None:
    write_safetensors(images, image_files(images), vae)
    out = tmp_path / "latents"
    assert cache("import", images, "--out", out, "--vae", vae) == 0
    before = files(out, "**/*")
    assert cache("build", images, "--out", out, "--vae", vae, "--resolution", 128) == 1
    assert f"preprocessing safetensors mean and not {PREPROCESSING}" in last_error(capsys)
    write_onetrainer(tmp_path / "cache", image_files(images), vae)
    assert cache("import", tmp_path / "cache", "--out", out, "--vae", vae) == 1
    assert "preprocessing safetensors mean and not onetrainer mean" in last_error(capsys)
    assert files(out, "**/*") == before


def test_damaged_and_foreign_files_are_rejected_with_a_reason(
    images: Path, vae: Path, tmp_path: Path, capsys: Out
) -> None:
    some = image_files(images)
    written = write_safetensors(images, some, vae)
    paths = [image.with_suffix(".img_sdxl") for image in some]
    latent = load_file(paths[0])["latent"]
    save_file({"latent": latent.repeat(4, 1, 1)}, paths[0])
    paths[1].write_bytes(paths[1].read_bytes()[:-9])
    save_file({"latent": latent[:, :5].contiguous()}, paths[2])
    save_file({"latent": torch.full_like(latent, float("nan"))}, paths[3])
    save_file({"other": latent}, paths[4])
    paths[5].write_bytes(b"")
    for place in range(6):
        written.pop(some[place].name)
    shutil.copy(some[6], images / "copy.jpg")
    shutil.copy(paths[6], images / "copy.img_sdxl")
    out = tmp_path / "latents"
    assert cache("import", images, "--out", out, "--vae", vae) == 0
    assert (
        "9 scanned = 2 encoded + 0 reused + 1 duplicate + 6 rejected (corrupt 2, foreign 1, "
        "non_finite 1, other_shape 1, other_size 1)"
    ) in printed(capsys)
    kept = latents_by_name(out)
    written["copy.jpg"] = written[some[6].name]
    assert len(kept) == 2
    assert all(written[key].numpy().tobytes() == latent.tobytes() for key, latent in kept.items())
    told = pq.read_table(out / "rejected.parquet").to_pylist()
    assert "16, " in next(row["detail"] for row in told if row["reason"] == "other_shape")
    capsys.readouterr()
    assert cache("import", images, "--out", out, "--vae", vae) == 0
    assert "9 scanned = 0 encoded + 2 reused + 1 duplicate + 6 rejected" in printed(capsys)


def spoil(images: Path, change: Any) -> None:
    for path in sorted(images.glob("*.img_sdxl")):
        save_file({"latent": change(load_file(path)["latent"]).contiguous()}, path)


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("vae", "these are not latents of"),
        ("shuffled", "do not match their images (correlation"),
        ("normalised", "neither 1 nor its scaling factor 0.13025"),
    ],
)
def test_what_is_disproved_is_refused_even_when_forced(
    images: Path, vae: Path, tmp_path: Path, capsys: Out, wrong: str, told: str, forced: bool
) -> None:
    some = image_files(images)
    write_safetensors(images, some, vae)
    if wrong == "shuffled":
        paths = [image.with_suffix(".img_sdxl") for image in some]
        data = [path.read_bytes() for path in paths]
        for path, other in zip(paths, data[2:] + data[:2], strict=True):
            path.write_bytes(other)
    elif wrong == "vae":
        spoil(images, lambda latent: latent[[1, 2, 3, 0]])
    else:
        spoil(images, lambda latent: latent * 0.5)
    options = ["--force"] if forced else []
    assert cache("import", images, "--out", tmp_path / "l", "--vae", vae, *options) == 1
    assert told in last_error(capsys)
    assert not (tmp_path / "l").exists()


@pytest.mark.parametrize("with_images", [True, False])
def test_scaled_latents_are_told_and_divided_when_forced(
    images: Path, vae: Path, tmp_path: Path, capsys: Out, with_images: bool
) -> None:
    cached = tmp_path / "cached"
    raw = write_safetensors(cached, image_files(images), vae)
    spoil(cached, lambda latent: latent * 0.13025)
    asked = ["import", cached, "--out", tmp_path / "l", "--vae", vae]
    asked += ["--images", images] if with_images else []
    assert cache(*asked) == 1
    assert "they are already scaled (0.13" in last_error(capsys)
    assert cache(*asked, "--force") == 0
    assert read_attributes(tmp_path / "l")[0].preprocessing == "safetensors mean divided by 0.13025"
    if with_images:
        got = latents_by_name(tmp_path / "l")
        for key, latent in got.items():
            assert np.allclose(latent, raw[key], rtol=3e-7, atol=1e-6)
    capsys.readouterr()
    assert cache(*asked) == 0  # nothing is new, so nothing is doubtful
    assert "8 scanned = 0 encoded + 8 reused" in printed(capsys)


def test_a_changed_image_leaves_its_latent_behind(
    images: Path, vae: Path, tmp_path: Path, capsys: Out
) -> None:
    write_onetrainer(tmp_path / "cache", image_files(images), vae)
    shutil.copy(images / "rocket.jpg", images / "coffee.jpg")
    assert cache("import", tmp_path / "cache", "--out", tmp_path / "l", "--vae", vae) == 0
    assert "+ 1 rejected (changed_image 1)" in printed(capsys)
    (row,) = pq.read_table(tmp_path / "l/rejected.parquet").to_pylist()
    assert row["detail"].startswith("was cached at 600x400, the upright image is 640x427 now")


def test_a_pickle_that_runs_code_is_not_run(
    images: Path, vae: Path, tmp_path: Path, capsys: Out
) -> None:
    write_onetrainer(tmp_path / "cache", image_files(images), vae)
    mark = tmp_path / "it ran"
    (one,) = (tmp_path / "cache").rglob("3.pt")
    torch.save({"latent_image": Bomb(mark)}, one)
    assert cache("import", tmp_path / "cache", "--out", tmp_path / "l", "--vae", vae) == 0
    assert "rejected (unsafe 1)" in printed(capsys)
    torch.save(Bomb(mark), one.with_name("aggregate.pt"))
    assert cache("import", tmp_path / "cache", "--out", tmp_path / "m", "--vae", vae) == 1
    assert "aggregate.pt, the only index of the latents" in last_error(capsys)
    assert not mark.exists()


class Bomb:
    """Pickled, it makes a folder when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("case", ["missing", "empty", "mixed", "nothing", "dry"])
def test_bad_requests_are_one_sentence_and_write_nothing(
    images: Path, vae: Path, tmp_path: Path, capsys: Out, case: str
) -> None:
    out = tmp_path / "l"
    asked: list[object] = ["import", images, "--out", out, "--vae", vae]
    told = "no cached latents (kohya's .npz"
    if case == "missing":
        asked[1], told = tmp_path / "no", "no such directory"
    elif case == "nothing":
        asked[1:2], told = [], "CACHE is missing"
    elif case != "empty":
        write_safetensors(images, image_files(images), vae)
    if case == "mixed":
        np.savez(images / "cat.npz", latents=np.zeros((4, 16, 16), "f4"))
        told = "caches of kohya and safetensors"
    assert cache(*asked, *(["--dry-run"] if case == "dry" else [])) == (case != "dry")
    said = capsys.readouterr()
    assert told in said.err if case != "dry" else "to import: 8 latents" in said.err
    assert not out.exists()


def test_another_crop_is_doubtful_and_kept_when_forced(
    images: Path, vae: Path, tmp_path: Path, capsys: Out
) -> None:
    for image in image_files(images):
        x, _ = covered(image, bucket_of(image), Image.Resampling.BICUBIC)
        shifted = torch.roll(x, 1, 3)  # a crop that nobody told of
        save_file({"latent": encoded(vae, shifted)}, image.with_suffix(".safetensors"))
    asked = ("import", images, "--out", tmp_path / "l", "--vae", vae, "--compare", 8)
    assert cache(*asked) == 1
    assert "compared do not quite match their images (correlation images/" in last_error(capsys)
    assert cache(*asked, "--force") == 0
    assert "do not quite match their images" in capsys.readouterr().err
