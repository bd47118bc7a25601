import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support import cache, files, metrics, train
from tests.support.sessions import Open
from tests.support.vaes import tiny
from xlsd_cache.encoding.vae import load_vae
from xlsd_cache.errors import UserError
from xlsd_train.data.mixture import open_mixture
from xlsd_train.model.latent_scaling import (
    load_scaling,
    save_scaling,
    scaling_by_statistics,
    vae_scaling,
)


def test_normalised_latents_have_mean_0_and_spread_1_in_every_channel(store: Path) -> None:
    with open_mixture([str(store)]) as ours:
        scaling = scaling_by_statistics(ours)
        parts = [
            scaling(torch.from_numpy(ours.read(name, rows))).transpose(0, 1).flatten(1)
            for name, rows in ours.buckets.items()
        ]
        raw = torch.from_numpy(ours.read("128x128", ours.buckets["128x128"]))
    every = torch.cat(parts, dim=1)  # [C, values]
    assert every.mean(dim=1).abs().max() < 1e-5
    assert (every.std(dim=1, correction=0) - 1).abs().max() < 1e-5
    assert (scaling.raw(scaling(raw)) - raw).abs().max() < 1e-4


def test_what_is_saved_is_loaded_bit_for_bit(store: Path, vae: Path, tmp_path: Path) -> None:
    loaded = load_vae(str(vae))
    with open_mixture([str(store)]) as ours:
        for scaling in (scaling_by_statistics(ours), vae_scaling(loaded)):
            save_scaling(scaling, loaded, tmp_path)
            again = load_scaling("it", tmp_path, loaded, lambda: loaded)
            assert again.normalized == scaling.normalized
            assert torch.equal(again.shift, scaling.shift)
            assert torch.equal(again.scale, scaling.scale)


def test_another_vaes_statistics_are_refused(store: Path, vae: Path, tmp_path: Path) -> None:
    with open_mixture([str(store)]) as ours:
        save_scaling(scaling_by_statistics(ours), load_vae(str(vae)), tmp_path)
    tiny(tmp_path / "other")
    other = load_vae(str(tmp_path / "other"))
    with pytest.raises(UserError, match="was trained on normalised latents of the encoder"):
        load_scaling("it", tmp_path, other, lambda: other)


def test_the_statistics_stay_with_the_model(
    model: Path, store: Path, photos: Path, vae: Path, tmp_path: Path
) -> None:
    """In config.json and base/, through a resume, and into a run on another store, unasked."""
    common = ("--batch", 4, "--sample-every", 0, "--lr", 1e-3, "--warmup", 0, "--threads", 1)
    first, second = tmp_path / "unet", tmp_path / "te"
    given = ("--phase", "unet", "--model", model, "--data", store, "--steps", 4, *common)
    assert train(*given, "--normalize-latents", "--out", first, "--stop-after", 2) == 0
    assert train(*given, "--normalize-latents", "--out", first) == 0
    assert train(*given, "--normalize-latents", "--out", tmp_path / "whole") == 0
    assert metrics(first) == metrics(tmp_path / "whole")
    last = "checkpoints/step-00000004/unet.safetensors"
    assert files(first, last) == files(tmp_path / "whole", last)

    few, data = tmp_path / "few", tmp_path / "latents"
    few.mkdir()
    for name in ("cat.png", "coffee.jpg"):
        for path in (photos / name, (photos / name).with_suffix(".txt")):
            shutil.copy(path, few)
    assert cache("build", few, "--out", data, "--vae", vae, "--resolution", 128) == 0
    on = ("--phase", "te", "--model", first, "--data", data, "--steps", 1, *common[2:])
    assert train(*on, "--batch", 1, "--out", second) == 0
    told = [json.loads((run / "config.json").read_text())["latents"] for run in (first, second)]
    assert told[0] == told[1]
    assert told[0]["normalized"]
    assert len(set(told[0]["scale"])) == 4
    base = json.loads((second / "base/latents.json").read_text())
    assert {key: base[key] for key in told[0]} == told[0]


def test_samples_of_a_normalised_model_are_decoded_from_raw_latents(
    open_run: Open, tmp_path: Path
) -> None:
    """What the VAE decodes is latents / scale + shift, and not latents / 0.13."""
    session = open_run(normalize_latents=True, sample_steps=2)
    model, seen = session.model, []
    decode = model.vae.model.decode

    def watched(raw: torch.Tensor, *args: object, **kwargs: object) -> object:
        seen.append(raw)
        return decode(raw, *args, **kwargs)

    model.vae.model.decode = watched
    session.sampler(model, tmp_path, 0, session.accelerator)
    with torch.no_grad():
        pixels = decode(seen[0]).sample[0].clamp(-1, 1).permute(1, 2, 0).numpy()
    with Image.open(tmp_path / "samples/step-00000000/00.png") as image:
        assert np.array_equal(np.asarray(image), ((pixels / 2 + 0.5) * 255).round().astype("uint8"))
    # Two steps of an untrained model leave latents about as large as the noise they began with.
    normalised = model.scaling(seen[0])
    assert 0.1 < normalised.std() < 10


def test_normalised_latents_reach_the_network(open_run: Open, tmp_path: Path) -> None:
    plain = open_run()
    batch = plain.source.make(plain.batch_order.slot(0))
    other = open_run(normalize_latents=True, out=tmp_path / "other")
    assert not torch.equal(plain.take_step.loss(batch), other.take_step.loss(batch))
    mean = other.model.scaling(batch.latents).std()
    assert 0.5 < mean < 2
