"""A latent depends on the VAE's encoder and its padding, not on the decoder."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from tests.support import cache, printed
from tests.support.peer_caches import image_files, write_safetensors
from tests.support.stores import older
from tests.support.vaes import changed, tiny
from xlsd_cache.encoding.compatibility import padding_warning
from xlsd_cache.encoding.encoder import to_input
from xlsd_cache.encoding.vae import Vae, load_vae
from xlsd_cache.store.identity import read_attributes
from xlsd_cache.store.reader import LatentStore

WEIGHTS = "diffusion_pytorch_model.safetensors"
Build = Callable[..., int]


def contents(store: Path) -> dict[str, bytes]:
    """All files of the latents and of the log, but for derived ones."""
    folders = ("latents.zarr", "manifest/plan", "manifest/commit")
    files = [path for folder in folders for path in (store / folder).rglob("*") if path.is_file()]
    return {str(path.relative_to(store)): path.read_bytes() for path in files}


@pytest.fixture
def build(photos: Path) -> Build:
    def build_(out: Path, vae: Path, *more: object) -> int:
        given = ["--out", out, "--vae", vae, "--resolution", 128, "--batch", 4, *more]
        return cache("build", photos, *given)

    return build_


def test_the_encoders_half_has_a_hash_of_its_own(vae: Path, tmp_path: Path) -> None:
    one = load_vae(str(vae))
    for part, same in (("decoder.", True), ("post_quant_conv.", True), ("encoder.", False),
                       ("quant_conv.", False)):  # fmt: skip
        other = load_vae(str(changed(vae, tmp_path / part, part)))
        assert other.sha256 != one.sha256
        assert (other.encoder_sha256 == one.encoder_sha256) == same, part


def test_a_new_decoder_encodes_nothing_and_decodes_everything(
    build: Build, vae: Path, store: Path, tmp_path: Path, encoded: list[int],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    new = changed(vae, tmp_path / "new", ("decoder."))
    out = Path(shutil.copytree(store, tmp_path / "latents"))
    before = contents(out)
    assert build(out, new) == 0
    assert not encoded
    assert contents(out) == before
    told = printed(capsys)
    assert "the decoder of" in told
    assert "cannot be mixed" not in told
    for vae_given in (("--vae", new), ()):
        sheet = tmp_path / f"{len(vae_given)}.png"
        assert cache("preview", out, sheet, *vae_given) == 0
        assert ("is another than" in printed(capsys)) == bool(vae_given)
        assert cache("check", out, "--decode", 3, *vae_given) == 0
        told = printed(capsys)
        assert ("is another than" in told) == bool(vae_given)
        assert "decoded 3" in told
    assert (tmp_path / "0.png").read_bytes() != (tmp_path / "2.png").read_bytes()


def test_images_that_come_later_are_encoded_by_the_new_one(
    vae: Path, photos: Path, tmp_path: Path, encoded: list[int]
) -> None:
    images = Path(shutil.copytree(photos, tmp_path / "images"))
    late = min(images.glob("*.jpg"))
    aside = Path(shutil.move(late, tmp_path / late.name))
    out, all_at_once = tmp_path / "latents", tmp_path / "once"
    given = ["--resolution", 128, "--batch", 1]
    assert cache("build", images, "--out", out, "--vae", vae, *given) == 0
    shutil.move(aside, late)
    assert cache("build", images, "--out", all_at_once, "--vae", vae, *given) == 0
    encoded.clear()
    new = changed(vae, tmp_path / "new", "decoder.")
    assert cache("build", images, "--out", out, "--vae", new, *given) == 0
    assert encoded == [1]
    with LatentStore.open(out) as ours, LatentStore.open(all_at_once) as theirs:
        latent = [
            s.read(bucket, [row])
            for s in (ours, theirs)
            for key, bucket, row in zip(
                *(s.samples[name].to_pylist() for name in ("key", "bucket", "row")), strict=True
            )
            if key.endswith(late.name)
        ]
    assert (latent[0] == latent[1]).all()


@pytest.mark.parametrize("part", ["encoder.", "quant_conv."])
def test_another_encoder_is_refused_and_said_to_be_one(
    build: Build, vae: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    part: str,
) -> None:  # fmt: skip
    other = changed(vae, tmp_path / "other", part)
    out = Path(shutil.copytree(store, tmp_path / "latents"))
    assert build(out, other) == 1
    assert (
        "was built with the VAE's encoder half (encoder and quant_conv)" in capsys.readouterr().err
    )
    assert cache("preview", out, tmp_path / "a.png", "--vae", other) == 1
    assert "its encoder half (encoder and quant_conv) is" in capsys.readouterr().err
    assert cache("check", out, "--decode", 1, "--vae", other) == 1


@pytest.mark.parametrize("name", ["scaling_factor", "shift_factor"])
def test_another_factor_is_refused(
    build: Build, vae: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:  # fmt: skip
    other = changed(vae, tmp_path / "other", "decoder.", **{name: 0.5})
    assert build(Path(shutil.copytree(store, tmp_path / "latents")), other) == 1
    assert f"was built with {name} 0" in capsys.readouterr().err


def test_the_tiny_autoencoders_decoder_counts_as_little(
    build: Build, tmp_path: Path, encoded: list[int]
) -> None:
    one = tiny(tmp_path / "tiny")
    out = tmp_path / "latents"
    assert build(out, one) == 0
    encoded.clear()
    assert build(out, changed(one, tmp_path / "new", "decoder.")) == 0
    assert not encoded
    assert build(out, changed(one, tmp_path / "other", "encoder.")) == 1


def test_an_older_store_accepts_a_new_decoder_by_the_vae_that_lies_where_it_says(
    build: Build, vae: Path, store: Path, tmp_path: Path, encoded: list[int]
) -> None:
    out = older(store, tmp_path / "latents")
    before = contents(out)
    with LatentStore.open(out) as ours:
        fingerprint = ours.fingerprint
        assert not ours.identity.encoder_sha256
        assert ours.identity.vae_padding == "zeros"
    assert build(out, changed(vae, tmp_path / "new", "decoder."), "--dry-run") == 0
    assert not (out / "manifest" / "encoder.json").exists()  # a dry run writes nothing
    assert build(out, tmp_path / "new") == 0
    assert not encoded
    assert contents(out) == before
    assert build(out, changed(vae, tmp_path / "other", "encoder.")) == 1
    with LatentStore.open(out) as ours:
        assert ours.fingerprint == fingerprint
        assert ours.identity.encoder_sha256 == load_vae(str(vae)).encoder_sha256
    assert cache("check", out) == 0


@pytest.mark.parametrize("command", ["build", "preview", "check"])
def test_an_older_store_learns_its_encoder_from_its_original_vae_given_once(
    build: Build, vae: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:  # fmt: skip
    out = older(store, tmp_path / "latents", vae_source=tmp_path / "gone")
    new, sheet = changed(vae, tmp_path / "new", "decoder."), tmp_path / "a.png"
    for refused in ("build", "preview", "check"):
        given = {"preview": (sheet,), "check": ("--decode", 1)}.get(refused, ())
        done = build(out, new) if refused == "build" else cache(refused, out, *given, "--vae", new)
        assert done == 1
        told = capsys.readouterr().err
        assert "is not known: an older version built that store" in told
        assert f"`xlsd-cache preview {out} preview.png --vae ORIGINAL`" in told
    assert cache("preview", out, sheet) == 1
    assert f"cannot load the VAE that encoded {out}: no VAE" in capsys.readouterr().err
    if command == "build":
        assert build(out, vae) == 0
    elif command == "preview":
        assert cache("preview", out, sheet, "--vae", vae) == 0
    else:
        assert cache("check", out, "--decode", 1, "--vae", vae) == 0
    assert build(out, new) == 0
    assert cache("preview", out, sheet, "--vae", new) == 0
    assert build(out, changed(vae, tmp_path / "other", "quant_conv.")) == 1
    assert "encoder half" in capsys.readouterr().err


def test_a_record_of_another_vae_or_a_damaged_one_proves_nothing(
    store: Path, tmp_path: Path
) -> None:
    out = older(store, tmp_path / "latents")
    path = out / "manifest" / "encoder.json"
    for text in ('{"vae_sha256": "0", "encoder_sha256": "1"}', "", "[]", '{"vae_sha256": 1}'):
        path.write_text(text)
        assert read_attributes(out)[0].encoder_sha256 == ""


def test_what_a_newer_version_adds_to_the_attributes_is_passed_over(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(store, tmp_path / "latents"))
    path = out / "latents.zarr" / "zarr.json"
    told = json.loads(path.read_text())
    told["attributes"]["identity"]["later"] = told["attributes"]["later"] = [1]
    path.write_text(json.dumps(told))
    assert read_attributes(out) == read_attributes(store)
    del told["attributes"]["identity"]["channels"]
    path.write_text(json.dumps(told))
    assert cache("info", out) == 1
    assert "is not a latent store" in capsys.readouterr().err


def test_reflection_is_what_diffusers_encodes_with_it(
    build: Build, vae: Path, store: Path, photos: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """As the authors of such VAEs set it, on each convolution that pads by itself."""
    out = tmp_path / "latents"
    assert build(out, vae, "--vae-padding", "reflect") == 0
    pixels = torch.randint(0, 255, (1, 128, 128, 3), dtype=torch.uint8)
    theirs = AutoencoderKL.from_pretrained(vae)
    for module in theirs.modules():
        if isinstance(module, torch.nn.Conv2d) and module.padding != (0, 0):
            module.padding_mode = "reflect"
    ours, zeros = load_vae(str(vae), padding="reflect"), load_vae(str(vae))
    with torch.inference_mode():
        expected = theirs.encode(to_input(pixels)).latent_dist.mode()
        assert torch.equal(ours.encode(to_input(pixels)), expected)
        assert torch.equal(ours.decode(expected), theirs.decode(expected).sample)
        assert not torch.equal(zeros.encode(to_input(pixels)), expected)
    assert ours.encoder_sha256 == zeros.encoder_sha256  # the weights do not show it
    # The store remembers it: checked, drawn and compared with it, and never mixed.
    assert read_attributes(out)[0].vae_padding == "reflect"
    assert cache("check", out, "--decode", 8) == 0
    capsys.readouterr()
    assert cache("info", out) == 0
    assert "reflection padding" in printed(capsys)
    assert build(out, vae) == 1
    assert "vae_padding reflect and not zeros" in capsys.readouterr().err
    for zeros_store in (store, older(store, tmp_path / "older")):
        copy = shutil.copytree(zeros_store, tmp_path / f"copy of {zeros_store.name}")
        assert build(Path(copy), vae, "--vae-padding", "reflect") == 1
        assert "vae_padding zeros and not reflect" in capsys.readouterr().err
    with LatentStore.open(out) as reflected, LatentStore.open(store) as plain:
        bucket, rows = next(iter(plain.buckets.items()))
        key = plain.samples["key"][0].as_py()
        at = reflected.samples["key"].to_pylist().index(key)
        there = reflected.read(bucket, [reflected.samples["row"][at].as_py()])
        assert abs(there - plain.read(bucket, rows[:1])).max() > 1e-3


def test_imports_take_a_new_decoder_and_keep_the_padding_apart(
    vae: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, out = Path(shutil.copytree(photos, tmp_path / "images")), tmp_path / "latents"
    files = image_files(images)
    write_safetensors(images, files[:4], vae)
    asked = ("import", images, "--out", out, "--vae")
    assert cache(*asked, vae) == 0
    write_safetensors(images, files, vae)
    capsys.readouterr()
    assert cache(*asked, vae, "--vae-padding", "reflect") == 1
    assert "vae_padding zeros and not reflect" in capsys.readouterr().err
    assert cache(*asked, changed(vae, tmp_path / "new", "decoder.")) == 0
    assert "the decoder of" in printed(capsys)
    with LatentStore.open(out) as store:
        assert len(store) == 8
    assert cache(*asked, changed(vae, tmp_path / "other", "encoder.")) == 1


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("Anzhc/MS-LC-EQ-D-VR_VAE", "trained with reflection padding"),
        ("/models/MS-LC-EQ-D-VR VAE B7.safetensors", "trained with reflection padding"),
        ("vae/EQB7.safetensors", "trained with reflection padding"),
        ("Anzhc/Noobai11-EQ", "trained with reflection padding"),
        ("Bluvoll/NoobAI_v-pred_EQ-VAE_v0.1", "trained with reflection padding"),
        ("KBlueLeaf/EQ-SDXL-VAE", "some of which"),
        ("zelaki/eq-vae-ema", "some of which"),
        ("stabilityai/sdxl-vae", None),
        ("sdxl", None),
        ("madebyollin/sdxl-vae-fp16-fix", None),
        ("/data/sequence/vae", None),
    ],
)
def test_families_that_pad_by_reflection_are_warned_of(
    vae: Path, name: str, told: str | None
) -> None:
    model = load_vae(str(vae)).model
    warning = padding_warning(Vae.of(name, name, model))
    assert (told is not None) == bool(warning)
    assert told is None or (told in warning and "--vae-padding reflect" in warning)
    assert not padding_warning(Vae.of(name, name, model, "reflect"))


def test_the_warning_reaches_who_builds(
    build: Build, vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(vae, tmp_path / "MS-LC-EQ-D-VR_VAE"))
    assert build(tmp_path / "latents", folder, "--dry-run") == 0
    assert "warning: the VAE" in capsys.readouterr().err
    assert build(tmp_path / "latents", folder, "--dry-run", "--vae-padding", "reflect") == 0
    assert "warning: " not in capsys.readouterr().err
