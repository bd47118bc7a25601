from pathlib import Path

import pytest

from tests.support import cache, printed, train, write_images
from tests.support.sessions import Open
from xlsd_train.data import caption_lengths as lengths


@pytest.fixture
def long(tmp_path: Path, vae: Path) -> Path:
    """A store of six images: three captions fit, two are 10 and 30 tokens too long, one is none."""
    images, data = tmp_path / "images", tmp_path / "l"
    write_images(images, [f"{i}.png" for i in range(6)])
    for i, count in enumerate((1, 2, 75, 85, 105)):  # a letter is a token of its own
        (images / f"{i}.txt").write_text(" ".join("x" * count))
    (images / "5.txt").unlink()
    assert cache("build", images, "--out", data, "--vae", vae, "--resolution", 128) == 0
    return data


def test_captions_that_are_cut_are_counted_and_measured(long: Path, open_run: Open) -> None:
    found = lengths.truncation(open_run(data=long, batch=2).source)
    assert found == {
        "looked_at": 6, "selected": 6, "without": 1, "limit": 77, "cut": 2,
        "over_median": 20, "over_max": 30,
    }  # fmt: skip
    assert lengths.describe_truncation(found) == (
        "captions: 2 of 6 exceed 77 tokens and are truncated, by 20 in the median and 30 at most; "
        "1 images have no caption"
    )


def test_a_longer_encoder_cuts_none(long: Path, open_run: Open) -> None:
    found = lengths.truncation(open_run(data=long, batch=2, tokens=248).source)
    assert (found["limit"], found["cut"], found["over_max"]) == (248, 0, 0)
    assert lengths.describe_truncation(found) == (
        "captions: none of 6 exceeds 248 tokens; 1 images have no caption"
    )


def test_what_limits_captions_counts(tmp_path: Path, vae: Path, open_run: Open) -> None:
    images, data = tmp_path / "images", tmp_path / "l"
    write_images(images, ["0.png", "1.png"])
    for i in range(2):
        (images / f"{i}.txt").write_text(", ".join(chr(97 + n % 26) + "x" * n for n in range(40)))
    assert cache("build", images, "--out", data, "--vae", vae, "--resolution", 128) == 0
    assert lengths.truncation(open_run(data=data, batch=2, max_tags=5).source)["cut"] == 0
    whole = open_run(data=data, batch=2, out=tmp_path / "whole", caption_dropout=1.0)
    assert lengths.truncation(whole.source)["cut"] == 2  # dropout is no shortness


def test_of_a_large_store_a_random_part_is_looked_at(
    long: Path, open_run: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_run(data=long, batch=2).source
    monkeypatch.setattr(lengths, "LOOKED_AT", 4)
    found = lengths.truncation(source)
    assert found["looked_at"] <= 4
    assert found == lengths.truncation(source)
    assert f"of {found['looked_at']} (a sample of 6)" in lengths.describe_truncation(found)


def test_a_run_says_it_before_the_first_step(
    long: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("--phase", "te", "--batch", 2, "--data", long, "--model", model, "--steps", 3)
    assert train(*given, "--dry-run") == 0
    said = printed(capsys)
    assert "captions: 2 of 6 exceed 77 tokens and are truncated, by 20" in said
