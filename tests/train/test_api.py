"""The public API of xlsd_train logs and prints nothing."""

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import xlsd_train
from xlsd_cache import LatentStore, UserError
from xlsd_train import DLion, Lion, TrainConfig, export_model, load_model, train, write_report

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def as_in_a_notebook(capfd: Capture, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Errors name arguments, and nothing is printed, neither by Python nor by a library below."""
    monkeypatch.setattr(UserError, "names_flags", False)
    yield
    assert capfd.readouterr() == ("", "")


def config(store: Path, model: Path, out: Path) -> TrainConfig:
    return TrainConfig(
        phase="unet", batch=4, data=(str(store),), model=str(model), out=out, steps=2, warmup="0",
        device="cpu", threads=1, validate_every=0, sample_steps=1, sample_every=2,
    )  # fmt: skip


@pytest.fixture
def run(
    as_in_a_notebook: None, store: Path, model: Path, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> Path:  # fmt: skip
    with caplog.at_level(logging.INFO, "xlsd"):
        return train(config(store, model, tmp_path / "run"))


def test_train_writes_a_run_and_logs(
    run: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained = load_file(run / "checkpoints/step-00000002/unet.safetensors")
    before = load_file(model / "unet/diffusion_pytorch_model.safetensors")
    assert trained.keys() == before.keys()
    assert any(not torch.equal(trained[name], before[name]) for name in before)
    records = caplog.get_records("setup")
    assert any("step 2 of 2" in record.getMessage() for record in records)
    assert {record.name.split(".")[0] for record in records} == {"xlsd"}


def test_load_model_gives_networks_that_predict(run: Path, store: Path) -> None:
    model = load_model(run)
    assert not model.unet.training
    with LatentStore.open(store) as ours, torch.no_grad():
        bucket = next(iter(ours.buckets))
        raw = torch.from_numpy(ours.read(bucket, ours.buckets[bucket][:2]))
        ids = model.tokenizer(
            ["a cat", ""], padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        noise = model.unet(model.scaling(raw), 10, model.encode(ids)).sample
    assert noise.dtype == torch.float32
    assert noise.shape == raw.shape
    with torch.no_grad():
        pixels = model.vae.model.decode(raw.float()).sample
    assert pixels.shape[0] == 2
    weights = load_file(run / "checkpoints/step-00000002/unet.safetensors")
    assert all(torch.equal(weights[name], value) for name, value in model.weights("unet").items())


def test_load_model_replaces_parts(model: Path, run: Path) -> None:
    swapped = load_model(model, unet=run, vae=model / "vae")
    trained = load_model(run)
    assert swapped.sha256() == trained.sha256()
    with pytest.raises(UserError, match="^text_encoder .*nowhere: no such file or directory"):
        load_model(model, text_encoder="./nowhere")


def test_export_model_writes_a_file_that_load_model_reads(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "one.safetensors"
    with caplog.at_level(logging.INFO, "xlsd"):
        assert export_model(run, out, format="single-file") == out
    assert any("sha256" in line for line in caplog.messages)
    exported = load_model(out, tokenizer=run / "base")
    assert exported.sha256()["unet"] == load_model(run).sha256()["unet"]
    with pytest.raises(UserError, match="exists already"):
        export_model(run, out, format="single-file")
    with pytest.raises(UserError, match="^dtype 'fp64' is unknown; give fp32 or fp16 or bf16"):
        export_model(run, tmp_path / "two", dtype="fp64")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="^scaling_factor 0 is not"):
        export_model(run, tmp_path / "two", scaling_factor=0)


def test_write_report_writes_a_page(run: Path, tmp_path: Path) -> None:
    page = write_report([str(run)], tmp_path / "page.html")
    assert page.read_text().startswith("<!doctype html>")
    with pytest.raises(UserError, match="is not a run"):
        write_report([tmp_path])


@pytest.mark.parametrize("kind", [Lion, DLion])
def test_the_optimizers_step_like_torchs(kind: type[Lion] | type[DLion]) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = kind([weight], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (weight**2).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if isinstance(optimizer, DLion):
            optimizer.finish()
    assert (weight < 1).all()


def test_importing_the_package_loads_nothing_heavy() -> None:
    look = "import sys, xlsd_train; xlsd_train.TrainConfig; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        xlsd_train.nothing  # noqa: B018
    assert all(hasattr(xlsd_train, name) for name in xlsd_train.__all__)
