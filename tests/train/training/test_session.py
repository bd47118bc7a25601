"""All features of a run together: none undoes another."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.support import train

EVERYTHING: list[object] = [
    "--phase", "both", "--batch", 3, "--accum", 2, "--steps", 4, "--warmup", "50%", "--device",
    "cpu", "--threads", 1, "--optimizer", "dlion", "--scheduler", "cosine", "--memory", "sliced",
    "--micro-batch", 2, "--objective", "v", "--loss-weight", "min-snr", "--noise-offset", 0.05,
    "--timesteps", "stratified", "--normalize-latents", "--shuffle", "tags", "--tag-dropout", 0.1,
    "--forbid-tags", "astronaut", "--caption-dropout", 0.2, "--clip-skip", 1, "--tokens", 248,
    "--validate-every", 2, "--validation-fraction", 0.4, "--validation-images", 2, "--ema",
    "--sample-every", 2, "--sample-steps", 1, "--save-every", 2, "--reinit", "unet.conv_in",
]  # fmt: skip


def run_of(out: Path, *options: object) -> Path:
    assert train(*EVERYTHING, *options, "--out", out) == 0
    return out


def lines(path: Path) -> list[dict[str, Any]]:
    timed = {"images_per_s", "wait_s", "peak_gib"}
    told = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in timed} for line in told]


@pytest.fixture(scope="module")
def whole(model: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_of(tmp_path_factory.mktemp("all") / "run", "--model", model, "--data", store)


def test_a_run_with_everything_resumes_to_the_bit(
    whole: Path, model: Path, store: Path, tmp_path: Path
) -> None:
    given = ("--model", model, "--data", store)
    run_of(tmp_path / "run", *given, "--stop-after", 2)
    resumed = run_of(tmp_path / "run", *given)
    for name in ("unet", "text_encoder", "optimizer", "ema"):
        path = f"checkpoints/step-00000004/{name}.safetensors"
        ours, theirs = load_file(whole / path), load_file(resumed / path)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
    for name in ("metrics.jsonl", "validation.jsonl"):
        assert lines(whole / name) == lines(resumed / name)
    assert (whole / "samples/grid.png").read_bytes() == (resumed / "samples/grid.png").read_bytes()


@pytest.mark.slow
def test_another_plan_trains_the_same_but_for_rounding(
    whole: Path, model: Path, store: Path, tmp_path: Path
) -> None:
    plain = run_of(
        tmp_path / "run", "--model", model, "--data", store, "--memory", "plain", "--stop-after", 1
    )
    ours, theirs = (lines(run / "metrics.jsonl")[0] for run in (whole, plain))
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    ours, theirs = (lines(run / "validation.jsonl")[0] for run in (whole, plain))
    for name in ("held_out", "training"):
        assert ours[name]["mean"] == pytest.approx(theirs[name]["mean"], rel=1e-5)


def test_what_it_says_is_what_it_took(whole: Path) -> None:
    record = json.loads((whole / "config.json").read_text())
    (store,) = record["stores"]
    assert store["selected"] < store["tagged"] < store["images"] == 8
    assert record["captions"]["limit"] == 248
    assert record["objective"] == {"kind": "v", "before": "epsilon", "anew": True}


@pytest.mark.parametrize("form", ["run", "diffusers", "single-file"])
def test_its_model_draws_as_its_samples_did(whole: Path, tmp_path: Path, form: str) -> None:
    """With the clip-skip, length, objective and latents that it was trained with."""
    source = whole
    if form != "run":
        source = tmp_path / ("model" if form == "diffusers" else "model.safetensors")
        assert train("export", whole, source, "--format", form) == 0
    told: list[dict[str, Any]] = []
    for path in sorted((whole / "samples/step-00000004").glob("*.png")):
        with Image.open(path) as image:
            told.append(json.loads(image.text["xlsd"]))  # type: ignore[attr-defined]
            size = image.size
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"{it['prompt']} --seed {it['seed']}" for it in told))
    options = ("--size", f"{size[0]}x{size[1]}", "--steps", 1, "--tokenizer", whole / "base")
    out = tmp_path / "out"
    assert train("sample", source, "--prompts", prompts, "--out", out, *options) == 0
    (folder,) = (path for path in out.iterdir() if path.is_dir())
    for i in range(len(told)):
        pair = (whole / f"samples/step-00000004/{i:02d}.png", folder / f"{i:02d}.png")
        ours, theirs = (np.asarray(Image.open(path)).astype(int) for path in pair)
        assert abs(ours - theirs).max() <= 1
