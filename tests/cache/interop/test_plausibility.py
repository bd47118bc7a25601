from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.peer_caches import image_files
from tests.support.vaes import tiny
from xlsd_cache.encoding.encoder import Encoder
from xlsd_cache.encoding.vae import load_vae
from xlsd_cache.images.decode import decode
from xlsd_cache.interop.plausibility import Compared, Likeness, compare, judge

CPU = torch.device("cpu")


def fresh(image: Path, vae: Path) -> Compared:
    size = 153, 215
    pixels = decode(image.read_bytes(), size, (0.0, 0.0, 153.0, 153.0), (128, 128))
    assert isinstance(pixels, np.ndarray)
    encoder = Encoder(load_vae(str(vae)), "fp32", CPU)
    return Compared("a", encoder.encode(pixels[None].copy())[0], pixels)


def test_the_vaes_own_latents_are_exactly_alike_mirrored_or_not(photos: Path, vae: Path) -> None:
    sample = fresh(image_files(photos)[0], vae)
    loaded = load_vae(str(vae))
    assert sample.pixels is not None
    mirrored = fresh(image_files(photos)[0], vae).pixels
    assert mirrored is not None
    samples = [sample, Compared("b", sample.latent, mirrored[:, ::-1])]
    for likeness in compare(samples, loaded, CPU):
        assert likeness.alike == pytest.approx(1, abs=1e-5)
        assert likeness.scale == pytest.approx(1, abs=0.02)
        assert likeness.own == pytest.approx(likeness.usual, abs=1e-5)
        assert likeness.own is not None
        assert likeness.own > 0.6
        assert likeness.noise is not None
        assert 0 < likeness.noise < 0.01
    assert judge(compare(samples, loaded, CPU), loaded, "kohya", "mean").doubtful == ()


def test_a_vae_without_a_posterior_or_a_factor_compares_as_well(
    photos: Path, vae: Path, tmp_path: Path
) -> None:
    other = tiny(tmp_path / "tiny")
    sample = fresh(image_files(photos)[0], other)
    (likeness,) = compare([sample], load_vae(str(other)), CPU)
    assert likeness.alike == pytest.approx(1, abs=1e-5)
    assert likeness.noise is None


def test_verdicts(vae: Path) -> None:
    loaded = load_vae(str(vae))

    def verdict(alike: float | None, scale: float, own: float) -> str:
        one = Likeness("a", alike, scale, own, None, None)
        said = judge([one, Likeness("b", alike, scale, own, None, None)], loaded, "x", "mean")
        return said.disproved or "; ".join(said.doubtful)

    assert verdict(0.99, 1.02, 0.9) == ""
    assert verdict(0.99, 1.02, 0.3) == ""  # the image is the better witness
    assert "not latents of" in verdict(0.2, 1.0, 0.4)
    assert "not latents of" in verdict(None, 1.0, 0.4)
    assert "a 0.20, b 0.20" in verdict(0.2, 1.0, 0.9)
    assert "do not quite match their images (correlation a 0.80" in verdict(0.8, 1.0, 0.9)
    assert "already scaled (0.13 times" in verdict(0.99, 0.13, 0.9)
    assert "neither 1 nor" in verdict(0.99, 0.5, 0.9)
    assert verdict(None, 1.0, 0.9).startswith("none of their images was found")
