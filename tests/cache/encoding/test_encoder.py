import os
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

import xlsd_cache.encoding.encoder
from tests.support import cache, printed
from xlsd_cache.encoding.encoder import IN_FLIGHT, Encoder, to_input
from xlsd_cache.encoding.vae import load_vae
from xlsd_cache.errors import UserError
from xlsd_cache.images.decode import decode
from xlsd_cache.outcomes import Rejected
from xlsd_cache.runtime.device import device_of
from xlsd_cache.runtime.gpu_memory import free_on
from xlsd_cache.store.reader import LatentStore


def pixels_of(sample: dict[str, object]) -> Image.Image:
    """A sample's image as it went into the VAE."""
    values: dict[str, object] = sample
    width, height = map(int, str(values["bucket"]).split("x"))
    pixels = decode(
        Path(str(values["source"])).read_bytes(),
        (values["width"], values["height"]),  # type: ignore[arg-type]
        tuple(values["crop"]),  # type: ignore[arg-type]
        (width, height),
    )
    assert not isinstance(pixels, Rejected)
    return Image.fromarray(pixels)


def test_every_latent_is_what_diffusers_own_encode_gives(store: Path, vae: Path) -> None:
    """Bit for bit on the same batch of pixels, and to 1e-5 on each image alone."""
    reference = AutoencoderKL.from_pretrained(vae)
    processor = VaeImageProcessor()
    batch = 4  # as the fixture builds the store
    with LatentStore.open(store) as ours, torch.inference_mode():
        for bucket, rows in ours.buckets.items():
            table = ours.samples.filter(np.array(ours.samples["bucket"].to_pylist()) == bucket)
            samples = table.to_pylist()
            for start in range(0, len(rows), batch):
                part = samples[start : start + batch]
                x = processor.preprocess([pixels_of(sample) for sample in part])
                together = reference.encode(x).latent_dist.mode()
                stored = torch.from_numpy(ours.read(bucket, rows[start : start + batch]))
                assert torch.equal(stored, together)
                for i, latent in enumerate(stored):
                    alone = reference.encode(x[i : i + 1]).latent_dist.mode()[0]
                    assert (alone - latent).abs().max() < 1e-5 * alone.std()


def test_without_a_batch_every_core_encodes_one_image_at_a_time(
    photos: Path, vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ("--vae", vae, "--resolution", 128)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert cache("build", photos, "--out", tmp_path / "l", *args) == 0
        assert torch.get_num_threads() == 3
        assert "3 x 1 image at once, 1 thread each" in printed(capsys)
        torch.set_num_threads(1)
        reference, processor = AutoencoderKL.from_pretrained(vae), VaeImageProcessor()
        with LatentStore.open(tmp_path / "l") as ours, torch.inference_mode():
            for sample in ours.samples.to_pylist():
                x = processor.preprocess(pixels_of(sample))
                stored = torch.from_numpy(ours.read(sample["bucket"], [sample["row"]]))
                assert torch.equal(stored, reference.encode(x).latent_dist.mode())
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("room", [1, 2, 3])
@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"),
     RuntimeError("GET was unable to find an engine to execute this computation")],
)  # fmt: skip
def test_a_batch_that_does_not_fit_is_halved(vae: Path, room: int, error: RuntimeError) -> None:
    """The memory ends in the VAE's first layer, as on a card."""
    pixels = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    encoder = Encoder(load_vae(str(vae)), "fp32", torch.device("cpu"))
    expected = encoder.encode(pixels)

    refused = []

    def full(_: object, inputs: tuple[torch.Tensor]) -> None:
        if len(inputs[0]) > room:
            refused.append(len(inputs[0]))
            raise error

    hook = encoder.vae.model.encoder.register_forward_pre_hook(full)
    assert np.abs(encoder.encode(pixels) - expected).max() < 1e-5 * expected.std()
    assert len(set(refused)) == len(refused) > 0
    refused.clear()
    encoder.encode(pixels)
    assert not refused  # it is remembered what did not fit
    hook.remove()
    room = 0
    encoder.vae.model.encoder.register_forward_pre_hook(full)
    with pytest.raises(UserError, match="not enough GPU memory to encode one image of 64x64"):
        encoder.encode(pixels)


