from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import save_file

from tests.support.peer_caches import (
    image_files,
    write_kohya,
    write_onetrainer,
    write_safetensors,
)
from xlsd_cache.errors import UserError
from xlsd_cache.interop.cache_files import CacheFile, image_names, list_caches
from xlsd_cache.interop.formats import CachedLatent, peek, read
from xlsd_cache.outcomes import Rejected


def one(path: Path) -> CacheFile:
    (file,) = [file for file in list_caches((path.parent,)).files if file.path == path]
    return file


def only(file: CacheFile) -> CachedLatent:
    held = peek(file)
    assert isinstance(held, list)
    return held[0]


def test_kohyas_headers_tell_shape_and_size_without_reading_the_latent(
    photos: Path, vae: Path, tmp_path: Path
) -> None:
    (image, *_) = image_files(photos)
    written = write_kohya(tmp_path / "c", [image], vae, more=(192, 64))
    (file,) = list_caches((tmp_path / "c",)).files
    held = peek(file)
    assert isinstance(held, list)
    assert [(one.name, one.shape) for one in held] == [
        ("latents_16x16", (4, 16, 16)), ("latents_8x24", (4, 8, 24)),
    ]  # fmt: skip
    assert {one.original for one in held} == {(153, 215)}
    name = f"{image.stem}_0153x0215"
    assert [Path(one).name for one in image_names(file, "kohya", "")] == [
        f"{name}_sdxl", name, image.stem,
    ]  # fmt: skip
    for one_held, latent in zip(held, written.values(), strict=True):
        assert np.array_equal(latent_of(file, one_held), latent)


def test_onetrainers_index_gives_each_file_its_image(
    photos: Path, vae: Path, tmp_path: Path
) -> None:
    images = image_files(photos)[:3]
    for layout in ("list", "dict", "smart"):
        written = write_onetrainer(tmp_path / layout, images, vae, layout=layout)
        found = list_caches((tmp_path / layout,)).files
        latents = {file.image: file for file in found if peek(file) is not None}
        assert sorted(latents) == [str(image) for image in images]  # the texts are passed over
        assert len(found) == 4
        for image in images:
            file = latents[str(image)]
            assert np.array_equal(latent_of(file, only(file)), written[image.name])
            assert only(file).offset is not None
            assert file.variation == 0


def test_suffixes_of_the_safetensors_caches(photos: Path, vae: Path, tmp_path: Path) -> None:
    for suffix in (".safetensors", ".img_sdxl", ".img_cache"):
        folder = tmp_path / suffix
        write_safetensors(folder, image_files(photos)[:1], vae, suffix=suffix)
        (file,) = list_caches((folder,)).files
        assert only(file).kind == "safetensors"
        assert image_names(file, "safetensors", "") == [str(folder / "astronaut_face")]


@pytest.mark.parametrize(
    ("dtype", "kept"), [("float16", True), ("bfloat16", False), ("float64", None), ("int32", None)]
)
def test_only_what_float32_holds_exactly_is_taken(
    tmp_path: Path, dtype: str, kept: bool | None
) -> None:
    save_file({"latent": torch.zeros(4, 8, 8, dtype=getattr(torch, dtype))}, tmp_path / "a.img_x")
    held = peek(one(tmp_path / "a.img_x"))
    if kept is None:
        assert isinstance(held, Rejected)
        assert "neither float32" in held.detail
    else:
        assert only(one(tmp_path / "a.img_x")).half is kept


def latent_of(file: CacheFile, held: CachedLatent) -> NDArray[Any]:
    latent = read(file, held)
    assert not isinstance(latent, Rejected)
    return latent


def write_one(path: Path) -> None:
    """A small file of each kind."""
    latent = torch.arange(256, dtype=torch.float32).reshape(4, 8, 8)
    if path.suffix == ".npz":
        np.savez(path, latents_8x8=latent.numpy(), original_size_8x8=np.array((64, 64)))
    elif path.suffix == ".pt":
        torch.save({"latent_image": latent, "crop_offset": (0, 0)}, path)
    else:
        save_file({"latent": latent}, path)


@pytest.mark.parametrize("suffix", [".npz", ".pt", ".safetensors"])
@given(data=st.data())
def test_damaged_files_give_a_latent_or_a_reason(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, data: Any
) -> None:
    """Cut and flipped anywhere, nothing is raised and nothing but finite latents comes out."""
    folder = tmp_path_factory.mktemp("damaged")
    path = folder / f"a{suffix}"
    write_one(path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    file = one(path)
    held = peek(file)
    for each in held if isinstance(held, list) else []:
        latent = read(file, each)
        if not isinstance(latent, Rejected):
            assert latent.dtype in (np.float32, np.float16)
            assert latent.shape == each.shape
            assert np.isfinite(latent).all()


def test_object_arrays_and_vanished_files_are_reasons(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", latents=np.array([{}, None], dtype=object))
    write_one(tmp_path / "b.npz")
    file, gone = list_caches((tmp_path,)).files
    (tmp_path / "b.npz").unlink()
    for wrong, reason in ((file, "corrupt"), (gone, "vanished")):
        held = peek(wrong)
        assert isinstance(held, Rejected)
        assert held.reason == reason


def test_an_unreadable_index_is_refused_by_name(tmp_path: Path) -> None:
    write_one(tmp_path / "0.pt")
    for name in ("aggregate.pt", "cache.json"):
        (tmp_path / name).write_bytes(b"half of it")
        with pytest.raises(UserError, match=f"{name}, the only index of the latents"):
            list_caches((tmp_path,))
        (tmp_path / name).unlink()
