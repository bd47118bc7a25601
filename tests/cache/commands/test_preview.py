from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support import cache, printed, small_disk, spawn
from tests.support.vaes import tiny
from xlsd_cache.encoding.vae import load_vae
from xlsd_cache.store.reader import LatentStore

Out = pytest.CaptureFixture[str]


def said(capsys: Out) -> str:
    """The one sentence of an error."""
    (line,) = (x for x in capsys.readouterr().err.splitlines() if x.startswith("xlsd-cache:"))
    return line


def test_it_shows_what_the_latent_decodes_to(store: Path, vae: Path, tmp_path: Path) -> None:
    """Alone, at its own size, the picture is diffusers' own decoding to the last bit."""
    out = tmp_path / "sheet.png"
    assert cache("preview", store, out, "--rows", "128x128:2", "--thumbnail", 128) == 0
    with LatentStore.open(store) as ours, torch.inference_mode():
        raw = torch.from_numpy(ours.read("128x128", [2]))
        decoded = load_vae(str(vae)).model.decode(raw).sample[0]
    expected = ((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    sheet = np.asarray(Image.open(out))
    gap = 11
    assert sheet.shape[1] == 128 + 2 * gap
    assert np.array_equal(sheet[gap : gap + 128, gap : gap + 128], expected)
    below = sheet[gap + 128 :]
    assert len(np.unique(below.reshape(-1, 3), axis=0)) > 10  # text and the crop's box


def test_the_choice_is_seeded(store: Path, tmp_path: Path) -> None:
    sheets = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        out = tmp_path / f"{name}.png"
        assert cache("preview", store, out, "--count", 2, "--seed", seed, "--thumbnail", 64) == 0
        sheets.append(out.read_bytes())
    assert sheets[0] == sheets[1] != sheets[2]


def test_tags_choose_exactly(store: Path, tmp_path: Path, capsys: Out) -> None:
    with LatentStore.open(store) as ours:
        texts = ours.samples["txt"].to_pylist()
    tag = texts[0].split(",")[0]
    having = sum(tag in [t.strip() for t in text.split(",")] for text in texts)
    assert cache("preview", store, tmp_path / "a.png", "--tags", tag, "--thumbnail", 64) == 0
    assert f"{having} of 8 samples" in printed(capsys)
    assert cache("preview", store, tmp_path / "b.png", "--tags", tag[:-1]) == 1
    assert "no sample of" in said(capsys)
    assert not (tmp_path / "b.png").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            ("--rows", "128x128:99"),
            "row 99 of bucket 128x128 is not live; its 5 live rows are between 0 and 4",
        ),
        (("--rows", "64x64:0"), "is not BUCKET:ROW with one of the buckets 128x128, 192x64"),
        (("--rows", "128x128:0", "--tags", "cat"), "give one of them"),
        (("--caption", "moon"), "no caption column 'moon' (it has txt)"),
        (("--count", 0), "--count 0"),
        (("--thumbnail", 5), "--thumbnail 5"),
    ],
)
def test_what_cannot_be_shown_is_one_sentence(
    store: Path, tmp_path: Path, capsys: Out, options: tuple[object, ...], told: str
) -> None:
    assert cache("preview", store, tmp_path / "a.png", *options) == 1
    assert told in said(capsys)
    assert not list(tmp_path.iterdir())


def test_another_vae_is_refused(store: Path, tmp_path: Path, capsys: Out) -> None:
    assert cache("preview", store, tmp_path / "a.png", "--vae", tiny(tmp_path / "tiny")) == 1
    assert "its encoder half" in said(capsys)


def test_what_cannot_be_written_is_one_sentence(store: Path, tmp_path: Path, capsys: Out) -> None:
    assert cache("preview", store, tmp_path / "a.doc") == 1
    assert "end it in .png" in said(capsys)
    assert cache("preview", store, tmp_path / "gone" / "a.png", "--count", 1) == 1
    assert "cannot write" in said(capsys)
    log, out = tmp_path / "log", tmp_path / "a.png"
    assert cache("preview", store, out, "--count", 1) == 0
    before = out.read_bytes()
    process = spawn(small_disk, 3000, "preview", store, out, log=log)
    process.join()
    assert process.exitcode == 1
    assert "Traceback" not in log.read_text()
    assert "cannot write" in log.read_text()
    assert out.read_bytes() == before


def test_long_and_missing_captions_fit_their_cell(store: Path, tmp_path: Path) -> None:
    """Whatever is said of an image, the sheet keeps its size and the picture its place."""
    from xlsd_cache.commands.preview import _Sheet

    sample = {"bucket": "64x64", "row": 0, "width": 64, "height": 64, "crop": [0, 0, 64, 64]}
    for text in ("", "(no caption)", "word " * 999, "w" * 999, "写真 🙂 é", "one\ntwo"):
        sheet = _Sheet(1, 64, 1)
        sheet.draw(0, Image.new("RGB", (64, 64), "red"), sample, text)
        margin = np.asarray(sheet.image)[:, -sheet.gap :]
        assert (margin == 255).all()
