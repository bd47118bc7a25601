from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from xlsd_cache.interop.cache_files import CacheFile
from xlsd_cache.interop.formats import CachedLatent
from xlsd_cache.interop.items import crop_box
from xlsd_cache.interop.pairing import SourceImage, pair


def cached(image: str) -> tuple[CacheFile, CachedLatent]:
    held = CachedLatent("onetrainer", "latent_image", (4, 8, 8), False)
    return CacheFile("onetrainer", Path(f"{image}.pt"), image, image, 1, 1), held


def records(*paths: str) -> list[SourceImage]:
    return [SourceImage(path, path, 1) for path in paths]


def paired(images: list[str], *paths: str) -> list[str]:
    files = [cached(image) for image in images]
    found = pair(files, records(*paths))
    return [found[file][0].key if file in found else "" for file, _ in files]


def test_the_image_with_most_folders_in_common_is_meant() -> None:
    there = ("/new/a/1.jpg", "/new/b/1.jpg")
    assert paired(["/old/a/1", "/old/b/1"], *there) == list(there)
    assert paired(["C:\\data\\b\\1.jpg"], *there) == ["/new/b/1.jpg"]
    assert paired(["/cache/1"], "/images/1.png") == ["/images/1.png"]


def test_what_is_not_certain_is_not_paired() -> None:
    assert paired(["/cache/1"], "/a/1.jpg", "/b/1.jpg") == [""]
    assert paired(["/cache/1"], "/a/1.jpg", "/a/1.png") == [""]
    assert paired(["/cache/1.png"], "/a/1.jpg", "/a/1.png") == ["/a/1.png"]
    assert paired(["/x/1", "/y/1"], "/a/1.jpg") == ["", ""]  # one image, two that want it
    assert paired(["/x/1", "/a/1"], "/a/1.jpg") == ["", "/a/1.jpg"]
    assert paired(["/a/2"], "/a/1.jpg") == [""]
    assert paired([""], "/a/1.jpg") == [""]


sides = st.integers(1, 4000)


@given(st.tuples(sides, sides), st.tuples(sides, sides), st.none() | st.tuples(sides, sides))
def test_a_crop_has_the_buckets_ratio_and_lies_in_the_image(
    size: tuple[int, int], bucket: tuple[int, int], offset: tuple[int, int] | None
) -> None:
    left, top, right, bottom = crop_box(size, bucket, offset)
    assert 0 <= left < right <= size[0]
    assert 0 <= top < bottom <= size[1]
    ratio = (right - left) * bucket[1] / ((bottom - top) * bucket[0])
    assert abs(ratio - 1) < 1e-9