def test_the_input_is_scaled_as_diffusers_scales_it() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(1, 16, 16, 3)
    expected = VaeImageProcessor().preprocess(pixels[0].numpy() / np.float32(255))
    assert torch.equal(to_input(pixels), expected)
    assert to_input(pixels).min() == -1
    assert to_input(pixels).max() == 1


def test_bf16_is_near_and_fp32_is_fp32(vae: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    cpu = torch.device("cpu")
    exact = Encoder(load_vae(str(vae)), "fp32", cpu).encode(pixels)
    rough = Encoder(load_vae(str(vae)), "bf16", cpu).encode(pixels)
    assert exact.dtype == rough.dtype == np.float32
    assert 0 < np.abs(exact - rough).max() < 0.1 * exact.std()


def test_decoding_the_store_gives_the_photos(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cache("check", store, "--decode", 8) == 0
    out = printed(capsys)
    assert "decoded 8" in out
    assert "all 8 latents are right" in out


def test_pixels_in_another_range_are_found_by_decoding(
    photos: Path, vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The mistake of [0,1] for [-1,1], made on purpose: checksums are right, the pictures not."""
    args = ("--out", tmp_path / "l", "--vae", vae, "--resolution", 128)
    with monkeypatch.context() as patch:
        patch.setattr(xlsd_cache.encoding.encoder, "to_input", lambda p: (to_input(p) + 1) / 2)
        assert cache("build", photos, *args) == 0
    assert cache("check", tmp_path / "l") == 0
    assert cache("check", tmp_path / "l", "--decode", 8) == 1
    assert printed(capsys).count("WRONG") >= 6


@pytest.mark.parametrize("own", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_a_cards_memory_grows_in_place_unless_the_user_says_otherwise(
    own: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "set, so that it is put back")
        monkeypatch.delenv(name)
    if own:
        monkeypatch.setenv(own, "max_split_size_mb:64")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("sys.platform", "linux")
    device_of("cpu")
    assert os.environ.get("PYTORCH_ALLOC_CONF") in (None, "max_split_size_mb:64")
    assert device_of("auto") == torch.device("cuda", 0)
    told = {name: os.environ.get(name) for name in ("PYTORCH_ALLOC_CONF", own) if name}
    first = "max_split_size_mb:64" if own == "PYTORCH_ALLOC_CONF" else None
    expected = {"PYTORCH_ALLOC_CONF": first if own else "expandable_segments:True"}
    assert told == expected | ({own: "max_split_size_mb:64"} if own else {})


def test_what_a_gpu_has_left_counts_other_processes_the_limit_and_torchs_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """CUDA's own numbers, and nothing else, replaced, in GiB of 24."""
    gib = 2**30
    for name, value in (("memory_allocated", 2), ("memory_reserved", 5)):
        monkeypatch.setattr(f"torch.cuda.{name}", lambda _, value=value: value * gib)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)

    def left(free: int, share: float) -> float | None:
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (free * gib, 24 * gib))
        monkeypatch.setattr("torch.cuda.get_per_process_memory_fraction", lambda _: share)
        assert free_on(torch.device("cuda")) == free_on(torch.device("cuda", 0))
        return free_on(torch.device("cuda"))

    assert left(10, 1.0) == (10 + 5 - 2) * gib
    assert left(10, 0.25) == (6 - 2) * gib
    assert left(0, 0.05) == 0
    assert free_on(torch.device("cpu")) is None


def test_on_a_gpu_all_convolutions_have_one_memory_layout(vae: Path) -> None:
    """As on meta tensors, where each keeps its input's layout, as cuDNN's do."""
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8))
    model = load_vae(str(vae))
    expected = model.encode(to_input(pixels))
    planar = model.encode(to_input(pixels).contiguous())
    assert (planar - expected).abs().max() < 1e-5 * expected.std()

    contiguous: list[bool] = []
    for module in model.model.to("meta").modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_pre_hook(lambda _, x: contiguous.append(x[0].is_contiguous()))
    model.encode(to_input(pixels).to("meta"))
    assert not all(contiguous)
    contiguous.clear()
    model.encode(to_input(pixels.to("meta")))
    assert len(contiguous) > 10
    assert all(contiguous)


def test_the_log_says_how_many_images_a_gpu_encodes_at_once(
    vae: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "NVIDIA H200")
    encoder = Encoder(load_vae(str(vae)), "fp32", torch.device("meta"), 16, IN_FLIGHT)
    assert str(encoder) == "encoding on NVIDIA H200: 2 x 16 images at once"
